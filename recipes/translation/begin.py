"""A model that hears gets an expert of texts, which has learned nothing yet.

    python recipes/translation/begin.py MODEL PIECES.txt OUT [RANK]

A piece begins as the mean of the tokens that spell it.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

from whisper_moe.config_aside import TEXT, SensesConfig
from whisper_moe.weights.checkpoint import save_checkpoint
from whisper_moe.weights.load import load_model
from whisper_moe.weights.parts import EMBEDDING
from whisper_moe.weights.upcycle import add_parts


def main(source: str, pieces: Path, out: Path, rank: int = 48) -> None:
    model = load_model(source, aside=True)
    tokens = (TEXT, *pieces.read_text("utf-8").strip("\n").split("\n"))
    senses = SensesConfig(tokens=tokens, directions=(("en", "hi"), ("hi", "en")), rank=rank)
    config, state = add_parts(model.config, model.state, senses=senses)
    spelled = [model.tokenizer.encode(token) for token in tokens[1:]]
    rows = [state[EMBEDDING][torch.tensor(ids)].mean(0) for ids in spelled]
    state["senses.tokens.weight"] = torch.stack([state[EMBEDDING][model.tokenizer.transcribe], *rows])
    save_checkpoint(out, replace(model, config=config, state=state))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), *map(int, sys.argv[4:]))
