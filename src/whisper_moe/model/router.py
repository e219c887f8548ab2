"""The choice of experts: *top_k* of them for each row, and a gate for each (Mixtral arXiv 2401.04088, section 2.1).

One rule for both scopes. Segment scope: a row is a segment, its features the mean of its encoder states
(:func:`pool_segments`), and the choice holds for every later layer. Token scope: a row is a token of one layer.

The gates are the softmax over the chosen logits alone, which is the softmax over all of them, cut to the chosen ones
and renormalised. Without that, identical experts would no longer add up to the layer they were copied from.

*None* deviates from the paper: it stands for ``top_k`` identical experts whose output is zero, all with the one logit
of the last row of the weight. Where its logit is above every expert's, it takes all slots and nothing is added to the
shared expert; where one expert is above it, that expert and *none* share the gate.

N rows, D width, E experts, K slots (``top_k``), S segments, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from typing import Self

import torch
from torch import Tensor, nn

from whisper_moe.config import MoEConfig
from whisper_moe.packing import Layout

NONE = -1
"""The index that stands for *none* among the experts of a :class:`Routing`."""


@dataclass(frozen=True, eq=False)
class Routing:
    """Which experts each row goes to, strongest first, and how much each counts."""

    experts: Tensor
    """[N, K] int64: an expert's index, or -1 for *none*."""
    gates: Tensor
    """[N, K]: at least 0; they sum to 1, the slots of *none* included."""
    logits: Tensor | None = None
    """[N, E] or, with a *none* choice, [N, E + 1] (*none* last): what the choice was made from."""

    def __post_init__(self) -> None:
        assert self.experts.ndim == 2 and self.experts.shape == self.gates.shape, (self.experts.shape, self.gates.shape)

    def __len__(self) -> int:
        return len(self.experts)

    def rows(self, index: Tensor) -> Routing:
        """Take rows by ``index`` ([M] int64, repeats allowed): beams, rows left in a batch, tokens of a segment."""
        return Routing(self.experts[index], self.gates[index], None if self.logits is None else self.logits[index])

    def without_experts(self) -> Routing:
        """The same rows, where *none* takes every slot."""
        return Routing(torch.full_like(self.experts, NONE), self.gates, self.logits)

    def excepting(self, other: Routing) -> Routing:
        """The same rows, of which those that ``other`` has an expert for have none here."""
        taken_N1 = (other.experts != NONE).any(1, keepdim=True)
        return Routing(self.experts.masked_fill(taken_N1, NONE), self.gates, self.logits)

    def each(self) -> list[Routing]:
        """Every row by itself."""
        return [self.rows(torch.tensor([row], device=self.experts.device)) for row in range(len(self))]

    def expand(self, layout: Layout) -> Routing:
        """One row for each segment → one for each token."""
        assert len(layout) == len(self), (layout, len(self))
        if layout.total == len(self):
            return self
        return self.rows(layout.segment_ids(self.experts.device))

    @cached_property
    def choices(self) -> tuple[tuple[int, ...], ...]:
        """``experts`` as plain numbers, read from the device once."""
        return tuple(map(tuple, self.experts.tolist()))

    @cached_property
    def columns(self) -> tuple[tuple[int, Tensor], ...]:
        """Each expert that any row chose, with every row's gate for it, [N, 1]: 0 where it was not chosen."""
        chosen = sorted({expert for choice in self.choices for expert in choice} - {NONE})
        return tuple((e, (self.gates * (self.experts == e)).sum(1, keepdim=True)) for e in chosen)

    def dense(self, n_experts: int) -> Tensor:
        """[N, E]: each row's gate for each expert, 0 where it was not chosen."""
        columns = self.experts % (n_experts + 1)  # -1, *none*, becomes one column more, which is then cut off
        gates = self.gates.new_zeros(len(self), n_experts + 1).scatter_add(1, columns, self.gates)
        return gates[:, :n_experts]

    @classmethod
    def cat(cls, parts: Sequence[Routing]) -> Routing:
        """The rows of all parts, in order."""
        logits = [part.logits for part in parts if part.logits is not None]
        experts, gates = torch.cat([part.experts for part in parts]), torch.cat([part.gates for part in parts])
        return cls(experts, gates, torch.cat(logits) if len(logits) == len(parts) else None)

    def runs(self, layout: Layout | None = None) -> list[tuple[int, tuple[int, ...]]]:
        """Neighbouring tokens with the same choice: (how many tokens, their experts), in order.

        ``layout`` says how many tokens each row stands for; without it, one.
        """
        lengths = (1,) * len(self) if layout is None else layout.lengths
        pairs = zip(self.choices, lengths, strict=True)
        return [(sum(length for _, length in run), choice) for choice, run in groupby(pairs, key=itemgetter(0))]


