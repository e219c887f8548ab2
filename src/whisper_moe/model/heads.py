"""From decoder states to the next token."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class TextHead(nn.Module):
    """Logits over the vocabulary by the token embedding itself (tied; the head owns no parameter)."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self._tied = (embedding,)  # in a tuple, so that it is not registered a second time

    @property
    def embedding(self) -> nn.Embedding:
        return self._tied[0]

    @property
    def weight(self) -> Tensor:
        return self.embedding.weight

    def forward(self, x_TD: Tensor) -> Tensor:
        return F.linear(x_TD, self.weight)
