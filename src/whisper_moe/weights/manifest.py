"""What a checkpoint says about itself: names of its small files, its manifest, sizes, and checksums."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from whisper_moe.config import ModelConfig, problems
from whisper_moe.weights.files import CheckpointError, inside, listed, read_json, regular_size
from whisper_moe.weights.parts import require_plausible

CONFIG, GENERATION, TOKENIZER = "config.json", "generation_config.json", "tokenizer.json"
INDEX, MANIFEST = "model.safetensors.index.json", "MANIFEST.json"
_SHARD_SUFFIX = re.compile(r"(-\d{5}-of-\d{5})?\.safetensors")


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class FileFacts(_Facts):
    """What MANIFEST.json says of one file."""

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Manifest(_Facts):
    """MANIFEST.json."""

    format: Literal["whisper_moe"] = "whisper_moe"
    format_version: Literal[1] = 1
    quantization: Literal["int8"] | None = None
    """``int8``: matrices, token embedding and experts are stored as int8 rows, each with a scale."""
    files: dict[str, FileFacts]


@dataclass(frozen=True)
class Description:
    """What a checkpoint's small files say, without its weights being read."""

    directory: Path
    config: ModelConfig
    manifest: Manifest

    @cached_property
    def part_bytes(self) -> dict[str, int]:
        """Bytes on disk of each part: ``core``, ``router``, ``adapt``, ``experts/00-name`` …"""
        sizes: dict[str, int] = {}
        for name, facts in self.manifest.files.items():
            if name.endswith(".safetensors"):
                part = _SHARD_SUFFIX.sub("", name)
                sizes[part] = sizes.get(part, 0) + facts.bytes
        return sizes


def sha256(path: Path) -> str:
    """Of a mapped file, so that other threads have the interpreter until the end."""
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:  # cannot be mapped
            return hashlib.sha256().hexdigest()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return hashlib.sha256(content).hexdigest()


def read_manifest(directory: Path) -> Manifest:
    path = directory / MANIFEST
    try:
        manifest = Manifest.model_validate(read_json(path))
    except ValidationError as error:
        raise CheckpointError(f"{path}: {problems(error)}") from error
    for name in manifest.files:
        inside(directory, name, path)
    missing = {CONFIG, GENERATION, TOKENIZER, INDEX} - set(manifest.files)
    if missing:
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


def read_index(directory: Path, manifest: Manifest) -> dict[str, str]:
    """Tensor (spelled alone) → file; the files are those that the manifest lists."""
    path = directory / INDEX
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{path}: has no weight_map")
    for name in weight_map.values():
        inside(directory, name, path)
    different = {name for name in manifest.files if name.endswith(".safetensors")} ^ set(weight_map.values())
    if different:
        raise CheckpointError(f"{path}: does not agree with {MANIFEST} about {listed(sorted(different))}")
    return weight_map


def verify_size(directory: Path, name: str, manifest: Manifest) -> None:
    path, facts = directory / name, manifest.files[name]
    size = regular_size(path)
    if size != facts.bytes:
        raise CheckpointError(f"{path}: has {size} bytes, {MANIFEST} says {facts.bytes}: incomplete or changed")


def verify(directory: Path, name: str, manifest: Manifest) -> None:
    verify_size(directory, name, manifest)
    path = directory / name
    try:
        if sha256(path) != manifest.files[name].sha256:
            raise CheckpointError(f"{path}: sha256 differs from {MANIFEST}'s: damaged or changed")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error


def describe(directory: str | Path) -> Description:
    """Configuration, files and sizes. Checks the small files it reads; the weights are not opened."""
    directory = Path(directory)
    manifest = read_manifest(directory)
    for name in (CONFIG, INDEX):
        verify(directory, name, manifest)
    config = read_config(directory / CONFIG)
    require_plausible(config, len(read_index(directory, manifest)), directory / CONFIG)
    return Description(directory, config, manifest)
