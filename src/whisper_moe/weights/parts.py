"""Which tensors a configuration has, which file of a checkpoint each of them belongs to, and which may be int8 there.

A tensor of an expert is spelled in three ways: the model stacks experts, ``….experts.up_weight`` [E, F, D]; alone it
carries its expert's number, ``….experts.3.up_weight`` [F, D]; in the expert's own file the number is left out, so that
the file can take another place or move to another model. The same holds for ``….ttt.3.w1`` of TTT per expert.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from whisper_moe.config import ModelConfig
from whisper_moe.model.int8 import Int8Rows
from whisper_moe.model.model import WhisperMoEModel
from whisper_moe.weights.files import CheckpointError, listed

Weight = TypeVar("Weight", Tensor, Int8Rows)
Module = TypeVar("Module", bound=nn.Module)
CORE, ADAPT = "core", "adapt"
EMBEDDING, NEW_TOKENS = "decoder.token_embedding.weight", "decoder.new_tokens.weight"
"""[V, D] of the source's own tokens, and [N, D] of those that it lacks."""
SPEECH, SPEECH_PARTS = "speech.", ("vocoder", "reader", "speech")
"""How tensors begin that only speaking needs, and the files that they are in."""
SENSES, FILM, TOKENS = "senses.", "senses.film.", "tokens"
"""How tensors begin that only other senses than hearing need, and of them what only films need, in the file ``video``; the file
of what is no expert's otherwise, and of new tokens."""
SCALE = ".scale"
"""Suffix of the tensor that holds an int8 tensor's scales, [rows, 1]."""
_INT8 = re.compile(
    r"decoder\.token_embedding\.weight"
    r"|(encoder|decoder)\.blocks\.\d+\.((cross_)?attn\.(qkv|q|kv|out)|ffn\.(up|down))\.weight"
    r"|(encoder|decoder)\.blocks\.\d+\.experts\.(\d+\.)?(up|down)_weight"
    r"|speech\..+\.(qkv|q|kv|out|up|down|expand|head)\.weight"
    r"|senses\.((tokens|film\.(patches|read|whole))\.weight|experts\.(\d+\.)?[\w-]+\.(up|down))"
)
_ADAPTING = (".ttt.", ".ttt_norm.", ".adapter.", "norm.delta_", ".conv.", ".conv_norm.")
_OF_EXPERT = re.compile(r"(?P<head>.+\.(?:experts|ttt))\.(?P<expert>\d+)\.(?P<tail>.+)")
_INITIALISERS = (Tensor.normal_, nn.init.normal_)


class _NoInitialisation(TorchFunctionMode):
    """Leaves out what the meta device would do by importing seconds' worth of sympy: random numbers, and arithmetic."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _INITIALISERS:
            return args[0] if args else kwargs["tensor"]
        if func in (torch.arange, torch.randn):  # what positions are computed from
            return (torch.zeros if func is torch.randn else func)(*args, **kwargs, device="cpu")
        return func(*args, **kwargs)


@contextmanager
def without_memory() -> Iterator[None]:
    """Modules that are made in here are on the meta device: ``load_state_dict(state, assign=True)`` gives them memory."""
    with torch.device("meta"), _NoInitialisation():
        yield


def empty_model(config: ModelConfig) -> WhisperMoEModel:
    """The model on the meta device."""
    with without_memory():
        return WhisperMoEModel(config)


def frozen(module: Module, state: Mapping[str, Tensor]) -> Module:
    """A module that learns nothing, of these very tensors."""
    module.load_state_dict(state, assign=True)
    return module.eval().requires_grad_(False)


def frozen_model(config: ModelConfig, state: Mapping[str, Tensor]) -> WhisperMoEModel:
    """A model that learns nothing, of these very tensors."""
    return frozen(empty_model(config), state)


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model, in its order: the model itself is asked."""
    return {key: tuple(tensor.shape) for key, tensor in empty_model(config).state_dict().items()}


def spelled_alone(key: str, shape: Sequence[int]) -> list[str]:
    """The names of a tensor of the model in files: one for each expert of a stack, or its own."""
    head, stacked, tail = key.partition(".experts.")
    return [f"{head}{stacked}{expert}.{tail}" for expert in range(shape[0])] if stacked else [key]


