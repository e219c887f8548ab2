"""One TTT layer for each expert: the gated sum over those that a segment chose, and nobody else's work."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.model.tiny import relative
from whisper_moe.model.router import NONE, Routing
from whisper_moe.model.ttt import TTTMLP, ExpertTTT
from whisper_moe.packing import Layout

D, H, EXPERTS = 16, 2, 4
LAYOUT = Layout([11, 1, 23, 6, 5])
CHOICES = [[0, 1], [3, 0], [1, NONE], [NONE, NONE], [3, 1]]
"""Nobody chooses expert 2."""


def make_layers(seed: int = 0) -> ExpertTTT:
    torch.manual_seed(seed)
    layers = ExpertTTT(EXPERTS, D, H, mini_batch=5, base_lr=1.0).double()
    for parameter in layers.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layers


def tokens(seed: int = 1) -> Tensor:
    return torch.randn(LAYOUT.total, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def routing() -> Routing:
    first = torch.tensor([0.7, 0.6, 0.2, 0.5, 0.9], dtype=torch.float64)
    return Routing(torch.tensor(CHOICES), torch.stack([first, 1 - first], dim=1).requires_grad_())


def definition(layers: ExpertTTT, x_TD: Tensor, choice: Routing) -> Tensor:
    """Segment by segment, expert by expert."""
    pieces = []
    for segment, rows in enumerate(LAYOUT.slices()):
        y = torch.zeros_like(x_TD[rows])
        for slot, expert in enumerate(CHOICES[segment]):
            if expert != NONE:
                y = y + choice.gates[segment, slot] * layers[expert](x_TD[rows], Layout([len(y)]))
        pieces.append(y)
    return torch.cat(pieces)


def test_each_segment_gets_the_gated_sum_of_its_experts_with_all_gradients() -> None:
    layers, x, choice = make_layers(), tokens().requires_grad_(), routing()
    ours, expected = layers(x, LAYOUT, choice), definition(layers, x, choice)
    assert relative(ours, expected) < 1e-12
    leaves = {"x": x, "gates": choice.gates} | dict(layers.named_parameters())
    weight = tokens(seed=2)
    found, wanted = (
        torch.autograd.grad((y * weight).sum(), list(leaves.values()), allow_unused=True) for y in (ours, expected)
    )
    for name, a, b in zip(leaves, found, wanted, strict=True):
        if name.startswith("2."):
            assert a is None and b is None
        else:
            assert b.abs().max() > 1e-6, f"{name} gets no gradient"
            assert relative(a, b) < 1e-10, name


def test_experts_differ_and_the_gates_count() -> None:
    layers, x, choice = make_layers(), tokens(), routing()
    y = layers(x, LAYOUT, choice)
    swapped = layers(x, LAYOUT, Routing(choice.experts, choice.gates.flip(1)))
    moved = layers(x, LAYOUT, Routing(choice.experts.roll(1, dims=0), choice.gates))
    assert relative(swapped, y) > 0.1 and relative(moved, y) > 0.1
    assert torch.equal(y[LAYOUT.slices()[3]], torch.zeros(6, D, dtype=torch.float64)), "none twice adds nothing"


def test_the_states_of_other_experts_are_never_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    layers, choice = make_layers(), routing()
    ran: list[tuple[int, tuple[int, ...]]] = []
    forward = TTTMLP.forward

    def record(layer: TTTMLP, x_TD: Tensor, layout: Layout) -> Tensor:
        ran.append((list(layers).index(layer), layout.lengths))
        return forward(layer, x_TD, layout)

    monkeypatch.setattr(TTTMLP, "forward", record)
    layers(tokens(), LAYOUT, choice)
    assert ran == [(0, (11, 1)), (1, (11, 23, 5)), (3, (1, 5))]


def test_closed_gates_are_skipped_at_inference_one_expert_at_a_time() -> None:
    layers, x, choice = make_layers().eval(), tokens(), routing()
    with torch.no_grad():
        assert not layers.skippable()
        for layer in list(layers)[:3]:
            layer.gate_forward.zero_()
            layer.gate_backward.zero_()
        assert not layers.skippable()
        y, rows = layers(x, LAYOUT, choice), LAYOUT.slices()
        assert y[rows[1]].any() and y[rows[4]].any(), "expert 3 is still open"
        assert not y[rows[0]].any() and not y[rows[2]].any()
        for gate in (layers[3].gate_forward, layers[3].gate_backward):
            gate.zero_()
        assert layers.skippable() and not layers(x, LAYOUT, choice).any()
    assert not layers.skippable(), "a gradient is wanted"


def test_starts_as_the_identity_and_alive() -> None:
    layers, x, choice = ExpertTTT(EXPERTS, D, H, mini_batch=5, base_lr=0.1).double(), tokens(), routing()
    y = layers(x, LAYOUT, choice)
    assert torch.equal(y, torch.zeros_like(y))
    (y * x).sum().backward()
    moved = [layer.gate_forward.grad is not None and bool(layer.gate_forward.grad.any()) for layer in layers]
    assert moved == [True, True, False, True]
