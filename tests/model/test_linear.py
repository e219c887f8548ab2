"""Layers arranged for a CPU: the same function, and in int8 one that no batch mate has a part in."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.model.tiny import CONFIGS, random_mels, random_texts, relative, tiny_model
from whisper_moe.model.int8 import Int8Embedding, Int8Experts, Int8Linear, Int8Rows
from whisper_moe.model.linear import Arithmetic, BlockedExperts, BlockedLinear, arrange
from whisper_moe.model.model import WhisperMoEModel
from whisper_moe.model.moe import FEW_TOKENS, Experts
from whisper_moe.model.router import NONE, Routing
from whisper_moe.model.ttt import TTTMLP
from whisper_moe.packing import Layout

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
KINDS = pytest.mark.parametrize("kind", CONFIGS)
ARITHMETIC = pytest.mark.parametrize("arithmetic", [pytest.param("float32", marks=needs_onednn), "int8"])
SIZES = [(8, 5), (33, 7), (64, 100), (512, 96), (1280, 64)]
pytestmark = pytest.mark.usefixtures("_inference")


@pytest.fixture
def _inference():
    with torch.inference_mode():
        yield


def linear(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=bias)


def int8(weight: Tensor, bias: Tensor | None) -> Int8Linear:
    return Int8Linear(Int8Rows.of(weight), bias)


def rows(count: int, width: int) -> Tensor:
    """Tokens of very different size, as after a normalisation with a few large channels."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, width, generator=generator) * torch.logspace(-3, 2, count)[:, None]


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
def test_the_blocked_layout_computes_the_same(inputs: int, outputs: int, bias: bool) -> None:
    stock, x = linear(inputs, outputs, bias), rows(40, inputs)
    blocked = BlockedLinear(stock.weight, stock.bias)
    for tokens in (x, x[:1], x[:36].view(3, 12, inputs)):
        assert blocked(tokens).shape == stock(tokens).shape
        assert relative(blocked(tokens), stock(tokens)) < 1e-5


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
def test_int8_is_the_product_of_the_rounded(inputs: int, outputs: int, bias: bool) -> None:
    """Against float64 arithmetic on both sides rounded to 127 steps of their own absolute maximum."""
    stock, x = linear(inputs, outputs, bias), rows(40, inputs)
    step_x, step_w = (t.double().abs().amax(1, keepdim=True) / 127 for t in (x, stock.weight))
    rounded = ((x / step_x.float()).round() * step_x) @ ((stock.weight / step_w.float()).round() * step_w).T
    expected = rounded + (stock.bias if bias else 0)
    assert ((int8(stock.weight, stock.bias)(x) - expected).abs() <= 1e-5 * expected.abs().amax(1, True)).all()


@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
def test_the_error_of_int8_is_bounded_for_every_token_however_small(inputs: int, outputs: int) -> None:
    """Each factor is off by half a step at most, so their product by what that can add up to; in practice by 1 or 2 %."""
    stock, x = linear(inputs, outputs, bias=False), rows(40, inputs)
    exact = x.double() @ stock.weight.double().T
    off = (int8(stock.weight, None)(x) - exact).abs()
    half_x, half_w = (t.double().abs().amax(1) / 254 for t in (x, stock.weight))
    sums_x, sums_w = x.double().abs().sum(1), stock.weight.double().abs().sum(1)
    bound = half_x[:, None] * sums_w + sums_x[:, None] * half_w + inputs * half_x[:, None] * half_w
    assert (off <= bound * 1.001).all()
    assert (off.amax(1) < 0.03 * exact.abs().amax(1)).all()


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(SIZES), st.integers(0, 39), st.integers(1, 40))
def test_a_tokens_int8_output_does_not_depend_on_its_batch_mates(size: tuple[int, int], start: int, count: int) -> None:
    """To the last bit: alone, in a slice, beside tokens a hundred thousand times as large."""
    x = rows(40, size[0])
    layer = int8(linear(*size).weight, None)
    assert torch.equal(layer(x)[start : start + count], layer(x[start : start + count]))


def test_zeros_stay_zeros_and_numbers_that_are_none_are_seen() -> None:
    stock = linear(16, 8)
    layer = int8(stock.weight, stock.bias)
    x = torch.zeros(3, 16)
    assert torch.equal(layer(x), stock.bias.expand(3, 8))
    x[1, 3] = torch.nan
    y = layer(x)
    assert y[1].isnan().all() and torch.equal(y[::2], stock.bias.expand(2, 8))
    assert not int8(torch.zeros(8, 16), None)(rows(2, 16)).any()