def unstack(state: Mapping[str, Weight]) -> Iterator[tuple[str, Weight]]:
    """The tensors one by one, those of stacked experts as one view for each expert."""
    for key, tensor in state.items():
        names = spelled_alone(key, tensor.shape)
        if names == [key]:
            yield key, tensor
            continue
        views: Iterable[Weight] = tensor  # pyright: ignore[reportAssignmentType] (iterating gives the same type)
        yield from zip(names, views, strict=True)


def file_key(key: str) -> str:
    """The name of a tensor inside its file."""
    return _OF_EXPERT.sub(r"\g<head>.\g<tail>", key)


def part_of(key: str, config: ModelConfig) -> str:
    """``core``, ``router``, ``adapt``, ``tokens`` or ``experts/03-hindi``: the part that a tensor (spelled alone) belongs to.

    ``adapt`` is what is always on beside the core: TTT layers that all experts share, every TTT layer's norm, adapters, the
    differences of norms, and convolution modules. ``tokens``: the rows of new tokens. The senses' experts have no number.
    """
    if match := _OF_EXPERT.fullmatch(key):
        number, senses = int(match["expert"]), config.senses
        if key.startswith(SENSES) and senses:
            return f"experts/{senses.experts[number]}"
        return expert_part(number, config)
    if key.startswith(SPEECH):
        return next((part for part in SPEECH_PARTS if key.startswith(f"{SPEECH}{part}.")), "speech")
    if key.startswith(FILM):
        return "video"
    if key == NEW_TOKENS or key.startswith(SENSES):
        return TOKENS
    if ".router." in key:
        return "router"
    return ADAPT if any(mark in key for mark in _ADAPTING) else CORE


def expert_part(expert: int, config: ModelConfig) -> str:
    """``experts/03-hindi``, the name as every file system can spell it. Raises ``ValueError`` for an expert that there is not."""
    names = config.moe.names if config.moe else ()
    if expert >= len(names):
        raise ValueError(f"there is no expert {expert}; the configuration has {len(names)}")
    slug = re.sub(r"[^a-z0-9]+", "-", names[expert].lower()).strip("-")[:40]
    return f"experts/{expert:02d}-{slug or 'expert'}"


def quantizable(key: str) -> bool:
    """Whether a tensor may be stored as int8: the matrices of linear layers and experts, and the token embedding.

    Norms, biases, positions, convolutions, routers and fast weights stay as they are: they are small, and sensitive.
    """
    return _INT8.fullmatch(key) is not None


def check_names(found: Set[str], needed: Set[str], origin: str | Path) -> None:
    """Raises ``CheckpointError`` for tensors that are missing, and for others than the architecture has."""
    if missing := sorted(needed - found):
        raise CheckpointError(f"{origin}: lacks {listed(missing)}")
    if extra := sorted(found - needed):
        raise CheckpointError(f"{origin}: holds what this architecture does not have: {listed(extra)}")


def check_shape(tensor: Tensor, shape: Sequence[int], kinds: Sequence[torch.dtype], origin: str) -> None:
    """``origin``: file and name of the tensor."""
    if tensor.shape != tuple(shape) or tensor.dtype not in kinds:
        needed = f"{list(shape)} {' or '.join(map(str, kinds))}"
        raise CheckpointError(f"{origin} is {list(tensor.shape)} {tensor.dtype}, must be {needed}")


def check_finite(tensor: Tensor, origin: str) -> None:
    """One pass, no copy."""
    if tensor.numel() and not all(math.isfinite(end.item()) for end in torch.aminmax(tensor)):
        raise CheckpointError(f"{origin} is not finite (NaN or infinity)")


def check_state(config: ModelConfig, state: Mapping[str, Tensor], origin: str = "the model's state") -> None:
    """Raises ``CheckpointError`` for what is not a float32 state of this configuration."""
    shapes = expected_shapes(config)
    check_names(state.keys(), shapes.keys(), origin)
    for key, shape in shapes.items():
        check_shape(state[key], shape, (torch.float32,), f"{origin}: {key}")
        check_finite(state[key], f"{origin}: {key}")
