"""Checkpoints that strangers broke: each is refused, by the name of the file at fault."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")
from weights.test_checkpoint import reseal, save
from weights.whispers import CONFIGS, TINY

from whisper_moe.model.int8 import Int8Rows
from whisper_moe.weights.checkpoint import load_checkpoint
from whisper_moe.weights.files import CheckpointError

CORE, INDEX, MANIFEST = "core.safetensors", "model.safetensors.index.json", "MANIFEST.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole") / "m"
    save(directory, CONFIGS["shared"], quantize=True)
    load_checkpoint(directory)
    return directory


@pytest.fixture
def directory(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "m"))


def edit(path: Path, change: Callable[[Any], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


def refused(directory: Path, match: str) -> None:
    for keep_int8 in (False, True):
        with pytest.raises(CheckpointError, match=match):
            load_checkpoint(directory, keep_int8=keep_int8)


FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    INDEX,
    CORE,
    "router.safetensors",
    "adapt.safetensors",
    "experts/01-expert.safetensors",
]


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_damaged_or_missing(name: str, directory: Path) -> None:
    path, whole = directory / name, (directory / name).read_bytes()
    for place in (0, len(whole) // 2, -1):
        flipped = bytearray(whole)
        flipped[place] ^= 1
        path.write_bytes(flipped)
        refused(directory, f"{name}: sha256 differs")
    path.write_bytes(whole[:-1])
    refused(directory, rf"{name}: has \d+ bytes, MANIFEST.json says \d+: incomplete")
    path.unlink()
    refused(directory, f"{name}: cannot be read .No such file")


def test_no_directory_and_no_manifest(directory: Path) -> None:
    refused(directory / "nowhere", "nowhere/MANIFEST.json: cannot be read")
    (directory / MANIFEST).unlink()
    refused(directory, "MANIFEST.json: cannot be read")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", INDEX, MANIFEST])
def test_json_that_is_none(name: str, directory: Path) -> None:
    for data in (b"", b"{", b"[]", b"null", b'"x"', b"\x00", b"[" * 100_000, b"\xff\xfe{}"):
        (directory / name).write_bytes(data)
        if name != MANIFEST:
            reseal(directory)
        refused(directory, f"{name}: ")


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda m: m.update(extra=1), "extra: Extra inputs"),
        (lambda m: m.update(format_version=2), "format_version: Input should be 1"),
        (lambda m: m.pop("files"), "files: Field required"),
        (lambda m: m["files"].pop("config.json"), "does not list config.json"),
        (lambda m: m["files"][CORE].update(bytes="7"), "files.core.safetensors.bytes: Input should be a valid integer"),
        (lambda m: m["files"][CORE].update(sha256="0" * 63), "files.core.safetensors.sha256: String should match"),
    ],
)
def test_a_manifest_that_says_something_else(change: Callable[[Any], object], cause: str, directory: Path) -> None:
    edit(directory / MANIFEST, change)
    refused(directory, f"MANIFEST.json: .*{cause}")


ESCAPES = ["../core.safetensors", "/etc/passwd", "experts/../../x.safetensors", "a//b", ".", "..", "", "C:\\x", "a\0b"]


@pytest.mark.parametrize("name", [*ESCAPES, 7, None])
def test_a_list_that_leads_out_of_its_directory(name: Any, directory: Path) -> None:
    (directory.parent / CORE).write_bytes((directory / CORE).read_bytes())
    whole = (directory / MANIFEST).read_text()
    if isinstance(name, str):
        edit(directory / MANIFEST, lambda m: m["files"].update({name: m["files"][CORE]}))
        refused(directory, "MANIFEST.json: lists .* not the name of a file in its own folder")
    (directory / MANIFEST).write_text(whole)
    edit(directory / INDEX, lambda i: i["weight_map"].update({"encoder.norm.bias": name}))
    reseal(directory)
    refused(directory, "index.json: lists .* not the name of a file in its own folder")


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda i: i.pop("weight_map"), "has no weight_map"),
        (lambda i: i["weight_map"].pop("encoder.norm.bias"), "lacks encoder.norm.bias"),
        (
            lambda i: i["weight_map"].pop("encoder.blocks.1.experts.2.up_bias"),
            "lacks encoder.blocks.1.experts.2.up_bias",
        ),
        (
            lambda i: i["weight_map"].update({"encoder.extra": CORE}),
            "holds what this architecture does not have: encoder.extra",
        ),
        (
            lambda i: i["weight_map"].update({"encoder.norm.bias.scale": CORE}),
            "holds what .* does not have: encoder.norm.bias.scale",
        ),
        (lambda i: i["weight_map"].update({"encoder.norm.bias": "unknown.safetensors"}), "does not agree .* unknown"),
        (lambda i: i["weight_map"].update({"encoder.norm.bias": "config.json"}), "does not agree .* config.json"),
    ],
)
def test_an_index_that_says_something_else(change: Callable[[Any], object], cause: str, directory: Path) -> None:
    edit(directory / INDEX, change)
    reseal(directory)
    refused(directory, f"index.json: {cause}")


def test_an_index_that_points_to_the_wrong_file(directory: Path) -> None:
    edit(directory / INDEX, lambda i: i["weight_map"].update({"encoder.norm.bias": "router.safetensors"}))
    reseal(directory)
    refused(directory, r"(core|router)\.safetensors: does not hold what .*index.json says: encoder.norm.bias")


KEY, PLAIN = "decoder.blocks.0.attn.out.weight", "encoder.norm.weight"


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda t: t.pop(KEY), f"does not hold what .* says: {KEY}"),
        (lambda t: t.update(extra=torch.zeros(1)), "does not hold what .* says: extra"),
        (lambda t: t.update({KEY: torch.zeros(8, 7, dtype=torch.int8)}), rf"{KEY} is \[8, 7\]"),
        (lambda t: t.update({KEY: torch.zeros(8, 8)}), f"{KEY} is .* torch.float32, must be .* torch.int8"),
        (lambda t: t.update({PLAIN: torch.zeros(8, dtype=torch.float64)}), f"{PLAIN} is .* torch.float64, must be"),
        (lambda t: t.update({PLAIN: torch.zeros(7)}), rf"{PLAIN} is \[7\]"),
        (lambda t: t[PLAIN].fill_(torch.nan), f"{PLAIN} is not finite"),
        (lambda t: t[KEY + ".scale"].fill_(torch.inf), f"{KEY} is not finite"),
        (lambda t: t.update({KEY + ".scale": torch.zeros(8)}), rf"{KEY}.scale is \[8\]"),
        (lambda t: t.update({KEY + ".scale": torch.zeros(8, 1).half()}), f"{KEY}.scale is .* torch.float16"),
    ],
)
def test_tensors_that_do_not_fit(change: Callable[[Any], object], cause: str, directory: Path) -> None:
    edit_tensors(directory / CORE, change)
    reseal(directory)
    refused(directory, rf"core\.safetensors: {cause}")


def test_a_scale_that_overflows_is_refused(directory: Path) -> None:
    """Levels and scale are finite, their product is not."""
    edit_tensors(directory / CORE, lambda t: (t[KEY].fill_(127), t[KEY + ".scale"].fill_(3e38)))
    reseal(directory)
    refused(directory, rf"core\.safetensors: {KEY} is not finite")


def test_scales_without_their_matrix_are_not_in_a_file_of_their_own(directory: Path) -> None:
    edit_tensors(
        directory / CORE, lambda t: save_file({KEY + ".scale": t.pop(KEY + ".scale")}, directory / "x.safetensors")
    )
    edit(directory / INDEX, lambda i: i["weight_map"].update({KEY + ".scale": "x.safetensors"}))
    edit(directory / MANIFEST, lambda m: m["files"].update({"x.safetensors": m["files"][CORE]}))
    reseal(directory)
    refused(directory, rf"core\.safetensors: {KEY} is .* torch.int8, must be .* torch.float32")


def test_a_size_that_only_the_manifest_has_takes_no_memory(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sizes promise enough bytes for what the configuration asks for; the files do not have them."""
    monkeypatch.setattr(Int8Rows, "empty", lambda *_: pytest.fail("memory was taken"))
    edit(directory / "config.json", lambda c: c.update(vocab_size=10**5))
    reseal(directory)
    edit(directory / MANIFEST, lambda m: m["files"][CORE].update(bytes=10**15))
    with pytest.raises(CheckpointError, match=r"core\.safetensors: has \d+ bytes, MANIFEST.json says 10{15}"):
        load_checkpoint(directory, keep_int8=True)


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_devices_and_pipes_are_not_read(name: str, directory: Path) -> None:
    """A device is read for ever, a pipe waited for."""
    (directory / name).unlink()
    (directory / name).symlink_to("/dev/zero")
    refused(directory, f"{name}: not a regular file")
    (directory / name).unlink()
    os.mkfifo(directory / name)
    refused(directory, f"{name}: not a regular file")


