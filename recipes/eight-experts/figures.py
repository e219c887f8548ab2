"""What ``compare.py`` makes of the transcripts of several systems on several sets: figures, tables and pictures.

A set is named after its expert; ``malayalam:radio`` is a second source of it, ``none:french`` is for no expert.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from whisper_moe.evaluate.measure import Clip, Heard
from whisper_moe.evaluate.metrics import ErrorCounts, character_counts, clip_counts, interval, paired_difference
from whisper_moe.evaluate.report import markdown_table
from whisper_moe.media.normalize import normalize

METRICS = {"wer_capped": "WER, capped", "cer_capped": "CER, capped", "wer": "WER", "cer": "CER"}
SHOWN = 2
MEAN = "mean"
"""Of the sets that are named after an expert."""
SECOND, NOBODYS = "other sources", "for none"
"""Means of the other sets."""
Sets: TypeAlias = Mapping[str, list[Clip]]
Texts: TypeAlias = dict[str, dict[str, list[Heard]]]
"""System → set → what each clip became."""
Report: TypeAlias = Mapping[str, Any]


def family(name: str) -> str:
    """The expert of a set."""
    return name.partition(":")[0]


def counts(clips: Sequence[Clip], heard: Sequence[Heard]) -> dict[str, ErrorCounts]:
    samples = [clip.sample for clip in clips]
    said, languages = [each.text for each in samples], [each.target_language for each in samples]
    wer, cer = (count(said, [each.text for each in heard], languages) for count in (clip_counts, character_counts))
    return {"wer_capped": capped(wer), "cer_capped": capped(cer), "wer": wer, "cer": cer}


def capped(counts: ErrorCounts) -> ErrorCounts:
    """With no more errors in a clip than its reference has units: a loop of a hundred words costs what silence would."""
    return replace(counts, rows=np.minimum(counts.rows, counts.rows[:, 1:]))


def mean(parts: Sequence[ErrorCounts]) -> ErrorCounts:
    """The mean of the sets' rates as one figure, each set worth the same: a clip adds to the sums of its own set."""
    rows = [np.pad(part.rows, ((0, 0), (2 * i, 2 * (len(parts) - i - 1)))) for i, part in enumerate(parts)]
    return ErrorCounts(np.concatenate(rows), _mean_rate)


def _mean_rate(sums: np.ndarray) -> np.ndarray:
    """[..., 2 sets] → [...]; NaN where a resample has no clip of a set."""
    with np.errstate(invalid="ignore"):
        return (sums[..., ::2] / sums[..., 1::2]).mean(-1)


def compared(mine: ErrorCounts, base: ErrorCounts, oracle: ErrorCounts) -> dict[str, Any]:
    low, high = interval(mine)
    others = {"less_base": paired_difference(mine, base), "less_oracle": paired_difference(mine, oracle)}
    return {"value": mine.value, "low": low, "high": high, **others}


