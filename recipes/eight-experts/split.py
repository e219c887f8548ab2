"""Which clips each expert learns from, is chosen by, and is measured on: tables for ``whisper-moe train``, from ``split.tsv``.

    python recipes/eight-experts/split.py DATA TABLES     tables of all sets, checked against split.tsv
    python recipes/eight-experts/split.py DATA            split.tsv anew, by the rules below

``split.tsv`` has set, split, sha256 and path of every clip. It is made once, before anything is trained: nothing that learns, is
adapted, distilled, probed or tuned ever reads a clip of ``test``. A test's speakers are in no other split, but for telephone and
Swahili, which have one; of Malayalam its sentences are in no other either, and clips that would mix are left out. Elsewhere a
text of the test may be heard in training: digits all, telephone 9 of 142 (``Extension.``), learners 7 of 496, Swahili 4 of 153,
spelled out 2 of 42.
"""

from __future__ import annotations

import csv
import hashlib
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

SPLIT = Path(__file__).with_name("split.tsv")
TEST, DEV = 0.25, 0.10
TEST_SENTENCES = 0.4
DIGIT_READERS = {"yweweler": "test", "theo": "dev"}
"""Of six."""


class Clip(NamedTuple):
    set: str
    split: str
    path: str
    """From the folder of all data."""
    text: str
    language: str


def place(key: str) -> float:
    """In [0, 1), by the hash."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) / 2**64


def shared_out(keys: Iterable[str]) -> dict[str, str]:
    """Key → split, in the order of their hashes, so that a split has its share of all that have a key."""
    counts, before = Counter(keys), 0
    splits: dict[str, str] = {}
    for key in sorted(counts, key=place):
        at = before / counts.total()
        splits[key] = "test" if at < TEST else "dev" if at < TEST + DEV else "train"
        before += counts[key]
    return splits


def rows(table: Path) -> Iterator[dict[str, str]]:
    with open(table, encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)


def write_table(path: Path, clips: Iterable[tuple[Path | str, str, str]]) -> None:
    """``clips``: path, text and language of each."""
    lines = ["path\ttext\tlanguage", *("\t".join(map(str, clip)) for clip in clips)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{path.stem}: {len(lines) - 1} clips")


def malayalam(data: Path) -> Iterator[Clip]:
    """By speaker and by sentence; nobody's clip that listeners voted down."""
    found = [row for row in rows(data / "malayalam-msc/transcripts.tsv") if int(row["votes"]) > 0]
    splits = shared_out(row["speaker"] for row in found)
    for row in found:
        split = splits[row["speaker"]]
        if (split == "test") == (place(row["text"]) < TEST_SENTENCES):
            yield Clip("malayalam", split, f"malayalam-msc/{row['path']}", row["text"], "ml")


def swahili(data: Path) -> Iterator[Clip]:
    """One reader; the corpus's own split, of whose training part a share is for development."""
    for row in rows(data / "swahili-news/transcripts.tsv"):
        split = "test" if row["split"] != "train" else "dev" if place(row["text"]) < 2 * DEV else "train"
        yield Clip("swahili", split, f"swahili-news/{row['path']}", row["text"], "sw")


def spelled(data: Path) -> Iterator[Clip]:
    """By speaker."""
    splits = shared_out(row["speaker"] for row in rows(data / "english-alphanumeric/transcripts.tsv"))
    for row in rows(data / "english-alphanumeric/transcripts.tsv"):
        yield Clip("spelled", splits[row["speaker"]], f"english-alphanumeric/{row['path']}", row["text"], "en")


def learners(data: Path) -> Iterator[Clip]:
    """The corpus's own split by speaker, of whose training part a share is for development."""
    for row in rows(data / "english-learners/transcripts.tsv"):
        split = "test" if row["split"] != "train" else "dev" if place(row["speaker"]) < DEV else "train"
        yield Clip("learners", split, f"english-learners/{row['path']}", row["text"], "en")


def telephone(data: Path) -> Iterator[Clip]:
    """One speaker; by text."""
    splits = shared_out(row["text"].lower() for row in rows(data / "english-prompts/transcripts.tsv"))
    for row in rows(data / "english-prompts/transcripts.tsv"):
        yield Clip("telephone", splits[row["text"].lower()], f"english-prompts/{row['path']}", row["text"], "en")


def digits(data: Path) -> Iterator[Clip]:
    """By speaker."""
    for row in rows(data / "english-digits/transcripts.tsv"):
        split = DIGIT_READERS.get(row["speaker"], "train")
        yield Clip("digits", split, f"english-digits/{row['path']}", row["text"], "en")


SETS = (malayalam, swahili, spelled, learners, telephone, digits)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_split(data: Path) -> None:
    clips = sorted(clip for each in SETS for clip in each(data))
    lines = ["set\tsplit\tsha256\tpath", *(f"{c.set}\t{c.split}\t{digest(data / c.path)}\t{c.path}" for c in clips)]
    SPLIT.write_text("\n".join(lines) + "\n")


def checked(data: Path, clips: Iterable[Clip]) -> Iterator[Clip]:
    """Those of ``split.tsv``. Raises ``ValueError`` for a recording that is another than it says, or is not there."""
    with open(SPLIT, newline="") as file:
        listed = {row["path"]: row for row in csv.DictReader(file, delimiter="\t")}
    for clip in clips:
        if (row := listed.pop(clip.path, None)) is None:
            continue
        if row["split"] != clip.split or row["sha256"] != digest(data / clip.path):
            raise ValueError(f"{data / clip.path}: not what {SPLIT.name} was made of")
        yield clip
    if listed:
        raise ValueError(f"{data}: lacks {len(listed)} clips of {SPLIT.name}, such as {next(iter(listed))}")


def write_tables(data: Path, tables: Path) -> None:
    tables.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[tuple[Path, str, str]]] = {}
    for clip in checked(data, (clip for each in SETS for clip in each(data))):
        found.setdefault(f"{clip.set}-{clip.split}", []).append((data.resolve() / clip.path, clip.text, clip.language))
    for name, clips in found.items():
        write_table(tables / f"{name}.tsv", clips)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        write_split(Path(sys.argv[1]))
    else:
        write_tables(Path(sys.argv[1]), Path(sys.argv[2]))
