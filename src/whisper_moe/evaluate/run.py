"""``whisper-moe evaluate``: systems on corpora, and a report."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from whisper_moe.config import FULL_WINDOW, SAMPLE_RATE
from whisper_moe.data.corpora import kind_of, open_corpus
from whisper_moe.data.corpus import KINDS, CorpusConfig
from whisper_moe.data.inspect import listed
from whisper_moe.data.sample import Skipped, items
from whisper_moe.evaluate import report as reports
from whisper_moe.evaluate import score
from whisper_moe.evaluate.measure import Clip, Measured, Options, measure
from whisper_moe.evaluate.metrics import RESAMPLES
from whisper_moe.evaluate.systems import System, apart
from whisper_moe.machine import machine, versions
from whisper_moe.media.audio import MediaError

logger = logging.getLogger(__name__)

_NEEDED = {
    "jiwer": "jiwer",
    "whisper_normalizer": "whisper-normalizer",
    "sacrebleu": "sacrebleu",
    "matplotlib": "matplotlib",
}


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
    languages: Sequence[str] = (),
    task: Any = None,
    limit: int | None = None,
    **options: Any,
) -> Plan:
    """``data``: ``kathbath:FOLDER``, ``include:…``, ``wiki-translate:…``, ``table:…``; without a kind, the Hub id or what lies in
    the folder decides. ``options``: those of :class:`Options`. Raises ``ValueError`` for what cannot work, in one sentence.
    """
    for module, package in _NEEDED.items():
        if find_spec(module) is None:
            raise ValueError(f"evaluation needs {package}: pip install 'whisper-moe[evaluate]'")
    systems = tuple(map(System.parse, (model, *(compare or ()))))
    labels = [system.label for system in systems]
    if doubled := {label for label in labels if labels.count(label) > 1}:
        raise ValueError(f"two systems would both be called {', '.join(sorted(doubled))}: they cannot be told apart")
    corpora = []
    for source in data:
        prefix, _, rest = source.partition(":")
        known = bool(rest) and prefix in KINDS
        kind, source = (prefix, rest) if known else (kind_of(source), source)
        where = {
            "kind": kind,
            "source": source,
            "split": split or KINDS[kind][0],
            "streaming": not Path(source).exists(),
        }
        which = {"languages": languages, "task": task, "limit": limit, "columns": listed(columns) if columns else ()}
        corpora.append(CorpusConfig(**where, **which))
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
    try:
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder.absolute().parent).close()
    except OSError as error:
        raise ValueError(f"{folder}: cannot be written: {error.strerror}") from error


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
        for row in islice(items(corpus), config.limit):  # rows that are no samples count: a limit is one of work
            if isinstance(row, Skipped):
                broken.append((row.id, row.cause))
                continue
            try:
                seconds = len(row.audio.read()) / SAMPLE_RATE if row.audio else row.duration or 0.0
            except MediaError as error:
                broken.append((row.id, str(error)))
                continue
            if row.audio and not seconds:
                broken.append((row.id, f"{row.audio.name}: no sound in it"))
            else:
                clips.append(Clip(corpus.name, row, seconds))
    if not clips:
        causes = "; ".join(f"{name}: {cause}" for name, cause in broken[:3]) or "the corpora are empty"
        raise ValueError(f"there is nothing to evaluate on: {causes}")
    return clips, broken


def evaluate(asked: Plan, load: Callable[..., Any], *, measure: Callable[..., Measured] | None = None) -> int:
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
            found = measured[system] = (measure or _measured_apart)(system, clips, asked.options, load)
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


def _measured_apart(system: System, clips: list[Clip], options: Options, load: Callable[..., Any]) -> Measured:
    return apart(measure, system, system.weights(), clips, options, load, threads=options.threads)


def _report(asked: Plan, clips: list[Clip], measured: dict[System, Measured]) -> dict[str, Any]:
    """Everything that the report says, as plain data."""
    packages = {package for system in measured for package in system.needs.packages} | {*_NEEDED.values(), "numpy"}
    (first, mine), *others = measured.items()
    settings = ("detect", "beam", "fallback", "margin", "threads", "latency_clips")
    return {
        "format": 1,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": first.label,
        "data": [{"kind": each.kind, "source": _shown(each.source), "split": each.split} for each in asked.corpora],
        "clips": len(clips),
        "audio_seconds": sum(clip.seconds for clip in clips),
        "languages": sorted({clip.sample.language for clip in clips}),
        "tasks": list(dict.fromkeys(clip.sample.task for clip in clips)),
        "settings": {name: getattr(asked.options, name) for name in settings} | {"limit": asked.corpora[0].limit},
        "resamples": RESAMPLES,
        "machine": machine(),
        "versions": versions(packages),
        "systems": {
            system.label: {"kind": system.kind} | score.system(clips, each) for system, each in measured.items()
        },
        "comparisons": [
            {"system": first.label, "baseline": other.label, "tasks": score.compared(clips, mine, theirs)}
            for other, theirs in others
        ],
    }


def _shown(source: str) -> str:
    """A local path by its last two names: the report may be published, and the rest is one machine's business."""
    return "/".join(Path(source).resolve().parts[-2:]) if Path(source).exists() else source
