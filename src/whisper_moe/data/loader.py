"""The training loader: batches of packs for one rank, in an order that workers and ranks do not change.

The plan is made in the training process (:mod:`whisper_moe.data.sampler`); workers get the samples of a batch and read
them. So the only state is the place in the plan, it is the same on every rank, and any number of workers and ranks can
go on from it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from whisper_moe.config import ModelConfig
from whisper_moe.data.corpus import Corpus
from whisper_moe.data.examples import Example, ExampleReader, Pack, pack_examples
from whisper_moe.data.sample import DataError, Sample, Skipped, items, tried
from whisper_moe.data.sampler import Draw, LoaderConfig, Packs, PlannedBatch, Position, Weights, open_order, plan
from whisper_moe.media.tokenizer import Tokenizer

STATE_VERSION = 2
NAMED = 3
"""Corrupt samples that an error names."""

_Read: TypeAlias = "tuple[list[list[Example]], list[Skipped], Tensor | None] | ValueError"
"""The examples of each pack, what is left out, and the bytes of the mels where they travel apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One rank's share of a batch. It may be empty: in an epoch's last batch, or if nothing of it can be read."""

    packs: tuple[Pack, ...]
    epoch: int
    skipped: tuple[Skipped, ...] = ()
    """This share of the samples that are left out."""

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(id for pack in self.packs for id in pack.ids)

    @property
    def examples(self) -> int:
        return sum(len(pack.ids) for pack in self.packs)

    @property
    def tokens(self) -> int:
        """Of encoder and decoder."""
        return sum(pack.encoder_tokens + pack.decoder_tokens for pack in self.packs)


class CorruptShare:
    """How many samples were read, and which were corrupt."""

    def __init__(self, limit: float, usable: int, excluded: Sequence[Skipped]) -> None:
        """``usable`` and ``excluded``: what a survey found; its corrupt samples count, too."""
        self._limit, self._surveyed = limit, 0.0
        self._read = self._corrupt = 0
        self._first: list[Skipped] = []
        self.add(usable, excluded)
        self.check()
        if self._read:
            self._surveyed = self._corrupt / self._read
            self._read = self._corrupt = 0

    def add(self, read: int, skipped: Sequence[Skipped]) -> None:
        """Raise :class:`DataError` if the share is over the limit by more than chance would explain."""
        corrupt = [sample for sample in skipped if sample.corrupt]
        self._corrupt += len(corrupt)
        self._read += read + len(corrupt)
        self._first = (self._first + corrupt)[:NAMED]
        self.check(slack=3 * math.sqrt(self._limit * self._read))

    def check(self, slack: float = 0.0) -> None:
        """Raise :class:`DataError` if the share is over the limit."""
        usable = 1 - self._surveyed  # what is read is the part of the whole that the survey found usable
        if usable * self._corrupt + self._surveyed * self._read > self._limit * self._read + slack:
            share = self._surveyed + usable * self._corrupt / self._read
            many = f"{share:.1%} of {self._read:,} samples are corrupt, more than {self._limit:.1%}"
            raise DataError("training data", f"{many}; the first: {'; '.join(map(str, self._first))}")


class PackedLoader:
    """Iterating yields the batches from where the loader is to the end of the epoch; then the next epoch begins.

    Leaving an iteration early and iterating again goes on behind the last batch that was handed out.
    """

    def __init__(
        self,
        corpora: Sequence[Corpus],
        tokenizer: Tokenizer,
        model: ModelConfig,
        config: LoaderConfig,
        *,
        rank: int = 0,
        world: int = 1,
        reader: ExampleReader | None = None,
        weights: Weights | None = None,
        note: Callable[[Sequence[Skipped]], None] = lambda skipped: None,
    ) -> None:
        """Survey the corpora. Raises ``ValueError`` for what does not fit together, :class:`DataError` where too many
        samples are corrupt.

        :param rank: the share of every batch that this loader gives, of ``world`` shares.
        :param reader: another one than the ``config``'s.
        :param weights: how often corpora are drawn, by name.
        :param note: is told of samples that are left out, before there may be too many of them.
        """
        if not 0 <= rank < world:
            raise ValueError(f"rank must be within 0 and {world - 1}, got {rank}")
        if config.batch_size < world:
            raise ValueError(f"a batch of {config.batch_size} {config.batch_unit} cannot be shared by {world} ranks")
        self.config, self._rank, self._world, self._note = config, rank, world, note
        self._reader = reader or ExampleReader(tokenizer, model, config.examples)
        self._weights = dict(weights or {})
        self._order = open_order(corpora, self._reader, config.seed, self._weights)
        self._dataset = _Reading(list(corpora), self._reader)
        self._position = Position()
        note(self.excluded)
        self._corrupt = CorruptShare(config.max_corrupt_share, self._order.size, self.excluded)

    @property
    def excluded(self) -> tuple[Skipped, ...]:
        """What was left out before the first batch; of streams, and where decoding fails, batches say it."""
        return self._order.excluded

    @property
    def epoch(self) -> int:
        return self._position.epoch

    def count(self, epochs: int) -> int:
        """Batches of the first so many epochs, by planning them. Raises ``ValueError`` for a stream, whose end nobody knows."""
        if not self._order.size:
            raise ValueError("a streamed corpus has no length, so the batches of an epoch cannot be counted")
        return sum(1 for epoch in range(epochs) for _ in self._plan(Position(epoch=epoch)))

    def _plan(self, start: Position) -> Iterator[PlannedBatch]:
        return plan(self._order(start.epoch, start.cursor), start, self.config)

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch is and what the order depends on: plain data for JSON, the same on every rank."""
        return {"version": STATE_VERSION, "position": self._position.model_dump(), "order": self._settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on behind the batch after which ``state`` was taken, with any number of workers and ranks.

        Raises ``ValueError`` naming what has changed, if the order is not the one that the state is of.
        """
        if state.get("version") != STATE_VERSION:
            raise ValueError(f"the state of a loader has version {STATE_VERSION}, got {state.get('version')!r}")
        then, now = state.get("order", {}), self._settings()
        if changed := [name for name in sorted({*then, *now}) if then.get(name) != now.get(name)]:
            said = {name: f"{name}: {then.get(name)!r} then, {now.get(name)!r} now" for name in changed}
            gone = "the training data's rows, texts or lengths have changed; a new run can begin with this one's model"
            said |= {"data": gone} if "data" in said else {}  # of a survey it is a digest
            raise ValueError(f"cannot go on in the middle of other data: {'; '.join(said.values())}")
        self._position = Position.model_validate(state["position"])

    def _settings(self) -> dict[str, Any]:
        """Everything that the order of samples and their margins depend on."""
        ordering = self.config.model_dump(include={"batch_size", "batch_unit", "planning_buffer", "seed"})
        # As if there still were other modes and a temperature: runs that had a choice go on.
        ordering |= {"mode": "packed", "mixing": {"temperature": 1.0, "weights": self._weights}}
        padded = [self._reader.padded] if self._reader.padded else []  # else as before there was such a share
        return ordering | {"margin": [*self._reader.margins, *padded], "data": self._order.fingerprint}

    def __iter__(self) -> Iterator[Batch]:
        epoch, workers = self._position.epoch, self.config.workers
        ahead: deque[PlannedBatch] = deque()
        reading = DataLoader(
            self._dataset,
            batch_size=None,
            sampler=self._work(ahead),  # pyright: ignore[reportArgumentType]
            num_workers=workers,
            collate_fn=_as_it_is,
            prefetch_factor=self.config.prefetch if workers else None,
            generator=torch.Generator(),  # its own: the run's random numbers do not depend on how often it was resumed
        )
        for read in reading:
            if isinstance(read, ValueError):
                raise read
            planned = ahead.popleft()
            batch = self._batch(planned, *read)
            self._position = planned.after
            yield batch
        for planned in ahead:  # what the last rows of a stream were
            self._tell(0, planned.skipped[self._rank :: self._world])
        self._corrupt.check()
        if self._position.epoch == epoch:
            self._position = Position(epoch=epoch + 1)

    def _work(self, ahead: deque[PlannedBatch]) -> Iterator[Packs]:
        """This rank's work, batch by batch, for the DataLoader; what is handed to it is remembered in ``ahead``."""
        for planned in self._plan(self._position):
            ahead.append(replace(planned, packs=()))  # what is read need not be held twice
            if planned.packs:
                yield planned.share(self._rank, self._world)

    def _batch(
        self, planned: PlannedBatch, groups: list[list[Example]], unread: list[Skipped], mels: Tensor | None
    ) -> Batch:
        if mels is not None:
            parts = iter(mels.split([each.mel.nbytes for group in groups for each in group]))
            own = lambda mel: next(parts).clone().view(mel.dtype).view(mel.shape)  # noqa: E731
            groups = [[replace(each, mel=own(each.mel)) for each in group] for group in groups]
        packs = tuple(pack for group in groups for pack in pack_examples(group))
        # Every rank draws from the same streams: each says its share of what was left out there.
        skipped = (*planned.skipped[self._rank :: self._world], *unread)
        batch = Batch(packs=packs, epoch=planned.epoch, skipped=skipped)
        self._tell(batch.examples, skipped)
        return batch

    def _tell(self, read: int, skipped: Sequence[Skipped]) -> None:
        self._note(skipped)
        self._corrupt.add(read, skipped)


class _Reading(Dataset[_Read]):
    """Reads the samples of a batch: in a worker, or in the training process."""

    def __init__(self, corpora: list[Corpus], reader: ExampleReader) -> None:
        self._corpora, self._reader = corpora, reader

    def __getitem__(self, packs: Packs) -> _Read:
        try:
            read = [[self._read(draw) for draw in pack] for pack in packs]
        except ValueError as error:  # as a value: DataLoader would wrap it into a traceback's text
            return error
        groups = [[example for example in pack if isinstance(example, Example)] for pack in read]
        skipped = [sample for pack in read for sample in pack if isinstance(sample, Skipped)]
        mels = [example.mel for group in groups for example in group]
        if not mels or get_worker_info() is None:
            return groups, skipped, None
        # On their way from a worker all are one tensor of bytes: each tensor takes a file descriptor, and arrays, which go
        # through the pipe, fill it: a worker whose run was killed would wait for ever to write.
        groups = [[replace(example, mel=example.mel.to("meta")) for example in group] for group in groups]
        return groups, skipped, torch.cat([mel.contiguous().view(-1).view(torch.uint8) for mel in mels])

    def _read(self, draw: Draw) -> Example | Skipped:
        """The example, or why there is none. Raises ``ValueError`` for what is wrong with more than this sample."""
        if isinstance(draw.source, Sample):
            item = draw.source
        else:
            corpus, row = draw.source
            (item,) = items(self._corpora[corpus], [row])
        return tried(item, partial(self._reader.read, margin=draw.margin))


def _as_it_is(read: Any) -> Any:
    return read
