"""A corpus: which one, and how it is read. ``open_corpus`` takes what a recipe says and gives samples.

The rows are a dataset of the HF ``datasets`` module, map-style or streaming; sound stays encoded in them
(``Audio(decode=False)``) until a sample is read. ``datasets`` is imported when a corpus is opened: it costs seconds.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from whisper_moe.data.sample import DataError, Sample, Skipped, Task
from whisper_moe.media.audio import MediaError
from whisper_moe.media.languages import language_code

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

Row: TypeAlias = dict[str, Any]
Kind: TypeAlias = Literal["kathbath", "include", "wiki-translate", "table"]
_TASKS: dict[str, tuple[Task, ...]] = {
    "kathbath": ("transcribe",),
    "include": ("sign",),
    "wiki-translate": ("translate-text",),
    "table": ("transcribe", "translate", "translate-text", "sign"),
}
_ONLY = {
    **dict.fromkeys(("columns", "configuration", "path", "text"), "table"), "directions": "wiki-translate",
    "videos": "include",
}  # fmt: skip
"""Settings that mean something to one kind only."""
FILE = "file"
"""The column with a local file's path, in the rows of corpora that have such files."""
STREAM_SHARDS = 128
"""Parts that ranks and workers divide a stream of rows among."""
REMEMBERED_FROM = 1_000
"""So many headers are worth remembering on disk."""
PROBES = 8
"""Files whose headers are read at the same time: the wait is for disks and networks."""


class CorpusConfig(BaseModel):
    """One corpus as a recipe names it. Languages are given by code or name and kept as codes."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)

    kind: Kind
    source: str = Field(min_length=1)
    """A Hub id, or a local folder or file."""
    split: str = Field(default="train", min_length=1)
    """``train``, ``valid``, ``test`` … as each corpus calls them; Kathbath's tests: ``test-known``, ``test-unknown``, and
    either with ``-noisy``. A table without a column ``split`` and without a folder of that name is read whole."""
    languages: tuple[str, ...] = Field(default=(), strict=False)
    """Those to read; empty for all. For a table, one is also that of rows that do not say theirs."""
    task: Task | None = None
    """For a table: that of rows that do not say; default ``transcribe``."""
    directions: tuple[str, ...] = Field(default=("en>any", "any>en"), strict=False)
    """wiki-translate: ``en>hi``, ``any>en``, ``any>any``."""
    include_50: bool = False
    """INCLUDE: only the 50 words of INCLUDE-50."""
    videos: str | None = None
    """INCLUDE: the folder of the videos, if it is not the source."""
    columns: tuple[str, ...] | dict[str, str] = ()
    """Table: which columns are which, ``{path: clip, text: said}``; or, for a file that has no line with them, their names."""
    configuration: str | None = None
    """Table, of the Hub or laid out as there: the part to read, where it has several (``hi_in``)."""
    path: str | None = None
    """Table: where a row's file lies, with columns in braces: ``{language}/{path}``; default: the column ``path``."""
    text: Literal["column", "file-name", "none"] = "column"
    """Table: ``file-name`` for a folder of recordings that are named after what is said (``good_morning.wav``), ``none`` for
    recordings whose text nobody has written down (for self-distillation): their text is empty."""
    name: str | None = None
    """What ids begin with; default: the kind, or the table's own name."""
    streaming: bool = False
    limit: int | None = Field(default=None, ge=1)
    """The first so many samples only."""
    weight: float = Field(default=1.0, gt=0)
    """How often it is drawn in a mixture, relative to the others."""
    revision: str | None = None
    """Hub: branch, tag or commit."""
    cache_dir: str | None = None
    """Where ``datasets`` prepares what it reads map-style; default: its own folder, ``HF_DATASETS_CACHE``."""

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
        from whisper_moe.data.rows import renamed

        if self.task is not None and self.task not in _TASKS[self.kind]:
            raise ValueError(f"{self.kind} has the task {_TASKS[self.kind][0]}, not {self.task}")
        for field, kind in _ONLY.items():
            if self.kind != kind and getattr(self, field) != type(self).model_fields[field].default:
                raise ValueError(f"{field} is a setting of {kind}, not of {self.kind}")
        if self.include_50 and self.kind != "include":
            raise ValueError(f"include_50 is a setting of include, not of {self.kind}")
        if isinstance(self.columns, dict):
            renamed(self)
        if self.kind == "include" and self.languages not in ((), ("ins",)):
            raise ValueError(f"INCLUDE is Indian Sign Language (ins), got {list(self.languages)}")
        return self


