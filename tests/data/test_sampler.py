"""Every sample once, shares by the formula, no pack too full, equal batches, and any place to go on from."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whisper_moe.config import MAX_PACK_TOKENS
from whisper_moe.data.examples import positions
from whisper_moe.data.sample import Skipped
from whisper_moe.data.sampler import (
    Draw,
    Group,
    LoaderConfig,
    PlannedBatch,
    Position,
    epoch_rows,
    merged,
    plan,
    quotas,
    shares,
)

SMALL = st.fixed_dictionaries(
    {
        "batch_size": st.integers(1, 9),
        "batch_unit": st.sampled_from(["packs", "examples"]),
        "planning_buffer": st.integers(1, 25),
        "seed": st.integers(0, 3),
    }
).map(LoaderConfig.model_validate)
SIZES = st.lists(st.integers(1, 1_900), min_size=1, max_size=60)


def planned(sizes: Sequence[int], config: LoaderConfig, start: Position | None = None) -> list[PlannedBatch]:
    start = start or Position()
    order = [Draw((0, number), 0.0, size) for number, size in enumerate(sizes)]
    return list(plan(order[start.cursor :], start, config))


def number(draw: Draw) -> int:
    assert isinstance(draw.source, tuple)
    return draw.source[1]


def numbers(batches: Sequence[PlannedBatch]) -> list[list[list[int]]]:
    return [[list(map(number, pack)) for pack in batch.packs] for batch in batches]


@settings(deadline=None)
@given(SIZES, SMALL)
def test_every_draw_is_in_one_pack_and_no_pack_is_too_full(sizes: list[int], config: LoaderConfig) -> None:
    batches = planned(sizes, config)
    packs = [pack for batch in batches for pack in batch.packs]
    assert sorted(n for batch in numbers(batches) for pack in batch for n in pack) == list(range(len(sizes)))
    assert all(0 < sum(draw.size for draw in pack) <= MAX_PACK_TOKENS for pack in packs)


@settings(deadline=None)
@given(SIZES, SMALL)
def test_batches_are_of_the_size_that_is_asked_for(sizes: list[int], config: LoaderConfig) -> None:
    """Packs never more, examples in the mean; of an epoch's last window there may be fewer."""
    batches = planned(sizes, config)
    counts = [len(b.packs) if config.batch_unit == "packs" else sum(map(len, b.packs)) for b in batches]
    assert min(counts) >= 1
    if config.batch_unit == "packs":
        assert max(counts) <= config.batch_size
    else:
        assert max(counts) < 2 * config.batch_size or max(counts) == 1
        assert len(batches) == -(-len(sizes) // config.batch_size)
        assert all(len(pack) <= config.batch_size for batch in batches for pack in batch.packs)


@settings(deadline=None)
@given(SIZES, SMALL)
def test_a_plan_goes_on_from_every_position_as_if_it_had_never_stopped(sizes: list[int], config: LoaderConfig) -> None:
    batches = planned(sizes, config)
    for done, batch in enumerate(batches, 1):
        after = Position.model_validate(json.loads(json.dumps(batch.after.model_dump())))
        if done == len(batches):
            assert after == Position(epoch=1)
        else:
            assert planned(sizes, config, after) == batches[done:]


@settings(deadline=None)
@given(SIZES, SMALL, st.integers(1, 6))
def test_ranks_divide_every_batch_among_them(sizes: list[int], config: LoaderConfig, world: int) -> None:
    for batch in planned(sizes, config):
        shares = [batch.share(rank, world) for rank in range(world)]
        divided = sorted(number(draw) for share in shares for pack in share for draw in pack)
        assert divided == sorted(number(draw) for pack in batch.packs for draw in pack)
        packs = [len(share) for share in shares]
        assert max(packs) - min(packs) <= 1
        assert min(packs) > 0 or len(divided) < world
        if len(batch.packs) >= world:
            assert {pack for share in shares for pack in share} == set(batch.packs)


def kathbath_like(count: int, margin: float, seed: int = 0) -> list[int]:
    """Positions and tokens of 3 to 10 s of speech (lognormal, mean 5.7 s), 14 tokens a second as in Indian scripts."""
    generator = np.random.default_rng(seed)
    seconds = np.clip(generator.lognormal(1.7, 0.3, count), 3, 10)
    tokens = generator.normal(14, 3, count).clip(5) * seconds
    return [positions(round(s * 16_000), margin, 1_500) + 4 + int(t) for s, t in zip(seconds, tokens, strict=True)]


@pytest.mark.parametrize("margin", [0.0, 0.5, 2.5])
@pytest.mark.parametrize(("unit", "size"), [("examples", 32), ("packs", 32), ("examples", 8)])
def test_packs_of_clips_of_3_to_10_seconds_are_95_percent_full(unit: str, size: int, margin: float) -> None:
    config = LoaderConfig.model_validate({"batch_unit": unit, "batch_size": size})
    sizes = kathbath_like(6_000, margin)
    batches = planned(sizes, config)
    packs = sum(len(batch.packs) for batch in batches)
    assert sum(sizes) / (packs * MAX_PACK_TOKENS) >= (0.95 if size == 32 else 0.94)
    examples = [sum(map(len, batch.packs)) for batch in batches]
    if unit == "examples":
        assert np.mean(examples) == 6_000 / len(batches) and np.std(examples) < 4
    else:
        assert np.mean([len(batch.packs) for batch in batches]) > 0.9 * size


def test_batches_are_not_sorted_by_length() -> None:
    """First-fit in decreasing order puts the longest first; what is handed out must not."""
    batches = planned(kathbath_like(4_000, 0.5), LoaderConfig(planning_buffer=1_000))
    means = [np.mean([draw.size for pack in batch.packs for draw in pack]) for batch in batches]
    overall = np.mean(means)
    assert abs(np.corrcoef(np.arange(len(means)), means)[0, 1]) < 0.3
    assert max(means) < 1.3 * overall and min(means) > 0.7 * overall


def test_seed_and_epoch_shuffle_anew() -> None:
    sizes = kathbath_like(200, 0.5)
    config = LoaderConfig(batch_size=4)
    first = numbers(planned(sizes, config))
    assert first == numbers(planned(sizes, config))
    assert first != numbers(planned(sizes, config.model_copy(update={"seed": 1})))
    assert first != numbers(planned(sizes, config, Position(epoch=1)))


def test_an_epoch_without_samples_has_no_batches() -> None:
    assert planned([], LoaderConfig()) == []


def test_what_is_skipped_is_told_once_with_the_first_batch_of_its_window() -> None:
    def order(cursor: int) -> Iterator[Draw | Skipped]:
        for number in range(cursor, 14):
            left_out = number % 3 == 0 or number >= 12
            yield Skipped(id=str(number), cause="") if left_out else Draw((0, number), 0.0, 1_500)

    config = LoaderConfig(batch_size=2, planning_buffer=6)
    batches = list(plan(order(0), Position(), config))
    told = [[sample.id for sample in batch.skipped] for batch in batches]
    assert told == [["0", "3"], [], ["6", "9"], [], ["12", "13"]] and batches[-1].packs == ()
    resumed = list(plan(order(0), batches[0].after, config))
    assert [[sample.id for sample in batch.skipped] for batch in resumed] == told[1:]


# Mixing.

HINDI = Group("kathbath", "transcribe", "hi")
TAMIL = Group("kathbath", "transcribe", "ta")
MORE_TAMIL = Group("fleurs", "transcribe", "ta")
ENGLISH = Group("fleurs", "translate", "en")
COUNTS = {HINDI: 8_000, TAMIL: 500, MORE_TAMIL: 500, ENGLISH: 100}


def epoch_of(counts: dict[Group, int], seed: int = 0, epoch: int = 0, **weights: float) -> list[int]:
    """Rows of groups that follow each other."""
    ends = np.cumsum(list(counts.values())).tolist()
    groups = {group: np.arange(end - counts[group], end) for group, end in zip(counts, ends, strict=True)}
    quota = quotas(shares(counts, weights), ends[-1])
    return epoch_rows(groups, quota, seed, epoch)


def drawn(rows: Sequence[int] | np.ndarray, counts: dict[Group, int]) -> dict[Group, int]:
    edges = np.cumsum(list(counts.values()))
    found = Counter(np.searchsorted(edges, rows, side="right").tolist())
    return {name: found[index] for index, name in enumerate(counts)}


def test_the_weight_of_a_corpus_multiplies_its_samples() -> None:
    share = shares(COUNTS, {"fleurs": 4})
    assert sum(share.values()) == pytest.approx(1)
    assert share[HINDI] == pytest.approx(8_000 / 10_900)
    assert share[MORE_TAMIL] == pytest.approx(4 * share[TAMIL]) == pytest.approx(2_000 / 10_900)
    counted = drawn(epoch_of(COUNTS, fleurs=4), COUNTS)
    assert sum(counted.values()) == sum(COUNTS.values())
    for group, count in counted.items():
        assert abs(count - share[group] * sum(COUNTS.values())) < 1


GROUPS = st.lists(st.integers(1, 40), min_size=1, max_size=5).map(
    lambda counts: {Group("ab"[i % 2], "transcribe", str(i)): count for i, count in enumerate(counts)}
)


@settings(deadline=None)
@given(GROUPS, st.floats(0.1, 8), st.integers(0, 500))
def test_quotas_are_whole_numbers_next_to_the_shares(counts: dict[Group, int], weight: float, total: int) -> None:
    share = shares(counts, {"b": weight})
    quota = quotas(share, total)
    assert sum(quota.values()) == total
    assert all(math.floor(share[g] * total - 1e-6) <= n <= math.ceil(share[g] * total + 1e-6) for g, n in quota.items())


@settings(deadline=None)
@given(GROUPS, st.integers(0, 3), st.integers(0, 3))
def test_without_weights_every_row_comes_once_in_every_epoch(counts: dict[Group, int], seed: int, e: int) -> None:
    assert sorted(epoch_of(counts, seed, e)) == list(range(sum(counts.values())))


@settings(deadline=None)
@given(GROUPS, st.floats(0.1, 8))
def test_nothing_of_a_group_comes_again_before_all_of_it_came(counts: dict[Group, int], weight: float) -> None:
    seen = Counter(row for epoch in range(4) for row in epoch_of(counts, 0, epoch, b=weight))
    edges = [0, *np.cumsum(list(counts.values())).tolist()]
    for first, last in itertools.pairwise(edges):
        times = [seen[row] for row in range(first, last)]
        assert max(times) - min(times) <= 1


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    rows = [tuple(epoch_of(COUNTS, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(rows)) == 4
    assert tuple(epoch_of(COUNTS, 1, 1)) == rows[3]
    place = np.argsort(rows[0])  # where each row went: as likely far as near
    assert abs(np.corrcoef(place, np.arange(len(place)))[0, 1]) < 0.05


def test_a_group_keeps_its_order_when_others_join() -> None:
    alone, together = epoch_of({HINDI: 50}), epoch_of({HINDI: 50, ENGLISH: 50})
    assert {row for row in together if row < 50} == set(alone)


def test_streams_are_merged_by_weight_and_read_to_their_ends() -> None:
    def streams() -> dict[str, object]:
        return {name: iter([f"{name}{i}" for i in range(2_000)]) for name in "ab"}

    both = list(merged(streams(), {"a": 3.0, "b": 1.0}, 5, 0))  # pyright: ignore[reportArgumentType]
    assert sorted(both) == sorted(f"{name}{i}" for name in "ab" for i in range(2_000))
    assert [item for item in both if item[0] == "a"] == [f"a{i}" for i in range(2_000)]
    share = sum(item[0] == "a" for item in both[:2_000]) / 2_000
    assert abs(share - 0.75) < 4 * math.sqrt(0.75 * 0.25 / 2_000)
    assert both == list(merged(streams(), {"a": 3.0, "b": 1.0}, 5, 0))  # pyright: ignore[reportArgumentType]
    assert both != list(merged(streams(), {"a": 3.0, "b": 1.0}, 5, 1))  # pyright: ignore[reportArgumentType]
