"""A table's cells become checked rows: which column is which of ours, what language, from where to where.

Columns are known by our names, by those that others use, or by what the corpus's ``columns`` say.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeAlias

from whisper_moe.data.corpus import COLUMNS, FILE, OTHER_NAMES, OUR_NAMES, CorpusConfig, Row
from whisper_moe.data.hub import is_usual_split, spellings_of
from whisper_moe.data.sample import TASKS, DataError, Skipped
from whisper_moe.media.languages import language_code
from whisper_moe.media.tokenizer import split_timestamps

_NUMBERS = ("start", "end", "duration")


class RowError(DataError):
    """It costs its row; every other error is of the whole table."""


Cells: TypeAlias = Mapping[str, Any]
Rows: TypeAlias = Iterator[tuple[int, Cells | RowError]]
"""Line (or row) in the file, from 1, and what stands in it by column, or what is wrong with it."""


class RowReader:
    """Checks cells and gives rows their final form."""

    def __init__(
        self, file: str | Path, folder: Path, name: str, config: CorpusConfig, sound: str | None = None
    ) -> None:
        """``file``: what messages call the table. ``folder``: where its paths start. ``sound``: a column that holds sounds
        and not their paths."""
        self.file, self.folder, self.name, self.config, self.sound = file, folder, name, config, sound
        self.remarks: dict[str, None] = {}
        self.faults: list[RowError] = []
        self._given = config.renamed()
        self._clips = folder / "clips" if (folder / "clips").is_dir() else None  # where Common Voice's paths start
        self._names: dict[tuple[str, ...], dict[str, str]] = {}
        self._seen: Counter[str] = Counter()
        self._at: tuple[int | None, str] = None, ""
        self._elsewhere: Counter[str] = Counter()
        self._has_splits, self._strict = False, sound is not None or str(file).lower().endswith((".tsv", ".csv"))

    def rows(self, cells: Rows) -> Iterator[Row]:
        """The rows of the split and the languages that are wanted; what is wrong with others is in ``faults``."""
        columns: set[str] | None = None
        for number, raw in cells:
            if isinstance(raw, RowError):
                self.faults.append(raw)
                continue
            if columns is None or not columns.issuperset(raw):
                columns = {*(columns or ()), *raw}
                self.check_columns(columns, number)
            if not self.wanted(raw):
                continue
            try:
                yield self.row(raw, number)
            except RowError as error:
                self.faults.append(error)
        if columns is not None:  # of JSON a later row may have the column
            self._check_given(columns)

    def left_out(self) -> Iterator[Skipped]:
        """The rows that are no samples."""
        for fault in self.faults:
            id = fault.file if fault.row is None else f"{self.name}, row {fault.row}"
            yield Skipped(id=id, place=fault.place, cause=str(fault))

    def told(self) -> tuple[str, ...]:
        """Remarks on columns and on rows that were left aside."""
        others = ", ".join(f"{count:,} in {code}" for code, count in self._elsewhere.most_common())
        return (*self.remarks, *([f"rows in other languages are not read: {others}"] if others else []))

    def nothing(self) -> DataError:
        """Why there is not one sample."""
        if not self.faults:
            wanted = [f"of the split {self.config.split!r}"] if self._has_splits else []
            wanted += [f"in {' or '.join(self.config.languages)}"] if self._elsewhere else []
            others = f"; there are {', '.join(self._elsewhere)}" if self._elsewhere else ""
            return DataError(self.file, " ".join(["no rows", *wanted]) + others)
        first, count = self.faults[0], len(self.faults)
        alike = f"; none of its {count:,} rows can be used" if count > 1 else ""
        return DataError(self.file, f"{first.cause}{alike}", row=first.row, column=first.column)

    def check_columns(self, columns: Collection[str], number: int | None) -> None:
        """A column that is missing, or is almost called like one that is missing; and of several, which is taken."""
        taken = self._taken(columns)
        if self._strict:
            self._check_given(columns)
        for name in sorted(set(columns) - set(OUR_NAMES) - set(self._given.values())):
            if near := get_close_matches(name.strip().lower(), set(COLUMNS) - set(taken), cutoff=0.85):
                raise DataError(self.file, f"unknown column; did you mean {near[0]!r}?", row=number, column=name)
        if self._strict:
            for needed in ("text", "source_text" if "source_text" in taken else "path"):
                if needed not in taken and not (needed == "text" and self.config.text == "none"):
                    raise self._missing(needed, columns)
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
        spoken_for = set(self._given.values())
        found: dict[str, list[str]] = {}
        for ours in COLUMNS:
            names = [name for name in (ours, *OTHER_NAMES.get(ours, ())) if name in columns and name not in spoken_for]
            first = [self.sound] if ours == "path" and self.sound else []
            if names := [self._given[ours]] if ours in self._given else [*first, *(n for n in names if n not in first)]:
                found[ours] = names
        return found

    def wanted(self, raw: Cells) -> bool:
        """Whether a row is of the split and in one of the languages; one that says none is looked at."""
        cells = self._ours(raw)
        self._has_splits |= "split" in cells
        split = str(cells.get("split") or "").strip()
        if split not in ("", self.config.split) and split.lower() not in spellings_of(self.config.split):
            return self._is_no_split(split)
        said = str(cells.get("language") or "").strip() if self.config.languages else ""
        try:
            code = language_code(said) if said else None
        except ValueError:  # whatever it is, it is none of these
            code = said
        if code is not None and code not in self.config.languages:
            self._elsewhere[code] += 1
            return False
        return True

    def _is_no_split(self, split: str) -> bool:
        """Such a row is read, and refused: it would be missed by whoever misspelt it. A table may have splits of its own."""
        return is_usual_split(self.config.split) and not is_usual_split(split)

    def _ours(self, raw: Cells) -> Cells:
        """By our names."""
        if (key := tuple(raw)) not in self._names:
            self._names[key] = {ours: names[0] for ours, names in self._taken(raw).items() if names[0] in raw}
        return {ours: raw[its] for ours, its in self._names[key].items()}

    def row(self, raw: Cells, number: int | None) -> Row:
        """The row in its final form. Raises :class:`RowError`."""
        cells = self._ours(raw)
        self._at = number, str(cells.get("path") or "")
        row: Row = {name: self._words(cells, name) for name in COLUMNS if name not in _NUMBERS}
        row |= {name: self._number(cells, name) for name in _NUMBERS}
        split = row["split"] or ""
        if split not in ("", self.config.split) and self._is_no_split(split):
            raise self._wrong("split", f"unknown split {split!r}; usual are train, valid, dev, test, eval")
        if self.config.text == "none":
            row["text"] = ""
        if row["text"] is None:
            raise self._wrong("text", "no text")
        try:
            split_timestamps(row["text"])
        except ValueError as error:
            raise self._wrong("text", str(error)) from None
        task = row["task"] = row["task"] or self.config.task or "transcribe"
        if task not in TASKS:
            raise self._wrong("task", f"unknown task {task!r}: one of {', '.join(TASKS)}")
        needed = "source_text" if task == "translate-text" else "path"
        if row[needed] is None and not (needed == "path" and self.sound):
            raise self._wrong(needed, f"nothing there, and the task {task} needs it")
        row |= self._languages(row) | self._times(row)
        spoken = task != "translate-text"
        row[FILE] = self._file({**raw, **cells}, row["path"]) if spoken and not self.sound else None
        row["stored"] = number - 1 if self.sound and number is not None and spoken else None
        place = DataError(self.file, "", row=number).place
        return row | {"id": self._id(row, again=number is not None), "row": place}

    def _wrong(self, column: str, cause: str) -> RowError:
        number, path = self._at  # of a stream, nobody knows the row
        return RowError(
            f"{self.file}: {path}" if path and number is None else self.file, cause, row=number, column=column
        )

    def _words(self, cells: Cells, column: str) -> str | None:
        value = cells.get(column)
        if value is None:
            return None
        if not isinstance(value, str | int | float):
            raise self._wrong(column, f"a {type(value).__name__}, where words are expected")
        words = str(value).strip()
        if "\0" in words or any("\ud800" <= letter <= "\udfff" for letter in words):
            raise self._wrong(column, "NUL, or half a character (a lone surrogate)")
        return words or None

    def _number(self, cells: Cells, column: str) -> float | None:
        value = cells.get(column)
        if value is None or value == "":
            return None
        try:
            seconds = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            seconds = math.nan
        if not math.isfinite(seconds) or seconds < 0:
            raise self._wrong(column, f"{value!r} is no number of seconds from 0 on")
        return seconds

    def _languages(self, row: Row) -> Row:
        """Of what goes in and of the text; by the row, else by the configuration, else by the task."""
        usual = {"sign": "ins"}.get(row["task"], "")
        only = self.config.languages[0] if len(self.config.languages) == 1 else usual
        given = row["language"] or only
        target = row["target_language"] or {"transcribe": given, "translate": "en", "sign": "en"}.get(row["task"], "")
        codes: Row = {}
        for column, language in (("language", given), ("target_language", target)):
            if not language:
                raise self._wrong(column, "no language: add the column, or say languages: [hi] for the corpus")
            try:
                codes[column] = language_code(language)
            except ValueError as error:
                raise self._wrong(column, str(error)) from None
        return codes

    def _times(self, row: Row) -> Row:
        start, end, duration = row["start"], row["end"], row["duration"]
        if end is None and start is not None and duration is not None:
            end = start + duration
        if end is not None and end <= (start or 0.0):
            raise self._wrong("end", f"ends at {end:g} s, where it begins or before")
        return {"start": start, "end": end, "seconds": duration if end is None else end - (start or 0.0)}

    def _file(self, cells: Cells, path: str) -> str:
        if self.config.path is not None:
            try:
                path = self.config.path.format_map({**cells, "path": path})
            except (KeyError, IndexError, ValueError, AttributeError) as error:
                cause = f"the path {self.config.path!r} names a column that is not there ({error})"
                raise DataError(self.file, cause, row=self._at[0]) from None
        if self._clips is not None and not os.path.isfile(self.folder / path):
            return str(self._clips / path)
        return str(self.folder / path)

    def _id(self, row: Row, *, again: bool) -> str:
        """By what the row says, not by where it stands: other rows may come and go. A second one alike is ``~2``, but in a
        stream, of which nobody knows what came before."""
        file = row[FILE] or (row["path"] if self.sound else None)
        key = hashlib.blake2b(f"{row['source_text']}\0{row['text']}".encode(), digest_size=8).hexdigest()
        if file is not None:
            key = Path(file).relative_to(self.folder).as_posix() if Path(file).is_relative_to(self.folder) else file
        piece = "" if row["start"] is None and row["end"] is None else f"#{row['start'] or 0:g}-{row['end'] or ''}"
        other = "" if row["task"] == "transcribe" else f"/{row['language']}-{row['target_language']}"
        name = f"{self.name}/{self.config.split}/{key}{piece}{other}"
        self._seen[name] += again
        return name if not again or self._seen[name] == 1 else f"{name}~{self._seen[name]}"
