"""What every corpus becomes: samples, read when they are needed, and errors that name file, row and column."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b, sha256
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from whisper_moe.config import SAMPLE_RATE
from whisper_moe.media.audio import MediaError, stream_audio
from whisper_moe.media.video import header_seconds

if TYPE_CHECKING:
    from whisper_moe.data.corpus import Corpus

Task: TypeAlias = Literal["transcribe", "translate", "translate-text", "sign"]
"""Speech to its text, speech to English text, text to text, sign-language video to text."""
TASKS: tuple[Task, ...] = get_args(Task)
PROBES = 8
"""Samples that are looked at at once."""
_T = TypeVar("_T")


class DataError(ValueError):
    """A corpus or a sample that cannot be used as it is: which file, row (from 1) and column, and why."""

    def __init__(self, file: str | Path, cause: str, *, row: int | None = None, column: str | None = None) -> None:
        self.file, self.row, self.column, self.cause = str(file), row, column, cause
        place = [self.file, *([f"row {row}"] if row is not None else []), *([f"column {column!r}"] if column else [])]
        super().__init__(f"{', '.join(place)}: {cause}")

    @property
    def place(self) -> str:
        """The file, and the row in it where there is one."""
        return self.file if self.row is None else f"{self.file}, row {self.row}"

    def __reduce__(self) -> tuple[object, ...]:  # it crosses from loader workers
        return partial(type(self), row=self.row, column=self.column), (self.file, self.cause)


class TooLong(DataError):
    """A sound sample that does not fit the model; in the file's place its id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """A sample that is left out, and why."""

    id: str
    place: str = ""
    """Where it stands: a table and its row, or its own file."""
    kind: Literal["corrupt", "missing", "too long"] = "corrupt"
    """``missing``: listed, and not there. ``too long``: sound, but not for the model."""
    cause: str

    @property
    def corrupt(self) -> bool:
        """Whether its corpus is to blame."""
        return self.kind != "too long"

    def __str__(self) -> str:
        return self.cause if self.cause.startswith((self.id, self.place or self.id)) else f"{self.id}: {self.cause}"


@dataclass(frozen=True, slots=True, kw_only=True)
class AudioRef:
    """Where a sample's sound lies: a file, or an encoded file's bytes; all of it, or ``start`` to ``end`` seconds."""

    path: str | None = None
    """The file; beside ``data``, what messages call it."""
    data: bytes | None = None
    start: float = 0.0
    end: float | None = None

    @property
    def name(self) -> str:
        return self.path or "audio bytes"

    def _source(self) -> io.BytesIO | Path:
        return io.BytesIO(self.data) if self.data is not None else Path(self.name)

    def read(self) -> NDArray[np.float32]:
        """float32 samples, mono at 16 kHz. Raises ``MediaError`` naming the file and the cause.

        Nothing after ``end`` is decoded. A piece that the sound ends before is an error; one that it ends within is
        shorter.
        """
        first = round(self.start * SAMPLE_RATE)
        last = None if self.end is None else round(self.end * SAMPLE_RATE)
        pieces, position = [np.zeros(0, np.float32)], 0
        for block in stream_audio(self._source(), name=self.name):
            stop = len(block) if last is None else last - position
            pieces.append(block[max(0, first - position) : stop])
            position += len(block)
            if stop <= len(block) and last is not None:
                break
        if first and first >= position:
            raise MediaError(
                self.name, f"it ends at {position / SAMPLE_RATE:.2f} s, before the piece at {self.start:g} s"
            )
        return np.concatenate(pieces)

    def fingerprint(self) -> str:
        """What this piece of sound is known by; a file also by its size and date."""
        if self.data is not None:
            return repr(replace(self, data=sha256(self.data).digest()))
        try:
            status = os.stat(self.name)
        except OSError:  # a file that is not there is named when it is read
            return repr(self)
        return f"{self!r} {status.st_size} {status.st_mtime_ns}"

    def seconds(self) -> float:
        """How long the sound is by its header, which costs no decoding. Raises ``MediaError``."""
        whole = self.end if self.end is not None else header_seconds(self._source(), name=self.name)
        return max(0.0, whole - self.start)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One utterance, sentence pair or sign. What it does not have is None."""

    id: str
    """The same in every run and on every rank: corpus, split and key, e.g. ``kathbath/train/hindi/844424930-123-f.m4a``."""
    task: Task
    text: str
    """What the model is to say; empty where nobody has written it down."""
    language: str
    """Code of what goes in (``hi``, ``or``); ``ins`` for Indian Sign Language."""
    target_language: str
    """Code of ``text``."""
    audio: AudioRef | None = None
    video: str | None = None
    """Path of a video file."""
    source_text: str | None = None
    duration: float | None = None
    """Seconds of sound or video, where the corpus says so; :meth:`seconds` looks into the header where it does not."""
    speaker: str | None = None
    domain: str | None = None
    """A corpus's own division: ``known``, ``unknown-noisy``, a category of signs."""

    row: str | None = None
    """Table and row that it is of."""

    @property
    def place(self) -> str:
        """Where it stands: a table and its row, or its own file."""
        return self.row or (self.audio.name if self.audio is not None else self.video or "")

    def seconds(self) -> float:
        """Seconds of sound or video, by the corpus or by the file's header; 0 for text. Raises ``MediaError``."""
        if self.duration is not None:
            return self.duration
        if self.audio is not None:
            return self.audio.seconds()
        return header_seconds(Path(self.video)) if self.video is not None else 0.0


def share_of(id: str, seed: int, epoch: int) -> float:
    """A sample's draw in an epoch, from 0 up to 1: the same on every machine."""
    return int.from_bytes(blake2b(f"{seed}/{epoch}/{id}".encode(), digest_size=8).digest(), "big") / 2**64


def items(corpus: Corpus, rows: Iterable[int] | None = None) -> Iterator[Sample | Skipped]:
    """What every row is (of a map-style corpus also of some ``rows``): a sample, or why there is none."""
    stream = iter(corpus) if corpus.streaming else None
    for row in count() if stream is not None else range(len(corpus)) if rows is None else rows:
        try:
            yield corpus[row] if stream is None else next(stream)
        except StopIteration:
            return
        except DataError as error:
            yield left_out(corpus.name if stream else f"{corpus.name}, row {row + 1}", error)


def looked_at(
    rows: Iterator[Sample | Skipped], look: Callable[[Sample | Skipped], _T]
) -> Iterator[tuple[Sample | Skipped, _T]]:
    """Rows in their order, with what is found in each. Several are looked at at once: the wait is for disks and networks."""
    with ThreadPoolExecutor(PROBES) as pool:
        while chunk := list(islice(rows, 16 * PROBES)):  # of a stream, no more are held
            yield from zip(chunk, pool.map(look, chunk), strict=True)


def tried(item: Sample | Skipped, use: Callable[[Sample], _T]) -> _T | Skipped:
    """What ``use`` makes of a sample, or why there is none. Raises ``ValueError`` for what is wrong with more than this one."""
    if isinstance(item, Skipped):
        return item
    try:
        return use(item)
    except (DataError, MediaError) as error:
        return left_out(item, error)


def left_out(sample: Sample | str, error: ValueError) -> Skipped:
    """The error as a skipped sample; ``sample``: it, or what stands for its id where there is none."""
    id, place = (sample, "") if isinstance(sample, str) else (sample.id, sample.place)
    if isinstance(error, TooLong):
        return Skipped(id=id, place=place, cause=error.cause, kind="too long")
    return Skipped(id=id, place=place or getattr(error, "place", ""), cause=str(error))
