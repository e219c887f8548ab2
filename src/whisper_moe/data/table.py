"""Everybody's own data: a table with a row for each sample, of which only the text and where it is said are needed.

``path`` (from the table's folder) or ``source_text``; ``text``; ``start``, ``end`` and ``duration`` in seconds, where the sample
is a piece of the file; ``language``, by default the corpus's; ``task`` (``transcribe``); ``target_language``, of the text where
it is another one; ``split``, where only some rows are of the corpus's. Names that ``datasets``, NeMo and Common Voice use are
understood (:data:`whisper_moe.data.corpus.OTHER_NAMES`), ``columns`` names others; the rest are left alone.

A folder is read by its table, in the folder of the split if there is one, or by its recordings (``text: file-name``, ``none``).
What ``datasets`` reads is a table, too, and ``path`` may hold the sound itself there.
A row that is no sample (no text, an unknown language, a time that is none) costs itself, and is named.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeAlias

from whisper_moe.data.corpus import COLUMNS, FILE, OTHER_NAMES, OUR_NAMES, Corpus, CorpusConfig, Row, listed, sample_of
from whisper_moe.data.hub import is_usual_split, load_stored, sound_column, spellings_of, stored_corpus
from whisper_moe.data.sample import TASKS, DataError, Sample, Skipped
from whisper_moe.media.languages import language_code
from whisper_moe.media.tokenizer import split_timestamps

SUFFIXES = (".tsv", ".csv", ".jsonl", ".ndjson", ".json", ".parquet", ".arrow")
TABLES = ("metadata", "transcripts", "manifest")
"""What a folder's table may be called."""
RECORDINGS = frozenset(
    ".aac .aif .aiff .amr .avi .caf .flac .m4a .m4v .mka .mkv .mov .mp2 .mp3 .mp4 .mpg .oga .ogg .opus .ts .wav .webm .wma "
    ".wv".split()
)
"""Extensions of sound and film, where a folder has to be searched for them."""
_TIMES = ("start", "end", "duration")


def open_corpus(config: CorpusConfig) -> Corpus:
    """Read the table and check every row. Raises :class:`DataError` naming file, row and column, for what is no table.

    Rows that are no samples and files that are not there are in ``Corpus.left_out``, unless all are: that is a mistake in
    columns, settings or paths.
    """
    corpus = _opened(config)
    return corpus if config.limit is None else replace(corpus, dataset=corpus.dataset.take(config.limit))


def _opened(config: CorpusConfig) -> Corpus:
    source = Path(config.source)
    local, folder = source.exists(), source.is_dir()
    bare = config.text == "file-name" or (config.text == "none" and folder)
    file = source if bare or not folder else _table_of(source, config.split)
    stored = load_stored(config, file) if config.text != "file-name" else None
    if stored is None and not local:
        raise DataError(source, "no such file or folder")
    if stored is None and file is None:
        tables = f"no table in it: {' or '.join(TABLES)} with {', '.join(SUFFIXES)}"
        raise DataError(source, f"{tables}; if its files are named after what is said, say text: file-name")
    file = file or source
    home = file.parent if file.is_file() else source if local else Path()
    own = source.is_file() and file.stem not in TABLES  # a file's own name, unless that says nothing
    name = config.name or (file.stem if own else (home if local else source).resolve().name)
    sound, remarks = sound_column(stored, config.renamed().get("path")) if stored is not None else (None, [])
    reader = RowReader(str(file) if local else config.source, home, name, config, sound)
    reader.remarks |= dict.fromkeys(remarks)
    if stored is not None:
        return stored_corpus(reader, stored)
    if bare:
        return reader.corpus(_recordings(file))
    suffix, names = file.suffix.lower(), config.columns if isinstance(config.columns, tuple) else ()
    if suffix not in SUFFIXES:
        raise DataError(file, f"not a table: one of {', '.join(SUFFIXES)} is")
    return reader.corpus(_separated(file, names) if suffix in (".tsv", ".csv") else _json_rows(file))


# Rows.


class RowError(DataError):
    """It costs its row; every other error is of the whole table."""


class _Wrong(Exception):
    """Column and cause, where neither file nor row are known."""


Rows: TypeAlias = Iterator[tuple[int, Row | RowError]]
"""Line (or row) in the file, from 1, and what stands in it by column, or what is wrong with it."""


