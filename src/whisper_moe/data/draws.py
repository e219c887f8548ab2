"""Samples in an epoch's order, with their lengths: of map-style corpora by index, of streams as they come.

Map-style corpora are surveyed once: what can be known without decoding (a text that is none or too long, a clip over the
window, a row that is no sample) is found before the first step. Streams have neither lengths nor an index: each sample is
looked at when it is drawn, and resuming reads a stream again from its start, without decoding what was seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from whisper_moe.config import SAMPLE_RATE, SAMPLES_PER_POSITION
from whisper_moe.data.examples import ExampleReader, TooLong, positions
from whisper_moe.data.mixing import EpochOrder, Group, merged, stream_rows, stream_weights
from whisper_moe.data.planner import Draw, LoaderConfig, Position
from whisper_moe.data.sample import DataError, Sample, Skipped
from whisper_moe.media.audio import MediaError

MOST_SKIPPED_IN_A_ROW = 1_000
"""After so many unusable samples without one that can be used, a stream is given up."""
NAMED = 3
"""Corrupt samples that an error names."""


class AnyCorpus(Protocol):
    """What is asked of a corpus; :class:`whisper_moe.data.corpora.Corpus` has it. Streams need only be iterated."""

    @property
    def name(self) -> str: ...
    @property
    def streaming(self) -> bool: ...
    @property
    def left_out(self) -> Sequence[Skipped]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Sample: ...
    def __iter__(self) -> Iterator[Sample]: ...
    def lengths(self) -> Sequence[float] | NDArray[np.float32]: ...


class Draws(Protocol):
    """What :func:`whisper_moe.data.planner.plan` takes its samples from."""

    excluded: tuple[Skipped, ...]
    """What the survey left out."""
    size: int
    """Samples that the survey found usable; 0 without a survey."""
    fingerprint: str
    """Changes with the data, as far as they are known beforehand."""

    def __call__(self, position: Position, /) -> Iterator[Draw]: ...

    def skipped(self) -> tuple[Skipped, ...]:
        """What was left out since this was last asked."""
        ...


def open_draws(corpora: Sequence[AnyCorpus], reader: ExampleReader, config: LoaderConfig) -> Draws:
    """By index where all corpora have one, as streams as soon as one of them has none."""
    names = [corpus.name for corpus in corpora]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"a loader needs corpora of different names, got {names}; give each a `name` in the recipe")
    if any(corpus.streaming for corpus in corpora):
        return StreamDraws(corpora, reader, config)
    return MapDraws(corpora, reader, config)


class MapDraws:
    """Map-style corpora: every epoch's order and all lengths are known."""

    def __init__(self, corpora: Sequence[AnyCorpus], reader: ExampleReader, config: LoaderConfig) -> None:
        self._reader, self._config = reader, config
        survey = _Survey(corpora, reader, config)
        self.excluded = tuple(survey.excluded)
        if not survey.where:
            first = f": {self.excluded[0].id}: {self.excluded[0].cause}" if self.excluded else ""
            raise ValueError(f"no sample of {[corpus.name for corpus in corpora]} can be used{first}")
        self._ids, self._where = survey.ids, np.array(survey.where, np.int64)
        self._samples, self._tokens = np.array(survey.samples, np.int64), np.array(survey.tokens, np.int64)
        self._order = EpochOrder(
            list(survey.groups), np.array(survey.group, np.int32), config.mixing, config.seed
        )  # fmt: skip
        self.size, self.fingerprint = len(survey.where), survey.digest.hexdigest()

    def __call__(self, position: Position) -> Iterator[Draw]:
        rows = self._order.rows(position.epoch)
        for number in (*position.carried, *range(position.cursor, len(rows))):
            yield self._draw(number, int(rows[number]), position.epoch)

    def _draw(self, number: int, row: int, epoch: int) -> Draw:
        margin = self._reader.margin_of(self._ids[row], self._config.seed, epoch)
        corpus, index = self._where[row].tolist()
        length = positions(int(self._samples[row]), margin, self._reader.max_positions)
        return Draw(number, (corpus, index), margin, length, int(self._tokens[row]))

    def skipped(self) -> tuple[Skipped, ...]:
        return ()


