"""What sees learns alone: films to their texts, by a classifier that stays behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from data.miniatures import film
from generate.test_sign import SEES
from generate.tiny import tiny_whisper_moe
from train.tiny import recipe_tree

pytest.importorskip("datasets")

from recipes.sign.stem import StemRecipe
from whisper_moe.train.reading import RecipeError, checked
from whisper_moe.train.run import run
from whisper_moe.weights.load import load_model


def recipe_of(folder: Path, model: Path) -> StemRecipe:
    tree = recipe_tree(model, folder, steps=30, lr=3e-3)
    tree["data"]["train"] = [{"kind": "table", "source": str(folder / "films.tsv")}]
    tree["data"]["evaluation"] = tree["data"]["train"]
    tree["evaluation"] = {"every": 15, "metric": "loss"}
    return checked(StemRecipe, tree, "here")


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("films")
    rows = ["id\tvideo\ttext\tlanguage\ttarget_language\ttask"]
    for place, text in enumerate(("dog", "cat", "a hat")):
        clip = film(folder / f"{place}.mkv", [0.04 * (place + 1) * number for number in range(20)])
        rows.append(f"{place}\t{clip}\t{text}\tsgn\ten\tsign")
    (folder / "films.tsv").write_text("\n".join(rows) + "\n", "utf-8")
    tiny_whisper_moe(config=SEES).save_pretrained(folder / "sees")
    tiny_whisper_moe().save_pretrained(folder / "hears")
    return folder


def test_the_stem_learns_and_nothing_else_and_the_classifier_stays_behind(films: Path, tmp_path: Path) -> None:
    assert run(recipe_of(films, films / "sees"), tmp_path / "run") == 0
    before, after = (load_model(str(path), aside=True).state for path in (films / "sees", tmp_path / "run/model"))
    changed = {key for key, tensor in after.items() if not torch.equal(tensor, before[key])}
    assert before.keys() == after.keys() and "senses.film.early.0.weight" in changed
    assert all(key.startswith("senses.film.") for key in changed)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text("utf-8").splitlines()]
    judged = [line["evaluation"] for line in lines if "evaluation" in line]
    assert judged[-1]["right"] == 1 and judged[-1]["loss"] < judged[0]["loss"]


def test_a_model_that_sees_no_films_has_no_stem_to_teach(films: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no part for films"):
        run(recipe_of(films, films / "hears"), tmp_path / "run")


def test_a_film_to_be_judged_by_has_a_text_that_is_learned(films: Path, tmp_path: Path) -> None:
    rows = (films / "films.tsv").read_text("utf-8").splitlines()
    (films / "others.tsv").write_text("\n".join([*rows[:2], rows[2].replace("cat", "horse")]) + "\n", "utf-8")
    recipe = recipe_of(films, films / "sees")
    judged = [recipe.data.evaluation[0].model_copy(update={"source": str(films / "others.tsv")})]
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"evaluation": judged})})
    with pytest.raises(RecipeError, match=r"1\.mkv.*: no film that is learned from has its text"):
        run(recipe, tmp_path / "run")