@dataclass(frozen=True, eq=False)
class Corpus:
    """Samples by index (map-style), or one after another.

    A row that is no sample raises :class:`DataError` where it is read, by index or from ``next``; an iterator goes on
    behind it. Whether a sample's sound or film can be decoded shows when that is done.
    """

    name: str
    dataset: Dataset | IterableDataset
    """The rows; ``dataclasses.replace`` it to shuffle a stream or to take a rank's share of one."""
    sample: Callable[[Row], Sample]
    """What a row means. It can be pickled."""
    seconds: str | None = None
    """The column that gives each row's seconds, if there is one; a row without is looked up in its file's header."""
    left_out: tuple[Skipped, ...] = ()
    """What the corpus lists and cannot give: files that are not there, rows that are no samples. Not among the samples."""

    version: str = ""
    """Changes with sounds that are in no file of their own."""
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
        return _Samples(self)

    def _rows(self) -> Dataset:
        if self.streaming:
            raise TypeError(f"{self.name} is streamed: it has neither a length nor an index, and can only be iterated")
        return self.dataset  # pyright: ignore[reportReturnType]

    def lengths(self) -> NDArray[np.float32]:
        """Seconds of each sample, [samples]; 0 for text, NaN where neither the corpus nor a header says (a corrupt file).

        From the corpus's own column; else from the headers of the files, which are opened once: what they say is kept
        on disk, for as long as the files have the same sizes and dates.
        """
        return self._lengths

    @cached_property
    def _lengths(self) -> NDArray[np.float32]:
        rows = self._rows()
        known = np.full(len(rows), np.nan, np.float32)
        if self.seconds is not None:
            known = np.asarray(rows.select_columns([self.seconds])[self.seconds][:], dtype=np.float32)
        unknown = np.flatnonzero(np.isnan(known))
        if len(unknown):
            known[unknown] = _probed(self, unknown)
        return known


def as_dataset(rows: list[Row], types: Mapping[str, str], config: CorpusConfig) -> Dataset | IterableDataset:
    """Rows that are known from the start as a dataset of ``datasets``, in as many shards as can be."""
    from datasets import Dataset, Features, Value

    features = Features({name: Value(kind) for name, kind in types.items()})
    dataset = Dataset.from_dict({name: [row[name] for row in rows] for name in types}, features=features)
    if config.streaming:
        return dataset.to_iterable_dataset(num_shards=min(STREAM_SHARDS, len(dataset)))
    return dataset


def _probed(corpus: Corpus, indices: NDArray[np.int64]) -> NDArray[np.float32]:
    """Seconds by the headers of these samples' files, [indices]; from disk if these very files were looked at before."""
    memory = _memory(corpus, indices) if len(indices) >= REMEMBERED_FROM else None
    if memory is not None and memory.exists():
        return np.load(memory, allow_pickle=False)

    def seconds(index: int) -> float:
        try:
            return corpus[index].seconds()
        except (DataError, MediaError):
            return float("nan")

    with ThreadPoolExecutor(PROBES) as pool:
        found = np.fromiter(pool.map(seconds, indices.tolist()), np.float32, len(indices))
    if memory is not None:
        from whisper_moe.weights.files import atomic_file

        with suppress(OSError):  # a disk that takes nothing only costs the next run its time
            memory.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(memory) as scratch, scratch.open("wb") as file:
                np.save(file, found, allow_pickle=False)
    return found


def _memory(corpus: Corpus, indices: NDArray[np.int64]) -> Path:
    """Where the headers' seconds are kept: a name that changes with the rows and with size or date of any file."""
    rows = corpus._rows()
    known = f"{getattr(rows, '_fingerprint', '')} {len(rows)} {corpus.version}"
    digest = hashlib.blake2b(known.encode(), digest_size=16)
    digest.update(indices.tobytes())
    if FILE in rows.column_names:
        for file in filter(None, dict.fromkeys(rows.select_columns([FILE])[FILE][:])):
            try:
                status = os.stat(file)
                digest.update(f"{status.st_size} {status.st_mtime_ns};".encode())
            except OSError:
                digest.update(b"none;")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "whisper-moe" / f"seconds-{digest.hexdigest()}.npy"


class _Samples(Iterator[Sample]):
    """An iterator that survives a row that is no sample, as a generator would not."""

    def __init__(self, corpus: Corpus) -> None:
        self.name, self.rows, self.sample = corpus.name, iter(corpus.dataset), corpus.sample

    def __next__(self) -> Sample:
        return self.sample(next(self.rows))


def open_corpus(config: CorpusConfig) -> Corpus:
    """Open what a recipe names. Raises :class:`DataError` for a corpus that cannot be read as it says."""
    from whisper_moe.data.include import open_include
    from whisper_moe.data.kathbath import open_kathbath
    from whisper_moe.data.table import open_table
    from whisper_moe.data.wiki_translate import open_wiki_translate

    openers: dict[str, Callable[[CorpusConfig], Corpus]] = {
        "kathbath": open_kathbath,
        "include": open_include,
        "wiki-translate": open_wiki_translate,
        "table": open_table,
    }
    corpus = openers[config.kind](config)
    if config.limit is None:
        return corpus
    return replace(corpus, dataset=corpus.dataset.take(config.limit))
