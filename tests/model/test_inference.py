"""Layers arranged for a CPU: the same function, and in int8 one that no batch mate has a part in."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.model.tiny import CONFIGS, random_mels, random_texts, relative, tiny_model
from whisper_moe.model import inference
from whisper_moe.model.inference import Arithmetic, BlockedLinear, prepare_for_inference
from whisper_moe.model.int8 import (
    FbgemmLinear,
    Int8Embedding,
    Int8Linear,
    Int8Rows,
    fbgemm_packing,
    suits_fbgemm,
    unsaturated,
)
from whisper_moe.model.layers import CHUNK
from whisper_moe.model.model import WhisperMoEModel
from whisper_moe.model.moe import FEW_TOKENS, Experts, Int8Experts, SeparateExperts
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
    with torch.inference_mode(), fbgemm_packing() if suits_fbgemm() else nullcontext():
        yield


def linear(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=bias)


Int8Layer = type[Int8Linear] | type[FbgemmLinear]
needs_avx2 = pytest.mark.skipif(not suits_fbgemm(), reason="for CPUs with AVX2 and no more")
INT8_LAYERS = pytest.mark.parametrize("int8", [Int8Linear, pytest.param(FbgemmLinear, marks=needs_avx2)])


def rounded(int8: Int8Layer, weight: Tensor) -> Tensor:
    """What a layer computes with, float64."""
    stored = Int8Rows.of(weight) if int8 is Int8Linear else unsaturated(Int8Rows.of(weight))
    return stored.dequantized().double()


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


@INT8_LAYERS
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
def test_int8_is_the_product_of_the_rounded(inputs: int, outputs: int, bias: bool, int8: Int8Layer) -> None:
    """Against float64 arithmetic on tokens that are rounded to 127 steps of their own absolute maximum."""
    stock, x = linear(inputs, outputs, bias), rows(40, inputs)
    step_x = x.double().abs().amax(1, keepdim=True) / 127
    expected = ((x / step_x.float()).round() * step_x) @ rounded(int8, stock.weight).T + (stock.bias if bias else 0)
    layer = int8(Int8Rows.of(stock.weight), stock.bias)
    assert ((layer(x) - expected).abs() <= 1e-5 * expected.abs().amax(1, True)).all()


@INT8_LAYERS
def test_int8_sums_do_not_overflow(int8: Int8Layer) -> None:
    """The largest bytes that there are, on either side of 0, next to each other; 16 bits hold less than two such products."""
    signs = torch.tensor([[1, 1, 1, 1], [-1, -1, -1, -1], [1, -1, 1, -1], [1, 1, -1, -1], [0, 1, 0, -1]]).repeat(1, 65)
    weight, x = signs[:, :257].float(), torch.cat([signs, -signs])[:, :257].float()
    layer = int8(Int8Rows.of(weight), None)
    assert torch.equal(layer(x).double().round(), (x.double() @ rounded(int8, weight).T).round())


def test_only_rows_that_would_overflow_are_scaled_down() -> None:
    levels = torch.tensor(
        [[127, 1, -100, -28], [127, -127, 127, -127], [127, 2, 0, 0], [0, 127, 127, 0], [-64, -65, 0, 0]]
    )
    stored = unsaturated(Int8Rows(levels.to(torch.int8), torch.ones(5, 1)))
    same = [torch.equal(row, before) for row, before in zip(stored.levels, levels, strict=True)]
    assert same == [True, True, False, True, False]
    assert ((stored.dequantized() - levels).abs() <= stored.scale / 2).all() and stored.scale.max() < 1.03


@INT8_LAYERS
@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
def test_the_error_of_int8_is_bounded_for_every_token_however_small(inputs: int, outputs: int, int8: Int8Layer) -> None:
    """Each factor is off by half a step at most, so their product by what that can add up to; in practice by 1 or 2 %."""
    stock, x = linear(inputs, outputs, bias=False), rows(40, inputs)
    exact = x.double() @ stock.weight.double().T
    off = (int8(Int8Rows.of(stock.weight), None)(x) - exact).abs()
    half_x, half_w = x.double().abs().amax(1) / 254, (rounded(int8, stock.weight) - stock.weight).abs().amax(1)
    sums_x, sums_w = x.double().abs().sum(1), stock.weight.double().abs().sum(1)
    bound = half_x[:, None] * sums_w + sums_x[:, None] * half_w + inputs * half_x[:, None] * half_w
    assert (off <= bound * 1.001).all()
    assert (off.amax(1) < 0.03 * exact.abs().amax(1)).all()


@INT8_LAYERS
@settings(deadline=None, max_examples=60)
@given(size=st.sampled_from(SIZES), start=st.integers(0, 39), count=st.integers(1, 40))
def test_a_tokens_int8_output_does_not_depend_on_its_batch_mates(
    size: tuple[int, int], start: int, count: int, int8: Int8Layer
) -> None:
    """To the last bit: alone, in a slice, beside tokens a hundred thousand times as large."""
    x = rows(40, size[0])
    layer = int8(Int8Rows.of(linear(*size).weight), None)
    assert torch.equal(layer(x)[start : start + count], layer(x[start : start + count]))


@INT8_LAYERS
def test_many_tokens_are_what_they_are_alone_and_none_are_none(int8: Int8Layer) -> None:
    x = rows(2 * CHUNK + 76, 33)
    layer = int8(Int8Rows.of(linear(33, 7).weight), None)
    alone = [layer(part) for part in x.split(7)]
    for training in (False, True):  # inference takes a chunk at a time
        with torch.set_grad_enabled(training):
            assert torch.equal(layer(x), torch.cat(alone)) and layer(x[:0]).shape == (0, 7)


@INT8_LAYERS
def test_zeros_stay_zeros_and_numbers_that_are_none_are_seen(int8: Int8Layer) -> None:
    stock = linear(16, 8)
    layer = int8(Int8Rows.of(stock.weight), stock.bias)
    x = torch.zeros(3, 16)
    assert torch.equal(layer(x), stock.bias.expand(3, 8))
    x[1, 3] = torch.nan
    y = layer(x)
    assert y[1].isnan().all() and torch.equal(y[::2], stock.bias.expand(2, 8))
    assert not int8(Int8Rows.of(torch.zeros(8, 16)), None)(rows(2, 16)).any()


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


def separate_experts(experts: Experts, layer: Callable[[Tensor, Tensor], nn.Module]) -> SeparateExperts:
    return SeparateExperts(
        map(layer, experts.up_weight, experts.up_bias),
        map(layer, experts.down_weight.mT.contiguous(), experts.down_bias),
    )


def blocked_experts(experts: Experts) -> SeparateExperts:
    return separate_experts(experts, BlockedLinear)


def fbgemm_experts(experts: Experts) -> SeparateExperts:
    return separate_experts(experts, lambda weight, bias: FbgemmLinear(Int8Rows.of(weight), bias))


INT8_EXPERTS = [int8_experts, pytest.param(fbgemm_experts, marks=needs_avx2)]
KINDS_OF_EXPERTS = pytest.mark.parametrize(
    ("arranged_as", "tolerance"),
    [
        pytest.param(blocked_experts, 1e-5, marks=needs_onednn),
        (int8_experts, 0.04),
        pytest.param(fbgemm_experts, 0.04, marks=needs_avx2),
    ],
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


@pytest.mark.parametrize("int8_experts", INT8_EXPERTS)
@pytest.mark.parametrize("name", CHOICES)
def test_int8_experts_give_a_token_the_same_whoever_is_in_its_batch(
    name: str, int8_experts: Callable[[Experts], nn.Module]
) -> None:
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


def arranged(model: WhisperMoEModel, arithmetic: Arithmetic) -> WhisperMoEModel:
    other = copy.deepcopy(model)
    assert prepare_for_inference(other, arithmetic) is other
    return other


@ARITHMETIC
@KINDS
def test_every_linear_layer_the_head_and_the_experts_are_swapped(kind: str, arithmetic: Arithmetic) -> None:
    model = tiny_model(kind, torch.float32)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    other = arranged(model, arithmetic)
    avx2 = suits_fbgemm()
    swapped = {"float32": BlockedLinear, "int8": FbgemmLinear if avx2 else Int8Linear}[arithmetic]
    names = [name for name, module in other.named_modules() if isinstance(module, swapped) and ".experts." not in name]
    names = [name.removesuffix(".base") for name in names]  # beside which are the differences
    expert_layers = [name for name, module in model.named_modules() if isinstance(module, Experts)]
    kind_of_experts = {"float32": SeparateExperts, "int8": SeparateExperts if avx2 else Int8Experts}[arithmetic]
    assert [name for name, module in other.named_modules() if isinstance(module, kind_of_experts)] == expert_layers
    rates = [name for name in linears if name.endswith(".rate")]
    assert sorted(names) == sorted({*linears, "decoder.head"} - set(rates))
    assert [name for name, module in other.named_modules() if isinstance(module, nn.Linear)] == rates
    assert len(rates) == sum(isinstance(module, TTTMLP) for module in model.modules())


@ARITHMETIC
def test_arranging_leaves_the_process_as_it_was_and_says_what_went_wrong(
    arithmetic: Arithmetic, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers are arranged on several threads."""
    threads, engine = torch.get_num_threads(), torch.backends.quantized.engine
    torch.set_num_threads(3)
    try:
        prepare_for_inference(tiny_model("segment", torch.float32), arithmetic)
        assert (torch.get_num_threads(), torch.backends.quantized.engine) == (3, engine)

        def fails(*_: object) -> nn.Module:
            raise MemoryError("no room")

        monkeypatch.setattr(inference, "_linear", fails)
        with pytest.raises(MemoryError, match="no room"):
            prepare_for_inference(tiny_model("segment", torch.float32), arithmetic)
        assert (torch.get_num_threads(), torch.backends.quantized.engine) == (3, engine)
    finally:
        torch.set_num_threads(threads)


