"""The Hub: the cache first and silently, else one announced download of what is needed. A small server plays the Hub."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

pytest.importorskip("transformers")
from weights.test_sources import adapter
from weights.whispers import CONFIGS, hub_model, random_state, tokenizer_json, write_folder

from whisper_moe.weights.checkpoint import save_checkpoint
from whisper_moe.weights.files import CheckpointError
from whisper_moe.weights.hub import is_hub_id, wanted, weight_files

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
        for name, value in (
            {"Content-Length": str(len(data)), "Content-Type": "application/json"} | (headers or {})
        ).items():
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
    save_checkpoint(
        folders["someone/ours"], CONFIGS["shared"], random_state(CONFIGS["shared"]), generation={},
        tokenizer_files={"tokenizer.json": tokenizer_json()},
    )  # fmt: skip
    server = Hub(folders)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


PROGRAM = """
import json, sys
from whisper_moe.weights.checkpoint import load_checkpoint
from whisper_moe.weights.sources import load_whisper, resolve
for name in sys.argv[1:]:
    said, found = [], None
    try:
        at = resolve(name, announce=said.append)
        found = (load_checkpoint(at.path) if at.kind == "checkpoint" else load_whisper(name, announce=said.append)).config.d_model
    except ValueError as error:
        said.append(f"{type(error).__name__}: {error}")
    print(json.dumps([said, found]), flush=True)
"""


def run(hub: Hub, cache: Path, *names: str, **environment: str) -> list[tuple[list[str], int | None]]:
    """What is said and found for each name, by a process that knows no other Hub and no other cache."""
    address = f"http://127.0.0.1:{hub.server_address[1]}"
    clean = {
        key: value for key, value in os.environ.items() if not key.startswith("HF_") and "proxy" not in key.lower()
    }
    clean |= {"HF_ENDPOINT": address, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    clean |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "*"} | environment
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, *names], env=clean, check=True, capture_output=True, text=True
    )
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
    hub.asked.clear()
    assert run(hub, tmp_path, "someone/whisper", "someone/whisper") == [([], 8)] * 2
    assert hub.asked == [], "the Hub is not called for what is cached"
    (missing,) = tmp_path.glob("hub/models--someone--whisper/snapshots/*/model-00002-of-*")
    missing.resolve().unlink()
    missing.unlink()
    (said,) = run(hub, tmp_path, "someone/whisper", HF_HUB_OFFLINE="1")
    assert said[1] is None and "CheckpointError: someone/whisper: not in" in said[0][0]
    (said,) = run(hub, tmp_path, "someone/whisper")
    assert said[1] == 8 and len(said[0]) == 1


def test_adapters_and_checkpoints_of_ours_come_from_the_hub_too(hub: Hub, tmp_path: Path) -> None:
    lora, ours, both, nobody = run(hub, tmp_path, "someone/lora", "someone/ours", "someone/both", "someone/nothing")
    assert [line.split(":")[0] for line in lora[0]] == ["downloading someone/lora", "downloading someone/whisper"]
    assert lora[1] == 8
    assert ours[0][0].startswith("downloading someone/ours: ") and ours[1] == 8
    cause = "holds a full model (model-00001-of-00002.safetensors) and an adapter (adapter_model.safetensors)"
    assert both[1] is None and both[0][0].startswith(f"CheckpointError: someone/both: {cause}")
    assert nobody[1] is None and nobody[0][0].startswith("CheckpointError: someone/nothing: not in ")
    hub.asked.clear()
    again = run(hub, tmp_path, "someone/lora", "someone/ours")
    assert again == [([], 8), ([], 8)] and hub.asked == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("openai/whisper-base", True), ("a/b", True), ("o_o/x.y-z", True), ("whisper-base", False), ("./a", False),
        ("../a", False), ("a/b/c", False), ("/a", False), ("a/", False), ("a/b.", False), ("a--b/c", False), ("a/ b", False),
        ("C:/models", False), ("~/model", False), ("a/b..c", False), ("ä/b", False),
    ],
)  # fmt: skip
def test_names_of_the_hub(name: str, expected: bool) -> None:
    assert is_hub_id(name) is expected
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if expected:
        validate_repo_id(name)
    elif "/" in name and name.count("/") == 1 and name.isascii():
        with pytest.raises(HFValidationError):
            validate_repo_id(name)


def test_one_format_of_weights_is_wanted() -> None:
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    old = ["pytorch_model.bin", "tf_model.h5", "optimizer.pt"]
    assert weight_files(["model.safetensors", *shards, *old], "x") == ["model.safetensors"]
    assert weight_files([*shards, *old], "x") == shards
    assert weight_files(old, "x") == ["pytorch_model.bin"]
    assert weight_files(["adapter_model.bin", "adapter_model.safetensors"], "x") == ["adapter_model.safetensors"]
    assert weight_files(["model.fp32-00001-of-00002.safetensors", "x/model.safetensors"], "x") == []
    assert wanted(["MANIFEST.json", "config.json", "experts/00-a.safetensors", "README.md", "x.bin"], "x") == [
        "MANIFEST.json", "config.json", "experts/00-a.safetensors",
    ]  # fmt: skip
    with pytest.raises(CheckpointError, match="x: holds a full model"):
        wanted(["adapter_model.bin", "pytorch_model.bin"], "x")
