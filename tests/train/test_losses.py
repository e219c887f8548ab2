"""Losses have the values that their papers say, add up over passes, and leave no router without a gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from model.tiny import CONFIGS, tiny_model
from train.tiny import random_pack

from whisper_moe.config import MoEConfig
from whisper_moe.model.router import NONE, Router, Routing
from whisper_moe.train.losses import (
    IGNORED,
    SpeechObjective,
    Totals,
    balance_loss,
    choice_counts,
    cross_entropy,
    router_terms,
    z_loss,
)
from whisper_moe.train.parallel import Parallel
from whisper_moe.train.recipe import LossRecipe


def routed(experts: list[list[int]], logits: torch.Tensor) -> Routing:
    index = torch.tensor(experts)
    return Routing(index, torch.full(index.shape, 1 / index.shape[1]), logits)


def random_routing(rows: int, seed: int = 0, **router: int | bool) -> tuple[Router, Routing]:
    torch.manual_seed(seed)
    made = Router(8, MoEConfig.model_validate({"n_experts": 4} | router))
    torch.nn.init.normal_(made.weight)
    return made, made(torch.randn(rows, 8))


def test_cross_entropy_is_a_sum_over_labels_only() -> None:
    logits, labels = torch.randn(5, 7), torch.tensor([3, IGNORED, 0, 6, IGNORED])
    kept = labels != IGNORED
    expected = F.cross_entropy(logits[kept], labels[kept], reduction="sum")
    assert torch.allclose(cross_entropy(logits, labels), expected)
    smooth = F.cross_entropy(logits[kept], labels[kept], reduction="sum", label_smoothing=0.2)
    assert torch.allclose(cross_entropy(logits, labels, smoothing=0.2), smooth)
    assert cross_entropy(logits.bfloat16(), labels).dtype == torch.float32


def test_balance_is_one_where_every_choice_gets_its_part() -> None:
    even = routed([[0, 1], [2, 3], [NONE, 0], [1, 2], [3, NONE]], torch.zeros(5, 5))
    assert balance_loss(even, choice_counts(even)).item() == pytest.approx(1)


def test_balance_is_greatest_where_one_choice_gets_all() -> None:
    logits = torch.full((6, 5), -1e4)
    logits[:, 1:3] = 0
    collapsed = routed([[1, 2]] * 6, logits)
    assert balance_loss(collapsed, choice_counts(collapsed)).item() == pytest.approx(5 / 2)
    logits = torch.full((6, 5), -1e4)
    logits[:, 4] = 0
    nobody = routed([[NONE, NONE]] * 6, logits)
    assert balance_loss(nobody, choice_counts(nobody)).item() == pytest.approx(5)


def test_counts_say_how_many_slots_each_choice_got() -> None:
    counts = choice_counts(routed([[0, 2], [NONE, NONE], [2, NONE]], torch.zeros(3, 4)))
    assert counts.tolist() == [1, 0, 2, 3]


def test_opposite_imbalances_of_two_layers_do_not_cancel() -> None:
    strong = torch.full((4, 2), -9.0)
    left, right = strong.clone(), strong.clone()
    left[:, 0] = right[:, 1] = 9
    layers = [routed([[0]] * 4, left), routed([[1]] * 4, right)]
    loss, parts, counts = router_terms(layers, 1.0, LossRecipe(balance=1.0, z=0.0), lambda values: values)
    assert float(loss) == pytest.approx(4, abs=1e-4)  # 2 each
    assert parts["balance"].item() == pytest.approx(2, abs=1e-4)
    assert counts.tolist() == [[4, 0], [0, 4]]


def test_parts_of_a_batch_in_several_processes_add_up() -> None:
    _, whole = random_routing(12)
    counts = choice_counts(whole)
    for loss in (balance_loss, z_loss):
        parts = [loss(whole.rows(torch.arange(first, last)), counts) for first, last in ((0, 3), (3, 12))]
        assert torch.allclose(parts[0] + parts[1], loss(whole, counts))
    assert torch.allclose(z_loss(whole, counts), whole.logits.logsumexp(1).square().mean())  # pyright: ignore[reportOptionalMemberAccess]


@pytest.mark.parametrize(("balancing", "balance"), [("loss", 2.0), ("none", 0.0)])
def test_the_recipe_weighs_the_losses_of_routers(balancing: Any, balance: float) -> None:
    """Without the balance loss there still is the z-loss."""
    _, routing = random_routing(12)
    given = LossRecipe(balancing=balancing, balance=2.0, z=3.0)
    loss, parts, _ = router_terms([routing], 0.5, given, lambda values: values)
    counts = choice_counts(routing)
    expected = balance * balance_loss(routing, counts) + 3 * z_loss(routing, counts)
    assert float(loss) == pytest.approx(0.5 * expected.item())
    assert parts["z"].item() == pytest.approx(0.5 * z_loss(routing, counts).item())


def test_a_router_that_always_takes_none_still_learns() -> None:
    router = Router(8, MoEConfig(n_experts=4))
    x = torch.randn(6, 8).abs()
    with torch.no_grad():
        router.weight.zero_()
        router.weight[-1] = 1
    routing = router(x)
    assert (routing.experts == NONE).all()
    assert torch.autograd.grad(routing.gates.square().sum(), router.weight, retain_graph=True)[0].abs().max() < 1e-12
    loss, _, _ = router_terms([routing], 1.0, LossRecipe(balance=0.01, z=0.0), lambda values: values)
    (gradient,) = torch.autograd.grad(torch.as_tensor(loss), router.weight)
    assert gradient.abs().sum() > 0
    less_none = (x @ -gradient.T).mean(0)
    assert less_none[-1] < 0 and (less_none[:-1] > 0).all()


def test_a_bias_moves_the_choice_and_not_the_gates() -> None:
    torch.manual_seed(1)
    router, plain = Router(8, MoEConfig(n_experts=4, balance_bias=True)), Router(8, MoEConfig(n_experts=4))
    plain.weight = router.weight
    torch.nn.init.normal_(router.weight)
    x = torch.randn(50, 8)
    assert torch.equal(router(x).experts, plain(x).experts)
    assert router.bias is not None
    router.bias += torch.tensor([100.0, 90, 0, 0, 0])
    routing = router(x)
    assert routing.experts.sort(1).values.tolist() == [[0, 1]] * 50
    chosen = routing.logits.gather(1, routing.experts)  # pyright: ignore[reportOptionalMemberAccess]
    assert torch.allclose(routing.gates, chosen.softmax(1))
    assert (routing.gates[:, 0] >= routing.gates[:, 1]).all()


@pytest.mark.parametrize("name", ["dense", "segment", "token"])
def test_a_process_without_a_pack_takes_part_and_changes_nothing(name: str) -> None:
    model = tiny_model(name, torch.float32).train()
    objective = SpeechObjective(LossRecipe(balance=1.0, z=1.0))
    terms = objective(model, [], Totals(10, 3), Parallel())
    terms.loss.backward()
    assert terms.loss == 0 and terms.counts.sum() == 0
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize(("name", "choices"), [("dense", 0), ("segment", 1), ("token", 5)])
def test_a_pass_reports_every_router(name: str, choices: int) -> None:
    model = tiny_model(name, torch.float32).train()
    pack = random_pack([(20, 5), (31, 7)], CONFIGS[name])
    objective = SpeechObjective(LossRecipe())
    totals = objective.totals([pack])
    assert totals == Totals(5 + 7 - 4, 2)
    terms = objective(model, [pack], totals, Parallel())
    assert len(terms.counts) == choices
    if name == "token":
        assert terms.counts.sum(1).tolist() == [2 * 51.0] * 3 + [2 * 12.0] * 2
    if name == "segment":
        assert terms.counts.sum() == 2 * 2
