"""A disk that fails on demand: the process dies, the power goes or the disk is full at the k-th call to the system.

:class:`FailingDisk` wraps the calls of :mod:`os` that change a file system, and files that are opened to be written. When the
power goes, what nobody had put on the disk with fsync is lost: the data of files, and the names of files and folders (made,
renamed, removed).
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import pytest

Loss = Literal["nothing", "data", "data and names"]
"""What a failure takes with it: nothing (the process was killed), or what was not on the disk (the power went)."""
SURVIVED = 77
_CALLS = ("open", "mkdir", "fsync", "rename", "replace", "unlink", "rmdir")


class _File(io.FileIO):
    """A new file, each write to which is a call of a disk."""

    disk: FailingDisk

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.disk.write(Path(str(self.name)), view, super().write)
        return len(view)


class FailingDisk:
    """Counts calls; before the one numbered ``at`` (from 0) it calls ``fail``, in the middle of it if it is ``torn``."""

    def __init__(self, at: int | None = None, fail: Callable[[], object] | None = None, torn: bool = False) -> None:
        self.at, self.fail, self.torn = at, fail, torn
        self.calls: list[str] = []
        self.files: dict[int, Path] = {}
        self.unsynced_data: dict[Path, int] = {}
        """File → how much of it is on the disk."""
        self.unsynced_names: list[tuple[str, Path, Path | bytes | None]] = []
        """(made, name, None), (renamed, new name, old name) or (removed, name, content), in this order."""
        self.overwritten: dict[Path, bytes] = {}
        """File → what it was before another took its name."""
        self.real: dict[str, Any] = {name: getattr(os, name) for name in _CALLS}
        self.io_open = io.open

    def install(self, patch: pytest.MonkeyPatch) -> FailingDisk:
        for name in _CALLS:
            patch.setattr(os, name, getattr(self, name))
        patch.setattr(io, "open", self.open_file)
        return self

    def _count(self, call: str) -> bool:
        """Whether this call is the one that fails half-way."""
        number = len(self.calls)
        self.calls.append(call)
        if number == self.at and not self.torn and self.fail:
            self.fail()
        return number == self.at and self.torn

    def open_file(self, path: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        """What :meth:`pathlib.Path.open` calls."""
        if not set(mode) & set("wx"):
            return self.io_open(path, mode, *args, **options)
        self._count("open")
        file = _File(str(path), mode.replace("b", "").replace("t", ""))
        file.disk = self
        self.files[file.fileno()] = Path(path)
        self.unsynced_data[Path(path)] = 0
        self.unsynced_names.append(("made", Path(path), None))
        return file if "b" in mode else io.TextIOWrapper(io.BufferedWriter(file), "utf-8")

    def write(self, path: Path, data: memoryview, write: Callable[[Any], Any]) -> None:
        torn = self._count("write")
        if torn and self.fail:
            write(data[: len(data) // 2])
            self.fail()
        write(data)

    def open(self, path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        descriptor = self.real["open"](path, flags, *args, **kwargs)
        self.files[descriptor] = Path(path)
        return descriptor

    def mkdir(self, path: Any, *args: Any, **kwargs: Any) -> None:
        if not Path(path).is_dir():  # else it only says so
            self._count("mkdir")
        self.real["mkdir"](path, *args, **kwargs)
        self.unsynced_names.append(("made", Path(path), None))

    def fsync(self, descriptor: int) -> None:
        self._count("fsync")
        self.real["fsync"](descriptor)
        path = self.files[descriptor]
        self.unsynced_data.pop(path, None)
        self.unsynced_names = [change for change in self.unsynced_names if change[1].parent != path]

    def rename(self, old: Any, new: Any, call: str = "rename") -> None:
        self._count(call)
        if Path(new).is_file():
            self.overwritten[Path(new)] = Path(new).read_bytes()
        self.real["rename"](old, new)
        self._follow(Path(old), Path(new))
        self.unsynced_names.append(("renamed", Path(new), Path(old)))

    def replace(self, old: Any, new: Any) -> None:
        self.rename(old, new, "replace")

    def unlink(self, path: Any, *, dir_fd: int | None = None) -> None:
        self._count("unlink")
        whole = Path(path) if dir_fd is None else self.files[dir_fd] / path
        self.unsynced_names.append(("removed", whole, whole.read_bytes()))
        self.real["unlink"](path, dir_fd=dir_fd)

    def rmdir(self, path: Any, *, dir_fd: int | None = None) -> None:
        """Not undone when the power goes: what was in the folder makes it again."""
        self._count("rmdir")
        self.real["rmdir"](path, dir_fd=dir_fd)

    def _follow(self, old: Path, new: Path) -> None:
        """Everything under ``old`` is under ``new`` now."""

        def moved(path: Any) -> Any:
            return new / path.relative_to(old) if isinstance(path, Path) and path.is_relative_to(old) else path

        self.files = {key: moved(path) for key, path in self.files.items()}
        self.unsynced_data = {moved(path): size for path, size in self.unsynced_data.items()}
        self.unsynced_names = [(kind, moved(path), moved(other)) for kind, path, other in self.unsynced_names]

    def lose(self, loss: Loss) -> None:
        """Make the file system what it is after the failure."""
        if loss == "nothing":
            return
        for path, size in self.unsynced_data.items():
            with suppress(FileNotFoundError):
                os.truncate(path, size)
        while loss == "data and names" and self.unsynced_names:
            kind, path, other = self.unsynced_names.pop()
            if kind == "made":
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            elif kind == "renamed" and path.exists():
                assert isinstance(other, Path)
                self.real["rename"](path, other)
                self._follow(path, other)
                if path in self.overwritten:
                    path.write_bytes(self.overwritten.pop(path))
            elif kind == "removed":
                assert isinstance(other, bytes)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(other)


def die_at(act: Callable[[], object], at: int, loss: Loss = "nothing", torn: bool = False) -> int:
    """Run ``act`` in a child that dies before (or half-way through) call ``at``; its exit status, SURVIVED if it ended.

    The power goes at that very moment, or after the end of ``act``.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        disk = FailingDisk(at, torn=torn)
        with pytest.MonkeyPatch.context() as patch:

            def die() -> None:
                patch.undo()
                disk.lose(loss)
                os._exit(9)

            disk.fail = die
            disk.install(patch)
            act()
        disk.lose(loss)
        status = SURVIVED
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)
