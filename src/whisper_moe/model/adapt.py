"""What is always on beside a frozen core, and begins as the identity: norms with a difference, and slim feed-forwards."""

from __future__ import annotations

from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whisper_moe.model.feed_forward import FeedForward

Adapted: TypeAlias = "bool | Tensor"
"""Which tokens are adapted: all, none, or those where a mask [T, 1] says so (``AdaptConfig.full_windows``)."""


class AdaptedNorm(nn.LayerNorm):
    """LayerNorm whose scale and shift are the core's plus a learned difference, which starts at 0."""

    def __init__(self, width: int, *, always: bool = True) -> None:
        """``always``: whether every token is adapted, so that the two can be made one (:meth:`folded`)."""
        super().__init__(width)
        self.always = always
        self.delta_weight = nn.Parameter(torch.zeros(width))
        self.delta_bias = nn.Parameter(torch.zeros(width))

    def forward(self, input: Tensor, adapted: Adapted = True) -> Tensor:
        if adapted is False:
            return super().forward(input)
        weight, bias = self.weight + self.delta_weight, self.bias + self.delta_bias
        y = F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)
        return y if adapted is True else torch.where(adapted, y, super().forward(input))

    @torch.no_grad()
    def folded(self) -> nn.LayerNorm:
        """The same function as a plain LayerNorm; for inference, where every token is adapted."""
        plain = nn.LayerNorm(list(self.normalized_shape), eps=self.eps, device="meta")
        plain.weight = nn.Parameter(self.weight + self.delta_weight, requires_grad=False)
        plain.bias = nn.Parameter(self.bias + self.delta_bias, requires_grad=False)
        return plain


class Adapter(FeedForward):
    """A slim feed-forward beside the block's own (arXiv 1902.00751, in parallel as in 2110.04366).

    Its output starts at exactly 0, and alive: ``up`` is random, so ``down`` has a gradient.
    """

    def __init__(self, d_model: int, hidden: int) -> None:
        super().__init__(d_model, hidden)
        nn.init.normal_(self.up.weight, std=0.02)
        for parameter in (self.up.bias, self.down.weight, self.down.bias):
            nn.init.zeros_(parameter)
