"""Context adaptation: a model learns to hear short clips without padding, from itself (self-distillation).

Whisper always saw 30 s. Cut to the clip with little silence behind it, it repeats itself without end. Here it is trained,
on any margin of silence, to have the states and the next-token probabilities that the frozen model has with 30 s
(after github.com/futo-org/whisper-acft: mean square error of all decoder states; the divergence of the probabilities is
added). What learns is the always-on part beside the core: differences of norms, adapters, TTT layers with their gates.
The core and the routed experts stay as they are.

N clips, T decoder tokens, D width, depths: behind each decoder block, then behind the last norm.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whisper_moe.config import FULL_WINDOW, SAMPLE_RATE, ModelConfig
from whisper_moe.data.examples import Example, Pack, drawn_margin, pack_examples, positions
from whisper_moe.data.loader import Batch
from whisper_moe.data.sample import Sample
from whisper_moe.media.mel import window_mel
from whisper_moe.model.model import Output
from whisper_moe.packing import first_fit_decreasing
from whisper_moe.train.losses import Terms, Totals, run_packs
from whisper_moe.train.parallel import Parallel
from whisper_moe.train.teacher import MODES, Lesson, Mode, Teacher


class Lessons:
    """Batches of clips, each with a margin of silence and a mode drawn anew in every epoch; a loop's ``Batches``.

    Everything is a function of the seed, the epoch and the clip, so the only state is the place in the order.
    """

    def __init__(
        self, samples: Sequence[Sample], teacher: Teacher, config: ModelConfig, *,
        margins: tuple[float, float], padded: float = 0.0, batch: int, seed: int,
    ) -> None:  # fmt: skip
        """``margins``: the least and the most silence, in seconds; small ones are drawn more often. ``padded``: the share of
        clips that are padded to the window instead. ``batch``: clips. ``samples``: each with an id of its own, their lessons
        prepared.
        """
        self.samples, self.teacher, self.config = samples, teacher, config
        self.margins, self.padded = margins, padded
        self.batch, self.seed = batch, seed
        self.epoch = self.index = 0
        self._by_id = {sample.id: sample for sample in samples}
        if len(self._by_id) < len(samples):
            doubled = next(id for id, times in Counter(sample.id for sample in samples).items() if times > 1)
            raise ValueError(f"every clip needs an id of its own, and {doubled!r} is that of several")
        self._digest = sha256("\n".join(self._by_id).encode()).hexdigest()[:32]

    def count(self, epochs: int) -> int:
        """Batches of so many epochs."""
        return epochs * -(-len(self.samples) // self.batch)

    def __iter__(self) -> Iterator[Batch]:
        while self.index * self.batch < len(self.samples):
            order = random.Random(f"{self.seed} {self.epoch}").sample(range(len(self.samples)), len(self.samples))
            chosen = order[self.index * self.batch : (self.index + 1) * self.batch]
            examples = [self._example(self.samples[i]) for i in chosen]
            groups = first_fit_decreasing([example.size for example in examples])
            packs = tuple(pack for group in groups for pack in pack_examples([examples[i] for i in group]))
            self.index += 1  # before it is handed out: a state that is taken then is that of the next one
            yield Batch(packs=packs, epoch=self.epoch)
        self.epoch, self.index = self.epoch + 1, 0

    def _example(self, sample: Sample) -> Example:
        draw = random.Random(f"{self.seed} {self.epoch} {sample.id}")
        mode: Mode = draw.choice(MODES)
        margin = FULL_WINDOW if draw.random() < self.padded else drawn_margin(self.margins, draw.random())
        assert sample.audio is not None
        sound = sample.audio.read()
        wanted = positions(len(sound), margin, self.config.max_source_positions)
        mel = window_mel(sound, self.config.n_mels, wanted)
        tokens = tuple(self.teacher.lesson(sample, mode).tokens.tolist())
        return Example(
            id=f"{sample.id}\n{mode}", mel=mel, heard=positions(len(sound), 0, self.config.max_source_positions),
            tokens=tokens[:-1], labels=tokens[1:], language=sample.language, task=sample.task,
            seconds=len(sound) / SAMPLE_RATE,
        )  # fmt: skip

    def lesson(self, id: str) -> Lesson:
        """Of an example by its id."""
        name, mode = id.rsplit("\n", 1)
        return self.teacher.lesson(self._by_id[name], "plain" if mode == "plain" else "timestamps")

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "index": self.index, "clips": self._digest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ``ValueError`` where the state is of other clips."""
        if state.get("clips", self._digest) != self._digest:
            raise ValueError(
                "cannot go on with other clips: their ids or their order are not those that the run began with"
            )
        self.epoch, self.index = state["epoch"], state["index"]


@dataclass(frozen=True, kw_only=True)
class ContextObjective:
    """``states`` × mean square error of all depths, each relative to the teacher's own power there, + ``divergence`` × KL
    of the next token's probabilities; means over decoder tokens."""

    lessons: Lessons
    head: nn.Module
    """Teacher's states → its logits: the head is not trained, so it is the student's too."""
    states: float = 1.0
    divergence: float = 1.0

    def totals(self, packs: Sequence[Pack]) -> Totals:
        return Totals(sum(pack.texts.total for pack in packs), sum(len(pack.ids) for pack in packs))

    def __call__(self, model: nn.Module, packs: Sequence[Pack], totals: Totals, parallel: Parallel) -> Terms:
        packs = [pack.to(parallel.device) for pack in packs]
        output: Output = run_packs(model, packs)
        lessons = [self.lessons.lesson(id).states for pack in packs for id in pack.ids]
        wanted = torch.cat(lessons, dim=1).to(parallel.device).float()
        found = torch.stack([*output.depths, output.states_TD]).float()
        error = relative_error(found, wanted) / totals.tokens
        with torch.no_grad():
            target = self.head(wanted[-1]).float()
        kl = divergence(output.logits, target) / totals.tokens
        parts = {"states": error.detach(), "divergence": kl.detach()}
        return Terms(self.states * error + self.divergence * kl, parts, torch.zeros(0, 0))


def relative_error(found: Tensor, wanted: Tensor) -> Tensor:
    """[depths, T, D] twice → the sum over tokens of the mean over depths of |found − wanted|² / mean |wanted|²."""
    power = wanted.square().mean(dim=(1, 2), keepdim=True)
    return ((found - wanted).square() / power).mean(dim=(0, 2)).sum()


def divergence(logits_TV: Tensor, wanted_TV: Tensor) -> Tensor:
    """The sum over tokens of KL(wanted ‖ found)."""
    return F.kl_div(logits_TV.float().log_softmax(-1), wanted_TV.log_softmax(-1), reduction="sum", log_target=True)
