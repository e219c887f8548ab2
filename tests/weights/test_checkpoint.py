"""Our checkpoint directory: what goes in comes out, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

pytest.importorskip("transformers")
from weights.whispers import CONFIGS, GENERATION, TINY, random_state, same, tokenizer_json

from whisper_moe.config import AdaptConfig, ModelConfig
from whisper_moe.model.model import WhisperMoEModel
from whisper_moe.weights import files
from whisper_moe.weights.checkpoint import (
    INDEX,
    MANIFEST,
    Loaded,
    describe,
    load_checkpoint,
    read_config,
    save_checkpoint,
)
from whisper_moe.weights.files import FileFacts
from whisper_moe.weights.parts import SCALE, expected_shapes, quantizable


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here pulls the plug, and a busy disk takes seconds to answer."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def save(directory: Path, config: ModelConfig = TINY, state: dict[str, Tensor] | None = None, **options: Any) -> None:
    state = random_state(config) if state is None else state
    save_checkpoint(directory, Loaded(config, state, GENERATION, tokenizer_json()), **options)


def content(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_saved_is_loaded_bit_for_bit(name: str, tmp_path: Path) -> None:
    state = random_state(CONFIGS[name])
    save(tmp_path / "m", CONFIGS[name], state)
    loaded = load_checkpoint(tmp_path / "m")
    for path in (tmp_path / "m").rglob("*.safetensors"):  # nothing in memory is a map of a file
        path.write_bytes(b"\xff" * path.stat().st_size)
    assert loaded.config == CONFIGS[name]
    assert loaded.generation.items() >= GENERATION.items()
    assert loaded.tokenizer_json == tokenizer_json()
    assert same(loaded.state, state)
    assert list(loaded.state) == list(WhisperMoEModel(CONFIGS[name]).state_dict())


@pytest.mark.parametrize("quantize", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_stays_int8_stands_for_the_same_numbers(name: str, quantize: bool, tmp_path: Path) -> None:
    save(tmp_path / "m", CONFIGS[name], quantize=quantize)
    whole, halved = load_checkpoint(tmp_path / "m"), load_checkpoint(tmp_path / "m", keep_int8=True)
    assert set(halved.quantized) == {key for key in whole.state if quantize and quantizable(key)}
    assert same(halved.state | {key: rows.dequantized() for key, rows in halved.quantized.items()}, whole.state)
    assert not halved.state.keys() & halved.quantized.keys() and not whole.quantized


def test_a_stack_with_one_expert_in_float32_is_read_as_float32(tmp_path: Path) -> None:
    """Experts are exchanged one by one: here one of an int8 checkpoint is replaced by one that is not."""
    config = CONFIGS["shared"]
    save(tmp_path / "m", config, quantize=True)
    save(tmp_path / "exact", config)
    assert config.moe is not None
    take_files(tmp_path / "exact", tmp_path / "m", "experts/01-")
    whole, halved = load_checkpoint(tmp_path / "m"), load_checkpoint(tmp_path / "m", keep_int8=True)
    assert not any(".experts." in key for key in halved.quantized)
    assert any(".experts." in key for key in halved.state)
    assert same(halved.state | {key: rows.dequantized() for key, rows in halved.quantized.items()}, whole.state)


def take_files(source: Path, target: Path, prefix: str) -> None:
    """Replace what begins with ``prefix`` by the other checkpoint's, and the lists of it."""
    documents = [(path, json.loads(path.read_text())) for path in (target / INDEX, target / MANIFEST)]
    index, manifest = (document for _, document in documents)
    name = next(name for name in manifest["files"] if name.startswith(prefix))
    shutil.copy(source / name, target / name)
    weights = {key: file for key, file in index["weight_map"].items() if not (file == name and key.endswith(SCALE))}
    index["weight_map"] = weights
    (target / INDEX).write_text(json.dumps(index))
    for changed in (name, INDEX):
        manifest["files"][changed] = FileFacts.of(target / changed).model_dump()
    (target / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", CONFIGS)
def test_int8_moves_only_what_is_quantised_and_is_stable_ever_after(name: str, tmp_path: Path) -> None:
    state = random_state(CONFIGS[name])
    save(tmp_path / "once", CONFIGS[name], state, quantize=True)
    first = load_checkpoint(tmp_path / "once").state
    for key, tensor in state.items():
        if quantizable(key):
            step = tensor.abs().amax(-1, keepdim=True) / 127
            assert (first[key] - tensor).abs().max() > 0
            assert ((first[key] - tensor).abs() <= 0.501 * step).all()
        else:
            assert torch.equal(first[key], tensor)
    save(tmp_path / "twice", CONFIGS[name], first, quantize=True)
    assert content(tmp_path / "twice") == content(tmp_path / "once")


def test_numbers_that_float16_can_hold_are_stored_as_float16(tmp_path: Path) -> None:
    state = {key: tensor.half().float() for key, tensor in random_state(TINY).items()}
    state["encoder.norm.bias"][0] = 1e-9
    save(tmp_path / "m", TINY, state)
    assert same(load_checkpoint(tmp_path / "m").state, state)
    stored = load_file(tmp_path / "m/core.safetensors")
    assert {key for key, tensor in stored.items() if tensor.dtype != torch.float16} == {"encoder.norm.bias"}


def test_every_part_has_its_file(tmp_path: Path) -> None:
    save(tmp_path / "m", CONFIGS["shared"])
    assert set(content(tmp_path / "m")) == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "model.safetensors.index.json",
        "MANIFEST.json",
        "core.safetensors",
        "router.safetensors",
        "adapt.safetensors",
        "experts/00-hindi.safetensors",
        "experts/01-expert.safetensors",
        "experts/02-en-us.safetensors",
    }
    own = load_file(tmp_path / "m/experts/01-expert.safetensors")
    assert set(own) == {
        f"{block}.experts.{name}"
        for block in ("encoder.blocks.1", "encoder.blocks.2", "decoder.blocks.0")
        for name in ("up_weight", "up_bias", "down_weight", "down_bias")
    }
    state = random_state(CONFIGS["shared"])
    assert torch.equal(own["decoder.blocks.0.experts.up_weight"], state["decoder.blocks.0.experts.up_weight"][1])
    index = json.loads((tmp_path / "m/model.safetensors.index.json").read_text())["weight_map"]
    assert index["decoder.blocks.0.experts.1.up_weight"] == "experts/01-expert.safetensors"


