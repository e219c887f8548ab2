"""Checkpoints of a training run: written by all of its processes, committed whole or not there at all, without pickle.

    RUN/checkpoints/0003-step-00000150/
        shard-00001-model-….safetensors   one process's parts of ``model/NAME`` and ``optimizer/NAME/KEY``, each with its place
        state.json                        everything else: step, scheduler, loader, progress
        COMMIT.json                       the marker: size and sha256 of every file above, and what it was judged by

Tensors are written and read by torch.distributed.checkpoint. Parts are found by their place: any number of processes in any
layout goes on from what any other wrote, if the folder is on a disk of all.

A folder is written under a hidden name, put on the disk (fsync) and renamed. Readers verify what its marker says and fall
back to the one before. Nothing is ever overwritten but the marker, by one that has an evaluation's figures too; old
folders go after the new commit. Folders are numbered as they were committed: a run that fell back to step 100 must not go on
from the damaged 200 that it left.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import re
import shutil
import warnings
from collections import ChainMap, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load as load_parts
from torch.distributed.checkpoint.state_dict_saver import save as save_parts
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.optim import Optimizer

from whisper_moe.config import problems
from whisper_moe.weights.files import (
    CheckpointError,
    FileFacts,
    atomic_file,
    atomic_folder,
    json_bytes,
    read_json,
    sync,
)

FOLDER, STATE, COMMIT = "checkpoints", "state.json", "COMMIT.json"
FILE_BYTES = 1 << 26
"""A file takes no further tensor from here on; while it is written, its content is in memory twice more."""
_NAME = re.compile(r"(\d{4,})-step-(\d{8,})")
T = TypeVar("T")
logger = logging.getLogger(__name__)


class Commit(BaseModel):
    """What COMMIT.json says, beside a checksum of itself."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal["whisper_moe_training"] = "whisper_moe_training"
    format_version: Literal[2] = 2
    step: int = Field(ge=0)
    score: float | None = Field(default=None, allow_inf_nan=False)
    evaluation: dict[str, float] | None = None
    """What was measured after it was saved."""
    files: dict[str, FileFacts]


# Saving