def experts_of(d_model: int = 32, hidden: int = 24) -> Experts:
    torch.manual_seed(2)
    experts = Experts(d_model, hidden, 4)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3)
    return experts


CHOICES = {
    "one for all": [[2, 0]],
    "two runs": [[2, 0], [2, 0], [1, 3]],
    "changing, with none": [[0, 1], [3, NONE], [1, 0], [NONE, NONE], [2, 3]],
    "most of them": [[0, 1], [1, 3], [0, 3]],
    "none for all": [[NONE, NONE], [NONE, NONE]],
}


def routed(name: str, rows_each: int | str) -> tuple[Layout, Routing]:
    """Rows of one token, equal rows around the border between few tokens and many, and rows of different lengths."""
    choice = torch.tensor(CHOICES[name])
    lengths = [1 + 7 * i for i in range(len(choice))] if isinstance(rows_each, str) else [rows_each] * len(choice)
    first = torch.linspace(0.2, 0.9, len(choice))
    return Layout(lengths), Routing(choice, torch.stack([first, 1 - first], dim=1))


def int8_experts(experts: Experts) -> Int8Experts:
    up, down = Int8Rows.of(experts.up_weight), Int8Rows.of(experts.down_weight)
    return Int8Experts(up, experts.up_bias, down, experts.down_bias)


KINDS_OF_EXPERTS = pytest.mark.parametrize(
    ("arranged_as", "tolerance"), [pytest.param(BlockedExperts, 1e-5, marks=needs_onednn), (int8_experts, 0.03)]
)


@KINDS_OF_EXPERTS
@pytest.mark.parametrize("rows_each", [1, 3, FEW_TOKENS, "ragged"])
@pytest.mark.parametrize("name", CHOICES)
def test_arranged_experts_compute_the_same(
    name: str, rows_each: int | str, arranged_as: Callable[[Experts], nn.Module], tolerance: float
) -> None:
    experts, (layout, routing) = experts_of(), routed(name, rows_each)
    x, other = rows(layout.total, 32), arranged_as(experts)
    expected = experts(x, routing, layout)
    found = [other(x, routing, layout)]
    if layout.total == len(routing):
        found.append(other(x, routing))
    assert expected.any() == (name != "none for all")
    assert all(((y - expected).abs().amax(1) <= tolerance * expected.abs().amax(1)).all() for y in found)


@KINDS_OF_EXPERTS
@pytest.mark.parametrize("rows_each", [1, FEW_TOKENS])
def test_a_broken_token_stays_alone_among_arranged_experts(
    rows_each: int, arranged_as: Callable[[Experts], nn.Module], tolerance: float
) -> None:
    """Also where every expert computes every token: a gate of 0 leaves NaN as it is."""
    layout, choice = Layout([rows_each] * 3), torch.tensor([[0, 1], [2, 3], [1, NONE]])
    routing = Routing(choice, torch.tensor([[0.7, 0.3], [0.6, 0.4], [0.5, 0.5]]))
    other, x = arranged_as(experts_of()), rows(layout.total, 32)
    broken = x.clone()
    broken[rows_each] = torch.nan
    before, after = other(x, routing, layout), other(broken, routing, layout)
    others = torch.arange(layout.total) != rows_each
    assert after[rows_each].isnan().all() and torch.equal(after[others], before[others])


@pytest.mark.parametrize("name", CHOICES)
def test_int8_experts_give_a_token_the_same_whoever_is_in_its_batch(name: str) -> None:
    """One token at a time, beside others that chose other experts, and in a run of its own: what differs is the sum of
    the last biases, by float32's rounding."""
    layout, routing = routed(name, 1)
    other, x = int8_experts(experts_of()), rows(layout.total, 32)
    together = other(x, routing)
    for i in range(len(x)):
        mine = routing.rows(torch.tensor([i]))
        alone = other(x[i : i + 1], mine)
        long = other(x[i : i + 1].expand(FEW_TOKENS + 1, -1), mine, Layout([FEW_TOKENS + 1]))
        for y in (alone, long):
            assert ((y - together[i]).abs() <= 1e-6 * together[i].abs().max()).all()


def test_int8_experts_that_were_never_trained_add_nothing_at_all() -> None:
    layout, routing = routed("changing, with none", 3)
    assert not int8_experts(Experts(32, 24, 4))(rows(layout.total, 32), routing, layout).any()


def arranged(model: WhisperMoEModel, arithmetic: Arithmetic) -> WhisperMoEModel:
    other = copy.deepcopy(model)
    assert arrange(other, arithmetic) is other
    return other


