"""Adapters merged here are what PEFT merges, bit for bit; what cannot be merged rightly is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
from weights.whispers import TINY, hub_model, hub_state, same

from whisper_moe.weights.files import CheckpointError
from whisper_moe.weights.whisper import Adapter, merge_adapter, state_from_whisper

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def trained(folder: Path, **options: Any) -> dict[str, Tensor]:
    """Save an adapter of the tiny model whose matrices are random; returns the weights as PEFT merges them."""
    settings = {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj"]} | options
    adapted = peft.get_peft_model(hub_model(), peft.LoraConfig(**settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(folder)
    return hub_state(adapted.merge_and_unload())


def read(folder: Path) -> tuple[dict[str, Tensor], Adapter]:
    return load_file(folder / "adapter_model.safetensors"), Adapter.read(folder / "adapter_config.json")


LINEAR = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"target_modules": LINEAR, "init_lora_weights": "gaussian", "lora_dropout": 0.5},
        {
            "target_modules": LINEAR,
            "rank_pattern": {"fc1": 2, r"decoder.*q_proj": 5},
            "alpha_pattern": {"fc1": 9, "k_proj": 2},
        },
        {"target_modules": r".*decoder.*\.(q_proj|fc2)", "layers_to_transform": None},
        {"target_modules": LINEAR, "layers_to_transform": [0], "layers_pattern": "layers"},
        {"bias": "all"},
        {"bias": "lora_only", "target_modules": LINEAR},
        {"modules_to_save": ["layer_norm", "conv1"]},
        {"target_modules": ["conv1", "conv2", "q_proj"]},
    ],
    ids=str,
)
def test_merged_weights_are_pefts(options: dict[str, Any], tmp_path: Path) -> None:
    expected = trained(tmp_path, **options)
    base = hub_state(hub_model())
    deltas, adapter = read(tmp_path)
    merged = merge_adapter(base, deltas, adapter, tmp_path)
    changed = {key for key in base if not torch.equal(base[key], merged[key])}
    assert len(changed) >= 3
    if options.get("target_modules", [""])[0] == "conv1":
        assert merged.keys() == expected.keys()
        assert all(torch.allclose(merged[key], expected[key], atol=1e-5) for key in merged)
    else:
        assert same(merged, expected)


def test_the_base_is_left_as_it_was(tmp_path: Path) -> None:
    trained(tmp_path, modules_to_save=["layer_norm"])
    base = hub_state(hub_model())
    merge_adapter(base, *read(tmp_path), tmp_path)
    assert same(base, hub_state(hub_model()))


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"peft_type": "IA3"}, "peft_type: Input should be 'LORA', got 'IA3'"),
        ({"use_dora": True}, "use_dora cannot be merged here"),
        ({"lora_bias": True}, "lora_bias cannot be merged"),
        ({"layer_replication": [[0, 1]]}, "layer_replication cannot be merged"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out cannot be merged"),
        ({"invented_next_year": {"a": 1}}, "invented_next_year cannot be merged"),
        (
            {"init_lora_weights": "pissa"},
            "init_lora_weights.*: Input should be .*got 'pissa'.*; merge .* with PEFT first",
        ),
        ({"init_lora_weights": ["x"]}, "init_lora_weights"),
        ({"lora_alpha": "7"}, "lora_alpha: Input should be a valid number"),
        ({"lora_alpha": float("nan")}, "lora_alpha: Input should be a finite number"),
        ({"alpha_pattern": {"fc1": None}}, "alpha_pattern.fc1: Input should be a valid number"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern.*: Input should be a valid regular expression"),
        ({"alpha_pattern": ["fc1"]}, "alpha_pattern: Input should be a valid dictionary"),
    ],
)
def test_what_would_be_merged_wrongly_is_refused_by_name(change: dict[str, Any], cause: str, tmp_path: Path) -> None:
    trained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError, match=f"adapter_config.json: .*{cause}"):
        read(tmp_path)


def test_dora_as_peft_writes_it_is_refused(tmp_path: Path) -> None:
    trained(tmp_path, use_dora=True)
    with pytest.raises(CheckpointError, match="use_dora"):
        read(tmp_path)


def test_an_adapter_of_the_embedding_is_refused(tmp_path: Path) -> None:
    trained(tmp_path, target_modules=["embed_tokens"])
    with pytest.raises(CheckpointError, match=r"does not have: .*lora_embedding_A"):
        state_from_whisper(merge_adapter(hub_state(hub_model()), *read(tmp_path), tmp_path), TINY)


def test_a_trained_embedding_is_refused_and_an_untrained_copy_is_not(tmp_path: Path) -> None:
    expected = trained(tmp_path)
    base = hub_state(hub_model())
    deltas, adapter = read(tmp_path)
    embedding = base["model.decoder.embed_tokens.weight"]
    for key in ("model.decoder.embed_tokens.weight", "model.decoder.embed_tokens.base_layer.weight", "proj_out.weight"):
        copied = deltas | {f"base_model.model.{key}": embedding}
        assert same(merge_adapter(base, copied, adapter, tmp_path), expected)
        with pytest.raises(CheckpointError, match="embedding and output projection are one"):
            merge_adapter(base, deltas | {f"base_model.model.{key}": embedding + 1}, adapter, tmp_path)


A = "base_model.model.model.encoder.layers.0.self_attn.q_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({B: None}, "q_proj.lora_A.weight has no partner B"),
        ({A: None}, "does not have: .*q_proj.lora_B.weight"),
        ({A: torch.zeros(0, 8), B: torch.zeros(8, 0)}, r"A \[0, 8\], B \[8, 0\] do not fit \[8, 8\]"),
        ({A: torch.zeros(3, 7)}, r"A \[3, 7\], B \[8, 3\] do not fit \[8, 8\]"),
        ({A: torch.zeros(2, 8)}, r"A \[2, 8\], B \[8, 3\] do not fit"),
        ({A: torch.full((3, 8), torch.nan)}, "q_proj.weight is not finite"),
        (
            {
                A.replace("layers.0", "layers.9"): torch.zeros(3, 8),
                B.replace("layers.0", "layers.9"): torch.zeros(8, 3),
            },
            "layers.9.self_attn.q_proj.lora_A.weight has no place in the base model",
        ),
        ({"base_model.model.model.encoder.conv1.weight": torch.zeros(8, 80, 2)}, r"conv1.weight is \[8, 80, 2\]"),
        (
            {A.replace("lora_A.weight", "lora_magnitude_vector"): torch.zeros(8)},
            "does not have: .*lora_magnitude_vector",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change: dict[str, Tensor | None], cause: str, tmp_path: Path) -> None:
    trained(tmp_path)
    (deltas, adapter), path = read(tmp_path), Path("adapter.safetensors")
    broken = {key: tensor for key, tensor in (deltas | change).items() if tensor is not None}
    with pytest.raises(CheckpointError, match=f"adapter.safetensors: .*{cause}"):
        state_from_whisper(merge_adapter(hub_state(hub_model()), broken, adapter, path), TINY, origin=path)