class _Survey:
    """What there is in map-style corpora: one entry a usable sample in each list."""

    def __init__(self, corpora: Sequence[AnyCorpus], reader: ExampleReader, config: LoaderConfig) -> None:
        self._reader = reader
        self.ids: list[str] = []
        self.where: list[tuple[int, int]] = []
        self.samples: list[int] = []
        self.tokens: list[int] = []
        self.group: list[int] = []
        self.groups: dict[Group, int] = {}
        self.excluded: list[Skipped] = []
        self.digest = blake2b(digest_size=16)
        for number, corpus in enumerate(corpora):
            self.excluded += corpus.left_out
            for row, seconds in enumerate(corpus.lengths()):
                self._look_at(corpus, number, row, float(seconds))

    def _look_at(self, corpus: AnyCorpus, number: int, row: int, seconds: float) -> None:
        sample = None
        try:
            sample = corpus[row]
            samples, tokens = measure(sample, seconds, self._reader)
        except (DataError, MediaError, TooLong) as error:
            self.excluded.append(left_out(sample or f"{corpus.name}, row {row + 1}", error, self._reader.strict))
            return
        group = Group(corpus.name, sample.task, sample.language)
        self.ids.append(sample.id)
        self.where.append((number, row))
        self.samples.append(samples)
        self.tokens.append(tokens)
        self.group.append(self.groups.setdefault(group, len(self.groups)))
        self.digest.update(f"{group} {sample.id} {samples} {tokens}\n".encode())


class StreamDraws:
    """At least one stream: samples as they come, each corpus read once in an epoch."""

    def __init__(self, corpora: Sequence[AnyCorpus], reader: ExampleReader, config: LoaderConfig) -> None:
        self.excluded, self.size = (), 0
        self._corpora, self._reader, self._config = list(corpora), reader, config
        sizes = {corpus.name: None if corpus.streaming else len(corpus) for corpus in corpora}
        self._weights = stream_weights(sizes, config.mixing)
        self._skipped: list[Skipped] = []
        self.fingerprint = " ".join(f"{name}:{'stream' if size is None else size}" for name, size in sizes.items())

    def __call__(self, position: Position) -> Iterator[Draw]:
        wanted, carried = set(position.carried), dict[int, Draw]()
        self._skipped.clear()
        in_a_row = 0
        for number, (name, item) in enumerate(self._items(position.epoch)):
            if number == position.cursor:
                yield from (carried.pop(earlier) for earlier in position.carried)
            if number < position.cursor and number not in wanted:
                continue
            drawn = self._look_at(number, name, item, position.epoch)
            if isinstance(drawn, Skipped):
                self._skipped.append(drawn)
                in_a_row += 1
                if in_a_row == MOST_SKIPPED_IN_A_ROW:
                    raise DataError(name, f"{in_a_row:,} samples in a row cannot be used; the last: {drawn.cause}")
                continue
            in_a_row = 0
            if number < position.cursor:
                carried[number] = drawn
            else:
                yield drawn
        # Where the stream ends at the cursor, nothing stands there that they could be given before.
        yield from (carried[earlier] for earlier in position.carried if earlier in carried)

    def _items(self, epoch: int) -> Iterator[tuple[str, Sample | DataError]]:
        seed = self._config.seed
        streams = {corpus.name: _items(corpus, seed, epoch) for corpus in self._corpora}
        return merged(streams, self._weights, seed, epoch)

    def _look_at(self, number: int, corpus: str, item: Sample | DataError, epoch: int) -> Draw | Skipped:
        try:
            if isinstance(item, DataError):
                raise item
            samples, tokens = measure(item, math.nan, self._reader)
        except (DataError, MediaError, TooLong) as error:
            return left_out(corpus if isinstance(item, DataError) else item, error, self._reader.strict)
        margin = self._reader.margin_of(item.id, self._config.seed, epoch)
        return Draw(number, item, margin, positions(samples, margin, self._reader.max_positions), tokens)

    def skipped(self) -> tuple[Skipped, ...]:
        skipped = tuple(self._skipped)
        self._skipped.clear()
        return skipped


