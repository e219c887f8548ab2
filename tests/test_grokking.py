"""Grokking: the task is division, the model this project's decoder block, and the recipe what the paper says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from recipes.grokking.division import PLOT, RECIPE, GrokfastAdamW, GrokkingRecipe, Plateau, equations, main, run, train
from whisper_moe.train.monitor import METRICS
from whisper_moe.train.reading import checked, read_tree


def test_equations_are_all_divisions() -> None:
    tokens, answers = equations(7)
    assert len(tokens) == 42 and len({tuple(row) for row in tokens.tolist()}) == 42
    for (a, over, b, equals), c in zip(tokens.tolist(), answers.tolist(), strict=True):
        assert (c * b) % 7 == a and (over, equals) == (7, 8) and b != 0


def test_the_recipe_is_the_papers() -> None:
    recipe = checked(GrokkingRecipe, read_tree(RECIPE), RECIPE.name)
    assert recipe == GrokkingRecipe()
    assert len(equations(recipe.prime)[0]) == 9_312
    assert (recipe.lr, recipe.weight_decay, recipe.betas, recipe.batch_size) == (1e-3, 1.0, (0.9, 0.98), 512)


@pytest.mark.parametrize(
    ("text", "said"),
    [("widht: 3", "widht is not a key of a recipe; did you mean width?"), ("prime: 91", "91 is 7 times 13")],
)
def test_a_recipe_that_cannot_be_used_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str, said: str
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert run(path, [], tmp_path / "out") == 2
    assert f"{path}: " in caplog.text and said in caplog.text


def test_what_fails_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setattr("sys.argv", ["division.py", "-o", str(file), "prime=5"])
    assert main() == 1
    assert caplog.messages == [f"division.py: {file}: File exists"]


def test_it_learns_what_it_is_trained_on_before_what_it_is_not(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text("prime: 11\nsteps: 120\nwidth: 32\nevaluate_every: 30\n")
    assert run(path, ["weight_decay=0.0"], tmp_path / "out") == 0
    points = [json.loads(line) for line in (tmp_path / "out" / METRICS).read_text().splitlines()]
    assert [point["step"] for point in points] == [0, 30, 60, 90, 120]
    assert points[-1]["train_accuracy"] > 0.95 > points[-1]["validation_accuracy"] + 0.3
    assert (tmp_path / "out" / PLOT).stat().st_size > 1_000


def test_a_plateau_is_told_once_and_only_there(caplog: pytest.LogCaptureFixture) -> None:
    plateau = Plateau()
    said = [plateau.warn(step, loss, 5.0) for step, loss in enumerate([4.6, 2.0, 0.3, 0.2, 0.1, 0.05, 0.01])]
    assert [index for index, warned in enumerate(said) if warned] == [4]
    assert "training loss is 0.1, the validation loss 5" in caplog.text
    both_fall = Plateau()
    assert not any(both_fall.warn(step, loss, loss * 1.2) for step, loss in enumerate([4.6, 2.0, 0.3, 0.2, 0.1, 0.05]))
    interrupted = Plateau()
    losses = [(4.6, 5), (0.1, 5), (0.1, 5), (4.0, 5), (0.1, 5), (0.1, 5)]
    assert not any(interrupted.warn(step, *pair) for step, pair in enumerate(losses))


def test_a_seed_gives_the_same_curve() -> None:
    recipe = GrokkingRecipe(prime=7, steps=6, width=16, evaluate_every=3)
    first, second = ([point["train_loss"] for point in train(recipe)] for _ in range(2))
    assert first == second != [p["train_loss"] for p in train(recipe.model_copy(update={"seed": 1}))]


def test_grokfast_amplifies_the_slow_part() -> None:
    """A parameter whose optimizer is plain descent in disguise: the gradients that AdamW sees are what the paper says."""
    gradients = [torch.tensor([1.0, -2.0]), torch.tensor([0.5, 1.0]), torch.tensor([-1.0, 0.0])]
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = GrokfastAdamW([parameter], alpha=0.9, amplification=2.0, lr=1e-3, weight_decay=0.0)
    slow, twin = None, torch.nn.Parameter(torch.zeros(2))
    reference = torch.optim.AdamW([twin], lr=1e-3, weight_decay=0.0)
    for gradient in gradients:
        slow = gradient.clone() if slow is None else 0.9 * slow + 0.1 * gradient
        parameter.grad, twin.grad = gradient.clone(), gradient + 2.0 * slow
        optimizer.step()
        reference.step()
        assert torch.allclose(parameter, twin, atol=1e-7)
    assert torch.allclose(optimizer.state[parameter]["slow_gradient"], slow)


def test_grokfast_without_amplification_is_adamw() -> None:
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    pair = GrokfastAdamW([ours], amplification=0.0, lr=0.1), torch.optim.AdamW([theirs], lr=0.1)
    for _ in range(5):
        ours.grad = torch.randn(3)
        theirs.grad = ours.grad.clone()
        for optimizer in pair:
            optimizer.step()
    assert torch.equal(ours, theirs)
