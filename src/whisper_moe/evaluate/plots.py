"""The plots of the report as SVG, drawn by hand: they scale, follow the page's colours, and write any script."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from whisper_moe.evaluate.score import METRICS
from whisper_moe.evaluate.tables import experts_of, heading

WIDTH = 860
SERIES = 6
"""Colours that can be told apart; more systems begin again with the first."""
_LEFT, _TOP, _PLOT_HEIGHT = 64, 40, 240
BINS = 24


def intervals(systems: Mapping[str, Any], task: str, metric: str, division: str) -> str:
    """One point with its interval for each part of a division and each system; empty where there is no such division."""
    first = next(iter(systems.values()))["quality"][task]["by"].get(division, {})
    factor = METRICS[metric][1]
    found = {
        system: [each["quality"][task]["by"][division][part]["figures"].get(metric) for part in first]
        for system, each in systems.items()
    } if first else {}  # fmt: skip
    highs = [factor * (f["high"] or f["value"]) for row in found.values() for f in row if f and f["value"] is not None]
    if not highs:
        return ""
    top, step = _scale(max(highs))
    slot = (WIDTH - _LEFT) / len(first)
    parts = [*_axis(top, step, heading(metric)), *_legend(list(found), _TOP + _PLOT_HEIGHT + 48)]
    for column, part in enumerate(first):
        middle = _LEFT + (column + 0.5) * slot
        below = f"{part} ({first[part]['clips']})"
        parts.append(_text(middle, _TOP + _PLOT_HEIGHT + 20, below, anchor="middle"))
    for number, row in enumerate(found.values()):
        offset = (number - (len(found) - 1) / 2) * min(22, 0.8 * slot / len(found))
        for column, figure in enumerate(row):
            if figure and figure["value"] is not None:
                parts += _point(_LEFT + (column + 0.5) * slot + offset, figure, factor, top, number)
    return _svg(_TOP + _PLOT_HEIGHT + 40 + 20 * len(found), parts, f"{METRICS[metric][0]} by {division}")


def _point(x: float, figure: Mapping[str, Any], factor: float, top: float, number: int) -> list[str]:
    colour = f"var(--s{number % SERIES})"
    parts = []
    if figure["low"] is not None:
        low, high = (_height(factor * figure[end], top) for end in ("low", "high"))
        line = f'x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"'
        parts.append(f'<line class="whisker" {line} stroke="{colour}"/>')
    y = _height(factor * figure["value"], top)
    label = escape(f"{factor * figure['value']:.2f}")
    parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}"><title>{label}</title></circle>')
    return parts


def expert_map(load: Mapping[str, Mapping[str, float]]) -> str:
    """A heat map, language by expert: the share of the gates in %; empty for a model without experts."""
    if not load:
        return ""
    names = experts_of(load)
    wide, high, left, top = min(90.0, (WIDTH - 80) / len(names)), 28, 80, 76
    most = max(value for row in load.values() for value in row.values()) or 1.0
    parts = []
    for column, name in enumerate(names):
        x = left + (column + 0.5) * wide
        parts.append(f'<g transform="rotate(-30 {x:.1f} {top - 8})">{_text(x, top - 8, name)}</g>')
    for line, (code, row) in enumerate(load.items()):
        y = top + line * high
        parts.append(_text(left - 8, y + 19, code, anchor="end"))
        for column, name in enumerate(names):
            share, x = row.get(name, 0.0), left + column * wide
            box = f'x="{x:.1f}" y="{y}" width="{wide - 2:.1f}" height="{high - 2}"'
            parts.append(f'<rect {box} rx="2" fill="rgba(var(--heat), {0.06 + 0.64 * share / most:.2f})"/>')
            parts.append(_text(x + wide / 2 - 1, y + 18, f"{100 * share:.1f}", anchor="middle"))
    return _svg(top + len(load) * high + 8, parts, "Expert load by language")


def latencies(waits: Mapping[str, Sequence[float]]) -> str:
    """A histogram for each system over the same axis of seconds; empty where nothing was timed."""
    if not waits:
        return ""
    longest = max(max(seconds) for seconds in waits.values())
    top, step = _scale(longest)
    edges = np.linspace(0, top, BINS + 1)
    plot, parts = WIDTH - _LEFT, []
    height, gap = 64, 34
    for number, (system, seconds) in enumerate(waits.items()):
        base = 24 + number * (height + gap) + height
        counts = np.histogram(seconds, edges)[0]
        parts.append(_text(_LEFT, base - height - 8, f"{system} ({len(seconds)} clips)"))
        for bin_, count in enumerate(counts):
            tall = height * count / max(counts.max(), 1)
            x = _LEFT + bin_ * plot / BINS
            box = f'x="{x:.1f}" y="{base - tall:.1f}" width="{plot / BINS - 2:.1f}" height="{tall:.1f}"'
            parts.append(f'<rect {box} fill="var(--s{number % SERIES})"><title>{count}</title></rect>')
        for percent in (50, 95):
            x = _LEFT + plot * float(np.percentile(seconds, percent)) / top
            parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{base - height}" y2="{base}"/>')
        parts.append(f'<line class="axis" x1="{_LEFT}" x2="{WIDTH}" y1="{base}" y2="{base}"/>')
    foot = 24 + len(waits) * (height + gap) - gap + 18
    for tick in np.arange(0, top + step / 2, step):
        x = _LEFT + plot * tick / top
        parts.append(_text(min(x, WIDTH - 14), foot, f"{tick:g} s", anchor="middle", soft=True))
    return _svg(foot + 12, parts, "Latency")


def _axis(top: float, step: float, label: str) -> list[str]:
    """Lines across the plot, with what they stand for."""
    parts = [_text(_LEFT, _TOP - 14, label, soft=True)]
    for tick in np.arange(0, top + step / 2, step):
        y = _height(float(tick), top)
        parts.append(f'<line class="axis" x1="{_LEFT}" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(_LEFT - 8, y + 4, f"{tick:g}", anchor="end", soft=True))
    return parts


def _legend(names: Sequence[str], top: float) -> list[str]:
    """A line for each name: they may be long."""
    parts = []
    for number, name in enumerate(names):
        y = top + 20 * number
        parts.append(f'<circle cx="{_LEFT + 6}" cy="{y - 4:.0f}" r="5" fill="var(--s{number % SERIES})"/>')
        parts.append(_text(_LEFT + 18, y, name))
    return parts


def _height(value: float, top: float) -> float:
    return _TOP + _PLOT_HEIGHT * (1 - value / top)


def _scale(largest: float) -> tuple[float, float]:
    """A round end of an axis from 0 that holds ``largest``, and the step of its ticks."""
    if largest <= 0 or not math.isfinite(largest):
        return 1.0, 0.25
    power = 10.0 ** math.floor(math.log10(largest / 4))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if 5 * power * factor >= largest)
    return step * math.ceil(largest / step - 1e-9), step


def _text(x: float, y: float, text: str, *, anchor: str = "start", soft: bool = False) -> str:
    kind = ' class="soft"' if soft else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{kind}>{escape(text)}</text>'


def _svg(height: float, parts: Sequence[str], title: str) -> str:
    box = f'viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" height="{height:.0f}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {box} role="img"><title>{escape(title)}</title>\n'
        + "\n".join(parts)
        + "\n</svg>"
    )
