"""From what systems wrote to figures: per task, and within it for all clips and by language, domain, duration and corpus.

Every figure is of a corpus, with a 95 % interval (:mod:`whisper_moe.evaluate.metrics`). A clip that a system failed on counts
as an empty transcript: nobody gains by failing. An empty reference adds whatever is written there as errors and no words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from whisper_moe.config import POSITIONS_PER_SECOND, ModelConfig, MoEConfig
from whisper_moe.data.sample import Task
from whisper_moe.evaluate.cost import active_parameters, flops, parameters
from whisper_moe.evaluate.material import Clip
from whisper_moe.evaluate.measure import Measured
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
"""Seconds between which durations are told apart."""
METRICS = {
    "wer": ("WER", 100.0, "%"),
    "cer": ("CER", 100.0, "%"),
    "bleu": ("BLEU", 1.0, ""),
    "chrf": ("chrF++", 1.0, ""),
    "accuracy": ("accuracy", 100.0, "%"),
    "script": ("letters in the right script", 100.0, "%"),
    "cross_entropy": ("cross-entropy, nats a token", 1.0, ""),
}
"""Each figure's name in a table, the factor it is shown with, and its unit."""


@dataclass(frozen=True)
class Scored:
    """One system on the clips of one task."""

    tallies: dict[str, ErrorCounts]
    signatures: dict[str, str]
    """How BLEU and chrF++ were computed, as sacrebleu writes it."""


def bucket(seconds: float) -> str:
    """``2–5 s``; an edge belongs to the bucket above it."""
    for low, high in pairwise(BUCKETS):
        if low <= seconds < high:
            return f"{low:g}–{high:g} s" if math.isfinite(high) else f"{low:g} s and more"
    raise ValueError(f"a clip lasts {seconds} s")


def by_task(clips: Sequence[Clip]) -> dict[Task, list[int]]:
    """The clips of each task, as they come."""
    found: dict[Task, list[int]] = {}
    for index, clip in enumerate(clips):
        found.setdefault(clip.sample.task, []).append(index)
    return found


def scored(clips: Sequence[Clip], measured: Measured, index: Sequence[int]) -> Scored:
    """The tallies of one system on these clips, which all have one task."""
    task = clips[index[0]].sample.task
    said = [clips[i].sample.text for i in index]
    written = [measured.heard[i].text.strip() for i in index]
    codes = [clips[i].sample.target_language for i in index]
    tallies, signatures = {}, {}
    if task == "transcribe":
        tallies = {"wer": clip_counts(said, written, codes), "cer": character_counts(said, written, codes)}
    elif task == "sign":
        tallies = {"accuracy": label_accuracy(said, written, codes)}
    else:
        tallies = translation_scores(said, written, codes)
        signatures = {name: counts.signature for name, counts in tallies.items()}
    tallies["script"] = script_fidelity(written, codes)
    if measured.surprise is not None:
        found = [measured.surprise[i] for i in index]
        rows = [(0.0, 0) if isinstance(each, str) else each for each in found]
        tallies["cross_entropy"] = ErrorCounts(np.array(rows, dtype=float).reshape(-1, 2))
    return Scored(tallies, signatures)


def figures(tallies: dict[str, ErrorCounts], chosen: Sequence[int] | None = None) -> dict[str, Any]:
    """Value and interval of each metric, of all clips or of some; None where there is nothing to measure."""
    found = {}
    for name, tally in tallies.items():
        part = tally if chosen is None else tally.of_clips(chosen)
        low, high = interval(part)
        found[name] = {"value": _number(part.value), "low": _number(low), "high": _number(high)}
        if name in ("wer", "cer", "cross_entropy"):
            found[name]["of"] = int(part.whole.sum())
    return found


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def divisions(clips: Sequence[Clip], index: Sequence[int]) -> dict[str, dict[str, list[int]]]:
    """Places within ``index`` by language, domain, duration and corpus; a division into one part is left out."""
    of = {
        "language": lambda clip: _languages(clip),
        "domain": lambda clip: clip.sample.domain or "none given",
        "duration": lambda clip: bucket(clip.seconds),
        "corpus": lambda clip: clip.corpus,
    }
    found: dict[str, dict[str, list[int]]] = {}
    for division, name in of.items():
        parts: dict[str, list[int]] = {}
        for place, i in enumerate(index):
            parts.setdefault(name(clips[i]), []).append(place)
        if division == "duration":
            parts = dict(sorted(parts.items(), key=lambda part: float(part[0].split("–")[0].split(" ")[0])))
        if len(parts) > 1 or division == "language":
            found[division] = parts if division == "duration" else dict(sorted(parts.items()))
    return found


def _languages(clip: Clip) -> str:
    sample = clip.sample
    if sample.language == sample.target_language:
        return sample.language
    return f"{sample.language}→{sample.target_language}"


