"""Everybody's own data: a TSV, CSV, JSONL or parquet file with a row for each sample, or a folder of recordings.

Columns, of which only the text and where it is said are needed:

==================  ==================================================================================================
``path``            a sound (or, for the task ``sign``, a film); relative paths start at the table's folder
``text``            what the model is to say
``start``, ``end``  seconds, where the sample is a piece of the file; ``duration`` spares a look into its header
``language``        code or name; default: the corpus's ``languages``
``task``            ``transcribe`` (default), ``translate``, ``translate-text`` or ``sign``
``source_text``     instead of ``path``, for ``translate-text``
``target_language`` of the text, where it is another one; ``en`` for ``translate`` and ``sign``
``speaker, domain`` free words
``split``           only rows with the corpus's split are read
==================  ==================================================================================================

The names that ``datasets``' audiofolder and NeMo's manifests use are understood (:data:`ALIASES`); other columns are
left alone. A folder is read by its ``metadata.jsonl`` (csv, tsv, parquet), in the folder of the split if there is one;
with ``text: file-name``, by the names of the recordings in it; with ``text: none``, their text is unknown and empty.
A row that is no sample (no text, an unknown language, a time that is none) costs itself, and is named.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeAlias

from whisper_moe.data.corpora import FILE, Corpus, CorpusConfig, Row, as_dataset
from whisper_moe.data.sample import TASKS, AudioRef, DataError, Sample, Skipped
from whisper_moe.media.languages import language_code
from whisper_moe.media.text import split_timestamps

COLUMNS = (
    *("path", "text", "start", "end", "duration", "language", "task", "source_text", "target_language"),
    *("speaker", "domain", "split"),
)
ALIASES = {
    "file_name": "path",
    "audio": "path",
    "audio_path": "path",
    "audio_filepath": "path",
    "video": "path",
    "video_path": "path",
    "transcription": "text",
    "transcript": "text",
    "sentence": "text",
    "offset": "start",
    "lang": "language",
    "speaker_id": "speaker",
}
"""Names of others, each with ours; ours wins where a file has both."""
SUFFIXES = (".tsv", ".csv", ".jsonl", ".ndjson", ".parquet")
TABLES = ("metadata", "transcripts", "manifest")
"""What a folder's table may be called."""
RECORDINGS = frozenset(
    ".aac .aif .aiff .amr .avi .caf .flac .m4a .m4v .mka .mkv .mov .mp2 .mp3 .mp4 .mpg .oga .ogg .opus .ts .wav .webm .wma "
    ".wv".split()
)
"""Extensions of sound and film, where a folder has to be searched for them."""


class _RowError(DataError):
    """It costs its row; every other error is of the whole table."""


Cells: TypeAlias = Mapping[str, Any]
Rows: TypeAlias = Iterator[tuple[int, Cells | _RowError]]
"""Line (or row) in the file, from 1, and what stands in it by column, or what is wrong with it."""


def open_table(config: CorpusConfig) -> Corpus:
    """Read the table and check every row. Raises :class:`DataError` naming file, row and column, for what is no table.

    Rows that are no samples and files that are not there are in ``Corpus.left_out``, unless all are: that is a mistake in
    columns, settings or paths.
    """
    source = Path(config.source)
    if not source.exists():
        raise DataError(source, "no such file or folder")
    bare = config.text == "file-name" or (config.text == "none" and source.is_dir())
    file = source if bare or source.is_file() else _table_of(source, config.split)
    folder = file if file.is_dir() else file.parent
    reader = _Reader(file, folder, config)
    rows = list(reader.rows(_recordings(file) if bare else _read(file, config.columns)))
    if not rows:
        raise reader.nothing()
    there = [row for row in rows if not row[FILE] or os.path.isfile(row[FILE])]
    if not there:
        raise DataError(file, f"none of its {len(rows):,} files is there, such as {rows[0][FILE]}", column="path")
    missing = (
        Skipped(id=row["id"], place=row["row"], kind="missing", cause="no such file")
        for row in rows
        if row[FILE] and not os.path.isfile(row[FILE])
    )
    dataset = as_dataset(there, _FEATURES, config)
    return Corpus(reader.name, dataset, table_sample, "seconds", (*reader.left_out(), *missing))


_FEATURES = {
    **dict.fromkeys(("id", FILE, "text", "source_text", "language", "target_language", "task"), "string"),
    **dict.fromkeys(("start", "end", "seconds"), "float64"),
    **dict.fromkeys(("speaker", "domain", "row"), "string"),
}


def table_sample(row: Row) -> Sample:
    """The sample of a checked row."""
    sign = row["task"] == "sign"
    audio = None
    if row[FILE] is not None and not sign:
        audio = AudioRef(path=row[FILE], start=row["start"] or 0.0, end=row["end"])
    return Sample(
        id=row["id"],
        task=row["task"],
        text=row["text"],
        language=row["language"],
        target_language=row["target_language"],
        audio=audio,
        video=row[FILE] if sign else None,
        source_text=row["source_text"],
        duration=row["seconds"],
        speaker=row["speaker"],
        domain=row["domain"],
        row=row["row"],
    )


