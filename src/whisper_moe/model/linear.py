"""Linear layers arranged for inference on a CPU: the same function, laid out for the machine.

Model code keeps ``nn.Linear``; :func:`arrange` swaps the layers of a loaded model, once, from outside.

``float32``: weights re-ordered once into oneDNN's blocked layout. The stock layer re-reads a plain row-major matrix at
every call, which at the few rows of a decoding step costs two to four times as much (figures in ``docs/lab.md``).

``int8``: :mod:`whisper_moe.model.int8`, and on CPUs without AVX-512 :mod:`whisper_moe.model.fbgemm`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from threading import Lock
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whisper_moe.model import fbgemm
from whisper_moe.model.adapt import AdaptedNorm
from whisper_moe.model.fbgemm import FbgemmLinear
from whisper_moe.model.heads import SplitHead, TextHead
from whisper_moe.model.int8 import Int8Embedding, Int8Experts, Int8Linear, Int8Rows
from whisper_moe.model.moe import Experts, shares
from whisper_moe.model.router import Routing
from whisper_moe.model.ttt import TTTMLP
from whisper_moe.packing import Layout

Arithmetic = Literal["float32", "int8"]
_ONE_AT_A_TIME = Lock()
"""The number of threads and FBGEMM's packing are the whole process's."""


class BlockedLinear(nn.Module):
    """``x W^T + b`` in float32, with W in oneDNN's own layout."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
        self.bias = bias.detach() if bias is not None else None

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class PlainLinear(nn.Module):
    """``x W^T + b``, where there is no oneDNN and no other layout."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias.detach() if bias is not None else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class SeparateExperts(nn.Module):
    """:class:`~whisper_moe.model.moe.Experts` with arranged layers for each expert's two matrices."""

    def __init__(self, ups: Iterable[nn.Module], downs: Iterable[nn.Module]) -> None:
        super().__init__()
        self.ups, self.downs = nn.ModuleList(ups), nn.ModuleList(downs)

    def forward(self, x_TD: Tensor, routing: Routing, layout: Layout | None = None) -> Tensor:
        """The gated sum over each token's experts, as :meth:`Experts.forward`."""
        parts = shares(routing, layout, len(x_TD))
        return torch.cat([self._mixed(x_TD[run], experts, gates_TC) for run, experts, gates_TC in parts])

    def _mixed(self, x_TD: Tensor, experts: tuple[int, ...], gates_TC: Tensor) -> Tensor:
        y_TD = torch.zeros_like(x_TD)
        for expert, gate_T in zip(experts, gates_TC.to(x_TD.dtype).unbind(1), strict=True):
            y_TD.addcmul_(self.downs[expert](F.gelu(self.ups[expert](x_TD))), gate_T[:, None])
        return y_TD


def arrange(
    model: nn.Module, arithmetic: Arithmetic = "float32", quantized: Mapping[str, Int8Rows] | None = None
) -> nn.Module:
    """Swap every linear layer and the text head of ``model`` in place; for inference only, parameters are given up.

    ``quantized``: weights that are int8 already, by their parameter's name; the model's own may be on the meta device. int8
    products take them as they are, ``float32`` computes with what they stand for; an embedding among them stays int8.
    The number of threads is 1 for a moment, and a thread that first uses torch in it keeps that: load before starting threads.
    TTT's learning rates stay as they are: the inner loop computes them from their weights, in float32 at least.
    """
    known, paths = quantized or {}, {module: path for path, module in model.named_modules()}
    jobs: list[Callable[[], None]] = []
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            rows = known.get(f"{paths[child.embedding if isinstance(child, TextHead) else child]}.weight")
            if not (isinstance(parent, TTTMLP) and child is parent.rate):
                jobs.append(partial(_swap, parent, name, child, paths[child], rows, known, arithmetic))
    with _ONE_AT_A_TIME, fbgemm.packing() if arithmetic == "int8" and fbgemm.suits_this_cpu() else nullcontext():
        _side_by_side(jobs)
    return model


def _swap(
    parent: nn.Module, name: str, child: nn.Module, path: str, rows: Int8Rows | None, known: Mapping[str, Int8Rows],
    arithmetic: Arithmetic,
) -> None:  # fmt: skip
    if type(child) is nn.Linear:
        setattr(parent, name, _linear(rows or child.weight.detach(), child.bias, arithmetic))
        child._parameters.clear()  # the lists of modules would keep them alive until the end
    elif isinstance(child, TextHead):
        setattr(parent, name, _head(child, rows or child.weight.detach(), arithmetic))
    elif isinstance(child, AdaptedNorm) and child.always:
        setattr(parent, name, child.folded())
    elif isinstance(child, nn.Embedding) and rows is not None:
        setattr(parent, name, Int8Embedding(rows))
    elif isinstance(child, Experts):
        up, down = (known.get(f"{path}.{key}") for key in ("up_weight", "down_weight"))
        setattr(parent, name, _experts(child, up, down, arithmetic))
        child._parameters.clear()


def _side_by_side(jobs: Sequence[Callable[[], None]]) -> None:
    """Each job on one thread: laying out a matrix is mostly work that PyTorch does not divide among threads."""
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for _ in pool.map(lambda job: job(), jobs):
                pass
    finally:
        torch.set_num_threads(threads)


def _linear(weight: Tensor | Int8Rows, bias: Tensor | None, arithmetic: Arithmetic) -> nn.Module:
    if arithmetic == "int8":
        layer = FbgemmLinear if fbgemm.suits_this_cpu() else Int8Linear
        return layer(weight if isinstance(weight, Int8Rows) else Int8Rows.of(weight), bias)
    weight = weight.dequantized() if isinstance(weight, Int8Rows) else weight
    return BlockedLinear(weight, bias) if torch.backends.mkldnn.is_available() else PlainLinear(weight, bias)


def _head(head: TextHead, weight: Tensor | Int8Rows, arithmetic: Arithmetic) -> nn.Module:
    """Rows of new tokens stay float32: there are few of them."""
    own = _linear(weight, None, arithmetic)
    return own if head.added is None else SplitHead(own, PlainLinear(head.added.weight.detach(), None))


def _experts(experts: Experts, up: Int8Rows | None, down: Int8Rows | None, arithmetic: Arithmetic) -> nn.Module:
    if arithmetic == "int8" and not fbgemm.suits_this_cpu():
        up, down = up or Int8Rows.of(experts.up_weight.detach()), down or Int8Rows.of(experts.down_weight.detach())
        return Int8Experts(up, experts.up_bias, down, experts.down_bias)
    ups = up or experts.up_weight.detach()
    down_weight = experts.down_weight.detach() if down is None else down.dequantized()  # its rows become columns
    return SeparateExperts(
        [_linear(*layer, arithmetic) for layer in zip(ups, experts.up_bias, strict=True)],
        [_linear(*layer, arithmetic) for layer in zip(down_weight.mT.contiguous(), experts.down_bias, strict=True)],
    )
