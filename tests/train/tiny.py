"""Small runs: a tiny checkpoint, a table of tones, packs that need no files, and a trainer around them."""

from __future__ import annotations

import math
import wave
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from generate.tiny import tiny_whisper_moe
from model.tiny import CONFIGS

from whisper_moe.config import ModelConfig
from whisper_moe.data.examples import IGNORED, Example, Pack, pack_examples
from whisper_moe.data.loader import Batch
from whisper_moe.data.sample import Skipped
from whisper_moe.model.model import WhisperMoEModel
from whisper_moe.train.loop import Figures, Trainer
from whisper_moe.train.losses import SpeechObjective
from whisper_moe.train.monitor import Monitor
from whisper_moe.train.parallel import Parallel
from whisper_moe.train.reading import checked
from whisper_moe.train.recipe import Recipe

LETTERS = "abcdefgh"


def tiny_checkpoint(folder: Path) -> Path:
    """A mixture of three experts with a TTT layer."""
    tiny_whisper_moe().save_pretrained(folder)
    return folder


def tones(folder: Path, clips: int = 12, seed: int = 0) -> Path:
    """A table of short recordings; each letter is a tone of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    lines = ["path\ttext"]
    for clip in range(clips):
        text = "".join(generator.choice(list(LETTERS), size=int(generator.integers(2, 6))))
        time = np.arange(3_200) / 16_000
        sound = np.concatenate([np.sin(2 * math.pi * (300 + 150 * LETTERS.index(letter)) * time) for letter in text])
        with wave.open(str(folder / f"{clip}.wav"), "wb") as file:
            file.setparams((1, 2, 16_000, 0, "NONE", ""))
            file.writeframes((sound * 12_000).astype("<i2").tobytes())
        lines.append(f"{clip}.wav\t{text}")
    (folder / "transcripts.tsv").write_text("\n".join(lines) + "\n", "utf-8")
    return folder


def recipe_tree(model: Path, data: Path, **optimisation: Any) -> dict[str, Any]:
    """A run of a few steps."""
    corpus = {"kind": "table", "source": str(data), "languages": ["en"]}
    return {
        "model": {"source": str(model)},
        "data": {
            "train": [corpus],
            "loader": {"batch_size": 4, "planning_buffer": 8, "examples": {"margin": 0.1}},
        },
        "optimisation": {"steps": 6, "lr": 3e-3, "warmup": 1, "schedule": "constant"} | optimisation,
        "run": {"threads": 1, "checkpoint_every": 2},
    }


def random_examples(lengths: Sequence[tuple[int, int]], config: ModelConfig, seed: int = 0) -> list[Example]:
    """(positions, tokens) of each; the first two tokens have no label."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for number, (positions, tokens) in enumerate(lengths):
        ids = torch.randint(config.vocab_size, (tokens + 1,), generator=generator).tolist()
        examples.append(
            Example(
                id=f"{seed}-{number}",
                mel=torch.randn(config.n_mels, 2 * positions, generator=generator),
                valid_length=max(1, positions - 2),
                tokens=tuple(ids[:-1]),
                labels=(IGNORED, IGNORED, *ids[3:]),
            )
        )
    return examples


def random_pack(lengths: Sequence[tuple[int, int]], config: ModelConfig, seed: int = 0) -> Pack:
    (pack,) = pack_examples(random_examples(lengths, config, seed))
    return pack


class Fixed:
    """Batches that come again and again, in an order that can be gone on with."""

    def __init__(self, batches: Sequence[Sequence[Pack]], double: bool = False) -> None:
        dtype = torch.float64 if double else torch.float32
        self._batches = [tuple(pack.to("cpu", dtype) for pack in packs) for packs in batches]
        self._next, self.given = 0, []

    def __iter__(self) -> Iterator[Batch]:
        while self._next < len(self._batches):
            index, self._next = self._next, self._next + 1
            batch = Batch(packs=self._batches[index], epoch=0)
            self.given.append(batch.ids)
            yield batch
        self._next = 0

    def state_dict(self) -> dict[str, Any]:
        return {"next": self._next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._next = state["next"]


class Notes(Monitor):
    """A monitor that only remembers."""

    def __init__(self) -> None:
        self.skipped_samples: list[Skipped] = []
        self.reports: list[dict[str, Any]] = []
        self.skips: list[tuple[int, str, list[str]]] = []
        self.scales: list[tuple[int, float]] = []
        self.evaluations: list[tuple[int, dict[str, float], bool]] = []

    @property
    def losses(self) -> list[float]:
        return [report["loss"] for report in self.reports]

    def begin(self, steps: int, *, after: int = 0, judged: bool = False) -> None: ...
    def secure(self) -> None: ...

    def left_out(self, samples: Sequence[Skipped]) -> None:
        self.skipped_samples += samples

    def stepped(self, step: int, figures: Mapping[str, Any]) -> None:
        self.reports.append({"step": step, **figures})

    def skipped(self, step: int, cause: str, ids: Sequence[str]) -> None:
        self.skips.append((step, cause, list(ids)))

    def rescaled(self, step: int, scale: float) -> None:
        self.scales.append((step, scale))

    def evaluated(self, step: int, metrics: Mapping[str, float], best: bool) -> None:
        self.evaluations.append((step, dict(metrics), best))


def tiny_recipe(evaluation: dict[str, Any] | None = None, **sections: Any) -> Recipe:
    """Rates that stay as they are, nothing clipped; with ``evaluation``, there is something to be judged by."""
    corpus = {"kind": "table", "source": "nowhere"}
    optimisation = {"lr": 1e-3, "ttt_lr": 1e-2, "weight_decay": 0.01, "schedule": "constant", "warmup": 0, "clip": None}
    optimisation |= {"steps": 10} | sections.pop("optimisation", {})
    data = {"train": [corpus], "evaluation": [] if evaluation is None else [corpus]}
    tree = {"data": data, "optimisation": optimisation, "evaluation": {"every": None} | (evaluation or {})}
    return checked(Recipe, tree | {"run": {"checkpoint_every": None}} | sections, "tiny")


def tiny_trainer(
    name: str,
    batches: Sequence[Sequence[Pack]],
    *,
    double: bool = False,
    seed: int = 0,
    config: ModelConfig | None = None,
    directory: Path | None = None,
    figures: Figures | None = None,
    sections: dict[str, Any] | None = None,
    **optimisation: Any,
) -> Trainer:
    """A trainer of a tiny random model; its notes are its monitor. ``sections`` of the recipe."""
    torch.manual_seed(seed)
    model = WhisperMoEModel(config or CONFIGS[name])
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".gate_" in key or ".router." in key or ".experts.down" in key:
                parameter.normal_(0, 0.2)
    recipe = tiny_recipe(optimisation=optimisation, **(sections or {}))
    return Trainer(
        recipe,
        model.double() if double else model,
        SpeechObjective(recipe.losses),
        Fixed(batches, double),
        Parallel(),
        figures=figures,
        monitor=Notes(),
        directory=directory,
    )


def notes(trainer: Trainer) -> Notes:
    assert isinstance(trainer.monitor, Notes)
    return trainer.monitor
