"""Spectrograms on disk, so that a sound is decoded in the first epoch only; the least recently used go first.

Many processes may share the folder. A file appears whole or not at all, under a name that says everything that its
content depends on, and carries a checksum: what is damaged is computed anew. The limit holds at every moment, since
whoever adds a file counts and makes room under a lock.
"""

from __future__ import annotations

import os
import secrets
import struct
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from whisper_moe.data.sample import Sample

if TYPE_CHECKING:
    from torch import Tensor

_HEADER = struct.Struct("<8sIIIQ")
"""Magic, CRC-32 of all after it, bands, frames, samples of sound."""
_MAGIC = b"wmoemel1"
_CHECKED_FROM = 12
_ROOM_TO_MAKE = 0.1
"""Of the limit, at a time: a folder of many files is not listed for every one of them."""
_ABANDONED_SECONDS = 3600.0


class MelCache:
    """A folder of at most ``limit_bytes``."""

    def __init__(self, folder: str | Path, limit_bytes: int) -> None:
        """Make the folder. Raises ``ValueError`` where it cannot be written, and on systems without file locks."""
        self._folder, self._limit = Path(folder), limit_bytes
        try:
            import fcntl  # noqa: F401

            self._folder.mkdir(parents=True, exist_ok=True)
            with self._locked():
                pass
        except (ImportError, OSError) as error:
            raise ValueError(f"cache_dir {str(folder)!r} cannot be used: {error}") from error

    @staticmethod
    def key(sample: Sample, n_mels: int, margin: float, limit: int) -> str:
        """A name for the spectrogram of this very file or these very bytes, with so much silence."""
        audio = sample.audio
        assert audio is not None
        digest = blake2b(f"{n_mels} {margin} {limit} {audio.start} {audio.end} ".encode(), digest_size=20)
        if audio.data is not None:
            digest.update(audio.data)
        else:
            digest.update(f"{audio.path} ".encode())
            with suppress(OSError):  # a file that is not there is named when it is read
                status = os.stat(audio.path or "")
                digest.update(f"{status.st_size} {status.st_mtime_ns}".encode())
        return digest.hexdigest()

    def get(self, key: str) -> tuple[Tensor, int] | None:
        """The spectrogram [n_mels, frames] and how many samples of sound it is of; None if it is not there, or damaged."""
        import torch

        path = self._path(key)
        try:
            content = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        if len(content) < _HEADER.size:
            return None
        magic, crc, n_mels, frames, samples = _HEADER.unpack_from(content)
        whole = len(content) == _HEADER.size + 4 * n_mels * frames
        if magic != _MAGIC or not whole or zlib.crc32(content[_CHECKED_FROM:]) != crc:
            return None
        values = np.frombuffer(content, "<f4", offset=_HEADER.size).reshape(n_mels, frames)
        return torch.from_numpy(values.astype(np.float32)), samples

    def put(self, key: str, mel: Tensor, samples: int) -> None:
        """Keep it, if it fits at all. A disk that takes nothing more costs time, not the run."""
        n_mels, frames = mel.shape
        checked = _HEADER.pack(_MAGIC, 0, n_mels, frames, samples)[_CHECKED_FROM:] + mel.numpy().astype("<f4").tobytes()
        content = _MAGIC + struct.pack("<I", zlib.crc32(checked)) + checked
        if len(content) > self._limit:
            return
        scratch = self._folder / f".{secrets.token_hex(8)}.tmp"
        try:
            scratch.write_bytes(content)
            with self._locked() as count:
                self._add(scratch, self._path(key), count)
        except OSError:
            scratch.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key[2:]}.mel"

    def _add(self, scratch: Path, path: Path, count: _Count) -> None:
        """Make room, give the file its name, and count it; under the lock."""
        size = scratch.stat().st_size
        if count.bytes is None or count.bytes + size > self._limit:
            count.bytes = self._make_room(size)
        path.parent.mkdir(exist_ok=True)
        with suppress(FileNotFoundError):  # another process was quicker, or this one was damaged
            count.bytes -= path.stat().st_size
        count.bytes += size  # first: who is killed between the two has counted too much, never too little
        count.write()
        os.replace(scratch, path)

    def _make_room(self, wanted: int) -> int:
        """Remove what was not used for longest, until ``wanted`` bytes more fit; returns the bytes that are left."""
        files: list[tuple[float, int, Path]] = []
        for path in self._folder.rglob("*"):
            with suppress(FileNotFoundError):
                status = path.stat()
                if path.suffix == ".mel":
                    files.append((status.st_mtime, status.st_size, path))
                elif path.suffix == ".tmp" and time.time() - status.st_mtime > _ABANDONED_SECONDS:
                    path.unlink()
        total = sum(size for _, size, _ in files)
        goal = self._limit - wanted
        if total > goal:
            goal = max(0, min(goal, round((1 - _ROOM_TO_MAKE) * self._limit)))
            for _, size, path in sorted(files):
                if total <= goal:
                    break
                path.unlink(missing_ok=True)
                total -= size
        return total

    @contextmanager
    def _locked(self) -> Iterator[_Count]:
        """The only process that adds or removes; it gets the count that the one before it left."""
        import fcntl

        descriptor = os.open(self._folder / "bytes", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield _Count(descriptor)
        finally:
            os.close(descriptor)


class _Count:
    """How many bytes all files have, as a number in a file; None where that is not known."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        text = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
        self.bytes: int | None = int(text) if text.isdigit() else None

    def write(self) -> None:
        os.pwrite(self._descriptor, f"{self.bytes:>20}\n".encode(), 0)
