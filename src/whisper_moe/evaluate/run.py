"""``whisper-moe evaluate``: systems on corpora, and a report."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from whisper_moe.config import FULL_WINDOW
from whisper_moe.data.sample import Task
from whisper_moe.evaluate import report as reports
from whisper_moe.evaluate.cost import facts_of
from whisper_moe.evaluate.material import Material, corpus_config, gather
from whisper_moe.evaluate.measure import Measured, SystemFailed, Work, measure_apart
from whisper_moe.evaluate.metrics import RESAMPLES
from whisper_moe.evaluate.peers import Setup
from whisper_moe.evaluate.score import compared, cost, expert_load, quality
from whisper_moe.evaluate.systems import DEFAULT, System, parse, prepared
from whisper_moe.machine import machine, versions


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What was asked for, checked as far as it can be before anything is loaded."""

    systems: tuple[System, ...]
    """The model, then what it is compared with."""
    data: tuple[str, ...]
    split: str | None
    languages: tuple[str, ...]
    detect: bool
    task: Task | None
    columns: str | None
    limit: int | None
    output: Path | None
    device: str
    dtype: str
    threads: int
    beam: int
    fallback: bool
    margin: float | None
    """None: each model's own; the first model is then measured with every clip padded to 30 s, too."""
    latency_clips: int


def plan(
    model: str, data: Sequence[str], *, compare: Sequence[str] | None = None, split: str | None = None,
    languages: Sequence[str] = (), detect: bool = False, task: Any = None, limit: int | None = None,
    columns: str | None = None, output: Path | None = None, device: str = "auto",
    dtype: str = "auto", threads: int = 1, beam: int = 1, fallback: bool = True, margin: float | None = None,
    latency_clips: int = 40,
) -> Plan:  # fmt: skip
    """Raises ``ValueError`` for what cannot work, in one sentence."""
    for module, package in (
        ("jiwer", "jiwer"),
        ("whisper_normalizer", "whisper-normalizer"),
        ("sacrebleu", "sacrebleu"),
    ):
        if find_spec(module) is None:
            raise ValueError(f"evaluation needs {package}: pip install 'whisper-moe[evaluate]'")
    systems = tuple(parse(spec) for spec in (model, *(compare or ())))
    labels = [system.label for system in systems]
    if doubled := {label for label in labels if labels.count(label) > 1}:
        raise ValueError(f"two systems would both be called {', '.join(sorted(doubled))}: they cannot be told apart")
    for source in data:  # a mistake in a setting shows before anything is read
        corpus_config(source, split=split, languages=languages, task=task, limit=limit, columns=columns)
    if output is not None:
        reports.check_folder(output)
    return Plan(
        systems=systems, data=tuple(data), split=split, languages=tuple(languages), detect=detect, task=task, limit=limit,
        columns=columns, output=output, device=device, dtype=dtype, threads=threads, beam=beam, fallback=fallback,
        margin=margin, latency_clips=latency_clips,
    )  # fmt: skip


def evaluate(
    asked: Plan, load: Callable[..., Any], *, measure: Callable[..., Measured] = measure_apart,
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
) -> int:  # fmt: skip
    """Measure, score, write; the exit status: 1 where a file, a clip or a system failed.

    ``load`` is ``WhisperMoE.from_pretrained``. Without an output folder, the report's Markdown is printed.
    """
    material = _material(asked, say)
    measured: dict[str, Measured] = {}
    not_measured: dict[str, str] = {}
    waiting = list(asked.systems)
    while waiting:
        system = waiting.pop(0)
        say(f"{system.label}: measuring")
        try:
            found = measured[system.label] = measure(_work(asked, prepared(system), material), load)
            if system is asked.systems[0] and asked.margin is None and found.margin not in (None, FULL_WINDOW):
                waiting.insert(0, _padded(system))
        except (SystemFailed, RuntimeError, ValueError, OSError) as error:
            not_measured[system.label] = " ".join(str(error).split())
            say(f"whisper-moe: {system.label} was not measured: {not_measured[system.label]}")
    if asked.systems[0].label not in measured:
        raise ValueError(f"nothing to report: {asked.systems[0].label} could not be measured")
    report = built(asked, material, measured, not_measured)
    if asked.output is None:
        print(reports.markdown(report), end="")
    else:
        reports.write(asked.output, report, material.clips, measured)
        say(f"{asked.output}: written")
    failed = any(each["failures"] for each in report["systems"].values())
    return int(bool(material.broken or not_measured or failed))


