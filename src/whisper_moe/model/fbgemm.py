"""int8 products for x86 CPUs without AVX-512: FBGEMM's kernel, and weights that cannot overflow it.

Without VNNI a CPU multiplies bytes in pairs, an unsigned one by a signed one, and adds the two products in 16 bits, which
saturate: 255 · 127 + 255 · 127 is 64,770 and comes out as 32,767. The usual way out is to give up one bit of every number.
Here only the pairs count: a row whose neighbours add up to at most 128 on either side of 0 is exact as it is, and any other
row is scaled down until it is. (A row's largest weight has a small neighbour most of the time.)
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whisper_moe.model.feed_forward import by_runs
from whisper_moe.model.int8 import Int8Rows, row_scale

_ZERO = 128
"""Tokens are unsigned: -127 … 127 is stored as 1 … 255."""
_PAIR = 32_767 // 255
"""What the weights of a pair may add up to, on either side of 0."""
_ROWS = 512
"""Rows of a matrix that are laid out at a time."""


def suits_this_cpu() -> bool:
    """An x86 CPU with AVX2 and no more, and a PyTorch that has the kernel (it is marked as deprecated in 2.13)."""
    kernel = hasattr(torch.ops.quantized, "linear_with_input_q_dq_qweight_dq_output_fp32")
    engine = "fbgemm" in torch.backends.quantized.supported_engines
    return kernel and engine and torch.backends.cpu.get_cpu_capability() == "AVX2"


@contextmanager
def packing() -> Iterator[None]:
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


class FbgemmLinear(nn.Module):
    """``x W^T + b`` as :class:`~whisper_moe.model.int8.Int8Linear` computes it: a scale for each token, sums in int32."""

    def __init__(self, weight: Int8Rows, bias: Tensor | None) -> None:
        super().__init__()
        self.outputs, self.bias = weight.shape[0], bias.detach() if bias is not None else None
        weight = unsaturated(weight)
        zeros = torch.zeros(self.outputs, dtype=torch.long)
        tensor = torch._make_per_channel_quantized_tensor(weight.levels, weight.scale[:, 0].double(), zeros, 0)  # pyright: ignore[reportPrivateImportUsage]
        self.packed = torch.ops.quantized.linear_prepack(tensor, None)

    def forward(self, x: Tensor) -> Tensor:
        return by_runs(self._product, x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], self.outputs)

    def _product(self, x_TD: Tensor) -> Tensor:
        scale_T1 = row_scale(x_TD)
        y_TN = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            x_TD / scale_T1, 1.0, _ZERO, self.packed
        ).mul_(scale_T1)
        return y_TN if self.bias is None else y_TN.add_(self.bias)
