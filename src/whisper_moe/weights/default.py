"""What a name stands for: a checkpoint of ours, any Whisper, or the default that comes with a checkout."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from whisper_moe.config import EMBEDDED, ModelConfig, MoEConfig, TTTConfig
from whisper_moe.media.tokenizer import Tokenizer, read_backend
from whisper_moe.model.int8 import Int8Rows
from whisper_moe.weights.checkpoint import load_checkpoint
from whisper_moe.weights.files import CheckpointError
from whisper_moe.weights.generation import checked, speaking
from whisper_moe.weights.sources import load_whisper, resolve, to_stderr
from whisper_moe.weights.upcycle import upcycle

DEFAULT_SOURCE = "openai/whisper-base"
"""What the default is made from; an installation without a checkout makes it from there."""
DEFAULT_MOE = MoEConfig()
DEFAULT_TTT = TTTConfig(encoder_layers=(3,))


@dataclass(frozen=True)
class Loaded:
    """A model in memory, whatever it was read from."""

    name: str
    config: ModelConfig
    state: dict[str, Tensor]
    generation: dict[str, Any]
    tokenizer: Tokenizer
    tokenizer_files: dict[str, Path | bytes]
    quantized: dict[str, Int8Rows] = field(default_factory=dict)
    """Empty unless asked for: matrices that are still int8; ``state`` lacks them."""


def default() -> str:
    """The path or Hub id of the default model."""
    return str(EMBEDDED) if EMBEDDED.is_dir() else DEFAULT_SOURCE


def load_model(
    model: str | os.PathLike[str] | None, *, keep_int8: bool = False, base: str | None = None,
    model_dir: str | os.PathLike[str] | None = None,
    announce: Callable[[str], None] = to_stderr,
) -> Loaded:  # fmt: skip
    """Read a whisper-moe directory, any Whisper (:func:`~whisper_moe.weights.sources.load_whisper`), or the default (None).

    A Whisper stays the dense model that it is; only where the default has to be made from one is it upcycled. ``model_dir``:
    see :func:`~whisper_moe.weights.sources.resolve`. ``keep_int8``: see :func:`~whisper_moe.weights.checkpoint.load_checkpoint`.
    ``base``: see :func:`~whisper_moe.weights.sources.load_whisper`.
    """
    located = resolve(os.fspath(model) if model is not None else default(), model_dir=model_dir, announce=announce)
    if located.kind == "checkpoint":
        checkpoint = load_checkpoint(located.path, keep_int8=keep_int8)
        generation, tokenizer = checked(
            checkpoint.backend, checkpoint.generation, checkpoint.config, directory=located.path, announce=announce
        )
        files: dict[str, Path | bytes] = {checkpoint.tokenizer.name: checkpoint.tokenizer}
        return Loaded(
            located.name, checkpoint.config, checkpoint.state, generation, tokenizer, files, checkpoint.quantized
        )  # fmt: skip
    source = load_whisper(str(located.path), base=base, announce=announce)
    config, state = source.config, dict(source.state)
    if model is None:
        announce(f"no default model beside this installation: made from {located.name}, its experts not trained")
        config, state = upcycle(config, state, moe=DEFAULT_MOE, ttt=DEFAULT_TTT)
    tokenizer = _tokenizer(source.tokenizer_files["tokenizer.json"], source.generation, located.path)
    return Loaded(located.name, config, state, source.generation, tokenizer, dict(source.tokenizer_files))


def _tokenizer(file: Path | bytes, generation: dict[str, Any], origin: Path) -> Tokenizer:
    if isinstance(file, Path):
        return speaking(read_backend(file), generation, origin)
    import tokenizers

    try:
        backend = tokenizers.Tokenizer.from_buffer(file)
    except Exception as error:  # the Rust side raises bare Exceptions
        raise CheckpointError(f"{origin}: tokenizer.json is not a tokenizer ({error})") from error
    return speaking(backend, generation, origin)