# Files.


def _table_of(folder: Path, split: str) -> Path:
    """The one table of a folder, or of the folder of the split in it."""
    for place in (folder / split, folder):
        names = [place / f"{stem}{suffix}" for stem in TABLES for suffix in SUFFIXES]
        if found := [name for name in names if name.is_file()]:
            if len(found) > 1:
                raise DataError(place, f"several tables: {', '.join(file.name for file in found)}; name one of them")
            return found[0]
    raise DataError(
        folder,
        f"no table in it: {' or '.join(TABLES)} with {', '.join(SUFFIXES)}; "
        "if its files are named after what is said, say text: file-name",
    )


def _read(file: Path, columns: tuple[str, ...]) -> Rows:
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        return _parquet(file)
    if suffix not in SUFFIXES:
        raise DataError(file, f"not a table: one of {', '.join(SUFFIXES)} is")
    return _json_lines(file) if suffix in (".jsonl", ".ndjson") else _separated(file, columns)


def _lines(file: Path) -> Iterator[str]:
    """Its lines; one that is no UTF-8 is named."""
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(file, f"not UTF-8 text: {error.reason}", row=number) from None


def _separated(file: Path, columns: tuple[str, ...]) -> Rows:
    """TSV, in which a quotation mark is a character, or CSV, in which it quotes."""
    tabs = file.suffix.lower() == ".tsv"
    options: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {}
    reader = csv.reader(_lines(file), strict=True, **options)
    try:
        names = list(columns) or next(reader, [])
        if doubled := [name for name, times in Counter(names).items() if times > 1]:
            raise DataError(file, "the column stands there twice", row=1, column=doubled[0])
        for cells in reader:
            if len(cells) > len(names):
                cause = f"{len(cells)} cells, for {len(names)} columns"
                yield reader.line_num, _RowError(file, cause, row=reader.line_num)
            elif cells:
                yield reader.line_num, dict(zip(names, cells, strict=False))
    except csv.Error as error:
        raise DataError(file, f"not a table: {error}", row=reader.line_num) from None


def _json_lines(file: Path) -> Rows:
    for number, line in enumerate(_lines(file), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(file, f"not JSON: {error}", row=number) from None
        if not isinstance(row, dict):
            raise DataError(file, f"a {type(row).__name__} where an object with columns is expected", row=number)
        yield number, row


def _parquet(file: Path) -> Rows:
    import pyarrow.parquet as parquet
    from pyarrow import ArrowException

    number = 0
    try:
        for batch in parquet.ParquetFile(file).iter_batches():
            for row in batch.to_pylist():
                yield (number := number + 1), row
    except (ArrowException, OSError) as error:
        raise DataError(file, f"not a parquet file that can be read: {error}") from None


def _recordings(folder: Path) -> Rows:
    """Every recording below the folder, named after what is said in it."""
    if not folder.is_dir():
        raise DataError(folder, "text: file-name reads a folder of recordings, and this is a file")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in RECORDINGS)
    for number, file in enumerate(files, 1):
        inside = file.relative_to(folder)
        said = " ".join(file.stem.replace("_", " ").replace("-", " ").split())
        yield number, {"path": inside.as_posix(), "text": said, "domain": inside.parent.as_posix().removeprefix(".")}


# Rows.


