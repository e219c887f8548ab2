"""Checkpoints of which every rank writes its own part (torch.distributed.checkpoint), for models too large to gather.

    FOLDER/shard-00001-model-….safetensors   the parts of one rank, each with its place in the whole
    FOLDER/state.json                        everything that is no tensor

Parts are found by their place, so that any number of ranks in any layout reads what any other wrote. There is no pickle:
parts are safetensors. The folder is written under a hidden name and renamed when it is whole.

A run's own checkpoints (:mod:`whisper_moe.train.checkpoint`) are whole files that rank 0 writes; take these where a model
with its moments does not fit into one machine's memory.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.optim import Optimizer

from whisper_moe.train.state import join, load_optimizer_state, optimizer_state, split
from whisper_moe.weights.files import CheckpointError, json_bytes, listed, read_json

STATE = "state.json"
_NEW = ".new-"


def save_sharded(folder: Path, model: nn.Module, optimizer: Optimizer, meta: Mapping[str, Any]) -> None:
    """Write the model, its optimizer and ``meta`` (plain JSON); every rank calls it, ``folder`` is on a disk of all.

    Raises ``FileExistsError`` if the folder is there.
    """
    if folder.exists():
        raise FileExistsError(f"{folder}: is there already; a checkpoint is never overwritten")
    tensors, tree = split(optimizer_state(optimizer, model.named_parameters()), "optimizer")
    tensors |= {f"model/{name}": tensor.detach() for name, tensor in model.state_dict().items()}
    scalars = {name: tensor.item() for name, tensor in tensors.items() if not tensor.ndim}
    scratch = folder.with_name(_NEW + folder.name)
    if _first():
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
    _wait()
    parts = {name: _placeable(tensor) for name, tensor in tensors.items() if tensor.ndim}
    with _quietly():
        save(parts, storage_writer=HuggingFaceStorageWriter(str(scratch), save_distributed=True))
    _wait()
    if _first():
        state = {"meta": dict(meta), "optimizer": tree, "scalars": scalars}
        with open(scratch / STATE, "wb") as file:
            file.write(json_bytes(state))
            file.flush()
            os.fsync(file.fileno())
        os.rename(scratch, folder)
    _wait()


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


def _read(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Each tensor's part of what the folder has under its name, in place."""
    reader = HuggingFaceStorageReader(str(folder))
    known = {name: tuple(facts.size) for name, facts in reader.read_metadata().state_dict_metadata.items()}  # pyright: ignore[reportAttributeAccessIssue]
    if missing := sorted(set(tensors) - set(known)):
        raise CheckpointError(f"{folder}: lacks {listed(missing)}")
    for name, tensor in tensors.items():
        if known[name] != tuple(tensor.shape):
            raise CheckpointError(
                f"{folder}: {name} has the shape {list(known[name])}, the model's is {list(tensor.shape)}"
            )
    parts = {name: _placeable(tensor, filled=False) for name, tensor in tensors.items()}
    try:
        with _quietly():
            load(parts, storage_reader=HuggingFaceStorageReader(str(folder)))
    except CheckpointException as error:
        causes = {rank: str(failure[0]) for rank, failure in error.failures.items()}
        raise CheckpointError(f"{folder}: cannot be read ({json.dumps(causes)})") from error
    for name, tensor in tensors.items():
        if parts[name] is not tensor:
            assert isinstance(tensor, DTensor)
            tensor.copy_(distribute_tensor(parts[name], tensor.device_mesh, tensor.placements, src_data_rank=None))


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


def _first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _wait() -> None:
    if dist.is_initialized():
        dist.barrier()
