"""Which samples come together: an epoch's batches of packs, planned from lengths before any sound is decoded.

Groups (corpus, task, language) are mixed by the weights of their corpora. Shares are met exactly, by quotas and not by drawing
lots, and a group that gets fewer samples than it has goes on in the next epoch where it stopped: nothing is seen twice before
everything of its group was seen once.

An epoch's order is cut into windows. A window's samples are packed longest first, each into the first pack that has room
(Patch-n-Pack: NaViT, arXiv 2307.06304); the packs are shuffled and divided into batches that are as equal as whole packs
can be. A plan depends on the seed and the place in the epoch, never on who carries it out: ranks take their share of
every batch, workers read what they are told, and a :class:`Position` is all that is needed to go on.

Map-style corpora are surveyed once: what can be known without decoding (a text that is none or too long, a clip over the
window, a row that is no sample) is found before the first step. Streams have neither lengths nor an index: each sample is
looked at when it is drawn, and resuming reads a stream again from its start, without decoding what was seen.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from random import Random
from typing import Literal, NamedTuple, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from whisper_moe.config import MAX_PACK_TOKENS, Frozen, Strict
from whisper_moe.data.corpus import Corpus
from whisper_moe.data.examples import ExampleConfig, ExampleReader, positions
from whisper_moe.data.sample import DataError, Sample, Skipped, items, looked_at, share_of, tried
from whisper_moe.packing import first_fit_decreasing

PLANNED_TOKENS = MAX_PACK_TOKENS - 4
"""A plan leaves this much room: a corpus rounds its durations, and a clip's last position may come on top."""
MOST_SKIPPED_IN_A_ROW = 1_000
"""After so many unusable samples without one that can be used, a stream is given up."""
_PASSES, _EPOCHS, _SHUFFLES = 1, 2, 4
"""What a random generator is for: the first number of its seed keeps them apart."""
_CLIPS_A_PACK = 32
"""A window has so many for each pack of a batch, so that it makes several batches."""
Weights: TypeAlias = Mapping[str, float]
"""Corpus name → how many samples each of its own counts for; 1 where nothing is said."""
_T = TypeVar("_T")


