"""What a model hears with less silence behind a clip than Whisper's padding to 30 s: error rates by margin and language.

``python benchmarks/margins.py MANIFEST… --models before=DIR now=checkpoints --margins 0.5 2 30``. Each manifest is a TSV of
``path<TAB>text[<TAB>language]``, paths relative to it; without a language it is English. Greedy, with timestamps; windows
that look wrong are decoded again padded, as always, and counted, but at no other temperature. Differences are to the first
model at the last margin, by paired bootstrap over clips. Writes ``results.json`` and ``table.md`` into ``--output``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

from manifest import read_clips

from whisper_moe import WhisperMoE
from whisper_moe.evaluate.measure import Clip
from whisper_moe.evaluate.metrics import ErrorCounts, character_counts, clip_counts, interval, paired_difference
from whisper_moe.machine import machine, take_threads, versions


@dataclass(frozen=True)
class Heard:
    """What one model said of one language's clips with one margin."""

    texts: list[str]
    again: int
    """Clips that were decoded again, padded."""


def hear(model: WhisperMoE, clips: Sequence[Clip], margin: float) -> Heard:
    """All clips of one language."""
    sounds = [clip.sample.audio.read() for clip in clips if clip.sample.audio is not None]
    results = model.transcribe(sounds, language=clips[0].sample.language, context_margin=margin, temperatures=(0.0,))
    return Heard([result.text for result in results], sum(result.fallbacks > 0 for result in results))


def figures(clips: Sequence[Clip], heard: Heard, baseline: Heard) -> dict[str, Any]:
    """WER and CER in percent with their intervals, and what they differ by from the baseline's."""
    texts, language = [clip.sample.text for clip in clips], clips[0].sample.language
    row: dict[str, Any] = {"decoded_again": heard.again}
    for name, count in (("wer", clip_counts), ("cer", character_counts)):
        mine, theirs = (count(texts, said.texts, language) for said in (heard, baseline))
        row[name] = _percent(mine)
        row[f"{name}_difference"] = {key: 100 * value for key, value in paired_difference(mine, theirs).items()}
    row["other_than_baseline"] = _percent(character_counts(baseline.texts, heard.texts, language))["value"]
    return row


def _percent(counts: ErrorCounts) -> dict[str, float]:
    low, high = interval(counts)
    return {"value": 100 * counts.value, "low": 100 * low, "high": 100 * high}


def table(results: dict[str, Any]) -> str:
    """One row for each set, model and margin."""
    heads = ("clips", "model", "margin, s", "WER % (95 %)", "difference", "CER % (95 %)", "difference")
    lines = [
        "| " + " | ".join([*heads, "unlike the padded text, %", "again"]) + " |",
        "|---|---|---:|---|---|---|---|---:|---:|",
    ]
    for row in results["rows"]:
        cells = [f"{row['clips']} {row['set']}, {row['language']}", row["model"], f"{row['margin']:g}"]
        for name in ("wer", "cer"):
            value, difference = row[name], row[f"{name}_difference"]
            cells.append(f"{value['value']:.2f} ({value['low']:.2f}–{value['high']:.2f})")
            cells.append(f"{difference['difference']:+.2f} ({difference['low']:+.2f} to {difference['high']:+.2f})")
        cells += [f"{row['other_than_baseline']:.1f}", str(row["decoded_again"])]
        lines.append("| " + " | ".join(cells) + " |")
    where = f"{results['threads']} threads of {results['machine']['cpu']}, {results['arithmetic']}, {results['date']}."
    terms = (
        "*Unlike the padded text*: edits of characters over those of what the baseline said. *Again*: clips that looked wrong "
        "and were decoded again, padded or in halves; what that gave counts."
    )
    how = f"Greedy, language given; differences to *{results['baseline']}* by paired bootstrap over clips. {where}"
    return "\n".join([*lines, "", how, terms, ""])


def named(text: str) -> tuple[str, str]:
    """``NAME=MODEL`` in two."""
    name, equals, model = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"expected NAME=MODEL, found {text!r}")
    return name, model


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Error rates by margin of silence and language.")
    add = parser.add_argument
    add("manifests", type=Path, nargs="+", help="TSV of path<TAB>text[<TAB>language], paths relative to it")
    add(
        "--models",
        nargs="+",
        required=True,
        type=named,
        metavar="NAME=MODEL",
        help="the first, at the last margin, is the baseline",
    )
    add("--margins", type=float, nargs="+", default=[0.5, 2.0, 30.0])
    add("--limit", type=int, help="only the first N clips of each language in a manifest")
    add("--dtype", default="auto")
    add("--threads", type=int, default=2)
    add("--output", type=Path, default=Path("docs/results/context"))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    take_threads(args.threads)
    models = {name: WhisperMoE.from_pretrained(path, dtype=args.dtype) for name, path in args.models}
    first, padded = next(iter(models)), args.margins[-1]
    results: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "threads": args.threads,
        "arithmetic": next(iter(models.values())).dtype,
        "versions": versions(["torch", "whisper-moe"]),
        "baseline": f"{first} at {padded:g} s",
        "rows": [],
    }
    args.output.mkdir(parents=True, exist_ok=True)
    for manifest in args.manifests:
        clips = read_clips(manifest)
        for language in dict.fromkeys(clip.sample.language for clip in clips):
            spoken = [clip for clip in clips if clip.sample.language == language][: args.limit]
            heard: dict[tuple[str, float], Heard] = {}
            for name, margin in product(models, args.margins):
                heard[name, margin] = hear(models[name], spoken, margin)
                print(f"{manifest.parent.name}, {language}: {name} at {margin:g} s", file=sys.stderr, flush=True)
            for (name, margin), said in heard.items():
                of = {
                    "set": manifest.parent.name,
                    "language": language,
                    "clips": len(spoken),
                    "model": name,
                    "margin": margin,
                }
                results["rows"].append(of | figures(spoken, said, heard[first, padded]) | {"texts": said.texts})
            (args.output / "results.json").write_text(
                json.dumps(results, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
            )
            (args.output / "table.md").write_text(table(results), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
