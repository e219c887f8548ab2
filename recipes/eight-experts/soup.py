"""The mean of several fine-tunes' weights as one model, the simplest of merges (model soups, arXiv 2203.05482)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from whisper_moe.weights.checkpoint import save_checkpoint
from whisper_moe.weights.load import config_of, load_model, resolve


def alike(experts: Mapping[str, Path], base: Path) -> dict[str, Path]:
    """Those that can be averaged: of the base's shape, but for TTT layers of their own, which are left out."""
    apart = {"context_margin": None, "ttt": None}
    shapes = {path: config_of(resolve(path)).model_copy(update=apart) for path in (base, *experts.values())}
    return {name: path for name, path in experts.items() if shapes[path] == shapes[base]}


def cook(experts: Mapping[str, Path], base: Path, folder: Path) -> None:
    """Write the mean of experts that are alike, with the base's tokens and the first one's margin."""
    loaded = load_model(base)
    total = {key: torch.zeros_like(tensor, dtype=torch.float64) for key, tensor in loaded.state.items()}
    for path in experts.values():
        state = load_model(path).state
        for key, tensor in total.items():
            tensor += state[key]
    margin = config_of(resolve(next(iter(experts.values())))).context_margin
    config = loaded.config.model_copy(update={"context_margin": margin})
    mean = {key: (tensor / len(experts)).float() for key, tensor in total.items()}
    save_checkpoint(folder, replace(loaded, config=config, state=mean))
