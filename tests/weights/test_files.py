"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from faults.disk import die_at

from whisper_moe.weights.files import atomic_file, atomic_folder


def write_file(path: Path, content: str) -> None:
    with atomic_file(path) as scratch:
        scratch.write_text(content)


def write_folder(path: Path, content: str) -> None:
    with atomic_folder(path, overwrite=True) as scratch:
        (scratch / "a").write_text(content)
        (scratch / "b").mkdir()
        (scratch / "b/c").write_text(content)


def content(path: Path) -> set[str]:
    """What its files hold, each once."""
    return {file.read_text() for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()}


@pytest.mark.parametrize("write", [write_file, write_folder])
@pytest.mark.parametrize("exists", [True, False])
def test_whoever_is_killed_leaves_the_old_or_the_new(
    write: Callable[[Path, str], None], exists: bool, tmp_path: Path
) -> None:
    found = []
    for call in range(60):
        path = tmp_path / str(call) / "x"
        path.parent.mkdir()
        if exists:
            write(path, "old")
        died = die_at(lambda path=path: write(path, "new"), call) == 9
        found.append(content(path) if path.exists() else set())
        if not died:
            break
    else:
        pytest.fail("it never got through")
    before = {"old"} if exists else set[str]()
    assert found == [before] * found.index({"new"}) + [{"new"}] * (len(found) - found.index({"new"}))
    assert before in found and len(found) >= 4


@pytest.mark.parametrize("write", [write_file, write_folder])
def test_everything_is_on_the_disk_before_the_name_changes(
    write: Callable[[Path, str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[int | str] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: happened.append(os.fstat(descriptor).st_ino))
    for name, change in (("rename", os.rename), ("replace", os.replace)):
        monkeypatch.setattr(os, name, lambda a, b, change=change: (happened.append("named"), change(a, b)))
    write(tmp_path / "x", "new")
    before, after = happened[: happened.index("named")], happened[happened.index("named") + 1 :]
    assert set(before) == {path.stat().st_ino for path in tmp_path.rglob("*")}
    assert after == [tmp_path.stat().st_ino]


@pytest.mark.parametrize("write", [write_file, write_folder])
def test_an_error_leaves_the_old_and_no_litter(
    write: Callable[[Path, str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "x", "old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "x", "new")
    assert content(tmp_path / "x") == {"old"} and [path.name for path in tmp_path.iterdir()] == ["x"]


def test_an_error_names_the_file_that_was_asked_for(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing/x'"):
        write_file(tmp_path / "missing/x", "new")


def test_new_files_and_folders_have_the_usual_permissions(tmp_path: Path) -> None:
    write_file(tmp_path / "file", "new")
    write_folder(tmp_path / "folder", "new")
    (tmp_path / "usual").touch()
    (tmp_path / "usual folder").mkdir()
    for ours, usual in (("file", "usual"), ("folder", "usual folder")):
        assert (tmp_path / ours).stat().st_mode == (tmp_path / usual).stat().st_mode


def test_a_name_may_be_as_long_as_can_be(tmp_path: Path) -> None:
    write_file(tmp_path / ("x" * 255), "new")
    write_folder(tmp_path / ("y" * 255), "new")


def test_without_an_atomic_exchange_folders_still_change_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "x", "old")
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    write_folder(tmp_path / "x", "new")
    assert content(tmp_path / "x") == {"new"} and [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_folder_that_cannot_change_places_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    rename, calls = os.rename, list[str]()

    def failing(old: str, new: str) -> None:
        calls.append(new)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        rename(old, new)

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("old")
    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="Input/output"), atomic_folder(tmp_path / "model", overwrite=True) as scratch:
        (scratch / "weights").write_text("new")
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["model", "model/weights"]
    assert (tmp_path / "model" / "weights").read_text() == "old"


@pytest.mark.parametrize("write", [write_file, write_folder])
def test_where_folders_cannot_be_opened_files_are_still_put_on_the_disk(
    write: Callable[[Path, str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows, where a file is flushed only by who may write to it, and there is no libc by that name."""
    opened, synced, really = dict[int, int](), list[int](), os.open

    def refusing(path: Path, flags: int) -> int:
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        descriptor = really(path, flags)
        opened[descriptor] = flags
        return descriptor

    def no_library(_: None) -> None:
        raise TypeError("argument of type 'NoneType' is not iterable")

    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(shutil, "_use_fd_functions", False)
    monkeypatch.setattr(os, "open", refusing)
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(opened[descriptor] & os.O_RDWR))
    monkeypatch.setattr(ctypes, "CDLL", no_library)
    for text in ("old", "new"):
        write(tmp_path / "x", text)
    monkeypatch.undo()
    assert content(tmp_path / "x") == {"new"} and [path.name for path in tmp_path.iterdir()] == ["x"]
    assert synced and all(synced)


def test_what_exists_is_refused_unless_asked(tmp_path: Path) -> None:
    write_folder(tmp_path / "x", "old")
    with pytest.raises(ValueError, match="x: exists already; name another"), atomic_folder(tmp_path / "x"):
        pass
    write_file(tmp_path / "file", "old")
    with pytest.raises(ValueError, match="file: exists already and is not a directory"):
        write_folder(tmp_path / "file", "new")
    assert content(tmp_path) == {"old"}
