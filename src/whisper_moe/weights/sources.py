"""Whispers from wherever they are: a folder, the Hub, openai/whisper's ``.pt`` files, and LoRA adapters of these.

Every source becomes a :class:`WhisperSource`. Nothing is unpickled but tensors (``weights_only``), and every failure is
a ``CheckpointError`` that names the file.
"""

from __future__ import annotations

import os
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from whisper_moe.config import ModelConfig, model_folder, model_name
from whisper_moe.weights import hub, lora
from whisper_moe.weights.files import (
    CheckpointError,
    TensorFiles,
    inside,
    listed,
    read_json,
)
from whisper_moe.weights.generation import PUBLISHED, complete_generation, read_tokenizer
from whisper_moe.weights.whisper import (
    config_from_openai,
    config_from_whisper,
    state_from_openai,
    state_from_whisper,
    state_to_whisper,
)

Kind = Literal["checkpoint", "whisper", "openai", "adapter"]
Announce = Callable[[str], None]


@dataclass(frozen=True)
class Located:
    """Where a model lies on this disk, and what it is."""

    kind: Kind
    path: Path
    name: str


@dataclass(frozen=True)
class WhisperSource:
    """A dense Whisper of any origin: float32 state with our names, and what it needs to speak."""

    config: ModelConfig
    state: dict[str, Tensor]
    generation: dict[str, Any]
    tokenizer_files: dict[str, Path | bytes]
    name: str


def to_stderr(message: str) -> None:
    print(message, file=sys.stderr)


def kind_of(path: Path) -> Kind:
    """What a local file or folder holds. Raises ``CheckpointError`` for what is no model."""
    if path.is_file():
        if path.suffix != ".pt":
            raise CheckpointError(f"{path}: not a model; expected a folder or an openai/whisper .pt file")
        return "openai"
    if not path.is_dir():
        close = get_close_matches(str(path), hub.PUBLISHED)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise CheckpointError(f"{path}: no such file or folder{hint}")
    config = path / "config.json"
    if (path / "MANIFEST.json").exists() or (config.exists() and read_json(config).get("model_type") == "whisper_moe"):
        return "checkpoint"
    weights = hub.weight_files((file.name for file in path.iterdir()), path)
    if not weights and (path / "run.json").exists():
        raise CheckpointError(f"{path}: a training run without a model so far")
    if not weights:
        raise CheckpointError(f"{path}: no model.safetensors, pytorch_model.bin or adapter_model.safetensors in it")
    return "adapter" if weights[0].startswith("adapter_") else "whisper"


def resolve(
    model: str | Path, *, revision: str | None = None, model_dir: str | os.PathLike[str] | None = None,
    announce: Announce = to_stderr,
) -> Located:  # fmt: skip
    """Find a model: a local path if there is one of that name, else a Hub id, from the cache or downloaded.

    A training run stands for its model, and ``base`` or ``turbo`` for what ``whisper`` calls so. In ``model_dir`` a file or
    folder of that name is looked for first, and downloads go there. Raises ``CheckpointError`` where nothing is found.
    """
    name, folder = str(model), Path(model_dir).expanduser() if model_dir is not None else None
    repo = hub.hub_id(name)
    path = _local(name, repo, folder)
    if repo is None or path.exists():
        if repo is not None and repo != name:
            announce(f"{name}: taken from {path}, not {repo} of the Hub")
        path = model_folder(path)
        return Located(kind_of(path), path, model_name(path))
    path = hub.fetch(repo, revision=revision, cache_dir=folder, complete=_is_complete, announce=announce)
    return Located(kind_of(path), path, repo)


def _local(name: str, repo: str | None, folder: Path | None) -> Path:
    """Where a model of that name lies, or would."""
    here = Path(name).expanduser()
    if folder is None:
        return here
    files = dict.fromkeys(
        (name, (repo or name).removeprefix("openai/whisper-"))
    )  # whisper's file of turbo is another's name
    there = [*(folder / f"{file}.pt" for file in files), folder / name]
    return next((path for path in there if path.exists()), here)


