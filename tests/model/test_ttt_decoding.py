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

# --- decoding --------------------------------------------------------------------------------------------------------


def step(layer: TTTMLP, x_RD: Tensor, state: TTTState) -> tuple[Tensor, TTTState]:
    """The next token of every row, [R, D]."""
    y, state = layer.extend(x_RD[:, None], state)
    return y[:, 0], state


def test_states_are_values_and_fast_weights_are_copied_on_commit_only() -> None:
    layer, x = make_layer(True), tokens(B, seed=4)
    state = layer.initial_state(3)
    for i in range(B):
        assert state.weights.rows == 1, "rows share one copy before their first commit"
        first = step(layer, x[i].expand(3, D), state)
        step(layer, tokens(3, seed=50 + i), state)  # Another continuation of the same state must not disturb it.
        again = step(layer, x[i].expand(3, D), state)
        assert torch.equal(first[0], again[0])
        state = again[1].select(torch.tensor([2, 0, 0]))  # beams that move copy none either
    assert (state.weights.rows, state.opened.length) == (3, 0)


def test_a_bidirectional_layer_does_not_decode() -> None:
    layer = make_layer(False)
    with pytest.raises(ValueError, match="bidirectional"):
        step(layer, tokens(2), layer.initial_state(2))


# --- one recording, window by window ---------------------------------------------------------------------------------


def test_carried_windows_of_whole_mini_batches_equal_one_sequence() -> None:
    layer = only_forward(make_layer(False))
    x = tokens(5 * B)
    whole = layer(x, Layout([len(x)]))
    first, state = layer.forward_carry(x[: 2 * B], None)
    second, _ = layer.forward_carry(x[2 * B :], state)
    assert_close(torch.cat([first, second]), whole, rtol=0, atol=1e-12)
    assert relative(second, layer(x[2 * B :], Layout([3 * B]))) > 1e-2, "carried and restarted windows must differ"


@pytest.mark.parametrize("window", [1, B + 1, 2 * B - 1])
def test_what_a_partial_mini_batch_learned_is_carried(window: int) -> None:
    layer, x = make_layer(False), tokens(window + B + 2)
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