class Fit(nn.Module):
    """What a router that was fitted rather than trained has beside its weight (:mod:`whisper_moe.merge.router`)."""

    centre: Tensor
    scale: Tensor
    intercept: Tensor
    temperature: Tensor
    whitening: Tensor
    """[D, D]: makes the distance from an expert's mean a Mahalanobis distance. Empty without *none*, as the moments."""
    reach: Tensor
    """[C]: the greatest such distance of each expert's own clips; what is farther from it, it does not get."""
    moments: Tensor
    """[C, D + 1, D + 1]: Σ [1, x]ᵀ[1, x] of each choice's clips, standardised; what a further expert is fitted beside. The first
    row alone (how many clips, and their sum) where experts are feed-forwards, and nothing of choices without *none*."""

    def __init__(self, choices: int, d_model: int, *, none: bool, grows: bool) -> None:
        super().__init__()
        start = {"centre": torch.zeros(d_model), "scale": torch.ones(d_model), "intercept": torch.zeros(choices)}
        start |= {"temperature": torch.tensor(1.0), "reach": torch.zeros(choices)}
        kept = d_model if none else 0
        start["whitening"] = torch.zeros(kept, kept)  # no eye: on the meta device that imports triton
        start["moments"] = torch.zeros(choices if none else 0, d_model + 1 if grows else 1, d_model + 1)
        for name, value in start.items():
            self.register_buffer(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moments and distances stay float32 where a model is rounded to half precision, which could not hold them."""

        def kept(x: Tensor) -> Tensor:
            moved = fn(x)
            return moved if moved.dtype in (x.dtype, torch.float64) else x.to(moved.device)

        return super()._apply(kept, recurse)

    def logits(self, features_ND: Tensor, weight_CD: Tensor) -> Tensor:
        return (self._standard(features_ND) @ weight_CD.T + self.intercept) / self.temperature

    def unknown(self, features_ND: Tensor, experts: int) -> Tensor:
        """[N, E]: which clips are beyond the reach of which experts."""
        means_CD = self.moments[:, 0, 1:] / self.moments[:, 0, :1].clamp_min(1)
        away_NED = self._standard(features_ND)[:, None] - means_CD[:experts]
        return (away_NED @ self.whitening).norm(dim=2) > self.reach[:experts]

    def _standard(self, features_ND: Tensor) -> Tensor:
        return (features_ND - self.centre) / self.scale


class Router(nn.Module):
    """One linear map from features to a logit for each expert and, if asked for, *none*."""

    only: Sequence[int] | None = None
    """The choices that there are where a pass does not say: of one expert that is trained alone."""
    bias: Tensor | None
    """[E] or, with a *none* choice, [E + 1]: added to the logits where the choice is made, not to the gates."""

    def __init__(self, d_model: int, moe: MoEConfig) -> None:
        super().__init__()
        self.n_experts, self.top_k, self.none_choice = moe.n_experts, moe.top_k, moe.none_choice
        self.least, choices = moe.least_probability, moe.n_experts + moe.none_choice
        self.weight = nn.Parameter(torch.empty(choices, d_model).normal_(std=0.02))
        self.register_buffer("bias", torch.zeros(choices) if moe.balance_bias else None)
        grows = moe.granularity != "ffn"
        self.fit = Fit(choices, d_model, none=moe.none_choice, grows=grows) if moe.fitted_router else None

    def forward(self, features_ND: Tensor, allowed: Sequence[int] | None = None) -> Routing:
        """Features [N, D] → the experts and gates of each row; ``allowed``: among these alone, -1 for *none*. Where fewer than
        the slots are allowed, nothing takes the others.

        At least float32, also under autocast: a rounded logit can change the choice. Ties go to the lower index, and
        to an expert before *none*.
        """
        allowed = self.only if allowed is None else allowed
        with torch.autocast(features_ND.device.type, enabled=False):
            features_ND, weight = at_least_float32(features_ND), at_least_float32(self.weight)
            logits = features_ND @ weight.T if self.fit is None else self.fit.logits(features_ND, weight)
            if allowed is not None:
                logits = logits.index_fill(1, self._barred(allowed, logits.device), -torch.inf)
            known = logits
            if self.fit is not None and self.none_choice and (allowed is None or NONE in allowed):
                unknown = self.fit.unknown(features_ND, self.n_experts)
                unknown |= logits.softmax(1)[:, :-1] < self.least
                known = torch.cat([logits[:, :-1].masked_fill(unknown, -torch.inf), logits[:, -1:]], 1)
            candidates = self._with_none(known)
            if self.bias is None:
                best, index = _strongest(candidates, self.top_k)
            else:
                _, chosen = _strongest(self._with_none(known + self.bias), self.top_k)
                best, order = _strongest(candidates.gather(1, chosen), self.top_k)
                index = chosen.gather(1, order)
            nobody = (index >= self.n_experts) | (best == -torch.inf)
            return Routing(index.masked_fill(nobody, NONE), best.softmax(dim=1), logits)

    def _barred(self, allowed: Sequence[int], device: torch.device) -> Tensor:
        choices = self.n_experts + self.none_choice
        barred = [index for index in range(choices) if (index if index < self.n_experts else NONE) not in allowed]
        return torch.tensor(barred, dtype=torch.long, device=device)

    def _with_none(self, logits: Tensor) -> Tensor:
        """*None* once for each slot."""
        if not self.none_choice:
            return logits
        return torch.cat([logits, logits[:, -1:].expand(-1, self.top_k - 1)], dim=1)


def _strongest(values_NC: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row and where they are; topk does not say which of two equal values it takes."""
    values, index = values_NC.sort(dim=1, descending=True, stable=True)
    return values[:, :k], index[:, :k]


def pool_segments(x_TD: Tensor, layout: Layout, valid: Sequence[int] | None = None) -> Tensor:
    """The mean of each segment's tokens, [S, D], in at least float32.

    ``valid`` counts, for each segment, the tokens from its start that carry sound; the margin of silence after them is
    left out. Raises ``ValueError`` for a count outside the segment.
    """
    assert len(x_TD) == layout.total, (x_TD.shape, layout)
    counts = layout.lengths if valid is None else valid
    for segment, (count, length) in enumerate(zip(counts, layout.lengths, strict=True)):
        if not 1 <= count <= length:
            raise ValueError(f"segment {segment} has {length} tokens; {count} of them cannot be pooled")
    segments = at_least_float32(x_TD).split(layout.lengths)
    return torch.stack([x[:count].mean(dim=0) for x, count in zip(segments, counts, strict=True)])


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