def load_whisper(source: str | Path, *, base: str | None = None, announce: Announce | None = None) -> WhisperSource:
    """Read a Whisper. ``base``: the model under an adapter, or the one whose tokenizer any other source takes.

    ``announce`` is called with one line before a download and for what a source has wrong and can do without; by
    default the line goes to stderr.
    Raises ``CheckpointError`` that names the file, the cause and the remedy.
    """
    announce = announce or to_stderr
    return _load(resolve(source, announce=announce), base, announce, ())


def _load(at: Located, base: str | None, announce: Announce, above: tuple[Path, ...]) -> WhisperSource:
    """``above``: the adapters that this is the base of."""
    if at.path.resolve() in above:
        raise CheckpointError(f"{at.path}: names itself as its base model")
    if at.kind == "adapter":
        return _load_adapter(at, base, announce, (*above, at.path.resolve()))
    if at.kind == "checkpoint":
        raise CheckpointError(f"{at.path}: is a whisper-moe checkpoint already, not a Whisper")
    return _load_openai(at, base, announce) if at.kind == "openai" else _load_folder(at, base, announce)


# A folder as transformers writes it


def _load_folder(at: Located, base: str | None, announce: Announce) -> WhisperSource:
    hf_config = read_json(at.path / "config.json")
    config = config_from_whisper(hf_config, origin=at.path / "config.json")
    file = at.path / "generation_config.json"
    stated = read_json(file) if file.exists() else None
    content, tokenizer = read_tokenizer(_tokenizer_of(at.path, config.vocab_size, base, announce), stated)
    generation = complete_generation(stated, tokenizer, config, legacy=hf_config, origin=file, announce=announce)
    weights, origin = read_weights(at.path)
    state = state_from_whisper(weights, config, origin=origin)
    return WhisperSource(config, state, generation, {"tokenizer.json": content}, at.name)


def read_weights(folder: Path) -> tuple[Mapping[str, Tensor], Path]:
    """The tensors of a folder, lazily where they are safetensors, and the file that errors should name."""
    files = hub.weight_files((file.name for file in folder.iterdir()), folder)
    if len(files) == 1 and not files[0].endswith(".json"):
        path = folder / files[0]
        return (TensorFiles([path]) if path.suffix == ".safetensors" else tensors(unpickle(path), path)), path
    index = next((folder / name for name in files if name.endswith(".index.json")), None)
    if index is None:
        raise CheckpointError(f"{folder}: shards without an index: {listed(files)}")
    return _read_shards(folder, index), index


def _read_shards(folder: Path, index: Path) -> Mapping[str, Tensor]:
    shards = _shards(folder, index)
    if ".safetensors." in index.name:
        return TensorFiles(shards)
    merged: dict[str, Tensor] = {}
    for shard in shards:
        merged |= tensors(unpickle(shard), shard)
    return merged


def _shards(folder: Path, index: Path) -> list[Path]:
    """The files that an index lists."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index}: has no weight_map")
    return [inside(folder, name, index) for name in sorted(set(map(str, weight_map.values())))]


def unpickle(path: Path) -> dict[str, Any]:
    """A file of ``torch.save``, tensors and plain values only; anything that would run code is refused."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        value = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch.load raises almost anything for a damaged file
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path}: not a whole file of plain tensors ({cause})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds {type(value).__name__}, not a table of tensors")
    return value


def tensors(table: dict[Any, Any], path: Path) -> dict[str, Tensor]:
    """The table itself, if it holds plain tensors by name and nothing else."""
    wrong = [key for key, value in table.items() if not isinstance(key, str) or not _is_plain(value)]
    if wrong:
        raise CheckpointError(f"{path}: {listed(str(key)[:80] for key in wrong)} is not a tensor with a name")
    return table


