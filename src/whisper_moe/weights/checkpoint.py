"""This project's checkpoint: a directory of safetensors and JSON with one file for each part of the model.

    config.json  generation_config.json  tokenizer.json
    core.safetensors (or core-00001-of-0000N.safetensors)   router.safetensors   adapt.safetensors   tokens.safetensors
    experts/00-name.safetensors …   reader.safetensors   speech.safetensors   vocoder.safetensors   experts/translate.safetensors
    experts/sign.safetensors   video.safetensors
    model.safetensors.index.json     which file each tensor is in
    MANIFEST.json                    size and sha256 of every file above, checked whenever the checkpoint is loaded

Tensors are stored as int8 with scales where asked, else as float16 where that is exact, else as float32; in memory they
are float32, but for int8 matrices that are asked for as they are. How tensors are spelled alone and in an expert's file:
:mod:`whisper_moe.weights.parts`.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import Field, ValidationError
from safetensors.torch import save
from torch import Tensor, nn

from whisper_moe.config import ModelConfig, Strict, model_name, problems
from whisper_moe.config_aside import ASIDE
from whisper_moe.media.tokenizer import Tokenizer
from whisper_moe.model.int8 import LEVELS, Int8Rows
from whisper_moe.model.senses import Senses
from whisper_moe.model.speech import SpeechModel
from whisper_moe.weights import parts, tokens
from whisper_moe.weights.files import (
    CheckpointError,
    FileFacts,
    atomic_folder,
    check_free,
    inside,
    json_bytes,
    listed,
    open_tensors,
    read_index,
    read_json,
)
from whisper_moe.weights.tokens import GENERATION, TOKENIZER

CONFIG, INDEX, MANIFEST = "config.json", "model.safetensors.index.json", "MANIFEST.json"
CARD = "README.md"
"""For people, who may edit it: no part of the checkpoint, and kept where that is overwritten."""
SHARD_BYTES = 44_000_000
"""Tensor bytes in one file, at most: below what hosts of git repositories refuse. A larger tensor is alone in one."""
Module = TypeVar("Module", bound=nn.Module)
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class Manifest(Strict):
    """MANIFEST.json."""

    format: Literal["whisper_moe"] = "whisper_moe"
    format_version: Literal[1] = 1
    quantization: Literal["int8"] | None = None
    """``int8``: matrices, token embedding and experts are stored as int8 rows, each with a scale."""
    sources: dict[str, str] = Field(default_factory=dict)
    """Expert → what it was trained on, and the licences of that; of those that say so."""
    files: dict[str, FileFacts]


@dataclass(frozen=True)
class Loaded:
    """A model in memory, whatever it was read from; its tensors are named as the model names them."""

    config: ModelConfig
    state: dict[str, Tensor]
    """float32."""
    generation: dict[str, Any]
    tokenizer_json: bytes
    name: str = ""
    experts: tuple[Path, ...] = ()
    """Checkpoints of whole models, where those are its experts."""
    quantized: dict[str, Int8Rows] = field(default_factory=dict)
    """Empty unless asked for: matrices that are still int8; ``state`` lacks them."""
    folder: Path | None = None
    """The checkpoint that it was read from."""

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer(tokens.shared_backend(self.tokenizer_json), self.generation)


# Saving


def save_checkpoint(
    directory: str | os.PathLike[str],
    model: Loaded,
    *,
    quantize: bool = False,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    experts: Iterable[Loaded] = (),
) -> None:
    """Write ``directory`` whole or not at all; the same input gives the same bytes.

    New languages are detected once their rows were trained (:func:`~whisper_moe.weights.tokens.detected_when_trained`).
    ``quantize``: int8 rows, of what is :func:`quantizable`. ``experts``: whole models (granularity ``model``), which become
    checkpoints in it, one after the other. Raises ``ValueError`` for a state that is not finite or not of the
    configuration, and for a directory that exists, unless ``overwrite`` is set and it is a checkpoint.
    """
    directory, config, state = Path(directory).resolve(), model.config, model.state
    check_place(directory, overwrite)
    parts.check_state(config, state)
    with atomic_folder(directory, overwrite=overwrite) as folder:
        index = _write_tensors(folder, config, state, quantize, shard_bytes)
        (folder / TOKENIZER).write_bytes(model.tokenizer_json)
        (folder / CONFIG).write_bytes(json_bytes(config.model_dump(mode="json")))
        (folder / GENERATION).write_bytes(json_bytes(tokens.detected_when_trained(model.generation, config, state)))
        (folder / INDEX).write_bytes(json_bytes({"weight_map": index}))
        for number, expert in enumerate(experts):
            place = folder / parts.expert_part(number, config)
            place.parent.mkdir(exist_ok=True)
            save_checkpoint(place, expert, quantize=quantize, shard_bytes=shard_bytes)
        files = {name: FileFacts.of(folder / name) for name in _files_in(folder)}
        _whole_experts(directory, files, config)
        sources = model.generation.get(tokens.EXPERT_SOURCES, {})
        manifest = Manifest(quantization="int8" if quantize else None, sources=sources, files=files)
        unsaid = set() if sources else {"sources"}
        (folder / MANIFEST).write_bytes(json_bytes(manifest.model_dump(mode="json", exclude=unsaid)))
        if (directory / CARD).is_file():
            (folder / CARD).write_bytes((directory / CARD).read_bytes())


def _files_in(folder: Path) -> list[str]:
    """By name; of a checkpoint within it, the manifest alone, which knows the others."""
    nested = [manifest.parent for manifest in folder.rglob(MANIFEST) if manifest.parent != folder]
    files = [path for path in folder.rglob("*") if not path.is_dir() and path != folder / CARD]
    own = [path for path in files if path.name == MANIFEST or not any(path.is_relative_to(place) for place in nested)]
    return sorted(path.relative_to(folder).as_posix() for path in own)


def check_place(directory: Path, overwrite: bool) -> None:
    """Refuse before anything is computed what is refused at the end."""
    check_free(directory, overwrite)
    if overwrite and directory.is_dir():
        _check_overwritten(directory)


def _check_overwritten(directory: Path) -> None:
    """Nothing but a checkpoint is ever overwritten."""
    known = {*read_manifest(directory).files, MANIFEST} if (directory / MANIFEST).exists() else set()
    if others := [name for name in _files_in(directory) if name not in known]:
        raise ValueError(f"{directory}: not overwritten, for it holds more than a checkpoint: {listed(others)}")
    for name in known:
        if name.endswith(f"/{MANIFEST}"):
            _check_overwritten((directory / name).parent)


def _write_tensors(
    folder: Path, config: ModelConfig, state: Mapping[str, Tensor], quantize: bool, shard_bytes: int
) -> dict[str, str]:
    """Write every part; returns the index's weight map, tensor (spelled alone) → file."""
    files: dict[str, dict[str, Tensor]] = {}
    for key, tensor in parts.unstack(state):
        files.setdefault(parts.part_of(key, config), {})[key] = tensor.detach().cpu()
    index: dict[str, str] = {}
    for part, tensors in files.items():
        shards = _shards((_stored(key, tensor, quantize) for key, tensor in tensors.items()), shard_bytes)
        for number, shard in enumerate(shards, start=1):
            suffix = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
            path = folder / f"{part}{suffix}.safetensors"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(save({parts.file_key(key): tensor for key, tensor in shard.items()}, {"format": "pt"}))
            index |= dict.fromkeys(shard, path.relative_to(folder).as_posix())
    return index


