"""What an epoch's batches are made of, planned from lengths before any sound is decoded.

Samples are drawn in the epoch's order, a planning buffer at a time, and the buffer is packed first-fit in decreasing
order. Whole batches of the packs, shuffled, are handed out; what is left over goes into the next buffer. A plan depends
on the seed and on where it begins, never on who carries it out: ranks take their share of every batch, workers read what
they are told. A :class:`Position` is all that is needed to go on from the middle of an epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from whisper_moe.config import FULL_WINDOW, MAX_PACK_TOKENS
from whisper_moe.data.examples import ExampleConfig
from whisper_moe.data.mixing import MixingConfig
from whisper_moe.data.sample import Sample, Skipped
from whisper_moe.packing import first_fit_decreasing

PLANNED_TOKENS = MAX_PACK_TOKENS - 4
"""A plan leaves this much room: a corpus rounds its durations, and a clip's last position may come on top."""
_SHUFFLES = 4
"""Keeps this module's random numbers apart from those of :mod:`whisper_moe.data.mixing`."""


class LoaderConfig(BaseModel):
    """From corpora to batches."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    batch_size: int = Field(default=32, ge=1)
    """Of all ranks together: a batch is the same for any number of them, and each takes its share."""
    batch_unit: Literal["examples", "packs"] = "examples"
    """What ``batch_size`` counts."""
    mode: Literal["packed", "padded"] = "packed"
    """``padded``: each clip alone in a pack and padded to 30 s, as Whisper is usually trained; for comparison."""
    planning_buffer: int = Field(default=2_048, ge=1)
    """Samples that are packed together. More fill packs better; of streams, so many are held in memory."""
    examples: ExampleConfig = ExampleConfig()
    mixing: MixingConfig = MixingConfig()
    seed: int = Field(default=42, ge=0)
    workers: int = Field(default=0, ge=0)
    """Processes that read ahead on each rank; 0 reads in the training process."""
    prefetch: int = Field(default=2, ge=1)
    """Batches that each worker reads ahead."""
    max_corrupt_share: float = Field(default=0.05, ge=0, le=1)
    """Above this share of unreadable samples training stops."""
    cache_dir: str | None = None
    """Where spectrograms are kept, so that a sound is decoded once; None keeps none."""
    cache_limit_mb: int = Field(default=10_000, ge=1)

    @property
    def reading(self) -> ExampleConfig:
        """How samples are read in this mode."""
        if self.mode == "packed":
            return self.examples
        return self.examples.model_copy(update={"margin": FULL_WINDOW})


@dataclass(frozen=True, slots=True)
class Draw:
    """A sample in an epoch's order, with the lengths that are known before it is read."""

    number: int
    """Its place in the epoch's order."""
    source: tuple[int, int] | Sample
    """(corpus, row) where that says it, else the sample."""
    margin: float
    positions: int
    tokens: int

    @property
    def size(self) -> int:
        return self.positions + self.tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """Where in the data the next batch is. Plain numbers, the same on every rank."""

    epoch: int = 0
    index: int = 0
    """Batches of this epoch before it."""
    cursor: int = 0
    """Draws before its buffer."""
    carried: tuple[int, ...] = ()
    """Numbers of earlier draws that its buffer takes over."""
    done: int = 0
    """Batches of its buffer before it."""

    def state(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__} | {"carried": list(self.carried)}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Position:
        """Raises ``ValueError`` for what is not a position's state."""
        numbers: dict[str, Any] = {name: state.get(name) for name in ("epoch", "index", "cursor", "done")}
        carried = state.get("carried")
        known = isinstance(carried, list) and set(state) == {*numbers, "carried"}
        if not known or not all(isinstance(n, int) and n >= 0 for n in (*numbers.values(), *(carried or ()))):
            raise ValueError(f"not a position in the data: {state}")
        return cls(**numbers, carried=tuple(carried or ()))


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedBatch:
    """The packs of a batch for all ranks."""

    packs: tuple[tuple[Draw, ...], ...]
    position: Position
    """Where it is."""
    after: Position
    """Where the next one is."""
    skipped: tuple[Skipped, ...] = ()
    """What was left out since the batch before, known without decoding (streams)."""

    def share(self, rank: int, world: int) -> tuple[tuple[Draw, ...], ...]:
        """The packs of one rank: every ``world``-th. The last batch of an epoch may have fewer packs than there are ranks;
        they are divided then, and only where samples are fewer, too, some ranks get nothing."""
        packs = list(self.packs)
        while len(packs) < world and (largest := max(packs, key=len, default=())) and len(largest) > 1:
            packs.remove(largest)
            packs += [largest[: len(largest) // 2], largest[len(largest) // 2 :]]
        return tuple(packs[rank::world])


@dataclass(slots=True)
class _Buffer:
    """The draws that are planned together."""

    draws: list[Draw]
    last: bool
    """Whether the epoch ends with it."""
    packs: list[list[Draw]] = field(default_factory=list)


def plan(
    draws: Callable[[Position], Iterable[Draw]], start: Position, config: LoaderConfig,
    skipped: Callable[[], tuple[Skipped, ...]] = tuple,
) -> Generator[PlannedBatch, None, None]:  # fmt: skip
    """The batches of an epoch from ``start`` to its end.

    :param draws: gives, for a position, the draws it carries and then those from its cursor on, in order.
    :param skipped: gives what was skipped since it was last asked.
    """
    stream = iter(draws(start))
    carried = list(islice(stream, len(start.carried)))
    cursor, index, done = start.cursor, start.index - start.done, start.done
    while True:
        buffer = _fill(stream, carried, config)
        batches, rest = _batches(buffer, config, cursor, start.epoch)
        here = Position(epoch=start.epoch, cursor=cursor, carried=tuple(draw.number for draw in carried))
        cursor = max(cursor, *(draw.number + 1 for draw in buffer.draws), 0)
        carried = rest
        following = Position(epoch=start.epoch, cursor=cursor, carried=tuple(draw.number for draw in rest))
        left_out = skipped()
        for number, packs in enumerate(batches):
            ends = number + 1 == len(batches)
            if number >= done:
                after = _at(following, index + 1, 0) if ends else _at(here, index + 1, number + 1)
                if ends and buffer.last:
                    after = Position(epoch=start.epoch + 1)
                yield PlannedBatch(
                    packs=tuple(map(tuple, packs)), position=_at(here, index, number), after=after,
                    skipped=left_out if number == 0 else (),
                )  # fmt: skip
            index += 1
        if buffer.last:
            return
        done = 0


def _at(position: Position, index: int, done: int) -> Position:
    return Position(
        epoch=position.epoch, index=index, cursor=position.cursor, carried=position.carried, done=done
    )  # fmt: skip


def _fill(stream: Iterator[Draw], carried: list[Draw], config: LoaderConfig) -> _Buffer:
    """A planning buffer's draws, packed; as many buffers as make a batch."""
    buffer = _Buffer(list(carried), last=False)
    while not buffer.last:
        fresh = list(islice(stream, config.planning_buffer))
        buffer.last = len(fresh) < config.planning_buffer
        buffer.draws += fresh
        buffer.packs = _packs(buffer.draws, config)
        count = len(buffer.packs) if config.batch_unit == "packs" else len(buffer.draws)
        if count > config.batch_size:
            break
    return buffer


def _packs(draws: Sequence[Draw], config: LoaderConfig) -> list[list[Draw]]:
    if config.mode == "padded":
        return [[draw] for draw in draws]
    groups = first_fit_decreasing([draw.size for draw in draws], PLANNED_TOKENS)
    return [[draws[index] for index in group] for group in groups]


def _batches(
    buffer: _Buffer, config: LoaderConfig, cursor: int, epoch: int
) -> tuple[list[list[list[Draw]]], list[Draw]]:
    """Whole batches of packs in random order, and the draws that are left over; at the end of an epoch none are."""
    seed = np.random.SeedSequence([config.seed, _SHUFFLES, epoch, cursor])
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(buffer.packs))
    packs = [buffer.packs[index] for index in order]
    if config.batch_unit == "packs":
        whole = len(packs) if buffer.last else len(packs) - len(packs) % config.batch_size
        batches = [packs[first : min(first + config.batch_size, whole)] for first in range(0, whole, config.batch_size)]
        packs = packs[whole:]
    else:
        batches, packs = _batches_of_examples(packs, config.batch_size, buffer.last)
    return batches, [draw for pack in packs for draw in pack]


def _batches_of_examples(
    packs: list[list[Draw]], size: int, last: bool
) -> tuple[list[list[list[Draw]]], list[list[Draw]]]:
    """Batches of exactly ``size`` examples in whole packs, as long as such can be found; a pack is cut where they cannot.

    Returns the packs that are left, too: fewer examples than a batch, unless it is the ``last`` of the epoch.
    """
    batches: list[list[list[Draw]]] = []
    while sum(map(len, packs)) >= size:
        chosen = _exactly([len(pack) for pack in packs], size)
        batch = [packs[index] for index in chosen]
        taken = set(chosen)
        packs = [pack for index, pack in enumerate(packs) if index not in taken]
        while missing := size - sum(map(len, batch)):
            batch.append(packs[0][:missing])
            packs = [packs[0][missing:], *packs[1:]] if len(packs[0]) > missing else packs[1:]
        batches.append(batch)
    if last and packs:
        batches.append(packs)
        packs = []
    return batches, packs


_SEARCHED = 256
"""Packs among which a sum is looked for."""


def _exactly(counts: Sequence[int], wanted: int) -> list[int]:
    """Indices of counts that sum to ``wanted``, or to as much below it as was found. In order, but for the last few."""
    chosen: list[int] = []
    left, most = wanted, max(counts)
    for index, count in enumerate(counts):
        if left < 2 * most:
            break
        chosen.append(index)
        left -= count
    first = len(chosen)
    ways: dict[int, tuple[int, ...]] = {0: ()}
    for index in range(first, min(len(counts), first + _SEARCHED)):
        for total, way in sorted(ways.items(), reverse=True):
            ways.setdefault(total + counts[index], (*way, index)) if total + counts[index] <= left else None
        if left in ways:
            break
    return [*chosen, *ways[max(ways)]]
