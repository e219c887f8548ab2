"""``whisper-moe evaluate``: systems on corpora, and a report of figures per task, and within it for all clips and by language,
domain, duration and corpus.

Every figure is of a corpus, with a 95 % interval (:mod:`whisper_moe.evaluate.metrics`). A clip that a system failed on counts
as an empty transcript: nobody gains by failing. An empty reference adds whatever is written there as errors and no words.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from whisper_moe.config import FULL_WINDOW, SAMPLE_RATE
from whisper_moe.data.corpus import CorpusConfig
from whisper_moe.data.inspect import listed, named_corpus
from whisper_moe.data.sample import Sample, Skipped, items, tried
from whisper_moe.data.table import open_corpus
from whisper_moe.evaluate import metrics
from whisper_moe.evaluate import report as reports
from whisper_moe.evaluate.cost import cost
from whisper_moe.evaluate.measure import Clip, Heard, Measured, Options, System, apart, measure
from whisper_moe.evaluate.metrics import ErrorCounts
from whisper_moe.machine import machine, versions
from whisper_moe.media.audio import MediaError
from whisper_moe.media.normalize import normalize
from whisper_moe.weights.files import try_folder

logger = logging.getLogger(__name__)

BUCKETS = (0.0, 2.0, 5.0, 10.0, 20.0, 30.0, math.inf)
"""Seconds between which durations are told apart; an edge belongs to the bucket above it."""
_BUCKET_NAMES = [f"{a:g}–{b:g} s" if b < math.inf else f"{a:g} s and more" for a, b in pairwise(BUCKETS)]
_NEEDED = ("rapidfuzz", "sacrebleu", "whisper-normalizer")
T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """What was asked for, checked as far as it can be before anything is loaded."""

    systems: tuple[System, ...]
    """The model, then what it is compared with."""
    corpora: tuple[CorpusConfig, ...]
    output: Path | None
    options: Options


def plan(
    model: str,
    data: Sequence[str],
    *,
    compare: Sequence[str] | None = None,
    split: str | None = None,
    output: Path | None = None,
    columns: str | None = None,
    configuration: str | None = None,
    languages: Sequence[str] = (),
    task: Any = None,
    limit: int | None = None,
    **options: Any,
) -> Plan:
    """``data``: tables, folders and Hub ids. ``options``: those of :class:`Options`. Raises ``ValueError`` for what cannot work,
    in one sentence.
    """
    for package in _NEEDED:
        if find_spec(package.replace("-", "_")) is None:
            raise ValueError(f"evaluation needs {package}: pip install 'whisper-moe[evaluate]'")
    systems = tuple(map(System.parse, (model, *(compare or ()))))
    labels = [system.label for system in systems]
    if doubled := {label for label in labels if labels.count(label) > 1}:
        raise ValueError(f"two systems would both be called {', '.join(sorted(doubled))}: they cannot be told apart")
    which = {"languages": languages, "task": task, "limit": limit, "columns": listed(columns) if columns else ()}
    which["configuration"] = configuration
    corpora = [named_corpus(given, split, **which) for given in data]
    if output is not None:
        _check_folder(output)
    return Plan(systems, tuple(corpora), output, Options(**options))


def _check_folder(folder: Path) -> None:
    """Before any work: whether a report can be put there."""
    if folder.is_file():
        raise ValueError(f"{folder}: is a file; -o needs a folder")
    present = {path.name for path in folder.iterdir()} if folder.is_dir() else set[str]()
    if present and (reports.JSON not in present or present - set(reports.FILES)):
        others = sorted(present - set(reports.FILES) or present)
        raise ValueError(f"{folder}: not replaced, for it holds more than a report: {', '.join(others[:5])}")
    try_folder(folder.absolute().parent)


def gather(corpora: Sequence[CorpusConfig]) -> tuple[list[Clip], list[tuple[str, str]]]:
    """The clips in the order of their corpora, and name and cause of every file or row that is left out.

    Every sound is decoded once: what is broken shows here, and nowhere later. Raises :class:`DataError` for a corpus that
    cannot be read at all, and ``ValueError`` where nothing is left.
    """
    clips: list[Clip] = []
    broken: list[tuple[str, str]] = []
    for config in corpora:
        corpus = open_corpus(config)
        broken += [(each.id, each.cause) for each in corpus.left_out]
        for row in items(corpus):
            found = tried(row, partial(_clip, corpus.name))
            if isinstance(found, Skipped):
                broken.append((found.id, found.cause))
            else:
                clips.append(found)
    if not clips:
        causes = "; ".join(f"{name}: {cause}" for name, cause in broken[:3]) or "the corpora are empty"
        raise ValueError(f"there is nothing to evaluate on: {causes}")
    return clips, broken


def _clip(corpus: str, sample: Sample) -> Clip:
    """With what it lasts once it is decoded. Raises ``MediaError``, also where there is no sound in it."""
    if sample.audio is None:
        return Clip(corpus, sample, sample.duration or 0.0)
    if not (found := len(sample.audio.read())):
        raise MediaError(sample.audio.name, "no sound in it")
    return Clip(corpus, sample, found / SAMPLE_RATE)


def _measured_apart(system: System, clips: list[Clip], options: Options, load: Callable[..., Any]) -> Measured:
    return apart(measure, system, system.weights(), clips, options, load, threads=options.threads)


def evaluate(asked: Plan, load: Callable[..., Any], *, measure: Callable[..., Measured] = _measured_apart) -> int:
    """Measure, score, write; the exit status: 1 where a file, a clip or a system failed.

    ``load`` is ``WhisperMoE.from_pretrained``; ``measure`` takes the place of a measurement in a process of its own. Without
    an output folder, the report's Markdown is printed.
    """
    clips, broken = gather(asked.corpora)
    for name, cause in broken:
        logger.warning("whisper-moe: %s is left out: %s", name, cause)
    for system in asked.systems:
        if unknown := sorted({clip.sample.task for clip in clips} - set(system.tasks)):
            raise ValueError(
                f"{system.label} does not do the task {', '.join(unknown)}; it does {', '.join(system.tasks)}"
            )
    logger.info("%d clips, %.1f minutes", len(clips), sum(clip.seconds for clip in clips) / 60)
    measured: dict[System, Measured] = {}
    failed: dict[str, str] = {}
    first, waiting = asked.systems[0], list(asked.systems)
    while waiting:
        system = waiting.pop(0)
        logger.info("%s: measuring", system.label)
        try:
            found = measured[system] = measure(system, clips, asked.options, load)
            if system is first and asked.options.margin is None and found.margin not in (None, FULL_WINDOW):
                waiting.insert(0, replace(first, padded=True))  # as other programs would run it
        except (RuntimeError, ValueError, OSError) as error:
            failed[system.label] = " ".join(str(error).split())
            logger.warning("whisper-moe: %s was not measured: %s", system.label, failed[system.label])
    if first not in measured:
        raise ValueError(f"nothing to report: {first.label} could not be measured")
    report = _report(asked, clips, measured) | {"broken": broken, "not_measured": failed}
    if asked.output is None:
        print(reports.markdown(report), end="")
    else:
        texts = {system.label: [each.text for each in found.heard] for system, found in measured.items()}
        reports.write(asked.output, report, clips, texts)
        logger.info("%s: written", asked.output)
    return int(bool(broken or failed or any(each["failures"] for each in report["systems"].values())))


def _report(asked: Plan, clips: list[Clip], measured: dict[System, Measured]) -> dict[str, Any]:
    """Everything that the report says, as plain data."""
    packages = {package for system in measured for package in system.packages} | {*_NEEDED, "numpy"}
    (first, mine), *others = measured.items()
    settings = ("detect", "beam", "fallback", "margin", "threads", "latency_clips")
    return {
        "format": 1,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": first.label,
        "data": [{"source": shown(each.source), "split": each.split} for each in asked.corpora],
        "clips": len(clips),
        "audio_seconds": sum(clip.seconds for clip in clips),
        "languages": sorted({clip.sample.language for clip in clips}),
        "tasks": list(dict.fromkeys(clip.sample.task for clip in clips)),
        "settings": {name: getattr(asked.options, name) for name in settings} | {"limit": asked.corpora[0].limit},
        "resamples": metrics.RESAMPLES,
        "machine": machine(),
        "versions": versions(packages),
        "systems": {system.label: {"kind": system.kind} | _scored(clips, each) for system, each in measured.items()},
        "comparisons": [
            {"system": first.label, "baseline": other.label, "tasks": _compared(clips, mine, theirs)}
            for other, theirs in others
        ],
    }


def shown(source: str) -> str:
    """A local path by its last two names: the report may be published, and the rest is one machine's business."""
    return "/".join(Path(source).resolve().parts[-2:]) if Path(source).exists() else source


