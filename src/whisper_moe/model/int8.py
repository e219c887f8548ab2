"""Matrices in int8: symmetric rows with one scale each, on disk and in memory, and the layers that compute with them.

The scale of a row is max|w| / 127. Clipping rows at the level of least squared error instead was measured on
whisper-base: relative error 1.112 % against 1.119 %, which is not worth losing the largest weights for.

Products are of int8 with sums in int32: a scale for each row of the weight and **a scale for each token** of the input. One
scale over the whole flat tensor would let segments that share a pack change each other's answer; a scale per token cannot.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whisper_moe.model.feed_forward import by_runs
from whisper_moe.model.moe import FEW_TOKENS, shares
from whisper_moe.model.router import Routing
from whisper_moe.packing import Layout

LEVELS = 127
_CHUNK = 1 << 17
"""Elements de-quantised at a time: the pass that multiplies finds them in the cache."""


@dataclass(frozen=True)
class Int8Rows:
    """A matrix as ``levels`` int8 [rows, columns] times ``scale`` float32 [rows, 1]; or a stack of them, [N, rows, …] each."""

    levels: Tensor
    scale: Tensor

    @classmethod
    def empty(cls, *shape: int) -> Int8Rows:
        return cls(torch.empty(shape, dtype=torch.int8), torch.empty(*shape[:-1], 1))

    @classmethod
    def of(cls, weight: Tensor) -> Int8Rows:
        """Float32 weights, rounded.

        Rounding what :meth:`dequantized` returns gives the same levels and scales again, bit for bit: m / 127 * 127 / 127
        is m / 127 for every float32 number m.
        """
        scale = weight.abs().amax(dim=-1, keepdim=True) / LEVELS
        levels = torch.where(scale > 0, weight / scale, 0).round_().clamp_(-LEVELS, LEVELS)
        return cls(levels.to(torch.int8), scale)

    @property
    def shape(self) -> torch.Size:
        return self.levels.shape

    def __iter__(self) -> Iterator[Int8Rows]:
        """The matrices of a stack."""
        return map(Int8Rows, self.levels, self.scale)

    def dequantized(self) -> Tensor:
        out = torch.empty(self.shape)
        self.dequantize_into(out)
        return out

    def dequantize_into(self, out: Tensor) -> None:
        """out = levels * scale; ``out`` float32."""
        rows = max(1, _CHUNK // self.shape[-1])
        flat = (tensor.flatten(0, -2).split(rows) for tensor in (out, self.levels, self.scale))
        for part, levels, scale in zip(*flat, strict=True):
            part.copy_(levels).mul_(scale)


def row_scale(x_TD: Tensor) -> Tensor:
    """What one level of each token stands for, [T, 1]."""
    return x_TD.abs().amax(1, keepdim=True).clamp_min_(1e-12).div_(LEVELS)


def _product(x_TD: Tensor, levels_DN: Tensor) -> Tensor:
    """x W for float32 tokens, each rounded to 127 steps of its own largest number; W's own scale is still to come."""
    scale_T1 = row_scale(x_TD)
    levels_TD = (x_TD / scale_T1).round_().to(torch.int8)
    return torch._int_mm(levels_TD, levels_DN).float().mul_(scale_T1)  # pyright: ignore[reportPrivateImportUsage]


class Int8Linear(nn.Module):
    """``x W^T + b``."""

    def __init__(self, weight: Int8Rows, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = weight.levels.t()
        self.scale = weight.scale[:, 0].contiguous()
        self.bias = bias.detach() if bias is not None else torch.zeros_like(self.scale)

    def forward(self, x: Tensor) -> Tensor:
        return by_runs(self._product, x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], len(self.scale))

    def _product(self, x_TD: Tensor) -> Tensor:
        # Passes in place: one addcmul that broadcasts along both dimensions takes ten times as long as all of them.
        return _product(x_TD, self.weight).mul_(self.scale).add_(self.bias)


class Int8Embedding(nn.Module):
    """``nn.Embedding`` of a table that stays int8: a quarter of the memory, the same numbers as its float32 form."""

    def __init__(self, weight: Int8Rows) -> None:
        super().__init__()
        self.levels, self.scale = weight.levels, weight.scale

    def forward(self, ids: Tensor) -> Tensor:
        return self.levels[ids].float().mul_(self.scale[ids])


class Int8Experts(nn.Module):
    """:class:`~whisper_moe.model.moe.Experts`: those that tokens need are one feed-forward, their hidden units side by side.

    A row of ``down`` is one hidden unit's way out; its scale multiplies that unit, and so does its expert's gate. Units of
    experts that a token did not choose are 0, so it does not matter to it which others are computed.
    """

    def __init__(self, up: Int8Rows, up_bias: Tensor, down: Int8Rows, down_bias: Tensor) -> None:
        """Stacks [E, F, D] of E experts with F hidden units; biases [E, F] and [E, D]."""
        super().__init__()
        scales = (up.scale[..., 0].contiguous(), down.scale[..., 0].contiguous())
        self.all = (up.levels, down.levels, *scales, up_bias.detach(), down_bias.detach())
        self.last: tuple[tuple[int, ...], tuple[Tensor, ...]] = ((), ())
        """The experts that were used last: decoding asks for the same ones at every step."""

    def forward(self, x_TD: Tensor, routing: Routing, layout: Layout | None = None) -> Tensor:
        """The gated sum over each token's experts, as :meth:`Experts.forward`."""
        parts = shares(routing, layout, len(x_TD))
        return torch.cat([self._mixed(x_TD[run], *self._widened(experts, gates)) for run, experts, gates in parts])

    def _widened(self, experts: tuple[int, ...], gates_TC: Tensor) -> tuple[tuple[int, ...], Tensor]:
        """All experts, where few tokens want most of them: their weights lie side by side as they are."""
        count = len(self.all[0])
        if len(gates_TC) > FEW_TOKENS or 2 * len(experts) <= count or len(experts) == count:
            return experts, gates_TC
        return tuple(range(count)), gates_TC.new_zeros(len(gates_TC), count).index_copy_(
            1, torch.tensor(experts, device=gates_TC.device), gates_TC
        )

    def _mixed(self, x_TD: Tensor, experts: tuple[int, ...], gates_TC: Tensor) -> Tensor:
        """Some experts for all tokens; ``gates_TC`` has a column for each of them."""
        if not experts:
            return torch.zeros_like(x_TD)
        last = self.last  # read once and replaced as a whole: another thread may be transcribing
        if last[0] != experts:
            everyone = experts == tuple(range(len(self.all[0])))
            last = self.last = (experts, self.all if everyone else tuple(t[list(experts)] for t in self.all))
        up_CFD, down_CFD, up_scale, down_scale, up_bias, down_bias = last[1]
        products = _product(x_TD, up_CFD.flatten(0, 1).t()).mul_(up_scale.flatten()).add_(up_bias.flatten())
        hidden_TCF = F.gelu(products).view(len(x_TD), *up_scale.shape).mul_(down_scale).mul_(gates_TC[..., None])
        return _product(hidden_TCF.flatten(1), down_CFD.flatten(0, 1)).addmm_(gates_TC, down_bias)