def _stored(key: str, tensor: Tensor, quantize: bool) -> dict[str, Tensor]:
    """What is written for one tensor; what belongs together goes into the same file."""
    if quantize and parts.quantizable(key):
        rows = Int8Rows.of(tensor)
        return {key: rows.levels.contiguous(), key + parts.SCALE: rows.scale.contiguous()}
    half = tensor.half()
    return {key: (half if torch.equal(half.float(), tensor) else tensor).contiguous()}


def _shards(groups: Iterable[dict[str, Tensor]], shard_bytes: int) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    room = shard_bytes
    for group in groups:
        size = sum(tensor.nbytes for tensor in group.values())
        if size > room and shards[-1]:
            shards.append({})
            room = shard_bytes
        shards[-1] |= group
        room -= size
    return shards


# Loading


def read_manifest(directory: Path) -> Manifest:
    path = directory / MANIFEST
    try:
        manifest = Manifest.model_validate(read_json(path))
    except ValidationError as error:
        raise CheckpointError(f"{path}: {problems(error)}") from error
    for name in manifest.files:
        inside(directory, name, path)
    if missing := {CONFIG, GENERATION, TOKENIZER, INDEX} - set(manifest.files):
        raise CheckpointError(f"{path}: does not list {listed(sorted(missing))}")
    return manifest


