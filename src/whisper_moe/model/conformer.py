"""The Conformer's convolution module (arXiv 2005.08100, section 2.2) behind a gate, on packed segments.

pointwise → GLU → depthwise → LayerNorm → swish → pointwise. LayerNorm in place of the paper's BatchNorm, whose statistics
would let the segments of a batch change each other. Segments are laid into one buffer with as many zeros between them as
the kernel reaches, which is what padding puts there: one convolution serves a whole pack and never crosses a segment.

T tokens of all segments, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whisper_moe.packing import Layout


class ConvolutionModule(nn.Module):
    """``h + conv(conv_norm(h), layout)`` is the whole residual branch.

    It starts as the identity and alive: the gate α is 0, so the output is exactly 0, and the rest is random, so that α has
    a gradient.
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
        """The depthwise convolution, zeros beyond each segment's ends."""
        reach = self.depthwise.kernel_size[0] // 2
        places = layout.positions(x_TD.device) + layout.segment_ids(x_TD.device) * reach
        starts = torch.tensor(layout.cu_seqlens[:-1], device=x_TD.device)
        places = places + starts[layout.segment_ids(x_TD.device)] + reach
        spread = x_TD.new_zeros(layout.total + (len(layout) + 1) * reach, x_TD.shape[1])
        spread = spread.index_copy(0, places, x_TD)
        return self.depthwise(spread.T[None])[0].T[places - reach]
