"""The machine: what it is, what of it this process may use, and how it is shared with others while it computes."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
"""What numeric libraries read when they are loaded."""
SPINS = 10_000
"""Turns that an OpenMP thread waits for its next work before it sleeps: about half a millisecond. libgomp's own 300,000 keep
a core busy with nothing: where another process wants that core, all wait for a thread that was put aside, and everything can
be 40 times slower. Chosen by measurement (``docs/lab.md``)."""
_SPINNING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
_CGROUPS, _MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_STAT = Path("/proc/stat")
_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
_LEAST_SECONDS = 0.2
"""The kernel counts in hundredths of a second: what is shorter says little."""


def share_cores(environment: MutableMapping[str, str] = os.environ) -> None:
    """Tell OpenMP, before it is loaded, how long to spin, and how many threads a container's quota of the CPU is good for.

    What a user has set stays. Without effect where torch was imported before: its OpenMP has read its variables by then.
    """
    if not any(name in environment for name in _SPINNING):
        environment["GOMP_SPINCOUNT"] = str(SPINS)
    _share.wanted = not any(name in environment for name in THREAD_VARIABLES)
    if _share.wanted and (cores := usable_cores()) < _allowed_cores():
        environment["OMP_NUM_THREADS"] = str(cores)


def unshare_cores(environment: MutableMapping[str, str] = os.environ) -> None:
    """Take the spin count back: other programs are measured as they are."""
    if environment.get("GOMP_SPINCOUNT") == str(SPINS):
        del environment["GOMP_SPINCOUNT"]


def usable_cores(root: Path = _CGROUPS, membership: Path = _MEMBERSHIP) -> int:
    """Cores that this process may keep busy: those it is allowed on, or fewer where its cgroup has a quota of their time."""
    return math.ceil(min(_allowed_cores(), max(_quota(root, membership), 1)))


def _allowed() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _politeness() -> int:
    return os.nice(0) if hasattr(os, "nice") else 0


def _allowed_cores() -> int:
    return len(_allowed())


def _quota(root: Path, membership: Path) -> float:
    """The least quota, in cores, of this process's cgroup and those around it. Infinite where none has one."""
    least = math.inf
    for line in _read(membership).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / "cpu" if controllers else root  # version 1, or 2
        here = top / path.lstrip("/")
        # In a container the path may be one of the host, of which nothing but its own group, as the top, is there.
        for folder in (here, *here.parents):
            if folder.is_relative_to(top):
                least = min(least, _stated_quota(folder))
    return least


def _stated_quota(folder: Path) -> float:
    """Of one cgroup: ``cpu.max`` in version 2, two files in version 1."""
    quota, _, period = _read(folder / "cpu.max").strip().partition(" ")
    quota = quota or _read(folder / "cpu.cfs_quota_us").strip()
    period = period or _read(folder / "cpu.cfs_period_us").strip()
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else math.inf


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


@dataclass(frozen=True)
class Load:
    """Seconds so far: of the clock, of this process's work, and of all work on the cores that it is allowed on."""

    clock: float
    own: float
    all: float

    @classmethod
    def now(cls, stat: Path = _STAT) -> Load:
        allowed = {f"cpu{core}" for core in _allowed()}
        lines = [line.split() for line in _read(stat).splitlines()]
        # user, nice, system, idle, iowait, irq, softirq, steal. Work at a lower priority than ours makes way: it is not counted.
        counted = (1, 3, 6, 7, 8) if _politeness() <= 0 else (1, 2, 3, 6, 7, 8)
        ticks = sum(int(line[column]) for line in lines if line and line[0] in allowed for column in counted)
        return cls(time.monotonic(), time.process_time(), ticks / _TICKS)

    def threads_that_fit(self, since: Load) -> int:
        """Cores that others left to this process ``since`` then; one at least."""
        others = max(self.all - since.all - (self.own - since.own), 0.0) / (self.clock - since.clock)
        return max(1, math.floor(_allowed_cores() - others + 0.5))


@dataclass
class _Share:
    """What :func:`fitting_threads` knows."""

    wanted: bool = True
    last: Load = field(default_factory=Load.now)
    threads: int | None = None
    within: int = 0
    """Blocks that are open, in all threads of this process: torch's number is one for all of them."""
    most: int = 0
    """Torch's threads outside of them."""
    lock: Any = field(default_factory=Lock)


_share = _Share()


@contextmanager
def fitting_threads() -> Iterator[None]:
    """Within, torch has no more threads than others have left cores for since it was last entered.

    The threads of a product wait for each other: where one is put aside for another process, all are late, and fewer that keep
    their cores are faster. Of no effect where threads were asked for, or where the system does not say what runs (Linux does).
    """
    import torch

    share = _share
    with share.lock:
        now, share.most = Load.now(), share.most if share.within else torch.get_num_threads()
        share.within += 1
        if share.wanted and now.clock - share.last.clock >= _LEAST_SECONDS:
            share.threads = now.threads_that_fit(share.last)
            share.last = now
        torch.set_num_threads(min(share.most, share.threads or share.most))
    try:
        yield
    finally:
        with share.lock:
            share.within -= 1
            if not share.within:
                torch.set_num_threads(share.most)


def take_threads(count: int) -> None:
    """Let torch compute with so many threads from now on, whatever else runs."""
    import torch

    with _share.lock:
        _share.wanted, _share.threads, _share.most = False, None, count
        torch.set_num_threads(count)


def pick_device(wanted: str) -> str:
    """The device that is meant: ``auto`` is a GPU if there is one. Raises ``ValueError`` for one that is not here."""
    import torch

    gpus, apple = torch.cuda.device_count(), torch.backends.mps.is_available()
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if apple else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise ValueError(f"unknown device {wanted!r}: cpu, cuda, cuda:1, mps or auto") from None
    if (device.index or 0) >= {"cpu": 1, "cuda": gpus, "mps": int(apple)}.get(device.type, 1):
        raise ValueError(f"device {wanted}: PyTorch {torch.__version__} sees no such device here")
    return wanted


def machine() -> dict[str, Any]:
    """What figures were measured on."""
    import platform

    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "openblas_coretype": os.environ.get("OPENBLAS_CORETYPE"),
    }


def cpu_name() -> str:
    import platform

    lines = _read(Path("/proc/cpuinfo")).splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def versions(packages: Iterable[str]) -> dict[str, str]:
    """The installed version of each package."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in sorted(set(packages)):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "from the source tree"
    return found


def peak_bytes() -> int:
    """The largest resident memory of this process so far.

    Linux: of this program alone. ``ru_maxrss`` would count what its parent held when it started it.
    """
    for line in _read(Path("/proc/self/status")).splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
