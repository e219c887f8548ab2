"""A save that is killed, loses power or finds the disk full at any call to the system: the run is whole afterwards."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from faults.disk import SURVIVED, FailingDisk, Loss, die_at
from faults.runs import undamaged
from torch import nn

from whisper_moe.train.checkpoint import COMMIT, FOLDER, best, clean, latest, load, note, save, tensors_of
from whisper_moe.weights.files import atomic_file


def content(step: int) -> tuple[nn.Module, torch.optim.AdamW]:
    """A model and its optimizer, all of this step."""
    model = nn.ParameterDict({"weight": torch.full((5, 3), float(step)), "short": torch.full((3,), step).bfloat16()})
    optimizer = torch.optim.AdamW(model.parameters())
    moment = torch.full((5, 3), step / 7)
    optimizer.state[model["weight"]] = {
        "step": torch.tensor(float(step)),
        "exp_avg": moment,
        "exp_avg_sq": moment.square(),
    }
    return model, optimizer


def commit(run: Path, step: int, keep: int = 1) -> None:
    save(run, step, *content(step), {"step": step, "metrics": [step / 7] * 3}, keep=keep)


def judge(run: Path, step: int, score: float, keep: int = 1) -> None:
    note(run, step, {"wer": score}, "wer", keep=keep)


def newest(run: Path) -> int | None:
    """The step of the newest checkpoint, all of which must be of this one step, and none of which damaged."""
    with undamaged():
        path = latest(run)
    if path is None:
        return None
    found = content(0)
    step = load(path, *found)["step"]
    expected = tensors_of(*content(step))
    assert tensors_of(*found).keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors_of(*found).items())
    return step


def first(run: Path) -> None:
    """No checkpoint yet."""


def second(run: Path) -> None:
    commit(run, 10)


def after_rubbish(run: Path) -> None:
    """A save, a removal and a mark were interrupted before; their remains lie there."""
    commit(run, 5, keep=9)
    commit(run, 10, keep=9)
    folder = run / FOLDER
    shutil.copytree(folder / "0001-step-00000005", folder / ".0badc0de0badc0de.tmp")
    shutil.copytree(folder / "0001-step-00000005", folder / ".0001-step-00000002.old")
    (folder / "0002-step-00000010" / ".0badc0de0badc0de.tmp").write_text("{")


def with_a_best(run: Path) -> None:
    for step, score in ((5, 0.25), (7, 0.5)):
        commit(run, step, keep=9)
        judge(run, step, score, keep=9)
    commit(run, 10, keep=9)


def prepared(before: Callable[[Path], None], folder: Path) -> Path:
    folder.mkdir()
    before(folder)
    return folder


def calls_of_a_save(run: Path) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        disk = FailingDisk().install(patch)
        commit(run, 20)
    return disk.calls


CASES = [(before, loss) for before in (first, second, after_rubbish, with_a_best) for loss in get_args(Loss)]
QUICK = {(first, "data and names"), *((second, loss) for loss in get_args(Loss))}


@pytest.mark.parametrize(
    ("before", "loss"), [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in CASES]
)
def test_a_save_that_is_killed_leaves_the_previous_or_the_new(
    before: Callable[[Path], None], loss: Loss, tmp_path: Path
) -> None:
    """At every call, before it and in the middle of it."""
    outcomes: list[int | None] = []
    origin = prepared(before, tmp_path / "origin")
    calls = calls_of_a_save(shutil.copytree(origin, tmp_path / "counted"))
    points = [(at, torn) for at, call in enumerate(calls) for torn in (False, True) if call == "write" or not torn]
    for at, torn in [*points, (len(calls), False)]:
        run = shutil.copytree(origin, tmp_path / f"{at}-{torn}")
        status = die_at(lambda run=run: commit(run, 20), at, loss, torn)
        assert status == (9 if at < len(calls) else SURVIVED)

        outcomes.append(newest(run))
        if before is with_a_best:
            with undamaged():
                found = best(run)
            assert found is not None and found.name == "0001-step-00000005"
        clean(run)
        assert [*(run / FOLDER).rglob("[.]*")] == []
        commit(run, 30)
        assert newest(run) == 30, "the run goes on"
        shutil.rmtree(run)
    assert set(outcomes) == {None if before is first else 10, 20}
    assert outcomes[-1] == 20, "what save has returned from is on the disk"
    assert len(outcomes) > 15 and outcomes.count(outcomes[0]) > 10


@pytest.mark.parametrize("loss", get_args(Loss))
def test_an_evaluation_that_is_noted_is_there_or_not_and_the_checkpoint_in_any_case(loss: Loss, tmp_path: Path) -> None:
    """A kill at every call: the newest is whole, and the best is the one before it or this one."""
    found: list[str] = []
    origin = prepared(with_a_best, tmp_path / "origin")
    for at, torn in product(range(22), (True, False)):
        run = shutil.copytree(origin, tmp_path / f"{at}-{torn}")
        status = die_at(lambda run=run: judge(run, 10, 0.125), at, loss, torn)
        assert newest(run) == 10
        with undamaged():
            kept = best(run)
        assert kept is not None
        found.append(kept.name)
        assert status == 9 or found[-1] == "0003-step-00000010", "what has returned is on the disk"
        clean(run)
        judge(run, 10, 0.125)
        assert [path.name for path in (run / FOLDER).iterdir()] == ["0003-step-00000010"]
    assert set(found) == {"0001-step-00000005", "0003-step-00000010"} and status == SURVIVED


@pytest.mark.parametrize("loss", get_args(Loss))
def test_a_file_that_is_replaced_is_the_old_or_the_new(loss: Loss, tmp_path: Path) -> None:
    def write(data: bytes) -> None:
        with atomic_file(path) as scratch:
            scratch.write_bytes(data)

    path, found = tmp_path / "run.json", list[bytes]()
    for at, torn in product(range(9), (True, False)):
        write(b"old")
        status = die_at(lambda: write(b"newer"), at, loss, torn)
        found.append(path.read_bytes())
        assert status == 9 or found[-1] == b"newer", "what has returned is on the disk"
    assert set(found) == {b"old", b"newer"}


def test_the_calls_of_a_save_are_all_seen(tmp_path: Path) -> None:
    """Two files and the marker are written, put on the disk, and the one checkpoint too many goes."""
    calls = calls_of_a_save(prepared(second, tmp_path / "run"))
    assert calls.count("open") == 3 and calls.count("write") == 3 and calls.count("unlink") == 3
    assert calls.count("rename") == 2 and calls.count("replace") == 1
    assert calls.count("fsync") >= 3 + 4


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
def test_a_full_disk_leaves_the_previous_and_nothing_else(
    lasting: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    origin = prepared(second, tmp_path / "origin")
    calls = calls_of_a_save(shutil.copytree(origin, tmp_path / "counted"))
    committed = calls.index("rename")
    failed = 0
    for at, call in enumerate(calls):
        if call in ("unlink", "rmdir"):
            continue
        run = shutil.copytree(origin, tmp_path / str(at))
        (before,) = (run / FOLDER).iterdir()
        caplog.clear()
        error = full_disk(lambda run=run: commit(run, 20), at, lasting)
        if at <= committed + 1:
            failed += 1
            assert error is not None and error.errno == errno.ENOSPC and error.filename == str(run / FOLDER)
            assert str(error.strerror).startswith("the checkpoint of step 20 could not be written (No space"), call
        else:
            said = [record.getMessage() for record in caplog.records if record.name.startswith("whisper_moe")]
            assert error is None and len(said) == 1 and "could not be removed" in said[0]
        if at <= committed:
            assert list((run / FOLDER).iterdir()) == [before], "litter"
            assert newest(run) == 10
        else:
            assert newest(run) == 20
        commit(run, 30)
        assert newest(run) == 30
    assert failed > 9


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
    large: Any = nn.Linear(100, 100)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"checkpoint of step 20 could not be written \(File too large"):
            save(tmp_path, 20, large, torch.optim.SGD(large.parameters()), {}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(list((tmp_path / FOLDER).iterdir())) == 1
    assert newest(tmp_path) == 10


def test_an_interrupted_save_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C is no OSError."""
    second(tmp_path)
    replace = os.replace

    def interrupted(old: Path, new: Path) -> None:
        if COMMIT in str(new):
            raise KeyboardInterrupt
        replace(old, new)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        commit(tmp_path, 20)
    assert [path.name for path in (tmp_path / FOLDER).iterdir()] == ["0001-step-00000010"]


def test_rubbish_is_cleaned_and_nothing_else(tmp_path: Path) -> None:
    after_rubbish(tmp_path)
    folder = tmp_path / FOLDER
    (folder / "notes").mkdir()
    (folder / "0009-step-00000001.json").write_text("somebody's")
    clean(tmp_path)
    kept = {"0001-step-00000005", "0002-step-00000010", "notes", "0009-step-00000001.json"}
    assert {path.name for path in folder.iterdir()} == kept
    assert newest(tmp_path) == 10
