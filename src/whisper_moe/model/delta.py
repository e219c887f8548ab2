"""Experts as differences from one base: W_e = W + B_e A_e for every matrix, norms and biases in full.

LoRA (arXiv 2106.09685), many at once (S-LoRA, 2311.03285). All tokens of a pack share the products with W; each segment adds
the low-rank product of its own expert. Two experts add theirs by their gates, which is the layer with averaged weights.
*None*, and whatever is computed outside :func:`assigned`, is the base alone.

:func:`add_differences` puts them into a model that is built: its code knows plain layers only. Which tokens are whose is said
by :func:`assigned` around a pass, since projections do not see segments.

T tokens, S segments, E experts, r rank, I inputs, O outputs, P tokens of the busiest expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import cached_property, lru_cache, partial
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whisper_moe.model.router import NONE, Routing
from whisper_moe.packing import Layout

Result = TypeVar("Result")
FEW_TOKENS = 128
"""Up to here (a decoding step) one batched product for all experts is faster than one for each."""


EMBEDDING_RANK = 4
"""At most, of the token embedding's difference, whose products with the whole vocabulary are most of what all differences cost.
It is mostly one direction; figures in docs/lab.md."""


class Part(NamedTuple):
    """Neighbouring tokens, one of their experts, and its gate, a number; None is 1."""

    tokens: slice
    expert: int
    gate: Tensor | None


class Assignment:
    """Which of E experts the tokens of a flat tensor belong to; ``routing`` has a row for each segment."""

    def __init__(self, routing: Routing, lengths: tuple[int, ...], experts: int) -> None:
        self.routing, self.layout, self.experts = routing, Layout(lengths), experts

    @cached_property
    def parts(self) -> list[Part]:
        """Segment by segment; neighbours whose one expert is the same are one part."""
        found: list[Part] = []
        for row, (tokens, choice) in enumerate(zip(self.layout.slices(), self.routing.choices, strict=True)):
            if found and len(choice) == 1 and (found[-1].expert, found[-1].tokens.stop) == (choice[0], tokens.start):
                found[-1] = found[-1]._replace(tokens=slice(found[-1].tokens.start, tokens.stop))
                continue
            gates = [None] if len(choice) == 1 else self.routing.gates[row].unbind()
            found += [Part(tokens, e, gate) for e, gate in zip(choice, gates, strict=True) if e != NONE]
        return found

    @cached_property
    def padded(self) -> tuple[Tensor, Tensor] | None:
        """For all experts at once: tokens [E, P] and gates [E, P, 1], which are 0 where an expert has fewer than P tokens.

        None for many tokens, and where more than half of it would be padding.
        """
        if self.layout.total > FEW_TOKENS or torch.is_grad_enabled():
            return None
        tokens: list[list[int]] = [[] for _ in range(self.experts)]
        gates: list[list[float]] = [[] for _ in range(self.experts)]
        for rows, expert, gate in self.parts:
            own = range(rows.start, rows.stop)
            tokens[expert] += own
            gates[expert] += [1.0 if gate is None else float(gate)] * len(own)
        most = max(map(len, tokens))
        if most * self.experts > 2 * sum(map(len, tokens)):
            return None
        own = self.routing.gates
        filled = [row + [0] * (most - len(row)) for row in tokens], [row + [0.0] * (most - len(row)) for row in gates]
        return torch.tensor(filled[0], device=own.device), own.new_tensor(filled[1])[..., None]

    @cached_property
    def gates_SE(self) -> Tensor:
        """[S, E]: each segment's gate for each expert, 0 where it was not chosen."""
        return self.routing.dense(self.experts)

    @cached_property
    def gates_TE(self) -> Tensor:
        """[T, E]: the same for each token."""
        return self.gates_SE[self.layout.segment_ids(self.gates_SE.device)]


Assignments: TypeAlias = tuple[Assignment | None, Assignment | None]
_ASSIGNED: ContextVar[Assignments] = ContextVar("assigned", default=(None, None))
"""Of the tokens that a pass computes, and of the encoder's states where cross-attention reads them."""
_kept = lru_cache(maxsize=16)(Assignment)
"""A decoding step has the assignment of the one before."""


@contextmanager
def _assigning(now: Assignments) -> Iterator[None]:
    token = _ASSIGNED.set(now)
    try:
        yield
    finally:
        _ASSIGNED.reset(token)