def _padded(system: System) -> System:
    """The same model as other programs would run it."""
    return replace(system, padded=True)


def _material(asked: Plan, say: Callable[[str], None]) -> Material:
    configs = [
        corpus_config(
            source, split=asked.split, languages=asked.languages, task=asked.task, limit=asked.limit, columns=asked.columns,
        )
        for source in asked.data
    ]  # fmt: skip
    material = gather(configs)
    for name, cause in material.broken:
        say(f"whisper-moe: {name} is left out: {cause}")
    for system in asked.systems:
        unknown = sorted({clip.sample.task for clip in material.clips} - set(system.tasks))
        if unknown:
            raise ValueError(
                f"{system.label} does not do the task {', '.join(unknown)}; it does {', '.join(system.tasks)}"
            )
    say(f"{len(material.clips)} clips, {sum(clip.seconds for clip in material.clips) / 60:.1f} minutes")
    return material


def _work(asked: Plan, system: System, material: Material) -> Work:
    setup = Setup(
        weights=system.weights, threads=asked.threads, beam=asked.beam, fallback=asked.fallback,
    )  # fmt: skip
    return Work(
        system=system, clips=tuple(material.clips), setup=setup, device=asked.device, dtype=asked.dtype,
        margin=asked.margin, detect=asked.detect, latency_clips=asked.latency_clips,
    )  # fmt: skip


def built(
    asked: Plan, material: Material, measured: dict[str, Measured], not_measured: dict[str, str]
) -> dict[str, Any]:
    """Everything that the report says, as plain data."""
    clips = material.clips
    kinds = {system.label: system for system in (*asked.systems, _padded(asked.systems[0]))}
    systems = {label: _system(asked, kinds[label], material, each) for label, each in measured.items()}
    model, *others = measured
    packages = {package for label in measured for package in kinds[label].packages} | {"jiwer", "sacrebleu", "numpy"}
    return {
        "format": 1,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": model,
        "data": material.sources,
        "clips": len(clips),
        "audio_seconds": sum(clip.seconds for clip in clips),
        "languages": sorted({clip.sample.language for clip in clips}),
        "tasks": list(dict.fromkeys(clip.sample.task for clip in clips)),
        "settings": {
            "detect": asked.detect, "beam": asked.beam, "fallback": asked.fallback, "margin": asked.margin, "limit": asked.limit,
            "threads": asked.threads, "latency_clips": asked.latency_clips,
        },
        "resamples": RESAMPLES,
        "machine": machine(),
        "versions": versions(packages | {"whisper-normalizer"}),
        "systems": systems,
        "comparisons": [
            {"system": model, "baseline": other, "tasks": compared(clips, measured[model], measured[other])}
            for other in others
        ],
        "broken": material.broken,
        "not_measured": not_measured,
    }  # fmt: skip


def _system(asked: Plan, system: System, material: Material, measured: Measured) -> dict[str, Any]:
    costs = cost(material.clips, measured)
    if system.kind == "ours":
        facts = facts_of(None if system.name == DEFAULT and not Path(DEFAULT).exists() else system.name)
        costs["disk_bytes"] = sum(facts.get("bytes", {}).values()) or None
    return {
        "kind": system.kind,
        "device": measured.device,
        "dtype": measured.dtype,
        "threads": measured.threads,
        "machine_load_before": measured.machine_load_before,
        "options": measured.options,
        "margin": measured.margin,
        "quality": quality(material.clips, measured),
        "cost": costs,
        "experts": expert_load(material.clips, measured),
        "failures": [
            (clip.sample.id, heard.error)
            for clip, heard in zip(material.clips, measured.heard, strict=True)
            if heard.error is not None
        ],
    }