def test_an_experts_file_can_take_another_experts_place(tmp_path: Path) -> None:
    save(tmp_path / "m", CONFIGS["shared"])
    before = load_checkpoint(tmp_path / "m").state
    shutil.copy(tmp_path / "m/experts/00-hindi.safetensors", tmp_path / "m/experts/02-en-us.safetensors")
    reseal(tmp_path / "m")
    after = load_checkpoint(tmp_path / "m").state
    for key, tensor in after.items():
        if ".experts." in key:
            assert torch.equal(tensor[2], before[key][0]) and torch.equal(tensor[:2], before[key][:2])
        else:
            assert torch.equal(tensor, before[key])


@pytest.mark.parametrize("quantize", [False, True])
def test_no_file_is_larger_than_asked_unless_it_holds_one_tensor(quantize: bool, tmp_path: Path) -> None:
    save(tmp_path / "m", CONFIGS["shared"], quantize=quantize, shard_bytes=300)
    shards = sorted((tmp_path / "m").rglob("*.safetensors"))
    assert len([path for path in shards if path.name.startswith("core-")]) > 5
    assert any(path.name.startswith("00-hindi-00001-of-") for path in shards)
    for path in shards:
        tensors = load_file(path)
        whole = {key.removesuffix(".scale") for key in tensors}
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 300 or len(whole) == 1
    assert same(load_checkpoint(tmp_path / "m").state, reloaded(tmp_path / "whole", quantize))


def reloaded(directory: Path, quantize: bool) -> dict[str, Tensor]:
    save(directory, CONFIGS["shared"], quantize=quantize)
    return load_checkpoint(directory).state


def test_a_description_needs_no_weights_and_counts_every_byte(tmp_path: Path) -> None:
    save(tmp_path / "m", CONFIGS["shared"], shard_bytes=2000)
    sizes = {name: len(data) for name, data in content(tmp_path / "m").items()}
    for path in (tmp_path / "m").rglob("*.safetensors"):
        path.unlink()
    config, found = describe(tmp_path / "m")
    assert config == CONFIGS["shared"]
    parts = {"core", "router", "adapt", "experts/00-hindi", "experts/01-expert", "experts/02-en-us"}
    assert set(found) == parts
    weights = sum(size for name, size in sizes.items() if name.endswith(".safetensors"))
    assert sum(found.values()) == weights


