"""The audio stem with the sinusoids that are added to it, and the layers of a block besides attention, experts and TTT: norms,
feed-forwards, and the Conformer's convolution.

T tokens of all segments, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whisper_moe.model.delta import LowRank, narrowed
from whisper_moe.packing import Layout

CHUNK = 512
"""Tokens at a time: what is computed of them on the way (2,048 hidden units in whisper-base: 4 MB) stays in the cache. Chosen
on two threads with whisper-base; 256 and 1,024 were as fast."""


class Norm(nn.LayerNorm):
    """LayerNorm; in an adapted layer its scale and shift are the core's plus a learned difference, which starts at 0."""

    def __init__(self, width: int, *, adapted: bool) -> None:
        super().__init__(width)
        self.delta_weight = nn.Parameter(torch.zeros(width)) if adapted else None
        self.delta_bias = nn.Parameter(torch.zeros(width)) if adapted else None

    def forward(self, input: Tensor, adapted: bool = True) -> Tensor:
        if self.delta_weight is None or self.delta_bias is None or not adapted:
            return super().forward(input)
        weight, bias = self.weight + self.delta_weight, self.bias + self.delta_bias
        return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)

    @torch.no_grad()
    def fold(self) -> None:
        """Make scale and difference one: for inference, where every token is adapted."""
        if self.delta_weight is not None and self.delta_bias is not None:
            self.weight = nn.Parameter(self.weight + self.delta_weight, requires_grad=False)
            self.bias = nn.Parameter(self.bias + self.delta_bias, requires_grad=False)
            self.delta_weight = self.delta_bias = None


