"""Every way in which a model is published gives the same one; what is broken is refused by name. A small server plays the Hub."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

pytest.importorskip("transformers")
from parity.openai_whisper import openai_name
from weights.whispers import (
    CONFIGS,
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

from whisper_moe.weights.checkpoint import Loaded, save_checkpoint
from whisper_moe.weights.files import CheckpointError
from whisper_moe.weights.load import hub_id, load_model, needed_files, resolve, weight_files
from whisper_moe.weights.whisper import config_to_whisper, state_from_whisper

EXPECTED = state_from_whisper(hub_state(hub_model()), TINY)
OPENAI = TINY.model_copy(update={"encoder_ffn_dim": 32, "decoder_ffn_dim": 32})
"""There, a feed-forward is four times as wide as the model."""
KEY = "encoder.blocks.1.ffn.up.weight"


@pytest.fixture(autouse=True)
def logged(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """What is logged; a test that does not look expects nothing."""
    caplog.set_level(logging.INFO, "whisper_moe")
    yield (seen := [])
    assert [
        record.getMessage() for record in caplog.get_records("call") if record.name.startswith("whisper_moe")
    ] == seen


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
    state = {openai_name(key): tensor.half() for key, tensor in hub_state(hub_model(OPENAI)).items()}
    dims = {"n_mels": 80, "n_vocab": TINY.vocab_size}
    dims |= {"n_audio_ctx": 20, "n_audio_state": 8, "n_audio_head": 2, "n_audio_layer": 3}
    dims |= {"n_text_ctx": 9, "n_text_state": 8, "n_text_head": 2, "n_text_layer": 1}
    folder.mkdir(exist_ok=True)
    torch.save({"dims": dims, "model_state_dict": state} | changes, folder / "small.pt")
    if tokenizer:
        (folder / "tokenizer.json").write_bytes(tokenizer_json())
    return folder / "small.pt"


def adapter(folder: Path, base: Path | str, seed: int = 2, **settings: Any) -> Path:
    """A LoRA adapter of rank 2 on one matrix."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    pair = {
        f"base_model.model.model.encoder.layers.1.fc1.lora_{name}.weight": torch.randn(shape, generator=generator)
        for name, shape in (("A", (2, 8)), ("B", (16, 2)))
    }
    save_file(pair, folder / "adapter_model.safetensors")
    known = {"peft_type": "LORA", "lora_alpha": 4, "r": 2, "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(known | settings))
    return folder


def delta(folder: Path) -> Tensor:
    a, b = sorted(load_file(folder / "adapter_model.safetensors").values(), key=len)
    return b @ a * 2


def ours(directory: Path, **generation: Any) -> Path:
    state = random_state(TINY)
    save_checkpoint(directory, Loaded(TINY, state, GENERATION | generation, tokenizer_json()), overwrite=True)
    return directory


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
    source = load_model(tmp_path / "fine-tune")
    for path in (tmp_path / "fine-tune").glob("*model*"):  # weights outlive their files
        path.write_bytes(b"\xff" * path.stat().st_size)
    assert (source.name, source.config, source.tokenizer_json) == ("fine-tune", TINY, tokenizer_json())
    assert same(source.state, EXPECTED)
    assert source.generation["suppress_tokens"] == [1, 2]
    assert source.generation["lang_to_id"] == {"<|en|>": 258, "<|hi|>": 259}


def test_a_folder_with_the_old_tokenizer_files_only(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Backend

    folder = write_folder(tmp_path, hub_model())
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(json.loads(tokenizer_json())["model"]["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    added = {name: 256 + i for i, name in enumerate([*CONTROL, *TIMESTAMPS])}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    built, theirs = map(Backend.from_buffer, (load_model(folder).tokenizer_json, tokenizer_json()))
    assert built.get_vocab() == theirs.get_vocab()
    assert built.encode("नमस्ते <|hi|> x").ids == theirs.encode("नमस्ते <|hi|> x").ids


def test_a_checkpoint_and_the_whisper_that_it_was_made_from_speak_alike(tmp_path: Path) -> None:
    dense, again = load_model(write_folder(tmp_path / "w", hub_model())), load_model(ours(tmp_path / "m"))
    assert again.generation == dense.generation
    assert again.tokenizer.languages == dense.tokenizer.languages == {"en": 258, "hi": 259}
    assert json.loads((tmp_path / "m/generation_config.json").read_text()) == GENERATION


# openai/whisper


def test_an_openai_file_gives_the_same_model_in_float32(tmp_path: Path) -> None:
    source = load_model(openai_file(tmp_path / "a"))
    halves = {key: tensor.half() for key, tensor in hub_state(hub_model(OPENAI)).items()}
    assert (source.name, source.config, source.tokenizer_json) == ("small", OPENAI, tokenizer_json())
    assert same(source.state, state_from_whisper(halves, OPENAI))
    assert "alignment_heads" not in source.generation
    assert source.generation["no_timestamps_token_id"] == 265


@pytest.mark.parametrize("kind", ["folder", "pt"])
def test_a_tokenizer_is_that_of_the_base_or_ones_own_and_else_it_is_said_what_is_needed(
    kind: str, tmp_path: Path
) -> None:
    bare, own = tmp_path / "bare", tmp_path / "own"
    if kind == "folder":
        sources = [old_folder(bare, tokenizer=False), write_folder(own, hub_model())]
    else:
        sources = [openai_file(bare, tokenizer=False), openai_file(own)]
    with pytest.raises(CheckpointError, match=r"has no tokenizer: put the tokenizer\.json of a model with 1767 tokens"):
        load_model(sources[0])
    (own / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"own/tokenizer\.json: not a tokenizer"):
        load_model(sources[1])
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_bytes(tokenizer_json())
    for base in (write_folder(tmp_path / "base", hub_model()), openai_file(tmp_path / "pt"), tmp_path / "tokenizer"):
        assert all(load_model(source, base=str(base)).tokenizer_json == tokenizer_json() for source in sources)


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"dims": None}, "lacks dims or model_state_dict"),
        ({"dims": {"n_audio_state": 8, "n_text_state": 16}}, "encoder and decoder must be equally wide"),
        ({"dims": {"n_audio_state": 8, "n_text_state": 8}}, "vocab_size: Input should be a valid integer"),
        ({"model_state_dict": {"a": 7}}, "a is not a tensor with a name"),
        ({"model_state_dict": {}}, "lacks decoder.blocks.0.attn.key.weight"),
    ],
)
def test_an_openai_file_that_is_none(changes: dict[str, Any], cause: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"small\.pt: {cause}"):
        load_model(openai_file(tmp_path / "a", **changes))


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
    trap, file = tmp_path / "it-ran", tmp_path / place
    (write_folder(tmp_path / "f", hub_model()) / "model.safetensors").unlink()
    (adapter(tmp_path / "adapter", write_folder(tmp_path / "base", hub_model())) / "adapter_model.safetensors").unlink()
    write({"dims": {}, "model_state_dict": {"x": Payload(trap)}}, file)
    with pytest.raises(CheckpointError, match=f"{file.name}: not a whole file of plain tensors"):
        load_model(file if place.endswith(".pt") else file.parent)
    assert not trap.exists()
    torch.load(file, weights_only=False) if write is torch.save else pickle.load(file.open("rb"))
    assert trap.exists(), "the trap itself is broken"


