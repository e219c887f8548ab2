"""A model that hears gets an expert of texts, which has learned nothing yet.

    python recipes/translation/begin.py MODEL TABLES OUT [RANK]

TABLES are pairs.py's. A piece begins as the mean of the tokens of the other language that stand where it stands, by a first look
at the pairs, and, a third of it, of those that spell it; as long as tokens are. So words that translate each other begin near
each other.
"""

from __future__ import annotations

import csv
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from whisper_moe.config_aside import TEXT, SensesConfig
from whisper_moe.media.tokenizer import Pieces
from whisper_moe.weights.checkpoint import save_checkpoint
from whisper_moe.weights.load import load_model
from whisper_moe.weights.parts import EMBEDDING, NEW_TOKENS
from whisper_moe.weights.upcycle import add_parts

ROUNDS, LONGEST = 8, 60
"""Of expectation and maximization; and tokens of a sentence that is looked at."""
SPELLED = 0.3
"""Weight of the tokens that spell a piece, beside those that it stands for."""


def likely(pairs: list[tuple[list[int], list[int]]], first: int, size: int) -> Tensor:
    """How likely the tokens below ``first`` are where each of the others stands, sparse [tokens above, ``first``].

    IBM's first model (Brown et al. 1993, section 4) in both directions; the product is what both agree on.
    """
    theirs = np.concatenate([np.repeat(a, len(b)) for a, b in pairs])
    ours = np.concatenate([np.tile(b, len(a)) for a, b in pairs])
    cells, where = np.unique(theirs.astype(np.int64) * size + ours - first, return_inverse=True)
    column, row = cells // size, cells % size
    places = (
        [np.repeat(np.arange(len(a)), len(b)) for a, b in pairs],
        [np.tile(np.arange(len(b)), len(a)) for a, b in pairs],
    )
    lengths = [len(a) for a, _ in pairs], [len(b) for _, b in pairs]
    found = np.ones(len(cells))
    for own, given, count in zip(places, (row, column), lengths, strict=True):
        starts = np.cumsum([0, *count[:-1]])
        word = np.concatenate([place + start for place, start in zip(own, starts, strict=True)])
        chance = np.full(len(cells), 1.0)
        for _ in range(ROUNDS):
            share = chance[where]
            share /= np.bincount(word, share)[word]
            chance = np.bincount(where, share)
            chance /= np.bincount(given, chance)[given]
        found *= chance
    index = torch.from_numpy(np.stack([row, column]))
    values = torch.from_numpy(found).float()
    return torch.sparse_coo_tensor(index, values, (size, first), check_invariants=True).coalesce()


def pairs_of(tables: Path, pieces: Pieces) -> list[tuple[list[int], list[int]]]:
    """Tokens of the English and of the Hindi of what is learned from, each of its own script."""
    pairs: list[tuple[list[int], list[int]]] = []
    for name in ("train", "bible"):
        rows = csv.DictReader((tables / f"{name}.tsv").open(encoding="utf-8"), delimiter="\t", quoting=csv.QUOTE_NONE)
        for row in rows:
            if row["language"] == "en":
                en, hi = (pieces.encode(f" {row[column]}") for column in ("source_text", "text"))
                en, hi = [id for id in en if id < pieces.first], [id for id in hi if id >= pieces.first]
                if 0 < len(en) <= LONGEST and 0 < len(hi) <= LONGEST:
                    pairs.append((en, hi))
    return pairs


def main(source: str, tables: Path, out: Path, rank: int = 48) -> None:
    model = load_model(source)
    tokens = (TEXT, *(tables / "pieces.txt").read_text("utf-8").strip("\n").split("\n"))
    senses = SensesConfig(tokens=tokens, directions=(("en", "hi"), ("hi", "en")), rank=rank)
    config, state = add_parts(model.config, model.state, senses=senses)
    core, first = torch.cat([state[key] for key in (EMBEDDING, NEW_TOKENS) if key in state]), model.config.vocab_size
    pieces = Pieces(model.tokenizer, tokens, first)
    stands = likely(pairs_of(tables, pieces), first, len(tokens))
    spelled = [[model.tokenizer.transcribe], *(model.tokenizer.encode(token) for token in tokens[1:])]
    rows = torch.stack([core[torch.tensor(ids)].mean(0) for ids in spelled])
    weight = torch.sparse.sum(stands, 1).to_dense()[:, None]
    known = weight[:, 0] > 0
    near = (torch.sparse.mm(stands, core.float()) / weight.clamp_min(1e-30))[known]
    rows[known] = (1 - SPELLED) * near + SPELLED * rows[known]
    usual = core.float().norm(dim=1).median()
    state["senses.tokens.weight"] = rows * (usual / rows.norm(dim=1, keepdim=True))
    state["senses.tokens.weight"][0] = core[model.tokenizer.transcribe]
    save_checkpoint(out, replace(model, config=config, state=state))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), *map(int, sys.argv[4:]))
