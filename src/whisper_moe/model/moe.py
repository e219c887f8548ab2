"""Routed experts: a feed-forward of which each token uses only the few that the router chose, weighed by their gates.

Mixtral (arXiv 2401.04088, section 2.1), dropless: no expert ever refuses a token, so an answer does not depend on
what it shares a batch with. The shared expert (DeepSeekMoE arXiv 2401.06066) is the block's own feed-forward, beside
this. A gate multiplies the hidden units rather than the output: the same function, and it makes the chosen experts one
feed-forward whose hidden units stand side by side.

:meth:`Experts.forward` is the definition. Beside it lies what computes the same sum faster: one grouped product, and for
inference on a CPU (:mod:`whisper_moe.model.inference`) layers that are laid out for it, in float32 or int8.

T tokens, D width, K slots, E experts, C experts that are computed, F hidden units of one expert, P pairs of a token and an
expert.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from whisper_moe.model.int8 import Int8Rows, int8_product
from whisper_moe.model.router import NONE, Routing
from whisper_moe.packing import Layout

FEW_TOKENS = 64
"""Up to here an expert's products cost what reading its weights costs, whoever needs them."""


class Experts(nn.Module):
    """E feed-forwards with exact (erf) GELU. They start with an output of exactly 0.

    Alive nevertheless: the hidden units are random, so ``down_*`` gets a gradient in the first step; ``up_*`` and the
    gates get theirs from the second, when ``down_weight`` is no longer 0.
    """

    def __init__(self, d_model: int, expert_dim: int, n_experts: int) -> None:
        super().__init__()
        self.up_weight = nn.Parameter(torch.empty(n_experts, expert_dim, d_model).normal_(std=0.02))
        self.up_bias = nn.Parameter(torch.zeros(n_experts, expert_dim))
        self.down_weight = nn.Parameter(torch.zeros(n_experts, expert_dim, d_model))
        self.down_bias = nn.Parameter(torch.zeros(n_experts, d_model))

    def forward(self, x_TD: Tensor, routing: Routing, layout: Layout | None = None) -> Tensor:
        """[T, D] → [T, D]: the gated sum over each token's experts; *none* adds nothing.

        ``routing`` has one row for each token or, where ``layout`` is given, for each of its segments.
        """
        if torch.is_autocast_enabled(x_TD.device.type) and x_TD.dtype != torch.float64:
            x_TD = x_TD.to(torch.get_autocast_dtype(x_TD.device.type))
        tokens = routing if layout is None else routing.expand(layout)
        experts_TK, gates_TK = tokens.experts, tokens.gates.to(x_TD.dtype)
        assert len(experts_TK) == len(x_TD), (x_TD.shape, experts_TK.shape)
        y_TD = tokens.dense(len(self.down_bias)).to(x_TD.dtype) @ self.down_bias
        if self._can_group(x_TD):
            return self._grouped(x_TD, experts_TK, gates_TK, y_TD)
        # Unbound at once: an index makes a gradient of all E.
        each = zip(self.up_weight.unbind(), self.up_bias.unbind(), self.down_weight.unbind(), strict=True)
        for expert, (up, up_bias, down) in enumerate(each):
            token, slot = (experts_TK == expert).nonzero(as_tuple=True)
            hidden = F.gelu(F.linear(x_TD[token], up, up_bias)) * gates_TK[token, slot, None]
            y_TD = y_TD.index_add(0, token, hidden @ down)
        return y_TD

    def _can_group(self, x_TD: Tensor) -> bool:
        """``grouped_mm`` takes no float64 and only rows that begin at multiples of 16 bytes."""
        _, expert_dim, d_model = self.up_weight.shape
        aligned = all(width * x_TD.element_size() % 16 == 0 for width in (expert_dim, d_model))
        return aligned and x_TD.dtype in (torch.float32, torch.bfloat16, torch.float16)

    def _grouped(self, x_TD: Tensor, experts_TK: Tensor, gates_TK: Tensor, y_TD: Tensor) -> Tensor:
        """All experts in one grouped product each way, over the pairs of token and expert sorted by expert.

        The product leaves rows beyond its last group uninitialised; pairs with *none* are dropped first, so that there
        are no such rows.
        """
        token, slot = (experts_TK != NONE).nonzero(as_tuple=True)
        if not len(token):
            return y_TD
        expert_P, order = experts_TK[token, slot].sort(stable=True)
        token, slot = token[order], slot[order]
        ends = expert_P.bincount(minlength=len(self.up_weight)).cumsum(0).to(torch.int32)
        up, up_bias, down = (w.to(x_TD.dtype) for w in (self.up_weight, self.up_bias, self.down_weight))
        hidden = F.gelu(F.grouped_mm(x_TD[token], up.mT, offs=ends) + up_bias[expert_P]) * gates_TK[token, slot, None]
        return y_TD.index_add(0, token, F.grouped_mm(hidden, down, offs=ends))


