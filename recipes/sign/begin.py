"""A model that hears gets an expert of films of signing, which has learned nothing yet.

    python recipes/sign/begin.py MODEL OUT [LANGUAGE] [RANK]

LANGUAGE: of the signs that are to be learned: ins (INCLUDE), ase, or sgn (the default) where the data does not say which.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

from whisper_moe.config_aside import SIGNS, FilmConfig, SensesConfig
from whisper_moe.weights.checkpoint import save_checkpoint
from whisper_moe.weights.load import load_model
from whisper_moe.weights.parts import EMBEDDING
from whisper_moe.weights.upcycle import add_parts


def main(source: str, out: Path, language: str = "sgn", rank: int = 48) -> None:
    model, tokens = load_model(source), tuple(SIGNS.values())
    senses = SensesConfig(tokens=tokens, signs=(language,), film=FilmConfig(), experts=("sign",), rank=rank)
    config, state = add_parts(model.config, model.state, senses=senses)
    state["senses.tokens.weight"] = torch.stack([state[EMBEDDING][model.tokenizer.transcribe]] * len(tokens))
    save_checkpoint(out, replace(model, config=config, state=state))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:4], *map(int, sys.argv[4:]))
