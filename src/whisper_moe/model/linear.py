"""Linear layers arranged for inference on a CPU: the same function, laid out for the machine.

Model code keeps ``nn.Linear``; :func:`arrange` swaps the layers of a loaded model, once, from outside.

``float32``: weights re-ordered once into oneDNN's blocked layout. The stock layer re-reads a plain row-major matrix at
every call, which at the few rows of a decoding step costs two to four times as much (figures in ``docs/lab.md``).

``int8``: weights in int8 with a scale for each output, inputs in int8 with **a scale for each token**. One scale over the
whole flat tensor would let segments that share a pack change each other's answer; a scale per token cannot.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from whisper_moe.model.heads import TextHead

Arithmetic = Literal["float32", "int8"]


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
        product = torch._int_mm((flat / scale).round_().to(torch.int8), self.weight)
        return torch.addcmul(self.bias, product.float().mul_(self.scale), scale).view(*x.shape[:-1], -1)


def arrange(model: nn.Module, arithmetic: Arithmetic = "float32") -> nn.Module:
    """Swap every linear layer and the text head of ``model`` in place; for inference only, parameters are given up."""
    make: Callable[[Tensor, Tensor | None], nn.Module] = {"float32": BlockedLinear, "int8": Int8Linear}[arithmetic]
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, make(child.weight, child.bias))
            elif isinstance(child, TextHead):
                setattr(parent, name, make(child.weight, None))
    return model