class RowReader:
    """A table's cells become checked rows: which column is which of ours, what language, from where to where."""

    def __init__(
        self, file: str | Path, folder: Path, name: str, config: CorpusConfig, sound: str | None = None
    ) -> None:
        """``file``: what messages call the table. ``folder``: where its paths start. ``sound``: a column that holds sounds
        and not their paths."""
        self.file, self.folder, self.name, self.config, self.sound = str(file), folder, name, config, sound
        self.remarks: dict[str, None] = {}
        self._given = config.renamed()
        self._clips = folder / "clips" if (folder / "clips").is_dir() else None  # where Common Voice's paths start
        self._names: dict[tuple[str, ...], dict[str, str]] = {}
        self._seen, self._elsewhere = Counter[str](), Counter[str]()
        self._has_splits, self._strict = False, sound is not None or self.file.lower().endswith((".tsv", ".csv"))

    def corpus(self, cells: Rows, sample: Callable[[Row], Sample] = sample_of) -> Corpus:
        """Of the rows of the split and the languages that are wanted; what is wrong with others is in ``left_out``."""
        columns, rows, faults = set[str](), list[Row](), list[RowError]()
        for number, raw in cells:
            try:
                if isinstance(raw, RowError):
                    raise raw
                if not columns.issuperset(raw):
                    columns |= raw.keys()
                    self.check_columns(columns, number)
                if self.wanted(raw):
                    rows.append(self.row(raw, number))
            except RowError as error:
                faults.append(error)
        if columns:  # of JSON a later row may have the column
            self._check_given(columns)
        if not rows:
            raise self._nothing(faults)
        ids = (each.file if each.row is None else f"{self.name}, row {each.row}" for each in faults)
        left = [Skipped(id=id, place=each.place, cause=str(each)) for id, each in zip(ids, faults, strict=True)]
        return listed(self.config, self.name, self.file, rows, left, sample, remarks=self.told())

    def told(self) -> tuple[str, ...]:
        """Remarks on columns and on rows that were left aside."""
        others = ", ".join(f"{count:,} in {code}" for code, count in self._elsewhere.most_common())
        return (*self.remarks, *([f"rows in other languages are not read: {others}"] if others else []))

    def _nothing(self, faults: Sequence[RowError]) -> DataError:
        """Why there is not one sample."""
        if faults:
            first, count = faults[0], len(faults)
            alike = f"; none of its {count:,} rows can be used" if count > 1 else ""
            return DataError(self.file, f"{first.cause}{alike}", row=first.row, column=first.column)
        wanted = f" of the split {self.config.split!r}" if self._has_splits else ""
        if self._elsewhere:
            wanted += f" in {' or '.join(self.config.languages)}; there are {', '.join(self._elsewhere)}"
        return DataError(self.file, f"no rows{wanted}")

    # Columns.

    def check_columns(self, columns: Collection[str], number: int | None) -> None:
        """A column that is missing, or is almost called like one that is missing; and of several, which is taken."""
        taken = self._taken(columns)
        if self._strict:
            self._check_given(columns)
        for name in sorted(set(columns) - set(OUR_NAMES) - set(self._given.values())):
            if near := get_close_matches(name.strip().lower(), set(COLUMNS) - set(taken), cutoff=0.85):
                raise DataError(self.file, f"unknown column; did you mean {near[0]!r}?", row=number, column=name)
        needed = ("path" if "source_text" not in taken else "source_text",)
        for name in needed if self.config.text == "none" else ("text", *needed):
            if self._strict and name not in taken:
                raise self._missing(name, columns)
        for ours, names in taken.items():
            if len(names) > 1 and (ours, self.sound) != ("path", names[0]):
                self.remarks[f"{ours} is the column {names[0]!r}, not {' or '.join(map(repr, names[1:]))}"] = None

    def _check_given(self, columns: Collection[str]) -> None:
        for name in self._given.values():
            if name not in columns and name != self.sound:
                raise self._missing(name, columns)

    def _missing(self, column: str, there: Collection[str]) -> DataError:
        return DataError(self.file, f"the column is missing; there are {', '.join(sorted(there))}", column=column)

    def _taken(self, columns: Collection[str]) -> dict[str, list[str]]:
        """For each of our columns those of the table that may be it, the first of which is taken."""
        found = {ours: [name] for ours, name in self._given.items()}
        for ours in (name for name in COLUMNS if name not in found):
            first = [self.sound] if ours == "path" and self.sound else []
            names = [name for name in (ours, *OTHER_NAMES.get(ours, ())) if name in columns and name not in first]
            if names := first + [name for name in names if name not in self._given.values()]:
                found[ours] = names
        return found

    def _ours(self, raw: Row) -> Row:
        """By our names."""
        if (key := tuple(raw)) not in self._names:
            self._names[key] = {ours: names[0] for ours, names in self._taken(raw).items() if names[0] in raw}
        return {ours: raw[its] for ours, its in self._names[key].items()}

    # Rows.

    def wanted(self, raw: Row) -> bool:
        """Whether a row is of the split and in one of the languages; one that says none is looked at."""
        cells = self._ours(raw)
        self._has_splits |= "split" in cells
        split = str(cells.get("split") or "").strip()
        if split not in ("", self.config.split) and split.lower() not in spellings_of(self.config.split):
            return self._is_no_split(split)
        said = str(cells.get("language") or "").strip()
        if not said or not self.config.languages:
            return True
        with suppress(ValueError):  # whatever it is, it is none of these
            said = language_code(said)
        if said not in self.config.languages:
            self._elsewhere[said] += 1
        return said in self.config.languages

    def _is_no_split(self, split: str) -> bool:
        """Such a row is read, and refused: it would be missed by whoever misspelt it. A table may have splits of its own."""
        return is_usual_split(self.config.split) and not is_usual_split(split)

    def row(self, raw: Row, number: int | None) -> Row:
        """The row in its final form. ``number``: none in a stream. Raises :class:`RowError`."""
        cells = self._ours(raw)
        try:
            return self.checked(raw, cells, number)
        except _Wrong as error:
            column, cause = error.args
            raise self.error(str(cells.get("path") or ""), number, column, cause) from None

    def error(self, path: str, number: int | None, column: str, cause: str) -> RowError:
        """By the row's number, or in a stream by its path."""
        file = f"{self.file}: {path}" if path and number is None else self.file
        return RowError(file, cause, row=number, column=column)

    def checked(self, raw: Row, cells: Row, number: int | None) -> Row:
        """The row; raises column and cause."""
        row: Row = {name: (_seconds if name in _TIMES else _words)(cells.get(name), name) for name in COLUMNS}
        split, task = row["split"] or self.config.split, row["task"] or self.config.task or "transcribe"
        if split != self.config.split and self._is_no_split(split):
            raise _Wrong("split", f"unknown split {split!r}; usual are train, valid, dev, test, eval")
        text = "" if self.config.text == "none" else row["text"]
        if text is None:
            raise _Wrong("text", "no text")
        try:
            split_timestamps(text)
        except ValueError as error:
            raise _Wrong("text", str(error)) from None
        if task not in TASKS:
            raise _Wrong("task", f"unknown task {task!r}: one of {', '.join(TASKS)}")
        spoken = task != "translate-text"
        needed = "path" if spoken else "source_text"
        if row[needed] is None and not (spoken and self.sound):
            raise _Wrong(needed, f"nothing there, and the task {task} needs it")
        row |= {"text": text, "task": task} | self._languages(row, task) | _times(row)
        row[FILE] = self._file({**raw, **cells}, row["path"], number) if spoken and not self.sound else None
        row["stored"] = number - 1 if self.sound and number is not None and spoken else None
        place = self.file if number is None else f"{self.file}, row {number}"
        return row | {"id": self._id(row, again=number is not None), "row": place}

    def _languages(self, row: Row, task: str) -> Row:
        """Of what goes in and of the text; by the row, else by the configuration, else by the task."""
        only = self.config.languages[0] if len(self.config.languages) == 1 else "ins" if task == "sign" else None
        given = row["language"] or only
        usual = {"transcribe": given, "translate": "en", "sign": "en"}
        said = {"language": given, "target_language": row["target_language"] or usual.get(task)}
        for column, language in said.items():
            if not language:
                raise _Wrong(column, "no language: add the column, or say languages: [hi] for the corpus")
            try:
                said[column] = language_code(language)
            except ValueError as error:
                raise _Wrong(column, str(error)) from None
        return said

    def _file(self, cells: Row, path: str, number: int | None) -> str:
        if self.config.path is not None:
            try:
                path = self.config.path.format_map({**cells, "path": path})
            except (KeyError, IndexError, ValueError, AttributeError) as error:
                cause = f"the path {self.config.path!r} names a column that is not there ({error})"
                raise DataError(self.file, cause, row=number) from None
        if self._clips is not None and not os.path.isfile(self.folder / path):
            return str(self._clips / path)
        return str(self.folder / path)

    def _id(self, row: Row, *, again: bool) -> str:
        """By what the row says, not by where it stands: other rows may come and go. A second one alike is ``~2``, but in a
        stream, of which nobody knows what came before."""
        key = row[FILE] or (row["path"] if self.sound else None)
        if key is None:
            key = hashlib.blake2b(f"{row['source_text']}\0{row['text']}".encode(), digest_size=8).hexdigest()
        elif Path(key).is_relative_to(self.folder):
            key = Path(key).relative_to(self.folder).as_posix()
        piece = "" if row["start"] is None and row["end"] is None else f"#{row['start'] or 0:g}-{row['end'] or ''}"
        other = "" if row["task"] == "transcribe" else f"/{row['language']}-{row['target_language']}"
        name = f"{self.name}/{self.config.split}/{key}{piece}{other}"
        self._seen[name] += again
        return name if self._seen[name] <= 1 else f"{name}~{self._seen[name]}"


