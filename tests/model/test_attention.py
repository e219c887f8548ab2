"""Attention: the loop over segments is the masked product over the pack, and the cache is the past."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.model.masked_oracle import masked_cross_attention, masked_self_attention
from tests.model.tiny import relative
from whisper_moe.model.attention import CrossAttention, KeyValueCache, SelfAttention
from whisper_moe.packing import Layout

D, H = 24, 3
RAGGED = Layout([5, 1, 37, 2, 1, 16])
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=["f64", "f32"])
FORMS = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make_self(causal: bool, dtype: torch.dtype = torch.float64) -> SelfAttention:
    torch.manual_seed(0)
    attention = SelfAttention(D, H, causal=causal).to(dtype)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return attention


def make_cross(dtype: torch.dtype = torch.float64) -> CrossAttention:
    torch.manual_seed(0)
    attention = CrossAttention(D, H).to(dtype)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return attention


def agree(ours: Tensor, oracle: Tensor, leaves: dict[str, Tensor], tolerance: float) -> None:
    """Values and gradients of everything that went in."""
    assert relative(ours, oracle) < tolerance
    weight = normal(*ours.shape, dtype=ours.dtype, seed=9)
    found, expected = (torch.autograd.grad((y * weight).sum(), list(leaves.values())) for y in (ours, oracle))
    for name, a, b in zip(leaves, found, expected, strict=True):
        assert b.abs().max() > 1e-3, f"{name} gets no gradient"
        assert relative(a, b) < tolerance, name


@FORMS
@DTYPES
def test_self_attention_is_the_masked_product(dtype: torch.dtype, causal: bool) -> None:
    attention, x = make_self(causal, dtype), normal(RAGGED.total, D, dtype=dtype).requires_grad_()
    ours, oracle = attention(x, RAGGED), masked_self_attention(attention, x, RAGGED)
    agree(ours, oracle, {"x": x} | dict(attention.named_parameters()), TOLERANCE[dtype])
    whole = masked_self_attention(attention, x, Layout([RAGGED.total]))
    assert relative(ours, whole) > 0.1, "the mask must matter, or this compares nothing"


@DTYPES
def test_cross_attention_is_the_masked_product(dtype: torch.dtype) -> None:
    heard = Layout([9, 1, 4, 30, 2, 8])
    attention, x = make_cross(dtype), normal(RAGGED.total, D, dtype=dtype).requires_grad_()
    states = normal(heard.total, D, dtype=dtype, seed=2).requires_grad_()
    ours = attention(x, RAGGED, attention.cache(states, heard))
    oracle = masked_cross_attention(attention, x, RAGGED, states, heard)
    agree(ours, oracle, {"x": x, "states": states} | dict(attention.named_parameters()), TOLERANCE[dtype])
    whole = masked_cross_attention(attention, x, Layout([RAGGED.total]), states, Layout([heard.total]))
    assert relative(ours, whole) > 0.1, "the mask must matter, or this compares nothing"


def empty_cache(rows: int, capacity: int) -> KeyValueCache:
    return KeyValueCache.empty(rows, H, capacity, D // H, normal(1))


@pytest.mark.parametrize("sizes", [[1] * 11, [4, 1, 6], [11], [1, 10]], ids=str)
@pytest.mark.parametrize("capacity", [2, 5, 16])
def test_extending_the_cache_equals_the_whole_pass(sizes: list[int], capacity: int) -> None:
    """Also where it must grow, by doubling or by more than that."""
    rows, n = 3, sum(sizes)
    attention, x = make_self(True), normal(rows, n, D)
    expected = attention(x.flatten(0, 1), Layout([n] * rows)).view(rows, n, D)
    cache = empty_cache(rows, capacity)
    cache.keys.fill_(torch.nan)  # what lies behind the filled part is never read
    with torch.no_grad():
        steps = [attention.extend(part.flatten(0, 1), cache).view(rows, -1, D) for part in x.split(sizes, dim=1)]
    assert relative(torch.cat(steps, dim=1), expected) < 1e-12
    assert cache.length == n <= cache.keys.shape[2]


def test_keys_start_without_a_bias_as_in_whisper() -> None:
    alone, cross = SelfAttention(D, H, causal=True).qkv.bias.detach(), CrossAttention(D, H).kv.bias.detach()
    assert not alone[D : 2 * D].any() and alone[:D].any() and alone[2 * D :].any()
    assert not cross[:D].any() and cross[D:].any()


@FORMS
def test_short_segments_side_by_side_are_what_each_is_in_the_loop(causal: bool) -> None:
    """Training pads short segments of about one length; inference, and training on longer ones, goes from one to the next."""
    attention, cross = make_self(causal), make_cross()
    x, states = normal(RAGGED.total, D), normal(RAGGED.total + 6, D, seed=2)
    source = Layout(length + 1 for length in RAGGED.lengths)
    padded = attention(x, RAGGED), cross(x, RAGGED, cross.cache(states, source))
    with torch.no_grad():
        looped = attention(x, RAGGED), cross(x, RAGGED, cross.cache(states, source))
    for ours, theirs in zip(padded, looped, strict=True):
        assert relative(ours, theirs) < 1e-12


@FORMS
@pytest.mark.parametrize("lengths", [[70, 3, 9], [70, 3, 9, 12, 40, 33, 66]], ids=["each alone", "some together"])
def test_gradients_of_long_segments_beside_short_ones_are_those_of_the_masked_form(
    causal: bool, lengths: list[int]
) -> None:
    attention, cross, layout = make_self(causal), make_cross(), Layout(lengths)
    x = normal(layout.total, D).requires_grad_()
    agree(attention(x, layout), masked_self_attention(attention, x, layout), {"x": x}, 1e-10)
    source = Layout(reversed(lengths))
    states = normal(source.total, D, seed=2).requires_grad_()
    ours, oracle = (
        cross(x, layout, cross.cache(states, source)),
        masked_cross_attention(cross, x, layout, states, source),
    )
    agree(ours, oracle, {"x": x, "states": states}, 1e-10)
