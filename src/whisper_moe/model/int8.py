"""Matrices in int8: symmetric rows with one scale each, on disk and in memory, and the layers that compute with them.

The scale of a row is max|w| / 127. Clipping rows at the level of least squared error instead was measured on
whisper-base: relative error 1.112 % against 1.119 %, which is not worth losing the largest weights for.

Products are of int8 with sums in int32: a scale for each row of the weight and **a scale for each token** of the input. One
scale over the whole flat tensor would let segments that share a pack change each other's answer; a scale per token cannot.

x86 CPUs without AVX-512 have a kernel of their own, FBGEMM's. Without VNNI a CPU multiplies bytes in pairs, an unsigned one by
a signed one, and adds the two products in 16 bits, which saturate: 255 · 127 + 255 · 127 is 64,770 and comes out as 32,767.
The usual way out is to give up one bit of every number. Here only the pairs count: a row whose neighbours add up to at most
128 on either side of 0 is exact as it is, and any other row is scaled down until it is. (A row's largest weight has a small
neighbour most of the time.)
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whisper_moe.model.layers import by_chunks

LEVELS = 127
_CHUNK = 1 << 17
"""Elements de-quantised at a time: the pass that multiplies finds them in the cache."""
_ZERO = 128
"""FBGEMM's tokens are unsigned: -127 … 127 is stored as 1 … 255."""
_PAIR = 32_767 // 255
"""What the weights of a pair may add up to there, on either side of 0."""
_ROWS = 512
"""Rows of a matrix that are laid out at a time."""


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


def int8_product(x_TD: Tensor, levels_DN: Tensor) -> Tensor:
    """x W for float32 tokens, each rounded to 127 steps of its own largest number; W's own scale is still to come."""
    scale_T1 = row_scale(x_TD)
    levels_TD = (x_TD / scale_T1).round_().to(torch.int8)
    return torch._int_mm(levels_TD, levels_DN).float().mul_(scale_T1)  # pyright: ignore[reportPrivateImportUsage]


class Int8Linear(nn.Module):
    """``x W^T + b``."""

    def __init__(self, weight: Int8Rows, bias: Tensor | None) -> None:
        super().__init__()
        self.outputs, self.weight = weight.shape[0], weight.levels.t()
        self.scale = weight.scale[:, 0].contiguous()
        self.bias = bias.detach() if bias is not None else torch.zeros_like(self.scale)

    def forward(self, x: Tensor) -> Tensor:
        return by_chunks(self._product, x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], self.outputs)

    def _product(self, x_TD: Tensor) -> Tensor:
        # Passes in place: one addcmul that broadcasts along both dimensions takes ten times as long as all of them.
        return int8_product(x_TD, self.weight).mul_(self.scale).add_(self.bias)


class Int8Embedding(nn.Module):
    """``nn.Embedding`` of a table that stays int8: a quarter of the memory, the same numbers as its float32 form."""

    def __init__(self, weight: Int8Rows) -> None:
        super().__init__()
        self.levels, self.scale = weight.levels, weight.scale

    def forward(self, ids: Tensor) -> Tensor:
        return self.levels[ids].float().mul_(self.scale[ids])


def suits_fbgemm() -> bool:
    """An x86 CPU with AVX2 and no more, and a PyTorch that has the kernel (it is marked as deprecated in 2.13)."""
    kernel = hasattr(torch.ops.quantized, "linear_with_input_q_dq_qweight_dq_output_fp32")
    engine = "fbgemm" in torch.backends.quantized.supported_engines
    return kernel and engine and torch.backends.cpu.get_cpu_capability() == "AVX2"


@contextmanager
def fbgemm_packing() -> Iterator[None]:
    """FBGEMM's own packing, in which every :class:`FbgemmLinear` has to be made; the choice is the whole process's."""
    engine = torch.backends.quantized.engine
    torch.backends.quantized.engine = "fbgemm"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.quantize_per_tensor")  # deprecated, without a successor on AVX2
        try:
            yield
        finally:
            torch.backends.quantized.engine = engine


def unsaturated(weight: Int8Rows) -> Int8Rows:
    """A matrix [rows, columns] whose neighbouring columns, two and two, do not overflow 16 bits; other rows stay as they are."""
    levels, scale = torch.empty_like(weight.levels), torch.empty_like(weight.scale)
    for part, old, out, out_scale in zip(
        weight.levels.split(_ROWS), weight.scale.split(_ROWS), levels.split(_ROWS), scale.split(_ROWS), strict=True
    ):
        most = torch.maximum(_heaviest(part.clamp_min(0)), _heaviest(part.neg().clamp_min_(0)))
        # One level of room: both of a pair may be rounded up.
        shrink = torch.where(most > _PAIR, (_PAIR - 1) / most, 1)
        out.copy_((part * shrink).round_())
        torch.div(old, shrink, out=out_scale)
    return Int8Rows(levels, scale)


def _heaviest(levels: Tensor) -> Tensor:
    """The largest sum of two neighbours in each row of int8 numbers that are not negative, [rows, 1]."""
    pairs = F.pad(levels, (0, levels.shape[1] % 2)).view(torch.int16)  # two bytes in one number: four times as fast
    return ((pairs & 0xFF) + (pairs >> 8)).amax(1, keepdim=True)


class FbgemmLinear(Int8Linear):
    """The same product by FBGEMM, where :func:`suits_fbgemm`; made within :func:`fbgemm_packing`."""

    def __init__(self, weight: Int8Rows, bias: Tensor | None) -> None:
        nn.Module.__init__(self)
        self.outputs, self.bias = weight.shape[0], bias.detach() if bias is not None else torch.zeros(weight.shape[0])
        weight = unsaturated(weight)
        zeros = torch.zeros(self.outputs, dtype=torch.long)
        tensor = torch._make_per_channel_quantized_tensor(weight.levels, weight.scale[:, 0].double(), zeros, 0)  # pyright: ignore[reportPrivateImportUsage]
        self.packed = torch.ops.quantized.linear_prepack(tensor, None)

    def _product(self, x_TD: Tensor) -> Tensor:
        scale_T1 = row_scale(x_TD)
        product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        return product(x_TD / scale_T1, 1.0, _ZERO, self.packed).mul_(scale_T1).add_(self.bias)
