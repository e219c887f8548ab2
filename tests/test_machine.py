"""Cores are shared with other processes, and a container's quota is known, before OpenMP is loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from whisper_moe.machine import SPINS, THREAD_VARIABLES, share_cores, unshare_cores, usable_cores

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def imported_with(code: str = "import whisper_moe", **variables: str) -> str | None:
    """The spin count in the environment of a fresh process behind ``code``."""
    clean = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    report = f"{code}\nimport os, sys; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    paths = {"PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-c", report], env=clean | paths | variables, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    spins, torch = run.stdout.split()
    assert torch == "False", "OpenMP would have read its variables by now"
    return None if spins == "None" else spins


@pytest.mark.parametrize(
    "code", ["import whisper_moe", "import whisper_moe.__main__", "import whisper_moe.train.recipe"]
)
def test_waiting_threads_sleep_soon_whatever_is_imported(code: str) -> None:
    assert imported_with(code) == str(SPINS)


def test_what_a_user_has_set_wins() -> None:
    assert imported_with(GOMP_SPINCOUNT="77") == "77"
    assert imported_with(OMP_WAIT_POLICY="passive") is None


def test_peers_are_measured_as_they_are() -> None:
    ours: dict[str, str] = {}
    share_cores(ours)
    assert ours["GOMP_SPINCOUNT"] == str(SPINS)
    unshare_cores(ours)
    assert "GOMP_SPINCOUNT" not in ours
    own = {"GOMP_SPINCOUNT": "77"}
    unshare_cores(own)
    assert own == {"GOMP_SPINCOUNT": "77"}


def cgroup(tmp_path: Path, line: str, files: dict[str, str]) -> dict[str, Path]:
    root, membership = tmp_path / "cgroup", tmp_path / "membership"
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    membership.write_text(line)
    return {"root": root, "membership": membership}


@pytest.mark.skipif(CORES < 2, reason="one core is the least in any case")
@pytest.mark.parametrize(
    ("line", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "100000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "max 100000\n"}, CORES),
        ("0::/a/b\n", {"a/cpu.max": "100000 100000\n", "a/b/cpu.max": "max 100000\n"}, 1),
        ("0::/docker/not-here\n", {"cpu.max": "100000 100000\n"}, 1),
        ("3:cpu,cpuacct:/a\n", {"cpu/a/cpu.cfs_quota_us": "100000\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, 1),
        ("3:cpu:/a\n", {"cpu/a/cpu.cfs_quota_us": "-1\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, CORES),
        ("4:memory:/a\n", {"cpu/a/cpu.cfs_quota_us": "100000\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, CORES),
        ("0::/\n", {"cpu.max": "0 0\n"}, CORES),
        ("", {}, CORES),
    ],
)
def test_threads_are_as_many_as_the_quota_is_good_for(
    tmp_path: Path, line: str, files: dict[str, str], cores: int
) -> None:
    assert usable_cores(**cgroup(tmp_path, line, files)) == cores


@pytest.mark.skipif(CORES < 2, reason="one core is the least in any case")
def test_a_quota_is_told_to_openmp_unless_the_user_said_something(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("whisper_moe.machine.usable_cores", lambda: 1)
    told: dict[str, str] = {}
    share_cores(told)
    assert told["OMP_NUM_THREADS"] == "1"
    for name in THREAD_VARIABLES:
        own = {name: "5"}
        share_cores(own)
        assert own == {name: "5", "GOMP_SPINCOUNT": str(SPINS)}