class PreparedExperts(nn.Module):
    """:class:`Experts` for inference on a CPU: tokens that share a choice are computed together."""

    def forward(self, x_TD: Tensor, routing: Routing, layout: Layout | None = None) -> Tensor:
        """As :meth:`Experts.forward`."""
        parts = shares(routing, layout, len(x_TD))
        return torch.cat([self.mix(x_TD[rows], experts, gates) for rows, experts, gates in parts])

    def mix(self, x_TD: Tensor, experts: tuple[int, ...], gates_TC: Tensor) -> Tensor:
        """Some experts for all tokens; ``gates_TC`` has a column for each of them."""
        raise NotImplementedError


class SeparateExperts(PreparedExperts):
    """A layer for each expert's two matrices."""

    def __init__(self, ups: Iterable[nn.Module], downs: Iterable[nn.Module]) -> None:
        super().__init__()
        self.ups, self.downs = nn.ModuleList(ups), nn.ModuleList(downs)

    def mix(self, x_TD: Tensor, experts: tuple[int, ...], gates_TC: Tensor) -> Tensor:
        y_TD = torch.zeros_like(x_TD)
        for expert, gate_T in zip(experts, gates_TC.unbind(1), strict=True):
            y_TD.addcmul_(self.downs[expert](F.gelu(self.ups[expert](x_TD))), gate_T[:, None])
        return y_TD


class Int8Experts(PreparedExperts):
    """The experts that tokens need are one feed-forward, their hidden units side by side.

    A row of ``down`` is one hidden unit's way out; its scale multiplies that unit, and so does its expert's gate. Units of
    experts that a token did not choose are 0, so it does not matter to it which others are computed.
    """

    def __init__(self, up: Int8Rows, up_bias: Tensor, down: Int8Rows, down_bias: Tensor) -> None:
        """Stacks [E, F, D] of E experts with F hidden units; biases [E, F] and [E, D]."""
        super().__init__()
        scales = (up.scale[..., 0].contiguous(), down.scale[..., 0].contiguous())
        self.all = (up.levels, down.levels, *scales, up_bias.detach(), down_bias.detach())
        self.last: tuple[tuple[int, ...], tuple[Tensor, ...]] = ((), ())
        """The experts that were used last: decoding asks for the same ones at every step."""

    def mix(self, x_TD: Tensor, experts: tuple[int, ...], gates_TC: Tensor) -> Tensor:
        if not experts:
            return torch.zeros_like(x_TD)
        last = self.last  # read once and replaced as a whole: another thread may be transcribing
        if last[0] != experts:
            everyone = experts == tuple(range(len(self.all[0])))
            last = self.last = (experts, self.all if everyone else tuple(t[list(experts)] for t in self.all))
        up_CFD, down_CFD, up_scale, down_scale, up_bias, down_bias = last[1]
        products = int8_product(x_TD, up_CFD.flatten(0, 1).t()).mul_(up_scale.flatten()).add_(up_bias.flatten())
        hidden_TCF = F.gelu(products).view(len(x_TD), *up_scale.shape).mul_(down_scale).mul_(gates_TC[..., None])
        return int8_product(hidden_TCF.flatten(1), down_CFD.flatten(0, 1)).addmm_(gates_TC, down_bias)


def shares(routing: Routing, layout: Layout | None, tokens: int) -> Iterator[tuple[slice, tuple[int, ...], Tensor]]:
    """Tokens that are computed together, in order: where they lie, their experts, and a column of gates for each expert.

    Few tokens (a decoding step) are one share of every expert that any of them chose, with a gate of 0 where one was not
    chosen. Many are a share for each run of one choice. ``routing`` and ``layout`` as in :meth:`Experts.forward`.
    """
    if tokens <= FEW_TOKENS and (layout is None or len(set(layout.lengths)) == 1):
        gates_NC = torch.cat([gate for _, gate in routing.columns], 1) if routing.columns else routing.gates[:, :0]
        chosen = tuple(expert for expert, _ in routing.columns)
        yield slice(None), chosen, gates_NC.repeat_interleave(tokens // len(routing), 0)
        return
    each, begin = routing if layout is None else routing.expand(layout), 0
    for size, choice in routing.runs(layout):
        run, slots = slice(begin, begin + size), [slot for slot, expert in enumerate(choice) if expert != NONE]
        yield run, tuple(choice[slot] for slot in slots), each.gates[run][:, slots]
        begin += size
