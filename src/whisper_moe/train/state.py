"""State of a run as tensors and plain JSON: optimizers by the names of their parameters, random states bit for bit."""

from __future__ import annotations

import base64
import random
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from whisper_moe.weights.files import json_bytes, listed

_MARK = "tensor:"
_MOST_BYTES = 60_000_000


def split(tree: Any, prefix: str) -> tuple[dict[str, Tensor], Any]:
    """Nested dicts, lists and tuples → (tensors by path, the same tree as plain JSON).

    A tensor is called by its path, ``prefix/key/key``; the tree has ``tensor:`` and that name in its place. Tuples
    become lists. Raises ``ValueError`` naming the path of a key or a text that could not be told apart afterwards.
    """
    tensors: dict[str, Tensor] = {}

    def plain(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            if path in tensors:
                raise ValueError(f"{path}: two tensors would have this name")
            tensors[path] = value.detach()
            return _MARK + path
        if isinstance(value, Mapping):
            if wrong := [key for key in value if not isinstance(key, str)]:
                raise ValueError(f"{path} has the key {wrong[0]!r}; JSON has only text for keys")
            return {key: plain(inner, f"{path}/{key}") for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(inner, f"{path}/{index}") for index, inner in enumerate(value)]
        if isinstance(value, str) and value.startswith(_MARK):
            raise ValueError(f"{path} is the text {value!r}, which stands for a tensor")
        return value

    return tensors, plain(tree, prefix)


def join(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What :func:`split` was given, but for tuples. Raises ``ValueError`` for a tensor that is not there."""
    if isinstance(tree, dict):
        return {key: join(value, tensors) for key, value in tree.items()}
    if isinstance(tree, list):
        return [join(value, tensors) for value in tree]
    if isinstance(tree, str) and tree.startswith(_MARK):
        name = tree.removeprefix(_MARK)
        if name not in tensors:
            raise ValueError(f"the checkpoint lacks the tensor {name}")
        return tensors[name]
    return tree


def state_bytes(meta: Mapping[str, Any]) -> bytes:
    """As JSON. Raises ``ValueError`` for what JSON cannot hold."""
    _require_plain(dict(meta), "meta")
    data = json_bytes(dict(meta))
    if len(data) > _MOST_BYTES:
        raise ValueError(f"meta has {len(data):,} bytes as JSON, at most {_MOST_BYTES:,} could be read back")
    return data


def _require_plain(value: object, where: str) -> None:
    """JSON would quietly turn the key 1 into "1"."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{where} has the key {key!r}; JSON has only text for keys")
            _require_plain(inner, f"{where}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            _require_plain(inner, f"{where}[{index}]")
    elif value is not None and not isinstance(value, (str, int, float)):
        raise ValueError(f"{where} is of {type(value).__name__}, which JSON does not have")


def optimizer_state(optimizer: Optimizer, named: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Any]:
    """An optimizer's state with names of parameters in place of indices, for :func:`split`.

    ``named``: the model's ``named_parameters()``. The layout, {"state": {name: …}, "param_groups": [{"params": [name …],
    "lr": …} …]}, is that of ``torch.distributed.checkpoint.state_dict``. Raises ``ValueError`` if the optimizer has a
    parameter without a name.
    """
    names = _names(optimizer, named)
    state = optimizer.state_dict()
    groups = [{**group, "params": [names[i] for i in group["params"]]} for group in state["param_groups"]]
    return {"state": {names[i]: values for i, values in state["state"].items()}, "param_groups": groups}


def load_optimizer_state(
    optimizer: Optimizer, named: Iterable[tuple[str, nn.Parameter]], state: Mapping[str, Any]
) -> None:
    """Put back what :func:`optimizer_state` gave, also where groups or parameters now come in another order.

    Raises ``ValueError`` naming the parameters if the groups are of other parameters than those saved.
    """
    names = _names(optimizer, named)
    saved = {frozenset(group["params"]): group for group in state["param_groups"]}
    current = optimizer.state_dict()["param_groups"]
    groups: list[dict[str, Any]] = []
    for group in current:
        members = [names[i] for i in group["params"]]
        if (found := saved.get(frozenset(members))) is None:
            known = {name for group in state["param_groups"] for name in group["params"]}
            other = sorted(set(members) ^ known) if len(current) == 1 else sorted(set(members) - known) or members
            raise ValueError(f"the checkpoint's optimizer has no group of just these parameters: {listed(other)}")
        # JSON has no tuples: betas are one again if they are one here.
        values = {key: tuple(value) if isinstance(group.get(key), tuple) else value for key, value in found.items()}
        # Whether it is fused is of where it is computed, not of where it was saved.
        own = {key: group[key] for key in ("params", "fused") if key in group}
        groups.append({**group, **values, **own})
    if len(groups) != len(saved):
        raise ValueError(f"the checkpoint's optimizer has {len(saved)} parameter groups, this one has {len(groups)}")
    by_index = {i: state["state"][name] for i, name in names.items() if name in state["state"]}
    optimizer.load_state_dict({"state": by_index, "param_groups": groups})


def _names(optimizer: Optimizer, named: Iterable[tuple[str, nn.Parameter]]) -> dict[int, str]:
    """Index of a parameter, as the optimizer's own state dict counts them → its name."""
    by_identity = {id(parameter): name for name, parameter in named}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if unknown := [i for i, parameter in enumerate(parameters) if id(parameter) not in by_identity]:
        shapes = listed(list(parameters[i].shape) for i in unknown)
        raise ValueError(f"the optimizer has parameters that the model does not name, of shape {shapes}")
    return {i: by_identity[id(parameter)] for i, parameter in enumerate(parameters)}


def random_state() -> dict[str, Any]:
    """The states of the global generators of torch, numpy and Python, and of the current GPU's if it is in use."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002 (the global one is meant)
    version, internal, gauss_next = random.getstate()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return {
        "torch": _text(torch.get_rng_state()),
        "cuda": None if cuda is None else _text(cuda),
        "numpy": {"kind": kind, "keys": [int(key) for key in keys], "position": int(position),
                  "has_gauss": int(has_gauss), "gauss": float(gauss)},
        "python": [version, list(internal), gauss_next],
    }  # fmt: skip


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put back what :func:`random_state` gave. A GPU's state has no use on a machine without one and is left out there."""
    torch.set_rng_state(_bytes(state["torch"]))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(state["cuda"]))
    numpy = state["numpy"]
    keys = np.array(numpy["keys"], dtype=np.uint32)
    np.random.set_state((numpy["kind"], keys, numpy["position"], numpy["has_gauss"], numpy["gauss"]))  # noqa: NPY002
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))


def _text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