class LoaderConfig(Frozen):
    """From corpora to batches."""

    batch_size: int = Field(default=32, ge=1)
    """Of all ranks together: a batch is the same for any number of them, and each takes its share. Of examples it is a
    mean, since packs stay whole; of packs the most."""
    batch_unit: Literal["examples", "packs"] = "examples"
    """What ``batch_size`` counts."""
    planning_buffer: int = Field(default=2_048, ge=1)
    """Samples that are packed together. More fill packs better; of streams, so many are held in memory."""
    examples: ExampleConfig = ExampleConfig()
    seed: int = Field(default=42, ge=0)
    workers: int = Field(default=0, ge=0)
    """Processes that read ahead on each rank; 0 reads in the training process."""
    prefetch: int = Field(default=2, ge=1)
    """Batches that each worker reads ahead."""
    max_corrupt_share: float = Field(default=0.05, ge=0, le=1)
    """Above this share of unreadable samples training stops."""

    @property
    def window(self) -> int:
        """Samples that are planned together: the buffer, rounded to whole batches."""
        batch = self.batch_size * (_CLIPS_A_PACK if self.batch_unit == "packs" else 1)
        return max(1, self.planning_buffer // batch) * batch


@dataclass(frozen=True, slots=True)
class Draw:
    """A sample in an epoch's order, with what is known before it is read."""

    source: tuple[int, int] | Sample
    """(corpus, row) where that says it, else the sample."""
    margin: float
    """Seconds of silence behind a sound; of anything else, what is drawn for it, from 0 up to 1."""
    size: int
    """Positions and tokens."""


Packs: TypeAlias = tuple[tuple[Draw, ...], ...]


class Position(Strict):
    """Where in the data the next batch is. Plain numbers, the same on every rank."""

    epoch: int = Field(default=0, ge=0)
    cursor: int = Field(default=0, ge=0)
    """Items of the epoch's order before its window."""
    done: int = Field(default=0, ge=0)
    """Batches of its window before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedBatch:
    """The packs of a batch for all ranks; none where it only tells what the last rows of an epoch were."""

    packs: Packs
    epoch: int
    after: Position
    """Where the next one is."""
    skipped: tuple[Skipped, ...] = ()
    """What was left out since the batch before, known without decoding (streams)."""

    def share(self, rank: int, world: int) -> Packs:
        """The packs of one rank: every ``world``-th. A batch may have fewer packs than there are ranks; they are divided
        then, and only where samples are fewer, too, some ranks get nothing."""
        packs = list(self.packs)
        while len(packs) < world and (largest := max(packs, key=len, default=())) and len(largest) > 1:
            packs.remove(largest)
            packs += [largest[: len(largest) // 2], largest[len(largest) // 2 :]]
        return tuple(packs[rank::world])


def plan(order: Iterable[Draw | Skipped], start: Position, config: LoaderConfig) -> Iterator[PlannedBatch]:
    """The batches of an epoch from ``start`` to its end; ``order``: of that epoch, from the cursor on."""
    coming, here, skipped = iter(order), start, list[Skipped]()
    first = next(coming, None)
    while first is not None:
        window = [first, *islice(coming, config.window - 1)]
        first = next(coming, None)
        following = Position(epoch=start.epoch, cursor=here.cursor + len(window))
        if first is None:
            following = Position(epoch=start.epoch + 1)
        if not here.done:
            skipped += [item for item in window if isinstance(item, Skipped)]
        batches = _batches([item for item in window if isinstance(item, Draw)], here, config)
        for number, packs in enumerate(batches[here.done :], here.done + 1):
            after = here.model_copy(update={"done": number}) if number < len(batches) else following
            yield PlannedBatch(packs=packs, epoch=start.epoch, after=after, skipped=tuple(skipped))
            skipped = []
        here = following
    if skipped:
        yield PlannedBatch(packs=(), epoch=start.epoch, after=here, skipped=tuple(skipped))


def _batches(draws: Sequence[Draw], here: Position, config: LoaderConfig) -> list[Packs]:
    """A window's batches: its packs in random order, each in the batch in whose share of the window its middle lies."""
    groups = first_fit_decreasing([draw.size for draw in draws], PLANNED_TOKENS)
    by_examples = config.batch_unit == "examples"
    total = len(draws) if by_examples else len(groups)
    count = -(-total // config.batch_size)
    if by_examples and count:  # no pack is more than a batch
        most = total // count
        groups = [group[at : at + most] for group in groups for at in range(0, len(group), most)]
    batches: list[list[tuple[Draw, ...]]] = [[] for _ in range(count)]
    before = 0
    for place in seeded(config.seed, _SHUFFLES, here.epoch, here.cursor).permutation(len(groups)):
        size = len(groups[place]) if by_examples else 1
        batches[(2 * before + size) * count // (2 * total)].append(tuple(draws[index] for index in groups[place]))
        before += size
    return list(map(tuple, batches))


# Mixing.


class Group(NamedTuple):
    """Samples that are alike for mixing."""

    corpus: str
    task: str
    language: str


def shares(counts: Mapping[Group, int], weights: Weights) -> dict[Group, float]:
    """The share of an epoch that each group gets, by its samples times its corpus's weight; they sum to 1."""
    weighted = {group: count * weights.get(group.corpus, 1.0) for group, count in counts.items()}
    total = sum(weighted.values())
    return {group: count / total for group, count in weighted.items()}


def quotas(share: Mapping[Group, float], total: int) -> dict[Group, int]:
    """``total`` samples divided by ``share``: largest remainders, ties in the order of the groups' names."""
    exact = {group: part * total for group, part in share.items()}
    whole = {group: int(value + 1e-9) for group, value in exact.items()}
    by_remainder = sorted(exact, key=lambda group: (whole[group] - exact[group], group))
    for group in by_remainder[: total - sum(whole.values())]:
        whole[group] += 1
    return whole


def epoch_rows(rows: Mapping[Group, NDArray[np.int64]], quota: Mapping[Group, int], seed: int, epoch: int) -> list[int]:
    """The rows of each group's quota, mixed: the next part of its own endless sequence, one shuffled pass after another.

    With equal weights each row comes exactly once.
    """
    parts = [np.zeros(0, np.int64)]
    for group in (group for group in rows if quota[group]):
        key = zlib.crc32("/".join(group).encode())
        start, size = epoch * quota[group], len(rows[group])
        first, last = start // size, (start + quota[group] - 1) // size
        passes = [rows[group][seeded(seed, _PASSES, key, n).permutation(size)] for n in range(first, last + 1)]
        parts.append(np.concatenate(passes)[start - first * size :][: quota[group]])
    drawn = np.concatenate(parts)
    return drawn[seeded(seed, _EPOCHS, epoch).permutation(len(drawn))].tolist()


def merged(streams: Mapping[str, Iterator[_T]], weights: Weights, seed: int, epoch: int) -> Iterator[_T]:
    """Streams as one, each read once to its end; the choice among those not yet at their end is by weight."""
    draw = Random(f"{seed} {epoch}")
    open_streams = dict(streams)
    while open_streams:
        (chosen,) = draw.choices(list(open_streams), [weights.get(name, 1.0) for name in open_streams])
        try:
            yield next(open_streams[chosen])
        except StopIteration:
            del open_streams[chosen]


def seeded(*seed: int) -> np.random.Generator:
    """Random numbers that depend on these numbers alone."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))


# What there is to be drawn from.


class Order:
    """An epoch's samples in the order in which they are drawn, from its ``cursor`` on."""

    size = 0
    """Samples that a survey found usable; 0 without one."""
    excluded: tuple[Skipped, ...] = ()
    """What the survey left out."""
    fingerprint: str
    """Changes with the data, as far as they are known beforehand."""

    def __init__(self, reader: ExampleReader, seed: int) -> None:
        self._reader, self._seed = reader, seed

    def __call__(self, epoch: int, cursor: int) -> Iterator[Draw | Skipped]:
        raise NotImplementedError

    def _draw(self, source: tuple[int, int] | Sample, id: str, samples: int, tokens: int, epoch: int) -> Draw:
        margin = self._reader.margin_of(id, self._seed, epoch) if samples else share_of(id, self._seed, epoch)
        heard = positions(samples, margin, self._reader.max_positions) if samples else 0
        return Draw(source, margin, heard + tokens)

    def _measured(self, item: Sample | Skipped) -> tuple[int, int] | Skipped:
        return tried(item, self._reader.measure)


def open_order(corpora: Sequence[Corpus], reader: ExampleReader, seed: int, weights: Weights) -> Order:
    """By index where all corpora have one, as streams as soon as one of them has none."""
    names = [corpus.name for corpus in corpora]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"a loader needs corpora of different names, got {names}; give each a `name` in the recipe")
    streaming = any(corpus.streaming for corpus in corpora)
    return (StreamOrder if streaming else IndexOrder)(corpora, reader, seed, weights)


class IndexOrder(Order):
    """Map-style corpora: every epoch's order and all lengths are known."""

    def __init__(self, corpora: Sequence[Corpus], reader: ExampleReader, seed: int, weights: Weights) -> None:
        super().__init__(reader, seed)
        excluded = [each for corpus in corpora for each in corpus.left_out]
        self._ids: list[str] = []
        known: list[tuple[int, int, int, int]] = []
        rows: dict[Group, list[int]] = defaultdict(list)
        digest = blake2b(digest_size=16)
        for number, corpus in enumerate(corpora):
            for row, (item, measured) in enumerate(looked_at(items(corpus), self._measured)):
                if isinstance(item, Skipped) or isinstance(measured, Skipped):
                    excluded += [measured] if isinstance(measured, Skipped) else []
                    continue
                group = Group(corpus.name, item.task, item.language)
                rows[group].append(len(known))
                self._ids.append(item.id)
                known.append((number, row, *measured))
                digest.update(f"{group} {item.id} {measured[0]} {measured[1]}\n".encode())
        self.excluded, self.size, self.fingerprint = tuple(excluded), len(known), digest.hexdigest()
        if not known:
            first = f": {excluded[0].id}: {excluded[0].cause}" if excluded else ""
            raise ValueError(f"no sample of {[corpus.name for corpus in corpora]} can be used{first}")
        self._known = np.array(known, np.int64)
        self._rows = {group: np.array(each, np.int64) for group, each in rows.items()}
        counts = {group: len(each) for group, each in rows.items()}
        self._quotas = quotas(shares(counts, weights), len(known))

    def __call__(self, epoch: int, cursor: int) -> Iterator[Draw]:
        for index in epoch_rows(self._rows, self._quotas, self._seed, epoch)[cursor:]:
            corpus, row, samples, tokens = self._known[index].tolist()
            yield self._draw((corpus, row), self._ids[index], samples, tokens, epoch)


class StreamOrder(Order):
    """At least one stream: samples as they come, each corpus read once in an epoch."""

    def __init__(self, corpora: Sequence[Corpus], reader: ExampleReader, seed: int, weights: Weights) -> None:
        super().__init__(reader, seed)
        sizes = {corpus.name: None if corpus.streaming else len(corpus) for corpus in corpora}
        self._corpora, self._weights = corpora, weights
        self.fingerprint = " ".join(f"{name}:{'stream' if size is None else size}" for name, size in sizes.items())

    def __call__(self, epoch: int, cursor: int) -> Iterator[Draw | Skipped]:
        in_a_row, streams = 0, dict[str, Iterator[Sample | Skipped]]()
        for corpus in self._corpora:
            order = seeded(self._seed, _PASSES, zlib.crc32(corpus.name.encode()), epoch)
            rows = None if corpus.streaming else order.permutation(len(corpus)).tolist()
            streams[corpus.name] = items(corpus, rows)
        for item in islice(merged(streams, self._weights, self._seed, epoch), cursor, None):
            measured = self._measured(item)
            if isinstance(item, Sample) and not isinstance(measured, Skipped):
                in_a_row = 0
                yield self._draw(item, item.id, *measured, epoch)
            elif isinstance(measured, Skipped):
                in_a_row += 1
                if in_a_row == MOST_SKIPPED_IN_A_ROW:
                    cause = f"{in_a_row:,} samples in a row cannot be used; the last: {measured}"
                    raise DataError("training data", cause)
                yield measured
