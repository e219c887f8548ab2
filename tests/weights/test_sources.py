"""Every way in which a Whisper is published gives the same model; what is broken is refused by name."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

pytest.importorskip("transformers")
from parity.openai_whisper import openai_name
from weights.whispers import (
    CONTROL,
    GENERATION,
    TIMESTAMPS,
    TINY,
    hub_model,
    hub_state,
    random_state,
    same,
    tokenizer_json,
    write_folder,
)

from whisper_moe.weights.checkpoint import save_checkpoint
from whisper_moe.weights.files import CheckpointError
from whisper_moe.weights.sources import kind_of, load_whisper, resolve
from whisper_moe.weights.whisper import config_to_whisper, state_from_whisper

EXPECTED = state_from_whisper(hub_state(hub_model()), TINY)


def silent(message: str) -> None:
    pytest.fail(f"said {message!r}")


def old_folder(folder: Path, *, sharded: bool = False, tokenizer: bool = True) -> Path:
    """A folder as early transformers wrote it: pickled weights, with or without an index."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_to_whisper(TINY)))
    state = hub_state(hub_model())
    if sharded:
        names = {key: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, key in enumerate(state)}
        for name in set(names.values()):
            torch.save({key: state[key] for key in state if names[key] == name}, folder / name)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    else:
        torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    if tokenizer:
        (folder / "tokenizer.json").write_bytes(tokenizer_json())
        (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    return folder


def openai_file(folder: Path, *, tokenizer: bool = True, **changes: Any) -> Path:
    """A ``.pt`` file as openai/whisper downloads it: float16, with the dimensions."""
    # There, a feed-forward is four times as wide as the model.
    config = TINY.model_copy(update={"encoder_ffn_dim": 32, "decoder_ffn_dim": 32})
    state = {openai_name(key): tensor.half() for key, tensor in hub_state(hub_model(config)).items()}
    dims = {
        "n_mels": 80, "n_vocab": TINY.vocab_size, "n_audio_ctx": 20, "n_audio_state": 8, "n_audio_head": 2,
        "n_audio_layer": 3, "n_text_ctx": 9, "n_text_state": 8, "n_text_head": 2, "n_text_layer": 1,
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    torch.save({"dims": dims, "model_state_dict": state} | changes, folder / "small.pt")
    if tokenizer:
        (folder / "tokenizer.json").write_bytes(tokenizer_json())
    return folder / "small.pt"


WRITERS: dict[str, Callable[[Path], object]] = {
    "one file": lambda folder: write_folder(folder, hub_model()),
    "shards": lambda folder: write_folder(folder, hub_model(), max_shard_size="30KB"),
    "old": old_folder,
    "old shards": lambda folder: old_folder(folder, sharded=True),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_folder_gives_the_same_model(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / "fine-tune")
    assert name != "shards" or len(list((tmp_path / "fine-tune").glob("model-*.safetensors"))) > 1
    source = load_whisper(tmp_path / "fine-tune", announce=silent)
    assert source.config == TINY
    assert same(source.state, EXPECTED)
    assert source.tokenizer_files == {"tokenizer.json": tokenizer_json()}
    assert source.generation["suppress_tokens"] == [1, 2]
    assert source.generation["lang_to_id"] == {"<|en|>": 258, "<|hi|>": 259}
    assert source.name == "fine-tune"


def test_weights_outlive_their_files(tmp_path: Path) -> None:
    path = write_folder(tmp_path, hub_model()) / "model.safetensors"
    source = load_whisper(tmp_path, announce=silent)
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert same(source.state, EXPECTED)


def test_safetensors_come_before_pickles(tmp_path: Path) -> None:
    write_folder(tmp_path, hub_model())
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    assert same(load_whisper(tmp_path, announce=silent).state, EXPECTED)


def test_a_fine_tune_without_generation_config_gets_openais_standard(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, hub_model())
    (folder / "generation_config.json").unlink()
    generation = load_whisper(folder, announce=silent).generation
    assert generation["begin_suppress_tokens"][-1] == generation["eos_token_id"] == 256
    assert {257, 260, 261, 262, 263, 264} < set(generation["suppress_tokens"])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"suppress_tokens": [], "begin_suppress_tokens": [7]}))
    generation = load_whisper(folder, announce=silent).generation
    assert (generation["suppress_tokens"], generation["begin_suppress_tokens"]) == ([], [7])


