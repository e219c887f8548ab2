"""A loaded model prepared for inference on a CPU: the same function, laid out for the machine.

Model code keeps ``nn.Linear``; :func:`prepare_for_inference` swaps the layers of a loaded model, once, from outside.

``float32``: weights re-ordered once into oneDNN's blocked layout. The stock layer re-reads a plain row-major matrix at
every call, which at the few rows of a decoding step costs two to four times as much (figures in ``docs/lab.md``).

``int8``: :mod:`whisper_moe.model.int8`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from threading import Lock
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whisper_moe.model.delta import differing
from whisper_moe.model.int8 import FbgemmLinear, Int8Embedding, Int8Linear, Int8Rows, fbgemm_packing, suits_fbgemm
from whisper_moe.model.layers import Norm, TextHead
from whisper_moe.model.model import Decoder, WhisperMoEModel
from whisper_moe.model.moe import Experts, Int8Experts, SeparateExperts

Arithmetic = Literal["float32", "int8"]
_EMBEDDING = "decoder.token_embedding"
_ONE_AT_A_TIME = Lock()
"""The number of threads and FBGEMM's packing are the whole process's."""


class BlockedLinear(nn.Module):
    """``x W^T + b`` in float32, with W in oneDNN's own layout where there is a oneDNN."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = weight.detach(), bias.detach() if bias is not None else None
        self.blocked = torch.backends.mkldnn.is_available()
        if self.blocked:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, None)

    def forward(self, x: Tensor) -> Tensor:
        if self.blocked:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)


def prepare_for_inference(
    model: WhisperMoEModel, arithmetic: Arithmetic = "float32", quantized: Mapping[str, Int8Rows] | None = None
) -> WhisperMoEModel:
    """Swap every linear layer and the text head of ``model`` in place; for inference only, parameters are given up.

    ``quantized``: weights that are int8 already, by their parameter's name; the model's own may be on the meta device. int8
    products take them as they are, ``float32`` computes with what they stand for; an embedding among them stays int8.
    The number of threads is 1 for a moment, and a thread that first uses torch in it keeps that: load before starting threads.
    TTT's learning rates stay as they are: the inner loop computes them from their weights, in float32 at least.
    """
    known = dict(quantized or {})
    _join_new_tokens(model.decoder, known)
    if not model.config.core_alone_on_full_windows:
        for norm in [module for module in model.modules() if isinstance(module, Norm)]:
            norm.fold()
    paths = [
        path
        for path, module in model.named_modules()
        if isinstance(module, (TextHead, Experts)) or (type(module) is nn.Linear and not path.endswith(".rate"))
    ]
    with _ONE_AT_A_TIME, fbgemm_packing() if arithmetic == "int8" and suits_fbgemm() else nullcontext():
        _side_by_side(model, paths, known, arithmetic)
    if rows := known.get(f"{_EMBEDDING}.weight"):
        own = getattr(model.decoder.token_embedding, "experts", None)
        model.decoder.token_embedding = differing(Int8Embedding(rows), own)  # pyright: ignore[reportAttributeAccessIssue]
    return model


@torch.no_grad()
def _join_new_tokens(decoder: Decoder, known: dict[str, Int8Rows]) -> None:
    """One embedding, and so one head, of all tokens."""
    if decoder.new_tokens is None:
        return
    new, own, rows = decoder.new_tokens.weight, decoder.token_embedding.weight, known.get(f"{_EMBEDDING}.weight")
    if rows is not None:
        more = Int8Rows.of(new)
        rows = Int8Rows(torch.cat((rows.levels, more.levels)), torch.cat((rows.scale, more.scale)))
        known[f"{_EMBEDDING}.weight"] = rows
    else:
        decoder.token_embedding.weight = nn.Parameter(torch.cat((own, new)), requires_grad=False)
    decoder.new_tokens, decoder.head = None, TextHead(decoder.token_embedding)


def _side_by_side(
    model: WhisperMoEModel, paths: Iterable[str], known: Mapping[str, Int8Rows], arithmetic: Arithmetic
) -> None:
    """Each layer on one thread: laying out a matrix is mostly work that PyTorch does not divide among threads."""

    def swap(path: str) -> None:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, _prepared(model.get_submodule(path), path, known, arithmetic))

    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(swap, paths))
    finally:
        torch.set_num_threads(threads)


def _prepared(module: nn.Module, path: str, known: Mapping[str, Int8Rows], arithmetic: Arithmetic) -> nn.Module:
    if isinstance(module, TextHead):
        base = _linear(known.get(f"{_EMBEDDING}.weight") or module.weight.detach(), None, arithmetic)
        return differing(base, module.experts)
    if isinstance(module, nn.Linear):
        base = _linear(known.get(f"{path}.weight") or module.weight.detach(), module.bias, arithmetic)
        return differing(base, getattr(module, "experts", None))
    assert isinstance(module, Experts)
    up, down = (known.get(f"{path}.{key}") for key in ("up_weight", "down_weight"))
    if arithmetic == "int8" and not suits_fbgemm():
        up, down = up or Int8Rows.of(module.up_weight.detach()), down or Int8Rows.of(module.down_weight.detach())
        return Int8Experts(up, module.up_bias, down, module.down_bias)
    ups = up or module.up_weight.detach()
    downs = (module.down_weight.detach() if down is None else down.dequantized()).mT.contiguous()  # rows to columns
    return SeparateExperts(
        [_linear(*layer, arithmetic) for layer in zip(ups, module.up_bias, strict=True)],
        [_linear(*layer, arithmetic) for layer in zip(downs, module.down_bias, strict=True)],
    )


def _linear(weight: Tensor | Int8Rows, bias: Tensor | None, arithmetic: Arithmetic) -> nn.Module:
    if arithmetic == "int8":
        layer = FbgemmLinear if suits_fbgemm() else Int8Linear
        return layer(weight if isinstance(weight, Int8Rows) else Int8Rows.of(weight), bias)
    return BlockedLinear(weight.dequantized() if isinstance(weight, Int8Rows) else weight, bias)
