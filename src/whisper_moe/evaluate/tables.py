"""What a report says in words and tables, before it is Markdown or HTML."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from whisper_moe.evaluate.score import METRICS


@dataclass(frozen=True, kw_only=True)
class Section:
    """A table with what has to be said about it; ``title`` empty where it goes on from the one before."""

    title: str = ""
    head: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    notes: tuple[str, ...] = ()


def sections(report: dict[str, Any]) -> list[Section]:
    """All of a report but its heading."""
    found: list[Section] = []
    for task in report["tasks"]:
        found += [_overall(report, task)]
        found += [_by(report, task, division) for division in ("language", "domain", "duration", "corpus")]
    found += [_cost(report), *_experts(report), _comparisons(report), _trouble(report)]
    return [section for section in found if section.rows or section.notes]


def circumstances(report: dict[str, Any]) -> str:
    """What every figure of the report was measured on."""
    settings, machine = report["settings"], report["machine"]
    corpora = ", ".join(f"{each['source']} ({each['kind']}, split {each['split']})" for each in report["data"])
    packages = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    arithmetic = ", ".join(
        f"{name} {each['dtype'] or 'as written'} on {each['device']}" for name, each in report["systems"].items()
    )
    kept = {name: each["margin"] for name, each in report["systems"].items() if each["margin"] is not None}
    margins = ", ".join(f"{name} {margin:g} s" for name, margin in kept.items())
    beam = "greedy" if settings["beam"] == 1 else f"beam {settings['beam']}"
    return (
        f"{report['clips']} clips, {report['audio_seconds'] / 60:.1f} minutes, of {corpora}; languages "
        f"{', '.join(report['languages'])}, {'detected by the system' if settings['detect'] else 'given to the system'}. "
        f"Decoding {beam}, temperature fallback {'on' if settings['fallback'] else 'off'}; silence kept after a "
        f"clip: {margins or 'not for these systems to say'}. {_threads(settings['threads'])} of {machine['cpu']}, "
        f"{machine['system']}, Python {machine['python']}, {packages}. Arithmetic: {arithmetic}. {report['date'][:10]}. "
        f"Intervals: 95 %, bootstrap over clips, {report['resamples']:,} resamples."
    )


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def shown(name: str, figure: dict[str, Any] | None) -> str:
    """``10.92 (9.08–12.97)``, in the unit of the metric; – where there is none."""
    if figure is None or figure["value"] is None:
        return "–"
    factor = METRICS[name][1]
    value = f"{factor * figure['value']:.2f}"
    if figure["low"] is None:
        return value
    return f"{value} ({factor * figure['low']:.2f}–{factor * figure['high']:.2f})"


def heading(name: str) -> str:
    """A metric as the head of a column."""
    label, _, unit = METRICS[name]
    return f"{label}, {unit}" if unit else label


def metrics_of(report: dict[str, Any], task: str) -> list[str]:
    """The metrics that any system has in this task, in the order of the tables."""
    found = [each["quality"][task]["figures"] for each in report["systems"].values()]
    return [name for name in METRICS if any(name in figures for figures in found)]


_COUNTS = {"failed": "failed", "empty_transcripts": "empty", "decoded_again": "again", "longest_loop": "repeats"}


def _overall(report: dict[str, Any], task: str) -> Section:
    names, systems = metrics_of(report, task), report["systems"]
    rows = []
    for system, each in systems.items():
        part = each["quality"][task]
        rows.append((system, *(shown(n, part["figures"].get(n)) for n in names), *(str(part[c]) for c in _COUNTS)))
    return Section(
        title=f"Quality: {task}", head=("system", *map(heading, names), *_COUNTS.values()), rows=tuple(rows),
        notes=tuple(_notes(report, task)),
    )  # fmt: skip


def _notes(report: dict[str, Any], task: str) -> Iterator[str]:
    first = next(iter(report["systems"].values()))["quality"][task]
    yield (
        f"{first['clips']} clips, {first['seconds']:.1f} s, {first['empty_references']} of them with nothing said in the "
        "reference. Failed: clips that the system broke on, counted as empty transcripts. Again: windows decoded again. "
        "Repeats: how often a phrase is said in a row at most."
    )
    yield from (f"{METRICS[name][0]}: {signature}." for name, signature in first["signatures"].items() if signature)
    for system, each in report["systems"].items():
        missing = each["quality"][task]["without_cross_entropy"]
        if missing["clips"]:
            yield f"{system}: no cross-entropy of {missing['clips']} clips: {'; '.join(missing['why'])}."


def _by(report: dict[str, Any], task: str, division: str) -> Section:
    parts = next(iter(report["systems"].values()))["quality"][task]["by"].get(division, {})
    names, rows = metrics_of(report, task), []
    for part, size in parts.items():
        for system, each in report["systems"].items():
            figures = each["quality"][task]["by"][division][part]["figures"]
            rows.append((part, str(size["clips"]), system, *(shown(name, figures.get(name)) for name in names)))
    return Section(head=(division, "clips", "system", *map(heading, names)), rows=tuple(rows))


_COST_HEAD = (
    "system", "× real time", "tokens/s", "latency p50, s", "p95, s", "memory, MB", "on disk, MB", "load, s",
    "parameters, M", "active, M", "GFLOPs a second of sound",
)  # fmt: skip


def _cost(report: dict[str, Any]) -> Section:
    rows = []
    for system, each in report["systems"].items():
        cost, wait = each["cost"], each["cost"]["latency"]
        cells = (
            (cost["times_real_time"], 1, 1), (cost["tokens_per_second"], 1, 1), (wait["p50"], 1, 3), (wait["p95"], 1, 3),
            (cost["peak_bytes"], 1e-6, 0), (cost["disk_bytes"], 1e-6, 1), (cost["load_seconds"], 1, 2),
            (cost.get("parameters_total"), 1e-6, 1), (cost.get("parameters_active"), 1e-6, 1),
            (cost.get("flops_per_second"), 1e-9, 2),
        )  # fmt: skip
        rows.append((system, *("–" if v is None else f"{v * factor:,.{digits}f}" for v, factor, digits in cells)))
    busy = ", ".join(
        f"{system} {each['machine_load_before']:.1f}"
        for system, each in report["systems"].items()
        if each["machine_load_before"] is not None
    )
    note = (
        "Speed: all clips as fast as the system can (batched, where it batches), files decoded within the time, loading "
        "apart. Latency: from one clip to its transcript, one clip at a time. Memory: the most that the system's own process "
        "has held. FLOPs: by formula, each clip once, TTT layers counted whether their gates are open or not. Processes that "
        f"wanted the machine as each began: {busy or 'not known'}."
    )
    return Section(title="Cost", head=_COST_HEAD, rows=tuple(rows), notes=(note,))


def experts_of(load: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The experts of a load table as the model counts them, *none* last."""
    return list(dict.fromkeys(name for row in load.values() for name in row))


