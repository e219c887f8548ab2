"""Recipes: the published one is literal, mistakes name the key and what was meant, and nothing but data is read."""

from __future__ import annotations

import ast
import inspect
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from recipes.parallel.train import ModelParallelRecipe
from whisper_moe.train import recipe as module
from whisper_moe.train.reading import RecipeError, parse
from whisper_moe.train.recipe import Recipe, load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text("data: {train: [{kind: table, source: clips, languages: [no]}]}", "utf-8")
    return path


def test_the_published_recipe_is_literal_and_the_practical_one_differs_in_what_it_repairs() -> None:
    published, practical = (load_recipe(RECIPES / f"{name}.yaml") for name in ("published", "practical"))
    given, loader = published.optimisation, published.data.loader
    assert (given.betas, given.eps, given.lr) == ((0.9, 0.98), 1e-6, 1.7e-5)
    assert (given.schedule, given.warmup, given.steps, given.precision) == ("linear", 10_000, 5_000, "auto")
    assert (loader.batch_size, loader.batch_unit, published.evaluation.batch_size) == (32, "examples", 32)
    assert (published.run.seed, loader.seed, given.accumulate) == (42, 42, 1)
    for corpora in (published.data, practical.data):
        assert {(each.source, each.configuration) for each in (*corpora.train, *corpora.evaluation)} == {
            ("ai4bharat/Kathbath", "hindi")
        }
    assert practical.optimisation.warmup == 500 and practical.evaluation.patience
    kept = {"lr", "schedule", "steps", "betas", "eps", "precision", "accumulate"}
    assert practical.optimisation.model_dump(include=kept) == given.model_dump(include=kept)


def test_every_recipe_can_be_read() -> None:
    recipes = {path.stem: load_recipe(path) for path in RECIPES.glob("*.yaml")}
    assert [corpus.split for corpus in recipes["table"].data.evaluation] == ["test"]
    joint, signs = (load_recipe(RECIPES / name) for name in ("joint/corpora.yaml", "sign/include.yaml"))
    assert [(each.source, each.split) for each in joint.data.train] == [
        *(("kathbath", "train"), ("include", "train"), ("wiki-translate", "train"))
    ]
    assert joint.data.evaluation == signs.data.evaluation


@pytest.mark.parametrize(
    ("page", "program", "kind", "many"),
    [
        ("docs/training.md", "-m whisper_moe train", Recipe, 2),
        ("recipes/parallel/README.md", "recipes/parallel/train.py", ModelParallelRecipe, 1),
    ],
)
def test_the_documented_commands_for_many_processes_can_be_given(
    page: str, program: str, kind: type[Recipe], many: int
) -> None:
    documented = (RECIPES.parent / page).read_text("utf-8").replace("\\\n", " ")
    commands = [line for line in documented.splitlines() if line.startswith("    torchrun ")]
    assert len(commands) == many
    for command in commands:
        path, *words = shlex.split(command.partition(program)[2])
        overrides = [word for word in words[words.index("-o") + 2 :] if not word.startswith("--")]
        recipe = load_recipe(RECIPES.parent / path, overrides, kind)
        assert recipe.parallel.data == "fsdp2"
        if isinstance(recipe, ModelParallelRecipe):  # there are experts to deal out
            assert recipe.model.moe is not None and recipe.model.moe.n_experts % recipe.parallel.experts == 0


