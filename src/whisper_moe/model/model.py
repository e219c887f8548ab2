"""The whole encoder-decoder as one ``nn.Module``; everything around it (files, text, search) lives elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from whisper_moe.config import ModelConfig
from whisper_moe.model.decoder import Decoder
from whisper_moe.model.encoder import Encoder
from whisper_moe.packing import Layout


class WhisperMoEModel(nn.Module):
    """Whisper with packed segments, test-time training and experts, as far as ``config`` names them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def forward(self, mels: Sequence[Tensor], texts: Sequence[Tensor]) -> Tensor:
        """Teacher forcing over packed pairs: a mel [n_mels, frames] and token ids [n] a segment → logits [Σ n, vocab]."""
        encoded = self.encoder(mels)
        layout = Layout(len(text) for text in texts)
        return self.decoder.head(self.decoder(torch.cat(list(texts)), layout, encoded))
