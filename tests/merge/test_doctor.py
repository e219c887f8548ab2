"""What a fine-tune is told before it is merged: each fault that people's checkpoints have, made on purpose."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from generate.tiny import tiny_whisper_moe
from torch import Tensor

from whisper_moe.cli import app
from whisper_moe.config import ModelConfig
from whisper_moe.merge.doctor import examine
from whisper_moe.weights.checkpoint import Loaded, load_checkpoint, save_checkpoint

DENSE = ModelConfig.model_validate(tiny_whisper_moe().config.model_dump() | {"moe": None, "ttt": None})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = tmp_path_factory.mktemp("base") / "base"
    tiny_whisper_moe(config=DENSE).save_pretrained(folder)
    return load_checkpoint(folder)


def moved(state: dict[str, Tensor], by: float, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {key: tensor + by * torch.randn_like(tensor) for key, tensor in state.items()}


def verdict(base: Loaded, folder: Path, state: dict[str, Tensor]) -> tuple[str, str]:
    save_checkpoint(folder, replace(base, state=state))
    ((found, expert),) = examine({"expert": str(folder)}, base)
    assert (expert is None) == (found.verdict == "refuse")
    return found.verdict, "; ".join(found.reasons)


CASES: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str, str]] = {
    "a fine-tune": (lambda s: moved(s, 0.01), "use", ""),
    "a few steps": (lambda s: moved(s, 1e-5), "warn", "hardly moved"),
    "random weights": (lambda s: moved(s, 0.5), "refuse", "no fine-tune of this base"),
    "overflow": (
        lambda s: moved(s, 0.01) | {"decoder.blocks.0.ffn.up.bias": s["decoder.blocks.0.ffn.up.bias"] + 70_000},
        "warn",
        "overflows in half precision",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_each_fault_has_its_verdict_and_its_reason(case: str, base: Loaded, tmp_path: Path) -> None:
    change, expected, reason = CASES[case]
    found, said = verdict(base, tmp_path / "expert", change(dict(base.state)))
    assert found == expected
    assert reason in said


def test_what_cannot_be_read_or_is_another_model_is_refused(base: Loaded, tmp_path: Path) -> None:
    wide = ModelConfig.model_validate(DENSE.model_dump() | {"encoder_ffn_dim": 40})
    tiny_whisper_moe(config=wide).save_pretrained(tmp_path / "wide")
    tiny_whisper_moe().save_pretrained(tmp_path / "mixture")
    given = {"nowhere": str(tmp_path / "nowhere"), "wide": str(tmp_path / "wide"), "mixture": str(tmp_path / "mixture")}
    reasons = {found.name: (found.verdict, found.reasons[0]) for found, _ in examine(given, base)}
    assert {verdict for verdict, _ in reasons.values()} == {"refuse"}
    assert "no such file" in reasons["nowhere"][1]
    assert "encoder_ffn_dim 40, the base has 32" in reasons["wide"][1]
    assert "experts" in reasons["mixture"][1]


def test_one_expert_twice_is_warned_of(base: Loaded, tmp_path: Path) -> None:
    state = moved(dict(base.state), 0.01)
    for name in ("one", "other"):
        save_checkpoint(tmp_path / name, replace(base, state=state))
    found = [each for each, _ in examine({name: str(tmp_path / name) for name in ("one", "other")}, base)]
    assert [each.verdict for each in found] == ["use", "warn"]
    assert "nearly the same as one" in found[1].reasons[0]


def test_the_command_prints_every_layer_as_json(
    base: Loaded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_checkpoint(tmp_path / "base", base)
    save_checkpoint(tmp_path / "hindi", replace(base, state=moved(dict(base.state), 0.01)))
    given = [f"hi={tmp_path / 'hindi'}", str(tmp_path / "nothing"), "--base", str(tmp_path / "base"), "--json"]
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(app(["doctor", *given], standalone_mode=False))
    assert ended.value.code == 1
    hindi, nothing = json.loads(capsys.readouterr().out)
    assert (hindi["name"], hindi["verdict"], nothing["verdict"]) == ("hi", "use", "refuse")
    assert hindi["layers"]["encoder.blocks.0"][0] > 0