def test_a_recipe_has_the_name_of_its_file_and_is_frozen(small: Path) -> None:
    recipe = load_recipe(small)
    assert recipe.name == "small" and recipe.data.train[0].source == "clips"
    assert recipe == Recipe.model_validate_json(recipe.model_dump_json())
    with pytest.raises(ValueError, match="frozen"):
        recipe.optimisation.lr = 1.0  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optimisation.lr=1e-4", 1e-4),
        ("data.train.0.limit=7", 7),
        ("data.train.0.source=a=b.tsv", "a=b.tsv"),
        ("data.train.0.name=no", "no"),
        ("evaluation.every=null", None),
        ("evaluation.padded=false", False),
        ("data.loader.examples.margin=[0.5, 4]", (0.5, 4.0)),
        ("model.moe={n_experts: 4}", 4),
        ("model.moe.n_experts=6", 6),
    ],
)
def test_overrides_reach_every_key(small: Path, override: str, value: object) -> None:
    found: Any = load_recipe(small, [override])
    for part in override.partition("=")[0].split("."):
        found = found[int(part)] if part.isdigit() else getattr(found, part)
    assert getattr(found, "n_experts", found) == value


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optimisation.lrr=1", "optimisation.lrr is not a key of a recipe; did you mean optimisation.lr?"),
        ("optimization.lr=1", "optimization is not a key of a recipe; did you mean optimisation?"),
        ("lr=1", "lr is not a key of a recipe; did you mean optimisation.lr?"),
        ("data.train.0.sauce=x", "data.train.0.sauce is not a key of a recipe; did you mean data.train.source?"),
        ("model.moe.nexperts=4", "model.moe.nexperts is not a key of a recipe; did you mean model.moe.n_experts?"),
        ("optimisation.lr=fast", "optimisation.lr: Input should be a valid number, got 'fast'"),
        ("optimisation.lr=.nan", "optimisation.lr"),
        ("optimisation.lr=-1", "optimisation.lr: Input should be greater than 0, got -1"),
        ("optimisation.steps=1.5", "optimisation.steps: "),
        ("optimisation.betas=[0.9, 1.0]", "optimisation.betas.1: Input should be less than 1, got 1.0"),
        ("model.moe={n_experts: 2, top_k: 3}", "top_k (3) is greater than n_experts (2)"),
        ("optimisation.lr", "an override is written key=value"),
        ("data.train.3.limit=1", "data.train has the places 0 to 0"),
        ("data.train.x.limit=1", "data.train has the places 0 to 0"),
        ("optimisation.lr.x=1", "optimisation.lr is 1e-05, which has no keys"),
        ("run.seed=!!python/object/apply:os.getcwd []", "would build an object"),
        ("evaluation.patience=2", "needs corpora in data.evaluation"),
        ("data.train=[]", "data.train"),
    ],
)
def test_a_mistake_names_the_key_and_what_was_meant(small: Path, override: str, said: str) -> None:
    with pytest.raises(RecipeError) as raised:
        load_recipe(small, ["optimisation.lr=1e-5", override])
    assert said in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"data: !!python/object/apply:os.system ['true']", "line 1: the tag"),
        (b"a: 1\nb: !ours {x: 1}", "line 2: the tag '!ours' would build an object"),
        (b"run:\n  seed: 1\n  seed: 2", "line 3: the key 'seed' is there twice"),
        (b"1: x", "1 is not a key of a recipe"),
        (b"a: [1", "not YAML"),
        (b"- a", "must hold keys and values, holds list"),
        (b"", "must hold keys and values, holds NoneType"),
        (b"model: {}", "data is missing"),
        (b"a: &a [*a]", "contains itself"),
        (b"\xff\xfe", "cannot be read"),
        pytest.param(b"#" * 1_000_001, "larger than a recipe can be", id="large"),
        (None, "cannot be read (No such file or directory)"),
    ],
)
def test_a_file_that_is_no_recipe_is_one_clear_sentence(tmp_path: Path, content: bytes | None, said: str) -> None:
    path = tmp_path / "bad.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RecipeError) as raised:
        load_recipe(path)
    assert str(path) in str(raised.value) and said in str(raised.value) and "\n" not in str(raised.value)


def test_yaml_is_that_of_version_1_2() -> None:
    assert parse("[1e-5, no, 010, 2024-01-01, true, ~, .5, -3, 0x1F, '1']", "a") == [
        *(1e-5, "no", 10, "2024-01-01", True, None, 0.5, -3, "0x1F", "1")
    ]
    assert parse("base: &b {x: 1}\nmore: {<<: *b, y: 2}", "a") == {"base": {"x": 1}, "more": {"x": 1, "y": 2}}
    with pytest.raises(RecipeError):
        parse("[" * 5_000, "a")


def test_every_field_says_what_it_is() -> None:
    tree = ast.parse(inspect.getsource(module))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    configs = [c for c in classes if issubclass(getattr(module, c.name), BaseModel) and not c.name.startswith("_")]
    assert len(configs) >= 7
    for config in configs:
        for node, following in zip(config.body, [*config.body[1:], None], strict=True):
            if isinstance(node, ast.AnnAssign):
                said = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                assert said, f"{config.name}.{ast.unparse(node.target)}"


def test_a_recipe_is_checked_without_torch(small: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from whisper_moe.train.run import train\n"
        f"assert train(Path({str(small)!r}), ['optimisation.lrr=1'], None, False) == 2\n"
        "assert not {'torch', 'datasets'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "did you mean optimisation.lr?" in done.stderr
