"""The machine: what it is, what of it this process may use, and how it is shared with others while it computes."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, MutableMapping
from pathlib import Path
from typing import Any

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
"""What numeric libraries read when they are loaded."""
SPINS = 5_000
"""Turns that an OpenMP thread waits for its next work before it sleeps: some tenths of a millisecond. libgomp's own 300,000 keep
a core busy with nothing: where another process wants that core, all wait for a thread that was put aside, and everything can
be 40 times slower. Chosen by measurement (``docs/lab.md``)."""
_SPINNING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
_CGROUPS, _MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def share_cores(environment: MutableMapping[str, str] = os.environ) -> None:
    """Tell OpenMP, before it is loaded, how long to spin, and how many threads a container's quota of the CPU is good for.

    What a user has set stays. Without effect where torch was imported before: its OpenMP has read its variables by then.
    """
    if not any(name in environment for name in _SPINNING):
        environment["GOMP_SPINCOUNT"] = str(SPINS)
    if not any(name in environment for name in THREAD_VARIABLES) and (cores := usable_cores()) < _allowed_cores():
        environment["OMP_NUM_THREADS"] = str(cores)


def unshare_cores(environment: MutableMapping[str, str] = os.environ) -> None:
    """Take the spin count back: other programs are measured as they are."""
    if environment.get("GOMP_SPINCOUNT") == str(SPINS):
        del environment["GOMP_SPINCOUNT"]


def usable_cores(root: Path = _CGROUPS, membership: Path = _MEMBERSHIP) -> int:
    """Cores that this process may keep busy: those it is allowed on, or fewer where its cgroup has a quota of their time."""
    return math.ceil(min(_allowed_cores(), max(_quota(root, membership), 1)))


def _allowed_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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