def _is_plain(value: object) -> bool:
    """Whether this has its numbers in memory, one beside the other."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and not value.is_quantized
        and value.device.type == "cpu"
    )


def _is_complete(folder: Path) -> bool:
    """Whether a folder of the Hub's cache has what loading needs; another program may have asked for less."""
    names = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    if "MANIFEST.json" in names:
        files = read_json(folder / "MANIFEST.json").get("files")
        return isinstance(files, dict) and names >= set(files)
    weights = hub.weight_files(names, folder)
    if weights and weights[0].startswith("adapter_"):
        return "adapter_config.json" in names
    index = next((folder / name for name in weights if name.endswith(".index.json")), None)
    shards = {shard.name for shard in _shards(folder, index)} if index else set(weights)
    tokenizer = "tokenizer.json" in names or {"vocab.json", "merges.txt", "added_tokens.json"} <= names
    return bool(shards) and shards <= names and tokenizer and "config.json" in names


# A .pt file as openai/whisper downloads it


def _load_openai(at: Located, base: str | None, announce: Announce) -> WhisperSource:
    content = unpickle(at.path)
    dims, weights = content.get("dims"), content.get("model_state_dict")
    if not isinstance(dims, dict) or not isinstance(weights, dict):
        raise CheckpointError(f"{at.path}: lacks dims or model_state_dict; not a file of openai/whisper")
    config = config_from_openai(dims, origin=at.path)
    tokenizer_json, tokenizer = read_tokenizer(_tokenizer_of(at.path, config.vocab_size, base, announce))
    generation = complete_generation(None, tokenizer, config, origin=at.path, announce=announce)
    state = state_from_openai(tensors(weights, at.path), config, origin=at.path)
    return WhisperSource(config, state, generation, {"tokenizer.json": tokenizer_json}, at.path.stem)


def _tokenizer_of(path: Path, vocab_size: int, base: str | None, announce: Announce) -> Path:
    """Where a source's tokenizer is: with ``base``, within its folder or beside its ``.pt`` file, or with OpenAI's own model
    of that vocabulary in the Hub's cache."""
    if base is not None:
        given = Path(base).expanduser()
        found = given if (given / "tokenizer.json").exists() else resolve(base, announce=announce).path
        return found.with_name("tokenizer.json") if found.is_file() else found
    own = path if path.is_dir() else path.parent
    if path.is_dir() and any((own / name).exists() for name in ("vocab.json", "merges.txt", "added_tokens.json")):
        return own
    if (own / "tokenizer.json").exists():
        return own / "tokenizer.json"
    owners = [f"openai/whisper-{name}" for name in PUBLISHED.get(vocab_size, ())]
    for owner in owners:
        folder = hub.cached(owner)
        if folder is not None and (folder / "tokenizer.json").exists():
            return folder
    if owners and (folder := hub.fetch_tokenizer(owners[0], announce)) is not None:
        return folder
    like, place = f" such as {owners[0]}" if owners else "", "into" if path.is_dir() else "beside"
    raise CheckpointError(
        f"{path}: has no tokenizer: put the tokenizer.json of a model with {vocab_size} tokens{like} {place} it, "
        "or upcycle it with --base MODEL"
    )


# A LoRA adapter as PEFT writes it


def _load_adapter(at: Located, base: str | None, announce: Announce, above: tuple[Path, ...]) -> WhisperSource:
    settings = at.path / "adapter_config.json"
    adapter = read_json(settings)
    lora.check_adapter(adapter, settings)
    under, revision = base or adapter.get("base_model_name_or_path"), None if base else adapter.get("revision")
    if not isinstance(under, str) or not under:
        raise CheckpointError(f"{settings}: names no base model; name it as the base")
    try:
        found = resolve(under, revision=revision, announce=announce)
    except CheckpointError as error:
        raise CheckpointError(
            f"{settings}: its base model {under!r} was not found ({error}); name another base"
        ) from error
    below = _load(found, None, announce, above)
    deltas, origin = read_weights(at.path)
    merged = lora.merge(state_to_whisper(below.state, below.config), deltas, adapter, origin)
    state = state_from_whisper(merged, below.config, origin=origin)
    return WhisperSource(below.config, state, below.generation, below.tokenizer_files, at.name)