def test_a_margin_is_read_where_the_first_checkpoints_had_it(tmp_path: Path) -> None:
    tree = ModelConfig(adapt=AdaptConfig(encoder_layers=(0,)), context_margin=0.5).model_dump(mode="json")
    (tmp_path / "config.json").write_text(json.dumps(tree))
    assert read_config(tmp_path / "config.json").margin == 0.5
    tree["adapt"]["context_margin"] = tree.pop("context_margin")
    (tmp_path / "config.json").write_text(json.dumps(tree))
    config = read_config(tmp_path / "config.json")
    assert config.context_margin == config.margin == 0.5 and config.adapt == AdaptConfig(encoder_layers=(0,))


def test_links_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    save(tmp_path / "m", CONFIGS["shared"])
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots/abc"
    (snapshot / "experts").mkdir(parents=True)
    blobs.mkdir()
    for i, name in enumerate(content(tmp_path / "m")):
        shutil.copy(tmp_path / "m" / name, blobs / str(i))
        (snapshot / name).symlink_to(os.path.relpath(blobs / str(i), (snapshot / name).parent))
    assert same(load_checkpoint(snapshot).state, random_state(CONFIGS["shared"]))
    (snapshot / "core.safetensors").unlink()
    (snapshot / "core.safetensors").symlink_to("/etc/passwd")
    with pytest.raises(files.CheckpointError, match=r"core\.safetensors: has \d+ bytes"):
        load_checkpoint(snapshot)


def reseal(directory: Path) -> None:
    """Make the manifest agree with the files again, as somebody who means harm would."""
    manifest = json.loads((directory / "MANIFEST.json").read_text())
    for name in manifest["files"]:
        manifest["files"][name] = FileFacts.of(directory / name).model_dump()
    (directory / "MANIFEST.json").write_text(json.dumps(manifest))


# What cannot be saved, and where


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda s: s.pop("encoder.norm.bias"), "lacks encoder.norm.bias"),
        (lambda s: s.update(extra=torch.zeros(1)), "holds what this architecture does not have: extra"),
        (lambda s: s.update({"encoder.norm.bias": torch.zeros(9)}), r"encoder.norm.bias is \[9\]"),
        (lambda s: s.update({"encoder.norm.bias": torch.zeros(8).half()}), r"encoder.norm.bias is \[8\] torch.float16"),
        (lambda s: s["encoder.norm.bias"].fill_(torch.nan), "encoder.norm.bias is not finite"),
    ],
)
def test_a_state_that_could_not_be_loaded_is_not_saved(
    change: Callable[[dict[str, Tensor]], object], cause: str, tmp_path: Path
) -> None:
    state = random_state(TINY)
    change(state)
    with pytest.raises(ValueError, match=cause):
        save(tmp_path / "m", TINY, state)
    assert not list(tmp_path.iterdir())


def test_an_existing_directory_is_refused_unless_asked(tmp_path: Path) -> None:
    save(tmp_path / "m", seed_config := TINY, random_state(TINY, 1))
    before = content(tmp_path / "m")
    with pytest.raises(ValueError, match="m: exists already"):
        save(tmp_path / "m", seed_config)
    assert content(tmp_path / "m") == before
    save(tmp_path / "m", CONFIGS["shared"], overwrite=True)
    assert same(load_checkpoint(tmp_path / "m").state, random_state(CONFIGS["shared"]))
    save(tmp_path / "m", TINY, overwrite=True)
    assert not (tmp_path / "m/experts").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_overwriting_never_takes_what_is_not_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.txt").write_text("irreplaceable")
    with pytest.raises(ValueError, match=r"home: not overwritten.*thesis\.txt"):
        save(tmp_path / "home", overwrite=True)
    save(tmp_path / "m")
    (tmp_path / "m/notes.md").write_text("mine")
    with pytest.raises(ValueError, match=r"m: not overwritten.*notes\.md"):
        save(tmp_path / "m", overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file: exists already and is not a directory"):
        save(tmp_path / "file", overwrite=True)


def test_the_fixtures_have_numbers_that_float16_cannot_hold() -> None:
    """Otherwise nothing above would show that float32 survives."""
    assert set(expected_shapes(TINY)) == {
        key for key, tensor in random_state(TINY).items() if not torch.equal(tensor.half().float(), tensor)
    }
