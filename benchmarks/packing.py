"""Packed against padded training: the same model, the same batches of clips, in one run.

``python benchmarks/packing.py MANIFEST… --source openai/whisper-base``. Each manifest is a TSV of ``path<TAB>text``. Every
step of either form learns from the same clips in the same order: packed with ``--margin`` seconds of silence, segments of
many clips sharing contexts of 2,048 tokens; padded, each clip alone with 30 s. The two take turns, step by step, so that a
machine that slows down slows both. Writes ``results.json``, ``table.md`` and ``curve.png`` into ``--output``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from manifest import read_clips

from whisper_moe.config import FULL_WINDOW
from whisper_moe.data.examples import ExampleConfig, ExampleReader, Pack, pack_examples
from whisper_moe.data.loader import Batch
from whisper_moe.data.sample import Sample
from whisper_moe.machine import machine, versions
from whisper_moe.media.tokenizer import Tokenizer
from whisper_moe.model.model import WhisperMoEModel
from whisper_moe.train.build import initial_model
from whisper_moe.train.loop import Trainer
from whisper_moe.train.losses import SpeechObjective
from whisper_moe.train.parallel import Parallel
from whisper_moe.train.reading import checked
from whisper_moe.train.recipe import Recipe
from whisper_moe.weights.checkpoint import Loaded

FORMS = ("packed", "padded")


class Reading:
    """Batches of one form, read as they are asked for."""

    def __init__(
        self, batches: Sequence[Sequence[Sample]], reader: ExampleReader, margin: float, *, packed: bool
    ) -> None:
        self._batches, self._reader, self._margin, self._packed = batches, reader, margin, packed
        self.seconds = 0.0
        """Spent reading so far."""

    def __iter__(self) -> Iterator[Batch]:
        for samples in self._batches:
            begun = time.perf_counter()
            examples = [self._reader.read(sample, self._margin) for sample in samples]
            groups = [examples] if self._packed else [[example] for example in examples]
            packs: tuple[Pack, ...] = tuple(pack for group in groups for pack in pack_examples(group))
            self.seconds += time.perf_counter() - begun
            yield Batch(packs=packs, epoch=0)

    def count(self, epochs: int) -> int:
        return epochs * len(self._batches)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        del state


def read_samples(manifests: Sequence[Path], least: float, most: float) -> list[Sample]:
    """Clips that last from ``least`` to ``most`` seconds."""
    found = [clip.sample for path in manifests for clip in read_clips(path) if least <= clip.seconds <= most]
    if not found:
        raise ValueError(f"no clip of {', '.join(map(str, manifests))} lasts {least:g} to {most:g} s")
    return found


def recipe_of_both(args: argparse.Namespace) -> Recipe:
    """One rate for all, from the first step on; a step that cannot be made is an error."""
    optimisation = {"steps": args.steps, "lr": args.lr, "ttt_lr": args.lr, "weight_decay": 0.01}
    optimisation |= {"schedule": "constant", "warmup": 0, "most_bad_steps": 1}
    data = {"train": [{"kind": "table", "source": str(args.manifests[0])}]}  # whose clips are read in another way
    tree = {"model": {"source": args.source}, "data": data, "optimisation": optimisation, "run": {"seed": args.seed}}
    tree["losses"] = {"balance": 0.0, "z": 0.0}
    return checked(Recipe, tree, "packing")


def trainer(
    recipe: Recipe, start: Loaded, batches: Sequence[Sequence[Sample]], form: str, args: argparse.Namespace
) -> Trainer:
    """A fresh copy of the source, about to learn."""
    packed, margin = form == "packed", args.margin if form == "packed" else FULL_WINDOW
    model = WhisperMoEModel(start.config)
    model.load_state_dict(start.state)
    tokenizer: Tokenizer = start.tokenizer
    reader = ExampleReader(tokenizer, start.config, ExampleConfig(margin=margin))
    return Trainer(
        recipe, model, SpeechObjective(recipe.losses), Reading(batches, reader, margin, packed=packed), Parallel()
    )


def step(trained: Trainer) -> dict[str, float]:
    """One step: its loss, and its seconds without those of reading."""
    batches: Any = trained.batches
    read, begun = batches.seconds, time.perf_counter()
    report = trained.step()
    seconds = time.perf_counter() - begun - (batches.seconds - read)
    figures = {name: report[name] for name in ("loss", "packs", "fill")}
    return figures | {"seconds": seconds, "samples": report["segments"]}


def compare(samples: Sequence[Sample], args: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Both forms, in turns."""
    draw = np.random.default_rng(args.seed)
    order = [int(i) for _ in range(-(-args.steps * args.batch // len(samples))) for i in draw.permutation(len(samples))]
    batches = [
        [samples[i] for i in order[at : at + args.batch]] for at in range(0, args.steps * args.batch, args.batch)
    ]
    recipe = recipe_of_both(args)
    start = initial_model(recipe)
    trainers = {form: trainer(recipe, start, batches, form, args) for form in FORMS}
    curves: dict[str, list[dict[str, float]]] = {form: [] for form in FORMS}
    for number in range(1, args.steps + 1):
        for form, trained in trainers.items():
            curves[form].append(step(trained))
        line = "  ".join(f"{form} {c[-1]['loss']:.4f} {c[-1]['seconds']:.1f} s" for form, c in curves.items())
        print(f"step {number}/{args.steps}  {line}", file=sys.stderr, flush=True)
    return curves


def figures(curves: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Samples a second without the first step, which warms up; how far the curves are apart, and how far they move."""
    rates = {f: sum(s["samples"] for s in c[1:]) / sum(s["seconds"] for s in c[1:]) for f, c in curves.items()}
    packed, padded = (np.array([s["loss"] for s in curves[form]]) for form in FORMS)
    quarter = max(1, len(packed) // 4)
    return {
        "samples_per_second": rates,
        "ratio": rates["packed"] / rates["padded"],
        "fill": {f: float(np.mean([s["fill"] for s in c])) for f, c in curves.items()},
        "first_quarter": {"packed": float(packed[:quarter].mean()), "padded": float(padded[:quarter].mean())},
        "last_quarter": {"packed": float(packed[-quarter:].mean()), "padded": float(padded[-quarter:].mean())},
        "mean_difference": float((packed - padded).mean()),
        "standard_error": float((packed - padded).std(ddof=1) / len(packed) ** 0.5),
        "spread_of_a_curve": float(padded.std(ddof=1)),
        "correlation": float(np.corrcoef(packed, padded)[0, 1]),
    }


def table(results: dict[str, Any]) -> str:
    """The figures in Markdown."""
    found, lines = results["figures"], ["| | packed | padded to 30 s |", "|---|---:|---:|"]
    rows = {
        "samples a second": "samples_per_second",
        "pack fill": "fill",
        "loss, first quarter of the steps": "first_quarter",
        "loss, last quarter": "last_quarter",
    }
    lines += [f"| {name} | {found[key]['packed']:.3f} | {found[key]['padded']:.3f} |" for name, key in rows.items()]
    faster = f"Packed training reads **{found['ratio']:.2f} times** the samples a second."
    apart = (
        f"Loss of the same batch, packed less padded: {found['mean_difference']:+.4f} ± {found['standard_error']:.4f} (mean and "
        f"standard error of {results['steps']} steps); from batch to batch the padded loss varies by "
        f"{found['spread_of_a_curve']:.3f}, and the two curves' correlation is {found['correlation']:.3f}."
    )
    where = (
        f"{results['source']}, {results['clips']} clips of {results['shortest']:g} to {results['longest']:g} s, batches of "
        f"{results['batch']}, float32, {results['margin']:g} s of silence, {results['threads']} threads of "
        f"{results['machine']['cpu']}, {results['date']}; reading apart, each padded clip in a pack of its own."
    )
    return "\n".join([*lines, "", f"{faster} {apart}", "", where, "", "![Loss by step](curve.png)", ""])


def plot(curves: dict[str, list[dict[str, float]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for form, curve in curves.items():
        axes.plot(range(1, len(curve) + 1), [point["loss"] for point in curve], label=form)
    axes.set(xlabel="step", ylabel="loss, nats a token", title="The same batches, packed and padded")
    axes.legend()
    figure.savefig(path, dpi=120)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Packed against padded training on the same batches.")
    add = parser.add_argument
    add("manifests", type=Path, nargs="+", help="TSV of path<TAB>text, in English")
    add("--source", default="openai/whisper-base")
    add("--steps", type=int, default=30)
    add("--batch", type=int, default=8, help="clips")
    add("--margin", type=float, default=2.5, help="seconds of silence after a packed clip")
    add("--shortest", type=float, default=3.0, help="seconds")
    add("--longest", type=float, default=10.0, help="seconds")
    add("--lr", type=float, default=1e-5)
    add("--seed", type=int, default=42)
    add("--threads", type=int, default=2)
    add("--output", type=Path, default=Path("docs/results/packing"))
    args = parser.parse_args(argv)
    if args.steps < 2:
        parser.error("--steps: the first step warms up, so there must be two at least")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    samples = read_samples(args.manifests, args.shortest, args.longest)
    curves = compare(samples, args)
    asked = {key: value for key, value in vars(args).items() if key not in ("manifests", "output")}
    results = asked | {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "versions": versions(["torch", "whisper-moe"]),
        "clips": len(samples),
        "figures": figures(curves),
        "curves": curves,
    }
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (args.output / "table.md").write_text(table(results), encoding="utf-8")
    plot(curves, args.output / "curve.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
