"""What a recipe's data and model must be is said at the start of a run, before anything is learned."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data.memory import MemoryCorpus, clip, damaged, tiny_reader
from generate.tiny import tiny_tokenizer, tiny_whisper_moe
from train.tiny import recipe_tree

pytest.importorskip("datasets")

from whisper_moe.data.corpus import CorpusConfig
from whisper_moe.data.sample import DataError
from whisper_moe.evaluate.metrics import Evaluator
from whisper_moe.generate.decode import WindowDecoder
from whisper_moe.model.router import NONE
from whisper_moe.train import build
from whisper_moe.train.parallel import Parallel
from whisper_moe.train.reading import RecipeError, apply, checked
from whisper_moe.train.recipe import Recipe
from whisper_moe.train.run import RECORD, asked, check_same, run
from whisper_moe.weights.load import load_model

Tree = dict[str, Any]


@pytest.fixture(scope="module")
def holed(material: Path) -> Path:
    """``material``, with a table in which a recording of twelve is missing."""
    shutil.copytree(material / "data", material / "holed")
    (material / "holed" / "3.wav").unlink()
    return material


def recipe_with(material: Path, change: Callable[[Tree], object] = lambda tree: None, data: str = "data") -> Recipe:
    tree = recipe_tree(material / "model", material / data, steps=1)
    change(tree)
    return checked(Recipe, tree, "test")


def table(folder: Path, **settings: Any) -> Tree:
    return {"kind": "table", "source": str(folder), "languages": ["en"]} | settings


# Evaluation corpora.


def test_evaluation_corpora_of_one_name_are_refused(material: Path, tmp_path: Path) -> None:
    judged = recipe_with(material, lambda tree: tree["data"].update(evaluation=[table(material / "data")] * 2))
    judged = judged.model_copy(update={"evaluation": judged.evaluation.model_copy(update={"metric": "loss"})})
    with pytest.raises(RecipeError, match="several corpora are called 'data'; give each a `name` in the recipe"):
        run(judged, tmp_path / "run")


def test_a_row_that_cannot_be_judged_is_left_out_and_counted() -> None:
    model = tiny_whisper_moe()
    rows = [
        clip("a", 0.3),
        clip("klingon", 0.3, language="tlh"),
        replace(clip("shown", 0.3), task="sign", audio=None, video="a.mp4"),
        DataError("memory.tsv", "no such column", row=3),
        clip("b", 0.3),
    ]
    evaluator = Evaluator(tiny_reader(model.config), tiny_tokenizer(), model.generation, margin=0.5)
    found = evaluator.figures(model.model, [MemoryCorpus(rows)], batch_size=2)
    assert found is not None and found["left_out"] == 3 and found["loss"] > 0


def check(rows: list[Any], name: str = "memory", *, decode: bool = False) -> None:
    build.check_rows(MemoryCorpus(rows, name), tiny_reader(), decode=decode)


MUTE, BROKEN = clip("mute", 0.3, " "), DataError("memory.tsv", "no such column", row=1)


def test_the_first_sound_row_says_whether_a_corpus_can_be_judged() -> None:
    check([BROKEN, MUTE, damaged(clip("b", 0.3)), clip("a", 0.3)])
    with pytest.raises(RecipeError, match=r"data.evaluation: .*'tlh'"):
        check([MUTE, clip("k", 0.3, language="tlh")])


def test_an_evaluation_without_a_row_that_can_be_judged_is_refused_at_the_start() -> None:
    """Whatever it is that is wrong with each of them."""
    rows = [BROKEN, MUTE, damaged(clip("b", 0.3))]
    said = r"data.evaluation: b: none of the 3 rows can be judged by; the first: .*column; mute, .*; broken.wav: "
    with pytest.raises(RecipeError, match=said):
        check(rows, "b")
    check([*rows, clip("long", 3.0), clip("a", 0.3)], "b")
    with pytest.raises(RecipeError, match="none of the 0 rows"):
        check([])
    laughing = [clip("a", 0.3, "[sighs]"), clip("b", 0.3, "(laughs)")]
    check(laughing)
    pytest.importorskip("rapidfuzz")
    with pytest.raises(RecipeError, match=r"none of the 2 rows .*: a: its text has no word that could be counted; b: "):
        check(laughing, decode=True)


# What is listed and missing.


def test_missing_recordings_are_told_and_count_as_corrupt(
    holed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said = r"8\.3% of 12 samples are corrupt, more than 5\.0%; the first: .*3\.wav: no such"
    with pytest.raises(DataError, match=said):
        run(recipe_with(holed, data="holed"), tmp_path / "run")
    caplog.clear()
    allowed = recipe_with(holed, lambda tree: tree["data"]["loader"].update(max_corrupt_share=0.1), "holed")
    assert run(allowed, tmp_path / "allowed") == 0
    said = "holed: 1 samples are listed and cannot be had, the first: holed/train/3.wav: no such file"
    assert caplog.messages.count(said) == 1


@pytest.mark.parametrize("where", ["stream", "evaluation"])
def test_missing_recordings_of_a_stream_or_an_evaluation_are_refused(holed: Path, tmp_path: Path, where: str) -> None:
    def change(tree: Tree) -> None:
        if where == "stream":
            tree["data"]["train"] = [table(holed / "holed", streaming=True)]
        else:
            tree["data"]["evaluation"], tree["evaluation"] = [table(holed / "holed")], {"metric": "loss"}

    said = r"1 of 12 samples cannot be had, more than 5\.0%; the first: holed/train/3\.wav"
    with pytest.raises(DataError, match=said):
        run(recipe_with(holed, change), tmp_path / "run")


def test_nothing_is_missing_where_a_limit_is_reached(holed: Path) -> None:
    configs = [CorpusConfig.model_validate(table(holed / "holed", limit=limit)) for limit in (5, 12)]
    task = build.Task(recipe_with(holed), None, Parallel(), lambda skipped: None, holed)  # pyright: ignore[reportArgumentType]
    assert [len(corpus.left_out) for corpus in task.opened(configs)] == [0, 1]


# Models and devices.


def test_a_group_that_is_nobodys_is_told(material: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    groups = [{"pattern": "*.expert.*", "lr": 1e-3}, {"pattern": "*.router.*", "lr": 1e-3}]
    assert run(recipe_with(material, lambda tree: tree["optimisation"].update(groups=groups)), tmp_path / "run") == 0
    assert "no parameter is called '*.expert.*'" in caplog.text and "'*.router.*'" not in caplog.text


def test_what_a_run_goes_on_with_is_said_as_it_is_written(material: Path, tmp_path: Path) -> None:
    """Of a run from before margins had a range."""
    recipe = recipe_with(material)
    then, now = recipe.model_dump(mode="json"), recipe.model_dump(mode="json")
    then["data"]["loader"]["examples"]["margin"], then["model"]["freeze"] = 2.5, ["encoder.*"]
    (tmp_path / RECORD).write_text(json.dumps({"recipe": then}), "utf-8")
    with pytest.raises(RecipeError, match=r"margin was 2\.5, is ") as error:
        check_same(recipe, tmp_path)
    assert f"--resume {tmp_path} alone takes that" in str(error.value)
    needed = shlex.split(str(error.value).partition(" needs ")[2])
    assert needed == ["data.loader.examples.margin=2.5", 'model.freeze=["encoder.*"]']
    for override in needed:
        apply(now, override)
    check_same(checked(Recipe, now, "now"), tmp_path)


@pytest.mark.parametrize(
    ("device", "said"),
    [("cuda", "sees no such device"), ("cuda:7", "sees no such device"), ("gpu", "device must be cpu")],
)
def test_a_device_that_is_not_here_is_said_before_a_model_is_loaded(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, said: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)

    def elsewhere(tree: Tree) -> None:
        tree["run"]["device"], tree["model"]["source"] = device, "nowhere/at-all.pt"

    with pytest.raises(RecipeError, match=f"run.device.*{said}"):
        run(recipe_with(material, elsewhere), tmp_path / "run")


def test_a_run_that_is_older_than_a_key_can_go_on(material: Path, tmp_path: Path) -> None:
    recipe = recipe_with(material)
    then = recipe.model_dump(mode="json")
    del then["optimisation"]["most_bad_steps"], then["data"]["loader"]["max_corrupt_share"]
    (tmp_path / RECORD).write_text(json.dumps({"recipe": then}), "utf-8")
    check_same(recipe, tmp_path)
    then["optimisation"]["lr"] = 1.0
    (tmp_path / RECORD).write_text(json.dumps({"recipe": then}), "utf-8")
    with pytest.raises(RecipeError, match=r"optimisation.lr was 1.0, is 0.003\. "):
        check_same(recipe, tmp_path)
    then["optimisation"]["gone"] = 1
    (tmp_path / RECORD).write_text(json.dumps({"recipe": then}), "utf-8")
    with pytest.raises(RecipeError, match=r"optimisation.gone was 1, is None"):
        check_same(recipe, tmp_path)


def test_a_run_from_when_corpora_had_kinds_can_go_on(material: Path, tmp_path: Path) -> None:
    recipe = recipe_with(material)
    then = recipe.model_dump(mode="json")
    for corpus in (*then["data"]["train"], *then["data"]["evaluation"]):
        corpus |= {"directions": ["en>any", "any>en"], "include_50": False, "videos": None}
    (tmp_path / RECORD).write_text(json.dumps({"recipe": then}), "utf-8")
    assert asked(tmp_path, [], None, resume=True)[0] == recipe
    check_same(recipe, tmp_path)
    then["data"]["train"][0] |= {"kind": "include", "include_50": True}
    (tmp_path / RECORD).write_text(json.dumps({"recipe": then}), "utf-8")
    with pytest.raises(RecipeError, match=r"include_50|kind"):
        asked(tmp_path, [], None, resume=True)


# One expert alone.


def test_a_run_for_one_expert_changes_that_expert_alone(material: Path, tmp_path: Path) -> None:
    def asked(tree: Tree) -> None:
        tree["model"]["expert"] = "tamil"
        tree["optimisation"].update(steps=3)

    before = load_model(str(material / "model")).state
    assert run(recipe_with(material, asked), tmp_path / "run") == 0
    after = load_model(str(tmp_path / "run/model")).state
    changed = {key for key, tensor in after.items() if not torch.equal(tensor, before[key])}
    assert changed
    assert all(".experts." in key for key in changed)
    for key in changed:
        same = [torch.equal(*pair) for pair in zip(after[key], before[key], strict=True)]
        assert same == [True, False, True], key


def test_the_expert_that_is_trained_answers_alone() -> None:
    clips = [np.random.default_rng(0).normal(size=8_000).astype(np.float32) for _ in range(3)]
    model = tiny_whisper_moe()
    decoder = WindowDecoder(model.model, model.tokenizer, {})
    build.only_expert(decoder.model, "english")
    alone = decoder.encode(clips, 0.5).routing
    assert alone is not None
    assert alone.choices == ((2, NONE),) * 3
    assert alone.gates.tolist() == [[1.0, 0.0]] * 3
    group = {"pattern": "*.experts.*", "lr": 0.1, "weight_decay": 0.1}
    for part, given, said in (
        ("optimisation", {"weight_decay": 0.1}, "weight_decay would wear away the other experts"),
        ("optimisation", {"groups": [group]}, "weight_decay would wear away the other experts"),
    ):
        with pytest.raises(RecipeError, match=said):
            checked(Recipe, {"model": {"expert": "x"}, "data": {"train": [table(Path())]}, part: given}, "test")
    with pytest.raises(RecipeError, match="no expert is called 'odia'; there are hindi, tamil, english"):
        build.only_expert(decoder.model, "odia")
