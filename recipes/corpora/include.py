"""INCLUDE to tables: 4,292 videos of 263 words in Indian Sign Language (Sridhar et al., ACM MM 2020; Zenodo 4010759).

    python recipes/corpora/include.py VIDEOS OUT [LISTS] [--revision REVISION]

VIDEOS is the tree ``<category>/<number>. <word>/[more/]<name>.MOV``, wherever its archives were unpacked. LISTS say the splits:
a folder with those of the corpus's repository (``include_train.txt``, ``include50_val.txt`` …, a path a line), by default
VIDEOS; or the Hub's metadata (``video_path``, ``split``, ``include_50``), as a file, a folder, or ``ai4bharat/INCLUDE``.

OUT gets train.tsv, val.tsv and test.tsv, and of the 50 words of INCLUDE-50 train-50.tsv, val-50.tsv and test-50.tsv. Every video
that is listed has a row: of one that is not there, the table's reader says so.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path, PurePath, PurePosixPath

from formats import files_of, rows_of, script, stream, write

from whisper_moe.data.corpus import Row
from whisper_moe.data.sample import DataError
from whisper_moe.data.table import decoded

SPLITS = {"train": "train", "test": "test", **dict.fromkeys(("val", "valid", "validation", "dev"), "val")}
ORDER = ("train", "val", "test")
VIDEOS = frozenset(".mov .mp4 .mkv .webm .avi .m4v".split())
METADATA = (".csv", ".tsv", ".parquet")
COLUMNS = ("path", "text", "language", "target_language", "task", "domain")


def sign(path: object, place: Path | str, row: int) -> PurePosixPath:
    """A path from the tree's top: category, word and file, and nothing that leads out of it."""
    found = PurePosixPath(path.replace("\\", "/") if isinstance(path, str) else "")
    parts = found.parts
    if len(parts) < 3 or ".." in parts or parts[0] == "/" or not re.search("[a-zA-Z]", parts[1]):
        cause = f"{path!r} is not <category>/<number>. <word>/<name>.MOV"
        raise DataError(place, cause, row=row, column="video_path")
    return found


def listed(file: Path) -> list[PurePosixPath]:
    """A list's paths, each once."""
    with file.open("rb") as lines:
        paths = [sign(line.strip(), file, row) for row, line in enumerate(decoded(lines, file), 1) if line.strip()]
    return list(dict.fromkeys(paths))


def described(
    lists: Path | str, split: str, files: list[Path] | None, revision: str | None
) -> tuple[list[PurePosixPath], list[PurePosixPath]]:
    """By the metadata: a split's paths, and those of INCLUDE-50."""
    dataset, place = stream(lists, split, files, revision), files[0] if files else lists
    if "video_path" not in dataset.features:
        cause = f"the column is missing; there are {', '.join(dataset.features)}"
        raise DataError(place, cause, column="video_path")
    every, fifty = dict[PurePosixPath, None](), dict[PurePosixPath, None]()
    for number, row in enumerate(rows_of(dataset, place), 1):
        if SPLITS.get(str(row.get("split") or split).lower()) == split:
            path = sign(row["video_path"], place, number)
            every[path] = None
            if str(row.get("include_50")).strip().lower() in ("true", "1", "1.0", "yes"):
                fifty[path] = None
    return list(every), list(fifty)


def splits_of(lists: Path | str, revision: str | None = None) -> dict[str, list[PurePosixPath]]:
    """A table's name: paths of its videos. Raises :class:`DataError` where no split is said."""
    names = {f"{split}{tail}": f"include{tail[1:]}_{split}.txt" for tail in ("", "-50") for split in ORDER}
    folder, tables, cause = Path(lists), dict[str, list[PurePosixPath]](), "it says no split"
    if folder.is_dir():
        tables = {name: listed(file) for name, wanted in names.items() for file in sorted(folder.rglob(wanted))[:1]}
    for split in () if tables else ORDER:
        try:
            files = files_of(folder, split, *METADATA)
        except DataError as error:  # there may be others
            cause = error.cause
            continue
        tables[split], tables[f"{split}-50"] = described(lists, split, files, revision)
    if not any(tables.values()):
        raise DataError(lists, f"no lists such as {names['train']} with a video in them; as metadata: {cause}")
    return {name: paths for name, paths in tables.items() if paths}


def finder(root: Path) -> Callable[[PurePosixPath], Path]:
    """Finds a video by its path in the lists, else by the path's end, whatever the case, the extension and the folders above."""

    def folded(path: PurePath) -> tuple[str, ...]:
        return tuple(part.lower() for part in path.with_suffix("").parts)

    @cache
    def ends() -> dict[tuple[str, ...], Path]:
        found: dict[tuple[str, ...], Path] = {}
        for file in sorted(root.rglob("*"), reverse=True):  # of several copies, the first by name stays
            if file.suffix.lower() in VIDEOS and file.is_file():
                parts = folded(file.relative_to(root))
                found |= {parts[at:]: file for at in range(len(parts) - 2)}
        return found

    return lambda path: root / path if (root / path).is_file() else ends().get(folded(path), root / path)


def row_of(path: PurePosixPath, file: Path, out: Path) -> Row:
    category, word, *_ = path.parts
    said = " ".join(re.sub(r"^\s*\d+\s*\.?\s*", "", word).lower().split())  # some are written large
    about = {"language": "ins", "target_language": "en", "task": "sign"}
    return {"path": os.path.relpath(file, out), "text": said, "domain": category, **about}


def convert(videos: Path, out: Path, lists: Path | str | None = None, revision: str | None = None) -> None:
    """Write the tables. Raises :class:`DataError` naming file, row and column."""
    if not videos.is_dir():
        raise DataError(videos, "no such folder of videos")
    tables = splits_of(lists or videos, revision)
    videos, out = videos.resolve(), out.resolve()
    find = finder(videos)
    files = {path: find(path) for paths in tables.values() for path in paths}
    absent = {path for path, file in files.items() if not file.is_file()}
    if len(absent) == len(files):
        raise DataError(videos, f"none of the {len(files):,} videos is there, such as {next(iter(files.values()))}")
    for name, paths in tables.items():
        write(out / f"{name}.tsv", (row_of(path, files[path], out) for path in paths), COLUMNS)
        print(f"{name}: {len(paths):,} rows, {len(absent.intersection(paths)):,} of them without a video")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("videos", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("lists", nargs="?")
    parser.add_argument("--revision")
    given = parser.parse_args()
    sys.exit(script(lambda: convert(given.videos, given.out, given.lists, given.revision)))
