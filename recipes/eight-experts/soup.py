"""The mean of several fine-tunes' weights as one model, the simplest of merges (model soups, arXiv 2203.05482)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from whisper_moe.weights.checkpoint import save_checkpoint
from whisper_moe.weights.load import config_of, load_model, resolve


def alike(experts: Mapping[str, Path], base: Path) -> dict[str, Path]:
    """Those that can be averaged: of the base's shape, so without TTT layers of their own."""
    shapes = {
        path: config_of(resolve(path)).model_copy(update={"context_margin": None}) for path in (base, *experts.values())
    }
    return {name: path for name, path in experts.items() if shapes[path] == shapes[base]}


def cook(experts: Mapping[str, Path], base: Path, folder: Path) -> None:
    """Write the mean of experts that are alike, with the base's tokens and the first one's margin."""
    first, *others = experts.values()
    config, state = (loaded := load_model(first)).config, {k: tensor.double() for k, tensor in loaded.state.items()}
    for path in others:
        for key, tensor in load_model(path).state.items():
            state[key] += tensor
    mean = {key: (tensor / len(experts)).float() for key, tensor in state.items()}
    save_checkpoint(folder, replace(load_model(base), config=config, state=mean))
