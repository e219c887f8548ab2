"""Routed experts: every path computes one sum, and identical experts add up to the layer they were copied from."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from whisper_moe.config import MoEConfig
from whisper_moe.model.moe import Experts
from whisper_moe.model.router import NONE, Router, Routing
from whisper_moe.packing import Layout

D_MODEL = 32
EXPERT_DIM = 48
N_EXPERTS = 8
ABSOLUTE = {torch.float32: 2e-4, torch.float64: 1e-10}
RELATIVE = {torch.float32: 1e-5, torch.float64: 1e-10}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def make_experts(dtype: torch.dtype = torch.float64, d_model: int = D_MODEL, expert_dim: int = EXPERT_DIM) -> Experts:
    """Trained-looking: every parameter random, outputs of about 1, each expert clearly different."""
    torch.manual_seed(1)
    experts = Experts(d_model, expert_dim, N_EXPERTS).to(dtype)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return experts


def random_routing(rows: int, dtype: torch.dtype = torch.float64, top_k: int = 2, seed: int = 2) -> Routing:
    generator = torch.Generator().manual_seed(seed)
    choices = torch.stack([torch.randperm(N_EXPERTS, generator=generator)[:top_k] for _ in range(rows)])
    return Routing(choices, torch.rand(rows, top_k, generator=generator, dtype=torch.float64).softmax(1).to(dtype))


def oracle(experts: Experts, x_TD: Tensor, routing: Routing, layout: Layout | None = None) -> Tensor:
    """One token and one slot at a time, straight from the definition."""
    owner = range(len(x_TD)) if layout is None else layout.segment_ids().tolist()
    rows = []
    for x, row in zip(x_TD, owner, strict=True):
        y = torch.zeros_like(x)
        for gate, expert in zip(routing.gates[row], routing.choices[row], strict=True):
            if expert != NONE:
                hidden = F.gelu(experts.up_weight[expert] @ x + experts.up_bias[expert])
                y = y + gate * (hidden @ experts.down_weight[expert] + experts.down_bias[expert])
        rows.append(y)
    return torch.stack(rows)


def every_path(experts: Experts, x_TD: Tensor, routing: Routing, layout: Layout | None = None) -> dict[str, Tensor]:
    """The same sum as it is defined and, where the numbers allow it, in one grouped product."""
    fastest, can_group = experts(x_TD, routing, layout), experts._can_group
    assert can_group(x_TD) == (x_TD.dtype != torch.float64)
    experts._can_group = lambda x_TD: False
    try:
        return {"forward": fastest, "by definition": experts(x_TD, routing, layout)}
    finally:
        experts._can_group = can_group


def relative_error(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return ((got - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


def gradients(y: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return torch.autograd.grad((y * weights).sum(), inputs, retain_graph=True)


@DTYPES
def test_every_path_is_the_definition_with_its_gradients(dtype: torch.dtype) -> None:
    experts, layout, routing = make_experts(dtype), Layout([9, 1, 30, 2]), random_routing(4, dtype)
    routing.experts[1, 1] = NONE
    assert len(routing.experts.unique()) > 4, "several experts, and none, take part"
    x = torch.randn(layout.total, D_MODEL, dtype=dtype, requires_grad=True)
    routing.gates.requires_grad_()
    inputs = [x, routing.gates, *experts.parameters()]
    expected = oracle(experts, x, routing, layout)
    expected_gradients = gradients(expected, inputs)
    assert all(gradient.abs().max() > 0.01 for gradient in expected_gradients)
    for name, y in every_path(experts, x, routing, layout).items():
        assert relative_error(y, expected) <= RELATIVE[dtype], name
        for gradient, wanted in zip(gradients(y, inputs), expected_gradients, strict=True):
            assert relative_error(gradient, wanted) <= RELATIVE[dtype], name


@settings(max_examples=60, deadline=None)
@given(data=st.data(), top_k=st.integers(1, 3), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_every_path_agrees_on_any_choice_and_any_layout(data: st.DataObject, top_k: int, dtype: torch.dtype) -> None:
    experts = make_experts(dtype, d_model=8, expert_dim=4)
    lengths = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=8))
    slots = st.lists(st.integers(NONE, N_EXPERTS - 1), min_size=top_k, max_size=top_k)
    layout = data.draw(st.sampled_from([Layout(lengths), None]))
    choices = data.draw(st.lists(slots, min_size=len(lengths), max_size=len(lengths)))
    gates = torch.rand(len(lengths), top_k, dtype=torch.float64).softmax(1).to(dtype)
    routing = Routing(torch.tensor(choices), gates)
    x = torch.randn(sum(lengths) if layout else len(lengths), 8, dtype=dtype)
    expected = oracle(experts, x, routing, layout)
    for name, y in every_path(experts, x, routing, layout).items():
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-10, msg=name)


def dense_feed_forward(dtype: torch.dtype) -> tuple[Experts, Tensor, Tensor]:
    """Eight full-size copies of one feed-forward, input for it, and what the feed-forward itself says."""
    torch.manual_seed(3)
    up = torch.nn.Linear(64, 256, dtype=dtype)
    down = torch.nn.Linear(256, 64, dtype=dtype)
    experts = Experts(64, 256, N_EXPERTS).to(dtype)
    experts.up_weight.data = up.weight.data.expand(N_EXPERTS, -1, -1).clone()
    experts.up_bias.data = up.bias.data.expand(N_EXPERTS, -1).clone()
    experts.down_weight.data = down.weight.data.T.expand(N_EXPERTS, -1, -1).clone()
    experts.down_bias.data = down.bias.data.expand(N_EXPERTS, -1).clone()
    x = 3 * torch.randn(200, 64, dtype=dtype)
    return experts, x, down(F.gelu(up(x)))


@DTYPES
@pytest.mark.parametrize("layout", [None, Layout([150, 3, 47])], ids=["token", "segment"])
def test_eight_identical_experts_are_the_dense_feed_forward(dtype: torch.dtype, layout: Layout | None) -> None:
    experts, x, dense = dense_feed_forward(dtype)
    router = Router(64, MoEConfig(n_experts=N_EXPERTS, none_choice=False)).to(dtype)
    routing = router(x if layout is None else x[:3])
    assert len(routing.experts.unique()) > 2 and dense.abs().max() > 0.5
    for name, y in every_path(experts, x, routing, layout).items():
        assert (y - dense).abs().max() <= ABSOLUTE[dtype], name


def test_identical_experts_are_not_the_dense_layer_without_renormalising() -> None:
    experts, x, dense = dense_feed_forward(torch.float64)
    routing = Router(64, MoEConfig(n_experts=N_EXPERTS, none_choice=False)).double()(x)
    assert routing.logits is not None
    shares = routing.logits.softmax(1).gather(1, routing.experts)
    assert relative_error(experts(x, Routing(routing.experts, shares)), dense) > 0.1


@DTYPES
def test_all_none_is_exactly_zero(dtype: torch.dtype) -> None:
    experts = make_experts(dtype)
    x = torch.randn(12, D_MODEL, dtype=dtype)
    for rows, layout in ((12, None), (2, Layout([7, 5]))):
        nothing = Routing(torch.full((rows, 2), NONE), torch.full((rows, 2), 0.5, dtype=dtype))
        for name, y in every_path(experts, x, nothing, layout).items():
            assert torch.equal(y, torch.zeros_like(x)), name


def test_experts_start_at_zero_and_alive() -> None:
    torch.manual_seed(4)
    experts = Experts(D_MODEL, EXPERT_DIM, N_EXPERTS)
    x = torch.randn(40, D_MODEL)
    routing = random_routing(40, torch.float32)
    routing.gates.requires_grad_()
    y = experts(x, routing)
    assert torch.equal(y, torch.zeros_like(x))
    (y + x).square().sum().backward()
    first = {name: p.grad.abs().sum() for name, p in experts.named_parameters() if p.grad is not None}
    assert first["down_weight"] > 0 and first["down_bias"] > 0
    assert first["up_weight"] == 0 and routing.gates.grad is not None and not routing.gates.grad.any()
    torch.optim.SGD(experts.parameters(), lr=1e-3).step()
    (experts(x, routing) + x).square().sum().backward()
    assert experts.up_weight.grad is not None and experts.up_weight.grad.abs().amax((1, 2)).min() > 0
    assert routing.gates.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("dtype", "d_model", "grouped"),
    [
        (torch.float32, 32, True),
        (torch.float32, 30, False),
        (torch.float64, 32, False),
        (torch.bfloat16, 32, True),
        (torch.bfloat16, 36, False),
    ],
    ids=str,
)
def test_the_grouped_product_is_taken_where_it_is_possible(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, d_model: int, grouped: bool
) -> None:
    taken: list[bool] = []
    one_product = Experts._grouped
    monkeypatch.setattr(Experts, "_grouped", lambda *args: taken.append(True) or one_product(*args))
    experts, layout, routing = make_experts(dtype, d_model), Layout([32] * 4), random_routing(4, dtype)
    x = torch.randn(layout.total, d_model, dtype=dtype)
    y = experts(x, routing, layout)
    assert taken == [True] * grouped
    assert relative_error(y.double(), oracle(experts, x, routing, layout).double()) < 0.03


@pytest.mark.parametrize("lengths", [[64] * 4, [1] * 4], ids=["long", "short"])
def test_bfloat16_autocast_computes_every_path_in_bfloat16(lengths: list[int]) -> None:
    experts, layout, routing = make_experts(torch.float32), Layout(lengths), random_routing(4, torch.float32)
    x = torch.randn(layout.total, D_MODEL)
    with torch.autocast("cpu", torch.bfloat16):
        results = every_path(experts, x, routing, layout)
    expected = oracle(experts, x, routing, layout)
    for y in results.values():
        assert y.dtype == torch.bfloat16
        assert 0 < relative_error(y.float(), expected) < 0.03
