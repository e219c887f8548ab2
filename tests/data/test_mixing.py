"""Mixing: shares by the formula, quotas that lose nobody, an order that depends on the seed alone."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whisper_moe.data.sampler import Group, MixingConfig, epoch_rows, merged, quotas, shares, stream_weights

HINDI = Group("kathbath", "transcribe", "hi")
TAMIL = Group("kathbath", "transcribe", "ta")
MORE_TAMIL = Group("fleurs", "transcribe", "ta")
ENGLISH = Group("fleurs", "translate", "en")
COUNTS = {HINDI: 8_000, TAMIL: 500, MORE_TAMIL: 500, ENGLISH: 100}


class order:
    """Rows of groups that follow each other."""

    def __init__(self, counts: dict[Group, int], seed: int = 0, **settings: object) -> None:
        ends = np.cumsum(list(counts.values())).tolist()
        self.groups = {group: np.arange(end - counts[group], end) for group, end in zip(counts, ends, strict=True)}
        self.quotas = quotas(shares(counts, MixingConfig.model_validate(settings)), ends[-1])
        self.seed = seed

    def rows(self, epoch: int) -> np.ndarray:
        return np.array(epoch_rows(self.groups, self.quotas, self.seed, epoch))


def drawn(rows: Sequence[int] | np.ndarray, counts: dict[Group, int]) -> dict[Group, int]:
    edges = np.cumsum(list(counts.values()))
    found = Counter(np.searchsorted(edges, rows, side="right").tolist())
    return {name: found[index] for index, name in enumerate(counts)}


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0, 100.0])
def test_a_task_and_language_gets_n_to_the_power_of_one_over_t(temperature: float) -> None:
    share = shares(COUNTS, MixingConfig(temperature=temperature))
    heat = {"hi": 8_000 ** (1 / temperature), "ta": 1_000 ** (1 / temperature), "en": 100 ** (1 / temperature)}
    assert sum(share.values()) == pytest.approx(1)
    assert share[HINDI] == pytest.approx(heat["hi"] / sum(heat.values()))
    assert share[TAMIL] == share[MORE_TAMIL] == pytest.approx(heat["ta"] / sum(heat.values()) / 2)
    assert share[ENGLISH] == pytest.approx(heat["en"] / sum(heat.values()))
    counted = drawn(order(COUNTS, temperature=temperature).rows(0), COUNTS)
    assert sum(counted.values()) == sum(COUNTS.values())
    for group, count in counted.items():
        assert abs(count - share[group] * sum(COUNTS.values())) < 1


def test_the_weight_of_a_corpus_multiplies_its_samples() -> None:
    share = shares(COUNTS, MixingConfig(weights={"fleurs": 4}))
    assert share[HINDI] == pytest.approx(8_000 / 10_900)
    assert share[MORE_TAMIL] == pytest.approx(4 * share[TAMIL]) == pytest.approx(2_000 / 10_900)
    none = shares(COUNTS, MixingConfig(weights={"kathbath": 0}, temperature=2))
    assert none[HINDI] == none[TAMIL] == 0 and sum(none.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("weights", "message"),
    [({"katbath": 2}, "'katbath'"), ({"fleurs": -1}, "negative"), ({"fleurs": 0, "kathbath": 0}, "nothing to mix")],
)
def test_weights_that_mean_nothing_are_refused(weights: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shares(COUNTS, MixingConfig(weights=weights))


GROUPS = st.lists(st.integers(1, 40), min_size=1, max_size=5).map(
    lambda counts: {Group("c", "transcribe", str(i)): count for i, count in enumerate(counts)}
)


@settings(deadline=None)
@given(GROUPS, st.floats(0.5, 8), st.integers(0, 500))
def test_quotas_are_whole_numbers_next_to_the_shares(counts: dict[Group, int], heat: float, total: int) -> None:
    share = shares(counts, MixingConfig(temperature=heat))
    quota = quotas(share, total)
    assert sum(quota.values()) == total
    assert all(math.floor(share[g] * total - 1e-6) <= n <= math.ceil(share[g] * total + 1e-6) for g, n in quota.items())


@settings(deadline=None)
@given(GROUPS, st.integers(0, 3), st.integers(0, 3))
def test_without_temperature_every_row_comes_once_in_every_epoch(counts: dict[Group, int], seed: int, e: int) -> None:
    rows = order(counts, seed).rows(e)
    assert sorted(rows.tolist()) == list(range(sum(counts.values())))


@settings(deadline=None)
@given(GROUPS, st.floats(1.5, 8))
def test_nothing_of_a_group_comes_again_before_all_of_it_came(counts: dict[Group, int], heat: float) -> None:
    mixed = order(counts, temperature=heat)
    seen = Counter(row for epoch in range(4) for row in mixed.rows(epoch).tolist())
    edges = [0, *np.cumsum(list(counts.values())).tolist()]
    for first, last in itertools.pairwise(edges):
        times = [seen[row] for row in range(first, last)]
        assert max(times) - min(times) <= 1


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    rows = [tuple(order(COUNTS, seed).rows(epoch)) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(rows)) == 4
    assert tuple(order(COUNTS, 1).rows(1)) == rows[3]
    place = np.argsort(rows[0])  # where each row went: as likely far as near
    assert abs(np.corrcoef(place, np.arange(len(place)))[0, 1]) < 0.05


def test_a_group_keeps_its_order_when_others_join() -> None:
    alone = order({HINDI: 50}, temperature=2).rows(0)
    together = order({HINDI: 50, ENGLISH: 50}, temperature=2).rows(0)
    assert set(together[together < 50].tolist()) == set(alone.tolist())


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


def test_a_temperature_needs_sizes() -> None:
    sizes = {"a": 400, "b": 100}
    assert stream_weights(sizes, MixingConfig(temperature=2)) == {"a": 20, "b": 10}
    with pytest.raises(ValueError, match="b"):
        stream_weights({"a": 400, "b": None}, MixingConfig(temperature=2))
    assert stream_weights({"a": 400, "b": None}, MixingConfig(weights={"b": 3})) == {"a": 1, "b": 3}


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": float("nan")}, {"heat": 1}])
def test_bad_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"temperature|heat"):
        MixingConfig.model_validate(settings)
