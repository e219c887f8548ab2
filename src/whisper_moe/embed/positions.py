"""Whisper's sinusoidal positions."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sinusoids(length: int, width: int) -> Tensor:
    """[length, width] sinusoids, sines and cosines side by side: [sin | cos], inv_i = exp(-i ln(10000) / (width/2 - 1))."""
    assert width % 2 == 0
    inverse = torch.exp(-math.log(10_000) / (width // 2 - 1) * torch.arange(width // 2))
    angles = torch.arange(length)[:, None] * inverse[None, :]
    return torch.cat([angles.sin(), angles.cos()], dim=1)
