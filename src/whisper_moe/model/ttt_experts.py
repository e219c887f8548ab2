"""One TTT layer for each routed expert, mixed by the router's gates: a state for each segment and chosen expert."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from whisper_moe.model.router import Routing
from whisper_moe.model.ttt import TTTMLP
from whisper_moe.packing import Layout


class ExpertTTT(nn.ModuleList):
    """Σ gate_e · TTT_e(x) over the experts that each segment chose; encoder only."""

    def __init__(self, n_experts: int, d_model: int, heads: int, *, mini_batch: int, base_lr: float) -> None:
        super().__init__(
            TTTMLP(d_model, heads, mini_batch=mini_batch, base_lr=base_lr, causal=False) for _ in range(n_experts)
        )

    def skippable(self) -> bool:
        return all(layer.skippable() for layer in self)  # pyright: ignore[reportCallIssue]

    def forward(self, x_TD: Tensor, layout: Layout, routing: Routing) -> Tensor:
        """Runs each expert's layer on the segments that chose it; the others' states are never computed."""
        mixed_TD = torch.zeros_like(x_TD)
        spans = layout.slices()
        for expert, layer in enumerate(self):
            chosen, slot = (routing.experts == expert).nonzero(as_tuple=True)
            if not len(chosen) or layer.skippable():  # pyright: ignore[reportCallIssue]
                continue
            rows = torch.cat([torch.arange(spans[i].start, spans[i].stop, device=x_TD.device) for i in chosen.tolist()])
            own = Layout(layout.lengths[i] for i in chosen.tolist())
            gates = routing.gates[chosen, slot].repeat_interleave(torch.tensor(own.lengths, device=x_TD.device))
            mixed_TD = mixed_TD.index_add(0, rows, layer(x_TD[rows], own) * gates[:, None].to(x_TD.dtype))
        return mixed_TD
