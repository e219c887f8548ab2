"""Reading files that strangers made, and writing folders that appear whole or not at all.

Everything here refuses by raising :class:`CheckpointError`, whose message begins with the file's name.
"""

from __future__ import annotations

import ctypes
import errno
import json
import math
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_MOST_BYTES = 64_000_000


class CheckpointError(ValueError):
    """A model's file cannot be used. The message names the file, the cause and, where there is one, the remedy."""


def listed(names: Iterable[object], limit: int = 5) -> str:
    """The first names, and how many more there are."""
    known = [str(name) for name in names]
    more = f" and {len(known) - limit} more" if len(known) > limit else ""
    return ", ".join(known[:limit]) + more


def regular_size(path: Path) -> int:
    """Bytes of a file. Refuses, where a link ends too, what is none: a device or a pipe could be read for ever."""
    try:
        status = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path}: not a regular file")
    return status.st_size


def read_bytes(path: Path) -> bytes:
    """A file beside the weights: JSON, of a few megabytes at most."""
    if (size := regular_size(path)) > _MOST_BYTES:
        raise CheckpointError(f"{path}: has {size:,} bytes; no such file is larger than {_MOST_BYTES:,}")
    try:
        with path.open("rb") as file:
            return file.read(_MOST_BYTES)  # a bound also for files whose size is not known beforehand, as in /proc
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object."""
    try:
        value = json.loads(read_bytes(path))
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, holds {type(value).__name__}")
    return value


def json_bytes(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def inside(directory: Path, name: object, source: Path) -> Path:
    """The file called ``name`` (slashes allowed) under ``directory``, where ``source`` lists it.

    Refuses absolute names and names that climb out. A symbolic link is followed: the Hub's cache is made of them, and
    what it leads to is still parsed as safetensors or JSON only (and, in our checkpoints, must match its sha256).
    """
    parts = name.split("/") if isinstance(name, str) else []
    if not parts or any(part in ("", ".", "..") or re.search(r"[\\:\x00-\x1f]", part) for part in parts):
        raise CheckpointError(f"{source}: lists {name!r}, which is not the name of a file in its own folder")
    return directory.joinpath(*parts)


def open_tensors(path: Path) -> Any:
    """A safetensors file, mapped for lazy reading (``safe_open``); its header is checked against its length."""
    if path.exists():
        regular_size(path)
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        cause = "no such file" if isinstance(error, FileNotFoundError) else f"not a whole safetensors file ({error})"
        raise CheckpointError(f"{path}: {cause}") from error


class TensorFiles(Mapping[str, Tensor]):
    """The tensors of safetensors files, each read when it is asked for, so that a large model is held once."""

    def __init__(self, paths: Iterable[Path]) -> None:
        files = [open_tensors(path) for path in paths]
        self._where = {key: file for file in files for key in file.keys()}  # noqa: SIM118 (no mapping)

    def __getitem__(self, key: str) -> Tensor:
        return self._where[key].get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite; one pass, no copy."""
    if not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)
    return math.isfinite(low.item()) and math.isfinite(high.item())


@contextmanager
def new_folder(directory: Path) -> Iterator[Path]:
    """A new folder beside ``directory`` that takes its name once the block has ended without an error.

    Everything is on the disk before the name changes. An old folder of that name is swapped out in the same step where
    the system can do that (Linux), so that whoever is interrupted leaves either the old folder or the new one, whole.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = directory.with_name(f".{directory.name}.{secrets.token_hex(4)}")
    scratch.mkdir()
    try:
        yield scratch
        for path in (*scratch.rglob("*"), scratch):
            sync(path)
        if directory.exists():
            _swap(scratch, directory)
        else:
            os.rename(scratch, directory)
        sync(directory.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def sync(path: Path) -> None:
    """A file's content, or the names in a folder, are on the disk only then."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _swap(new: Path, old: Path) -> None:
    """Exchange the names of two folders: in one step where that exists, in three renames elsewhere."""
    if _exchange(new, old):
        return
    aside = new.with_name(new.name + ".old")
    os.rename(old, aside)
    os.rename(new, old)
    os.rename(aside, new)


def _exchange(a: Path, b: Path) -> bool:
    """Linux's renameat2(RENAME_EXCHANGE). False where the system or the file system has none."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if libc.renameat2(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(b))
