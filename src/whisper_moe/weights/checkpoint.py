"""This project's checkpoint: a directory of safetensors and JSON with one file for each part of the model.

    config.json  generation_config.json  tokenizer.json
    core.safetensors (or core-00001-of-0000N.safetensors)   router.safetensors   adapt.safetensors   tokens.safetensors
    experts/00-name.safetensors …
    model.safetensors.index.json     which file each tensor is in
    MANIFEST.json                    size and sha256 of every file above, checked whenever the checkpoint is loaded

Tensors are stored as int8 with scales where asked, else as float16 where that is exact, else as float32; in memory they
are float32, but for int8 matrices that are asked for as they are. How tensors are spelled alone and in an expert's file:
:mod:`whisper_moe.weights.parts`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save
from torch import Tensor

from whisper_moe.config import ModelConfig
from whisper_moe.media.tokenizer import read_backend
from whisper_moe.model.int8 import LEVELS, Int8Rows
from whisper_moe.weights.files import (
    CheckpointError,
    atomic_folder,
    inside,
    json_bytes,
    listed,
    open_tensors,
    read_bytes,
    read_json,
)
from whisper_moe.weights.manifest import (
    CONFIG,
    GENERATION,
    INDEX,
    MANIFEST,
    TOKENIZER,
    FileFacts,
    Manifest,
    read_config,
    read_index,
    read_manifest,
    sha256,
    verify,
    verify_size,
)
from whisper_moe.weights.parts import (
    SCALE,
    expected_shapes,
    file_key,
    is_finite,
    part_of,
    quantizable,
    require_plausible,
    spelled_alone,
    unstack,
)
from whisper_moe.weights.tokens import detected_when_trained

if TYPE_CHECKING:
    import tokenizers

SHARD_BYTES = 44_000_000
"""Tensor bytes in one file, at most: below what hosts of git repositories refuse. A larger tensor is alone in one."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint in memory; its tensors are named as the model names them."""

    directory: Path
    config: ModelConfig
    state: dict[str, Tensor]
    """float32."""
    quantized: dict[str, Int8Rows]
    """Empty unless asked for: matrices that were left as they are stored; ``state`` lacks them."""
    generation: dict[str, Any]
    tokenizer: Path
    backend: tokenizers.Tokenizer
    """What ``tokenizer`` holds."""
    manifest: Manifest


# Saving