# Adapters


@pytest.mark.parametrize("pickled", [False, True])
def test_an_adapter_is_merged_into_the_base_it_names(pickled: bool, tmp_path: Path) -> None:
    base = write_folder(tmp_path / "base", hub_model())
    folder = adapter(tmp_path / "adapter", base)
    expected = EXPECTED | {KEY: EXPECTED[KEY] + delta(folder)}
    if pickled:
        torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
        (folder / "adapter_model.safetensors").unlink()
    source = load_model(folder)
    assert same(source.state, expected)
    assert (source.name, source.tokenizer_json) == ("adapter", tokenizer_json())
    assert source.generation == load_model(base).generation


def test_an_adapter_of_an_adapter_and_another_base_by_hand(tmp_path: Path) -> None:
    base = write_folder(tmp_path / "base", hub_model())
    first = adapter(tmp_path / "first", base)
    second = adapter(tmp_path / "second", first, seed=3)
    assert torch.allclose(load_model(second).state[KEY], EXPECTED[KEY] + delta(first) + delta(second), atol=1e-6)
    assert torch.equal(load_model(second, base=str(base)).state[KEY], EXPECTED[KEY] + delta(second))
    adapter(first, second)
    with pytest.raises(CheckpointError, match="/first: names itself as its base model"):
        load_model(first)


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ({"base_model_name_or_path": None}, "names no base model"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path: Input should be a valid string"),
        ({"base_model_name_or_path": "./gone"}, "its base model './gone' was not found .*name another base"),
        ({"use_dora": True}, "use_dora cannot be merged"),
    ],
)
def test_an_adapter_that_cannot_be_merged(settings: dict[str, Any], cause: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"adapter_config.json: {cause}"):
        load_model(adapter(tmp_path / "a", "nowhere/at-all", **settings))