def _words(value: Any, column: str) -> str | None:
    if value is not None and not isinstance(value, str | int | float):
        raise _Wrong(column, f"a {type(value).__name__}, where words are expected")
    words = "" if value is None else str(value).strip()
    if "\0" in words or any("\ud800" <= letter <= "\udfff" for letter in words):
        raise _Wrong(column, "NUL, or half a character (a lone surrogate)")
    return words or None


def _seconds(value: Any, column: str) -> float | None:
    if value is None or value == "":
        return None
    with suppress(TypeError, ValueError):
        seconds = float(value)
        if math.isfinite(seconds) and seconds >= 0 and not isinstance(value, bool):
            return seconds
    raise _Wrong(column, f"{value!r} is no number of seconds from 0 on")


def _times(row: Row) -> Row:
    start, end, duration = row["start"], row["end"], row["duration"]
    if end is None and start is not None and duration is not None:
        end = start + duration
    if end is not None and end <= (start or 0.0):
        raise _Wrong("end", f"ends at {end:g} s, where it begins or before")
    return {"end": end, "seconds": duration if end is None else end - (start or 0.0)}


# Files.


def _table_of(folder: Path, split: str) -> Path | None:
    """The one table of a folder, or of the folder of the split in it; one that is called like the split comes first."""
    named = [stem for its in spellings_of(split) for stem in (its, f"{its}_manifest")]
    for place, stems in ((folder / split, TABLES), (folder, named), (folder, TABLES)):
        names = [place / f"{stem}{suffix}" for stem in stems for suffix in SUFFIXES]
        if found := [name for name in names if name.is_file()]:
            if len(found) > 1:
                raise DataError(place, f"several tables: {', '.join(file.name for file in found)}; name one of them")
            return found[0]
    return None


