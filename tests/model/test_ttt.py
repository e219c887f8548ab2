"""TTT-MLP: the dual form is the primal one, segments stay apart, and decoding step by step changes nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from tests.model import ttt_reference as reference
from tests.model.ttt_reference import B, D, H, make_layer, relative, tokens
from whisper_moe.model import fast_weights
from whisper_moe.model.fast_weights import FastWeights, Gradients, Norm, Tokens, commit, token_gradients
from whisper_moe.model.ttt import TTTMLP, TTTState, plan_chunks
from whisper_moe.packing import Layout

LENGTHS = (1, B - 1, B, B + 1, 3 * B + 2)
FORMS = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])


# --- the equations ---------------------------------------------------------------------------------------------------


@FORMS
@pytest.mark.parametrize("length", LENGTHS)
def test_dual_form_equals_primal_form(causal: bool, length: int) -> None:
    layer, x = make_layer(causal), tokens(length)
    if layer.tau is not None:
        layer.tau.data[1] = -2  # 1/t + τ below zero: the rate is 0 there, not negative
    y = layer(x, Layout([length]))
    assert_close(y, reference.layer(layer, x)[0], rtol=0, atol=1e-12)
    unlearning = make_layer(causal, lr=0.0)
    assert relative(y, unlearning(x, Layout([length]))) > 1e-2, (
        "the inner updates must matter, or this compares nothing"
    )


@FORMS
def test_inference_computes_what_training_does_and_keeps_the_learned_weights(causal: bool) -> None:
    """Inference gathers one mini-batch at a time and uses the memory of fast weights again."""
    layer, lengths = make_layer(causal), [3 * B + 2, 1, 2 * B, B - 1]
    x = tokens(sum(lengths))
    trained = layer(x, Layout(lengths))
    first, carried = (x, None) if causal else layer.forward_carry(x, None)
    before = [parameter.clone() for parameter in layer.parameters()]
    with torch.no_grad():
        for _ in range(2):
            assert_close(layer(x, Layout(lengths)), trained, rtol=0, atol=1e-12)
            if carried is None:
                continue
            again, also_carried = layer.forward_carry(x, None)
            assert_close(again, first, rtol=0, atol=1e-12)
            kept = also_carried.w1.clone()
            layer.forward_carry(x, also_carried)
            assert torch.equal(also_carried.w1, kept), "what is carried may be carried again"
            assert_close(kept, carried.w1, rtol=0, atol=1e-12)
    assert all(map(torch.equal, before, layer.parameters()))


def test_analytic_gradient_equals_autograd_of_the_loss() -> None:
    torch.manual_seed(0)
    rows, d = 3, 6
    weights = FastWeights(*(torch.randn(rows, H, *s, dtype=torch.float64) for s in ((d, 24), (1, 24), (24, d), (1, d))))
    norm = Norm(*torch.randn(2, H, 1, d, dtype=torch.float64))
    q, k, v = torch.randn(3, rows, H, B, d, dtype=torch.float64)
    rate = torch.rand(rows, H, B, 1, dtype=torch.float64)
    gradients = token_gradients(weights, norm, Tokens(q, k, v, rate))
    step = commit(weights, gradients, None)
    for r in range(rows):
        for h in range(H):
            s = reference.Weights(weights.w1[r, h], weights.b1[r, h, 0], weights.w2[r, h], weights.b2[r, h, 0])
            per_token = [
                reference.token_gradient(k[r, h, t], v[r, h, t], s, norm.gamma[h, 0], norm.beta[h, 0]) for t in range(B)
            ]
            for t, g in enumerate(per_token):
                eta = rate[r, h, t]
                assert_close(gradients.g1[r, h, t], eta * g.b1, rtol=0, atol=1e-12)
                assert_close(gradients.g2[r, h, t], eta * g.b2, rtol=0, atol=1e-12)
            for new, old, name in ((step.w1, s.w1, "w1"), (step.w2, s.w2, "w2")):
                total = sum(rate[r, h, t] * getattr(g, name) for t, g in enumerate(per_token))
                assert_close(new[r, h], old - total, rtol=0, atol=1e-12)


@FORMS
def test_outer_gradients_flow_through_the_inner_update(causal: bool) -> None:
    """Every parameter's gradient equals the primal form's, whose inner gradients autograd differentiates again."""
    layer, x = make_layer(causal), tokens(2 * B + 3).requires_grad_()
    seen = {"x": x} | dict(layer.named_parameters())
    weight = tokens(len(x), seed=2)
    fast = torch.autograd.grad((layer(x, Layout([len(x)])) * weight).sum(), list(seen.values()))
    slow = torch.autograd.grad((reference.layer(layer, x)[0] * weight).sum(), list(seen.values()))
    for name, a, b in zip(seen, fast, slow, strict=True):
        assert b.abs().max() > 1e-6, f"{name} gets no gradient"
        assert relative(a, b) < 1e-10, name


def test_a_committed_step_lowers_the_inner_loss() -> None:
    """What the layer is for: after reading keys and values once, f maps these keys closer to their values."""
    torch.manual_seed(0)
    layer = TTTMLP(64, 2, mini_batch=8, causal=False)
    weights, norm = layer._learned(), layer._norm()
    k, v = torch.randn(2, 1, 2, 8, 32)
    rate = torch.full((1, 2, 8, 1), 0.1)

    def loss(s: FastWeights) -> float:
        return (fast_weights.apply(s, norm, k) - v).square().mean().item()

    history = [loss(weights)]
    for _ in range(5):
        weights = commit(weights, token_gradients(weights, norm, Tokens(k, k, v, rate)), None)
        history.append(loss(weights))
    assert history == sorted(history, reverse=True)
    assert history[-1] < 0.8 * history[0], history


# --- what a token may see --------------------------------------------------------------------------------------------


def test_causal_jacobian_is_exactly_lower_triangular() -> None:
    layer, n = make_layer(True), 2 * B + 2
    jacobian = torch.autograd.functional.jacobian(lambda x: layer(x, Layout([n])), tokens(n))
    assert isinstance(jacobian, Tensor)
    sees = jacobian.abs().amax(dim=(1, 3))  # [output token, input token]
    assert torch.equal(sees.triu(1), torch.zeros(n, n, dtype=torch.float64))
    assert (sees[torch.ones(n, n).tril().bool()] > 0).all(), "every token sees its whole past, older mini-batches too"


# --- packing ---------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 11), min_size=1, max_size=6),
    mini_batch=st.integers(1, 5),
    directions=st.sampled_from([1, 2]),
)
def test_chunks_hold_every_token_once_in_each_direction(lengths: list[int], mini_batch: int, directions: int) -> None:
    layout = Layout(lengths)
    plan = plan_chunks(layout, mini_batch, directions, torch.device("cpu"))
    assert plan.valid.sum() == directions * layout.total
    assert plan.valid.any(dim=1).all(), "a chunk of padding alone"
    assert len(plan.source) == sum(plan.active) == directions * sum(-(-n // mini_batch) for n in lengths)
    x = torch.randn(layout.total, 1, 3, 2)
    whole = plan.cut(x, slice(None))[0]
    for y in plan.restore(whole):
        assert torch.equal(y, x.flatten(1))
    assert torch.equal(torch.cat([plan.cut(x, time)[0] for time in plan.times]), whole)
    assert [len(plan.source[time]) for time in plan.times] == list(plan.active)
    segment = layout.segment_ids()[plan.source]
    assert (segment == segment[:, :1]).all(), "a chunk holds tokens of one segment"


# --- start, gates, numbers -------------------------------------------------------------------------------------------


@FORMS
def test_starts_as_the_identity_and_alive(causal: bool) -> None:
    torch.manual_seed(0)
    layer, x = TTTMLP(D, H, mini_batch=B, causal=causal), tokens(3 * B + 1, dtype=torch.float32)
    y = layer(x, Layout([B + 1, 2 * B]))
    assert torch.equal(y, torch.zeros_like(x))
    (y * tokens(len(x), seed=2).float()).sum().backward()
    for gate in (layer.gate_forward, layer.gate_backward):
        if gate is not None:
            assert gate.grad is not None and (gate.grad != 0).all()


@FORMS
def test_skipped_only_at_inference_and_only_at_exactly_closed_gates(causal: bool) -> None:
    layer = TTTMLP(D, H, mini_batch=B, causal=causal)
    x = torch.full((3, D), torch.nan)
    assert not layer.skippable(), "training"
    layer.eval()
    assert not layer.skippable(), "somebody may want α's gradient"
    with torch.no_grad():
        assert layer.skippable()
        assert torch.equal(layer(x, Layout([3])), torch.zeros(3, D)), "closed gates must not compute anything"
        assert causal or torch.equal(layer.forward_carry(x, None)[0], torch.zeros(3, D))
        layer.train()
        assert not layer.skippable(), "training without gradients, as in the first pass of checkpointing"
        layer.eval()
        for gate in (layer.gate_forward, layer.gate_backward):
            if gate is not None:
                gate[-1] = 1e-30
                assert not layer.skippable(), "almost closed is not closed"
                gate[-1] = 0


def test_a_skipped_decoding_step_is_zero() -> None:
    layer = TTTMLP(D, H, mini_batch=B, causal=True).eval()
    with torch.inference_mode():
        y, state = layer.extend(tokens(2, dtype=torch.float32)[:, None], layer.initial_state(2))
    assert torch.equal(y, torch.zeros(2, 1, D)) and state.opened.rows == 2


def state_tensors(state: TTTState | FastWeights | Gradients) -> list[Tensor]:
    if isinstance(state, TTTState):
        return state_tensors(state.weights) + state_tensors(state.opened)
    return list(state)


@FORMS
def test_inner_loop_stays_in_float32_under_bfloat16(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x, layout = (
        make_layer(causal, dtype=torch.float32, lr=0.5),
        tokens(3 * B, dtype=torch.float32),
        Layout([3 * B]),
    )
    exact = layer(x, layout)
    seen: list[torch.dtype] = []
    original = fast_weights.token_gradients

    def spy(weights: FastWeights, norm: Norm, chunk: Tokens) -> Gradients:
        gradients = original(weights, norm, chunk)
        seen.extend(t.dtype for t in (*state_tensors(weights), *state_tensors(gradients), chunk.rate, norm.gamma))
        return gradients

    monkeypatch.setattr(fast_weights, "token_gradients", spy)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, layout)
        carried = layer.initial_state(1).weights if causal else layer.forward_carry(x, None)[1]
        half = layer(x.bfloat16(), layout)
    whole = layer.bfloat16()(x.bfloat16(), layout)
    assert set(seen) == {torch.float32} and {t.dtype for t in state_tensors(carried)} == {torch.float32}
    assert (y.dtype, half.dtype, whole.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    for result in (y, half, whole):
        assert 0 < relative(result.float(), exact) < 0.1


def test_decoding_state_stays_in_float32_under_bfloat16() -> None:
    layer, x = make_layer(True, dtype=torch.float32), tokens(2 * (B + 1), dtype=torch.float32).view(2, B + 1, D)
    with torch.autocast("cpu", torch.bfloat16):
        _, state = layer.extend(x, layer.initial_state(2))
    assert state.opened.length == 1 and {t.dtype for t in state_tensors(state)} == {torch.float32}


@pytest.mark.parametrize(
    ("width", "heads", "mini_batch", "cause"), [(10, 3, 4, "10 in 3 heads"), (6, 2, 4, "even"), (8, 2, 0, "got 0")]
)
def test_impossible_shapes_are_refused(width: int, heads: int, mini_batch: int, cause: str) -> None:
    with pytest.raises(ValueError, match=cause):
        TTTMLP(width, heads, mini_batch=mini_batch, causal=True)
