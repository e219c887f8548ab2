"""Linear layers arranged for inference on a CPU: the same function, laid out for the machine.

Model code keeps ``nn.Linear``; :func:`arrange` swaps the layers of a loaded model, once, from outside.

``float32``: weights re-ordered once into oneDNN's blocked layout. The stock layer re-reads a plain row-major matrix at
every call, which at the few rows of a decoding step costs two to four times as much (figures in ``docs/lab.md``).

``int8``: weights in int8 with a scale for each output, inputs in int8 with **a scale for each token**. One scale over the
whole flat tensor would let segments that share a pack change each other's answer; a scale per token cannot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whisper_moe.model.heads import TextHead
from whisper_moe.model.moe import Experts
from whisper_moe.model.router import NONE, Routing
from whisper_moe.model.ttt import TTTMLP
from whisper_moe.packing import Layout

Arithmetic = Literal["float32", "int8"]
FEW_TOKENS = 64
"""Up to here an expert's products cost what reading its weights costs, whoever needs them."""


class BlockedLinear(nn.Module):
    """``x W^T + b`` in float32, with W in oneDNN's own layout."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
        self.bias = bias.detach() if bias is not None else None

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class Int8Linear(nn.Module):
    """``x W^T + b`` in int8 products and int32 sums: absolute-maximum scales per output row of W and per token of x."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        scale = weight.detach().abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
        self.weight = (weight.detach() / scale).round_().to(torch.int8).t()
        self.scale = scale[:, 0].contiguous()
        self.bias = bias.detach() if bias is not None else torch.zeros_like(self.scale)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        scale = flat.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
        product = torch._int_mm(  # pyright: ignore[reportPrivateImportUsage]
            (flat / scale).round_().to(torch.int8), self.weight
        )
        return torch.addcmul(self.bias, product.float().mul_(self.scale), scale).view(*x.shape[:-1], -1)


class BlockedExperts(nn.Module):
    """:class:`~whisper_moe.model.moe.Experts` with each expert's two matrices in oneDNN's layout, float32."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.ups = nn.ModuleList(map(BlockedLinear, experts.up_weight, experts.up_bias))
        self.downs = nn.ModuleList(
            BlockedLinear(down.T.contiguous(), bias)
            for down, bias in zip(experts.down_weight, experts.down_bias, strict=True)
        )

    def forward(self, x_TD: Tensor, routing: Routing, layout: Layout | None = None) -> Tensor:
        """The gated sum over each token's experts, as :meth:`Experts.forward`.

        Few tokens (a decoding step): every expert that any of them chose computes all of them, with a gate of 0 where it
        was not chosen; at this size a product costs what reading its weights costs. Many: run by run of one choice.
        """
        rows = len(x_TD) // len(routing)
        if len(x_TD) <= FEW_TOKENS and rows * len(routing) == len(x_TD) and _all_equal(layout):
            columns = [(e, gate.repeat_interleave(rows, 0) if rows > 1 else gate) for e, gate in routing.columns]
            return self._mixed(x_TD, columns)
        tokens = routing if layout is None else routing.expand(layout)
        y_TD = torch.empty_like(x_TD)
        begin = 0
        for size, choice in routing.runs(layout):
            run = slice(begin, begin + size)
            gates = [(e, tokens.gates[run, slot, None]) for slot, e in enumerate(choice) if e != NONE]
            y_TD[run] = self._mixed(x_TD[run], gates)
            begin += size
        return y_TD

    def _mixed(self, x_TD: Tensor, gates: Sequence[tuple[int, Tensor]]) -> Tensor:
        y_TD = torch.zeros_like(x_TD)
        for expert, gate_T1 in gates:
            y_TD.addcmul_(self.downs[expert](F.gelu(self.ups[expert](x_TD))), gate_T1.to(x_TD.dtype))
        return y_TD


def _all_equal(layout: Layout | None) -> bool:
    return layout is None or len(set(layout.lengths)) == 1


def arrange(model: nn.Module, arithmetic: Arithmetic = "float32") -> nn.Module:
    """Swap every linear layer and the text head of ``model`` in place; for inference only, parameters are given up.

    TTT's learning rates stay as they are: the inner loop computes them from their weights, in float32 at least. Without
    oneDNN there is no other layout, and ``float32`` leaves the whole model as it is.
    """
    if arithmetic == "float32" and not torch.backends.mkldnn.is_available():
        return model
    make: Callable[[Tensor, Tensor | None], nn.Module] = {"float32": BlockedLinear, "int8": Int8Linear}[arithmetic]
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(parent, TTTMLP) and child is parent.rate:
                continue
            if type(child) is nn.Linear:
                setattr(parent, name, make(child.weight, child.bias))
            elif isinstance(child, TextHead):
                setattr(parent, name, make(child.weight, None))
            elif isinstance(child, Experts) and torch.backends.mkldnn.is_available():
                setattr(parent, name, BlockedExperts(child))
    return model
