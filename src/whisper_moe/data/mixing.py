"""Which sample comes next: an order for each epoch that depends on the seed alone.

Groups (corpus, task, language) are mixed by temperature: a task and language of n samples gets a share ∝ n^(1/T), as in
multilingual pre-training (mBERT, XLM arXiv 1901.07291 section 3.1, mT5 arXiv 2010.11934 section 3.2, whose exponent is
1/T). Shares are met exactly, by quotas and not by drawing lots, and a group that gets fewer samples than it has goes on
in the next epoch where it stopped: nothing is seen twice before everything of its group was seen once.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from random import Random
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

_PASSES, _EPOCHS = 1, 2
"""What a random generator is for: the first number of its seed keeps the two apart."""

_T = TypeVar("_T")


class MixingConfig(BaseModel):
    """How often each corpus, task and language is heard."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    temperature: float = Field(default=1.0, gt=0)
    """T in p ∝ n^(1/T) over pairs of task and language. 1: as they are; 5: small ones come oftener; large: all alike."""
    weights: dict[str, float] = Field(default_factory=dict)
    """Corpus name → how many samples each of its own counts for; 1 where nothing is said, 0 leaves it out."""


class Group(NamedTuple):
    """Samples that are alike for mixing."""

    corpus: str
    task: str
    language: str


def shares(counts: Mapping[Group, int], config: MixingConfig) -> dict[Group, float]:
    """The share of an epoch that each group gets; they sum to 1.

    Weights make n weighted counts: n of a task and language is summed over corpora, and its share is divided among the
    corpora by their weighted counts. Raises ``ValueError`` for a weight of a corpus that is not there, a negative weight,
    and where nothing is left.
    """
    check_weights(config.weights, {group.corpus for group in counts})
    weighted = {group: count * config.weights.get(group.corpus, 1.0) for group, count in counts.items()}
    totals: dict[tuple[str, str], float] = defaultdict(float)
    for group, count in weighted.items():
        totals[group[1:]] += count
    heat = {key: total ** (1 / config.temperature) for key, total in totals.items() if total}
    if not heat:
        raise ValueError("there is nothing to mix: every corpus is empty or has the weight 0")
    scale = sum(heat.values())
    return {
        group: heat[group[1:]] / scale * count / totals[group[1:]] if count else 0.0
        for group, count in weighted.items()
    }


def check_weights(weights: Mapping[str, float], corpora: set[str]) -> None:
    """Raise ``ValueError`` for a weight that is negative or belongs to no corpus."""
    if unknown := sorted(set(weights) - corpora):
        raise ValueError(f"mixing.weights names {unknown}; the corpora are {sorted(corpora)}")
    if negative := {name: weight for name, weight in weights.items() if weight < 0}:
        raise ValueError(f"mixing.weights must not be negative, got {negative}")


def quotas(share: Mapping[Group, float], total: int) -> dict[Group, int]:
    """``total`` samples divided by ``share``: largest remainders, ties in the order of the groups' names."""
    exact = {group: part * total for group, part in share.items()}
    whole = {group: int(value + 1e-9) for group, value in exact.items()}
    by_remainder = sorted(exact, key=lambda group: (whole[group] - exact[group], group))
    eligible = [group for group in by_remainder if share[group] > 0]
    for group in eligible[: total - sum(whole.values())]:
        whole[group] += 1
    return whole


class EpochOrder:
    """Rows of map-style corpora in the order in which an epoch takes them."""

    def __init__(self, names: Sequence[Group], group_R: NDArray[np.int32], config: MixingConfig, seed: int) -> None:
        """``group_R``: for each of R rows the index of its group in ``names``."""
        self._names, self._seed = list(names), seed
        self._rows = [np.flatnonzero(group_R == index) for index in range(len(names))]
        counts = {name: len(rows) for name, rows in zip(self._names, self._rows, strict=True)}
        self.quotas = quotas(shares(counts, config), sum(counts.values()))
        """Samples of each group in an epoch; together as many as there are rows."""

    def rows(self, epoch: int) -> NDArray[np.int64]:
        """[R] rows. With temperature 1 and equal weights each row comes exactly once."""
        parts = [self._continued(index, epoch) for index in range(len(self._names))]
        rows = np.concatenate(parts)
        return rows[seeded(self._seed, _EPOCHS, epoch).permutation(len(rows))]

    def _continued(self, index: int, epoch: int) -> NDArray[np.int64]:
        """The group's next quota of its own endless sequence: one shuffled pass over its rows after another."""
        rows, quota = self._rows[index], self.quotas[self._names[index]]
        if not quota:
            return rows[:0]
        key = zlib.crc32("/".join(self._names[index]).encode())
        start, size = epoch * quota, len(rows)
        first, last = start // size, (start + quota - 1) // size
        passes = [rows[seeded(self._seed, _PASSES, key, n).permutation(size)] for n in range(first, last + 1)]
        return np.concatenate(passes)[start - first * size :][:quota]


def stream_weights(sizes: Mapping[str, int | None], config: MixingConfig) -> dict[str, float]:
    """How likely each stream is to give the next sample. By size and temperature where all sizes are known, else by
    weight alone; a temperature then raises ``ValueError``, for there is nothing to apply it to."""
    check_weights(config.weights, set(sizes))
    unknown = [name for name, size in sizes.items() if size is None]
    if unknown and config.temperature != 1:
        raise ValueError(f"mixing.temperature needs sizes, which streams lack ({', '.join(unknown)}): give weights")
    weighted = {name: config.weights.get(name, 1.0) * (1 if unknown else size or 0) for name, size in sizes.items()}
    return {name: weight ** (1 / config.temperature) if weight else 0.0 for name, weight in weighted.items()}


def merged(streams: Mapping[str, Iterator[_T]], weights: Mapping[str, float], seed: int, epoch: int) -> Iterator[_T]:
    """Streams as one, each read once to its end; the choice among those not yet at their end is by weight."""
    draw = Random(f"{seed} {epoch}")
    open_streams = {name: stream for name, stream in streams.items() if weights[name] > 0}
    while open_streams:
        (chosen,) = draw.choices(list(open_streams), [weights[name] for name in open_streams])
        try:
            yield next(open_streams[chosen])
        except StopIteration:
            del open_streams[chosen]


def stream_rows(size: int, name: str, seed: int, epoch: int) -> list[int]:
    """A shuffled pass over a map-style corpus that is read among streams."""
    return seeded(seed, _PASSES, zlib.crc32(name.encode()), epoch).permutation(size).tolist()


def seeded(*seed: int) -> np.random.Generator:
    """Random numbers that depend on these numbers alone."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))
