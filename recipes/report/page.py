"""A page of HTML with plots, of a report that ``whisper-moe evaluate -o FOLDER`` has written.

    python recipes/report/page.py FOLDER/report.json page.html

It is the report's Markdown as HTML. It needs nothing else: no script and no network, its plots are within it. Everything
that the report has from outside (names, causes) is escaped. Needs ``pip install 'whisper-moe[evaluate]'``.
"""

from __future__ import annotations

import json
import sys
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from markdown_it import MarkdownIt
from matplotlib import rc_context
from matplotlib.figure import Figure

from whisper_moe.evaluate.report import METRICS, Report, loads, markdown, metrics_of, parts_of, scaled

STYLE = """
:root { color-scheme: light dark; } img { max-width: 100%; background: white; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
p, figcaption { max-width: 60rem; font-size: .88rem; opacity: .8; }
table { display: block; overflow-x: auto; margin: .8rem 0; border-collapse: collapse; }
table { font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .7rem; border-bottom: 1px solid #8885; }
"""


def main(report: Path, out: Path) -> None:
    out.write_text(page(json.loads(report.read_text(encoding="utf-8"))), encoding="utf-8", newline="\n")


def page(report: Report) -> str:
    """The whole page of HTML: what the Markdown says, and below what it was measured on, the plots."""
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown(report))
    body = body.replace("</p>\n", "\n".join(["</p>", *_plots(report), ""]), 1)
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<title>Evaluation of {escape(report['model'])}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n{body}</body>\n</html>\n"
    )


def _plots(report: Report) -> Iterator[str]:
    for task in report["tasks"]:
        name = metrics_of(report, task)[0]
        for division, words in (("duration", "the length of the clip"), ("language", "language")):
            by = parts_of(report, task, division)
            if any(part["figures"][name]["value"] is not None for parts in by.values() for part in parts.values()):
                caption = f"{task}: by {words}. Lines are 95 % intervals."
                yield _picture(partial(_intervals, by=by, name=name), 4.5, caption)
    for system, each in report["systems"].items():
        for division, load in loads(each).items():
            caption = f"Expert load of {system} by {division}: % of the gates."
            yield _picture(partial(_heat_map, shares=load), 1.5 + 0.3 * len(load), caption)
    waits = {system: each["cost"]["latency"]["seconds"] for system, each in report["systems"].items()}
    if waits := {system: seconds for system, seconds in waits.items() if seconds}:
        caption = "Latency, one clip at a time; dashed: median and 95th percentile."
        yield _picture(partial(_latencies, waits=waits), 0.8 + 1.4 * len(waits), caption)


def _picture(draw: Callable[[Any], None], height: float, caption: str) -> str:
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
            (column + shift, *scaled(name, one, "value", "low", "high"))
            for column, one in enumerate(found)
            if one["value"] is not None
        ]
        x, y, low, high = np.array(points).reshape(-1, 4).T
        axes.errorbar(x, y, (abs(y - low), abs(y - high)), fmt="o", label=system)
    axes.set_xticks(range(len(parts)), [f"{part} ({size['clips']})" for part, size in parts.items()])
    axes.set_ylabel(METRICS[name][0])
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside lower center")


def _heat_map(figure: Any, shares: Mapping[str, Mapping[str, float]]) -> None:
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


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
