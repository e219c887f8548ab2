"""Cores are shared with other processes, a container's quota is known before OpenMP is loaded, and memory goes back."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from whisper_moe import machine
from whisper_moe.machine import (
    SPINS,
    THREAD_VARIABLES,
    Load,
    heap_info,
    share_cores,
    usable_cores,
    weights_apart,
)

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


@pytest.mark.parametrize(
    ("own", "all", "threads"),
    [
        (8.0, 8.0, 4),  # nobody else
        (8.0, 8.5, 4),  # less than half a core
        (8.0, 10.0, 3),  # a loop on a core
        (4.0, 8.0, 2),  # a loop on every core, whose halves we have
        (1.0, 8.0, 1),  # hardly anything is left
        (0.0, 8.0, 1),
        (8.0, 7.9, 4),  # two clocks that do not quite agree
    ],
)
def test_threads_are_those_that_others_leave_cores_for(
    own: float, all: float, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_allowed", lambda: {0, 1, 2, 3})
    assert Load(12.0, 1 + own, 5 + all).threads_that_fit(Load(10.0, 1.0, 5.0)) == threads


def test_work_on_our_cores_that_will_not_make_way_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat = tmp_path / "stat"
    core = "user nice system idle iowait irq softirq steal guest guest_nice"
    stat.write_text("cpu 9 9 9 9 9 9 9 9 9 9\ncpu0 100 1000 10 5000 9 4 3 2 50 0\ncpu1 7 7 7 7 7 7 7 7 7 7\n" + core)
    monkeypatch.setattr(machine, "_allowed", lambda: {0})
    monkeypatch.setattr(machine, "_politeness", lambda: 0)
    assert Load.now(stat).all * machine._TICKS == pytest.approx(119)
    monkeypatch.setattr(machine, "_politeness", lambda: 10)  # now those at a lower priority are our equals
    assert Load.now(stat).all * machine._TICKS == pytest.approx(1119)
    assert Load.now(tmp_path / "missing").all == 0


@pytest.mark.skipif(CORES < 2, reason="one core has one thread")
def test_torch_has_the_threads_that_fit_within_and_the_users_own_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    crowded = machine._Share(last=Load(Load.now().clock - 1, Load.now().own, Load.now().all - CORES))
    try:
        torch.set_num_threads(2)
        monkeypatch.setattr(machine, "_share", crowded)
        for _ in range(2):  # the second comes too soon to know better
            with machine.fitting_threads():
                assert torch.get_num_threads() == 1
            assert torch.get_num_threads() == 2
        machine.take_threads(2)
        with machine.fitting_threads():
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(CORES < 2, reason="one core has one thread")
@pytest.mark.parametrize(("taken", "left"), [(None, 2), (3, 3)])
def test_blocks_of_several_threads_leave_torch_what_it_had(
    taken: int | None, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch has one number for all: who comes while another is within must not take the reduced one for the usual."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        monkeypatch.setattr(machine, "_share", machine._Share(threads=1))
        first, second = machine.fitting_threads(), machine.fitting_threads()
        first.__enter__()
        second.__enter__()
        assert torch.get_num_threads() == 1
        if taken:
            machine.take_threads(taken)
        first.__exit__(None, None, None)
        second.__exit__(None, None, None)
        assert torch.get_num_threads() == left
    finally:
        torch.set_num_threads(before)


# Memory: weights lie apart from what comes and goes.

MAPPED = """
import os
import torch
from whisper_moe.machine import heap_info, weights_apart

mapped = lambda: heap_info().hblks

def made(count):
    before = mapped()
    tensors = [torch.empty(256 << 10) for _ in range(count)]
    return tensors, mapped() - before

with weights_apart():
    weights, inside = made(20)
passing, outside = made(20)
large, apart = [torch.empty(5 << 20)], mapped()
del large
print(inside, outside, apart - mapped(), os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_only_weights_and_large_tensors_are_mapped_by_themselves() -> None:
    if heap_info() is None:
        pytest.skip("this C library does not tell")
    done = subprocess.run([sys.executable, "-c", MAPPED], capture_output=True, text=True, check=False)
    inside, outside, large, kernels = done.stdout.split() or pytest.fail(done.stderr)
    assert int(inside) == 20, "each weight of a megabyte has a mapping of its own"
    assert int(outside) == 0, "what comes and goes shares the heap"
    assert int(large) == 1, "and what is large is given back when it is freed"
    assert int(kernels) < 1024


def test_a_limit_that_the_user_has_set_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "7")
    with weights_apart():
        pass
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "7"


GIVEN_BACK = """
import resource, torch
from whisper_moe.machine import give_back_memory, weights_apart

with weights_apart():
    pass
page = resource.getpagesize()
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * page >> 20
pieces = [torch.ones(1 << 20) for _ in range(40)]  # 160 MB in the heap, every other of them freed: holes
kept = pieces[::2]
del pieces
full = resident()
give_back_memory(200 << 20)
spared = resident()
give_back_memory(40 << 20)
holes = resident()
top = [torch.ones(1 << 20) for _ in range(12)]  # 48 MB at the heap's end
raised = resident()
del top
print(full - spared, spared - holes, raised - resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_free_memory_goes_back_where_there_is_more_of_it_than_is_spared() -> None:
    if heap_info() is None:
        pytest.skip("this C library does not tell")
    done = subprocess.run([sys.executable, "-c", GIVEN_BACK], capture_output=True, text=True, check=True)
    spared, given_back, top = map(int, done.stdout.split())
    assert spared < 20
    assert given_back > 60
    assert top < 10, "a pack's next tensor finds its pages"
