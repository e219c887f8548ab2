"""A script's own task has all that training has: the one that the documentation shows."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from train.tiny import recipe_tree

from whisper_moe.train.run import script
from whisper_moe.weights.checkpoint import load_checkpoint

ROOT = Path(__file__).parents[2]


def test_the_documented_task_learns_with_its_own_loss_and_goes_on(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    documented = (ROOT / "docs/training.md").read_text("utf-8").partition("## Another task")[2].partition("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", documented, re.DOTALL)
    (tmp_path / "focal.py").write_text(code, "utf-8")
    tree = recipe_tree(material / "model", material / "data") | {"gamma": 0.5}
    tree["data"]["evaluation"], tree["evaluation"] = tree["data"]["train"], {"every": 2, "metric": "loss"}
    (tmp_path / "small.yaml").write_text(json.dumps(tree), "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    kind = importlib.import_module("focal").FocalRecipe

    def called(*words: str) -> int:
        monkeypatch.setattr("sys.argv", ["focal.py", *words])
        return script(kind, "")

    words = ["small.yaml", "optimisation.steps=4", "-o", "whole"]
    done = subprocess.run([sys.executable, "focal.py", *words], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and "whole/model: the model of step" in done.stderr, done.stderr
    assert called("small.yaml", "optimisation.steps=2", "-o", "parts") == 0
    assert called("--resume", "parts", "optimisation.steps=4") == 0
    whole, parts = (load_checkpoint(tmp_path / name / "model").state for name in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    lines = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text("utf-8").splitlines()]
    losses, judged = ([line[name] for line in lines if name in line] for name in ("focal", "evaluation"))
    assert len(losses) == 4 and losses[-1] < losses[0] and len(judged) == 2 and judged[1]["loss"] < judged[0]["loss"]

    assert called("--resume", "parts", "gamma=1.0") == 2
    assert "gamma was 0.5, is 1.0" in capsys.readouterr().err
    assert called("small.yaml", "gama=1.0", "-o", "wrong") == 2
    assert "gama is not a key of a recipe; did you mean gamma?" in capsys.readouterr().err