class FeedForward(nn.Module):
    """down(gelu(up(x))), exact (erf) GELU."""

    def __init__(self, d_model: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(d_model, hidden)
        self.down = nn.Linear(hidden, d_model)

    def forward(self, x_TD: Tensor) -> Tensor:
        return by_chunks(lambda x: self.down(F.gelu(self.up(x))), x_TD)


class Adapter(FeedForward):
    """A slim feed-forward beside the block's own (arXiv 1902.00751, in parallel as in 2110.04366).

    Its output starts at exactly 0, and alive: ``up`` is random, so ``down`` has a gradient.
    """

    def __init__(self, d_model: int, hidden: int) -> None:
        super().__init__(d_model, hidden)
        nn.init.normal_(self.up.weight, std=0.02)
        for parameter in (self.up.bias, self.down.weight, self.down.bias):
            nn.init.zeros_(parameter)


def by_chunks(function: Callable[[Tensor], Tensor], x_TD: Tensor) -> Tensor:
    """``function(x_TD)`` where it maps each token on its own; inference on a CPU gives it :data:`CHUNK` tokens at a time.

    A pack's hidden units are tens of megabytes: passes over them would each go through main memory, and fresh pages.
    """
    if len(x_TD) <= CHUNK or x_TD.device.type != "cpu" or torch.is_grad_enabled():
        return function(x_TD)
    y_TD: Tensor | None = None
    for begin in range(0, len(x_TD), CHUNK):
        rows = slice(begin, begin + CHUNK)
        with narrowed(rows):
            part = function(x_TD[rows])
        y_TD = part.new_empty(len(x_TD), *part.shape[1:]) if y_TD is None else y_TD
        y_TD[rows] = part
    assert y_TD is not None
    return y_TD


class ConvolutionModule(nn.Module):
    """The Conformer's convolution module (arXiv 2005.08100, section 2.2): ``h + conv(conv_norm(h), layout)``.

    pointwise → GLU → depthwise → LayerNorm → swish → pointwise. LayerNorm in place of the paper's BatchNorm, whose
    statistics would let the segments of a batch change each other. It starts as the identity and alive: the gate α is 0, so
    the output is exactly 0, and the rest is random, so that α has a gradient.
    """

    def __init__(self, d_model: int, kernel_size: int) -> None:
        """``kernel_size`` tokens, odd: as many before a token as after it."""
        super().__init__()
        assert kernel_size % 2 == 1, kernel_size
        self.expand = nn.Linear(d_model, 2 * d_model)
        self.depthwise = nn.Conv1d(d_model, d_model, kernel_size, groups=d_model)
        self.norm = nn.LayerNorm(d_model)
        self.out = nn.Linear(d_model, d_model)
        self.gate = nn.Parameter(torch.zeros(d_model))

    def forward(self, x_TD: Tensor, layout: Layout) -> Tensor:
        """[T, D] → tanh(α) · the module's output, [T, D]."""
        mixed_TD = self._along_time(F.glu(self.expand(x_TD), dim=-1), layout)
        return torch.tanh(self.gate) * self.out(F.silu(self.norm(mixed_TD)))

    def _along_time(self, x_TD: Tensor, layout: Layout) -> Tensor:
        """The depthwise convolution, zeros beyond each segment's ends.

        Segments lie in one buffer with as many zeros before, between and behind them as the kernel reaches.
        """
        reach = self.depthwise.kernel_size[0] // 2
        places = torch.arange(layout.total, device=x_TD.device) + (layout.segment_ids(x_TD.device) + 1) * reach
        spread = x_TD.new_zeros(layout.total + (len(layout) + 1) * reach, x_TD.shape[1])
        spread = spread.index_copy(0, places, x_TD)
        return self.depthwise(spread.T[None])[0].T[places - reach]


# The audio stem


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
    """Mels of several segments → flat positions x_TD, 50 a second, and their layout (Whisper, section 2.2).

    gelu(conv k3 p1) → gelu(conv k3 s2 p1). A convolution sees one frame past each end, so segments must not touch. They are
    laid into one buffer with silent gaps of zeros between them, which is what padding would have put there: one pair of
    convolutions serves a whole pack, and each segment's positions are what they would be alone.
    """

    def __init__(self, n_mels: int, d_model: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(n_mels, d_model, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(d_model, d_model, kernel_size=3, stride=2, padding=1)

    def forward(self, mels: Sequence[Tensor]) -> tuple[Tensor, Layout]:
        """``mels``: one [n_mels, frames] tensor a segment. Returns x_TD without position embeddings."""
        layout = Layout(positions_of(mel.shape[-1]) for mel in mels)
        # Every segment begins at an even frame and is followed by at least one frame of zeros.
        strides = [2 * length + 2 for length in layout.lengths]
        pairs = list(zip(mels, strides, strict=True))
        spread = torch.cat([F.pad(mel, (0, stride - mel.shape[-1])) for mel, stride in pairs], dim=-1)
        inside = torch.cat([_inside(mel.shape[-1], stride, mel) for mel, stride in pairs], dim=-1)
        hidden = F.gelu(self.conv1(spread[None])) * inside
        x_TD = F.gelu(self.conv2(hidden))[0].T
        pieces = torch.split(x_TD, [stride // 2 for stride in strides])
        return torch.cat([piece[:-1] for piece in pieces]), layout


def _inside(frames: int, stride: int, like: Tensor) -> Tensor:
    """1 on a segment's own frames, 0 in the gap that follows."""
    inside = torch.zeros(stride, dtype=like.dtype, device=like.device)
    inside[:frames] = 1
    return inside


class TextHead(nn.Module):
    """Logits over the vocabulary by the token embedding itself (tied; the head owns no parameter), those of new tokens last."""

    def __init__(self, embedding: nn.Embedding, new_tokens: nn.Embedding | None = None) -> None:
        super().__init__()
        self._tied = (embedding, new_tokens)  # in a tuple, so that they are not registered a second time

    @property
    def weight(self) -> Tensor:
        return self._tied[0].weight

    @property
    def experts(self) -> LowRank | None:
        """The differences of its experts, in a model that has such."""
        return getattr(self._tied[0], "experts", None)

    def forward(self, x_TD: Tensor) -> Tensor:
        logits = [F.linear(x_TD, embedding.weight) for embedding in self._tied if embedding is not None]
        if self.experts is not None:
            logits[0] = self.experts.add_to(logits[0], x_TD)
        return logits[0] if len(logits) == 1 else torch.cat(logits, -1)