def quality(clips: Sequence[Clip], measured: Measured) -> dict[str, Any]:
    """All figures about what one system wrote, by task."""
    found: dict[str, Any] = {}
    for task, index in by_task(clips).items():
        result = scored(clips, measured, index)
        parts = divisions(clips, index)
        found[task] = {
            **_counts(clips, measured, index),
            "figures": figures(result.tallies),
            "signatures": result.signatures,
            "by": {
                division: {
                    name: {**_size(clips, [index[i] for i in places]), "figures": figures(result.tallies, places)}
                    for name, places in groups.items()
                }
                for division, groups in parts.items()
            },
        }
    return found


def _size(clips: Sequence[Clip], index: Sequence[int]) -> dict[str, Any]:
    return {"clips": len(index), "seconds": sum(clips[i].seconds for i in index)}


def _counts(clips: Sequence[Clip], measured: Measured, index: Sequence[int]) -> dict[str, Any]:
    """What is easily overlooked in an average."""
    samples, heard = [clips[i].sample for i in index], [measured.heard[i] for i in index]
    said = [normalize(sample.text, sample.target_language) for sample in samples]
    written = [normalize(each.text, s.target_language) for each, s in zip(heard, samples, strict=True)]
    loops = [longest_loop(each.text, s.target_language) for each, s in zip(heard, samples, strict=True)]
    silent = [i for i in index if measured.surprise is not None and isinstance(measured.surprise[i], str)]
    reasons = sorted({str(measured.surprise[i]) for i in silent}) if measured.surprise is not None else []
    return {
        **_size(clips, index),
        "empty_references": sum(not text for text in said),
        "empty_transcripts": sum(not text for text in written),
        "failed": sum(each.error is not None for each in heard),
        "decoded_again": sum(each.fallbacks for each in heard),
        "longest_loop": max(loops),
        "without_cross_entropy": {"clips": len(silent), "why": reasons},
    }


def cost(clips: Sequence[Clip], measured: Measured) -> dict[str, Any]:
    """What it took. ``flops_per_second`` follows from the shapes (:func:`whisper_moe.evaluate.cost.flops`): each clip once,
    with its margin, for the tokens it was written in; tries that were given up are not counted.
    """
    seconds = sum(clip.seconds for clip in clips)
    counts = [each.tokens for each in measured.heard]
    tokens = None if None in counts else sum(count for count in counts if count is not None)
    waits, wall = measured.latencies, measured.wall
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
    if measured.config is not None:
        config = ModelConfig(**measured.config)
        found |= {
            "parameters_total": sum(parameters(config).values()),
            "parameters_active": active_parameters(config),
            "flops_per_second": _flops(config, clips, measured) / seconds if seconds else None,
        }
    return found


def _flops(config: ModelConfig, clips: Sequence[Clip], measured: Measured) -> float:
    """Windows of a longer recording are counted as the longest that it may be cut into, and a rest."""
    asked = TranscribeOptions(context_margin=measured.margin)
    most = config.max_source_positions / POSITIONS_PER_SECOND
    window, total = min(asked.window_seconds, most), 0
    for clip, heard in zip(clips, measured.heard, strict=True):
        full, rest = divmod(clip.seconds, window)
        parts = [min(most, part + asked.margin) for part in [window] * int(full) + [rest] * bool(rest)]
        share = (heard.tokens or 0) / max(1, len(parts))
        total += sum(flops(config, part, round(share)).total for part in parts)
    return float(total)


def expert_load(clips: Sequence[Clip], measured: Measured) -> dict[str, dict[str, float]]:
    """By language of what is spoken: the share of each expert's gates, idle ones and *none* included; they sum to 1."""
    moe = (measured.config or {}).get("moe")
    names: list[str] = [*MoEConfig(**moe).names, *(["none"] if moe["none_choice"] else [])] if moe else []
    idle: dict[str, float] = dict.fromkeys(names, 0.0)
    sums: dict[str, dict[str, float]] = {}
    counts: dict[str, int] = {}
    for clip, heard in zip(clips, measured.heard, strict=True):
        if heard.experts:
            row = sums.setdefault(clip.sample.language, dict(idle))
            counts[clip.sample.language] = counts.get(clip.sample.language, 0) + 1
            for name, gate in heard.experts:
                row[name] = row.get(name, 0.0) + gate
    return {code: {name: gate / counts[code] for name, gate in row.items()} for code, row in sorted(sums.items())}


def compared(clips: Sequence[Clip], mine: Measured, theirs: Measured) -> dict[str, Any]:
    """One system less another, by task: of all clips, and by language."""
    found: dict[str, Any] = {}
    for task, index in by_task(clips).items():
        ours, peers = scored(clips, mine, index).tallies, scored(clips, theirs, index).tallies
        both = [name for name in ours if name in peers and name != "cross_entropy"]
        languages = divisions(clips, index)["language"]
        found[task] = {
            "figures": {name: _difference(ours[name], peers[name]) for name in both},
            "language": {
                code: {name: _difference(ours[name].of_clips(part), peers[name].of_clips(part)) for name in both}
                for code, part in languages.items()
            },
            "differing_clips": sum(mine.heard[i].text.strip() != theirs.heard[i].text.strip() for i in index),
        }
    return found


def _difference(ours: ErrorCounts, theirs: ErrorCounts) -> dict[str, float | None]:
    return {key: _number(value) for key, value in paired_difference(ours, theirs).items()}
