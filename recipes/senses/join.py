"""A model that hears, and beside it the senses of other runs: all that there was stays as it was.

    python recipes/senses/join.py MODEL OUT PART…

Each PART is a model of recipes/translation or recipes/sign, which gives its expert, its tokens and what it reads with.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from whisper_moe.config_aside import SensesConfig
from whisper_moe.weights.checkpoint import load_checkpoint, save_checkpoint
from whisper_moe.weights.parts import SENSES


def joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Experts and tokens one behind the other; of the rest each part has its own."""
    state: dict[str, Tensor] = {}
    for key in dict.fromkeys(key for part in parts for key in part):
        own = [part[key] for part in parts if key in part]
        state[key] = torch.cat(own) if key.startswith((f"{SENSES}experts.", f"{SENSES}tokens.")) else own[0]
    return state


def senses_of(given: list[SensesConfig]) -> SensesConfig:
    first = given[0]
    if len({each.rank for each in given}) > 1:
        raise ValueError("the senses' experts must be of one rank")
    return SensesConfig(
        tokens=tuple(token for each in given for token in each.tokens),
        directions=next((each.directions for each in given if each.directions), ()),
        signs=next((each.signs for each in given if each.signs), ()),
        film=next((each.film for each in given if each.film), None),
        rank=first.rank,
        experts=tuple(name for each in given for name in each.experts),
    )


def main(hears: Path, out: Path, *paths: Path) -> None:
    model, *others = (load_checkpoint(path) for path in (hears, *paths))
    given = [other.config.senses for other in others if other.config.senses is not None]
    parts = [{key: tensor for key, tensor in each.state.items() if key.startswith(SENSES)} for each in others]
    config = model.config.model_copy(update={"senses": senses_of(given)})
    state = {key: tensor for key, tensor in model.state.items() if not key.startswith(SENSES)} | joined(parts)
    save_checkpoint(out, replace(model, config=config, state=state), quantize=True)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
