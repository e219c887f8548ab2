"""Checkpoints of which every rank writes its own part (torch.distributed.checkpoint), for models too large to gather.

    RUN/checkpoints/0003-step-00000150/
        shard-00001-model-….safetensors   the parts of one rank, each with its place in the whole
        state.json  COMMIT.json           as in any checkpoint of a run (:mod:`whisper_moe.train.checkpoint`)

Parts are found by their place, so that any number of ranks in any layout reads what any other wrote. There is no pickle:
parts are safetensors. Rank 0 commits them once all are written.
"""

from __future__ import annotations

import errno
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.optim import Optimizer

from whisper_moe.train.checkpoint import STATE, committing
from whisper_moe.train.state import join, load_optimizer_state, optimizer_state, split
from whisper_moe.weights.files import CheckpointError, FileFacts, listed, read_json, sync

T = TypeVar("T")


def save_sharded(
    run: Path, step: int, model: nn.Module, optimizer: Optimizer, meta: Mapping[str, Any], *, keep: int
) -> None:
    """As :func:`whisper_moe.train.checkpoint.save`; every rank calls it, and ``run`` is on a disk of all."""
    tensors, tree = split(optimizer_state(optimizer, model.named_parameters()), "optimizer")
    tensors |= {f"model/{name}": tensor.detach() for name, tensor in model.state_dict().items()}
    scalars = {name: tensor.item() for name, tensor in tensors.items() if not tensor.ndim}
    state = {"meta": dict(meta), "optimizer": tree, "scalars": scalars}
    parts = {name: _placeable(tensor) for name, tensor in tensors.items() if tensor.ndim}
    with _committing(run, step, state, keep) as (folder, files):
        try:
            with _quietly():
                save(parts, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
        except CheckpointException as error:
            raise OSError(errno.EIO, _causes(error)) from error
        for facts in _gathered(_written(folder)):
            files.update(facts)
    _gathered(None)  # nobody goes on before it is committed


@contextmanager
def _committing(
    run: Path, step: int, state: Mapping[str, Any], keep: int
) -> Iterator[tuple[Path, dict[str, FileFacts]]]:
    """Rank 0's folder, for all."""
    if dist.is_initialized() and dist.get_rank():
        yield Path(_gathered("")[0]), {}
        return
    with committing(run, step, state, keep=keep) as (folder, files):
        _gathered(str(folder))
        yield folder, files


def _written(folder: Path) -> dict[str, FileFacts]:
    """What this rank has written, which is on the disk then."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    facts: dict[str, FileFacts] = {}
    for path in folder.glob(f"shard-{rank + 1:05d}-*"):
        sync(path)
        facts[path.name] = FileFacts.of(path)
    return facts


def load_sharded(folder: Path, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Fill the model and its optimizer, in whatever layout they are; returns ``meta``. Every rank calls it.

    Raises ``CheckpointError`` that names what is missing or does not fit.
    """
    state = read_json(folder / STATE)
    parameters = dict(model.named_parameters())
    wanted = {f"model/{name}": tensor.detach() for name, tensor in model.state_dict().items()}
    moments = {
        f"optimizer/state/{name}/{key}": torch.zeros_like(parameters[name].detach())
        for name, values in state["optimizer"]["state"].items()
        if name in parameters
        for key in values
        if f"optimizer/state/{name}/{key}" not in state["scalars"]
    }
    _read(folder, wanted | moments)
    scalars = {name: torch.tensor(value, dtype=torch.float32) for name, value in state["scalars"].items()}
    try:
        load_optimizer_state(optimizer, parameters.items(), join(state["optimizer"], moments | scalars))
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    return state["meta"]


def whole_model(folder: Path) -> dict[str, Tensor]:
    """The model's tensors by name, for one process, which no other waits for."""
    prefix, known = "model/", _known(folder)
    tensors = {
        name: torch.empty(facts.size, dtype=facts.properties.dtype)
        for name, facts in known.items()
        if name.startswith(prefix)
    }
    _load(folder, tensors, alone=True)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _known(folder: Path) -> dict[str, TensorStorageMetadata]:
    """What the parts are parts of."""
    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: facts for name, facts in found.items() if isinstance(facts, TensorStorageMetadata)}


def _read(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Each tensor's part of what the folder has under its name, in place."""
    known = {name: tuple(facts.size) for name, facts in _known(folder).items()}
    if missing := sorted(set(tensors) - set(known)):
        raise CheckpointError(f"{folder}: lacks {listed(missing)}")
    for name, tensor in tensors.items():
        if known[name] != tuple(tensor.shape):
            raise CheckpointError(
                f"{folder}: {name} has the shape {list(known[name])}, the model's is {list(tensor.shape)}"
            )
    parts = {name: _placeable(tensor, filled=False) for name, tensor in tensors.items()}
    _load(folder, parts)
    for name, tensor in tensors.items():
        if parts[name] is not tensor:
            assert isinstance(tensor, DTensor)
            tensor.copy_(distribute_tensor(parts[name], tensor.device_mesh, tensor.placements, src_data_rank=None))


def _load(folder: Path, parts: dict[str, Tensor], *, alone: bool = False) -> None:
    try:
        with _quietly():
            load(parts, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=alone)
    except CheckpointException as error:
        raise CheckpointError(f"{folder}: cannot be read ({_causes(error)})") from error


def _causes(error: CheckpointException) -> str:
    return json.dumps({rank: str(failure[0]) for rank, failure in error.failures.items()})


def _placeable(tensor: Tensor, *, filled: bool = True) -> Tensor:
    """The tensor itself where a rank's part is one block of the whole; else the whole (``filled``, or to be).

    Heads of a fused projection that is cut over ranks lie in several blocks; so does what two directions share out.
    """
    if not isinstance(tensor, DTensor) or all(isinstance(p, (Shard, Replicate)) for p in tensor.placements):
        return tensor
    return tensor.full_tensor() if filled else torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


@contextmanager
def _quietly() -> Iterator[None]:
    """One process alone is meant to be alone; what each warns about does not concern a run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _gathered(own: T) -> list[T]:
    """What each rank has; all wait for each other."""
    if not dist.is_initialized():
        return [own]
    said: list[T] = [own] * dist.get_world_size()
    dist.all_gather_object(said, own)
    return said
