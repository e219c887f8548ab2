"""Reading files that strangers made, and writing files and folders that appear whole or not at all.

What cannot be read is refused by a :class:`CheckpointError`, whose message begins with the file's name.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pydantic import Field
from safetensors import SafetensorError, safe_open

from whisper_moe.config import Strict

_MOST_BYTES = 64_000_000


class CheckpointError(ValueError):
    """A model's file cannot be used. The message names the file, the cause and, where there is one, the remedy."""


def listed(names: Iterable[object], limit: int = 5) -> str:
    """The first names, and how many more there are."""
    known = [str(name) for name in names]
    more = f" and {len(known) - limit} more" if len(known) > limit else ""
    return ", ".join(known[:limit]) + more


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error


def regular_size(path: Path) -> int:
    """Bytes of a file. Refuses, where a link ends too, what is none: a device or a pipe could be read for ever."""
    with _reading(path):
        status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path}: not a regular file")
    return status.st_size


def read_bytes(path: Path) -> bytes:
    """A file beside the weights: JSON, of a few megabytes at most."""
    if (size := regular_size(path)) > _MOST_BYTES:
        raise CheckpointError(f"{path}: has {size:,} bytes; no such file is larger than {_MOST_BYTES:,}")
    with _reading(path), path.open("rb") as file:
        return file.read(_MOST_BYTES)  # a bound also for files whose size is not known beforehand, as in /proc


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object."""
    content = read_bytes(path)
    try:
        value = json.loads(content)
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
    regular_size(path)
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error})") from error


def read_index(path: Path) -> dict[str, str]:
    """Tensor → name of its file, of an index beside the files that it lists."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{path}: has no weight_map")
    for name in weight_map.values():
        inside(path.parent, name, path)
    return weight_map


class FileFacts(Strict):
    """Size and checksum of a file, as a list of files has them."""

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")

    @classmethod
    def of(cls, path: Path) -> FileFacts:
        with _reading(path), path.open("rb") as file:
            return cls(bytes=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())

    def check_size(self, path: Path, origin: str) -> None:
        """``origin``: the list."""
        if (size := regular_size(path)) != self.bytes:
            raise CheckpointError(f"{path}: has {size} bytes, {origin} says {self.bytes}: incomplete or changed")

    def check(self, path: Path, origin: str) -> None:
        self.check_size(path, origin)
        if FileFacts.of(path) != self:
            raise CheckpointError(f"{path}: sha256 differs from {origin}'s: damaged or changed")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """The path of a new file in the same folder. It takes its name, and an older one's place, if the block ends without an error.

    Its content is on the disk before its name changes: a name always stands for the old file or the new one, whole.
    """
    # Not tempfile: its files are private to the user. A short name: the one that is asked for may be as long as can be.
    scratch = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        yield scratch
        sync(scratch)
        os.replace(scratch, path)
        sync(path.parent)
    except BaseException as error:
        with suppress(OSError):
            scratch.unlink()
        if isinstance(error, OSError) and error.errno is not None:
            error.filename, error.filename2 = str(path), None  # the one that was asked for
        raise


@contextmanager
def atomic_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """The path of a new folder beside ``path``. It takes its name if the block ends without an error.

    Everything is on the disk before the name changes. With ``overwrite``, an old folder is exchanged for the new one in one
    step where the system can do that (Linux). Raises ``ValueError`` for one that exists without it, and for a file.
    """
    check_free(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{secrets.token_hex(8)}.tmp")
    scratch.mkdir()
    try:
        yield scratch
        for written in (*scratch.rglob("*"), scratch):
            sync(written)
        _exchange(scratch, path) if path.exists() else os.rename(scratch, path)
        sync(path.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def check_free(path: Path, overwrite: bool) -> None:
    """Raises ``ValueError`` where a folder cannot take this path."""
    if path.exists() and not (overwrite and path.is_dir()):
        raise ValueError(f"{path}: exists already{' and is not a directory' if overwrite else '; name another one'}")


def try_folder(directory: Path) -> None:
    """The folder is made, and tried: a disk that refuses is better known before the work than after it. Raises ``ValueError``."""
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory}: is a file; -o needs a folder")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        raise ValueError(f"{directory}: cannot be written to: {error.strerror}") from error


def sync(path: Path) -> None:
    """A file's content, or the names in a folder, are on the disk only then. Windows has no such thing for folders."""
    windows = sys.platform == "win32"
    if windows and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(new: Path, old: Path) -> None:
    """Swap the names of two folders: by renameat2(RENAME_EXCHANGE) where system and file system have it, else in three steps."""
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "renameat2") and not libc.renameat2(here, os.fsencode(new), here, os.fsencode(old), exchange):
        return
    aside = new.with_suffix(".old")
    os.rename(old, aside)
    try:
        os.rename(new, old)
    except OSError:
        os.rename(aside, old)
        raise
    os.rename(aside, new)
