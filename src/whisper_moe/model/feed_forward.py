"""The feed-forward of a block, and how work on each token alone goes through a CPU's cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RUN = 512
"""Tokens at a time: what is computed of them on the way (2,048 hidden units in whisper-base: 4 MB) stays in the cache. Chosen
on two threads with whisper-base; 256 and 1,024 were as fast."""


class FeedForward(nn.Module):
    """down(gelu(up(x))), exact (erf) GELU."""

    def __init__(self, d_model: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(d_model, hidden)
        self.down = nn.Linear(hidden, d_model)

    def forward(self, x_TD: Tensor) -> Tensor:
        return by_runs(lambda x: self.down(F.gelu(self.up(x))), x_TD)


def by_runs(function: Callable[[Tensor], Tensor], x_TD: Tensor) -> Tensor:
    """``function(x_TD)`` where it maps each token on its own; inference on a CPU gives it :data:`RUN` tokens at a time.

    A pack's hidden units are tens of megabytes: passes over them would each go through main memory, and fresh pages.
    """
    if len(x_TD) <= RUN or x_TD.device.type != "cpu" or torch.is_grad_enabled():
        return function(x_TD)
    first = function(x_TD[:RUN])
    y_TD = first.new_empty(len(x_TD), *first.shape[1:])
    y_TD[:RUN] = first
    for begin in range(RUN, len(x_TD), RUN):
        y_TD[begin : begin + RUN] = function(x_TD[begin : begin + RUN])
    return y_TD