def tensors_of(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """What a checkpoint keeps of them: ``model/NAME`` and ``optimizer/NAME/KEY``, as this process has them."""
    tensors = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        # get(): to look is not to make a state where there is none, of what never had a gradient.
        tensors |= {f"optimizer/{name}/{key}": value for key, value in optimizer.state.get(parameter, {}).items()}
    return {name: tensor.detach() for name, tensor in tensors.items()}


def save(run: Path, step: int, model: nn.Module, optimizer: Optimizer, meta: Mapping[str, Any], *, keep: int) -> None:
    """Commit a checkpoint of ``run`` and remove older ones but the ``keep`` newest and the one of the best score.

    Every process of the run calls it. ``meta``: plain JSON, of which rank 0's is kept. Raises ``OSError`` that says which
    checkpoint could not be written; the earlier ones are untouched then.
    """
    first, folder = _rank() == 0, run / FOLDER
    try:
        with atomic_folder(_next(folder, step)) if first else nullcontext() as scratch:
            shared = Path(_gathered(str(scratch))[0])
            files = _write_parts(shared, tensors_of(model, optimizer))
            if first:
                (shared / STATE).write_text(json.dumps(meta), "utf-8")
                _mark(shared, Commit(step=step, files=files | {STATE: FileFacts.of(shared / STATE)}))
    except OSError as error:
        said = f"the checkpoint of step {step} could not be written ({error.strerror or error})"
        raise OSError(error.errno or errno.EIO, said, str(folder)) from error
    if first:
        _prune(run, keep)
    _gathered(None)  # nobody goes on before it is committed


def _next(folder: Path, step: int) -> Path:
    """A name above every number that is taken, in a folder whose own name and the run's are on the disk."""
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        for parent in (folder.parent, folder.parent.parent):
            sync(parent)
    taken = [_serial(path) for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return folder / f"{max(taken, default=0) + 1:04d}-step-{step:08d}"


def _write_parts(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, FileFacts]:
    """The parts of all processes, on the disk when this returns, and what their files are."""
    parts = {name: (full(t).cpu() if _scattered(t) else t).contiguous() for name, t in tensors.items()}
    ends = accumulate(part.nbytes for part in parts.values())
    file_of = {name: 1 + end // FILE_BYTES for name, end in zip(parts, ends, strict=True)}
    writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=file_of, save_distributed=True)
    with _plain_errors():
        save_parts(parts, storage_writer=writer)
    own = list(folder.glob(f"shard-{_rank() + 1:05d}-*"))
    for path in own:
        sync(path)
    return dict(ChainMap(*_gathered({path.name: FileFacts.of(path) for path in own})))


def note(run: Path, step: int, evaluation: Mapping[str, float], metric: str, *, keep: int) -> None:
    """Add what an evaluation gave to the newest checkpoint of this step: its marker is replaced, whole.

    ``metric``: the figure that is its score, lower is better; one that could not be measured (NaN) is none."""
    path = next(path for path in _committed(run) if step_of(path) == step)
    score = evaluation.get(metric, math.nan)
    found = {"score": score if math.isfinite(score) else None, "evaluation": dict(evaluation)}
    _mark(path, read_commit(path).model_copy(update=found))
    _prune(run, keep)


def _mark(folder: Path, commit: Commit) -> None:
    body = commit.model_dump(mode="json")
    with atomic_file(folder / COMMIT) as path:
        path.write_bytes(json_bytes({"commit": body, "sha256": hashlib.sha256(json_bytes(body)).hexdigest()}))


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor; every process calls it, in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _scattered(tensor: Tensor) -> bool:
    """Whether a process's part is not one block of the whole, and so has no place that could be written down.

    Heads of a fused projection that is cut over ranks lie in several blocks; so does what two directions share out.
    """
    return isinstance(tensor, DTensor) and any(type(place) not in (Shard, Replicate) for place in tensor.placements)


@contextmanager
def _plain_errors() -> Iterator[None]:
    """The first process's own error for that of all; and no warning that one process is alone, which it is meant to be."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except CheckpointException as error:
            cause = next(iter(error.failures.values()))[0]
            raise (cause if isinstance(cause, OSError) else ValueError(f"{type(cause).__name__}: {cause}")) from error


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _gathered(own: T) -> list[T]:
    """What each process has; all wait for each other."""
    if not dist.is_initialized():
        return [own]
    said: list[T] = [own] * dist.get_world_size()
    dist.all_gather_object(said, own)
    return said


# Removing


def clean(run: Path) -> None:
    """Remove what an interrupted save or removal left behind. For whoever holds the run's lock, before it trains."""
    for path in [*(run / FOLDER).rglob(".*.tmp"), *(run / FOLDER).glob(".*.old")]:
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _prune(run: Path, keep: int) -> None:
    """Of what goes, the name goes first, so that no half of it is ever taken for a checkpoint."""
    committed = _committed(run)
    kept = {*committed[:keep], *_by_score(committed)[:1]}
    for path in (path for path in committed if path not in kept):
        hidden = path.with_name(f".{path.name}.old")
        try:
            os.rename(path, hidden)
            sync(path.parent)
            shutil.rmtree(hidden)
        except OSError:
            logger.warning("WARNING: the old checkpoint %s could not be removed", path)


# Loading


def load(path: Path, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Fill a model and its optimizer, in whatever layout they are; returns ``meta``. Every process of the run calls it.

    The rates of the optimizer's groups stay as they are. Raises ``CheckpointError`` that names what does not fit.
    """
    tensors = {f"model/{name}": tensor.detach() for name, tensor in model.state_dict().items()}
    parameters, state = dict(model.named_parameters()), defaultdict[str, dict[str, Tensor]](dict)
    for key, facts in _known(path).items():
        group, name, *kind = key.split("/")
        if group == "optimizer" and name in parameters:
            tensors[key] = torch.zeros_like(parameters[name].detach()) if facts.size else torch.zeros(())
            state[name][kind[0]] = tensors[key]
    _read(path, tensors)
    names = {parameter: name for name, parameter in parameters.items()}
    order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    found = {index: state[name] for index, name in enumerate(order) if name in state}
    optimizer.load_state_dict({"state": found, "param_groups": optimizer.state_dict()["param_groups"]})
    return read_json(path / STATE)


def read(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """The tensors whose names begin so, whole, on the CPU, for a process that no other waits for."""
    known = {name: facts for name, facts in _known(path).items() if name.startswith(prefix)}
    tensors = {name: torch.empty(facts.size, dtype=facts.properties.dtype) for name, facts in known.items()}
    _read(path, tensors, alone=True)
    return tensors


def _known(path: Path) -> dict[str, Any]:
    """What the parts are parts of: shapes and types by name."""
    try:
        return HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error


def _read(path: Path, tensors: Mapping[str, Tensor], *, alone: bool = False) -> None:
    """Each tensor's part of what the folder has under its name, in place."""
    parts = {name: torch.empty(t.shape, dtype=t.dtype) if _scattered(t) else t for name, t in tensors.items()}
    try:
        with _plain_errors():
            load_parts(parts, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=alone)
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    for name, tensor in tensors.items():
        if parts[name] is not tensor:
            assert isinstance(tensor, DTensor)
            tensor.copy_(distribute_tensor(parts[name], tensor.device_mesh, tensor.placements, src_data_rank=None))


def latest(run: Path) -> Path | None:
    """The newest checkpoint that is whole; None if there never was one.

    Each one that is damaged costs a line. Raises ``CheckpointError`` if all are.
    """
    return _first(run, _committed(run))


def best(run: Path) -> Path | None:
    """The whole checkpoint of the lowest score, the earliest of equals; None if none has one."""
    return _first(run, _by_score(_committed(run)))


def _first(run: Path, paths: list[Path]) -> Path | None:
    """The first of these that is whole."""
    causes: list[str] = []
    for path in paths:
        try:
            for name, facts in read_commit(path).files.items():
                facts.check(path / name, COMMIT)
        except CheckpointError as error:
            causes.append(str(error))
            continue
        for cause in causes:
            logger.warning("WARNING: a damaged checkpoint is passed over for %s: %s", path.name, cause)
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


def _by_score(paths: list[Path]) -> list[Path]:
    """Those that have a score, the lowest first, then the earliest."""
    scored = list[tuple[float, int, Path]]()
    for path in paths:
        with suppress(CheckpointError):
            if (score := read_commit(path).score) is not None:
                scored.append((score, _serial(path), path))
    return [path for *_, path in sorted(scored)]


def read_commit(path: Path) -> Commit:
    """The marker, which is what it says it is."""
    document = read_json(path / COMMIT)
    body = document.get("commit")
    if document.get("sha256") != hashlib.sha256(json_bytes(body)).hexdigest():
        raise CheckpointError(f"{path / COMMIT}: does not match its own sha256: damaged or changed")
    try:
        return Commit.model_validate_json(json_bytes(body))
    except ValidationError as error:
        raise CheckpointError(f"{path / COMMIT}: {problems(error)}") from error
