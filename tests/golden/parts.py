"""What is frozen: each part makes its files anew, from the command line and the public names as far as they go."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import ROOT, SHARED
from generate.tiny import CONFIG, tiny_whisper_moe
from safetensors import safe_open
from train.tiny import recipe_tree, tones
from typer.main import get_command
from typer.testing import CliRunner

import whisper_moe
from whisper_moe import WhisperMoE
from whisper_moe.cli import app
from whisper_moe.config import AdaptConfig, ConformerConfig

Made = dict[str, Any]
"""File → its content: text, or plain values, which may differ by rounding; None for what cannot be made here."""
MEDIA = (".flac", ".m4a", ".mov", ".mp3", ".ogg", ".wav")
MORE: dict[str, Any] = {
    "vocab_size": CONFIG.vocab_size + 1,
    "new_tokens": ("<|or|>",),
    "adapt": AdaptConfig(encoder_layers=(0,), adapter_dim=4),
    "conformer": ConformerConfig(encoder_layers=(1,), kernel_size=3),
}
"""What a configuration can have beside experts and TTT layers."""


def help_pages() -> Made:
    return {f"help/{'-'.join(words) or 'whisper-moe'}.txt": _help(words) for words in _commands(get_command(app))}


def _commands(command: Any, *words: str) -> Iterator[tuple[str, ...]]:
    yield words
    for name, inner in getattr(command, "commands", {}).items():
        yield from _commands(inner, *words, name)


def _help(words: tuple[str, ...]) -> str:
    shown = CliRunner().invoke(app, [*words, "--help"], prog_name="whisper-moe", env={"COLUMNS": "120", "TERM": "dumb"})
    assert shown.exit_code == 0, shown.output
    plain = re.sub(r"\x1b\[[\d;]*m", "", shown.output)
    return "".join(f"{line.rstrip()}\n" for line in plain.splitlines())


def api() -> Made:
    text = "\n".join(_signatures(name, getattr(whisper_moe, name)) for name in sorted(whisper_moe.__all__))
    return {"api.txt": re.sub(r" at 0x[\da-f]+", "", text)}


def _signatures(name: str, value: Any) -> str:
    if not inspect.isclass(value):
        return f"{name}{inspect.signature(value) if callable(value) else f': {type(value).__name__}'}\n"
    lines = [f"{name}({', '.join(base.__name__ for base in value.__bases__)})"]
    lines += [f"    {p.kind.name.lower()} {p}" for p in inspect.signature(value).parameters.values()]
    for member in sorted(key for base in value.__mro__ if base.__module__ != "builtins" for key in vars(base)):
        if member.startswith("_") or inspect.ismemberdescriptor(found := inspect.getattr_static(value, member)):
            continue
        if isinstance(found, property):
            lines.append(f"    {member} -> {inspect.signature(found.fget).return_annotation}")  # type: ignore[arg-type]
        elif callable(method := getattr(value, member)):
            lines.append(f"    {type(found).__name__} {member}{inspect.signature(method)}")
    return "".join(f"{line}\n" for line in lines)


def checkpoint() -> Made:
    """Every file of a model that is saved, by its sha256: of a tiny one, and of the default that was loaded."""
    folder, model = _scratch("checkpoints"), tiny(**MORE)
    model.save_pretrained(folder / "float32")
    model.save_pretrained(folder / "int8", quantize=True)
    made: Made = {f"checkpoint-{name}.json": _hashes(folder / name) for name in ("float32", "int8")}
    made["checkpoint-default.json"] = None
    if (ROOT / "checkpoints").is_dir():
        default = WhisperMoE.from_pretrained(ROOT / "checkpoints", for_inference=False)
        default.save_pretrained(folder / "default", quantize=True)
        made["checkpoint-default.json"] = _hashes(folder / "default")
    return made


def _hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def losses() -> Made:
    """Every figure of two small runs but the seconds: a dense model, and one that gets experts, TTT layers and a language."""
    return {f"losses-{name}.json": dict(_figures(_run(name))) for name in ("dense", "experts")}


def _figures(run: Path) -> Iterator[tuple[str, Any]]:
    for line in (run / "metrics.jsonl").read_text("utf-8").splitlines():
        record = json.loads(line)
        record.pop("seconds", None)
        yield f"{record.pop('step')} {'evaluation' if 'evaluation' in record else 'training'}", record


def state() -> Made:
    """What a training checkpoint keeps of the second run: files and tensors; its format is free to change."""
    newest = max((_run("experts") / "checkpoints").iterdir())
    shapes = {}
    for path in sorted(newest.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            shapes |= {f"{path.name} {key}": file.get_slice(key).get_shape() for key in sorted(file.keys())}
    return {"state.json": shapes}


@functools.cache
def _run(name: str) -> Path:
    """A run of 20 steps in float32 on one thread, from the command line, as anyone would start it."""
    folder = _scratch(name)
    tiny(moe=None, ttt=None).save_pretrained(folder / "model")
    tree = recipe_tree(folder / "model", tones(folder / "data"), steps=20, precision="float32")
    if name == "experts":
        parts = {
            "moe": {"n_experts": 3, "expert_dim": 4, "router_layer": 1},
            "ttt": {"encoder_layers": [1], "mini_batch": 10},
        }
        tree["model"] |= parts | {"new_languages": ["or"]}
        tree["data"] |= {"evaluation": tree["data"]["train"]}
        tree["data"]["train"] = [tree["data"]["train"][0] | {"languages": ["or"]}]
        tree["evaluation"] = {"every": 10, "metric": "cer", "limit": 2}
    (folder / "recipe.yaml").write_text(json.dumps(tree), "utf-8")
    with _one_thread():
        done = CliRunner().invoke(app, ["train", str(folder / "recipe.yaml"), "-o", str(folder / "run")])
    assert done.exit_code == 0, done.output
    return folder / "run"


def transcripts() -> Made:
    """What the default makes of the examples, one by one, and of a hundred sentences together."""
    made: Made = {"transcripts-examples.json": None, "transcripts-words.json": None, "transcripts-read.json": None}
    if not (ROOT / "checkpoints").is_dir():
        return made
    with _one_thread():
        model = WhisperMoE.from_pretrained(ROOT / "checkpoints")
        for name, options in (("examples", {}), ("words", {"word_timestamps": True})):
            paths = sorted(path for path in (ROOT / "examples").iterdir() if path.suffix in MEDIA)
            heard = [model.transcribe(path, **options) for path in paths]
            made[f"transcripts-{name}.json"] = dict(_lines(paths, heard))
        if paths := sorted((SHARED / "data/english-read/audio").glob("*.opus")):
            made["transcripts-read.json"] = dict(_lines(paths, model.transcribe(paths)))
    return made


def _lines(paths: list[Path], heard: list[whisper_moe.Transcription]) -> Iterator[tuple[str, Any]]:
    """A line for each recording, and one for each of its segments."""
    for path, result in zip(paths, heard, strict=True):
        whole = _rounded(result.to_dict())
        segments, _ = whole.pop("segments"), whole.pop("source", None)
        yield path.name, whole
        for segment in segments:
            yield f"{path.name} {segment.pop('id')}", {k: v for k, v in segment.items() if k != "tokens"}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(inner) for inner in value]
    return round(value, 4) if isinstance(value, float) else value


def tiny(**parts: Any) -> WhisperMoE:
    """Random weights that are the same on every machine; vectors fit float16, matrices do not."""
    model, generator = tiny_whisper_moe(config=CONFIG.model_copy(update=parts)), np.random.default_rng(0)
    with torch.no_grad():
        for parameter in model.model.parameters():
            drawn = generator.integers(-999, 1_000, tuple(parameter.shape)) / (1_024 if parameter.ndim == 1 else 3_000)
            parameter.copy_(torch.from_numpy(np.asarray(drawn, np.float32)))
    return model


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums are then made in one order, however many cores there are; the process gets its threads back."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(threads)


def _scratch(name: str) -> Path:
    (folder := Path(_temporary().name) / name).mkdir()
    return folder


@functools.cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


PARTS: dict[str, Callable[[], Made]] = {
    "api": api,
    "help": help_pages,
    "checkpoint": checkpoint,
    "state": state,
    "losses": losses,
    "transcripts": transcripts,
}