def save_checkpoint(
    directory: str | Path,
    config: ModelConfig,
    state: Mapping[str, Tensor],
    *,
    generation: Mapping[str, Any],
    tokenizer_files: Mapping[str, Path | bytes],
    quantize: bool = False,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Write ``directory`` whole or not at all; the same input gives the same bytes.

    ``state``: the model's tensors, float32. ``generation``: new languages in it are detected once their rows were trained
    (:func:`~whisper_moe.weights.tokens.detected_when_trained`). ``tokenizer_files``: at least ``tokenizer.json``, as a path
    or its content. ``quantize``: int8 rows, of what is :func:`quantizable`. Raises ``ValueError`` for a state that is
    not finite or not of this configuration, and for a directory that exists, unless ``overwrite`` is set and it is a checkpoint.
    """
    directory = Path(directory).resolve()
    _check_target(directory, overwrite)
    _check_state(config, state)
    if TOKENIZER not in tokenizer_files:
        raise ValueError(f"tokenizer_files must have {TOKENIZER}; has {listed(tokenizer_files)}")
    with atomic_folder(directory, overwrite=overwrite) as folder:
        index = _write_tensors(folder, config, state, quantize, shard_bytes)
        for name, value in tokenizer_files.items():
            inside(folder, name, folder).write_bytes(value if isinstance(value, bytes) else read_bytes(value))
        for name, document in (
            (CONFIG, config.model_dump(mode="json")),
            (GENERATION, detected_when_trained(generation, config, state)),
            (INDEX, {"weight_map": index}),
        ):
            (folder / name).write_bytes(json_bytes(document))
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        facts = {name: FileFacts(bytes=(folder / name).stat().st_size, sha256=sha256(folder / name)) for name in names}
        manifest = Manifest(quantization="int8" if quantize else None, files=facts)
        (folder / MANIFEST).write_bytes(json_bytes(manifest.model_dump(mode="json")))


def _check_target(directory: Path, overwrite: bool) -> None:
    """Refuse before anything is computed what would be refused at the end; nothing but a checkpoint is ever overwritten."""
    if not (overwrite and directory.is_dir()):
        return
    present = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if not path.is_dir()}
    known = {*read_manifest(directory).files, MANIFEST} if (directory / MANIFEST).exists() else set()
    if present - known:
        raise ValueError(
            f"{directory}: not overwritten, for it holds more than a checkpoint: {listed(sorted(present - known))}"
        )


def _check_state(config: ModelConfig, state: Mapping[str, Tensor]) -> None:
    shapes = expected_shapes(config)
    different = sorted(shapes.keys() ^ state.keys())
    if different:
        raise ValueError(f"the state does not belong to the configuration: {listed(different)}")
    for key, shape in shapes.items():
        if tuple(state[key].shape) != shape or state[key].dtype != torch.float32:
            found = f"{list(state[key].shape)} {state[key].dtype}"
            raise ValueError(f"{key} is {found}; the configuration needs {list(shape)} torch.float32")
        if not is_finite(state[key]):
            raise ValueError(f"{key} is not finite (NaN or infinity); a checkpoint of it could not be loaded")


def _write_tensors(
    folder: Path, config: ModelConfig, state: Mapping[str, Tensor], quantize: bool, shard_bytes: int
) -> dict[str, str]:
    """Write every part; returns the index's weight map, tensor (spelled alone) → file."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in unstack(state):
        parts.setdefault(part_of(key, config), {})[key] = tensor.detach().cpu()
    index: dict[str, str] = {}
    for part, tensors in parts.items():
        shards = _shards((_stored(key, tensor, quantize) for key, tensor in tensors.items()), shard_bytes)
        for number, shard in enumerate(shards, start=1):
            suffix = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
            path = folder / f"{part}{suffix}.safetensors"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(save({file_key(key): tensor for key, tensor in shard.items()}, {"format": "pt"}))
            index |= dict.fromkeys(shard, path.relative_to(folder).as_posix())
    return index


def _stored(key: str, tensor: Tensor, quantize: bool) -> dict[str, Tensor]:
    """What is written for one tensor; what belongs together goes into the same file."""
    if quantize and quantizable(key):
        rows = Int8Rows.of(tensor)
        return {key: rows.levels.contiguous(), key + SCALE: rows.scale.contiguous()}
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


def load_checkpoint(directory: str | Path, *, keep_int8: bool = False) -> Checkpoint:
    """Read and check everything: sha256 of every file, keys, shapes, types, finite values.

    ``keep_int8``: matrices that are int8 on disk stay so.
    Raises ``CheckpointError`` that names the file at fault.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        small = [name for name in manifest.files if not name.endswith(".safetensors")]
        list(pool.map(lambda name: verify(directory, name, manifest), small))
        config = read_config(directory / CONFIG)
        weight_map = read_index(directory, manifest)
        require_plausible(config, len(weight_map), directory / CONFIG)
        shapes = expected_shapes(config)
        _check_size(shapes, weight_map, manifest, directory)
        kept = _stored_int8(shapes, weight_map) if keep_int8 else set()
        state = {key: torch.empty(shape, dtype=torch.float32) for key, shape in shapes.items() if key not in kept}
        quantized = {key: Int8Rows.empty(*shapes[key]) for key in kept}
        views: dict[str, Tensor | Int8Rows] = dict(unstack(state)) | dict(unstack(quantized))
        files = _plan(weight_map, set(views), directory / INDEX)

        verified = pool.map(lambda name: verify(directory, name, manifest) or name, files)
        backend = _read_tokenizer(directory / TOKENIZER)  # while the threads compute checksums
        for name in verified:
            _fill(directory / name, {key: views.get(key) for key in files[name]})
    generation = read_json(directory / GENERATION)
    return Checkpoint(directory, config, state, quantized, generation, directory / TOKENIZER, backend, manifest)


def _stored_int8(shapes: Mapping[str, tuple[int, ...]], weight_map: Mapping[str, str]) -> set[str]:
    """Of a stack of experts all must be."""
    return {
        key
        for key, shape in shapes.items()
        if quantizable(key) and all(name + SCALE in weight_map for name in spelled_alone(key, shape))
    }


def _read_tokenizer(path: Path) -> tokenizers.Tokenizer:
    try:
        return read_backend(path)
    except ValueError as error:
        raise CheckpointError(f"{path}: not a tokenizer ({error})") from error


def _plan(weight_map: Mapping[str, str], needed: set[str], path: Path) -> dict[str, list[str]]:
    """File → its tensors. Every tensor that the configuration needs is in one of them, and nothing else but scales."""
    scales = {key for key in weight_map if key.endswith(SCALE) and quantizable(key.removesuffix(SCALE))}
    missing, extra = sorted(needed - set(weight_map)), sorted(set(weight_map) - needed - scales)
    if missing or extra:
        what = f"lacks {listed(missing)}" if missing else f"lists what {CONFIG} does not have: {listed(extra)}"
        raise CheckpointError(f"{path}: {what}")
    apart = sorted(key for key in scales if weight_map[key] != weight_map.get(key.removesuffix(SCALE)))
    if apart:  # a file is read by itself
        raise CheckpointError(f"{path}: {listed(apart)} is not in the file of its matrix")
    files: dict[str, list[str]] = {}
    for key, name in weight_map.items():
        files.setdefault(name, []).append(key)
    return files


def _check_size(
    shapes: Mapping[str, tuple[int, ...]], weight_map: Mapping[str, str], manifest: Manifest, directory: Path
) -> None:
    """Before memory is taken for the weights: a number needs a byte at least, on disk and not only in the manifest."""
    names = set(weight_map.values())
    for name in sorted(names):
        verify_size(directory, name, manifest)
    numbers, stored = sum(map(math.prod, shapes.values())), sum(manifest.files[name].bytes for name in names)
    if numbers > stored:
        raise CheckpointError(f"{directory / CONFIG}: asks for {numbers:,} weights, the files have {stored:,} bytes")


def _fill(path: Path, views: Mapping[str, Tensor | Int8Rows | None]) -> None:
    """Read one file into the model's tensors. ``views``: what the index says is in it; None for scales."""
    keys = {file_key(key): key for key in views}
    file = open_tensors(path)
    found = set(file.keys())
    if found != set(keys) or len(keys) != len(views):
        raise CheckpointError(f"{path}: does not hold what {INDEX} says: {listed(sorted(found ^ set(keys)))}")
    for name, key in keys.items():
        out = views[key]
        if out is None:
            continue
        stored = file.get_tensor(name)
        scale = file.get_tensor(name + SCALE) if name + SCALE in keys else None
        _check_stored(path, name, stored, scale, out)
        _copy(stored, scale, out)
        if not is_finite(stored if scale is None else scale * LEVELS):
            raise CheckpointError(f"{path}: {name} is not finite (NaN or infinity)")


def _copy(stored: Tensor, scale: Tensor | None, out: Tensor | Int8Rows) -> None:
    if scale is None:
        assert isinstance(out, Tensor)
        out.copy_(stored)
    elif isinstance(out, Tensor):
        Int8Rows(stored, scale).dequantize_into(out)
    else:
        out.levels.copy_(stored)
        out.scale.copy_(scale)


def _check_stored(path: Path, name: str, stored: Tensor, scale: Tensor | None, out: Tensor | Int8Rows) -> None:
    kinds = (torch.float32, torch.float16, torch.bfloat16) if scale is None else (torch.int8,)
    if stored.shape != out.shape or stored.dtype not in kinds:
        found, needed = list(stored.shape), list(out.shape)
        raise CheckpointError(
            f"{path}: {name} is {found} {stored.dtype}, must be {needed} {' or '.join(map(str, kinds))}"
        )
    if scale is not None and (scale.shape != (len(stored), 1) or scale.dtype != torch.float32):
        raise CheckpointError(
            f"{path}: {name}{SCALE} is {list(scale.shape)} {scale.dtype}, must be {[len(stored), 1]} float32"
        )