# Where a model is


def test_kinds_are_told_apart(tmp_path: Path) -> None:
    assert resolve(ours(tmp_path / "ours")).kind == "checkpoint"
    assert resolve(write_folder(tmp_path / "theirs", hub_model())).kind == "whisper"
    assert resolve(adapter(tmp_path / "adapter", tmp_path / "ours")).kind == "adapter"
    assert resolve(openai_file(tmp_path / "pt")).kind == "openai"
    (tmp_path / "ours/MANIFEST.json").unlink()
    assert resolve(tmp_path / "ours").kind == "checkpoint", "a broken checkpoint of ours is no Whisper"
    with pytest.raises(CheckpointError, match="ours: is a whisper-moe checkpoint already"):
        load_model(tmp_path / "adapter")
    save_file({"x": torch.zeros(1)}, tmp_path / "theirs/adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"theirs: holds a full model .model.safetensors. and an adapter"):
        resolve(tmp_path / "theirs")


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("missing", "missing: no such file or folder$"),
        ("audio.m4a", r"audio\.m4a: not a model"),
        ("empty", "empty: no model.safetensors, pytorch_model.bin or adapter_model.safetensors"),
        ("lage-v3", "^lage-v3: no such file or folder; did you mean large-v3 or "),
    ],
)
def test_what_is_no_model(name: str, cause: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "audio.m4a").write_bytes(b"ftyp")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=cause):
        resolve(name)


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("base", "openai/whisper-base"),
        ("turbo", "openai/whisper-large-v3-turbo"),
        ("large-v1", "openai/whisper-large"),
        ("distil-large-v3", "distil-whisper/distil-large-v3"),
        ("someone/base", "someone/base"),
    ],
)
def test_a_name_that_everybody_knows_is_the_hubs_model_unless_it_lies_here(
    name: str, there: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    written = write_folder(tmp_path / "elsewhere", hub_model())
    asked: list[tuple[str, Path | None]] = []
    monkeypatch.setattr(
        "whisper_moe.weights.load._fetch", lambda repo, _, folder: asked.append((repo, folder)) or written
    )
    monkeypatch.chdir(tmp_path)
    assert resolve(name).name == there
    assert resolve(name, model_dir="models").path == written
    assert asked == [(there, None), (there, Path("models"))] and not logged

    write_folder(tmp_path / name, hub_model())
    assert resolve(name).path == Path(name)
    known = name != there
    logged += [f"{name}: taken from {name}, not {there} of the Hub"] * known
    write_folder(tmp_path / "models" / name, hub_model())
    assert resolve(name, model_dir=tmp_path / "models").path == tmp_path / "models" / name
    logged += [f"{name}: taken from {tmp_path}/models/{name}, not {there} of the Hub"] * known
    assert len(asked) == 2


@pytest.mark.parametrize(("name", "file"), [("base", "base.pt"), ("turbo", "large-v3-turbo.pt"), ("mine", "mine.pt")])
def test_whispers_own_files_in_the_model_folder_come_first(
    name: str, file: str, tmp_path: Path, logged: list[str]
) -> None:
    path = openai_file(tmp_path / "models").rename(tmp_path / "models" / file)
    at = resolve(name, model_dir=tmp_path / "models")
    assert (at.kind, at.path) == ("openai", path)
    logged += [f"{name}: taken from {path}, not {hub_id(name)} of the Hub"] * (name != "mine")


def test_a_training_run_stands_for_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    (run / "run.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"mine: a training run without a model so far$"):
        resolve(run)
    write_folder(run / "model", hub_model())
    monkeypatch.chdir(tmp_path)
    for name in (run, "./runs/mine/", "./runs/mine/model"):
        at = resolve(name)
        assert (at.path.resolve(), at.name) == (run / "model", "mine")


# What is broken

DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-1]),
        r"model\.safetensors: not a whole safetensors file",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json: cannot be read"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), r"config\.json: not JSON"),
    "generation is a list": (
        lambda f: (f / "generation_config.json").write_text("[]"),
        r"generation_config\.json: must hold a JSON object, holds list",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer: put the tokenizer.json"),
    "a tensor less": (
        lambda f: save_file(
            {k: v for k, v in load_file(f / "model.safetensors").items() if not k.endswith("fc2.bias")},
            f / "model.safetensors",
        ),
        r"model\.safetensors: lacks .*fc2\.bias",
    ),
    "a pickle named so": (lambda f: torch.save({}, f / "model.safetensors"), r"model\.safetensors: not a whole"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder(name: str, tmp_path: Path) -> None:
    damage, cause = DAMAGES[name]
    damage(write_folder(tmp_path, hub_model()))
    with pytest.raises(CheckpointError, match=cause):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/../../x.safetensors", "", None, 7])
@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_an_index_that_leads_out_of_its_folder(index: str, name: object, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "f", hub_model())
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    (folder / index).write_text(json.dumps({"weight_map": {"model.encoder.conv1.weight": name}}))
    with pytest.raises(CheckpointError, match=r"index.json: lists .* not the name of a file in its own folder"):
        load_model(folder)


@pytest.mark.parametrize("name", ["shards", "old shards"])
def test_shards_that_are_missing_or_have_no_index(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / "f")
    shard = next((tmp_path / "f").glob("*-00002-of-*"))
    shard.rename(tmp_path / shard.name)
    with pytest.raises(CheckpointError, match=f"{shard.name}: cannot be read .No such file"):
        load_model(tmp_path / "f")
    (tmp_path / shard.name).rename(shard)
    next((tmp_path / "f").glob("*.index.json")).unlink()
    with pytest.raises(CheckpointError, match="f: shards without an index"):
        load_model(tmp_path / "f")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.encoder.conv1.bias", [0.0] * 8),
        (("a", "b"), torch.zeros(1)),
        ("model.encoder.conv1.bias", torch.zeros(8).to_sparse()),
        ("model.encoder.conv1.bias", torch.zeros(8, device="meta")),
    ],
    ids=["list", "tuple", "sparse", "meta"],
)
@pytest.mark.parametrize("sharded", [False, True])
def test_a_pickle_of_something_else_than_named_tensors(sharded: bool, key: Any, value: Any, tmp_path: Path) -> None:
    folder = old_folder(tmp_path / "f", sharded=sharded)
    file = min(folder.glob("*.bin"))
    torch.save(torch.load(file) | {key: value}, file)
    with pytest.raises(CheckpointError, match=rf"{file.name}: .* is not a tensor with a name"):
        load_model(folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "model.safetensors"])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(name: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "f", hub_model())
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match=f"{name}: not a regular file"):
        load_model(folder)


