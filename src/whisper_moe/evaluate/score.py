"""From what systems wrote to figures: per task, and within it for all clips and by language, domain, duration and corpus.

Every figure is of a corpus, with a 95 % interval (:mod:`whisper_moe.evaluate.metrics`). A clip that a system failed on counts
as an empty transcript: nobody gains by failing. An empty reference adds whatever is written there as errors and no words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

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
from whisper_moe.generate.options import TranscribeOptions
from whisper_moe.media.normalize import normalize

BUCKETS = (0.0, 2.0, 5.0, 10.0, 20.0, 30.0, math.inf)
"""Seconds between which durations are told apart; an edge belongs to the bucket above it."""


def system(clips: Sequence[Clip], measured: Measured) -> dict[str, Any]:
    """All that a report says of one system."""
    asked = ("device", "dtype", "threads", "machine_load_before", "options", "margin")
    pairs = zip(clips, measured.heard, strict=True)
    return {name: getattr(measured, name) for name in asked} | {
        "quality": {task: _quality(clips, measured, index) for task, index in _by_task(clips).items()},
        "cost": _cost(clips, measured),
        "experts": _expert_load(clips, measured),
        "failures": [(clip.sample.id, heard.error) for clip, heard in pairs if heard.error is not None],
    }


def compared(clips: Sequence[Clip], mine: Measured, theirs: Measured) -> dict[str, Any]:
    """One system less another, by task: of all clips, and by language."""
    found: dict[str, Any] = {}
    for task, index in _by_task(clips).items():
        ours, peers = _counts(clips, mine, index), _counts(clips, theirs, index)
        both = [name for name in ours if name in peers and name != "cross_entropy"]
        found[task] = {
            "figures": {name: _known(paired_difference(ours[name], peers[name])) for name in both},
            "language": {
                code: {
                    name: _known(paired_difference(ours[name].of_clips(part), peers[name].of_clips(part)))
                    for name in both
                }
                for code, part in _divisions(clips, index)["language"].items()
            },
            "differing_clips": sum(mine.heard[i].text.strip() != theirs.heard[i].text.strip() for i in index),
        }
    return found


def _by_task(clips: Sequence[Clip]) -> dict[str, list[int]]:
    return _grouped(range(len(clips)), lambda index: clips[index].sample.task)


def _grouped(index: Sequence[int], name: Callable[[int], str]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for each in index:
        found.setdefault(name(each), []).append(each)
    return found


def _counts(clips: Sequence[Clip], measured: Measured, index: Sequence[int]) -> dict[str, ErrorCounts]:
    """Of one system on these clips, which all have one task."""
    task = clips[index[0]].sample.task
    written = [measured.heard[i].text.strip() for i in index]
    codes = [clips[i].sample.target_language for i in index]
    sides = ([clips[i].sample.text for i in index], written, codes)
    if task == "transcribe":
        counts = {"wer": clip_counts(*sides), "cer": character_counts(*sides)}
    else:
        counts = {"accuracy": label_accuracy(*sides)} if task == "sign" else translation_scores(*sides)
    counts["script"] = script_fidelity(written, codes)
    if measured.cross_entropies is not None:
        sums = [measured.cross_entropies[i] for i in index]
        rows = [(0.0, 0) if isinstance(each, str) else each for each in sums]
        counts["cross_entropy"] = ErrorCounts(np.array(rows, dtype=float))
    return counts


def _figures(counts: dict[str, ErrorCounts], chosen: Sequence[int]) -> dict[str, Any]:
    """Value and interval of each metric, of some clips; None where there is nothing to measure."""
    found: dict[str, Any] = {}
    for name, each in counts.items():
        part = each.of_clips(chosen)
        found[name] = _known(dict(zip(("value", "low", "high"), (part.value, *interval(part)), strict=True)))
        if name in ("wer", "cer", "cross_entropy"):
            found[name]["of"] = int(part.whole.sum())
    return found


def _known(figures: dict[str, float]) -> dict[str, float | None]:
    return {key: None if math.isnan(value) else value for key, value in figures.items()}


def _divisions(clips: Sequence[Clip], index: Sequence[int]) -> dict[str, dict[str, list[int]]]:
    """Places within ``index`` by language, domain, duration and corpus; a division into one part is left out."""
    edges = [edge for edge in BUCKETS if math.isfinite(edge)]
    names = [f"{low:g}–{high:g} s" if high < math.inf else f"{low:g} s and more" for low, high in pairwise(BUCKETS)]

    def language(sample: Any) -> str:
        same = sample.language == sample.target_language
        return sample.language if same else f"{sample.language}→{sample.target_language}"

    of: dict[str, Callable[[Clip], str]] = {
        "language": lambda clip: language(clip.sample),
        "domain": lambda clip: clip.sample.domain or "none given",
        "duration": lambda clip: names[int(np.searchsorted(edges, clip.seconds, "right")) - 1],
        "corpus": lambda clip: clip.corpus,
    }
    found = {}
    for division, name in of.items():
        parts = _grouped(range(len(index)), lambda place, name=name: name(clips[index[place]]))
        if len(parts) > 1 or division == "language":
            found[division] = {
                name: parts[name] for name in (names if division == "duration" else sorted(parts)) if name in parts
            }
    return found


def _quality(clips: Sequence[Clip], measured: Measured, index: Sequence[int]) -> dict[str, Any]:
    """All figures about what one system wrote, of one task; also what is easily overlooked in an average."""
    counts, heard = _counts(clips, measured, index), [measured.heard[i] for i in index]
    codes = [clips[i].sample.target_language for i in index]
    said = [normalize(clips[i].sample.text, clips[i].sample.target_language) for i in index]
    written = [normalize(each.text, code) for each, code in zip(heard, codes, strict=True)]
    reasons = [each for i in index if isinstance(each := (measured.cross_entropies or {i: 0.0})[i], str)]
    return {
        **_size(clips, index),
        "empty_references": said.count(""),
        "empty_transcripts": written.count(""),
        "failed": sum(each.error is not None for each in heard),
        "decoded_again": sum(each.fallbacks for each in heard),
        "longest_loop": max(longest_loop(each.text, code) for each, code in zip(heard, codes, strict=True)),
        "without_cross_entropy": {"clips": len(reasons), "why": sorted(set(reasons))},
        "figures": _figures(counts, range(len(index))),
        "signatures": {name: each.signature for name, each in counts.items() if each.signature},
        "by": {
            division: {
                name: {**_size(clips, [index[i] for i in places]), "figures": _figures(counts, places)}
                for name, places in parts.items()
            }
            for division, parts in _divisions(clips, index).items()
        },
    }


def _size(clips: Sequence[Clip], index: Sequence[int]) -> dict[str, Any]:
    return {"clips": len(index), "seconds": sum(clips[i].seconds for i in index)}


def _cost(clips: Sequence[Clip], measured: Measured) -> dict[str, Any]:
    """What it took. ``flops_per_second`` follows from the shapes (:func:`whisper_moe.evaluate.cost.flops`): each clip once,
    with its margin, for the tokens it was written in; tries that were given up are not counted.
    """
    seconds = sum(clip.seconds for clip in clips)
    counts = [each.tokens for each in measured.heard if each.tokens is not None]
    tokens = sum(counts) if len(counts) == len(clips) else None
    waits, wall, config = measured.latencies, measured.wall, measured.config
    found: dict[str, Any] = {
        "audio_seconds": seconds,
        "wall_seconds": wall,
        "cpu_seconds": measured.cpu,
        "times_real_time": seconds / wall if wall else None,
        "tokens": tokens,
        "tokens_per_second": tokens / wall if wall and tokens is not None else None,
        "latency": {
            "p50": float(np.percentile(waits, 50)) if waits else None,
            "p95": float(np.percentile(waits, 95)) if waits else None,
            "clips": len(waits),
            "apart": measured.latencies_apart,
            "seconds": waits,
        },
        "load_seconds": measured.load,
        "peak_bytes": measured.peak,
        "disk_bytes": measured.disk,
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
    rows: dict[str, list[dict[str, float]]] = {}
    for clip, heard in zip(clips, measured.heard, strict=True):
        if heard.experts:
            rows.setdefault(clip.sample.language, []).append(dict(heard.experts))
    return {
        code: {name: sum(row.get(name, 0.0) for row in part) / len(part) for name in names}
        for code, part in sorted(rows.items())
    }
