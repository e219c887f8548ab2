"""Checkpoints of a training run: committed whole or not there at all, without pickle.

    RUN/checkpoints/0003-step-00000150/
        model.safetensors  optimizer.safetensors …   one file for each group: tensor ``group/name`` lies in ``group``;
                                                     or the parts of :mod:`whisper_moe.train.sharded`
        state.json                                   everything else: step, scheduler, loader, random states, metrics
        COMMIT.json                                  size and sha256 of every file above; written last

A folder is written under a hidden name, put on the disk (fsync) and renamed; then comes the commit marker, itself
renamed into place. Readers ignore a folder without it, verify what it says, and fall back to the one before. Nothing is
ever overwritten but the marker, by one that has an evaluation's figures too; old folders go after the new commit. Folders
are numbered as they were committed: a run that fell back to step 100 must not go on from the damaged 200 that it left.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from whisper_moe.config import problems
from whisper_moe.train.state import state_bytes
from whisper_moe.weights.files import (
    CheckpointError,
    FileFacts,
    inside,
    json_bytes,
    listed,
    open_tensors,
    read_json,
    regular_size,
    sha256,
    sync,
)

FOLDER, STATE, COMMIT = "checkpoints", "state.json", "COMMIT.json"
_NAME = re.compile(r"(\d{4,})-step-(\d{8,})")
_NEW, _OLD = ".new-", ".old-"
_GROUP = re.compile(r"[a-z][a-z0-9_-]*")
_WRITE_BYTES = 1 << 26
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip

logger = logging.getLogger(__name__)
Announce = Callable[[str], None]


class Commit(BaseModel):
    """What COMMIT.json says, beside a checksum of itself."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal["whisper_moe_training"] = "whisper_moe_training"
    format_version: Literal[1] = 1
    step: int = Field(ge=0)
    score: float | None = Field(default=None, allow_inf_nan=False)
    evaluation: dict[str, float] | None = None
    """What was measured after it was saved."""
    files: dict[str, FileFacts]


@dataclass(frozen=True)
class Loaded:
    """A training checkpoint in memory."""

    path: Path
    step: int
    tensors: dict[str, Tensor]
    """Named ``group/name`` as they were saved; on the CPU, each with memory of its own."""
    meta: dict[str, Any]


# Saving


def save(
    run: Path, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], *, keep: int,
    announce: Announce = logger.warning,
) -> Path:  # fmt: skip
    """Commit a checkpoint of ``run`` and remove older ones but the ``keep`` newest and the one of the best score.

    ``tensors``: named ``group/name``; any dtype of safetensors, on any device (they are copied to the CPU one at a
    time). ``meta``: plain JSON (tuples become lists; NaN is allowed).
    For one process at a time. Raises ``ValueError`` for what JSON or safetensors cannot
    hold, and ``OSError`` that says which checkpoint could not be written; the earlier ones are untouched then.
    """
    groups = _grouped(tensors)
    with committing(run, step, meta, keep=keep, announce=announce) as (folder, files):
        for group, named in groups.items():
            name = f"{group}.safetensors"
            files[name] = _write(folder / name, _serialized(named))
    return _committed(run)[0]


@contextmanager
def committing(
    run: Path, step: int, meta: Mapping[str, Any], *, keep: int, announce: Announce = logger.warning
) -> Iterator[tuple[Path, dict[str, FileFacts]]]:
    """A folder to write files into and what they are, to be filled in: a checkpoint once the block ends. See :func:`save`."""
    if keep < 1:
        raise ValueError(f"keep must be at least 1, is {keep}: the newest checkpoint is never removed")
    state, files = state_bytes(meta), dict[str, FileFacts]()
    folder = _made(run / FOLDER)
    final = folder / f"{_next_serial(folder):04d}-step-{step:08d}"
    scratch = folder / f"{_NEW}{final.name}-{secrets.token_hex(4)}"
    try:
        os.mkdir(scratch)
        yield scratch, files
        files[STATE] = _write(scratch / STATE, [state])
        sync(scratch)
        os.rename(scratch, final)
        _commit(final, Commit(step=step, files=files))
        sync(folder)
    except BaseException as error:
        for path in (scratch, final):
            _discard(path)
        if isinstance(error, OSError):
            said = f"the checkpoint of step {step} could not be written ({error.strerror or error})"
            raise OSError(error.errno or errno.EIO, said, str(folder)) from error
        raise
    _prune(run, keep, announce)


