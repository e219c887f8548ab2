"""The router: which experts, how much each counts, and what stays the same whatever surrounds a row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from whisper_moe.config import MoEConfig
from whisper_moe.model.router import NONE, Router, Routing, pool_segments
from whisper_moe.packing import Layout

D_MODEL = 16
N_EXPERTS = 6


def make_router(top_k: int = 2, none_choice: bool = True, seed: int = 0) -> Router:
    """In float64, with weights large enough that the gates differ."""
    torch.manual_seed(seed)
    router = Router(D_MODEL, MoEConfig(n_experts=N_EXPERTS, top_k=top_k, none_choice=none_choice)).double()
    torch.nn.init.normal_(router.weight, std=0.5)
    return router


def router_with_logits(*logits: float, top_k: int = 2, none_choice: bool = True) -> Routing:
    """The routing of one row that is given these logits; *none* is the last."""
    router = Router(1, MoEConfig(n_experts=len(logits) - none_choice, top_k=top_k, none_choice=none_choice)).double()
    router.weight.data = torch.tensor(logits, dtype=torch.float64)[:, None]
    return router(torch.ones(1, 1, dtype=torch.float64))


@settings(max_examples=50, deadline=None)
@given(top_k=st.integers(1, N_EXPERTS), none_choice=st.booleans(), rows=st.integers(1, 20), seed=st.integers(0, 999))
def test_gates_are_positive_and_sum_to_one(top_k: int, none_choice: bool, rows: int, seed: int) -> None:
    routing = make_router(top_k, none_choice, seed)(torch.randn(rows, D_MODEL, dtype=torch.float64))
    assert routing.gates.shape == routing.experts.shape == (rows, top_k)
    assert routing.gates.min() > 0
    torch.testing.assert_close(routing.gates.sum(1), torch.ones(rows, dtype=torch.float64), rtol=0, atol=1e-12)
    assert (routing.gates.diff(dim=1) <= 0).all(), "strongest first"
    for chosen in routing.experts.tolist():
        real = [expert for expert in chosen if expert != NONE]
        assert len(set(real)) == len(real) and all(0 <= expert < N_EXPERTS for expert in real)


def test_softmax_over_the_chosen_is_the_renormalised_softmax_over_all() -> None:
    routing = make_router(none_choice=False)(torch.randn(100, D_MODEL, dtype=torch.float64))
    assert routing.logits is not None
    share = routing.logits.softmax(1).gather(1, routing.experts)
    assert share.sum(1).max() < 0.99, "renormalising has something to do"
    torch.testing.assert_close(routing.gates, share / share.sum(1, keepdim=True), rtol=0, atol=1e-12)
    assert len(routing.experts.unique()) == N_EXPERTS


@pytest.mark.parametrize(
    ("logits", "chosen"),
    [
        ((1.0, 0.5, -3.0, 1.1), (NONE, NONE)),
        ((1.0, 2.0, -3.0, 1.1), (1, NONE)),
        ((1.0, 2.0, 1.2, 1.1), (1, 2)),
        ((0.0, 0.0, 0.0, 0.0), (0, 1)),
        ((-1.0, 0.0, 0.0, 0.0), (1, 2)),
        ((-1.0, -1.0, 0.0, 0.0), (2, NONE)),
    ],
)
def test_none_takes_the_slots_that_no_expert_is_above_it_for(
    logits: tuple[float, ...], chosen: tuple[int, int]
) -> None:
    """The last logit is its own. Ties go to the lower index and to experts before *none*."""
    routing = router_with_logits(*logits)
    assert routing.choices == (chosen,)
    both = torch.tensor([logits[expert] for expert in chosen], dtype=torch.float64)
    torch.testing.assert_close(routing.gates[0], both.softmax(0))


def test_a_tie_of_many_goes_to_the_lowest() -> None:
    many = Router(D_MODEL, MoEConfig(n_experts=300, top_k=4))  # enough columns that a sort which is not stable shows
    many.weight.data.zero_()
    assert set(many(torch.randn(200, D_MODEL)).choices) == {(0, 1, 2, 3)}


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_none_is_top_k_identical_experts_of_its_own(top_k: int) -> None:
    router = make_router(top_k)
    explicit = Router(D_MODEL, MoEConfig(n_experts=N_EXPERTS + top_k, top_k=top_k, none_choice=False)).double()
    explicit.weight.data = torch.cat([router.weight.data[:-1], router.weight.data[-1:].expand(top_k, -1)])
    features = torch.randn(200, D_MODEL, dtype=torch.float64)
    ours, theirs = router(features), explicit(features)
    assert torch.equal(ours.experts, theirs.experts.masked_fill(theirs.experts >= N_EXPERTS, NONE))
    torch.testing.assert_close(ours.gates, theirs.gates, rtol=0, atol=1e-12)
    nones = set((ours.experts == NONE).sum(1).tolist())
    assert nones == set(range(top_k + 1)), "every number of *none* slots occurred"


def test_logits_are_float32_under_bfloat16_autocast() -> None:
    # In float32 expert 1 is ahead by 1e-4; in bfloat16 the two are equal, and the tie would go to expert 0.
    router = Router(1, MoEConfig(n_experts=2, top_k=1, none_choice=False))
    router.weight.data = torch.tensor([[1.0], [1.0001]])
    features = torch.ones(1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = features @ router.weight.T
        routing = router(features)
    assert rounded.dtype == torch.bfloat16 and rounded[0, 0] == rounded[0, 1], "autocast would have rounded"
    assert routing.logits is not None and routing.logits.dtype == routing.gates.dtype == torch.float32
    assert torch.equal(routing.logits, router(features).logits)
    assert routing.choices == ((1,),)


def test_half_precision_is_raised_and_float64_kept() -> None:
    router = Router(D_MODEL, MoEConfig(n_experts=N_EXPERTS))
    features = torch.randn(5, D_MODEL)
    assert router.bfloat16()(features.bfloat16()).gates.dtype == torch.float32
    assert router.double()(features.double()).gates.dtype == torch.float64


def test_gates_carry_the_gradient_of_the_router() -> None:
    router = make_router()
    features = torch.randn(8, D_MODEL, dtype=torch.float64)

    def gates(weight: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(router, {"weight": weight}, features).gates

    assert torch.autograd.gradcheck(gates, router.weight)
    (gradient,) = torch.autograd.grad(gates(router.weight)[:, 0].sum(), router.weight)
    assert (gradient.abs().sum(1) > 0).sum() > 2, "several experts were chosen"


def test_rows_gathers_every_part() -> None:
    routing = make_router()(torch.randn(4, D_MODEL, dtype=torch.float64))
    taken = routing.rows(torch.tensor([3, 0, 0]))
    assert taken.choices == tuple(routing.choices[i] for i in (3, 0, 0))
    assert torch.equal(taken.gates, routing.gates[[3, 0, 0]])
    assert taken.logits is not None and routing.logits is not None
    assert torch.equal(taken.logits, routing.logits[[3, 0, 0]])
    assert Routing(routing.experts, routing.gates).rows(torch.tensor([1])).logits is None


def test_expand_repeats_a_segments_choice_for_its_tokens() -> None:
    routing = Routing(torch.tensor([[4, 1], [NONE, NONE], [0, NONE]]), torch.full((3, 2), 0.5))
    tokens = routing.expand(Layout([2, 1, 3]))
    assert tokens.choices == ((4, 1), (4, 1), (NONE, NONE), (0, NONE), (0, NONE), (0, NONE))
    assert routing.expand(Layout([1, 1, 1])).choices == routing.choices


def test_runs_join_neighbours_of_one_choice() -> None:
    routing = Routing(torch.tensor([[4, 1], [4, 1], [1, 4], [4, 1]]), torch.full((4, 2), 0.5))
    assert routing.runs() == [(2, (4, 1)), (1, (1, 4)), (1, (4, 1))]
    assert routing.runs(Layout([5, 2, 7, 1])) == [(7, (4, 1)), (7, (1, 4)), (1, (4, 1))]


def test_router_starts_small_and_random() -> None:
    weight = Router(512, MoEConfig(n_experts=63)).weight
    assert weight.shape == (64, 512)
    assert weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_pool_is_the_mean_of_each_segment_in_any_pack() -> None:
    layout = Layout([1, 7, 300])
    x = torch.randn(layout.total, D_MODEL)
    pooled = pool_segments(x, layout)
    for row, part in zip(pooled, layout.slices(), strict=True):
        alone = pool_segments(x[part], Layout([len(x[part])]))
        assert torch.equal(row, alone[0])
        torch.testing.assert_close(row, x[part].double().mean(0).float(), rtol=0, atol=1e-6)
    assert pooled[1].sub(pooled[2]).abs().max() > 0.1


def test_pool_leaves_out_the_margin() -> None:
    layout = Layout([5, 4])
    x = torch.randn(layout.total, D_MODEL)
    expected = torch.stack([x[:3].mean(0), x[5:9].mean(0)])
    x[3:5] = torch.nan
    torch.testing.assert_close(pool_segments(x, layout, valid=(3, 4)), expected)


def test_pool_adds_up_in_float32() -> None:
    x = torch.randn(1_000, D_MODEL).bfloat16()
    pooled = pool_segments(x, Layout([1_000]))
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled[0], x.double().mean(0).float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("count", [0, 5])
def test_pool_rejects_a_count_outside_the_segment(count: int) -> None:
    with pytest.raises(ValueError, match=rf"segment 1 has 4 tokens; {count} of them"):
        pool_segments(torch.randn(6, D_MODEL), Layout([2, 4]), valid=(2, count))
