"""Two trainers never share a directory, and a dead one never keeps it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from whisper_moe.train.lock import LOCK, RunLockedError, run_lock

HOLD = """
import os, sys, time
from pathlib import Path
from whisper_moe.train.lock import run_lock
with run_lock(Path(sys.argv[1]), announce=print):
    if sys.argv[2] == "fork" and not (child := os.fork()):
        print(os.getpid(), flush=True)
        time.sleep(60)
    if sys.argv[2] != "fork":
        print(os.getpid(), flush=True)
    sys.stdin.readline()
"""


def hold(run: Path, mode: str = "hold") -> tuple[subprocess.Popen[str], int]:
    """A process that holds the lock, and the pid that it says."""
    code = [sys.executable, "-c", HOLD, str(run), mode]
    process = subprocess.Popen(code, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    return process, int(process.stdout.readline())


def no_word(line: str) -> None:
    raise AssertionError(line)


def test_a_second_trainer_is_told_who_holds_the_directory(tmp_path: Path) -> None:
    process, pid = hold(tmp_path)
    try:
        with pytest.raises(RunLockedError) as caught, run_lock(tmp_path, announce=no_word):
            pytest.fail("two trainers")
        message = str(caught.value)
        assert message.startswith(f"{tmp_path}: another trainer is at work there")
        assert f"process {pid} on {socket.gethostname()}, since 2" in message
    finally:
        process.communicate("\n", timeout=60)
    assert process.returncode == 0
    with run_lock(tmp_path, announce=no_word):
        pass


def test_in_one_process_too(tmp_path: Path) -> None:
    with run_lock(tmp_path, announce=no_word):
        with pytest.raises(RunLockedError, match=f"process {os.getpid()} on"), run_lock(tmp_path, announce=no_word):
            pass
        with (
            pytest.raises(RunLockedError),
            run_lock(tmp_path, announce=no_word),
        ):  # the failed attempt did not let go of it
            pass
        with run_lock(tmp_path / "another", announce=no_word):
            pass


def test_a_killed_trainer_does_not_keep_it(tmp_path: Path) -> None:
    process, pid = hold(tmp_path)
    process.kill()
    process.communicate(timeout=60)
    lines: list[str] = []
    with run_lock(tmp_path, announce=lines.append):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert lines == [
        f"{tmp_path}: process {pid} on {socket.gethostname()} ended without a word; its lock is taken over"
    ]
    with run_lock(tmp_path, announce=no_word):
        pass


def test_a_worker_that_outlives_a_killed_trainer_does_not_keep_it(tmp_path: Path) -> None:
    process, worker = hold(tmp_path, "fork")
    try:
        with pytest.raises(RunLockedError), run_lock(tmp_path, announce=no_word):
            pass
        process.kill()
        process.wait(timeout=60)
        os.kill(worker, 0)
        with run_lock(tmp_path, announce=lambda _: None):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_holder_on_another_machine_is_spoken_of_loudly(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text(json.dumps({"host": "node-17", "pid": 4, "since": "2026-01-01 00:00:00 +0000"}))
    lines: list[str] = []
    with run_lock(tmp_path, announce=lines.append):
        pass
    (line,) = lines
    assert line.startswith(f"WARNING: {tmp_path}: process 4 on node-17 did not say that it ended")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "\xff", "x" * 10_000])
def test_a_lock_file_that_says_nothing(content: str, tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text(content, encoding="latin-1")
    with run_lock(tmp_path, announce=no_word), pytest.raises(RunLockedError), run_lock(tmp_path, announce=no_word):
        pass


def test_a_failure_inside_lets_go_and_is_seen_as_one(tmp_path: Path) -> None:
    """It has said that it ended, if not well: the next one has nothing to tell."""
    with pytest.raises(KeyError), run_lock(tmp_path, announce=no_word):
        raise KeyError
    with run_lock(tmp_path, announce=no_word):
        pass