class _Reader:
    """Checks cells and gives rows their final form."""

    def __init__(self, file: Path, folder: Path, config: CorpusConfig) -> None:
        self.file, self.folder, self.config = file, folder, config
        plain = file.stem if file.is_file() and file.stem not in TABLES else folder.resolve().name
        self.name = config.name or plain
        self.seen: Counter[str] = Counter()
        self.has_splits = False
        self.faults: list[_RowError] = []

    def rows(self, cells: Rows) -> Iterator[Row]:
        columns: set[str] | None = None
        for number, raw in cells:
            if isinstance(raw, _RowError):
                self.faults.append(raw)
                continue
            if columns is None or not columns.issuperset(raw):
                columns = {*(columns or ()), *raw}
                self._check_columns(columns, number)
            row = {ALIASES[name]: value for name, value in raw.items() if name in ALIASES} | dict(raw)
            self.has_splits |= "split" in row
            if row.get("split") in (None, "", self.config.split):
                try:
                    yield self._row(number, row)
                except _RowError as error:
                    self.faults.append(error)

    def left_out(self) -> Iterator[Skipped]:
        """The rows that are no samples."""
        for fault in self.faults:
            yield Skipped(id=f"{self.name}, row {fault.row}", place=fault.place, cause=str(fault))

    def nothing(self) -> DataError:
        """Why there is not one sample."""
        if not self.faults:
            return DataError(self.file, f"no rows of the split {self.config.split!r}" if self.has_splits else "no rows")
        first, count = self.faults[0], len(self.faults)
        alike = f"; none of its {count:,} rows can be used" if count > 1 else ""
        return DataError(self.file, f"{first.cause}{alike}", row=first.row, column=first.column)

    def _check_columns(self, columns: set[str], number: int) -> None:
        """A column that is missing, or is almost called like one that is missing."""
        known = columns | {ALIASES[name] for name in columns if name in ALIASES}
        for name in sorted(columns - set(COLUMNS) - set(ALIASES)):
            if near := get_close_matches(name.strip().lower(), set(COLUMNS) - known, cutoff=0.85):
                raise DataError(self.file, f"unknown column; did you mean {near[0]!r}?", row=number, column=name)
        if self.file.suffix.lower() in (".tsv", ".csv"):
            for needed in ("text", "source_text" if "source_text" in known else "path"):
                if needed not in known and not (needed == "text" and self.config.text == "none"):
                    there = ", ".join(sorted(columns))
                    raise DataError(self.file, f"the column is missing; there are {there}", column=needed)

    def _row(self, number: int, cells: Cells) -> Row:
        def wrong(column: str, cause: str) -> DataError:
            return _RowError(self.file, cause, row=number, column=column)

        row: Row = {name: self._words(number, cells, name) for name in COLUMNS if name not in _NUMBERS}
        row |= {name: self._number(number, cells, name) for name in _NUMBERS}
        if self.config.text == "none":
            row["text"] = ""
        if row["text"] is None:
            raise wrong("text", "no text")
        try:
            split_timestamps(row["text"])
        except ValueError as error:
            raise wrong("text", str(error)) from None
        task = row["task"] = row["task"] or self.config.task or "transcribe"
        if task not in TASKS:
            raise wrong("task", f"unknown task {task!r}: one of {', '.join(TASKS)}")
        needed = "source_text" if task == "translate-text" else "path"
        if row[needed] is None:
            raise wrong(needed, f"nothing there, and the task {task} needs it")
        row |= self._languages(number, row) | self._times(number, row)
        row[FILE] = None if task == "translate-text" else self._file(number, cells, row["path"])
        row |= {"id": self._id(row), "row": f"{self.file}, row {number}"}
        return row

    def _words(self, number: int, cells: Cells, column: str) -> str | None:
        value = cells.get(column)
        if value is None:
            return None
        if not isinstance(value, str | int | float):
            raise _RowError(self.file, f"a {type(value).__name__}, where words are expected", row=number, column=column)
        words = str(value).strip()
        if "\0" in words or any("\ud800" <= letter <= "\udfff" for letter in words):
            raise _RowError(self.file, "NUL, or half a character (a lone surrogate)", row=number, column=column)
        return words or None

    def _number(self, number: int, cells: Cells, column: str) -> float | None:
        value = cells.get(column)
        if value is None or value == "":
            return None
        try:
            seconds = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            seconds = math.nan
        if not math.isfinite(seconds) or seconds < 0:
            raise _RowError(self.file, f"{value!r} is no number of seconds from 0 on", row=number, column=column)
        return seconds

    def _languages(self, number: int, row: Row) -> Row:
        """Of what goes in and of the text; by the row, else by the configuration, else by the task."""
        usual = {"sign": "ins"}.get(row["task"], "")
        given = row["language"] or next(iter(self.config.languages), usual)
        target = row["target_language"] or {"transcribe": given, "translate": "en", "sign": "en"}.get(row["task"], "")
        codes: Row = {}
        for column, language in (("language", given), ("target_language", target)):
            if not language:
                cause = "no language: add the column, or say languages: [hi] for the corpus"
                raise _RowError(self.file, cause, row=number, column=column)
            try:
                codes[column] = language_code(language)
            except ValueError as error:
                raise _RowError(self.file, str(error), row=number, column=column) from None
        return codes

    def _times(self, number: int, row: Row) -> Row:
        start, end, duration = row["start"], row["end"], row["duration"]
        if end is None and start is not None and duration is not None:
            end = start + duration
        if end is not None and end <= (start or 0.0):
            raise _RowError(self.file, f"ends at {end:g} s, where it begins or before", row=number, column="end")
        return {"start": start, "end": end, "seconds": duration if end is None else end - (start or 0.0)}

    def _file(self, number: int, cells: Cells, path: str) -> str:
        if self.config.path is not None:
            try:
                path = self.config.path.format_map({**cells, "path": path})
            except (KeyError, IndexError, ValueError, AttributeError) as error:
                cause = f"the path {self.config.path!r} names a column that is not there ({error})"
                raise DataError(self.file, cause, row=number) from None
        return str(self.folder / path)

    def _id(self, row: Row) -> str:
        """By what the row says, not by where it stands: other rows may come and go. A second one alike is ``~2``."""
        file = row[FILE]
        key = hashlib.blake2b(f"{row['source_text']}\0{row['text']}".encode(), digest_size=8).hexdigest()
        if file is not None:
            key = Path(file).relative_to(self.folder).as_posix() if Path(file).is_relative_to(self.folder) else file
        piece = "" if row["start"] is None and row["end"] is None else f"#{row['start'] or 0:g}-{row['end'] or ''}"
        other = "" if row["task"] == "transcribe" else f"/{row['language']}-{row['target_language']}"
        name = f"{self.name}/{self.config.split}/{key}{piece}{other}"
        self.seen[name] += 1
        return name if self.seen[name] == 1 else f"{name}~{self.seen[name]}"


_NUMBERS = ("start", "end", "duration")
