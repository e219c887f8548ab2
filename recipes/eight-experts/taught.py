"""Distillation: a model learns what is said, and also what another one of the same tokens would say.

    python recipes/eight-experts/taught.py RECIPE.yaml teacher.source=MODEL [KEY=VALUE ...] -o RUN    as whisper-moe train

The divergence from the teacher's probabilities of each next token is added to the loss (Distil-Whisper, arXiv 2311.00430, section
3). The teacher is run in each step.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor, nn

from whisper_moe.config import Strict
from whisper_moe.data.examples import IGNORED, Pack
from whisper_moe.data.loader import PackedLoader
from whisper_moe.model.model import Output, WhisperMoEModel
from whisper_moe.model.senses import is_sensed
from whisper_moe.train.build import Task
from whisper_moe.train.losses import SpeechObjective, Totals, divergence, run_packs
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

    def beside(
        self, output: Output, labels_T: Tensor, packs: Sequence[Pack], totals: Totals
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if any(is_sensed(mel) for pack in packs for mel in pack.mels):
            raise RecipeError("teacher.source: a teacher hears; of texts and films it can say nothing")
        with torch.no_grad():
            wanted = run_packs(self.teacher, packs).logits
        said = labels_T != IGNORED
        apart = divergence(output.logits[said], wanted[said]) / totals.tokens
        return self.distillation * apart, {"divergence": apart.detach()}


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
