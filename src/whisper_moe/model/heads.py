"""From decoder states to the next token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TextHead(nn.Module):
    """Logits over the vocabulary by the token embedding itself (tied; the head owns no parameter).

    ``added``: the embedding of new tokens, whose logits come last. They are a product of their own: one of another width might
    round the logits of the source's own tokens otherwise.
    """

    def __init__(self, embedding: nn.Embedding, added: nn.Embedding | None = None) -> None:
        super().__init__()
        self._tied = (embedding, added)  # in a tuple, so that they are not registered a second time

    @property
    def embedding(self) -> nn.Embedding:
        return self._tied[0]

    @property
    def weight(self) -> Tensor:
        return self.embedding.weight

    @property
    def added(self) -> nn.Embedding | None:
        return self._tied[1]

    def own(self, x_TD: Tensor) -> Tensor:
        """Logits of the source's own tokens alone."""
        return F.linear(x_TD, self.weight)

    def forward(self, x_TD: Tensor) -> Tensor:
        logits = self.own(x_TD)
        return logits if self.added is None else torch.cat((logits, F.linear(x_TD, self.added.weight)), -1)


class SplitHead(nn.Module):
    """A text head with new tokens whose two products were arranged for the machine."""

    def __init__(self, own: nn.Module, added: nn.Module) -> None:
        super().__init__()
        self.own, self.added = own, added

    def forward(self, x_TD: Tensor) -> Tensor:
        return torch.cat((self.own(x_TD), self.added(x_TD)), -1)
