"""A corpus: what a recipe says of it, and its rows, which have one form whatever they are read from.

The rows are a dataset of the HF ``datasets`` module, map-style or streaming; sound stays encoded in them
(``Audio(decode=False)``) until a sample is read. ``datasets`` is imported when a corpus is opened: it costs seconds.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias

from pydantic import Field, field_validator, model_validator

from whisper_moe.config import Strict
from whisper_moe.data.sample import AudioRef, DataError, Sample, Skipped, Task
from whisper_moe.media.languages import language_code

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

Row: TypeAlias = dict[str, Any]
COLUMNS = (
    *("path", "text", "start", "end", "duration", "language", "task", "source_text", "target_language"),
    *("speaker", "domain", "split"),
)
"""What a table may have."""
OTHER_NAMES = {
    "path": (
        *("audio", "audio_filepath", "audio_path", "file_name", "filename", "file", "wav", "clip"),
        *("video", "video_path"),
    ),
    "text": ("sentence", "transcript", "transcription", "raw_text", "raw_transcription", "normalized_text"),
    "start": ("offset",),
    "language": ("locale", "lang", "source_lang"),
    "target_language": ("target_lang",),
    "speaker": ("speaker_id", "client_id"),
    "domain": ("sentence_domain",),
}
"""What others (``datasets``, NeMo, Common Voice) call our columns; of several in a table the first is taken, ours before all."""
OUR_NAMES = {name: ours for ours, names in OTHER_NAMES.items() for name in names} | {name: name for name in COLUMNS}
FILE = "file"
"""The column with a local file's path."""
FEATURES = {
    **dict.fromkeys(("id", FILE, "text", "source_text", "language", "target_language", "task"), "string"),
    **dict.fromkeys(("start", "end", "seconds"), "float64"),
    **dict.fromkeys(("speaker", "domain", "row"), "string"),
    "stored": "int64",
}
"""A row's columns. The sound or film is a ``file``, or row number ``stored`` of a dataset beside it; ``row``: table and row that
it is of."""


class CorpusConfig(Strict):
    """One corpus as a recipe names it. Languages are given by code or name and kept as codes."""

    kind: Literal["table"] = "table"
    """What there is: tables, and all that is read as one. Published corpora become tables by ``recipes/corpora/``."""
    source: str = Field(min_length=1)
    """A Hub id, or a local folder or file."""
    split: str = Field(default="train", min_length=1)
    """``train``, ``valid``, ``test`` … as the corpus calls it. A table without a column ``split`` and without a folder of that
    name is read whole."""
    languages: tuple[str, ...] = Field(default=(), strict=False)
    """Those to read; empty for all. One is also that of rows that do not say theirs."""
    task: Task | None = None
    """That of rows that do not say; default ``transcribe``."""
    columns: tuple[str, ...] | dict[str, str] = ()
    """Which columns are which, ``{path: clip, text: said}``; or, for a file that has no line with them, their names."""
    configuration: str | None = None
    """Of the Hub, or what is laid out as there: the part to read, where it has several (``hi_in``)."""
    path: str | None = None
    """Where a row's file lies, with columns in braces: ``{language}/{path}``; default: the column ``path``."""
    text: Literal["column", "file-name", "none"] = "column"
    """``file-name`` for a folder of recordings that are named after what is said (``good_morning.wav``), ``none`` for recordings
    whose text nobody has written down (for self-distillation): their text is empty."""
    name: str | None = None
    """What ids begin with; default: the table's own name."""
    streaming: bool = False
    limit: int | None = Field(default=None, ge=1)
    """The first so many samples only."""
    weight: float = Field(default=1.0, gt=0)
    """How often it is drawn in a mixture, relative to the others."""
    revision: str | None = None
    """Hub: branch, tag or commit."""

    @field_validator("columns", mode="before")
    @classmethod
    def _tuple(cls, columns: Any) -> Any:
        return tuple(columns) if isinstance(columns, list) else columns

    @field_validator("languages")
    @classmethod
    def _codes(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(language_code(name) for name in names))

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.renamed()
        return self

    def renamed(self) -> dict[str, str]:
        """What ``columns`` says of them: our name, and the table's. Raises ``ValueError`` for a column that is none of ours."""
        given = self.columns if isinstance(self.columns, dict) else {}
        if unknown := [name for name in given if name not in OUR_NAMES]:
            raise ValueError(f"columns: there is no column {unknown[0]!r}: one of {', '.join(COLUMNS)}")
        return {OUR_NAMES[name]: its for name, its in given.items()}