def _items(corpus: AnyCorpus, seed: int, epoch: int) -> Iterator[tuple[str, Sample | DataError]]:
    """A corpus's samples, and in the place of rows that are none, why; a map-style one shuffled."""
    samples = iter(corpus)
    rows = None if corpus.streaming else iter(stream_rows(len(corpus), corpus.name, seed, epoch).tolist())
    while True:
        try:
            yield corpus.name, next(samples) if rows is None else corpus[next(rows)]
        except StopIteration:
            return
        except DataError as error:
            yield corpus.name, error


def measure(sample: Sample, seconds: float, reader: ExampleReader) -> tuple[int, int]:
    """Samples of sound and tokens of text, without decoding where the corpus or the file's header says how long it is.

    ``seconds``: what is known of the sound, or NaN. Raises what :meth:`ExampleReader.read` raises.
    """
    prompt, text = reader.tokens(sample)
    if math.isnan(seconds):
        seconds = _seconds(sample)
    samples = round(seconds * SAMPLE_RATE)
    if samples > reader.max_positions * SAMPLES_PER_POSITION:
        raise TooLong(sample.id, reader.too_long(samples))
    return samples, len(prompt) + len(text)


def _seconds(sample: Sample) -> float:
    try:
        seconds = sample.seconds()
        if math.isfinite(seconds):
            return seconds
    except MediaError:  # of some files only decoding tells; what is wrong with others, it says better
        pass
    assert sample.audio is not None
    return len(sample.audio.read()) / SAMPLE_RATE


def left_out(sample: Sample | str, error: ValueError, strict: bool = False) -> Skipped:
    """The error as a skipped sample; raises it if samples that are too long are errors.

    :param sample: the sample, or what stands for its id where there is none.
    """
    if isinstance(error, TooLong) and strict:
        raise error
    id, place = (sample, "") if isinstance(sample, str) else (sample.id, sample.place)
    if isinstance(error, TooLong):
        return Skipped(id=id, place=place, cause=error.cause, kind="too long")
    return Skipped(id=id, place=place or (error.place if isinstance(error, DataError) else ""), cause=str(error))


class Tally:
    """How many samples were read, and which were corrupt."""

    def __init__(self, limit: float, usable: int, excluded: Sequence[Skipped]) -> None:
        """``usable`` and ``excluded``: what a survey found; its corrupt samples count, too."""
        self._limit, self._surveyed = limit, 0.0
        self._read = self._corrupt = 0
        self._first: list[Skipped] = []
        self.add(usable, excluded)
        self.judge()
        if self._read:
            self._surveyed = self._corrupt / self._read
            self._read = self._corrupt = 0

    def add(self, read: int, skipped: Sequence[Skipped]) -> None:
        """Raise :class:`DataError` if the share is over the limit by more than chance would explain."""
        corrupt = [sample for sample in skipped if sample.corrupt]
        self._corrupt += len(corrupt)
        self._read += read + len(corrupt)
        self._first = (self._first + corrupt)[:NAMED]
        expected = self._limit * self._read
        self._judge(expected + 3 * math.sqrt(expected))

    def judge(self) -> None:
        """Raise :class:`DataError` if the share is over the limit."""
        self._judge(self._limit * self._read)

    def _judge(self, allowed: float) -> None:
        usable = 1 - self._surveyed  # what is read is the part of the whole that the survey found usable
        if usable * self._corrupt + self._surveyed * self._read > allowed:
            share = self._surveyed + usable * self._corrupt / self._read
            named = "; ".join(map(str, self._first))
            raise DataError(
                "training data", f"{share:.1%} of {self._read:,} samples are corrupt, more than {self._limit:.1%}; "
                f"the first: {named}",
            )  # fmt: skip
