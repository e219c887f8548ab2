"""A teacher's word is learned beside what is said: where there are labels, and of the same tokens."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from model.tiny import CONFIGS, tiny_model
from train.tiny import random_pack, recipe_tree

from whisper_moe.data.examples import IGNORED
from whisper_moe.train.losses import SpeechObjective, run_packs
from whisper_moe.train.parallel import Parallel
from whisper_moe.train.reading import RecipeError, checked
from whisper_moe.train.recipe import LossRecipe
from whisper_moe.train.run import RECORD, check_same, run
from whisper_moe.weights.checkpoint import save_checkpoint
from whisper_moe.weights.load import load_model

taught = import_module("recipes.eight-experts.taught")


def taught_by(teacher: Path, material: Path, **losses: Any) -> Any:
    tree = recipe_tree(material / "model", material / "data", steps=1)
    tree["model"]["expert"] = "tamil"
    return checked(taught.TaughtRecipe, tree | {"teacher": {"source": str(teacher)}, "losses": losses}, "test")


def test_a_teacher_is_followed_where_there_are_labels_and_is_not_changed() -> None:
    torch.manual_seed(2)
    model, teacher = (tiny_model(name, torch.float32) for name in ("dense", "segment"))
    teacher.requires_grad_(False)
    packs = [random_pack([(20, 5), (31, 7)], CONFIGS["dense"])]
    speech = SpeechObjective(LossRecipe())
    other = taught.TaughtObjective(LossRecipe(), teacher, 0.5)
    totals = speech.totals(packs)
    alone, terms = (each(model, packs, totals, Parallel()) for each in (speech, other))
    wanted, found = run_packs(teacher, packs).logits.softmax(-1), run_packs(model, packs).logits.softmax(-1)
    apart = (wanted * (wanted / found).log()).sum(-1)[packs[0].labels_T != IGNORED].sum() / totals.tokens
    assert torch.allclose(terms.parts["divergence"], apart.detach(), atol=1e-5) and apart > 0.01
    assert torch.allclose(terms.loss, alone.loss + 0.5 * apart, atol=1e-5)
    terms.loss.backward()
    assert all(p.grad is None for p in teacher.parameters()) and any(p.grad is not None for p in model.parameters())
    assert other(model, [], totals, Parallel()).parts["divergence"] == 0
    twin = tiny_model("dense", torch.float32)
    twin.load_state_dict(model.state_dict())
    same = taught.TaughtObjective(LossRecipe(), twin, 0.5)(model, packs, totals, Parallel())
    assert same.parts["divergence"] < 1e-7  # training pads short segments, a teacher goes from one to the next
    torch.testing.assert_close(same.loss, alone.loss, rtol=0, atol=1e-6)


def test_a_teacher_may_be_moved_and_not_be_another(material: Path, tmp_path: Path) -> None:
    (tmp_path / "a/large").mkdir(parents=True), (tmp_path / "a/other").mkdir(), (tmp_path / "b").mkdir()
    then = taught_by(tmp_path / "a/large", material).model_dump(mode="json")
    (tmp_path / RECORD).write_text(json.dumps({"recipe": then}), "utf-8")
    with pytest.raises(RecipeError, match=r"teacher\.source was .*large.*, is .*other"):
        check_same(taught_by(tmp_path / "a/other", material), tmp_path)
    (tmp_path / "a/large").rename(tmp_path / "b/large")
    check_same(taught_by(tmp_path / "b/large", material), tmp_path)


def test_an_expert_is_trained_on_what_a_teacher_would_say(material: Path, tmp_path: Path) -> None:
    assert run(taught_by(material / "model", material), tmp_path / "run") == 0
    [line, *_] = (tmp_path / "run/metrics.jsonl").read_text("utf-8").splitlines()
    assert json.loads(line)["divergence"] > 0  # the teacher chooses its experts itself
    other = load_model(str(material / "model"))
    save_checkpoint(tmp_path / "laid out", replace(other, tokenizer_json=other.tokenizer_json + b"\n"))
    assert run(taught_by(tmp_path / "laid out", material), tmp_path / "the same tokens") == 0
    tokens = json.loads(other.tokenizer_json)
    tokens["model"]["vocab"] |= {"!": tokens["model"]["vocab"]["?"], "?": tokens["model"]["vocab"]["!"]}
    save_checkpoint(tmp_path / "other", replace(other, tokenizer_json=json.dumps(tokens).encode()))
    with pytest.raises(RecipeError, match=r"teacher\.source: .*other does not have the model's tokens"):
        run(taught_by(tmp_path / "other", material), tmp_path / "refused")
    with pytest.raises(RecipeError, match="a teacher tells of all tokens"):
        run(taught_by(material / "model", material, sampled=5), tmp_path / "some")
