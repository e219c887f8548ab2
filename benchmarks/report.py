"""What a run of the benchmark means: error rates with intervals, paired differences, speed, and the files that say so.

Both sides are normalised with Whisper's English rules (whisper_normalizer) before they are compared. WER is that of the
corpus: all edits over all reference words. Its interval, and that of a difference between two systems, is a percentile
bootstrap over clips (Bisani and Ney 2004): 1,000 resamples from one seed, the same clips drawn for both systems.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rapidfuzz.distance import Levenshtein

from whisper_moe.evaluate.metrics import (
    ErrorCounts,
    character_counts,
    clip_counts,
    interval,
    longest_loop,
    paired_difference,
)
from whisper_moe.media.normalize import normalize


@dataclass(frozen=True)
class Material:
    """What was said. ``joined``: the clips are one recording, with one transcript for all of them."""

    names: tuple[str, ...]
    references: tuple[str, ...]
    joined: bool


def counts(material: Material, transcripts: Sequence[str]) -> ErrorCounts:
    if material.joined:
        return joined_counts(material.references, transcripts[0])
    return clip_counts(material.references, transcripts)


def joined_counts(references: Sequence[str], transcript: str, language: str = "en") -> ErrorCounts:
    """Word edits of one transcript of all clips in a row, each charged to the clip that its reference word is in.

    An insertion belongs to the clip of the word before it, so that the edits add up to those of the whole.
    """
    words = np.array([len(normalize(text, language).split()) for text in references])
    owner = np.repeat(np.arange(len(references)), words)
    said = " ".join(normalize(text, language) for text in references)
    edits = np.zeros(len(references), dtype=int)
    for each in Levenshtein.opcodes(said.split(), normalize(transcript, language).split()):
        if each.tag == "insert":
            edits[owner[max(each.src_start - 1, 0)]] += each.dest_end - each.dest_start
        elif each.tag != "equal":
            np.add.at(edits, owner[each.src_start : each.src_end], 1)
    return ErrorCounts.of(edits, words)


def character_error_rate(material: Material, transcripts: Sequence[str]) -> float:
    references = [" ".join(material.references)] if material.joined else material.references
    return character_counts(references, transcripts).value


def changed(material: Material, transcripts: Sequence[str], baseline: Sequence[str]) -> list[dict[str, Any]] | None:
    """Every clip that two systems write differently, with the edits of each. None for one joined recording."""
    if material.joined:
        return None
    now, before = counts(material, transcripts), counts(material, baseline)
    rows = zip(material.names, material.references, transcripts, baseline, now.part, before.part, strict=True)
    return [
        {"clip": name, "reference": said, "text": text, "baseline": other, "edits": int(a), "baseline_edits": int(b)}
        for name, said, text, other, a, b in rows
        if text != other
    ]


def spread(values: Sequence[float]) -> dict[str, Any]:
    return {"min": min(values), "median": statistics.median(values), "all": list(values)}


def summary(results: Sequence[dict[str, Any]], material: Material, seconds: float) -> dict[str, Any]:
    """One system's figures over its repeats. Transcripts are those of the first pass."""
    passes = [each for result in results for each in result["passes"]]
    first, texts = results[0], passes[0]["texts"]
    errors = counts(material, texts)
    low, high = interval(errors)
    walls = [each["wall"] for each in passes]
    return {
        "wall_seconds": spread(walls),
        "cpu_seconds": spread([each["cpu"] for each in passes]),
        "real_time_factor": {"best": seconds / min(walls), "median": seconds / statistics.median(walls)},
        "latency": latency(first, passes),
        "wer": {"value": errors.value, "low": low, "high": high, "words": int(errors.whole.sum())},
        "cer": character_error_rate(material, texts),
        "longest_loop": max(longest_loop(text) for text in texts),
        "same_transcripts_every_time": all(each["texts"] == texts for each in passes),
        "fallbacks": first["fallbacks"],
        "peak_bytes": max(result["peak_bytes"] for result in results),
        "disk_bytes": first["disk_bytes"],
        "import_seconds": spread([result["import_seconds"] for result in results]),
        "load_seconds": spread([result["load_seconds"] for result in results]),
        "machine_load_before": [result["machine_load_before"] for result in results],
        "options": first["options"],
        "transcripts": texts,
    }