@ARITHMETIC
@KINDS
def test_every_linear_layer_the_head_and_the_experts_are_swapped(kind: str, arithmetic: Arithmetic) -> None:
    model = tiny_model(kind, torch.float32)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    other, swapped = arranged(model, arithmetic), {"float32": BlockedLinear, "int8": Int8Linear}[arithmetic]
    names = [name for name, module in other.named_modules() if isinstance(module, swapped) and ".experts." not in name]
    expert_layers = [name for name, module in model.named_modules() if isinstance(module, Experts)]
    kind_of_experts = {"float32": BlockedExperts, "int8": Int8Experts}[arithmetic]
    assert [name for name, module in other.named_modules() if isinstance(module, kind_of_experts)] == expert_layers
    rates = [name for name in linears if name.endswith(".rate")]
    assert sorted(names) == sorted({*linears, "decoder.head"} - set(rates))
    assert [name for name, module in other.named_modules() if isinstance(module, nn.Linear)] == rates
    assert len(rates) == sum(isinstance(module, TTTMLP) for module in model.modules())


def run(model: WhisperMoEModel) -> tuple[Tensor, Tensor]:
    """States of all segments and teacher-forced logits."""
    encoded = model.encoder(random_mels((81, 40, 7), torch.float32))
    texts = random_texts((9, 20, 4))
    layout = Layout(map(len, texts))
    return encoded.states_TD, model.decoder.head(model.decoder(torch.cat(texts), layout, encoded))


@ARITHMETIC
@KINDS
def test_an_arranged_model_computes_the_same(kind: str, arithmetic: Arithmetic) -> None:
    """With open TTT gates: nothing that reads a layer's weights may have been swapped."""
    model = tiny_model(kind, torch.float32)
    tolerance = {"float32": 1e-5, "int8": 0.1}[arithmetic]
    for found, expected in zip(run(arranged(model, arithmetic)), run(model), strict=True):
        assert relative(found, expected) < tolerance


def test_int8_leaves_a_packed_segment_exactly_as_it_is_beside_others() -> None:
    """A pack of the same shape with other neighbours: one scale for the whole tensor would show here."""
    model = arranged(tiny_model("dense", torch.float32), "int8")
    mels = random_mels((81, 40, 7), torch.float32)
    before = model.encoder(mels)
    after = model.encoder([mels[0], mels[1] * 1000, mels[2]])
    same = [torch.equal(before.states_TD[rows], after.states_TD[rows]) for rows in before.layout.slices()]
    assert same == [True, False, True]


def halves(model: WhisperMoEModel) -> tuple[WhisperMoEModel, dict[str, Int8Rows], WhisperMoEModel]:
    """The model without its quantised matrices, these, and the whole float32 model that they stand for."""
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    linears = [f"{name}.weight" for name, module in model.named_modules() if type(module) is nn.Linear]
    linears += [f"{n}.{k}_weight" for n, m in model.named_modules() if isinstance(m, Experts) for k in ("up", "down")]
    quantized = {
        key: Int8Rows.of(state[key]) for key in [*linears, "decoder.token_embedding.weight"] if "rate" not in key
    }
    whole = copy.deepcopy(model)
    whole.load_state_dict(state | {key: rows.dequantized() for key, rows in quantized.items()})
    part = copy.deepcopy(model).to("meta")
    part.load_state_dict(
        {key: value for key, value in state.items() if key not in quantized}, strict=False, assign=True
    )
    return part, quantized, whole


@pytest.mark.parametrize("onednn", [pytest.param(True, marks=needs_onednn), False])
@pytest.mark.parametrize("arithmetic", ["float32", "int8"])
@KINDS
def test_weights_that_are_int8_already_compute_what_their_float32_form_does(
    kind: str, arithmetic: Arithmetic, onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit, and none of them is left on the meta device."""
    if not onednn:
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    part, quantized, whole = halves(tiny_model(kind, torch.float32))
    arrange(part, arithmetic, quantized)
    assert any(isinstance(module, Int8Embedding) for module in part.modules())
    for found, expected in zip(run(part), run(arranged(whole, arithmetic)), strict=True):
        assert torch.equal(found, expected)


def test_where_there_is_no_onednn_the_layers_stay_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    model = tiny_model("dense", torch.float32)
    for found, expected in zip(run(arranged(model, "float32")), run(model), strict=True):
        assert torch.equal(found, expected)
    assert Int8Linear in {type(module) for module in arranged(model, "int8").modules()}
