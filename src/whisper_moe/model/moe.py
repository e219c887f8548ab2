"""Routed experts: a feed-forward of which each token uses only the few that the router chose, weighed by their gates.

Mixtral (arXiv 2401.04088, section 2.1), dropless: no expert ever refuses a token, so an answer does not depend on
what it shares a batch with. The shared expert (DeepSeekMoE arXiv 2401.06066) is the block's own feed-forward, beside
this. A gate multiplies the hidden units rather than the output: the same function, and it makes the chosen experts one
feed-forward whose hidden units stand side by side.

T tokens, D width, K slots, E experts, F hidden units of one expert, P pairs of a token and an expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from whisper_moe.model.router import NONE, Routing
from whisper_moe.packing import Layout

LONG_RUN = 64
"""Tokens in a run from which a slice for each run beats the grouped product: where the two cost the same on a CPU in
float32 (width 512 with 256 hidden units and width 768 with 3,072, two of eight experts, 2 to 6 runs)."""

FEW_TOKENS = 64
"""Up to here an expert's products cost what reading its weights costs, whoever needs them."""


class Experts(nn.Module):
    """E feed-forwards with exact (erf) GELU. They start with an output of exactly 0.

    Alive nevertheless: the hidden units are random, so ``down_*`` gets a gradient in the first step; ``up_*`` and the
    gates get theirs from the second, when ``down_weight`` is no longer 0.

    Three ways to compute the same sum, chosen by how many tokens share a choice; see :meth:`forward`.
    """

    def __init__(self, d_model: int, expert_dim: int, n_experts: int) -> None:
        super().__init__()
        self.up_weight = nn.Parameter(torch.empty(n_experts, expert_dim, d_model))
        self.up_bias = nn.Parameter(torch.empty(n_experts, expert_dim))
        self.down_weight = nn.Parameter(torch.empty(n_experts, expert_dim, d_model))
        self.down_bias = nn.Parameter(torch.empty(n_experts, d_model))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.up_weight, std=0.02)
        for parameter in (self.up_bias, self.down_weight, self.down_bias):
            nn.init.zeros_(parameter)

    def forward(self, x_TD: Tensor, routing: Routing, layout: Layout | None = None) -> Tensor:
        """[T, D] → [T, D]: the gated sum over each token's experts; *none* adds nothing.

        ``routing`` has one row for each token or, where ``layout`` is given, for each of its segments.

        - One choice for all tokens, or for runs of at least :data:`LONG_RUN` on average (an encoder's segments, decoder
          rows that agree): :meth:`_by_run`.
        - Choices that change from token to token: :meth:`_grouped`, or :meth:`_by_expert` where the grouped product is
          not available (float64, widths that are not a multiple of 16 bytes).
        """
        assert len(routing) == (len(x_TD) if layout is None else len(layout)), (x_TD.shape, routing.experts.shape)
        assert layout is None or len(x_TD) == layout.total, (x_TD.shape, layout)
        if torch.is_autocast_enabled(x_TD.device.type) and x_TD.dtype != torch.float64:
            x_TD = x_TD.to(torch.get_autocast_dtype(x_TD.device.type))
        tokens = routing if layout is None else routing.expand(layout)
        experts_TK, gates_TK = tokens.experts, tokens.gates.to(x_TD.dtype)
        bias_TD = self._gated_down_bias(experts_TK, gates_TK)
        runs = routing.runs(layout)
        if len(runs) == 1 or len(x_TD) >= len(runs) * LONG_RUN:
            return self._by_run(x_TD, gates_TK, bias_TD, runs)
        if self._can_group(x_TD):
            return self._grouped(x_TD, experts_TK, gates_TK, bias_TD)
        return self._by_expert(x_TD, experts_TK, gates_TK, bias_TD)

    def _gated_down_bias(self, experts_TK: Tensor, gates_TK: Tensor) -> Tensor:
        """[T, D]: what the experts' last biases add up to. Every path adds its products to it."""
        n_experts = len(self.down_bias)
        columns = experts_TK % (n_experts + 1)  # -1, *none*, becomes one column more, which is then cut off
        gates_TE = gates_TK.new_zeros(len(gates_TK), n_experts + 1).scatter_add(1, columns, gates_TK)
        return gates_TE[:, :n_experts] @ self.down_bias

    def _by_expert(self, x_TD: Tensor, experts_TK: Tensor, gates_TK: Tensor, bias_TD: Tensor) -> Tensor:
        """The reference that the other two are tested against: each expert in turn works on its own tokens."""
        y_TD = bias_TD
        for expert, (up, up_bias, down) in enumerate(self._each()):
            token, slot = (experts_TK == expert).nonzero(as_tuple=True)
            if len(token):
                hidden = F.gelu(F.linear(x_TD[token], up, up_bias)) * gates_TK[token, slot, None]
                y_TD = y_TD.index_add(0, token, hidden @ down)
        return y_TD

    def _by_run(
        self, x_TD: Tensor, gates_TK: Tensor, bias_TD: Tensor, runs: Sequence[tuple[int, tuple[int, ...]]]
    ) -> Tensor:
        """Each run of tokens with one choice is a slice, so nothing is gathered or scattered.

        Its experts are one feed-forward whose hidden units stand side by side. Their weights are used where they lie:
        to copy them together first takes 4 times as long at one token, twice at 12, as long at 2,000.
        """
        experts = list(self._each())
        sizes = [size for size, _ in runs]
        parts = zip(runs, x_TD.split(sizes), gates_TK.split(sizes), bias_TD.split(sizes), strict=True)
        outputs = []
        for (_, choice), x, gates, y in parts:
            for slot, expert in enumerate(choice):
                if expert != NONE:
                    up, up_bias, down = experts[expert]
                    hidden = F.gelu(F.linear(x, up, up_bias)) * gates[:, slot, None]
                    y = torch.addmm(y, hidden, down)
            outputs.append(y)
        return torch.cat(outputs)

    def _grouped(self, x_TD: Tensor, experts_TK: Tensor, gates_TK: Tensor, bias_TD: Tensor) -> Tensor:
        """All experts in one grouped product each way, over the pairs of token and expert sorted by expert.

        The product leaves rows beyond its last group uninitialised; pairs with *none* are dropped first, so that there
        are no such rows. Computing all of eight experts and masking by the gates takes, on one thread, 1.4 times as long
        at one token and 3 times at 2,000.
        """
        token, slot = (experts_TK != NONE).nonzero(as_tuple=True)
        if not len(token):
            return bias_TD
        expert_P, order = experts_TK[token, slot].sort(stable=True)
        token, slot = token[order], slot[order]
        ends = expert_P.bincount(minlength=len(self.up_weight)).cumsum(0).to(torch.int32)
        up, up_bias, down = (w.to(x_TD.dtype) for w in (self.up_weight, self.up_bias, self.down_weight))
        hidden = F.gelu(F.grouped_mm(x_TD[token], up.mT, offs=ends) + up_bias[expert_P]) * gates_TK[token, slot, None]
        return bias_TD.index_add(0, token, F.grouped_mm(hidden, down, offs=ends))

    def _can_group(self, x_TD: Tensor) -> bool:
        """``grouped_mm`` takes no float64 and only rows that begin at multiples of 16 bytes."""
        _, expert_dim, d_model = self.up_weight.shape
        aligned = all(width * x_TD.element_size() % 16 == 0 for width in (expert_dim, d_model))
        return aligned and x_TD.dtype in (torch.float32, torch.bfloat16, torch.float16)

    def _each(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Each expert's (up_weight, up_bias, down_weight), unbound at once: an index makes a gradient of all E."""
        return zip(self.up_weight.unbind(), self.up_bias.unbind(), self.down_weight.unbind(), strict=True)


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