def figures(sets: Sets, texts: Texts, experts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """System → set, or group of sets of which it is the mean → metric → value, interval, and less the base and the oracle.

    ``experts``: those whose sets are the ones to be good at.
    """
    groups = {MEAN: [name for name in sets if name in experts]}
    groups[SECOND] = [name for name in sets if name not in experts and family(name) in experts]
    groups[NOBODYS] = [name for name in sets if family(name) not in experts]
    counted = {system: {name: counts(sets[name], each[name]) for name in sets} for system, each in texts.items()}
    for each in counted.values():
        for group, names in groups.items():
            if names:
                each[group] = {metric: mean([each[name][metric] for name in names]) for metric in METRICS}
    base = counted["base"]
    oracle = counted.get("oracle", base)
    return {
        system: {
            place: {metric: compared(part[metric], base[place][metric], oracle[place][metric]) for metric in METRICS}
            for place, part in each.items()
        }
        for system, each in counted.items()
    }


def best_english(sets: Sets, texts: Texts, experts: Sequence[str]) -> str | None:
    """The English expert with the lowest mean over all English experts' sets."""
    able = [name for name in experts if sets[name][0].sample.language == "en"]
    errors = {name: mean([counts(sets[x], texts[name][x])["wer_capped"] for x in able]).value for name in able}
    return min(errors, key=errors.__getitem__, default=None)


def routing(names: Sequence[str], heard: Mapping[str, Sequence[Heard]]) -> dict[str, Any]:
    """Of each set: who answered most, as shares of the clips, and how often that was its expert; None if it has none here."""
    found: dict[str, Any] = {}
    for place, each in heard.items():
        first = [max(one.experts, key=lambda pair: pair[1])[0] if one.experts else "nobody" for one in each]
        right = ErrorCounts.of([name == family(place) for name in first], [1] * len(first))
        found[place] = {
            "shares": {name: first.count(name) / len(first) for name in (*names, "nobody")},
            "right": [right.value, *interval(right)] if family(place) in names else None,
        }
    return found


def transcripts(sets: Sets, texts: Texts, systems: Sequence[str], experts: Sequence[str]) -> str:
    """The first clips of each set; of those that are for no expert, all where a system's words are not the base's."""
    parts = [
        "Said and written. Of sets that are for no expert: every clip of which a system's words are not the base's."
    ]
    for place, clips in sets.items():
        blocks = list[str]()
        for i, clip in enumerate(clips):
            found = {name: texts[name][place][i].text for name in ("base", *systems)}
            words = {normalize(text, clip.sample.target_language) for text in found.values()}
            if len(blocks) < SHOWN if family(place) in experts else len(words) > 1:
                lines = {"said": clip.sample.text, **found}.items()
                blocks.append("\n".join(f"- {name}: {' '.join(text.split())}" for name, text in lines))
        parts += [f"## {place}: {len(blocks)} of {len(clips)}", *blocks]
    return "\n\n".join(parts) + "\n"


def broken(texts: Texts) -> dict[str, dict[str, int]]:
    """System → set → clips that broke in it."""
    counted = {
        system: {place: sum(bool(each.error) for each in heard) for place, heard in places.items()}
        for system, places in texts.items()
    }
    return {
        system: {place: n for place, n in each.items() if n} for system, each in counted.items() if any(each.values())
    }


def write(out: Path, report: Report) -> None:
    """``report.json``, ``table.md``, ``routing.md``, and a heat map of the errors and of who answered in each system."""
    (out / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (out / "table.md").write_text(table(report), encoding="utf-8")
    (out / "routing.md").write_text(routes(report), encoding="utf-8")
    errors = {
        system: {place: each[place]["wer_capped"]["value"] for place in report["sets"]}
        for system, each in report["figures"].items()
    }
    picture(errors, out / "errors.svg")
    for name, places in report["routing"].items():
        picture({place: each["shares"] for place, each in places.items()}, out / f"routing-{name}.svg")


def table(report: Report) -> str:
    found, sizes = report["figures"], report["sets"]
    places = {name: f"{name} ({sizes[name]['clips']})" if name in sizes else name for name in found["base"]}
    parts = [notes(report)]
    for metric in ("wer_capped", "cer_capped", "wer"):
        rows = [
            [system, *(_cell(each[place][metric], "oracle" in found) for place in places)]
            for system, each in found.items()
        ]
        parts.append(markdown_table([METRICS[metric], *places.values()], rows))
    head = ["mean of the sets", "WER, capped", "less the base", "less the oracle", "CER, capped"]
    head += ["speed, × base", "peak memory, MiB", "on disk, MB"]
    parts.append(markdown_table(head, [_whole(report, system) for system in found]))
    sent = [
        [place, ", ".join(f"{code} → {to}: {n}" for (code, to), n in Counter(map(tuple, pairs)).most_common())]
        for place, pairs in report["dispatch"].items()
    ]
    if sent:
        parts.append(markdown_table(["dispatch", "language that the base hears → who answers: clips"], sent))
    return "\n\n".join(parts) + "\n"


def notes(report: Report) -> str:
    silence = ", ".join(f"{name} {margin:g}" for name, margin in report["margins"].items())
    parts = [
        "WER and CER in %. Capped: no clip has more errors than its reference has words or characters. ↓, ↑: fewer, more errors",
        "than the base, beyond the 95 % interval of the paired difference (bootstrap over clips, whoever spoke them). Greedy,",
        f"temperature fallback {'on' if report['fallback'] else 'off'}; language: {report['told']}.",
        f"Seconds of silence after a clip: {silence}.",
    ]
    if report["dispatch"]:
        parts += [
            f"°: not surely more than the oracle. Dispatch sends English to {report['english']}, chosen on {report['chosen']}.",
            f"Left out of the soup: {', '.join(report['not_in_soup']) or 'nobody'}.",
        ]
    if report["costs"]:
        parts += [
            f"Speed: the base's processor time over the system's, {report['timed_clips']} clips of each set on one thread,",
            "the best of rounds in turns, second tries included; oracle and dispatch hold all their models, each of which",
            "hears its own clips in a smaller batch, and dispatch hears one clip after the other for its language.",
        ]
    parts += [f"Not measured: {name}: {cause}." for name, cause in report["failed"].items()]
    for system, places in report["broken"].items():
        parts.append(
            f"Broken, so counted as empty: {system}: {', '.join(f'{n} of {place}' for place, n in places.items())}."
        )
    return "\n".join(parts)


def _cell(figure: Mapping[str, Any], oracle: bool) -> str:
    better, worse = figure["less_base"]["high"] < 0, figure["less_base"]["low"] > 0
    return (
        f"{100 * figure['value']:.1f}"
        + "↓" * better
        + "↑" * worse
        + "°" * (oracle and figure["less_oracle"]["low"] <= 0)
    )


def _whole(report: Report, system: str) -> list[str]:
    """A system's row of means and costs."""
    wer, cer = (report["figures"][system][MEAN][metric] for metric in ("wer_capped", "cer_capped"))
    differences = ((wer[less] | {"value": wer[less]["difference"]}) for less in ("less_base", "less_oracle"))
    shown = [_with_interval(*(each[key] for key in ("value", "low", "high"))) for each in (wer, *differences, cer)]
    took, disk = report["costs"].get(system), report["disk_bytes"].get(system)
    speed = f"{report['costs']['base']['cpu'] / took['cpu']:.2f}" if took else "–"
    memory = f"{took['peak_bytes'] / 2**20:.0f}" if took else "–"
    return [system, *shown, speed, memory, f"{disk / 1e6:.0f}" if disk else "–"]


def _with_interval(value: float, low: float, high: float) -> str:
    return f"{100 * value:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def routes(report: Report) -> str:
    said = "Who answered most of a clip, in % of the clips; right: the expert of the set did (95 % interval). Behind @: the"
    parts = [f"{said} seconds of silence after a clip. Nobody: nothing was written."]
    for system, sets in report["routing"].items():
        names = [*next(iter(sets.values()))["shares"]]
        rows = [
            [
                place,
                _with_interval(*each["right"]) if each["right"] else "–",
                *(f"{100 * each['shares'][name]:.1f}" for name in names),
            ]
            for place, each in sets.items()
        ]
        name = system if "@" in system else f"{system}@{report['margins'][system]:g}"
        parts += [f"## {name}", markdown_table(["set", "right", *names], rows)]
    return "\n\n".join(parts) + "\n"


def picture(shares: Mapping[str, Mapping[str, float]], file: Path) -> None:
    """A heat map of fractions, in %."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.5 + 0.3 * len(shares)), layout="constrained")
    axes, rows = figure.subplots(), [list(row.values()) for row in shares.values()]
    axes.imshow(rows, cmap="Blues", aspect="auto", vmin=0, alpha=0.6)
    axes.set_xticks(range(len(rows[0])), next(iter(shares.values())), rotation=30, ha="right")
    axes.set_yticks(range(len(rows)), shares)
    for (line, column), share in np.ndenumerate(rows):
        axes.text(column, line, f"{100 * share:.1f}", ha="center", va="center")
    figure.savefig(file, format="svg")