def note(
    run: Path,
    step: int,
    evaluation: Mapping[str, float],
    metric: str,
    *,
    keep: int,
    announce: Announce = logger.warning,
) -> None:
    """Add what an evaluation gave to the newest checkpoint of this step: its marker is replaced, whole.

    ``metric``: the figure that is its score, lower is better; one that could not be measured (NaN) is none."""
    path = next(path for path in _committed(run) if step_of(path) == step)
    score = evaluation.get(metric, math.nan)
    found = {"score": score if math.isfinite(score) else None, "evaluation": dict(evaluation)}
    _commit(path, read_commit(path).model_copy(update=found))
    _prune(run, keep, announce)


def _made(folder: Path) -> Path:
    """The folder, with its own name and the run's on the disk."""
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        for parent in (folder.parent, folder.parent.parent):
            sync(parent)
    return folder


def _grouped(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        group, slash, name = key.partition("/")
        if not slash or not name or not _GROUP.fullmatch(group):
            raise ValueError(f"a tensor is named like model/encoder.norm.bias, group first; not {key!r}")
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{key}: safetensors cannot hold {tensor.dtype}")
        groups.setdefault(group, {})[name] = tensor.detach()
    return groups


def _serialized(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, one tensor after another, so that a large model is never held twice.

    Wide types come first, as in the format's own writer: every tensor is then aligned. Tensors that share memory are
    written as often as they are named.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    for name in order:
        whole = tensors[name].to("cpu").contiguous()
        # Not reshape: a contiguous tensor of one element or none may have any stride, and view() wants 1.
        flat = whole.as_strided((whole.numel(),), (1,))
        yield flat.view(torch.uint8).numpy().data


def _write(path: Path, chunks: Iterable[bytes | memoryview]) -> FileFacts:
    """A new file, on the disk when this returns."""
    digest, size = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        for chunk in chunks:
            view = memoryview(chunk)
            digest.update(view)
            size += len(view)
            while len(view):
                view = view[os.write(descriptor, view[:_WRITE_BYTES]) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return FileFacts(bytes=size, sha256=digest.hexdigest())


def _commit(final: Path, commit: Commit) -> None:
    body = commit.model_dump(mode="json")
    replace(final / COMMIT, json_bytes({"commit": body, "sha256": hashlib.sha256(json_bytes(body)).hexdigest()}))


def replace(path: Path, data: bytes) -> None:
    """Write a file, anew if it is there: whatever happens, it is the old one or the new one, whole."""
    unnamed = path.with_name(f"{_NEW}{path.name}")
    if unnamed.exists():
        unnamed.unlink()
    _write(unnamed, [data])
    os.rename(unnamed, path)
    sync(path.parent)


# Removing


def clean(run: Path) -> None:
    """Remove what an interrupted save or removal left behind. For whoever holds the run's lock, before it trains."""
    folder = run / FOLDER
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        unfinished = path.name.startswith((_NEW, _OLD))
        if unfinished or (_NAME.fullmatch(path.name) and not (path / COMMIT).exists()):
            shutil.rmtree(path, ignore_errors=True)


def _prune(run: Path, keep: int, announce: Announce) -> None:
    committed = _committed(run)
    best = _by_score(committed)[:1]
    for path in committed[keep:]:
        if path not in best and not _discard(path):
            announce(f"WARNING: the old checkpoint {path} could not be removed")


def _discard(path: Path) -> bool:
    """Remove a folder; its name goes first, so that no half of it is ever taken for a checkpoint."""
    if not path.exists():
        return True
    hidden = path.with_name(f"{_OLD}{path.name}-{secrets.token_hex(4)}")
    try:
        os.rename(path, hidden)
        sync(path.parent)
        shutil.rmtree(hidden)
    except OSError:
        return False
    return True


# Loading


def latest(run: Path, *, announce: Announce = logger.warning) -> Path | None:
    """The newest checkpoint that is whole; None if there never was one.

    For each one that is damaged, ``announce`` is given one line. Raises ``CheckpointError`` if all are.
    """
    return _first(run, _committed(run), announce)


def best(run: Path, *, announce: Announce = logger.warning) -> Path | None:
    """The whole checkpoint of the lowest score, the earliest of equals; None if none has one."""
    return _first(run, _by_score(_committed(run)), announce)


def is_sharded(path: Path) -> bool:
    """Whether a checkpoint is for :mod:`whisper_moe.train.sharded` to load."""
    return any(path.glob("shard-*"))


def load(path: Path, groups: Iterable[str] | None = None) -> Loaded:
    """Read a checkpoint, or only some ``groups`` of its tensors (``model``), after verifying every file that is read.

    Raises ``CheckpointError`` that names the file at fault and the cause.
    """
    if is_sharded(path):
        raise CheckpointError(f"{path}: written in parts by several processes (run.checkpoint: sharded)")
    wanted = None if groups is None else {f"{group}.safetensors" for group in groups}
    commit = _verified(path, wanted)
    if absent := sorted((wanted or set()) - set(commit.files)):
        raise CheckpointError(f"{path}: has no {listed(absent)}")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(commit.files) - {STATE}):
        if wanted is None or name in wanted:
            file = open_tensors(path / name)
            group = name.removesuffix(".safetensors")
            # Copied out of the mapped file, which may be removed while they are in use.
            tensors |= {f"{group}/{key}": file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    return Loaded(path, commit.step, tensors, read_json(path / STATE))


def _first(run: Path, paths: list[Path], announce: Announce) -> Path | None:
    """The first of these that is whole."""
    causes: list[str] = []
    for path in paths:
        try:
            _verified(path)
        except CheckpointError as error:
            causes.append(str(error))
        else:
            for cause in causes:
                announce(f"WARNING: a damaged checkpoint is passed over for {path.name}: {cause}")
            return path
    if causes:
        raise CheckpointError(
            f"{run / FOLDER}: none of {len(causes)} checkpoints can be read; the newest: {causes[0]}. "
            "Move the folder away to begin anew"
        )
    return None


def _committed(run: Path) -> list[Path]:
    """All folders with a commit marker, the newest first."""
    folder = run / FOLDER
    found = [path for path in (folder.iterdir() if folder.is_dir() else ()) if _NAME.fullmatch(path.name)]
    return sorted((path for path in found if (path / COMMIT).exists()), key=_serial, reverse=True)


def step_of(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _serial(path: Path) -> int:
    return int(path.name.partition("-")[0])


def _next_serial(folder: Path) -> int:
    """Above every number that is taken, committed or not."""
    taken = [int(number) for path in folder.iterdir() for number, _ in _NAME.findall(path.name)]
    return max(taken, default=0) + 1


def _by_score(paths: list[Path]) -> list[Path]:
    """Those that have a score, the lowest first, then the earliest."""
    scored: list[tuple[float, int, Path]] = []
    for path in paths:
        try:
            score = read_commit(path).score
        except CheckpointError:
            continue
        if score is not None:
            scored.append((score, _serial(path), path))
    return [path for _, _, path in sorted(scored)]


def read_commit(path: Path) -> Commit:
    """The marker, which is what it says it is."""
    document = read_json(path / COMMIT)
    body = document.get("commit")
    if document.get("sha256") != hashlib.sha256(json_bytes(body)).hexdigest():
        raise CheckpointError(f"{path / COMMIT}: does not match its own sha256: damaged or changed")
    try:
        commit = Commit.model_validate_json(json_bytes(body))
    except ValidationError as error:
        raise CheckpointError(f"{path / COMMIT}: {problems(error)}") from error
    for name in commit.files:
        inside(path, name, path / COMMIT)
    if STATE not in commit.files:
        raise CheckpointError(f"{path / COMMIT}: does not list {STATE}")
    return commit


def _verified(path: Path, wanted: set[str] | None = None) -> Commit:
    """The commit marker, once the files are what it says: all of them, or ``wanted`` and the state."""
    commit = read_commit(path)
    for name, facts in commit.files.items():
        if wanted is not None and name not in {STATE, *wanted}:
            continue
        if (size := regular_size(path / name)) != facts.bytes:
            raise CheckpointError(f"{path / name}: has {size} bytes, {COMMIT} says {facts.bytes}: changed")
        try:
            if sha256(path / name) != facts.sha256:
                raise CheckpointError(f"{path / name}: sha256 differs from {COMMIT}'s: damaged or changed")
        except OSError as error:
            raise CheckpointError(f"{path / name}: cannot be read ({error.strerror})") from error
    return commit
