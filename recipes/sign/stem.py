"""What sees learns alone, before the expert: films to their texts, by what the stem makes of them and a classifier.

    python recipes/sign/stem.py RECIPE.yaml [KEY=VALUE ...] -o RUN [--resume]    as whisper-moe train

The classifier is one linear layer behind the mean of a film's rows. It stays in the run; RUN/model is the model whose stem has
learned, where sign.yaml begins.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whisper_moe.data.corpus import CorpusConfig
from whisper_moe.data.examples import IGNORED, Pack
from whisper_moe.data.loader import PackedLoader
from whisper_moe.data.sample import DataError, Skipped, TooLong, items
from whisper_moe.data.table import open_corpus
from whisper_moe.model.model import WhisperMoEModel
from whisper_moe.train.build import Task, build_model
from whisper_moe.train.loop import Figures
from whisper_moe.train.losses import Terms, Totals, weighed
from whisper_moe.train.parallel import Parallel
from whisper_moe.train.reading import RecipeError
from whisper_moe.train.recipe import Recipe
from whisper_moe.train.run import script


class StemRecipe(Recipe):
    """Films in, which of the texts out."""

    def task(self) -> type[Task]:
        return Seeing


def said(labels: Sequence[int]) -> tuple[int, ...]:
    return tuple(id for id in labels if id != IGNORED)


@dataclass(frozen=True)
class Classified:
    """Cross-entropy of a film's text among all, and the share that is right."""

    texts: dict[tuple[int, ...], int]
    smoothing: float

    def totals(self, packs: Sequence[Pack]) -> Totals:
        films = sum(len(pack.ids) for pack in packs)
        return Totals(films, films)

    def __call__(self, model: nn.Module, packs: Sequence[Pack], totals: Totals, parallel: Parallel) -> Terms:
        assert isinstance(model, WhisperMoEModel) and model.senses is not None and model.senses.film is not None
        here = [pack.to(parallel.device) for pack in packs]
        parts: dict[str, Tensor] = {}
        if here:
            labels = [text.tolist() for pack in here for text in pack.labels_T.split(pack.texts.lengths)]
            wanted = torch.tensor([self.texts[said(text)] for text in labels], device=parallel.device)
            rows = [model.senses.film(film).mean(0) for pack in here for film in pack.mels]
            logits = model.classifier(torch.stack(rows))
            right = (logits.argmax(-1) == wanted).sum() / totals.tokens
            how = {"reduction": "sum", "label_smoothing": self.smoothing}
            parts = {"cross_entropy": F.cross_entropy(logits, wanted, **how) / totals.tokens, "right": right}
        return weighed(parts, {"cross_entropy": 1.0, "right": 0.0}, model)


@dataclass(frozen=True)
class Seeing(Task):
    """The stem of films learns, and a classifier beside it."""

    def model(self) -> WhisperMoEModel:
        if self.initial.config.senses is None or self.initial.config.senses.film is None:
            raise RecipeError("the model has no part for films; begin.py adds one")
        if self.parallel.world_size > 1:
            raise RecipeError("learning to see runs in one process")
        model = build_model(self.initial, self.recipe, ["senses.film.*"])
        model.classifier = nn.Linear(self.initial.config.d_model, len(self._texts))
        return model

    def learned(self, model: WhisperMoEModel) -> tuple[PackedLoader, Classified]:
        return self.mixed(), self._objective()

    def figures(self) -> Figures:
        judged = self._read(self.recipe.data.evaluation)
        if strangers := judged.keys() - self._texts.keys():
            name = judged[min(strangers)]
            raise RecipeError(f"data.evaluation: {name}: no film that is learned from has its text")
        return self.held_out(self.unchanged(), self._objective())

    def _objective(self) -> Classified:
        return Classified(self._texts, self.recipe.losses.label_smoothing)

    @cached_property
    def _texts(self) -> dict[tuple[int, ...], int]:
        """A number for each text that is learned."""
        return {text: place for place, text in enumerate(sorted(self._read(self.recipe.data.train)))}

    def _read(self, configs: Sequence[CorpusConfig]) -> dict[tuple[int, ...], str]:
        """What is to be said of films, and one that it is of; what cannot be read is the loader's to tell of."""
        reader, found = self.unchanged(), dict[tuple[int, ...], str]()
        for sample in chain.from_iterable(items(open_corpus(config)) for config in configs):
            with suppress(DataError, TooLong):
                if not isinstance(sample, Skipped):
                    found[said(reader.labels(*reader.tokens(sample)))] = sample.id
        return found


if __name__ == "__main__":
    sys.exit(script(StemRecipe, "Teach what reads films to tell their texts apart."))