def test_json_of_more_than_64_megabytes_is_not_read(directory: Path) -> None:
    os.truncate(directory / MANIFEST, 64_000_001)
    refused(directory, r"MANIFEST\.json: has 64,000,001 bytes")


def test_weights_that_are_no_safetensors(directory: Path) -> None:
    whole = (directory / CORE).read_bytes()
    for data in (pickle.dumps({}), b"", b"\x00" * 8, b"\xff" * 64, b"PK\x03\x04", whole[:-100]):
        (directory / CORE).write_bytes(data)
        reseal(directory)
        refused(directory, r"core\.safetensors: not a whole safetensors file|config.json: asks for")


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda c: c.update(extra=1), "extra: Extra inputs"),
        (lambda c: c["moe"].update(extra=1), "moe.extra: Extra inputs"),
        (lambda c: c.update(d_model="8"), "d_model: Input should be a valid integer"),
        (lambda c: c.update(format_version=2), "format_version: Input should be 1"),
        (lambda c: c.update(encoder_layers=10**9), "encoder_layers: Input should be less than or equal to 64"),
        (lambda c: c["moe"].update(n_experts=10**9, expert_names=[]), "moe.n_experts: Input should be less than"),
        (lambda c: c.update(max_source_positions=10**12), "max_source_positions: Input should be less than"),
        (lambda c: c.update(max_target_positions=10**7), "max_target_positions: Input should be less than"),
        (lambda c: c.update(vocab_size=10**20), "vocab_size: Input should be less than"),
        (lambda c: c.update(d_model=2 * 10**20), "d_model: Input should be less than"),
        (lambda c: c["moe"].update(expert_dim=10**20), "moe.expert_dim: Input should be less than"),
        (
            lambda c: (c.update(encoder_layers=64), c["moe"].update(n_experts=512, expert_names=[])),
            "asks for .* weights, the files have",
        ),
        (lambda c: c.update(vocab_size=10**5), "asks for .* weights, the files have"),
        (lambda c: c.update(d_model=5_000), "asks for .* weights, the files have"),
    ],
)
def test_configurations_that_are_refused(change: Callable[[Any], object], cause: str, directory: Path) -> None:
    edit(directory / "config.json", change)
    reseal(directory)
    refused(directory, f"config.json: {cause}")


@pytest.mark.parametrize(
    "change",
    [lambda c: c.update(n_mels=81), lambda c: c["moe"].update(expert_dim=6), lambda c: c.update(decoder_layers=2)],
)
def test_a_configuration_of_another_shape(change: Callable[[Any], object], directory: Path) -> None:
    edit(directory / "config.json", change)
    reseal(directory)
    refused(directory, r"\.safetensors: .* is \[|index.json: lacks")


def test_files_that_nobody_lists_do_no_harm(directory: Path) -> None:
    (directory / "README.md").write_text("# A model")
    (directory / "stray.safetensors").write_bytes(b"never opened")
    load_checkpoint(directory)


def test_saving_over_a_broken_checkpoint_is_refused_by_name(directory: Path) -> None:
    (directory / MANIFEST).write_text("{")
    with pytest.raises(CheckpointError, match=r"MANIFEST\.json: not JSON"):
        save(directory, TINY, overwrite=True)