def test_a_folder_with_the_old_tokenizer_files_only(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, hub_model())
    vocabulary = json.loads(tokenizer_json())["model"]["vocab"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    names = [*CONTROL, *TIMESTAMPS]
    (folder / "added_tokens.json").write_text(json.dumps({name: 256 + i for i, name in enumerate(names)}))
    from tokenizers import Tokenizer as Backend

    built = load_whisper(folder, announce=silent).tokenizer_files["tokenizer.json"]
    assert isinstance(built, bytes)
    ours, theirs = Backend.from_str(built.decode()), Backend.from_str(tokenizer_json().decode())
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.encode("नमस्ते <|hi|> x").ids == theirs.encode("नमस्ते <|hi|> x").ids


# openai/whisper


def test_an_openai_file_gives_the_same_model_in_float32(tmp_path: Path) -> None:
    source = load_whisper(openai_file(tmp_path / "a"), announce=silent)
    config = TINY.model_copy(update={"encoder_ffn_dim": 32, "decoder_ffn_dim": 32})
    halves = {key: tensor.half() for key, tensor in hub_state(hub_model(config)).items()}
    assert source.config == config
    assert same(source.state, state_from_whisper(halves, config))
    assert source.tokenizer_files == {"tokenizer.json": tokenizer_json()}
    assert "alignment_heads" not in source.generation
    assert source.generation["no_timestamps_token_id"] == 265
    assert source.name == "small"


def test_an_openai_file_takes_the_tokenizer_of_its_base_and_else_says_what_it_needs(tmp_path: Path) -> None:
    file = openai_file(tmp_path / "a", tokenizer=False)
    with pytest.raises(
        CheckpointError, match=r"small\.pt: has no tokenizer: put the tokenizer\.json of a model with 1767"
    ):
        load_whisper(file, announce=silent)
    write_folder(tmp_path / "base", hub_model())
    source = load_whisper(file, base=str(tmp_path / "base"), announce=silent)
    assert source.tokenizer_files == {"tokenizer.json": tokenizer_json()}


def test_a_folder_without_a_tokenizer_takes_that_of_its_base_and_else_says_what_it_needs(tmp_path: Path) -> None:
    bare = old_folder(tmp_path / "bare", tokenizer=False)
    with pytest.raises(
        CheckpointError, match=r"bare: has no tokenizer: put the tokenizer\.json of a model with 1767 tokens into it"
    ):
        load_whisper(bare, announce=silent)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_bytes(tokenizer_json())
    for base in (write_folder(tmp_path / "base", hub_model()), openai_file(tmp_path / "pt"), tmp_path / "tokenizer"):
        source = load_whisper(bare, base=str(base), announce=silent)
        assert source.tokenizer_files == {"tokenizer.json": tokenizer_json()} and same(source.state, EXPECTED)


@pytest.mark.parametrize("kind", ["folder", "pt"])
def test_the_base_that_is_named_goes_before_a_tokenizer_of_its_own(kind: str, tmp_path: Path) -> None:
    source = write_folder(tmp_path / "a", hub_model()) if kind == "folder" else openai_file(tmp_path / "a")
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    base = str(write_folder(tmp_path / "base", hub_model()))
    with pytest.raises(CheckpointError, match="tokenizer"):
        load_whisper(source, announce=silent)
    found = load_whisper(source, base=base, announce=silent).tokenizer_files
    assert found == {"tokenizer.json": tokenizer_json()}


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"dims": None}, "lacks dims or model_state_dict"),
        (
            {"dims": {"n_audio_state": 8, "n_text_state": 16}},
            "encoder and decoder must be equally wide; dims say 8 and 16",
        ),
        ({"dims": {"n_audio_state": 8, "n_text_state": 8}}, "vocab_size: Input should be a valid integer"),
        ({"model_state_dict": [1]}, "lacks dims or model_state_dict"),
        ({"model_state_dict": {"a": 7}}, "a is not a tensor with a name"),
        ({"model_state_dict": {7: torch.zeros(1)}}, "7 is not a tensor with a name"),
        ({"model_state_dict": {}}, "0 tensors cannot hold"),
        ({"model_state_dict": {str(i): torch.zeros(1) for i in range(9)}}, "lacks decoder.blocks.0.attn.key.weight"),
    ],
)
def test_an_openai_file_that_is_none(changes: dict[str, Any], cause: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"small\.pt: {cause}"):
        load_whisper(openai_file(tmp_path / "a", **changes), announce=silent)


