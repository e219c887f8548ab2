"""int8 rows: how far off, and stable."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("transformers")
from weights.whispers import CONFIGS

from whisper_moe.model.int8 import Int8Rows
from whisper_moe.weights.parts import expected_shapes, quantizable


def restored(levels: Tensor, scale: Tensor) -> Tensor:
    out = torch.full(levels.shape, float("nan"))
    Int8Rows(levels, scale).dequantize_into(out)
    return out


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    rows = Int8Rows.of(weight)
    return rows.levels, rows.scale


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """Rows of very different sizes, some of them zero, some with one outlier."""
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    exponents = torch.tensor(draw(st.lists(st.integers(-30, 30), min_size=rows, max_size=rows)))
    weight = torch.randn(rows, columns, generator=generator) * 10.0 ** exponents[:, None]
    weight[:, 0] *= draw(st.sampled_from([1, 1000, 0]))
    weight[0] *= draw(st.sampled_from([1, 0]))
    return weight


@settings(deadline=None, max_examples=200)
@given(matrices())
def test_an_error_is_at_most_half_a_step_of_its_own_row(weight: Tensor) -> None:
    levels, scale = quantize_rows(weight)
    assert levels.dtype == torch.int8 and scale.dtype == torch.float32
    assert levels.abs().max() <= 127
    step = weight.abs().amax(1, keepdim=True).double() / 127
    assert ((restored(levels, scale).double() - weight.double()).abs() <= step * 0.5001).all()


@settings(deadline=None, max_examples=200)
@given(matrices())
def test_quantising_again_gives_the_same_bits(weight: Tensor) -> None:
    levels, scale = quantize_rows(weight)
    again, scale_again = quantize_rows(restored(levels, scale))
    assert torch.equal(levels, again)
    assert torch.equal(scale, scale_again)


def test_every_scale_is_found_again() -> None:
    """All mantissas of float32 as a row's largest number."""
    largest = (torch.arange(2**23, dtype=torch.int32) + (127 << 23)).view(torch.float32)[:, None]
    levels, scale = quantize_rows(largest)
    assert (levels == 127).all()
    assert torch.equal(quantize_rows(restored(levels, scale))[1], scale)


def test_rows_of_zeros_stay_zeros_and_rows_do_not_see_each_other() -> None:
    weight = torch.randn(6, 50)
    weight[2] = 0
    levels, scale = quantize_rows(weight)
    assert scale[2] == 0 and not restored(levels, scale)[2].any()
    loud = weight.clone()
    loud[0] *= 1e6
    assert torch.equal(quantize_rows(loud)[0][1:], levels[1:])


def test_a_matrix_larger_than_the_chunks_is_restored_everywhere() -> None:
    weight = torch.randn(700, 512)
    levels, scale = quantize_rows(weight)
    assert torch.equal(restored(levels, scale), levels * scale)


def test_what_is_quantised_is_every_large_matrix_and_nothing_else() -> None:
    """By shape, in a model that has everything: matrices of linear layers, experts, and the embedding."""
    shapes = (
        expected_shapes(CONFIGS["shared"]) | expected_shapes(CONFIGS["per expert"]) | expected_shapes(CONFIGS["token"])
    )
    kept = ("stem", "positions", "router", "ttt")
    expected = {
        key
        for key, shape in shapes.items()
        if len(shape) - (".experts." in key) == 2 and not any(word in key for word in kept) and "bias" not in key
    }
    assert {key for key in shapes if quantizable(key)} == expected
    assert len(expected) > 20
    assert quantizable("encoder.blocks.2.experts.1.up_weight")
    assert not quantizable("encoder.blocks.2.experts.1.up_bias")