class Result(NamedTuple):
    """What one system made of a clip."""

    clip: Clip
    heard: Heard
    cross_entropy: tuple[float, int] | str | None


def _scored(clips: Sequence[Clip], measured: Measured) -> dict[str, Any]:
    """All that a report says of one system."""
    asked = ("device", "dtype", "threads", "machine_load_before", "options", "margin")
    pairs = zip(clips, measured.heard, strict=True)
    return {name: getattr(measured, name) for name in asked} | {
        "quality": {task: _quality(results) for task, results in _by_task(clips, measured).items()},
        "cost": cost(clips, measured),
        "experts": _expert_load(clips, measured, lambda clip: clip.sample.language),
        "experts_by_corpus": _expert_load(clips, measured, lambda clip: clip.corpus),
        "failures": [(clip.sample.id, heard.error) for clip, heard in pairs if heard.error is not None],
    }


def _compared(clips: Sequence[Clip], mine: Measured, theirs: Measured) -> dict[str, Any]:
    """One system less another, by task; not in cross-entropy, which is of each model's own tokens."""
    found: dict[str, Any] = {}
    for (task, ours), peers in zip(_by_task(clips, mine).items(), _by_task(clips, theirs).values(), strict=True):
        counts, others = _counts(ours), _counts(peers)
        both = [name for name in counts if name in others and name != "cross_entropy"]
        figures = {name: _known(metrics.paired_difference(counts[name], others[name])) for name in both}
        found[task] = {"figures": figures}
    return found


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
        counts = {"wer": metrics.clip_counts(*sides), "cer": metrics.character_counts(*sides)}
    elif samples[0].task == "sign":
        counts = {"accuracy": metrics.label_accuracy(*sides)}
    else:
        counts = metrics.translation_scores(*sides)
    counts["script"] = metrics.script_fidelity(*sides[1:])
    if results[0].cross_entropy is not None:
        sums = [(0.0, 0) if isinstance(each.cross_entropy, str) else each.cross_entropy for each in results]
        counts["cross_entropy"] = ErrorCounts(np.array(sums))
    return counts