def decoded(lines: Iterable[bytes], file: str | Path) -> Iterator[str]:
    """Lines of text; one that is no UTF-8 is named."""
    for number, line in enumerate(lines, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(file, f"not UTF-8 text: {error.reason}", row=number) from None


def _separated(file: Path, columns: Sequence[str]) -> Rows:
    """TSV, in which a quotation mark is a character, or CSV, in which it quotes."""
    tabs = file.suffix.lower() == ".tsv"
    options: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {}
    with file.open("rb") as lines:
        reader = csv.reader(decoded(lines, file), strict=True, **options)
        try:
            names = list(columns) or next(reader, [])
            if doubled := [name for name, times in Counter(names).items() if times > 1]:
                raise DataError(file, "the column stands there twice", row=1, column=doubled[0])
            for cells in reader:
                if len(cells) > len(names):
                    cause = f"{len(cells)} cells, for {len(names)} columns"
                    yield reader.line_num, RowError(file, cause, row=reader.line_num)
                elif cells:
                    yield reader.line_num, dict(zip(names, cells, strict=False))
        except csv.Error as error:
            raise DataError(file, f"not a table: {error}", row=reader.line_num) from None


def _json_rows(file: Path) -> Rows:
    """An object a line, as NeMo's manifests are, too; or a list of objects."""
    whole = file.suffix.lower() == ".json"
    with file.open("rb") as content:
        lines = decoded(content, file)
        if whole:
            joined = "".join(lines)
            lines = [joined] if joined.lstrip().startswith("[") else joined.split("\n")
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(file, f"not JSON: {error}", row=number) from None
            for place, each in enumerate(row, 1) if whole and isinstance(row, list) else [(number, row)]:
                if not isinstance(each, dict):
                    raise DataError(file, f"a {type(each).__name__} where an object is expected", row=place)
                yield place, each


def _recordings(folder: Path) -> Rows:
    """Every recording below the folder, named after what is said in it."""
    if not folder.is_dir():
        raise DataError(folder, "text: file-name reads a folder of recordings, and this is a file")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in RECORDINGS)
    for number, file in enumerate(files, 1):
        inside = file.relative_to(folder)
        said = " ".join(file.stem.replace("_", " ").replace("-", " ").split())
        yield number, {"path": inside.as_posix(), "text": said, "domain": inside.parent.as_posix().removeprefix(".")}
