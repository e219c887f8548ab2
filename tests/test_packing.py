"""Packs: every segment once, none too full, always the same; and where the tokens of a layout lie."""

from __future__ import annotations

import random
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from whisper_moe.config import MAX_PACK_TOKENS
from whisper_moe.packing import Layout, first_fit_decreasing

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=30)
PACKABLE = st.integers(1, 60).flatmap(
    lambda capacity: st.tuples(st.lists(st.integers(1, capacity), max_size=40), st.just(capacity))
)


@settings(deadline=None)
@given(PACKABLE)
def test_every_segment_is_in_one_pack_and_no_pack_is_too_full(case: tuple[list[int], int]) -> None:
    lengths, capacity = case
    packs = first_fit_decreasing(lengths, capacity)
    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in pack) <= capacity for pack in packs)


@settings(deadline=None)
@given(PACKABLE)
def test_each_segment_goes_into_the_first_pack_that_has_room(case: tuple[list[int], int]) -> None:
    """The definition, followed step by step: longest first, equal lengths in their order."""
    lengths, capacity = case
    packs = first_fit_decreasing(lengths, capacity)
    home = {index: number for number, pack in enumerate(packs) for index in pack}
    filled = [0] * len(packs)
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        assert all(room + lengths[index] > capacity for room in filled[: home[index]])
        filled[home[index]] += lengths[index]


@settings(deadline=None)
@given(PACKABLE)
def test_at_most_one_pack_is_no_more_than_half_full(case: tuple[list[int], int]) -> None:
    lengths, capacity = case
    used = [sum(lengths[i] for i in pack) for pack in first_fit_decreasing(lengths, capacity)]
    assert sum(2 * tokens <= capacity for tokens in used) <= 1


@settings(deadline=None)
@given(PACKABLE, st.randoms(use_true_random=False))
def test_packing_is_deterministic_and_the_order_of_arrival_hardly_matters(
    case: tuple[list[int], int], shuffler: random.Random
) -> None:
    lengths, capacity = case
    packs = first_fit_decreasing(lengths, capacity)
    assert first_fit_decreasing(tuple(lengths), capacity) == packs
    shuffled = shuffler.sample(lengths, len(lengths))
    again = first_fit_decreasing(shuffled, capacity)
    assert [[shuffled[i] for i in pack] for pack in again] == [[lengths[i] for i in pack] for pack in packs]


def test_a_full_window_and_the_longest_transcript_share_a_pack() -> None:
    assert first_fit_decreasing([448, 1500, 101]) == [[1, 0], [2]]
    assert first_fit_decreasing([448, 1500, 100]) == [[1, 0, 2]]
    assert MAX_PACK_TOKENS == 1500 + 448 + 100


@pytest.mark.parametrize("wrong", [0, -1, MAX_PACK_TOKENS + 1])
def test_a_segment_that_fits_into_no_pack_is_refused_by_its_number(wrong: int) -> None:
    with pytest.raises(ValueError, match=rf"segment 1 has {wrong} tokens; a pack holds 1 to 2048"):
        first_fit_decreasing([5, wrong, 7])


@settings(deadline=None)
@given(LENGTHS)
def test_a_layout_covers_its_tensor_segment_by_segment(lengths: list[int]) -> None:
    layout = Layout(iter(lengths))
    rows = range(layout.total)
    pieces = [list(rows[span]) for span in layout.slices()]
    assert [len(piece) for piece in pieces] == lengths == list(layout.lengths)
    assert [row for piece in pieces for row in piece] == list(rows)
    assert layout.cu_seqlens[0] == 0 and layout.cu_seqlens[-1] == layout.total == sum(lengths)
    assert len(layout) == len(lengths)
    ids = layout.segment_ids()
    assert ids.dtype == torch.int64
    assert ids.tolist() == [segment for segment, piece in enumerate(pieces) for _ in piece]


@settings(deadline=None)
@given(LENGTHS)
def test_positions_restart_at_every_segment(lengths: list[int]) -> None:
    positions = Layout(lengths).positions()
    assert positions.dtype == torch.int64
    assert positions.tolist() == [place for length in lengths for place in range(length)]


@pytest.mark.parametrize("lengths", [[], [3, 0], [-1]])
def test_a_layout_without_tokens_is_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"at least one token; got {tuple(lengths)}")):
        Layout(lengths)