class Payload:
    """Unpickling this makes a directory."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return (os.mkdir, (self.path,))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
@pytest.mark.parametrize("write", [lambda value, file: pickle.dump(value, file.open("wb")), torch.save])
@pytest.mark.parametrize("place", ["a.pt", "f/pytorch_model.bin", "adapter/adapter_model.bin"])
def test_no_code_in_a_pickle_is_run(write: Callable[[Any, Path], None], place: str, tmp_path: Path) -> None:
    trap = tmp_path / "it-ran"
    file = tmp_path / place
    write_folder(tmp_path / "f", hub_model())
    (tmp_path / "f/model.safetensors").unlink()
    (tmp_path / "adapter").mkdir()
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(write_folder(tmp_path / "base", hub_model()))}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(settings))
    write({"dims": {}, "model_state_dict": {"x": Payload(trap)}}, file)
    with pytest.raises(CheckpointError, match=f"{file.name}: not a whole file of plain tensors"):
        load_whisper(file if place.endswith(".pt") else file.parent, announce=silent)
    assert not trap.exists()
    torch.load(file, weights_only=False) if write is torch.save else pickle.load(file.open("rb"))
    assert trap.exists(), "the trap itself is broken"


# Adapters


def adapter(folder: Path, base: Path | str, seed: int = 2, **settings: Any) -> Path:
    """A LoRA adapter of rank 2 on one matrix."""
    folder.mkdir(parents=True, exist_ok=True)
    key = "base_model.model.model.encoder.layers.1.fc1.lora_{}.weight"
    generator = torch.Generator().manual_seed(seed)
    pair = {
        key.format("A"): torch.randn(2, 8, generator=generator),
        key.format("B"): torch.randn(16, 2, generator=generator),
    }
    save_file(pair, folder / "adapter_model.safetensors")
    known = {"peft_type": "LORA", "lora_alpha": 4, "r": 2, "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(known | settings))
    return folder


def delta(folder: Path) -> Tensor:
    pair = load_file(folder / "adapter_model.safetensors")
    a, b = sorted(pair.values(), key=len)
    return b @ a * 2


@pytest.mark.parametrize("pickled", [False, True])
def test_an_adapter_is_merged_into_the_base_it_names(pickled: bool, tmp_path: Path) -> None:
    base = write_folder(tmp_path / "base", hub_model())
    folder = adapter(tmp_path / "adapter", base)
    change = delta(folder)
    if pickled:
        torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
        (folder / "adapter_model.safetensors").unlink()
    source = load_whisper(folder, announce=silent)
    key = "encoder.blocks.1.ffn.up.weight"
    assert torch.equal(source.state[key], EXPECTED[key] + change)
    assert same({k: v for k, v in source.state.items() if k != key}, {k: v for k, v in EXPECTED.items() if k != key})
    assert source.generation == load_whisper(base, announce=silent).generation
    assert source.tokenizer_files == {"tokenizer.json": tokenizer_json()}
    assert source.name == "adapter"


def test_an_adapter_of_an_adapter_and_another_base_by_hand(tmp_path: Path) -> None:
    base = write_folder(tmp_path / "base", hub_model())
    first = adapter(tmp_path / "first", base)
    second = adapter(tmp_path / "second", first, seed=3)
    key = "encoder.blocks.1.ffn.up.weight"
    both = EXPECTED[key] + delta(first) + delta(second)
    assert torch.allclose(load_whisper(second, announce=silent).state[key], both, atol=1e-6)
    alone = load_whisper(second, base=str(base), announce=silent).state[key]
    assert torch.equal(alone, EXPECTED[key] + delta(second))


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ({"base_model_name_or_path": None}, "adapter_config.json: names no base model"),
        ({"base_model_name_or_path": 3}, "adapter_config.json: names no base model"),
        (
            {"base_model_name_or_path": "./gone"},
            "adapter_config.json: its base model './gone' was not found .*name another base",
        ),
        ({"use_dora": True}, "adapter_config.json: use_dora cannot be merged"),
        ({"peft_type": "ADALORA"}, "adapter_config.json: peft_type is 'ADALORA'"),
    ],
)
def test_an_adapter_that_cannot_be_merged(settings: dict[str, Any], cause: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=cause):
        load_whisper(adapter(tmp_path / "a", "nowhere/at-all", **settings), announce=silent)


def test_adapters_that_name_each_other_are_refused(tmp_path: Path) -> None:
    adapter(tmp_path / "a", tmp_path / "b")
    adapter(tmp_path / "b", tmp_path / "a")
    with pytest.raises(CheckpointError, match="/a: names itself as its base model"):
        load_whisper(tmp_path / "a", announce=silent)


# What is broken


def test_kinds_are_told_apart(tmp_path: Path) -> None:
    save_checkpoint(
        tmp_path / "ours", TINY, random_state(TINY), generation={}, tokenizer_files={"tokenizer.json": tokenizer_json()}
    )
    write_folder(tmp_path / "theirs", hub_model())
    assert kind_of(tmp_path / "ours") == "checkpoint"
    assert kind_of(tmp_path / "theirs") == "whisper"
    assert kind_of(adapter(tmp_path / "adapter", "x/y")) == "adapter"
    assert kind_of(openai_file(tmp_path / "pt")) == "openai"
    (tmp_path / "ours/MANIFEST.json").unlink()
    assert kind_of(tmp_path / "ours") == "checkpoint", "a broken checkpoint of ours is no Whisper"
    with pytest.raises(CheckpointError, match="ours: is a whisper-moe checkpoint already"):
        load_whisper(tmp_path / "ours", announce=silent)
    save_file({"x": torch.zeros(1)}, tmp_path / "theirs/adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"theirs: holds a full model .model.safetensors. and an adapter"):
        kind_of(tmp_path / "theirs")


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("", "no model.safetensors"),
        ("missing", "missing: no such file or folder$"),
        ("audio.m4a", r"audio\.m4a: not a model"),
        ("empty", "empty: no model.safetensors, pytorch_model.bin or adapter_model.safetensors"),
    ],
)
def test_what_is_no_model(name: str, cause: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "audio.m4a").write_bytes(b"ftyp")
    with pytest.raises(CheckpointError, match=cause):
        resolve(tmp_path / name, announce=silent)


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("base", "openai/whisper-base"),
        ("tiny.en", "openai/whisper-tiny.en"),
        ("turbo", "openai/whisper-large-v3-turbo"),
        ("large", "openai/whisper-large-v3"),
        ("large-v1", "openai/whisper-large"),
        ("distil-large-v3", "distil-whisper/distil-large-v3"),
        ("someone/base", "someone/base"),
    ],
)
def test_a_name_that_everybody_knows_is_the_hubs_model_unless_it_lies_here(
    name: str, there: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = write_folder(tmp_path / "elsewhere", hub_model())
    asked: list[tuple[str, Path | None]] = []

    def fetch(repo: str, *, cache_dir: Path | None, **_: Any) -> Path:
        asked.append((repo, cache_dir))
        return written

    monkeypatch.setattr("whisper_moe.weights.hub.fetch", fetch)
    monkeypatch.chdir(tmp_path)
    assert resolve(name, announce=silent).name == there
    assert resolve(name, model_dir="models", announce=silent).path == written
    assert asked == [(there, None), (there, Path("models"))]

    said: list[str] = []
    write_folder(tmp_path / name, hub_model())
    assert resolve(name, announce=said.append).path == Path(name)
    assert said == ([f"{name}: taken from {name}, not {there} of the Hub"] if "/" not in name else [])
    write_folder(tmp_path / "models" / name, hub_model())
    assert resolve(name, model_dir=tmp_path / "models", announce=said.append).path == tmp_path / "models" / name
    assert len(asked) == 2


@pytest.mark.parametrize(("name", "file"), [("base", "base.pt"), ("turbo", "large-v3-turbo.pt"), ("mine", "mine.pt")])
def test_whispers_own_files_in_the_model_folder_come_first(name: str, file: str, tmp_path: Path) -> None:
    made = openai_file(tmp_path / "models")
    made.rename(tmp_path / "models" / file)
    at = resolve(name, model_dir=tmp_path / "models", announce=lambda said: None)
    assert (at.kind, at.path) == ("openai", tmp_path / "models" / file)
    assert load_whisper(at.path, announce=lambda said: None).config.d_model == 8


def test_a_name_that_nobody_knows_is_told_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"^lage-v3: no such file or folder; did you mean large-v3 or "):
        resolve("lage-v3", announce=silent)


def test_a_training_run_stands_for_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    (run / "run.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"mine: a training run without a model so far$"):
        resolve(run, announce=silent)
    write_folder(run / "model", hub_model())
    monkeypatch.chdir(tmp_path)
    for name in (run, "runs/mine", "runs/mine/", "runs/mine/model"):
        at = resolve(name, announce=silent)
        assert (at.path.resolve(), at.name) == (run / "model", "mine")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-1]),
                  r"model\.safetensors: not a whole safetensors file"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), r"model\.safetensors: not a whole safetensors file"),
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json: cannot be read"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), r"config\.json: not JSON"),
    "generation is a list": (lambda f: (f / "generation_config.json").write_text("[]"),
                             r"generation_config\.json: must hold a JSON object, holds list"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer: put the tokenizer.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
    "a tensor less": (lambda f: save_file(
        {k: v for k, v in load_file(f / "model.safetensors").items() if not k.endswith("fc2.bias")}, f / "model.safetensors"
    ), r"model\.safetensors: lacks model\.decoder\.layers\.0\.fc2\.bias.* and \d+ more|lacks .*fc2\.bias"),
    "a pickle named so": (lambda f: torch.save({}, f / "model.safetensors"), r"model\.safetensors: not a whole"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder(name: str, tmp_path: Path) -> None:
    damage, cause = DAMAGES[name]
    damage(write_folder(tmp_path, hub_model()))
    with pytest.raises(CheckpointError, match=cause):
        load_whisper(tmp_path, announce=silent)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/../../x.safetensors", "", None, 7])
@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_an_index_that_leads_out_of_its_folder(index: str, name: object, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "f", hub_model())
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    (folder / index).write_text(json.dumps({"weight_map": {"model.encoder.conv1.weight": name}}))
    with pytest.raises(
        CheckpointError, match=r"index.json: lists .* not the name of a file in its own folder|no such file"
    ):
        load_whisper(folder, announce=silent)


@pytest.mark.parametrize(
    "sharded", [lambda f: write_folder(f, hub_model(), max_shard_size="30KB"), WRITERS["old shards"]]
)
def test_shards_that_are_missing_or_have_no_index(sharded: Callable[[Path], object], tmp_path: Path) -> None:
    sharded(tmp_path / "f")
    shard = next((tmp_path / "f").glob("*-00002-of-*"))
    shard.rename(tmp_path / shard.name)
    with pytest.raises(CheckpointError, match=f"{shard.name}: no such file"):
        load_whisper(tmp_path / "f", announce=silent)
    (tmp_path / shard.name).rename(shard)
    next((tmp_path / "f").glob("*.index.json")).unlink()
    with pytest.raises(CheckpointError, match="f: shards without an index"):
        load_whisper(tmp_path / "f", announce=silent)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.encoder.conv1.bias", [0.0] * 8),
        (7, torch.zeros(1)),
        (("a", "b"), torch.zeros(1)),
        ("model.encoder.conv1.bias", torch.zeros(8).to_sparse()),
        ("model.encoder.conv1.bias", torch.zeros(8, device="meta")),
    ],
    ids=["list", "number", "tuple", "sparse", "meta"],
)
@pytest.mark.parametrize("sharded", [False, True])
def test_a_pickle_of_something_else_than_named_tensors(sharded: bool, key: Any, value: Any, tmp_path: Path) -> None:
    folder = old_folder(tmp_path / "f", sharded=sharded)
    file = min(folder.glob("*.bin"))
    torch.save(torch.load(file) | {key: value}, file)
    with pytest.raises(CheckpointError, match=rf"{file.name}: .* is not a tensor with a name"):
        load_whisper(folder, announce=silent)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "model.safetensors"])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(name: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "f", hub_model())
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match=f"{name}: not a regular file"):
        load_whisper(folder, announce=silent)


def test_a_pt_file_cut_in_half(tmp_path: Path) -> None:
    file = openai_file(tmp_path / "a")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=r"small\.pt: not a whole file of plain tensors"):
        load_whisper(file, announce=silent)
