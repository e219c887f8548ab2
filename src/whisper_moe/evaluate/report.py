"""The report: ``report.json``, ``report.md`` and ``transcripts.tsv``, all of them or none.

Everything that comes from outside (names, causes) is escaped in the Markdown. ``recipes/report/page.py`` makes a page with plots.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from whisper_moe.evaluate.measure import Clip
from whisper_moe.weights.files import atomic_folder

JSON = "report.json"
FILES = (JSON, "report.md", "transcripts.tsv")
METRICS = {
    "wer": ("WER, %", 100.0),
    "cer": ("CER, %", 100.0),
    "bleu": ("BLEU", 1.0),
    "chrf": ("chrF++", 1.0),
    "accuracy": ("accuracy, %", 100.0),
    "script": ("letters in the right script, %", 100.0),
    "cross_entropy": ("cross-entropy, nats a token", 1.0),
}
"""Each figure's name in a table, and the factor it is shown with."""
Report = Mapping[str, Any]


class Section(NamedTuple):
    """A table with what has to be said about it; ``title`` empty where it goes on from the one before."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


def write(folder: Path, report: Report, clips: Sequence[Clip], texts: Mapping[str, Sequence[str]]) -> None:
    """All files, in the place of an earlier report. ``texts``: of each system."""
    data = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    contents = (data, markdown(report), transcripts(clips, texts))
    with atomic_folder(folder.resolve(), overwrite=True) as fresh:
        for name, content in zip(FILES, contents, strict=True):
            (fresh / name).write_text(content, encoding="utf-8", newline="\n")


def transcripts(clips: Sequence[Clip], texts: Mapping[str, Sequence[str]]) -> str:
    """A TSV with a row for each clip; tabs and line ends within a text become spaces."""
    facts = ("id", "corpus", "task", "language", "target_language", "domain", "seconds", "reference")
    rows: list[Sequence[str]] = [(*facts, *texts)]
    for clip, *written in zip(clips, *texts.values(), strict=True):
        sample = clip.sample
        where = (sample.id, clip.corpus, sample.task, sample.language, sample.target_language, sample.domain or "")
        rows.append((*where, f"{clip.seconds:.2f}", sample.text, *written))
    return "".join("\t".join(" ".join(cell.split()) for cell in row) + "\n" for row in rows)


def markdown(report: Report) -> str:
    """The figures as tables, what they were measured on, and what went wrong."""
    parts = [f"# Evaluation of {_plain(report['model'])}", _plain(_circumstances(report))]
    for section in _sections(report):
        parts += [f"## {_plain(section.title)}"] * bool(section.title)
        parts.append(markdown_table(section.head, section.rows))
        parts += map(_plain, section.notes)
    return "\n\n".join(parts) + "\n"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(map(_plain, line))} |" for line in (head, ["---"] * len(head), *rows))


def _plain(text: str) -> str:
    """Text that cannot break a table or become markup."""
    escaped = re.sub(r"([\\|*_`\[\]])", r"\\\1", text.replace("&", "&amp;").replace("<", "&lt;"))
    return re.sub(r"\s+", " ", escaped)


def _circumstances(report: Report) -> str:
    """What every figure of the report was measured on."""
    settings, machine, systems = report["settings"], report["machine"], report["systems"].items()
    corpora = ", ".join(f"{each['source']} (split {each['split']})" for each in report["data"])
    packages = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    arithmetic = ", ".join(f"{name} {each['dtype'] or 'as written'} on {each['device']}" for name, each in systems)
    margins = ", ".join(f"{name} {each['margin']:g} s" for name, each in systems if each["margin"] is not None)
    return (
        f"{report['clips']} clips, {report['audio_seconds'] / 60:.1f} minutes, of {corpora}; languages "
        f"{', '.join(report['languages'])}, {'detected by the system' if settings['detect'] else 'given to the system'}. "
        f"Decoding {'greedy' if settings['beam'] == 1 else 'beam ' + str(settings['beam'])}, temperature fallback "
        f"{'on' if settings['fallback'] else 'off'}; silence kept after a clip: {margins or 'not for these systems to say'}. "
        f"{settings['threads']} thread{'s' * (settings['threads'] != 1)} of {machine['cpu']}, {machine['system']}, Python "
        f"{machine['python']}, {packages}. Arithmetic: {arithmetic}. {report['date'][:10]}. Intervals: 95 %, bootstrap over "
        f"clips, {report['resamples']:,} resamples."
    )


def scaled(name: str, figure: Mapping[str, Any], *keys: str) -> list[float]:
    """Numbers of a figure in the unit of its metric."""
    return [METRICS[name][1] * figure[key] for key in keys]


def _shown(name: str, figures: Mapping[str, Any]) -> str:
    """``10.92 (9.08–12.97)``, in the unit of the metric; – where there is none."""
    if figures.get(name, {}).get("value") is None:
        return "–"
    return "{:.2f} ({:.2f}–{:.2f})".format(*scaled(name, figures[name], "value", "low", "high"))


def parts_of(report: Report, task: str, division: str) -> dict[str, dict[str, Any]]:
    """Of each system what it has on every part of a division."""
    return {system: each["quality"][task]["by"].get(division, {}) for system, each in report["systems"].items()}


def metrics_of(report: Report, task: str) -> list[str]:
    """The metrics that any system has in this task, in the order of the tables."""
    found = [each["quality"][task]["figures"] for each in report["systems"].values()]
    return [name for name in METRICS if any(name in figures for figures in found)]


def _sections(report: Report) -> list[Section]:
    """All of a report but its heading."""
    found: list[Section] = []
    for task in report["tasks"]:
        found.append(_overall(report, task))
        found += [_by(report, task, division) for division in ("language", "domain", "duration", "corpus")]
    found.append(_cost(report))
    for system, each in report["systems"].items():
        for division, load in loads(each).items():
            names, title = list(next(iter(load.values()))), f"Expert load of {system}, % of the gates"
            rows = [(part, *(f"{100 * row[name]:.1f}" for name in names)) for part, row in load.items()]
            found.append(Section(title if division == "language" else "", (division, *names), rows))
    found += [_comparisons(report), _trouble(report)]
    return [section for section in found if section.rows]


def _overall(report: Report, task: str) -> Section:
    names, parts = metrics_of(report, task), {s: each["quality"][task] for s, each in report["systems"].items()}
    counts = {"failed": "failed", "empty_transcripts": "empty", "decoded_again": "again", "longest_loop": "repeats"}
    rows = [
        (system, *(_shown(name, part["figures"]) for name in names), *(str(part[count]) for count in counts))
        for system, part in parts.items()
    ]
    first = next(iter(parts.values()))
    said = (
        f"{first['clips']} clips, {first['seconds']:.1f} s, {first['empty_references']} of them with nothing said in the "
        "reference. Failed: clips that the system broke on, counted as empty transcripts. Again: windows decoded again. "
        "Repeats: how often a phrase is said in a row at most."
    )
    signatures = [f"{METRICS[name][0]}: {signature}." for name, signature in first["signatures"].items()]
    without = [
        f"{system}: no cross-entropy of {missing['clips']} clips: {'; '.join(missing['why'])}."
        for system, part in parts.items()
        if (missing := part["without_cross_entropy"])["clips"]
    ]
    head = ("system", *(METRICS[name][0] for name in names), *counts.values())
    return Section(f"Quality: {task}", head, rows, [said, *signatures, *without])


def _by(report: Report, task: str, division: str) -> Section:
    names, parts = metrics_of(report, task), parts_of(report, task, division)
    rows = [
        (part, str(size["clips"]), system, *(_shown(name, by[part]["figures"]) for name in names))
        for part, size in next(iter(parts.values())).items()
        for system, by in parts.items()
    ]
    return Section("", (division, "clips", "system", *(METRICS[name][0] for name in names)), rows)


_COST = {
    "× real time": ("times_real_time", 1, 1),
    "tokens/s": ("tokens_per_second", 1, 1),
    "latency p50, s": ("p50", 1, 3),
    "p95, s": ("p95", 1, 3),
    "memory, MB": ("peak_bytes", 1e-6, 0),
    "on disk, MB": ("disk_bytes", 1e-6, 1),
    "load, s": ("load_seconds", 1, 2),
    "parameters, M": ("parameters_total", 1e-6, 1),
    "active, M": ("parameters_active", 1e-6, 1),
    "GFLOPs a second of sound": ("flops_per_second", 1e-9, 2),
}
"""Column: key, factor, digits."""


def _cost(report: Report) -> Section:
    rows = []
    for system, each in report["systems"].items():
        cost = each["cost"] | each["cost"]["latency"]
        cells = ((cost.get(key), factor, digits) for key, factor, digits in _COST.values())
        rows.append((system, *("–" if v is None else f"{v * factor:,.{digits}f}" for v, factor, digits in cells)))
    loads = {system: each["machine_load_before"] for system, each in report["systems"].items()}
    busy = ", ".join(f"{system} {load:.1f}" for system, load in loads.items() if load is not None)
    note = (
        "Speed: all clips as fast as the system can (batched, where it batches), files decoded within the time, loading "
        "apart. Latency: from one clip to its transcript, one clip at a time. Memory: the most that the system's own process "
        "has held. FLOPs: by formula, each clip once, TTT layers counted whether their gates are open or not. Processes that "
        f"wanted the machine as each began: {busy or 'not known'}."
    )
    return Section("Cost", ("system", *_COST), rows, [note])


def _comparisons(report: Report) -> Section:
    rows = []
    for each in report["comparisons"]:
        for task, part in each["tasks"].items():
            for name, found in part["figures"].items():
                if found["difference"] is not None:
                    points = "{:+.2f} ({:+.2f} to {:+.2f})".format(*scaled(name, found, "difference", "low", "high"))
                    metric, worse = METRICS[name][0].removesuffix(", %"), f"{100 * found['share_worse']:.0f} %"
                    rows.append((each["system"], each["baseline"], task, metric, points, worse))
    head = ("system", "against", "task", "metric", "difference (95 %)", "worse in resamples")
    return Section("Paired differences", head, rows)


def _trouble(report: Report) -> Section:
    rows = [(name, "left out", cause) for name, cause in report["broken"]]
    rows += [(name, "was not measured", cause) for name, cause in report["not_measured"].items()]
    for system, each in report["systems"].items():
        rows += [(clip, f"{system} failed on it", cause) for clip, cause in each["failures"]]
    return Section("What went wrong", ("what", "how", "cause"), rows)


def loads(system: Mapping[str, Any]) -> dict[str, Mapping[str, Mapping[str, float]]]:
    """By language, and by corpus where there are several; empty where experts are not chosen for whole segments."""
    by_corpus = {"corpus": system["experts_by_corpus"]} if len(system["experts_by_corpus"]) > 1 else {}
    return {"language": system["experts"]} | by_corpus if system["experts"] else {}
