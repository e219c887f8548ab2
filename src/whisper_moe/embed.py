"""The audio stem: log-mel frames to encoder positions (Whisper, section 2.2), and the sinusoids that are added to them.

gelu(conv k3 p1) → gelu(conv k3 s2 p1). A convolution sees one frame past each end, so segments must not touch. They are
laid into one buffer with silent gaps of zeros between them, which is what padding would have put there: one pair of
convolutions serves a whole pack, and each segment's positions are what they would be alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whisper_moe.packing import Layout


def positions_of(frames: int) -> int:
    """Encoder positions of so many mel frames: the second convolution's stride of 2, rounded up."""
    return (frames + 1) // 2


def sinusoids(length: int, width: int) -> Tensor:
    """[length, width] sinusoids, sines and cosines side by side: [sin | cos], inv_i = exp(-i ln(10000) / (width/2 - 1))."""
    assert width % 2 == 0
    inverse = torch.exp(-math.log(10_000) / (width // 2 - 1) * torch.arange(width // 2))
    angles = torch.arange(length)[:, None] * inverse[None, :]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class AudioStem(nn.Module):
    """Mels of several segments → flat positions x_TD, 50 a second, and their layout."""

    def __init__(self, n_mels: int, d_model: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(n_mels, d_model, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(d_model, d_model, kernel_size=3, stride=2, padding=1)

    def forward(self, mels: Sequence[Tensor]) -> tuple[Tensor, Layout]:
        """``mels``: one [n_mels, frames] tensor a segment. Returns x_TD without position embeddings."""
        layout = Layout(positions_of(mel.shape[-1]) for mel in mels)
        # Every segment begins at an even frame and is followed by at least one frame of zeros.
        strides = [2 * length + 2 for length in layout.lengths]
        spread = torch.cat(
            [F.pad(mel, (0, stride - mel.shape[-1])) for mel, stride in zip(mels, strides, strict=True)], dim=-1
        )
        inside = torch.cat(
            [_inside(mel.shape[-1], stride, mel) for mel, stride in zip(mels, strides, strict=True)], dim=-1
        )
        hidden = F.gelu(self.conv1(spread[None])) * inside
        x_TD = F.gelu(self.conv2(hidden))[0].T
        pieces = torch.split(x_TD, [stride // 2 for stride in strides])
        return torch.cat([piece[:-1] for piece in pieces]), layout


def _inside(frames: int, stride: int, like: Tensor) -> Tensor:
    """1 on a segment's own frames, 0 in the gap that follows."""
    inside = torch.zeros(stride, dtype=like.dtype, device=like.device)
    inside[:frames] = 1
    return inside
