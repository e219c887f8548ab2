"""What the documentation says is what there is: the reference of recipes, and the commands of the page on fine-tuning."""

from __future__ import annotations

import csv
import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("transformers")
from generate.tiny import CONFIG
from train.tiny import tones
from typer.testing import CliRunner
from weights.whispers import hub_model, write_folder

from whisper_moe.cli import app

ROOT = Path(__file__).parent.parent
QUICK = {
    "train": ["optimisation.steps=2", "optimisation.warmup=1", "evaluation.limit=2", "run.threads=1"],
    "evaluate": ["--no-fallback", "--threads", "1"],
    "transcribe": ["--temperature-increment-on-fallback", "0"],
    "upcycle": ["--router-layer", "1", "--ttt-layers", "1"],
}
"""What the tests add: the models are tiny, and not good at it."""


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("recipe_page", ROOT / "docs/recipe.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_things_are_where_the_page_says() -> None:
    """Each name in a cell is in the file before it."""
    rows = (ROOT / "docs/architecture.md").read_text("utf-8").partition("## Where things are")[2].partition("\n## ")[0]
    file, found = Path(), 0
    for name in re.findall(r"`([^`]+)`", rows):
        if name.endswith(".py"):
            file = ROOT / "src/whisper_moe" / name
            assert file.is_file(), name
        elif re.fullmatch(r"[A-Za-z_]+(\.[a-z_]+)?", name):
            found += 1
            text = file.read_text("utf-8")
            assert all(re.search(rf"\b{part}\b", text) for part in name.split(".")), f"{name} is not in {file}"
    assert found > 10


def test_the_reference_of_recipes_is_up_to_date() -> None:
    written = (ROOT / "docs/recipe.md").read_text("utf-8")
    assert written == generator().page(), "python docs/recipe.py writes it anew"
    for key in ("| `margin` | number or 2 numbers | `null` |", "## `data.train.0`", "## `optimisation.groups.0`"):
        assert key in written


def commands() -> list[list[str]]:
    lines = (ROOT / "docs/fine-tuning.md").read_text("utf-8").splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("    whisper-moe ")]


@pytest.mark.slow
def test_the_commands_of_fine_tuning_run_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    dense = CONFIG.model_copy(update={"moe": None, "ttt": None})
    write_folder(tmp_path / "whisper-small", hub_model(dense))
    rows = list(csv.reader((tones(tmp_path / "clips") / "transcripts.tsv").open(), delimiter="\t"))
    for name, chosen in (("train", rows[1:9]), ("test", rows[9:])):
        lines = ["path\ttext\tlanguage", *("\t".join([*row, "en"]) for row in chosen)]
        (tmp_path / "clips" / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    (tmp_path / "clips/transcripts.tsv").unlink()
    (tmp_path / "clips/talk.wav").write_bytes((tmp_path / "clips/0.wav").read_bytes())
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    assert len(commands()) == 8
    for words in commands():
        words = [word.replace("openai/whisper-small", "whisper-small") for word in words]
        done = CliRunner().invoke(app, [*words, *QUICK.get(words[0], [])])
        assert done.exit_code == 0, (words, done.output)
    assert all((tmp_path / name).exists() for name in ("after/report.md", "mine-whisper/config.json", "mixture"))
    assert "mine, padded" in (tmp_path / "after/report.md").read_text()