def run(model: WhisperMoEModel) -> tuple[Tensor, Tensor]:
    """States of all segments and teacher-forced logits."""
    encoded = model.encoder(random_mels((81, 40, 7), torch.float32))
    texts = random_texts((9, 20, 4))
    layout = Layout(map(len, texts))
    return encoded.states_TD, model.decoder.head(model.decoder(torch.cat(texts), layout, encoded).states_TD)


@ARITHMETIC
@KINDS
def test_an_arranged_model_computes_the_same(kind: str, arithmetic: Arithmetic) -> None:
    """With open TTT gates: nothing that reads a layer's weights may have been swapped. Rounding may send a token that lies
    between two experts to the other one."""
    model = tiny_model(kind, torch.float32)
    tolerance, share = {"float32": (1e-5, 1.0), "int8": (0.1, 0.98 if kind == "token" else 1.0)}[arithmetic]
    for found, expected in zip(run(arranged(model, arithmetic)), run(model), strict=True):
        near = (found - expected).abs().amax(1) < tolerance * expected.abs().max()
        assert near.float().mean() >= share


@pytest.mark.parametrize("avx2", [False, pytest.param(True, marks=needs_avx2)])
def test_int8_leaves_a_packed_segment_exactly_as_it_is_beside_others(
    avx2: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pack of the same shape with other neighbours: one scale for the whole tensor would show here."""
    monkeypatch.setattr(inference, "suits_fbgemm", lambda: avx2)
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
    prepare_for_inference(part, arithmetic, quantized)
    assert any(isinstance(module, Int8Embedding) for module in part.modules())
    for found, expected in zip(run(part), run(arranged(whole, arithmetic)), strict=True):
        assert torch.equal(found, expected)


def test_where_there_is_no_onednn_the_layers_stay_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    model = tiny_model("dense", torch.float32)
    for found, expected in zip(run(arranged(model, "float32")), run(model), strict=True):
        assert torch.equal(found, expected)
    layers = {type(module) for module in arranged(model, "int8").modules()}
    assert layers & {Int8Linear, FbgemmLinear}
