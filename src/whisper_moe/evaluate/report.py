"""The report: ``report.json``, ``report.md``, ``transcripts.tsv`` and ``report.html``, all of them or none.

The page is the Markdown as HTML. It needs nothing else: no script and no network, its plots are within it.
Everything that comes from outside (names, transcripts, causes) is escaped.
"""

from __future__ import annotations

import json
import re
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from whisper_moe.evaluate.measure import Clip
from whisper_moe.weights.files import atomic_folder

JSON = "report.json"
FILES = (JSON, "report.md", "transcripts.tsv", "report.html")
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
_STYLE = """
:root { color-scheme: light dark; } img { max-width: 100%; background: white; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
p, figcaption { max-width: 60rem; font-size: .88rem; opacity: .8; }
table { display: block; overflow-x: auto; margin: .8rem 0; border-collapse: collapse; }
table { font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .7rem; border-bottom: 1px solid #8885; }
"""


class Section(NamedTuple):
    """A table with what has to be said about it; ``title`` empty where it goes on from the one before."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


def write(folder: Path, report: Report, clips: Sequence[Clip], texts: Mapping[str, Sequence[str]]) -> None:
    """All files, in the place of an earlier report. ``texts``: of each system."""
    data = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    contents = (data, markdown(report), transcripts(clips, texts), page(report))
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


def page(report: Report) -> str:
    """The whole page of HTML: what the Markdown says, and below what it was measured on, the plots."""
    from markdown_it import MarkdownIt

    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown(report))
    body = body.replace("</p>\n", "\n".join(["</p>", *_plots(report), ""]), 1)
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<title>Evaluation of {escape(report['model'])}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n{body}</body>\n</html>\n"
    )


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


def _scaled(name: str, figure: Mapping[str, Any], *keys: str) -> list[float]:
    """Numbers of a figure in the unit of its metric."""
    return [METRICS[name][1] * figure[key] for key in keys]


def _shown(name: str, figures: Mapping[str, Any]) -> str:
    """``10.92 (9.08–12.97)``, in the unit of the metric; – where there is none."""
    if figures.get(name, {}).get("value") is None:
        return "–"
    return "{:.2f} ({:.2f}–{:.2f})".format(*_scaled(name, figures[name], "value", "low", "high"))


def _parts(report: Report, task: str, division: str) -> dict[str, dict[str, Any]]:
    """Of each system what it has on every part of a division."""
    return {system: each["quality"][task]["by"].get(division, {}) for system, each in report["systems"].items()}


def _metrics_of(report: Report, task: str) -> list[str]:
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
        for division, load in _loads(each).items():
            names, title = list(next(iter(load.values()))), f"Expert load of {system}, % of the gates"
            rows = [(part, *(f"{100 * row[name]:.1f}" for name in names)) for part, row in load.items()]
            found.append(Section(title if division == "language" else "", (division, *names), rows))
    found += [_comparisons(report), _trouble(report)]
    return [section for section in found if section.rows]


def _overall(report: Report, task: str) -> Section:
    names, parts = _metrics_of(report, task), {s: each["quality"][task] for s, each in report["systems"].items()}
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
    names, parts = _metrics_of(report, task), _parts(report, task, division)
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
                    points = "{:+.2f} ({:+.2f} to {:+.2f})".format(*_scaled(name, found, "difference", "low", "high"))
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


def _plots(report: Report) -> Iterator[str]:
    for task in report["tasks"]:
        name = _metrics_of(report, task)[0]
        for division, words in (("duration", "the length of the clip"), ("language", "language")):
            by = _parts(report, task, division)
            if any(part["figures"][name]["value"] is not None for parts in by.values() for part in parts.values()):
                caption = f"{task}: by {words}. Lines are 95 % intervals."
                yield _picture(partial(_intervals, by=by, name=name), 4.5, caption)
    for system, each in report["systems"].items():
        for division, load in _loads(each).items():
            caption = f"Expert load of {system} by {division}: % of the gates."
            yield _picture(partial(heat_map, shares=load), 1.5 + 0.3 * len(load), caption)
    waits = {system: each["cost"]["latency"]["seconds"] for system, each in report["systems"].items()}
    if waits := {system: seconds for system, seconds in waits.items() if seconds}:
        caption = "Latency, one clip at a time; dashed: median and 95th percentile."
        yield _picture(partial(_latencies, waits=waits), 0.8 + 1.4 * len(waits), caption)


def _loads(system: Mapping[str, Any]) -> dict[str, Mapping[str, Mapping[str, float]]]:
    """By language, and by corpus where there are several; empty where experts are not chosen for whole segments."""
    by_corpus = {"corpus": system["experts_by_corpus"]} if len(system["experts_by_corpus"]) > 1 else {}
    return {"language": system["experts"]} | by_corpus if system["experts"] else {}


def _picture(draw: Callable[[Any], None], height: float, caption: str) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    drawn = BytesIO()
    with rc_context({"svg.fonttype": "none", "text.parse_math": False}):
        draw(figure := Figure(figsize=(9, height), layout="constrained"))
        figure.savefig(drawn, format="svg")
    source = f"data:image/svg+xml;base64,{b64encode(drawn.getvalue()).decode()}"
    return f'<figure><img alt="" src="{source}"><figcaption>{escape(caption)}</figcaption></figure>'


def _intervals(figure: Any, by: Mapping[str, Mapping[str, Any]], name: str) -> None:
    """One point with its interval for each part of a division and each system."""
    axes, parts = figure.subplots(), next(iter(by.values()))
    for number, (system, each) in enumerate(by.items()):
        shift, found = 0.12 * (number - (len(by) - 1) / 2), [part["figures"][name] for part in each.values()]
        points = [
            (column + shift, *_scaled(name, one, "value", "low", "high"))
            for column, one in enumerate(found)
            if one["value"] is not None
        ]
        x, y, low, high = np.array(points).reshape(-1, 4).T
        axes.errorbar(x, y, (abs(y - low), abs(y - high)), fmt="o", label=system)
    axes.set_xticks(range(len(parts)), [f"{part} ({size['clips']})" for part, size in parts.items()])
    axes.set_ylabel(METRICS[name][0])
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside lower center")


def heat_map(figure: Any, shares: Mapping[str, Mapping[str, float]]) -> None:
    """Of fractions, in %: of the gates, language or corpus by expert."""
    axes, rows = figure.subplots(), [list(row.values()) for row in shares.values()]
    axes.imshow(rows, cmap="Blues", aspect="auto", vmin=0, alpha=0.6)
    axes.set_xticks(range(len(rows[0])), next(iter(shares.values())), rotation=30, ha="right")
    axes.set_yticks(range(len(rows)), shares)
    for (line, column), share in np.ndenumerate(rows):
        axes.text(column, line, f"{100 * share:.1f}", ha="center", va="center")


def _latencies(figure: Any, waits: Mapping[str, Sequence[float]]) -> None:
    """A histogram for each system over the same seconds."""
    longest = max(map(max, waits.values()))
    plots = np.ravel(figure.subplots(len(waits), sharex=True))
    for axes, (system, seconds) in zip(plots, waits.items(), strict=True):
        axes.hist(seconds, bins=24, range=(0, longest))
        axes.set_title(f"{system} ({len(seconds)} clips)", fontsize="medium")
        for percent in (50, 95):
            axes.axvline(float(np.percentile(seconds, percent)), color="gray", linestyle="--")
    figure.supxlabel("seconds")
