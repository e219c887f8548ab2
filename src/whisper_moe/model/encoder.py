"""Packed audio encoder: log-mels of several segments → flat states, and the router's choice for each segment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from whisper_moe.config import ModelConfig
from whisper_moe.embed.audio import AudioStem, sinusoids
from whisper_moe.model.adapt import Adapted
from whisper_moe.model.block import Block, Carry
from whisper_moe.model.router import Choices, Router, Routing, pool_segments
from whisper_moe.packing import Layout


class Encoded(NamedTuple):
    """States x_TD of all segments, where each segment lies, and its experts (None without segment-scope experts)."""

    states_TD: Tensor
    layout: Layout
    routing: Routing | None


class Encoder(nn.Module):
    """Stem, positions, blocks. Blocks before ``moe.router_layer`` are unrouted; the router reads what they made."""

    positions: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.stem = AudioStem(config.n_mels, config.d_model)
        self.register_buffer("positions", sinusoids(config.max_source_positions, config.d_model))
        self.blocks = nn.ModuleList(Block(config, "encoder", i) for i in range(config.encoder_layers))
        self.norm = nn.LayerNorm(config.d_model)
        self.core_alone = config.core_alone_on_full_windows
        self.router, self.router_layer = None, None
        if config.moe and config.moe.scope == "segment":
            moe = config.moe
            self.router = Router(
                config.d_model, moe.n_experts, moe.top_k, moe.none_choice, biased=moe.balance_bias
            )  # fmt: skip
            self.router_layer = config.moe.router_layer

    def forward(
        self, mels: Sequence[Tensor], *, heard: Sequence[int] | None = None, routing: Routing | None = None,
        carry: Carry | None = None, choices: Choices | None = None,
    ) -> Encoded:  # fmt: skip
        """``mels``: [n_mels, frames] a segment.

        ``heard``: how many positions of each segment the router reads (those of the sound, not of the silence kept after
        it); default all. ``routing``: a choice made elsewhere, which the router then does not make. ``carry``: fast
        weights of the same recording's window before, advanced in place; for one segment at a time. ``choices``: where
        what the routers choose is noted.
        """
        if routing is not None and self.router is None:
            raise ValueError("routing is given to a model whose segments are not routed")
        x_TD, layout = self.stem(mels)
        longest, limit = max(layout.lengths), self.positions.shape[0]
        if longest > limit:
            raise ValueError(f"a segment has {longest} positions; the encoder has {limit}")
        x_TD = x_TD + self.positions[layout.positions(x_TD.device)]
        adapted = self._adapted(layout, x_TD)
        for depth, block in enumerate(self.blocks):
            if depth == self.router_layer:
                routing = self._choose(x_TD, layout, heard, routing)
            x_TD = block(x_TD, layout, routing, carry=carry, choices=choices, adapted=adapted)
        if self.router_layer == len(self.blocks):
            routing = self._choose(x_TD, layout, heard, routing)
        if choices is not None and routing is not None:
            choices.made.append(routing)
        return Encoded(self.norm(x_TD), layout, routing)

    def _adapted(self, layout: Layout, like: Tensor) -> Adapted:
        """The tokens of all windows but, where the core answers for those alone, full ones."""
        full = [self.core_alone and length == self.positions.shape[0] for length in layout.lengths]
        if not any(full):
            return True
        if all(full) and not torch.is_grad_enabled():  # a backward pass reaches every parameter, on every rank
            return False
        return ~torch.tensor(full, device=like.device)[layout.segment_ids(like.device)][:, None]

    def _choose(
        self, x_TD: Tensor, layout: Layout, heard: Sequence[int] | None, routing: Routing | None
    ) -> Routing | None:
        if routing is not None:
            return routing
        assert self.router is not None
        return self.router(pool_segments(x_TD, layout, tuple(heard) if heard is not None else None))
