"""Learning to translate, told where to look: attention to the source is guided by a first look at the pairs.

    python recipes/translation/learn.py RECIPE.yaml [KEY=VALUE ...] -o RUN [--resume]    as whisper-moe train

Beside the words that are to be written, some heads of some layers learn to look at the words that those stand for (guided
alignment, arXiv 1607.01628, section 3), as IBM's first model has them of the same pairs (begin.py). Left alone they find it after
thousands of steps.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from begin import likely, pairs_of
from pydantic import Field
from torch import Tensor, nn

from whisper_moe.data.examples import IGNORED, Pack
from whisper_moe.frozen import Strict
from whisper_moe.media.pieces import Pieces
from whisper_moe.model.attention import CrossAttention, CrossAttentionCache
from whisper_moe.model.model import WhisperMoEModel
from whisper_moe.packing import Layout
from whisper_moe.train.build import Task
from whisper_moe.train.losses import SpeechObjective, Terms, Totals
from whisper_moe.train.loop import Batches
from whisper_moe.train.parallel import Parallel
from whisper_moe.train.recipe import Recipe
from whisper_moe.train.run import script

LEAST = 0.02
"""How sure the pairs must be of what a token stands for, for anything to be learned of it."""
NEAR = 4.0
"""How much likelier a word stands for one at the same place of its sentence than for one at the other end, as a logarithm."""


class Guidance(Strict):
    """Where to look."""

    tables: str = "."
    weight: float = Field(default=0.5, ge=0)
    layers: tuple[int, ...] = (3, 4)
    heads: tuple[int, ...] = (0, 1, 2, 3)


class GuidedRecipe(Recipe):
    """Texts in, texts out, and where the decoder looks."""

    guidance: Guidance = Guidance()

    def task(self) -> type[Task]:
        return Translating


class Lexicon:
    """How likely tokens stand for each other, in either direction; equal ones do."""

    def __init__(self, stands: Tensor, first: int) -> None:
        self._likely, self._first = stands.to_dense().half(), first

    def __call__(self, said_T: Tensor, read_N: Tensor) -> Tensor:
        """[T, N]."""
        same = (said_T[:, None] == read_N).float()
        for rows, columns, turned in ((said_T, read_N, False), (read_N, said_T, True)):
            mine, theirs = rows >= self._first, columns < self._first
            found = torch.zeros(len(rows), len(columns))
            ours = self._likely[(rows[mine] - self._first)][:, columns[theirs]].float()
            found[mine.nonzero(), theirs.nonzero().T] = ours
            same = same + (found.T if turned else found)
        return same


@contextmanager
def looks(model: WhisperMoEModel, layers: Sequence[int], heads: Sequence[int]) -> Iterator[list[list[Tensor]]]:
    """Of each of these layers, as it computes: where these heads look on an average, a logarithm [n, N] a segment."""
    seen: list[list[Tensor]] = []

    def hook(layer: CrossAttention, given: tuple[Tensor, Layout, CrossAttentionCache], _: Any) -> None:
        found = layer.logits(*given, list(heads))
        seen.append([each.float().softmax(-1).mean(0).clamp_min(1e-9).log() for each in found])

    hooks = [model.decoder.blocks[layer].cross_attn.register_forward_hook(hook) for layer in layers]
    try:
        yield seen
    finally:
        for each in hooks:
            each.remove()


@dataclass(frozen=True)
class GuidedObjective(SpeechObjective):
    """… and where to look."""

    guidance: Guidance = Guidance()
    lexicon: Lexicon | None = None

    def __call__(self, model: nn.Module, packs: Sequence[Pack], totals: Totals, parallel: Parallel) -> Terms:
        assert isinstance(model, WhisperMoEModel) and self.lexicon is not None
        if not model.training or not torch.is_grad_enabled():
            return super().__call__(model, packs, totals, parallel)
        with looks(model, self.guidance.layers, self.guidance.heads) as seen:
            terms = super().__call__(model, packs, totals, parallel)
        wanted = [
            self.wanted(labels, read)
            for pack in packs
            for labels, read in zip(pack.labels_T.split(pack.texts.lengths), pack.mels, strict=True)
        ]
        guided = torch.stack(
            [-(where * look).sum() for layer in seen for look, where in zip(layer, wanted, strict=True)]
        ).sum() / (totals.tokens * len(seen))
        parts = terms.parts | {"guided": guided.detach()}
        return Terms(terms.loss + self.guidance.weight * guided, parts, terms.counts)

    def wanted(self, labels_T: Tensor, read_N: Tensor) -> Tensor:
        """Where to look when each token is to be written, [T, N]; rows of what is not known are zeros."""
        assert self.lexicon is not None
        at, there = (torch.linspace(0, 1, len(x)) for x in (labels_T, read_N))
        found = self.lexicon(labels_T, read_N) * (labels_T != IGNORED)[:, None]
        known = found.sum(1, keepdim=True) > LEAST
        found = found * (-NEAR * (at[:, None] - there).abs()).exp()
        return torch.where(known, found / found.sum(1, keepdim=True).clamp_min(1e-9), 0.0)


@dataclass(frozen=True)
class Translating(Task):
    """The expert of texts learns."""

    recipe: GuidedRecipe

    def learned(self, model: WhisperMoEModel) -> tuple[Batches, GuidedObjective]:
        config, guidance = self.initial.config, self.recipe.guidance
        assert config.senses is not None
        pieces = Pieces(self.initial.tokenizer, config.senses.tokens, config.vocab_size)
        pairs = pairs_of(Path(guidance.tables), pieces)
        lexicon = Lexicon(likely(pairs, pieces.first, len(pieces.tokens)), pieces.first)
        return self.mixed(), GuidedObjective(self.recipe.losses, None, guidance, lexicon)


if __name__ == "__main__":
    sys.exit(script(GuidedRecipe, "Teach a model to translate, told where to look."))
