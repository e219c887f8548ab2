"""The whole encoder-decoder as one ``nn.Module``; everything around it (files, text, search) lives elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from whisper_moe.config import ModelConfig
from whisper_moe.model.decoder import Decoder
from whisper_moe.model.encoder import Encoder
from whisper_moe.model.router import Choices, Routing
from whisper_moe.packing import Layout


class Output(NamedTuple):
    """What training reads of one pass."""

    logits: Tensor
    """[Σ n, vocab]"""
    states_TD: Tensor
    """The decoder's states before the head, [Σ n, D]."""
    routings: tuple[Routing, ...]
    """Every choice that a router made, in order: one for the segments, or one for each routed layer's tokens."""
    depths: tuple[Tensor, ...]
    """The decoder's states behind each of its blocks, [Σ n, D]."""


class WhisperMoEModel(nn.Module):
    """Whisper with packed segments, test-time training and experts, as far as ``config`` names them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def forward(
        self, mels: Sequence[Tensor], texts: Sequence[Tensor], *, heard: Sequence[int] | None = None,
        detailed: bool = False,
    ) -> Tensor | Output:  # fmt: skip
        """Teacher forcing over packed pairs: a mel [n_mels, frames] and token ids [n] a segment → logits [Σ n, vocab].

        ``heard``: the positions of each segment that a router of segments reads (:meth:`Encoder.forward`).
        ``detailed``: everything that losses are computed from, as :class:`Output`.
        """
        choices = Choices()
        encoded = self.encoder(mels, heard=heard, choices=choices)
        layout = Layout(len(text) for text in texts)
        depths: list[Tensor] = []
        states_TD = self.decoder(torch.cat(list(texts)), layout, encoded, choices, depths)
        logits = self.decoder.head(states_TD)
        return Output(logits, states_TD, tuple(choices.made), tuple(depths)) if detailed else logits
