"""What published corpora come in, and the tables that they go out as: shared by the scripts of this folder."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from whisper_moe.data.corpus import CorpusConfig, Row
from whisper_moe.data.hub import load_rows, one_line, spellings_of
from whisper_moe.data.sample import DataError
from whisper_moe.weights.files import atomic_file

TOGETHER = 10_000
"""Rows of parquet that are written together."""


def files_of_split(root: Path, split: str, *suffixes: str) -> list[Path]:
    """The files below a folder (its own name counts) that belong to a split by their own name or by that of a folder."""
    forms = "|".join(re.sub("[-_]", "[-_]", name) for name in spellings_of(split))
    wanted = re.compile(rf"({forms})([-_.]?\d.*)?$", re.IGNORECASE)
    files = sorted(file for file in root.rglob("*") if file.suffix.lower() in suffixes)
    own = root.resolve().name
    return [file for file in files if any(map(wanted.match, (file.stem, own, *file.relative_to(root).parts[:-1])))]


def files_of(source: Path, split: str, *suffixes: str, undivided: bool = False) -> list[Path] | None:
    """The source where it is a file, or a folder's files of the split, of one kind; None for the Hub.

    :param undivided: take all files of a folder of which none says a split.
    """
    if source.is_file():
        if source.suffix.lower() not in suffixes:
            raise DataError(source, f"not a file of rows: one of {', '.join(suffixes)} is")
        return [source]
    if not source.is_dir():
        return None
    found = files_of_split(source, split, *suffixes)
    if undivided and not found:
        found = sorted(file for file in source.rglob("*") if file.suffix.lower() in suffixes)
    if not found:
        raise DataError(source, f"no files ({', '.join(suffixes)}) of the split {split!r}")
    return [file for file in found if file.suffix == found[0].suffix]


def stream(source: Path | str, split: str, files: list[Path] | None, revision: str | None = None) -> Any:
    """A split of the files or the Hub, of which nothing is prepared. Raises :class:`DataError`."""
    given = CorpusConfig(source=str(source), split=split, revision=revision, streaming=True)
    return load_rows(given, files)


def rows_of(dataset: Any, source: Path | str) -> Iterator[Row]:
    """One after another; what breaks on the way is a :class:`DataError`, too."""
    try:
        yield from dataset
    except Exception as error:  # the Hub, the network, parquet: each has errors of its own
        raise DataError(source, f"cannot be read: {one_line(error)}") from error


def write(file: Path, rows: Iterable[Row], columns: Sequence[str]) -> int:
    """A table, TSV or parquet by its name; what a row does not say is empty. Its older form stays until it is whole.

    Returns how many rows there are. Raises :class:`DataError` for a cell that TSV cannot hold.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    cells = ([str(row.get(name) or "") for name in columns] for row in rows)
    with atomic_file(file) as scratch:
        return (_parquet if file.suffix == ".parquet" else _tsv)(scratch, file, cells, columns)


def _tsv(scratch: Path, file: Path, rows: Iterator[list[str]], columns: Sequence[str]) -> int:
    number = 0
    with scratch.open("w", encoding="utf-8", newline="") as out:
        for number, cells in enumerate(chain([list(columns)], rows), 1):
            for name, cell in zip(columns, cells, strict=True):
                if re.search("[\t\r\n]", cell):
                    raise DataError(file, f"{cell!r} would be two cells of TSV", row=number, column=name)
            out.write("\t".join(cells) + "\n")
    return number - 1


def _parquet(scratch: Path, file: Path, rows: Iterator[list[str]], columns: Sequence[str]) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema, number = pa.schema([(name, pa.string()) for name in columns]), 0
    with pq.ParquetWriter(scratch, schema) as out:
        while part := list(islice(rows, TOGETHER)):
            out.write_table(pa.table(list(map(list, zip(*part, strict=True))), schema=schema))
            number += len(part)
    return number


def script(work: Callable[[], None]) -> int:
    """The exit status; a mistake is one line."""
    try:
        work()
    except (DataError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return 1
    return 0


def listed(words: str) -> tuple[str, ...]:
    """``hi,or`` as words."""
    return tuple(filter(None, map(str.strip, words.split(","))))
