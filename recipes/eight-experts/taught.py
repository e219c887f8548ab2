"""Distillation: a model learns what is said, and also what another one of the same tokens would say.

    python recipes/eight-experts/taught.py RECIPE.yaml teacher.source=MODEL [KEY=VALUE ...] -o RUN    as whisper-moe train

The divergence from the teacher's probabilities of each next token is added to the loss (Distil-Whisper, arXiv 2311.00430, section
3). The teacher is run in each step.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from whisper_moe.data.examples import IGNORED, Pack
from whisper_moe.data.loader import PackedLoader
from whisper_moe.frozen import Strict
from whisper_moe.model.model import Output, WhisperMoEModel
from whisper_moe.model.senses import is_sensed
from whisper_moe.train.build import Task
from whisper_moe.train.losses import SpeechObjective, Terms, Totals, divergence
from whisper_moe.train.parallel import Parallel
from whisper_moe.train.reading import RecipeError
from whisper_moe.train.recipe import Recipe
from whisper_moe.train.run import script
from whisper_moe.weights.load import load_model
from whisper_moe.weights.parts import frozen_model


class TeacherSettings(Strict):
    """Who is learned from, beside what is said."""

    source: str
    """A model with the same tokens: a folder or a Hub id."""
    distillation: float = Field(default=0.8, ge=0)
    """Factor of the divergence from its probabilities."""


class TaughtRecipe(Recipe):
    """What a teacher would say is learned beside what is said."""

    teacher: TeacherSettings
    """Beside all in ``losses``."""

    def task(self) -> type[Task]:
        return Taught


@dataclass(frozen=True)
class TaughtObjective(SpeechObjective):
    """Cross-entropy of what is said, what a teacher would say, and the routers' losses."""

    teacher: nn.Module
    """Frozen, with the model's own tokens; it hears what the model hears."""
    distillation: float

    def __call__(self, model: nn.Module, packs: Sequence[Pack], totals: Totals, parallel: Parallel) -> Terms:
        if any(is_sensed(mel) for pack in packs for mel in pack.mels):
            raise RecipeError("teacher.source: a teacher hears; of texts and films it can say nothing")
        said: list[tuple[Tensor, Tensor]] = []

        def follow(_: nn.Module, given: Any, named: Any, output: Output) -> None:
            with torch.no_grad():
                said.append((output.logits, self.teacher(*given, **named).logits))

        hook = model.register_forward_hook(follow, with_kwargs=True)  # one pass is enough for both losses
        try:
            terms = super().__call__(model, packs, totals, parallel)
        finally:
            hook.remove()
        ((found, wanted),) = said
        labels = [label for pack in packs for label in pack.labels_T.tolist()]  # none where others alone have packs
        places = torch.tensor([place for place, label in enumerate(labels) if label != IGNORED], dtype=torch.int64)
        places = places.to(found.device)
        apart = divergence(found[places], wanted[places]) / totals.tokens
        parts = terms.parts | {"divergence": apart.detach()}
        return Terms(terms.loss + self.distillation * apart, parts, terms.counts)


@dataclass(frozen=True)
class Taught(Task):
    """A model that also learns from a teacher."""

    recipe: TaughtRecipe

    def learned(self, model: WhisperMoEModel) -> tuple[PackedLoader, TaughtObjective]:
        if self.recipe.losses.sampled:
            raise RecipeError("losses.sampled: a teacher tells of all tokens; it goes without")
        return self.mixed(), TaughtObjective(self.recipe.losses, self._teacher(), self.recipe.teacher.distillation)

    def _teacher(self) -> WhisperMoEModel:
        source, config = self.recipe.teacher.source, self.initial.config
        loaded = load_model(source)
        if loaded.experts:
            raise RecipeError(f"teacher.source: {source}: its experts are whole models; name one of them")
        theirs, ours = loaded.tokenizer.vocabulary, self.initial.tokenizer.vocabulary
        if theirs != ours or loaded.config.n_mels != config.n_mels:
            raise RecipeError(f"teacher.source: {source} does not have the model's tokens and mel bands")
        return frozen_model(loaded.config, loaded.state).to(self.parallel.device)


if __name__ == "__main__":
    sys.exit(script(TaughtRecipe, "Teach a model what is said, and what another one would say."))