def assigned(
    routing: Routing | None, layout: Layout, experts: int, source: Layout | None = None
) -> AbstractContextManager[None]:
    """Within, the tokens of ``layout`` (and the states of ``source``) belong to the experts that ``routing`` chose.

    Nothing is assigned in a model without differences (0 experts).
    """
    routing = routing if experts else None
    make = Assignment if torch.is_grad_enabled() else _kept
    own = None if routing is None else make(routing, layout.lengths, experts)
    states = None if routing is None or source is None else make(routing, source.lengths, experts)
    return _assigning((own, states))


def narrowed(rows: slice) -> AbstractContextManager[None]:
    """Within, only these of the pass's tokens are computed."""
    whole, states = _ASSIGNED.get()
    return _assigning((whole and _Cut(whole, rows), states))


def keeping(function: Callable[..., Result]) -> Callable[..., Result]:
    """The function, with the assignment of now whenever it is called: activation checkpointing calls it again later."""
    now = _ASSIGNED.get()

    def call(*args: Any) -> Result:
        with _assigning(now):
            return function(*args)

    return call


class _Cut(Assignment):
    """Neighbouring tokens of an assignment, for layers that add (:meth:`LowRank.add_to`)."""

    def __init__(self, whole: Assignment, rows: slice) -> None:
        self.padded = None
        cut = [part._replace(tokens=_within(part.tokens, rows)) for part in whole.parts]
        self.parts = [part for part in cut if part.tokens.start < part.tokens.stop]


def _within(tokens: slice, rows: slice) -> slice:
    return slice(max(tokens.start, rows.start) - rows.start, min(tokens.stop, rows.stop) - rows.start)


class LowRank(nn.Module):
    """E differences of one matrix [O, I] and its bias. They start at 0, and alive: ``down`` is random."""

    def __init__(self, experts: int, rank: int, inputs: int, outputs: int, *, source: bool = False) -> None:
        """``source``: its inputs are the encoder's states in the decoder."""
        super().__init__()
        self.down = nn.Parameter(torch.empty(experts, rank, inputs))
        self.up = nn.Parameter(torch.empty(experts, rank + 1, outputs))  # the last row is the bias's difference
        self.source = source
        nn.init.normal_(self.down, std=inputs**-0.5)
        nn.init.zeros_(self.up)

    def add_to(self, y_TO: Tensor, x_TI: Tensor) -> Tensor:
        """y plus each token's own difference of x; in place. Columns that y has beyond O stay as they are."""
        at = _ASSIGNED.get()[self.source]
        if at is None or not at.parts:
            return y_TO
        own_TO = y_TO[:, : self.up.shape[-1]]
        if at.padded is not None:
            tokens_EP, gates_EP1 = at.padded[0], at.padded[1].to(x_TI.dtype)
            hidden_EPr = torch.cat([torch.bmm(x_TI[tokens_EP], self.down.mT) * gates_EP1, gates_EP1], -1)
            own_TO.index_add_(0, tokens_EP.flatten(), torch.bmm(hidden_EPr, self.up).flatten(0, 1))
            return y_TO
        for tokens, expert, gate in at.parts:
            hidden_Tr = F.pad(x_TI[tokens] @ self.down[expert].T, (0, 1), value=1.0)
            hidden_Tr = (hidden_Tr if gate is None else hidden_Tr * gate).to(y_TO.dtype)
            whole = len(hidden_Tr) == len(y_TO) and own_TO.shape == y_TO.shape
            if whole and torch.is_grad_enabled():  # in place, a gradient would be copied
                y_TO = own_TO = torch.addmm(y_TO, hidden_Tr, self.up[expert].to(y_TO.dtype))
            else:
                own_TO[tokens].addmm_(hidden_Tr, self.up[expert].to(y_TO.dtype))
        return y_TO

    def rows(self, x_TI: Tensor, ids_T: Tensor) -> Tensor:
        """x plus the rows ``ids`` of each token's own difference; ids beyond O have none."""
        at = _ASSIGNED.get()[self.source]
        if at is None:
            return x_TI
        ids_T1 = ids_T[:, None]
        known_T1, ids_T1 = ids_T1 < self.up.shape[-1], ids_T1.clamp_max(self.up.shape[-1] - 1)
        own, directions = at.routing.expand(at.layout), torch.arange(self.down.shape[1], device=ids_T.device)
        for experts_T, gates_T in zip(own.experts.unbind(1), own.gates.unbind(1), strict=True):
            gates_T1 = gates_T[:, None] * (known_T1 & (experts_T[:, None] != NONE))
            shares_Tr = self.up[experts_T[:, None], directions, ids_T1] * gates_T1.to(x_TI.dtype)
            x_TI = x_TI + torch.einsum("tr,tri->ti", shares_Tr, self.down[experts_T])
        return x_TI

    def whole(self) -> tuple[Tensor, Tensor] | None:
        """The difference [O, I] and the bias's, [O], where all tokens are of one choice; None for the base."""
        at = _ASSIGNED.get()[self.source]
        if at is None:
            return None
        gates_E = at.gates_SE[0].to(self.up.dtype)
        mixed = (self.up * gates_E[:, None, None]).transpose(1, 2)  # [E, O, r + 1]
        return torch.bmm(mixed[..., :-1], self.down).sum(0), mixed[..., -1].sum(0)


