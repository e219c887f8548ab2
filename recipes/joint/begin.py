"""A small model that has learned nothing: eight experts, and a router that chooses for sound, texts and films alike.

    python recipes/joint/begin.py MODEL SOUNDS PAIRS FILMS OUT

MODEL gives the tokenizer. SOUNDS is a folder of spoken digits with transcripts.tsv (path, text); PAIRS and FILMS are the
tables of recipes/translation and recipes/sign. OUT gets the model, and tables of sound, text and film to learn from (train-…)
and held out (test-…).
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import torch

from whisper_moe.config import ModelConfig, MoEConfig
from whisper_moe.config_aside import SIGNS, TEXT, FilmConfig, SensesConfig
from whisper_moe.model.model import WhisperMoEModel
from whisper_moe.weights.checkpoint import load_checkpoint, save_checkpoint

HEAD = "id\tpath\tsource_text\ttext\tlanguage\ttarget_language\ttask\n"
HELD = "george", "jackson"
"""Speakers that are not learned from."""


def rows_of(path: Path) -> Iterable[dict[str, str]]:
    return csv.DictReader(path.open(encoding="utf-8"), delimiter="\t", quoting=csv.QUOTE_NONE)


def line(**cells: str) -> str:
    return "\t".join(cells.get(name, "") for name in HEAD.strip().split("\t")) + "\n"


def tables(sounds: Path, pairs: Path, films: Path, out: Path) -> None:
    made: dict[str, list[str]] = {}
    for row in rows_of(sounds / "transcripts.tsv"):
        held = any(name in row["path"] for name in HELD)
        given = {"path": str((sounds / row["path"]).resolve()), "text": row["text"], "task": "transcribe"}
        cells = {"id": row["path"], "language": "en", "target_language": "en", **given}
        made.setdefault("test-sound" if held else "train-sound", []).append(line(**cells))
    for name in ("train", "test/emoji"):
        for row in rows_of(pairs / f"{name}.tsv"):
            if row["id"].startswith("emoji-"):
                made.setdefault("test-text" if "/" in name else "train-text", []).append(line(**row))
    for name, kind in (("digits", "train-film"), ("test-digits", "test-film")):
        made[kind] = [line(**row, path=row["video"]) for row in rows_of(films / f"{name}.tsv")]
    for name, own in made.items():
        own = sorted(own, key=lambda each: sha256(each.encode()).digest())
        (out / f"{name}.tsv").write_text(HEAD + "".join(own), "utf-8")
        print(f"{name}: {len(own)}")


def main(source: Path, sounds: Path, pairs: Path, films: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    tables(sounds, pairs, films, out)
    given, pieces = (
        load_checkpoint(source, aside=False),
        (pairs / "pieces.txt").read_text("utf-8").strip("\n").split("\n"),
    )
    senses = SensesConfig(
        tokens=(TEXT, *SIGNS.values(), *pieces),
        directions=(("en", "hi"), ("hi", "en")),
        signs=("sgn",),
        film=FilmConfig(),
        experts=("translate", "sign"),
        rank=1,
        routed=True,
    )
    shape = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in SHAPE.items()}
    moe = MoEConfig(n_experts=8, expert_dim=192, router_layer=1, none_choice=False)
    config = ModelConfig(vocab_size=given.config.vocab_size, d_model=192, moe=moe, senses=senses, **shape)
    torch.manual_seed(0)
    model = WhisperMoEModel(config)
    torch.nn.init.normal_(
        model.decoder.token_embedding.weight, std=0.02
    )  # it is the head, too; rows of 1 begin far off
    generation = {key: value for key, value in given.generation.items() if key != "alignment_heads"}
    made = replace(given, config=config, state=model.state_dict(), generation=generation)
    save_checkpoint(out / "model", made)


SHAPE = {"layers": 3, "heads": 4, "ffn_dim": 384}

if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