def sample_of(row: Row) -> Sample:
    """The sample of a row; where its sound is ``stored``, without it."""
    file, sign = row.get(FILE), row["task"] == "sign"
    audio = None if file is None or sign else AudioRef(path=file, start=row["start"] or 0.0, end=row["end"])
    said: Row = {name: row[name] for name in ("id", "task", "text", "language", "target_language")}
    known: Row = {name: row.get(name) for name in ("source_text", "speaker", "domain", "row")}
    return Sample(**said, **known, audio=audio, video=file if sign else None, duration=row.get("seconds"))


@dataclass(frozen=True, eq=False)
class Corpus:
    """Samples by index (map-style), or one after another.

    A row that is no sample raises :class:`DataError` where it is read, by index or from ``next``; an iterator goes on
    behind it. Whether a sample's sound or film can be decoded shows when that is done.
    """

    name: str
    dataset: Dataset | IterableDataset
    """The rows."""
    sample: Callable[[Row], Sample] = sample_of
    """What a row means. It can be pickled."""
    left_out: tuple[Skipped, ...] = ()
    """What the corpus lists and cannot give: files that are not there, rows that are no samples. Not among the samples."""
    remarks: tuple[str, ...] = ()
    """What was decided for want of being told: of two columns the one that was taken, rows that were left aside."""

    @property
    def streaming(self) -> bool:
        return not hasattr(self.dataset, "__len__")

    def __len__(self) -> int:
        return len(self._rows())

    def __getitem__(self, index: int) -> Sample:
        return self.sample(self._rows()[index])

    def __iter__(self) -> Iterator[Sample]:
        # A map goes on behind a row that is no sample, as a generator would not.
        return map(self.sample, self.dataset)  # pyright: ignore[reportArgumentType]

    def _rows(self) -> Dataset:
        if self.streaming:
            raise TypeError(f"{self.name} is streamed: it has neither a length nor an index, and can only be iterated")
        return self.dataset  # pyright: ignore[reportReturnType]


def listed(
    config: CorpusConfig,
    name: str,
    place: str | Path,
    rows: Sequence[Row],
    left_out: Sequence[Skipped] = (),
    sample: Callable[[Row], Sample] = sample_of,
    remarks: tuple[str, ...] = (),
) -> Corpus:
    """A corpus of rows that are known from the start; what a row does not say is None.

    Rows whose file is not there are left out, unless all are: then :class:`DataError` says so of ``place``.
    """
    from datasets import Dataset, Features, Value

    found = [not row.get(FILE) or os.path.isfile(row[FILE]) for row in rows]
    there = list(compress(rows, found))
    missing = [
        Skipped(id=row["id"], place=row.get("row") or row[FILE], kind="missing", cause="no such file")
        for row, is_there in zip(rows, found, strict=True)
        if not is_there
    ]
    if not rows:
        first = f"; {len(left_out):,} cannot be had, the first: {left_out[0]}" if left_out else ""
        raise DataError(place, f"no samples of the split {config.split!r}{first}")
    if not there:
        cause = f"none of its {len(rows):,} files is there, such as {rows[0][FILE]}"
        raise DataError(place, cause, column="path")
    features = Features({name: Value(kind) for name, kind in FEATURES.items()})
    dataset = Dataset.from_dict({name: [row.get(name) for row in there] for name in FEATURES}, features=features)
    if config.streaming:
        dataset = dataset.to_iterable_dataset()
    return Corpus(name, dataset, sample, (*left_out, *missing), remarks)