def read_config(path: Path) -> ModelConfig:
    tree = read_json(path)
    adapt = tree.get("adapt")
    if isinstance(adapt, dict) and "context_margin" in adapt:  # where it was in the first checkpoints that had one
        tree.setdefault("context_margin", adapt.pop("context_margin"))
    try:
        return ModelConfig.model_validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        raise CheckpointError(f"{path}: {problems(error)}") from error


def _read_header(directory: Path) -> tuple[dict[str, FileFacts], ModelConfig, dict[str, str]]:
    """What the small files say, checked: the manifest, the configuration, and tensor (spelled alone) → file."""
    files = read_manifest(directory).files
    weights = {name for name in files if name.endswith(".safetensors")}
    for name in files.keys() - weights:
        files[name].check(directory / name, MANIFEST)
    config, index = read_config(directory / CONFIG), read_index(directory / INDEX)
    if different := weights ^ set(index.values()):
        raise CheckpointError(f"{directory / INDEX}: does not agree with {MANIFEST} about {listed(sorted(different))}")
    return files, config, index


def describe(directory: str | Path) -> tuple[ModelConfig, dict[str, int]]:
    """The configuration, and the bytes on disk of each part: ``core``, ``experts/00-name`` … No weights are read."""
    files, config, _ = _read_header(Path(directory))
    sizes: dict[str, int] = {}
    for name, facts in files.items():
        if name.endswith(".safetensors"):
            part = re.sub(r"(-\d{5}-of-\d{5})?\.safetensors$", "", name)
            sizes[part] = sizes.get(part, 0) + facts.bytes
        elif name.endswith(f"/{MANIFEST}"):
            place = name.removesuffix(f"/{MANIFEST}")
            sizes[place] = sum(describe(Path(directory) / place)[1].values())
    return config, sizes


def load_checkpoint(directory: str | Path, *, keep_int8: bool = False, aside: bool = True) -> Loaded:
    """Read and check everything: sha256 of every file, keys, shapes, types, finite values, tokens.

    ``keep_int8``: matrices that are int8 on disk stay so. ``aside``: False leaves alone what hearing does not need.
    Raises ``CheckpointError`` that names the file at fault.
    """
    directory = Path(directory)
    facts, config, index = _read_header(directory)
    if not aside:
        config = config.model_copy(update=dict.fromkeys(ASIDE))
    own = {key for key in index if aside or not key.startswith((parts.SPEECH, parts.SENSES))}
    stated = read_json(directory / GENERATION)
    with ThreadPoolExecutor(1) as pool:  # while the weights are read
        texts = pool.submit(tokens.read_tokenizer, directory / TOKENIZER, stated)
        state, quantized = _read_tensors(directory, facts, index, own, parts.expected_shapes(config), keep_int8)
    tokenizer_json, tokenizer = texts.result()
    generation = tokens.complete(stated, tokenizer, config, origin=directory / GENERATION)
    experts, name = _whole_experts(directory, facts, config), model_name(directory)
    return Loaded(config, state, generation, tokenizer_json, name, experts, quantized, directory)


def load_speech(directory: str | Path) -> SpeechModel:
    """What speaks, alone. Raises ``CheckpointError`` for a model that does not, and as :func:`load_checkpoint` does."""
    said = f"{directory}: this model does not speak: it has no part for that"
    return _load_aside(Path(directory), parts.SPEECH, lambda c: c.speech and SpeechModel(c.speech, c.n_mels), said)


def load_senses(directory: str | Path) -> Senses:
    """What other senses than hearing need, alone; likewise."""
    said = f"{directory}: this model only hears: it has no part for texts or films"
    return _load_aside(Path(directory), parts.SENSES, lambda c: c.senses and Senses(c.senses, c), said)


