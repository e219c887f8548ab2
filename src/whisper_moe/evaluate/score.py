"""From what systems wrote to figures: per task, and within it for all clips and by language, domain, duration and corpus.

Every figure is of a corpus, with a 95 % interval (:mod:`whisper_moe.evaluate.metrics`). A clip that a system failed on counts
as an empty transcript: nobody gains by failing. An empty reference adds whatever is written there as errors and no words.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import numpy as np

from whisper_moe.config import POSITIONS_PER_SECOND, ModelConfig
from whisper_moe.evaluate.cost import active_parameters, flops, parameters
from whisper_moe.evaluate.measure import Clip, Measured
from whisper_moe.evaluate.metrics import (
    ErrorCounts,
    character_counts,
    clip_counts,
    interval,
    label_accuracy,
    longest_loop,
    paired_difference,
    script_fidelity,
    translation_scores,
)
from whisper_moe.evaluate.systems import Heard
from whisper_moe.generate.options import TranscribeOptions
from whisper_moe.media.normalize import normalize

BUCKETS = (0.0, 2.0, 5.0, 10.0, 20.0, 30.0, math.inf)
"""Seconds between which durations are told apart; an edge belongs to the bucket above it."""
_BUCKET_NAMES = [f"{a:g}–{b:g} s" if b < math.inf else f"{a:g} s and more" for a, b in pairwise(BUCKETS)]
T = TypeVar("T")


class Result(NamedTuple):
    """What one system made of a clip."""

    clip: Clip
    heard: Heard
    cross_entropy: tuple[float, int] | str | None


def system(clips: Sequence[Clip], measured: Measured) -> dict[str, Any]:
    """All that a report says of one system."""
    asked = ("device", "dtype", "threads", "machine_load_before", "options", "margin")
    pairs = zip(clips, measured.heard, strict=True)
    return {name: getattr(measured, name) for name in asked} | {
        "quality": {task: _quality(results) for task, results in _by_task(clips, measured).items()},
        "cost": _cost(clips, measured),
        "experts": _expert_load(clips, measured),
        "failures": [(clip.sample.id, heard.error) for clip, heard in pairs if heard.error is not None],
    }


def compared(clips: Sequence[Clip], mine: Measured, theirs: Measured) -> dict[str, Any]:
    """One system less another, by task: of all clips, and by language."""
    found: dict[str, Any] = {}
    for (task, ours), peers in zip(_by_task(clips, mine).items(), _by_task(clips, theirs).values(), strict=True):
        sides = _counts(ours), _counts(peers)
        texts = [[each.heard.text.strip() for each in results] for results in (ours, peers)]
        found[task] = {
            "figures": _differences(*sides, range(len(ours))),
            "language": {code: _differences(*sides, part) for code, part in _divisions(ours)["language"].items()},
            "differing_clips": sum(map(operator.ne, *texts)),
        }
    return found


def _differences(
    counts: Mapping[str, ErrorCounts], others: Mapping[str, ErrorCounts], chosen: Sequence[int]
) -> dict[str, Any]:
    both = [name for name in counts if name in others and name != "cross_entropy"]
    pairs = {name: (counts[name].of_clips(chosen), others[name].of_clips(chosen)) for name in both}
    return {name: _known(paired_difference(*pair)) for name, pair in pairs.items()}


def _by_task(clips: Sequence[Clip], measured: Measured) -> dict[str, list[Result]]:
    results = map(Result, clips, measured.heard, measured.cross_entropies or [None] * len(clips))
    return _grouped(results, lambda each: each.clip.sample.task)


def _grouped(each: Iterable[T], name: Callable[[T], str]) -> dict[str, list[T]]:
    found: dict[str, list[T]] = {}
    for one in each:
        found.setdefault(name(one), []).append(one)
    return found


def _counts(results: Sequence[Result]) -> dict[str, ErrorCounts]:
    """Of clips which all have one task."""
    samples = [each.clip.sample for each in results]
    codes = [sample.target_language for sample in samples]
    sides = ([sample.text for sample in samples], [each.heard.text.strip() for each in results], codes)
    if samples[0].task == "transcribe":
        counts = {"wer": clip_counts(*sides), "cer": character_counts(*sides)}
    else:
        counts = {"accuracy": label_accuracy(*sides)} if samples[0].task == "sign" else translation_scores(*sides)
    counts["script"] = script_fidelity(*sides[1:])
    if results[0].cross_entropy is not None:
        sums = [each.cross_entropy for each in results]
        counts["cross_entropy"] = ErrorCounts(np.array([(0.0, 0) if isinstance(each, str) else each for each in sums]))
    return counts


def _figures(counts: Mapping[str, ErrorCounts], chosen: Sequence[int]) -> dict[str, Any]:
    """Value and interval of each metric, of some clips; None where there is nothing to measure."""
    found: dict[str, Any] = {}
    for name, each in counts.items():
        part = each.of_clips(chosen)
        low, high = interval(part)
        found[name] = _known({"value": part.value, "low": low, "high": high})
        if name in ("wer", "cer", "cross_entropy"):
            found[name]["of"] = int(part.whole.sum())
    return found


def _known(figures: Mapping[str, float]) -> dict[str, Any]:
    return {key: None if math.isnan(value) else value for key, value in figures.items()}


def _divisions(results: Sequence[Result]) -> dict[str, dict[str, list[int]]]:
    """Places by language, domain, duration and corpus; a division into one part is left out."""
    clips, found = [each.clip for each in results], {}
    pairs = [dict.fromkeys((clip.sample.language, clip.sample.target_language)) for clip in clips]
    of = {
        "language": ["→".join(pair) for pair in pairs],
        "domain": [clip.sample.domain or "none given" for clip in clips],
        "duration": [_BUCKET_NAMES[int(np.searchsorted(BUCKETS, clip.seconds, "right")) - 1] for clip in clips],
        "corpus": [clip.corpus for clip in clips],
    }
    for division, names in of.items():
        parts = _grouped(range(len(clips)), names.__getitem__)
        order = _BUCKET_NAMES if division == "duration" else sorted(parts)
        if len(parts) > 1 or division == "language":
            found[division] = {name: parts[name] for name in order if name in parts}
    return found


def _quality(results: Sequence[Result]) -> dict[str, Any]:
    """All figures about what one system wrote, of one task; also what is easily overlooked in an average."""
    counts, heard = _counts(results), [each.heard for each in results]
    samples = [each.clip.sample for each in results]
    codes = [sample.target_language for sample in samples]
    reasons = [each.cross_entropy for each in results if isinstance(each.cross_entropy, str)]

    def part(places: Sequence[int]) -> dict[str, Any]:
        seconds = sum(results[i].clip.seconds for i in places)
        return {"clips": len(places), "seconds": seconds, "figures": _figures(counts, places)}

    return {
        **part(range(len(results))),
        "empty_references": sum(not normalize(s.text, code) for s, code in zip(samples, codes, strict=True)),
        "empty_transcripts": sum(not normalize(each.text, code) for each, code in zip(heard, codes, strict=True)),
        "failed": sum(each.error is not None for each in heard),
        "decoded_again": sum(each.fallbacks for each in heard),
        "longest_loop": max(longest_loop(each.text, code) for each, code in zip(heard, codes, strict=True)),
        "without_cross_entropy": {"clips": len(reasons), "why": sorted(set(reasons))},
        "signatures": {name: each.signature for name, each in counts.items() if each.signature},
        "by": {
            division: {name: part(places) for name, places in parts.items()}
            for division, parts in _divisions(results).items()
        },
    }


def _cost(clips: Sequence[Clip], measured: Measured) -> dict[str, Any]:
    """What it took. ``flops_per_second`` follows from the shapes (:func:`whisper_moe.evaluate.cost.flops`): each clip once,
    with its margin, for the tokens it was written in; tries that were given up are not counted.
    """
    seconds, wall, config = sum(clip.seconds for clip in clips), measured.wall_seconds, measured.config
    waits, counts = measured.latencies, [each.tokens for each in measured.heard if each.tokens is not None]
    tokens = sum(counts) if len(counts) == len(clips) else None
    p50, p95 = np.percentile(waits, [50, 95]).tolist() if waits else (None, None)
    timed = ("wall_seconds", "cpu_seconds", "load_seconds", "peak_bytes", "disk_bytes")
    found = {name: getattr(measured, name) for name in timed} | {
        "audio_seconds": seconds,
        "times_real_time": seconds / wall if wall else None,
        "tokens": tokens,
        "tokens_per_second": tokens / wall if wall and tokens is not None else None,
        "latency": {"p50": p50, "p95": p95, "clips": len(waits), "apart": measured.latencies_apart, "seconds": waits},
    }
    if config is not None:
        found["parameters_total"] = sum(parameters(config).values())
        found["parameters_active"] = active_parameters(config)
        found["flops_per_second"] = _flops(config, clips, measured) / seconds if seconds else None
    return found


def _flops(config: ModelConfig, clips: Sequence[Clip], measured: Measured) -> float:
    """Windows of a longer recording are counted as the longest that it may be cut into, and a rest."""
    asked = TranscribeOptions(context_margin=measured.margin)
    most = config.max_source_positions / POSITIONS_PER_SECOND
    window, total = min(asked.window_seconds, most), 0
    for clip, heard in zip(clips, measured.heard, strict=True):
        full, rest = divmod(clip.seconds, window)
        parts = [min(most, part + asked.margin) for part in [window] * int(full) + [rest] * bool(rest)]
        share = round((heard.tokens or 0) / max(1, len(parts)))
        total += sum(flops(config, part, share).total for part in parts)
    return float(total)


def _expert_load(clips: Sequence[Clip], measured: Measured) -> dict[str, dict[str, float]]:
    """By language of what is spoken: the share of each expert's gates, idle ones and *none* included; they sum to 1."""
    moe = measured.config.moe if measured.config else None
    names = [*moe.names, *(["none"] if moe.none_choice else [])] if moe else []
    routed = [(clip, dict(heard.experts)) for clip, heard in zip(clips, measured.heard, strict=True) if heard.experts]
    rows = _grouped(routed, lambda pair: pair[0].sample.language)
    return {
        code: {name: sum(gates.get(name, 0.0) for _, gates in part) / len(part) for name in names}
        for code, part in sorted(rows.items())
    }
