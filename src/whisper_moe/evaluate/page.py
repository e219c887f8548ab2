"""The report as one HTML page that needs nothing else: no script, no network, its plots drawn as SVG.

Everything that comes from outside (names, transcripts, causes) is escaped.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from whisper_moe.evaluate.plots import expert_map, intervals, latencies
from whisper_moe.evaluate.tables import Section, circumstances, metrics_of, sections

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1b1a; --soft: #6b6966; --line: #dedcd8; --back: #fdfcfb;
  --s0: #2a6fc9; --s1: #d9622b; --s2: #15976a; --s3: #b07a00; --s4: #b8487f; --s5: #6a5acd; --heat: 42, 111, 201; }
@media (prefers-color-scheme: dark) { :root { --ink: #ecebe9; --soft: #a3a09b; --line: #3a3936; --back: #191817;
  --s0: #5b9bea; --s1: #ee8552; --s2: #37bd8c; --s3: #d9a52c; --s4: #e07fae; --s5: #9a8cf0; --heat: 91, 155, 234; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back); max-width: 72rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p { max-width: 60rem; } .facts, .note, figcaption { color: var(--soft); font-size: .88rem; }
.wide { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .25rem .7rem; border-bottom: 1px solid var(--line); }
th { font-weight: 600; vertical-align: bottom; } th:first-child, td.word, th.word { text-align: left; }
figure { margin: 1.2rem 0; } svg { max-width: 100%; height: auto; font: 12px system-ui, sans-serif; }
svg text { fill: var(--ink); } svg .soft { fill: var(--soft); } svg .axis { stroke: var(--line); stroke-width: 1; }
svg .whisker { stroke-width: 2; } svg .mark { stroke: var(--soft); stroke-dasharray: 3 3; }
"""


def page(report: dict[str, Any]) -> str:
    """The whole page."""
    title = f"Evaluation of {report['model']}"
    body = [f"<h1>{escape(title)}</h1>", f'<p class="facts">{escape(circumstances(report))}</p>', *_plots(report)]
    body += [_section(section) for section in sections(report)]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _section(section: Section) -> str:
    parts = [f"<h2>{escape(section.title)}</h2>"] if section.title else []
    if section.rows:
        words = [_is_word([row[column] for row in section.rows]) for column in range(len(section.head))]
        head = "".join(_cell("th", text, word) for text, word in zip(section.head, words, strict=True))
        rows = "".join(
            f"<tr>{''.join(_cell('td', text, word) for text, word in zip(row, words, strict=True))}</tr>\n"
            for row in section.rows
        )
        parts.append(
            f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody></table></div>'
        )
    parts += [f'<p class="note">{escape(note)}</p>' for note in section.notes]
    return "\n".join(parts)


def _is_word(cells: Sequence[str]) -> bool:
    """Whether a column is of words, which stand on the left, and not of numbers."""
    return not all(cell[:1] in "0123456789+-–" for cell in cells)


def _cell(tag: str, text: str, word: bool) -> str:
    return f'<{tag} class="word">{escape(text)}</{tag}>' if word else f"<{tag}>{escape(text)}</{tag}>"


def _plots(report: dict[str, Any]) -> list[str]:
    figures = []
    for task in report["tasks"]:
        names = metrics_of(report, task)
        if names and (drawn := intervals(report["systems"], task, names[0], "duration")):
            figures.append(_figure(drawn, f"{task}: by the length of the clip. Lines are 95 % intervals."))
        if names and (drawn := intervals(report["systems"], task, names[0], "language")):
            figures.append(_figure(drawn, f"{task}: by language. Lines are 95 % intervals."))
    for system, each in report["systems"].items():
        if drawn := expert_map(each["experts"]):
            figures.append(_figure(drawn, f"Expert load of {system} by language: % of the gates."))
    waits = {system: each["cost"]["latency"]["seconds"] for system, each in report["systems"].items()}
    if drawn := latencies({system: seconds for system, seconds in waits.items() if seconds}):
        figures.append(_figure(drawn, "Latency, one clip at a time; dashed: median and 95th percentile."))
    return figures


def _figure(svg: str, caption: str) -> str:
    return f"<figure>\n{svg}\n<figcaption>{escape(caption)}</figcaption>\n</figure>"
