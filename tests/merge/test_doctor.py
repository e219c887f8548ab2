"""What a fine-tune is told before it is merged: each fault that people's checkpoints have, made on purpose."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from generate.tiny import tiny_whisper_moe
from merge.test_merge import write_probe
from safetensors.torch import load_file, save_file
from torch import Tensor
from weights.whispers import random_state

from whisper_moe.cli import app
from whisper_moe.config import ModelConfig, TTTConfig
from whisper_moe.merge.doctor import examine
from whisper_moe.weights.checkpoint import Loaded, load_checkpoint, save_checkpoint
from whisper_moe.weights.load import load_model
from whisper_moe.weights.whisper import FIELDS, OPENAI, save_whisper, state_to_whisper

WIDE = {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
"""OpenAI's files know no other."""
DENSE = ModelConfig.model_validate(tiny_whisper_moe().config.model_dump() | {"moe": None, "ttt": None} | WIDE)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = tmp_path_factory.mktemp("base") / "base"
    tiny_whisper_moe(config=DENSE).save_pretrained(folder)
    return load_model(
        as_transformers(folder.parent, load_checkpoint(folder))
    )  # without a bias on keys, as a Whisper is


def moved(state: dict[str, Tensor], by: float, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {key: tensor + by * torch.randn_like(tensor) for key, tensor in state.items()}


def as_checkpoint(folder: Path, model: Loaded) -> Path:
    save_checkpoint(folder / "dense", model)
    return folder / "dense"


def as_transformers(folder: Path, model: Loaded) -> Path:
    save_whisper(folder / "hub", model)
    return folder / "hub"


def as_openai(folder: Path, model: Loaded) -> Path:
    state = state_to_whisper(model.state, model.config, OPENAI)
    dims = {theirs: getattr(model.config, ours) for ours, (_, theirs) in FIELDS.items() if theirs}
    dims |= {"n_text_state": model.config.d_model}
    torch.save({"dims": dims, "model_state_dict": state}, folder / "small.pt")
    (folder / "tokenizer.json").write_bytes(model.tokenizer_json)
    return folder / "small.pt"


def as_adapter(folder: Path, model: Loaded, size: float = 0.02) -> Path:
    """A LoRA adapter on a model that is a transformers folder beside it."""
    under, adapter, width = as_transformers(folder, model), folder / "adapter", model.config.d_model
    adapter.mkdir()
    torch.manual_seed(5)
    pair = {"A": torch.randn(2, width), "B": size * torch.randn(model.config.encoder_ffn_dim, 2)}
    name = "base_model.model.model.encoder.layers.1.fc1.lora_{}.weight"
    save_file({name.format(side): tensor for side, tensor in pair.items()}, adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": str(under)}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    return adapter


def with_nan(folder: Path, model: Loaded) -> Path:
    path = as_transformers(folder, model)
    state = load_file(path / "model.safetensors")
    state["model.encoder.layers.0.fc1.weight"][0, 0] = torch.nan
    save_file(state, path / "model.safetensors")
    return path


def with_moved(by: float, write: Callable[[Path, Loaded], Path] = as_checkpoint) -> Callable[[Path, Loaded], Path]:
    return lambda folder, base: write(folder, replace(base, state=moved(base.state, by)))


def overflowing(folder: Path, base: Loaded) -> Path:
    state, key = moved(base.state, 0.01), "decoder.blocks.0.ffn.up.bias"
    return as_checkpoint(folder, replace(base, state=state | {key: state[key] + 70_000}))


def wider(write: Callable[[Path, Loaded], Path]) -> Callable[[Path, Loaded], Path]:
    config = ModelConfig.model_validate(DENSE.model_dump() | {"encoder_ffn_dim": 40})
    return lambda folder, base: write(folder, replace(base, config=config, state=random_state(config)))


def with_ttt(folder: Path, base: Loaded) -> Path:
    config = DENSE.model_copy(update={"ttt": TTTConfig(encoder_layers=(0, 1))})
    state = tiny_whisper_moe(config=config).model.state_dict()
    return as_checkpoint(folder, replace(base, config=config, state=state | moved(base.state, 0.01)))


CASES: dict[str, tuple[Callable[[Path, Loaded], Path], str, str]] = {
    "a folder of this project": (with_moved(0.01), "use", ""),
    "a folder of transformers": (with_moved(0.01, as_transformers), "use", ""),
    "a file of OpenAI's": (with_moved(0.01, as_openai), "use", ""),
    "an adapter": (as_adapter, "use", ""),
    "a few steps": (with_moved(1e-5), "warn", "hardly moved"),
    "overflow": (overflowing, "warn", "overflows in half precision"),
    "an adapter of another base": (with_moved(0.01, as_adapter), "warn", "was made for hub, not for this base"),
    "an adapter of a far base": (with_moved(0.5, as_adapter), "refuse", "no fine-tune of this base"),
    "an adapter of another size": (wider(as_adapter), "refuse", "encoder_ffn_dim 40, the base has 64"),
    "random weights": (with_moved(0.5), "refuse", "no fine-tune of this base"),
    "another size": (wider(as_checkpoint), "refuse", "encoder_ffn_dim 40, the base has 64"),
    "NaN": (with_nan, "refuse", "is not finite"),
    "nothing there": (lambda folder, base: folder / "nowhere", "refuse", "no such file"),
    "TTT of its own": (with_ttt, "use", "brings TTT in encoder layers 0, 1"),
    "experts of its own": (
        lambda folder, base: (tiny_whisper_moe().save_pretrained(folder / "moe"), folder / "moe")[1],
        "refuse",
        "it has experts",
    ),
}
"""A model in each public layout and with each fault: how it is written, the doctor's verdict, and the reason."""


@pytest.mark.parametrize("case", CASES)
def test_each_model_has_its_verdict_and_is_merged_or_refused(
    case: str, base: Loaded, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write, expected, reason = CASES[case]
    source = str(write(tmp_path, base))
    ((found, expert),) = examine({"expert": source}, base)
    assert found.verdict == expected
    assert reason in "; ".join(found.reasons)
    save_checkpoint(tmp_path / "base", base)
    given = ["merge", f"mine={source}", "--base", str(tmp_path / "base"), "-o", str(tmp_path / "out"), "--measure", "0"]
    given += ["--delta-rank", "16", "--probe", write_probe(tmp_path / "clips", "low", 2)]
    with caplog.at_level("INFO", "whisper_moe"):
        status = app(given, standalone_mode=False)
    assert status == int(expected == "refuse") == int(expert is None)
    assert reason in caplog.text
    assert (tmp_path / "out").exists() == (expected != "refuse")
    if expert is not None:
        merged, key = load_checkpoint(tmp_path / "out"), "encoder.blocks.1.ffn.up"
        down, up = (merged.state[f"{key}.experts.{name}"][0] for name in ("down", "up"))
        change = expert.state[f"{key}.weight"] - base.state[f"{key}.weight"]
        torch.testing.assert_close(up[:-1].T @ down, change, atol=1e-3 * float(change.abs().max()) + 1e-7, rtol=1e-3)


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