def _figures(counts: Mapping[str, ErrorCounts], chosen: Sequence[int]) -> dict[str, Any]:
    """Value and interval of each metric, of some clips; None where there is nothing to measure."""
    found: dict[str, Any] = {}
    for name, each in counts.items():
        part = each.of_clips(chosen)
        low, high = metrics.interval(part)
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
        "longest_loop": max(metrics.longest_loop(each.text, code) for each, code in zip(heard, codes, strict=True)),
        "without_cross_entropy": {"clips": len(reasons), "why": sorted(set(reasons))},
        "signatures": {name: each.signature for name, each in counts.items() if each.signature},
        "by": {
            division: {name: part(places) for name, places in parts.items()}
            for division, parts in _divisions(results).items()
        },
    }


def _expert_load(
    clips: Sequence[Clip], measured: Measured, part_of: Callable[[Clip], str]
) -> dict[str, dict[str, float]]:
    """By language of what is spoken or by corpus: the share of each expert's gates, idle ones and *none* included; they sum to 1.

    It is the mean over clips of that over their segments; clips in which nothing was said are not counted.
    """
    moe = measured.config.moe if measured.config else None
    names = [*moe.names, *(["none"] if moe.none_choice else [])] if moe else []
    routed = [(clip, dict(heard.experts)) for clip, heard in zip(clips, measured.heard, strict=True) if heard.experts]
    rows = _grouped(routed, lambda pair: part_of(pair[0]))
    return {
        code: {name: sum(gates.get(name, 0.0) for _, gates in part) / len(part) for name in names}
        for code, part in sorted(rows.items())
    }
