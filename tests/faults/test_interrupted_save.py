"""A save that is killed, loses power or finds the disk full at any call to the system: the run is whole afterwards."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import get_args

import pytest
import torch
from faults.disk import SURVIVED, FailingDisk, Loss, die_at
from faults.runs import newest
from torch import Tensor

from whisper_moe.train.checkpoint import FOLDER, Loaded, best, clean, latest, note, replace, save


def content(step: int) -> tuple[dict[str, Tensor], dict[str, object]]:
    tensors = {
        "model/weight": torch.full((5, 3), float(step)),
        "model/half": torch.full((3,), step, dtype=torch.bfloat16),
        "optimizer/weight/step": torch.tensor(float(step)),
    }
    return tensors, {"step": step, "metrics": [step / 7] * 3}


def commit(run: Path, step: int, **options: object) -> None:
    tensors, meta = content(step)
    save(run, step, tensors, meta, **{"keep": 1, **options})  # type: ignore[arg-type]


def judge(run: Path, step: int, score: float, keep: int = 1) -> None:
    note(run, step, {"wer": score}, "wer", keep=keep)


def is_whole(loaded: Loaded | None, step: int) -> bool:
    """Whether everything is of this one step."""
    tensors, meta = content(step)
    return (
        loaded is not None
        and loaded.meta == meta
        and loaded.step == step
        and loaded.tensors.keys() == tensors.keys()
        and all(torch.equal(loaded.tensors[key], tensor) for key, tensor in tensors.items())
    )


def nothing_is_damaged(line: str) -> None:
    raise AssertionError(line)


def first(run: Path) -> None:
    """No checkpoint yet."""


def second(run: Path) -> None:
    commit(run, 10)


def after_rubbish(run: Path) -> None:
    """A save and a removal were interrupted before; their remains lie there."""
    commit(run, 5, keep=9)
    commit(run, 10, keep=9)
    folder = run / FOLDER
    shutil.copytree(folder / "0001-step-00000005", folder / ".new-0003-step-00000015-0badc0de")
    shutil.copytree(folder / "0001-step-00000005", folder / "0003-step-00000015")
    (folder / "0003-step-00000015" / "COMMIT.json").unlink()


def with_a_best(run: Path) -> None:
    for step, score in ((5, 0.25), (7, 0.5)):
        commit(run, step, keep=9)
        judge(run, step, score, keep=9)
    commit(run, 10, keep=9)


CASES = [(before, loss) for before in (first, second, after_rubbish, with_a_best) for loss in get_args(Loss)]
QUICK = {(first, "data and names"), *((second, loss) for loss in get_args(Loss))}


@pytest.mark.parametrize(
    ("before", "loss"), [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in CASES]
)
def test_a_save_that_is_killed_leaves_the_previous_or_the_new(
    before: Callable[[Path], None], loss: Loss, tmp_path: Path
) -> None:
    """At every call, before it and in the middle of it."""
    outcomes: list[str] = []
    calls = calls_of_a_save(before, tmp_path / "counted")
    points = [(at, torn) for at, call in enumerate(calls) for torn in (False, True) if call == "write" or not torn]
    for at, torn in [*points, (len(calls), False)]:
        run = tmp_path / f"{at}-{torn}"
        run.mkdir()
        before(run)
        status = die_at(lambda run=run: commit(run, 20), at, loss, torn)
        assert status == (9 if at < len(calls) else SURVIVED)

        loaded = newest(run, announce=nothing_is_damaged)
        if not is_whole(loaded, 20):
            assert loaded is None if before is first else is_whole(loaded, 10), (at, torn)
        outcomes.append("new" if is_whole(loaded, 20) else "previous")
        if before is with_a_best:
            found = best(run, announce=nothing_is_damaged)
            assert found is not None and found.name == "0001-step-00000005"

        clean(run)
        assert [*(run / FOLDER).glob("[.]*")] == []
        commit(run, 30)
        assert is_whole(newest(run, announce=nothing_is_damaged), 30), "the run goes on"
        shutil.rmtree(run)
    assert outcomes[-1] == "new", "what save has returned from is on the disk"
    assert len(outcomes) > 30 and outcomes.count("previous") > 20


@pytest.mark.parametrize("loss", get_args(Loss))
def test_an_evaluation_that_is_noted_is_there_or_not_and_the_checkpoint_in_any_case(loss: Loss, tmp_path: Path) -> None:
    """A kill at every call: the newest is whole, and the best is the one before it or this one."""
    found: list[str] = []
    for at, torn in product(range(20), (True, False)):
        run = tmp_path / f"{at}-{torn}"
        run.mkdir()
        with_a_best(run)
        status = die_at(lambda run=run: judge(run, 10, 0.125), at, loss, torn)
        assert is_whole(newest(run, announce=nothing_is_damaged), 10)
        kept = best(run, announce=nothing_is_damaged)
        assert kept is not None
        found.append(kept.name)
        assert status == 9 or found[-1] == "0003-step-00000010", "what has returned is on the disk"
        clean(run)
        judge(run, 10, 0.125)
        assert [path.name for path in (run / FOLDER).iterdir()] == ["0003-step-00000010"]
    assert set(found) == {"0001-step-00000005", "0003-step-00000010"} and status == SURVIVED


@pytest.mark.parametrize("loss", get_args(Loss))
def test_a_file_that_is_replaced_is_the_old_or_the_new(loss: Loss, tmp_path: Path) -> None:
    path, found = tmp_path / "run.json", list[bytes]()
    for at, torn in product(range(9), (True, False)):
        replace(path, b"old")
        status = die_at(lambda: replace(path, b"newer"), at, loss, torn)
        found.append(path.read_bytes())
        assert status == 9 or found[-1] == b"newer", "what has returned is on the disk"
    assert set(found) == {b"old", b"newer"}


def calls_of_a_save(before: Callable[[Path], None], run: Path) -> list[str]:
    run.mkdir()
    before(run)
    with pytest.MonkeyPatch.context() as patch:
        disk = FailingDisk().install(patch)
        commit(run, 20)
    return disk.calls


def test_the_calls_of_a_save_are_all_seen(tmp_path: Path) -> None:
    """Three files and the marker are written, put on the disk, and the one checkpoint too many goes."""
    calls = calls_of_a_save(second, tmp_path / "counted")
    assert calls.count("open") == 4 and calls.count("rename") == 3
    assert calls.count("fsync") >= 4 + 4 and calls.count("unlink") == 4
    assert calls.count("write") >= 8


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
def test_a_full_disk_leaves_the_previous_and_nothing_else(lasting: bool, tmp_path: Path) -> None:
    calls = calls_of_a_save(second, tmp_path / "counted")
    commit_is_on_the_disk = calls.index("rename", calls.index("rename") + 1) + 2
    failed = 0
    for at, call in enumerate(calls):
        if call in ("unlink", "rmdir"):
            continue
        run, lines = tmp_path / str(at), []
        second(run)
        (before,) = (run / FOLDER).iterdir()
        error = full_disk(lambda run=run, lines=lines: commit(run, 20, announce=lines.append), at, lasting)
        if at > commit_is_on_the_disk:
            assert error is None and len(lines) == 1 and "could not be removed" in lines[0]
            assert is_whole(newest(run, announce=nothing_is_damaged), 20)
        else:
            failed += 1
            assert error is not None and error.errno == errno.ENOSPC and error.filename == str(run / FOLDER)
            assert str(error.strerror).startswith("the checkpoint of step 20 could not be written (No space"), call
            assert list((run / FOLDER).iterdir()) == [before], "litter"
            assert is_whole(newest(run, announce=nothing_is_damaged), 10)
        commit(run, 30)
        assert is_whole(newest(run, announce=nothing_is_damaged), 30)
    assert failed > 15


def full_disk(act: Callable[[], object], at: int, lasting: bool) -> OSError | None:
    """What ``act`` raises when there is no space at call ``at``, and after it for whatever takes space."""
    disk = FailingDisk(at)

    def full() -> None:
        disk.at = len(disk.calls) if lasting else None
        if len(disk.calls) == at + 1 or disk.calls[-1] in ("open", "mkdir", "write"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    disk.fail = full
    with pytest.MonkeyPatch.context() as patch:
        disk.install(patch)
        try:
            act()
        except OSError as error:
            return error
    return None


def test_a_limit_of_the_system_is_a_full_disk(tmp_path: Path) -> None:
    """Not simulated: the kernel refuses the file that grows beyond RLIMIT_FSIZE, after a part of it."""
    second(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"checkpoint of step 20 could not be written \(File too large"):
            save(tmp_path, 20, {"model/large": torch.zeros(10_000)}, {}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(list((tmp_path / FOLDER).iterdir())) == 1
    assert is_whole(newest(tmp_path, announce=nothing_is_damaged), 10)


def test_a_system_that_writes_a_little_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:7]))
    commit(tmp_path, 10)
    assert is_whole(newest(tmp_path, announce=nothing_is_damaged), 10)


def test_an_interrupted_save_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C is no OSError."""
    second(tmp_path)
    rename = os.rename

    def interrupted(old: Path, new: Path) -> None:
        if "COMMIT" in str(new):
            raise KeyboardInterrupt
        rename(old, new)

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        commit(tmp_path, 20)
    assert [path.name for path in (tmp_path / FOLDER).iterdir()] == ["0001-step-00000010"]


def test_rubbish_is_cleaned_and_nothing_else(tmp_path: Path) -> None:
    after_rubbish(tmp_path)
    folder = tmp_path / FOLDER
    (folder / "notes").mkdir()
    (folder / "0009-step-00000001.json").write_text(json.dumps("somebody's"))
    clean(tmp_path)
    kept = {"0001-step-00000005", "0002-step-00000010", "notes", "0009-step-00000001.json"}
    assert {path.name for path in folder.iterdir()} == kept
    found = latest(tmp_path)
    assert found is not None and found.name == "0002-step-00000010"