def differing(layer: nn.Module, experts: LowRank | None) -> nn.Module:
    """The same layer, a linear one or an embedding, with the differences of its experts, if it has any."""
    if experts is not None:
        layer.experts = experts
        layer.register_forward_hook(with_difference)
    return layer


def with_difference(layer: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    """A hook: ``x W_e^T + b_e`` of a layer's ``x W^T + b``; of token ids, rows of an embedding, whose text head has the same
    difference."""
    (given,) = inputs
    return layer.experts.add_to(output, given) if given.is_floating_point() else layer.experts.rows(output, given)


class DeltaConv1d(nn.Conv1d):
    """A convolution whose kernel is written out: the stem computes segments of one choice together."""

    experts: LowRank

    def forward(self, input: Tensor) -> Tensor:
        change = self.experts.whole()
        if change is None or self.bias is None:
            return super().forward(input)
        return self._conv_forward(input, self.weight + change[0].view_as(self.weight), self.bias + change[1])


class NormDifferences(nn.Module):
    """E differences of a norm's scale and shift, in full."""

    def __init__(self, experts: int, width: int) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.zeros(experts, width)) for _ in range(2))


class DeltaNorm(nn.LayerNorm):
    """LayerNorm whose scale and shift differ by expert."""

    experts: NormDifferences

    def forward(self, input: Tensor, adapted: bool = True) -> Tensor:
        at = _ASSIGNED.get()[0]
        if at is None:
            return super().forward(input)
        if at.layout.total <= FEW_TOKENS:
            weight, bias = (at.gates_TE.to(part.dtype) @ part for part in (self.experts.weight, self.experts.bias))
            plain = F.layer_norm(input, self.normalized_shape, None, None, self.eps)
            return torch.addcmul(self.bias + bias, plain, self.weight + weight)
        weights, biases = (at.gates_SE.to(part.dtype) @ part for part in (self.experts.weight, self.experts.bias))
        rows = zip(at.layout.slices(), self.weight + weights, self.bias + biases, strict=True)
        return torch.cat([F.layer_norm(input[s], self.normalized_shape, w, b, self.eps) for s, w, b in rows])


def add_differences(model: nn.Module, experts: int, rank: int) -> None:
    """Give every linear layer, convolution, norm and embedding of ``model`` the differences of so many experts, in place."""
    for path, module in list(model.named_modules()):
        if ".ttt." in path:  # each expert has its own whole TTT layers, or all share one
            continue
        low_rank = partial(LowRank, experts, rank)
        if type(module) is nn.Linear:
            source = path.endswith("cross_attn.kv")
            differing(module, low_rank(module.in_features, module.out_features, source=source))
        elif type(module) is nn.Embedding and path.endswith("token_embedding"):  # new tokens have no difference
            fewer = min(rank, EMBEDDING_RANK)
            differing(module, LowRank(experts, fewer, module.embedding_dim, module.num_embeddings))
        elif type(module) is nn.Conv1d:
            parts = low_rank(module.in_channels * module.kernel_size[0], module.out_channels)
            _become(module, DeltaConv1d, parts)
        elif isinstance(module, nn.LayerNorm):
            _become(module, DeltaNorm, NormDifferences(experts, module.normalized_shape[0]))


def _become(module: Any, kind: type[nn.Module], parts: nn.Module) -> None:
    """The same layer, with its parameters, under the same name."""
    module.__class__, module.experts = kind, parts