def _load_aside(directory: Path, prefix: str, make: Callable[[ModelConfig], Module | None], missing: str) -> Module:
    facts, config, index = _read_header(directory)
    with parts.without_memory():
        if (model := make(config)) is None:
            raise CheckpointError(missing)
    shapes = {prefix + key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    own = {key for key in index if key.startswith(prefix)}
    state, _ = _read_tensors(directory, facts, index, own, shapes, keep_int8=False)
    return parts.frozen(model, {key.removeprefix(prefix): tensor for key, tensor in state.items()})


def _read_tensors(
    directory: Path,
    facts: Mapping[str, FileFacts],
    index: Mapping[str, str],
    own: Set[str],
    shapes: Mapping[str, tuple[int, ...]],
    keep_int8: bool,
) -> tuple[dict[str, Tensor], dict[str, Int8Rows]]:
    """The tensors of these shapes, and those that stay int8, from their files, whose checksums are compared meanwhile. ``own``:
    what of the index that is, scales with it; a file may also hold what is read another time."""
    _check_size(shapes, {name: facts[name] for name in sorted({index[key] for key in own})}, directory)
    kept = {key for key, shape in shapes.items() if keep_int8 and _is_int8(key, shape, index)}
    state = {key: torch.empty(shape, dtype=torch.float32) for key, shape in shapes.items() if key not in kept}
    quantized = {key: Int8Rows.empty(*shapes[key]) for key in kept}
    views: dict[str, Tensor | Int8Rows] = dict(parts.unstack(state)) | dict(parts.unstack(quantized))
    files = _plan(index, own, views.keys(), directory / INDEX)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        checked = pool.map(lambda name: facts[name].check(directory / name, MANIFEST), files)
        for (name, keys), _ in zip(files.items(), checked, strict=True):
            _fill(directory / name, {key: views.get(key) for key in keys})
    return state, quantized


def _whole_experts(directory: Path, files: Iterable[str], config: ModelConfig) -> tuple[Path, ...]:
    """The checkpoints within one. Raises ``CheckpointError`` unless each expert that is a whole model is there."""
    found = tuple((directory / name).parent for name in sorted(files) if name.endswith(f"/{MANIFEST}"))
    wanted = config.moe.n_experts if config.moe and config.moe.granularity == "model" else 0
    if len(found) != wanted:
        said = f"{len(found)} whole models for {wanted} experts that are such"
        raise CheckpointError(f"{directory}: {said}; to keep a merged model, copy its folder")
    return found


def _check_size(shapes: Mapping[str, tuple[int, ...]], files: Mapping[str, FileFacts], directory: Path) -> None:
    """Before memory is taken for the weights: a number needs a byte at least, on disk and not only in the manifest."""
    for name, facts in files.items():
        facts.check_size(directory / name, MANIFEST)
    numbers, stored = sum(map(math.prod, shapes.values())), sum(facts.bytes for facts in files.values())
    if numbers > stored:
        raise CheckpointError(f"{directory / CONFIG}: asks for {numbers:,} weights, the files have {stored:,} bytes")


def _is_int8(key: str, shape: Sequence[int], index: Mapping[str, str]) -> bool:
    """Of a stack of experts all must be, each in one file with its scales."""
    alone = parts.spelled_alone(key, shape)
    return parts.quantizable(key) and all(
        name in index and index.get(name + parts.SCALE) == index[name] for name in alone
    )


def _plan(index: Mapping[str, str], own: Set[str], needed: Set[str], path: Path) -> dict[str, list[str]]:
    """File → its tensors, of each that has some of ``own``. Every tensor that the configuration needs is one of these, and
    nothing else but scales."""
    scales = {key for key in own if key.endswith(parts.SCALE) and parts.quantizable(key.removesuffix(parts.SCALE))}
    parts.check_names(own - scales, needed, path)
    files: dict[str, list[str]] = {index[key]: [] for key in index if key in own}
    for key, name in index.items():
        if name in files:
            files[name].append(key)
    return files


def _fill(path: Path, views: Mapping[str, Tensor | Int8Rows | None]) -> None:
    """Read one file into the model's tensors. ``views``: what the index says is in it; None for scales, and for what is
    read another time."""
    keys, file = {parts.file_key(key): key for key in views}, open_tensors(path)
    if (found := set(file.keys())) != set(keys) or len(keys) != len(views):
        raise CheckpointError(f"{path}: does not hold what {INDEX} says: {listed(sorted(found ^ set(keys)))}")
    for name, key in keys.items():
        if (out := views[key]) is None:
            continue
        stored = file.get_tensor(name)
        if name + parts.SCALE not in keys:
            assert isinstance(out, Tensor)
            parts.check_shape(stored, out.shape, _FLOATS, f"{path}: {name}")
            parts.check_finite(stored, f"{path}: {name}")
            out.copy_(stored)
        else:
            rows = Int8Rows(stored, file.get_tensor(name + parts.SCALE))
            parts.check_shape(stored, out.shape, (torch.int8,), f"{path}: {name}")
            parts.check_shape(rows.scale, (len(stored), 1), (torch.float32,), f"{path}: {name}{parts.SCALE}")
            parts.check_finite(rows.scale * LEVELS, f"{path}: {name}")
            if isinstance(out, Tensor):
                rows.dequantize_into(out)
            else:
                out.levels.copy_(stored)
                out.scale.copy_(rows.scale)
