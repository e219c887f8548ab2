"""Schedules are what they say at every step, and every parameter is in the group that it should be in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from model.tiny import CONFIGS

from whisper_moe.model.model import WhisperMoEModel
from whisper_moe.train.losses import build_optimizer, freeze, precision_on, set_rates, unmatched
from whisper_moe.train.recipe import OptimisationRecipe, load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
RATES = OptimisationRecipe(lr=1e-4, weight_decay=0.1, ttt_lr=1e-3, router_lr=2e-4, new_token_lr=3e-4)


def test_the_published_rate_rises_to_the_end_and_the_practical_one_falls() -> None:
    published, practical = (load_recipe(RECIPES / f"{name}.yaml").optimisation for name in ("published", "practical"))
    rates = [given.lr * given.factor(step, 5_000) for given in (published, practical) for step in range(5_000)]
    assert published.steps == practical.steps == 5_000
    assert rates[:5_000] == pytest.approx([1.7e-5 * step / 10_000 for step in range(5_000)], rel=1e-15, abs=0)
    assert f"{rates[4_999]:.4e}" == "8.4983e-06"
    falling = [1.7e-5 * min(step / 500, (5_000 - step) / 4_500) for step in range(5_000)]
    assert rates[5_000:] == pytest.approx(falling, rel=1e-12)


@pytest.mark.parametrize(
    ("schedule", "name"), [("linear", "linear"), ("cosine", "cosine"), ("constant", "constant_with_warmup")]
)
@pytest.mark.parametrize(("steps", "warmup"), [(20, 5), (20, 0), (7, 30)])
def test_schedules_are_those_of_transformers(schedule: str, name: str, steps: int, warmup: int) -> None:
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    for step in range(steps):
        ours = OptimisationRecipe.model_validate({"schedule": schedule, "warmup": warmup}).factor(step, steps)
        assert ours == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_every_parameter_is_in_one_group_with_the_rate_it_needs() -> None:
    model = WhisperMoEModel(CONFIGS["segment"])
    optimizer = build_optimizer(model, RATES)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(found) == len(names)
    expected = {
        "encoder.blocks.0.ttt.gate_forward": (1e-3, 0.0),
        "encoder.blocks.0.ttt.gate_backward": (1e-3, 0.0),
        "encoder.blocks.0.ttt.w1": (1e-3, 0.0),
        "encoder.blocks.0.ttt.rate.weight": (1e-3, 0.0),
        "decoder.blocks.0.ttt.tau": (1e-3, 0.0),
        "encoder.blocks.0.ttt.qkv.weight": (1e-4, 0.1),
        "encoder.router.weight": (2e-4, 0.0),
        "encoder.blocks.0.attn.qkv.weight": (1e-4, 0.1),
        "encoder.blocks.0.attn.qkv.bias": (1e-4, 0.0),
        "encoder.blocks.0.attn_norm.weight": (1e-4, 0.0),
        "encoder.blocks.1.experts.up_weight": (1e-4, 0.1),
        "encoder.blocks.1.experts.up_bias": (1e-4, 0.0),
        "decoder.token_embedding.weight": (1e-4, 0.0),
        "decoder.positions": (1e-4, 0.0),
    }
    assert {name: (found[name]["peak"], found[name]["weight_decay"]) for name in expected} == expected


def test_new_tokens_have_a_rate_of_their_own() -> None:
    config = CONFIGS["dense"].model_copy(update={"vocab_size": 62, "new_tokens": ("<|or|>",)})
    optimizer = build_optimizer(WhisperMoEModel(config), RATES)
    (group,) = [group for group in optimizer.param_groups if group["name"] == "new_tokens"]
    assert group["lr"] == 3e-4 and [list(p.shape) for p in group["params"]] == [[1, 32]]


def grouped(*named: tuple[str, float, float]) -> OptimisationRecipe:
    groups = [{"pattern": pattern, "lr": rate, "weight_decay": decay} for pattern, rate, decay in named]
    return OptimisationRecipe.model_validate_json(json.dumps({"lr": 1e-4, "weight_decay": 0.1, "groups": groups}))


def test_a_named_group_comes_before_all_others_and_of_two_alike_the_first_counts() -> None:
    model = WhisperMoEModel(CONFIGS["segment"])
    named = [("decay", 9e-2, 0.9), ("*.experts.*", 5e-2, 0.3), ("*.experts.*", 6e-2, 0.4)]
    optimizer = build_optimizer(model, grouped(*named))
    groups = {group["name"]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups}
    assert groups["decay"] == (1e-4, 0.1) and groups["*.experts.*"] == (5e-2, 0.3)
    assert unmatched(model, [pattern for pattern, _, _ in named]) == ["decay"]
    optimizer = build_optimizer(model, grouped(named[1], ("*", 7e-2, 0.0)))
    assert {group["name"]: group["lr"] for group in optimizer.param_groups} == {"*.experts.*": 5e-2, "*": 7e-2}
    set_rates(optimizer, 0.5)
    assert {group["lr"] for group in optimizer.param_groups} == {2.5e-2, 3.5e-2}


def test_bfloat16_that_is_only_emulated_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert precision_on("auto", torch.device("cuda")) == "float16"


def test_what_is_frozen_stays_out_of_the_optimizer() -> None:
    model = WhisperMoEModel(CONFIGS["segment"])
    freeze(model, ["*"], ["*.ttt.gate_*", "decoder.norm.*"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all(".gate_" in name or name.startswith("decoder.norm.") for name in trained)
    optimizer = build_optimizer(model, RATES)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(trained)


@pytest.mark.parametrize(
    ("frozen", "trained", "said"),
    [
        (["encoders.*"], [], "'encoders.*'"),
        (["*"], ["*.tttt.*"], "'*.tttt.*'"),
        (["*"], [], "nothing is left to train"),
    ],
)
def test_a_pattern_that_does_nothing_is_an_error(frozen: list[str], trained: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=r"no parameter|nothing is left") as raised:
        freeze(WhisperMoEModel(CONFIGS["dense"]), frozen, trained)
    assert said in str(raised.value)