# The Hub

SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves folders as repositories, by name, in the part of the Hub's protocol that a download uses."""

    def __init__(self, folders: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folders = folders
        self.asked: list[str] = []
        self.sent: list[str] = []


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(path)
        for name, folder in self.server.folders.items():
            files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
            if path in (f"/api/models/{name}", f"/api/models/{name}/revision/main", f"/api/models/{name}/revision/v2"):
                siblings = [{"rfilename": file, "size": len(data)} for file, data in files.items()]
                return self._send(json.dumps({"id": name, "sha": SHA, "siblings": siblings}).encode(), body)
            if path == f"/api/models/{name}/tree/{SHA}":
                tree = [{"type": "file", "path": f, "size": len(d), "oid": _etag(d)} for f, d in files.items()]
                return self._send(json.dumps(tree).encode(), body)
            file = path.removeprefix(f"/{name}/resolve/{SHA}/")
            if file in files:
                if body:
                    self.server.sent.append(file)
                return self._send(files[file], body, {"X-Repo-Commit": SHA, "ETag": f'"{_etag(files[file])}"'})
        return self._send(b"{}", body, {"X-Error-Code": "RepoNotFound"}, status=404)

    def _send(self, data: bytes, body: bool, headers: dict[str, str] | None = None, status: int = 200) -> None:
        self.send_response(status)
        known = {"Content-Length": str(len(data)), "Content-Type": "application/json"}
        for name, value in (known | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    root = tmp_path_factory.mktemp("hub")
    folders = {f"someone/{name}": root / name for name in ("whisper", "lora", "ours", "both")}
    for name in ("whisper", "both"):
        write_folder(folders[f"someone/{name}"], hub_model(), max_shard_size="30KB")
        for unwanted in ("pytorch_model.bin", "flax_model.msgpack", "training_args.bin", "README.md"):
            (folders[f"someone/{name}"] / unwanted).write_bytes(b"x" * 1000)
    adapter(folders["someone/lora"], "someone/whisper", revision="v2")
    adapter(folders["someone/both"], "someone/whisper")
    config = CONFIGS["shared"]
    target, state = folders["someone/ours"], random_state(config)
    save_checkpoint(target, Loaded(config, state, {}, tokenizer_json()))
    server = Hub(folders)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


PROGRAM = """
import json, logging, sys
from whisper_moe.weights.load import load_model
said = []
handler = logging.Handler()
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger("whisper_moe").addHandler(handler)
logging.getLogger("whisper_moe").setLevel(logging.INFO)
for name in sys.argv[1:]:
    said, found = [], None
    try:
        found = load_model(name).config.d_model
    except ValueError as error:
        said.append(f"{type(error).__name__}: {error}")
    print(json.dumps([said, found]), flush=True)
"""


def run(hub: Hub, cache: Path, *names: str, **environment: str) -> list[tuple[list[str], int | None]]:
    """What is said and found for each name, by a process that knows no other Hub and no other cache."""
    address = f"http://127.0.0.1:{hub.server_address[1]}"
    clean = {k: value for k, value in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
    clean |= {"HF_ENDPOINT": address, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    clean |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "*"} | environment
    command = [sys.executable, "-c", PROGRAM, *names]
    result = subprocess.run(command, env=clean, check=True, capture_output=True, text=True)
    return [tuple(json.loads(line)) for line in result.stdout.splitlines()]


def test_a_download_is_announced_takes_what_is_needed_and_happens_once_unless_something_is_missing(
    hub: Hub, tmp_path: Path
) -> None:
    hub.sent.clear()
    (first,) = run(hub, tmp_path, "someone/whisper")
    folder = hub.folders["someone/whisper"]
    needed = {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors.index.json"}
    needed |= {path.name for path in folder.glob("model-*.safetensors")}
    assert set(hub.sent) == needed and len(hub.sent) == len(needed)
    megabytes = sum((folder / name).stat().st_size for name in needed) / 1e6
    assert first == ([f"downloading someone/whisper: {megabytes:,.1f} MB to {tmp_path / 'hub'}"], 8)
    (missing,) = tmp_path.glob("hub/models--someone--whisper/snapshots/*/model-00002-of-*")
    missing.resolve().unlink()
    missing.unlink()
    (said,) = run(hub, tmp_path, "someone/whisper", HF_HUB_OFFLINE="1")
    assert said[1] is None and "CheckpointError: someone/whisper: not in" in said[0][0]
    again, cached = run(hub, tmp_path, "someone/whisper", "someone/whisper")
    assert again[1] == 8 and len(again[0]) == 1 and cached == ([], 8)


def test_adapters_and_checkpoints_of_ours_come_from_the_hub_too(hub: Hub, tmp_path: Path) -> None:
    lora, mine, both, nobody = run(hub, tmp_path, "someone/lora", "someone/ours", "someone/both", "someone/nothing")
    assert [line.split(":")[0] for line in lora[0]] == ["downloading someone/lora", "downloading someone/whisper"]
    assert lora[1] == 8
    assert mine[0][0].startswith("downloading someone/ours: ") and mine[1] == 8
    cause = "holds a full model (model-00001-of-00002.safetensors) and an adapter (adapter_model.safetensors)"
    assert both[1] is None and both[0][0].startswith(f"CheckpointError: someone/both: {cause}")
    assert nobody[1] is None and nobody[0][0].startswith("CheckpointError: someone/nothing: not in ")
    hub.asked.clear()
    assert run(hub, tmp_path, "someone/lora", "someone/ours") == [([], 8), ([], 8)]
    assert hub.asked == [], "the Hub is not called for what is cached"


def test_names_of_the_hub() -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    for name in ("openai/whisper-base", "a/b", "o_o/x.y-z"):
        assert hub_id(name) == name
        validate_repo_id(name)
    for name in ("a/", "a/b.", "a--b/c", "a/ b", "C:/models", "~/model", "a/b..c"):
        assert hub_id(name) is None
        with pytest.raises(HFValidationError):
            validate_repo_id(name)
    assert not any(map(hub_id, ("whisper-base", "./a", "../a", "a/b/c", "/a", "ä/b")))


def test_one_format_of_weights_is_wanted() -> None:
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    old = ["pytorch_model.bin", "tf_model.h5", "optimizer.pt"]
    assert weight_files(["model.safetensors", *shards, *old], "x") == ["model.safetensors"]
    assert weight_files([*shards, *old], "x") == shards
    assert weight_files(old, "x") == ["pytorch_model.bin"]
    assert weight_files(["adapter_model.bin", "adapter_model.safetensors"], "x") == ["adapter_model.safetensors"]
    assert weight_files(["model.fp32-00001-of-00002.safetensors", "x/model.safetensors"], "x") == []
    own = ["MANIFEST.json", "config.json", "experts/00-a.safetensors"]
    assert needed_files([*own, "README.md", "x.bin"], "x") == own


# The default


def test_an_installation_without_a_checkout_makes_the_default_from_whisper(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    source = write_folder(tmp_path / "w", hub_model(TINY.model_copy(update={"encoder_layers": 4})))
    monkeypatch.setattr("whisper_moe.weights.load.default", lambda: str(source))
    monkeypatch.setattr("whisper_moe.weights.load.DEFAULT_MOE", CONFIGS["shared"].moe)
    made: Loaded = load_model(None)
    logged += ["no default model beside this installation: made from w, its experts not trained"]
    assert made.config.moe == CONFIGS["shared"].moe and made.config.ttt is not None and made.name == "w"
    assert any(".experts." in key for key in made.state)