def latency(first: dict[str, Any], passes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Median seconds from a clip to its transcript: of a batching system apart, since its job gives no such thing."""
    recordings = len(passes[0]["texts"])
    apart = first["batched"] and recordings > 1
    if apart:
        seconds = first.get("one_by_one", [])
    else:
        seconds = [value for each in passes for value in (each["latencies"] or [each["wall"]])]
    return {
        "median": statistics.median(seconds) if seconds else None,
        "clips": len(seconds) if apart else recordings,
        "how": "one by one, after the timed job" if apart else "in the timed job",
    }


def default_pairs(names: Sequence[str], baseline: str) -> list[tuple[str, ...]]:
    """Each system against its own padded form, its int8 form against it, then every system against the baseline."""
    padded = [(name, f"{name}-padded") for name in names if f"{name}-padded" in names]
    int8 = [(f"{name}-int8", name) for name in names if f"{name}-int8" in names]
    return padded + int8 + [(name, baseline) for name in names if name != baseline and baseline in names]


def build(
    runs: dict[str, list[dict[str, Any]]],
    material: Material,
    seconds: float,
    baseline: str,
    pairs: Sequence[tuple[str, ...]],
) -> dict[str, Any]:
    """All figures of ``results.json`` that follow from the measurements.

    Raises :class:`ValueError` for a pair that names a system which was not run.
    """
    found = {name: summary(results, material, seconds) for name, results in runs.items()}
    if baseline in found:
        base = found[baseline]["wall_seconds"]
        for each in found.values():
            wall = each["wall_seconds"]
            each["times_baseline"] = {key: base[key] / wall[key] for key in ("min", "median")}
    comparisons = []
    for pair in dict.fromkeys(pairs):  # one that was asked for may be a default too
        if len(pair) != 2 or not set(pair) <= set(found):
            raise ValueError(f"cannot compare {':'.join(pair)}: systems with results are {', '.join(found)}")
        mine, theirs = (found[name]["transcripts"] for name in pair)
        difference = paired_difference(counts(material, mine), counts(material, theirs))
        row = {"system": pair[0], "baseline": pair[1]} | difference
        comparisons.append(row | {"changed": changed(material, mine, theirs)})
    return {"systems": found, "comparisons": comparisons}


def write(results: dict[str, Any], material: Material, folder: Path) -> None:
    """``results.json``, ``transcripts.tsv`` (a column for each system), ``table.md`` and ``plot.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "transcripts.tsv").write_text(transcripts_table(results, material), encoding="utf-8")
    (folder / "table.md").write_text(markdown(results), encoding="utf-8")
    plot(results, folder / "plot.png")


def transcripts_table(results: dict[str, Any], material: Material) -> str:
    """A TSV with the reference and every system's words; tabs and line ends within a text become spaces."""
    names = list(results["systems"])
    columns = [results["systems"][name]["transcripts"] for name in names]
    labels = ["all clips in a row"] if material.joined else list(material.names)
    said = [" ".join(material.references)] if material.joined else list(material.references)
    rows = [["clip", "reference", *names], *map(list, zip(labels, said, *columns, strict=True))]
    return "".join("\t".join(re.sub(r"\s+", " ", cell) for cell in row) + "\n" for row in rows)


def markdown(results: dict[str, Any]) -> str:
    """The table, what it was measured on, the paired differences, and the clips that differ (but not from the baseline)."""
    parts = [figures_table(results), circumstances(results), comparisons_table(results)]
    baseline = results["settings"]["baseline"]
    parts += [changed_list(row) for row in results["comparisons"] if row["baseline"] != baseline]
    return "\n\n".join(part for part in parts if part) + "\n"


