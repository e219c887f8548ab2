"""Spectrograms on disk, so that a sound is decoded in the first epoch only. torch is imported when the first one is read."""

from __future__ import annotations

import io
import os
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING
from zipfile import BadZipFile

import numpy as np

from whisper_moe.data.sample import AudioRef
from whisper_moe.weights.files import atomic_file

if TYPE_CHECKING:
    from filelock import FileLock
    from torch import Tensor


class MelCache:
    """Spectrograms in a folder of at most ``limit_bytes``: a sound is decoded in the first epoch only. The least used go first.

    Many processes may share it. A file appears whole or not at all, under a name that says everything that its content
    depends on; what is damaged (a zip file has checksums) is computed anew. The limit holds at every moment, since whoever
    adds a file counts and makes room under a lock.
    """

    def __init__(self, folder: str | Path, limit_bytes: int) -> None:
        """Make the folder. Raises ``ValueError`` where it cannot be written, or not locked."""
        self._folder, self._limit = Path(folder), limit_bytes
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with self._lock():
                pass
        except (NotImplementedError, OSError) as error:
            raise ValueError(f"cache_dir {str(folder)!r} cannot be used: {error}") from error

    def path(self, audio: AudioRef, *settings: float) -> Path:
        """Where the spectrogram of this very file or these very bytes lies, computed with these settings."""
        name = blake2b(f"{audio.fingerprint()} {settings}".encode(), digest_size=20).hexdigest()
        return self._folder / name[:2] / f"{name[2:]}.mel"

    def get(self, path: Path) -> tuple[Tensor, int] | None:
        """The spectrogram [n_mels, frames] and how many samples of sound it is of; None if it is not there, or damaged."""
        import torch

        try:
            with np.load(path, allow_pickle=False) as content:
                found = torch.from_numpy(content["mel"]), int(content["samples"])
            os.utime(path)
            return found
        except (OSError, ValueError, KeyError, EOFError, BadZipFile):
            return None

    def put(self, path: Path, mel: Tensor, samples: int) -> None:
        """Keep it, if it fits at all. A disk that takes nothing more costs time, not the run."""
        content = io.BytesIO()
        np.savez(content, mel=mel.numpy(), samples=samples)
        size, counter = len(content.getvalue()), self._folder / "bytes"
        if size > self._limit:
            return
        with suppress(OSError), self._lock():
            try:
                used = int(counter.read_text())
            except (FileNotFoundError, ValueError):
                used = self._limit
            if used + size > self._limit:
                used = self._make_room(size)
            path.parent.mkdir(exist_ok=True)
            old = path.stat().st_size if path.exists() else 0  # another process was quicker, or it was damaged
            counter.write_text(str(used + size - old))  # first: one that is killed counts too much, never too little
            with atomic_file(path, durable=False) as scratch:
                scratch.write_bytes(content.getvalue())

    def _make_room(self, wanted: int) -> int:
        """Remove what was not used for longest, until ``wanted`` bytes more fit, and more at a time than that: a folder of many
        files is not listed for every one of them. Returns the bytes that are left.
        """
        for path in self._folder.rglob("*.tmp"):  # of processes that were killed: the others would hold the lock
            path.unlink()
        files = sorted((path.stat().st_mtime, path.stat().st_size, path) for path in self._folder.rglob("*.mel"))
        total = sum(size for _, size, _ in files)
        if total <= self._limit - wanted:
            return total
        goal = max(0, min(self._limit - wanted, round(0.9 * self._limit)))
        for _, size, path in files:
            if total > goal:
                path.unlink()
                total -= size
        return total

    def _lock(self) -> FileLock:
        from filelock import FileLock

        return FileLock(self._folder / "lock")
