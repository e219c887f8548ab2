"""TTT-MLP over time: decoding step by step, reordered beams, and windows of one recording equal the full pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.model import ttt_reference as reference
from tests.model.ttt_reference import B, D, make_layer, only_forward, relative, tokens
from whisper_moe.model.ttt import TTTMLP, TTTState
from whisper_moe.packing import Layout

FORMS = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])


# --- decoding --------------------------------------------------------------------------------------------------------


def decode(layer: TTTMLP, x_RTD: Tensor, sizes: list[int]) -> Tensor:
    state = layer.initial_state(len(x_RTD))
    outputs = []
    for part in x_RTD.split(sizes, dim=1):
        y, state = layer.extend(part, state)
        outputs.append(y)
    assert state.count == x_RTD.shape[1] % B
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("sizes", [[1] * 15, [5, 1, 9], [3, 1, 1, 10], [4, 4, 7], [15]], ids=str)
def test_decoding_with_the_cache_equals_the_full_pass(sizes: list[int]) -> None:
    layer, rows = make_layer(True), 3
    x = tokens(rows * 15).view(rows, 15, D)
    full = layer(x.flatten(0, 1), Layout([15] * rows)).view(rows, 15, D)
    assert_close(decode(layer, x, sizes), full, rtol=0, atol=1e-12)


def step(layer: TTTMLP, x_RD: Tensor, state: TTTState) -> tuple[Tensor, TTTState]:
    """The next token of every row, [R, D]."""
    y, state = layer.extend(x_RD[:, None], state)
    return y[:, 0], state


def test_beams_reordered_across_commits_equal_each_beam_alone() -> None:
    """Every step picks other parents (some twice, some never), once fewer rows, before, at and after a commit."""
    layer, steps = make_layer(True), 3 * B + 2
    generator = torch.Generator().manual_seed(5)
    rows, state = 4, layer.initial_state(4)
    histories: list[list[Tensor]] = [[] for _ in range(rows)]
    for i in range(steps):
        x = tokens(rows, seed=100 + i)
        y, state = step(layer, x, state)
        histories = [[*past, token] for past, token in zip(histories, x, strict=True)]
        for past, output in zip(histories, y, strict=True):
            alone = layer(torch.stack(past), Layout([len(past)]))
            assert_close(output, alone[-1], rtol=0, atol=1e-12)
        parents = torch.randint(rows, (2 if i == 2 * B else 4,), generator=generator)
        state = state.select(parents)
        histories = [histories[int(p)] for p in parents]
        rows = len(parents)
        assert (state.rows, state.count) == (rows, (i + 1) % B)
        assert state.weights.rows == (1 if i + 1 < B else rows), "reordering alone copies no shared fast weights"
    assert len({tuple(map(id, past)) for past in histories}) > 1, "beams must differ"


def test_states_are_values_and_fast_weights_are_copied_on_commit_only() -> None:
    layer, x = make_layer(True), tokens(B, seed=4)
    state = layer.initial_state(3)
    for i in range(B):
        assert state.weights.rows == 1, "rows share one copy before their first commit"
        first = step(layer, x[i].expand(3, D), state)
        step(layer, tokens(3, seed=50 + i), state)  # Another continuation of the same state must not disturb it.
        again = step(layer, x[i].expand(3, D), state)
        assert torch.equal(first[0], again[0])
        state = again[1]
    assert (state.weights.rows, state.count) == (3, 0)


def test_a_bidirectional_layer_does_not_decode() -> None:
    layer = make_layer(False)
    with pytest.raises(ValueError, match="bidirectional"):
        step(layer, tokens(2), layer.initial_state(2))


# --- one recording, window by window ---------------------------------------------------------------------------------


@FORMS
def test_carried_windows_of_whole_mini_batches_equal_one_sequence(causal: bool) -> None:
    layer = make_layer(causal) if causal else only_forward(make_layer(causal))
    x = tokens(5 * B)
    whole = layer(x, Layout([len(x)]))
    first, state = layer.forward_carry(x[: 2 * B], None)
    second, _ = layer.forward_carry(x[2 * B :], state)
    assert_close(torch.cat([first, second]), whole, rtol=0, atol=1e-12)
    assert relative(second, layer(x[2 * B :], Layout([3 * B]))) > 1e-2, "carried and restarted windows must differ"


@FORMS
@pytest.mark.parametrize("window", [1, B + 1, 2 * B - 1])
def test_partial_mini_batch_is_flushed_with_the_factor_of_its_last_token(causal: bool, window: int) -> None:
    layer, x = make_layer(causal), tokens(window + B + 2)
    first, state = layer.forward_carry(x[:window], None)
    second, _ = layer.forward_carry(x[window:], state)
    expected, carried = reference.layer(layer, x[:window])
    assert_close(first, expected, rtol=0, atol=1e-12)
    assert_close(second, reference.layer(layer, x[window:], carried)[0], rtol=0, atol=1e-12)


def test_reversed_direction_is_never_carried() -> None:
    layer, x = make_layer(False), tokens(2 * B + 1)
    layer.gate_forward.data.zero_()
    _, state = layer.forward_carry(tokens(B + 3, seed=2), None)
    carried, _ = layer.forward_carry(x, state)
    assert_close(carried, layer(x, Layout([len(x)])), rtol=0, atol=1e-12)
