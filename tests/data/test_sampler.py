"""Plans: every sample once, no pack too full, equal batches, shares that add up, and any place to go on from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whisper_moe.config import MAX_PACK_TOKENS
from whisper_moe.data.examples import positions
from whisper_moe.data.sample import Skipped
from whisper_moe.data.sampler import Draw, LoaderConfig, PlannedBatch, Position, plan

SMALL = st.fixed_dictionaries(
    {
        "batch_size": st.integers(1, 9),
        "batch_unit": st.sampled_from(["packs", "examples"]),
        "mode": st.sampled_from(["packed", "padded"]),
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
    if config.mode == "padded":
        assert all(len(pack) == 1 for pack in packs)


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
    padded = planned(sizes, config.model_copy(update={"mode": "padded"}))
    assert sum(len(batch.packs) for batch in padded) == 6_000


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


@pytest.mark.parametrize("state", [{"epoch": -1}, {"cursor": "0"}, {"done": 1.5}, {"index": 0}])
def test_what_is_no_position_is_refused(state: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(state))):
        Position.model_validate(state)


@pytest.mark.parametrize("change", [{"batch_size": 0}, {"batch_unit": "clips"}, {"workers": -1}, {"batchsize": 3}])
def test_bad_settings_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        LoaderConfig.model_validate(change)
