"""Parallel texts to tables: what is learned from, what is held out of each source, and the pieces that Hindi is spelled in.

    python recipes/translation/pairs.py DATA OUT

DATA holds a folder for each source, with tab-separated English and Hindi. OUT gets train.tsv, dev.tsv, a test table for each
source in test/, and pieces.txt. A pair is in one split by the sha256 of its English, and no text of a test is in what is learned
from, on either side. Both directions of a pair are two rows.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from hashlib import sha256
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

SOURCES = {
    "tatoeba": ("tatoeba-en-hi/hin.txt", 0.05),
    "tico19": ("tico19/en-hi.tsv", 0.05),
    "terms": ("tico19/terms-en-hi.tsv", 0.3),
    "mozilla": ("mozilla-www/en-hi.tsv", 0.05),
    "tldr": ("tldr/en-hi.tsv", 0.08),
    "gnome": ("gnome-docs/en-hi.tsv", 0.35),
    "django": ("django-po/en-hi.tsv", 0.2),
    "emoji": ("emoji-names/en-hi.tsv", 0.05),
    "bible": ("bible-nt/en-hi.tsv", 0.02),
}
"""File, and the share of its pairs that is held out."""
DEV, BIBLE = 0.01, 0.3
"""Shares: of what is learned from that judges the steps; of the Bible that is learned from in an epoch."""
PIECES = 3_000
HEAD = "id\tsource_text\ttext\tlanguage\ttarget_language\ttask\n"


def place(text: str) -> float:
    return int.from_bytes(sha256(text.encode()).digest()[:8]) / 2**64


def clean(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", re.sub("[\u200c\u200d]", "", text).replace("\u2019", "'")).split())


def pairs_of(data: Path) -> list[tuple[str, str, str]]:
    """Source, English and Hindi, each pair once."""
    found: dict[tuple[str, str], str] = {}
    for name, (file, _) in SOURCES.items():
        for line in (data / file).read_text("utf-8").splitlines():
            if len(cells := list(map(clean, line.split("\t")))) > 1 and all(cells[:2]):
                found.setdefault((cells[0], cells[1]), name)
    return [(name, *pair) for pair, name in found.items()]


def split(pairs: list[tuple[str, str, str]]) -> dict[str, list[tuple[str, str, str]]]:
    """``train``, ``dev``, and each source's test."""
    held = [pair for pair in pairs if place(f"mt {pair[1].lower()}") < SOURCES[pair[0]][1]]
    unseen = {pair[1].lower() for pair in held}, {pair[2] for pair in held}
    rest = [pair for pair in pairs if pair[1].lower() not in unseen[0] and pair[2] not in unseen[1]]
    dev = [pair for pair in rest if place(f"dev {pair[1].lower()}") < DEV]
    judged = {pair[1].lower() for pair in dev}
    train = [pair for pair in rest if pair[1].lower() not in judged]
    return {"train": train, "dev": dev} | {f"test/{name}": [p for p in held if p[0] == name] for name in SOURCES}


def rows_of(pairs: list[tuple[str, str, str]]) -> list[str]:
    rows: list[str] = []
    for name, en, hi in pairs:
        key = f"{name}-{sha256(f'{en}|{hi}'.encode()).hexdigest()[:12]}"
        rows += [f"{key}-hi\t{en}\t{hi}\ten\thi\ttranslate-text\n", f"{key}-en\t{hi}\t{en}\thi\ten\ttranslate-text\n"]
    return rows


def pieces_of(texts: list[str]) -> list[str]:
    """What byte-pair encoding joins of Devanagari, a space before a word being part of it."""
    runs = [run.replace(" ", "_") for text in texts for run in re.findall(r" ?[\u0900-\u0963]+|[।॥]", f" {text}")]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\n", "removed")
    letters = ["_", *map(chr, range(0x900, 0x964))]
    trainer = trainers.BpeTrainer(vocab_size=PIECES, min_frequency=3, initial_alphabet=letters, show_progress=False)
    tokenizer.train_from_iterator(runs, trainer)
    return sorted(piece.replace("_", " ") for piece in tokenizer.get_vocab() if piece != "_")


def main(data: Path, out: Path) -> None:
    (out / "test").mkdir(parents=True, exist_ok=True)
    for name, pairs in split(pairs_of(data)).items():
        kinds = {name: pairs}
        if name == "train":
            kinds = {"train": [p for p in pairs if p[0] != "bible"], "bible": [p for p in pairs if p[0] == "bible"]}
            often = [p[2] for p in pairs if p[0] != "bible" or place(p[1]) < BIBLE]
            (out / "pieces.txt").write_text("\n".join(pieces_of(often)) + "\n", "utf-8")
        for kind, own in kinds.items():
            (out / f"{kind}.tsv").write_text(HEAD + "".join(rows_of(own)), "utf-8")
            print(f"{kind}: {len(own)} pairs")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