def _experts(report: dict[str, Any]) -> Iterator[Section]:
    for system, each in report["systems"].items():
        if load := each["experts"]:
            names = experts_of(load)
            rows = ((code, *(f"{100 * row.get(name, 0):.1f}" for name in names)) for code, row in load.items())
            yield Section(title=f"Expert load of {system}, % of the gates", head=("language", *names), rows=tuple(rows))


def _comparisons(report: dict[str, Any]) -> Section:
    rows = []
    for each in report["comparisons"]:
        for task, part in each["tasks"].items():
            for name, found in part["figures"].items():
                if found["difference"] is None or found["low"] is None:
                    continue
                factor = METRICS[name][1]
                points = f"{factor * found['difference']:+.2f} ({factor * found['low']:+.2f} to {factor * found['high']:+.2f})"
                worse = f"{100 * found['share_worse']:.0f} %"
                rows.append((each["system"], each["baseline"], task, METRICS[name][0], points, worse))
    head = ("system", "against", "task", "metric", "difference (95 %)", "worse in resamples")
    return Section(title="Paired differences", head=head, rows=tuple(rows))


def _trouble(report: dict[str, Any]) -> Section:
    rows = [(name, "left out", cause) for name, cause in report["broken"]]
    rows += [(name, "was not measured", cause) for name, cause in report["not_measured"].items()]
    for system, each in report["systems"].items():
        rows += [(clip, f"{system} failed on it", cause) for clip, cause in each["failures"]]
    return Section(title="What went wrong", head=("what", "how", "cause"), rows=tuple(rows))
