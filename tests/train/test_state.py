"""State as tensors and JSON: what goes on from it goes on bit for bit."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from whisper_moe.train.checkpoint import load, save
from whisper_moe.train.state import (
    join,
    load_optimizer_state,
    optimizer_state,
    random_state,
    set_random_state,
    split,
)


def model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.LayerNorm(2))


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (net(torch.randn(5, 3, generator=generator)) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def matrices_first(net: nn.Module) -> list[dict[str, Any]]:
    matrices = [p for p in net.parameters() if p.ndim == 2]
    return [
        {"params": matrices, "lr": 0.01},
        {"params": [p for p in net.parameters() if p.ndim < 2], "weight_decay": 0},
    ]


def vectors_first_backwards(net: nn.Module) -> list[dict[str, Any]]:
    return [{**group, "params": group["params"][::-1]} for group in matrices_first(net)[::-1]]


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.98), eps=1e-6),
    "AMSGrad": lambda groups: torch.optim.Adam(groups, lr=1e-2, amsgrad=True),
    "SGD": lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9),
    "fused": lambda groups: torch.optim.AdamW(groups, lr=1e-2, fused=True),
}


def through_a_checkpoint(state: Any, run: Path) -> Any:
    tensors, tree = split(state, "optimizer")
    loaded = load(save(run, 1, tensors, {"optimizer": tree}, keep=1))
    return join(loaded.meta["optimizer"], loaded.tensors)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("order", [matrices_first, vectors_first_backwards])
def test_an_optimizer_goes_on_bit_for_bit(kind: str, order: Callable[[nn.Module], Any], tmp_path: Path) -> None:
    """Also where its groups and their parameters now come in another order: names count."""
    net = model()
    optimizer = OPTIMIZERS[kind](matrices_first(net))
    train(net, optimizer, 3, seed=1)
    optimizer.param_groups[0]["lr"] = 0.004
    state = through_a_checkpoint(optimizer_state(optimizer, net.named_parameters()), tmp_path)
    weights = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    expected = train(net, optimizer, 3, seed=2)

    again = model(seed=9)
    again.load_state_dict(weights)
    optimizer = OPTIMIZERS[kind](order(again))
    load_optimizer_state(optimizer, again.named_parameters(), state)
    assert {group["lr"] for group in optimizer.param_groups} == {0.004, 0.01}
    assert train(again, optimizer, 3, seed=2) == expected
    for name, tensor in net.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert all(isinstance(g["betas"], tuple) for g in optimizer.param_groups if "betas" in g)


def test_an_optimizer_that_has_not_stepped(tmp_path: Path) -> None:
    net = model()
    state = through_a_checkpoint(optimizer_state(torch.optim.AdamW(net.parameters()), net.named_parameters()), tmp_path)
    optimizer = torch.optim.AdamW(net.parameters())
    load_optimizer_state(optimizer, net.named_parameters(), state)
    assert not optimizer.state


def test_a_parameter_that_never_had_a_gradient_has_no_state(tmp_path: Path) -> None:
    net = model()
    optimizer = torch.optim.AdamW(net.parameters())
    next(net.parameters()).requires_grad_(False)
    train(net, optimizer, 1, seed=1)
    state = through_a_checkpoint(optimizer_state(optimizer, net.named_parameters()), tmp_path)
    assert len(state["state"]) == 5
    load_optimizer_state(optimizer, net.named_parameters(), state)
    assert len(optimizer.state) == 5


def test_other_parameters_are_refused_by_name() -> None:
    net = model()
    everything = optimizer_state(torch.optim.AdamW(net.parameters()), net.named_parameters())
    fewer = torch.optim.AdamW(net[0].parameters())
    with pytest.raises(ValueError, match=r"no group of just these parameters: 1.bias, 1.weight, 2.bias, 2.weight"):
        load_optimizer_state(fewer, net.named_parameters(), everything)
    part = optimizer_state(fewer, net.named_parameters())
    with pytest.raises(ValueError, match=r"parameters: 1.bias, 1.weight"):
        load_optimizer_state(torch.optim.AdamW(net.parameters()), net.named_parameters(), part)
    with pytest.raises(ValueError, match=r"parameters: "):
        load_optimizer_state(torch.optim.AdamW(matrices_first(net)), net.named_parameters(), everything)
    two = optimizer_state(torch.optim.AdamW(matrices_first(net)), net.named_parameters())
    with pytest.raises(ValueError, match=r"2 parameter groups, this one has 1"):
        load_optimizer_state(torch.optim.AdamW(matrices_first(net)[:1]), net.named_parameters(), two)


def test_a_parameter_without_a_name_is_refused() -> None:
    net, stray = model(), nn.Parameter(torch.zeros(7))
    with pytest.raises(ValueError, match=r"parameters that the model does not name, of shape \[7\]"):
        optimizer_state(torch.optim.SGD([*net.parameters(), stray]), net.named_parameters())


# Trees


def test_a_tree_comes_back() -> None:
    tree = {"a": [1, {"b": torch.arange(3)}, None], "c": {"d/e": torch.tensor(2.0), "f": "text"}, "g": []}
    tensors, plain = split(tree, "x")
    assert set(tensors) == {"x/a/1/b", "x/c/d/e"}
    back = join(json.loads(json.dumps(plain)), tensors)
    assert torch.equal(back["a"][1].pop("b"), torch.arange(3)) and torch.equal(back["c"].pop("d/e"), torch.tensor(2.0))
    assert back == {"a": [1, {}, None], "c": {"f": "text"}, "g": []}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": {1: 2}}, "x/a has the key 1"),
        ({"a": "tensor:x/b"}, "x/a is the text 'tensor:x/b', which stands for a tensor"),
        ({"a/b": torch.zeros(1), "a": {"b": torch.ones(1)}}, "x/a/b: two tensors would have this name"),
    ],
)
def test_what_could_not_be_told_apart_is_refused(tree: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split(tree, "x")


def test_a_tensor_that_is_not_there_is_named() -> None:
    tensors, plain = split({"a": torch.zeros(1)}, "x")
    assert set(tensors) == {"x/a"}
    with pytest.raises(ValueError, match="the checkpoint lacks the tensor x/a"):
        join(plain, {})


# Random states


GLOBAL = np.random  # what libraries draw from


def seed(number: int) -> None:
    torch.manual_seed(number)
    random.seed(number)
    GLOBAL.seed(number)


def draws() -> list[Any]:
    """Normal draws too: they come in pairs, and one of each pair is kept for later."""
    return [
        torch.randn(5).tolist(), torch.rand(3).tolist(), GLOBAL.standard_normal(), GLOBAL.randint(1 << 30),
        random.random(), random.gauss(0, 1), random.getrandbits(70),
    ]  # fmt: skip


@pytest.mark.parametrize("before", [0, 1, 2, 700])
def test_random_generators_go_on_bit_for_bit(before: int, tmp_path: Path) -> None:
    seed(1)
    for _ in range(before):
        torch.rand(1), random.gauss(0, 1), GLOBAL.standard_normal()
    state = load(save(tmp_path, 1, {}, {"random": random_state()}, keep=1)).meta["random"]
    expected = [draws() for _ in range(300)]
    seed(7)
    set_random_state(state)
    assert [draws() for _ in range(300)] == expected


def test_reading_the_random_state_changes_nothing() -> None:
    def drawn(look: bool) -> list[Any]:
        seed(1)
        if look:
            random_state()
        return draws()

    assert drawn(look=True) == drawn(look=False)


def test_states_are_tensors_of_their_own() -> None:
    """What is split off is not a copy: it is saved before the next step, and no gradient hangs on it."""
    parameter = nn.Parameter(torch.ones(2))
    tensors, _ = split({"p": parameter}, "x")
    found: Tensor = tensors["x/p"]
    assert not found.requires_grad and found.data_ptr() == parameter.data_ptr()