def figures_table(results: dict[str, Any]) -> str:
    baseline = results["settings"]["baseline"]
    heads = ("system", "WER % (95 %)", "CER %", "repeats²", "× real time, best (median)", f"× {baseline}")
    heads += ("latency, s", "memory, MB", "load, s", "weights, MB")
    rows = [f"| {' | '.join(heads)} |", "|---|---|---:|---:|---|---:|---:|---:|---:|---:|"]
    for name, each in results["systems"].items():
        wer, speed, wait = each["wer"], each["real_time_factor"], each["latency"]["median"]
        ratio = f"{each['times_baseline']['min']:.2f}" if "times_baseline" in each else "–"
        mark = "¹" if each["latency"]["how"].startswith("one by one") else ""
        cells = (
            name,
            f"{100 * wer['value']:.2f} ({100 * wer['low']:.2f}–{100 * wer['high']:.2f})",
            f"{100 * each['cer']:.2f}",
            str(each["longest_loop"]),
            f"{speed['best']:.1f} ({speed['median']:.1f})",
            ratio,
            f"{wait:.2f}{mark}" if wait else "–",
            f"{each['peak_bytes'] / 1e6:.0f}",
            f"{each['load_seconds']['min']:.2f}",
            f"{each['disk_bytes'] / 1e6:.0f}",
        )
        rows.append(f"| {' | '.join(cells)} |")
    rows += ["", "¹ Runs the clips in batches; latency measured apart, one clip at a time."]
    rows += ["² How often a phrase is said in a row at most; a loop shows here."]
    return "\n".join(rows)


def circumstances(results: dict[str, Any]) -> str:
    settings, machine = results["settings"], results["machine"]
    beam = "greedy" if settings["beam"] == 1 else f"beam {settings['beam']}"
    packages = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    return (
        f"Mode {settings['mode']}: {results['clips']} clips of `{results['manifest']}`, "
        f"{results['audio_seconds'] / 60:.1f} minutes, weights of `{settings['model']}`, {beam}, language "
        f"{settings['language']}, temperature fallback {'on' if settings['fallback'] else 'off'}; "
        f"{settings['repeats']} interleaved runs, files decoded within the time, model load apart. "
        f"{settings['threads']} threads of {machine['cpu']}, {machine['system']}, Python {machine['python']}, "
        f"{packages}. {results['date'][:10]}."
    )


def comparisons_table(results: dict[str, Any]) -> str:
    if not results["comparisons"]:
        return ""
    rows = ["| system | against | WER difference, points (95 %) | worse in resamples | clips that differ |"]
    rows.append("|---|---|---|---:|---:|")
    for each in results["comparisons"]:
        points = f"{100 * each['difference']:+.2f} ({100 * each['low']:+.2f} to {100 * each['high']:+.2f})"
        share = f"{100 * each['share_worse']:.0f} %"
        differ = len(each["changed"]) if each["changed"] is not None else "–"
        rows.append(f"| {each['system']} | {each['baseline']} | {points} | {share} | {differ} |")
    return "\n".join(rows)


def changed_list(row: dict[str, Any]) -> str:
    if row["changed"] is None:
        return ""
    lines = [f"Clips that `{row['system']}` and `{row['baseline']}` write differently: {len(row['changed'])}."]
    for each in row["changed"]:
        lines.append(
            f"- {each['clip']} ({each['edits']} against {each['baseline_edits']} edits)\n"
            f"  - {row['system']}: {each['text']}\n"
            f"  - {row['baseline']}: {each['baseline']}"
        )
    return "\n".join(lines)


def plot(results: dict[str, Any], path: Path) -> None:
    """Word error rate against speed, one numbered point for each system; the bars are 95 % intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 5), layout="constrained")
    ranked = sorted(results["systems"].items(), key=lambda item: -item[1]["real_time_factor"]["best"])
    for rank, (name, each) in enumerate(ranked, start=1):
        wer, speed = each["wer"], each["real_time_factor"]["best"]
        colour = "#c2410c" if name.startswith("ours") else "#475569"
        axes.vlines(speed, 100 * wer["low"], 100 * wer["high"], color=colour, alpha=0.3)
        label = f"{rank}  {name}: {speed:.1f} ×, {100 * wer['value']:.2f} %"
        axes.plot(speed, 100 * wer["value"], marker="o", markersize=15, color=colour, linestyle="none", label=label)
        axes.annotate(str(rank), (speed, 100 * wer["value"]), color="white", fontsize=8, ha="center", va="center")
    figure.legend(loc="outside right upper", fontsize=9, frameon=False, markerscale=0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel("times real time (best of the interleaved runs)")
    axes.set_ylabel("word error rate, % (95 % interval)")
    settings = results["settings"]
    what = f"{results['clips']} clips, {results['audio_seconds'] / 60:.1f} min, mode {settings['mode']}"
    axes.set_title(f"{what}; {settings['threads']} threads, {results['machine']['cpu']}", fontsize=10)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
