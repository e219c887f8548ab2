"""The machine: what it is, how its cores are shared with others, and how memory that was freed is given back to it."""

from __future__ import annotations

import ctypes
import math
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
"""What numeric libraries read when they are loaded."""
SPINS = 10_000
"""Turns that an OpenMP thread waits for its next work before it sleeps: about half a millisecond. libgomp's own 300,000 keep
a core busy with nothing: where another process wants that core, all wait for a thread that was put aside, and everything can
be 40 times slower. Chosen by measurement (``docs/lab.md``)."""
DTYPES = ("auto", "float32", "int8", "bfloat16", "float16", "default", "int8_float32", "int8_bfloat16", "int8_float16")
"""What a model may be asked to compute in; the last four are CTranslate2's names."""
_SPINNING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
_CGROUPS, _MEMBERSHIP, _STAT = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"), Path("/proc/stat")
_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
_LEAST_SECONDS = 0.2
"""The kernel counts in hundredths of a second: what is shorter says little."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGE, _WEIGHT = 16 << 20, 128 << 10
"""Bytes from which a tensor is mapped by itself, and unmapped when it is freed; the latter while weights are loaded. glibc
would raise the limit to 32 MB as it goes."""
_TOP = 64 << 20
"""Bytes free at the heap's end that stay there until :func:`give_back_memory`: a pack's next tensor takes them again, where
glibc would return all but 128 kB and get fresh pages, one fault each."""
SPARE = 384 << 20
"""Bytes free in the whole heap that decoding leaves there for its next batch: what two batches of other sizes need."""
_KERNELS = "64"
"""Products that oneDNN keeps compiled, one for each shape. Its own limit of 1,024 takes 60 MB within a minute of decoding."""


# Cores


def share_cores(environment: MutableMapping[str, str] = os.environ) -> None:
    """Tell OpenMP, before it is loaded, how long to spin, and how many threads a container's quota of the CPU is good for.

    What a user has set stays. Without effect where torch was imported before: its OpenMP has read its variables by then.
    """
    if not any(name in environment for name in _SPINNING):
        environment["GOMP_SPINCOUNT"] = str(SPINS)
    _share.wanted = not any(name in environment for name in THREAD_VARIABLES)
    if _share.wanted and (cores := usable_cores()) < len(_allowed()):
        environment["OMP_NUM_THREADS"] = str(cores)


def usable_cores(root: Path = _CGROUPS, membership: Path = _MEMBERSHIP) -> int:
    """Cores that this process may keep busy: those it is allowed on, or fewer where its cgroup has a quota of their time."""
    return math.ceil(min(len(_allowed()), max(_quota(root, membership), 1)))


def _allowed() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _politeness() -> int:
    return os.nice(0) if hasattr(os, "nice") else 0


def _quota(root: Path, membership: Path) -> float:
    """The least quota, in cores, of this process's cgroup (version 1 or 2) and those around it; infinite where none has one."""
    least = math.inf
    for line in _read(membership).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / "cpu" if controllers else root
        here = top / path.lstrip("/")
        # In a container the path may be one of the host, of which nothing but its own group, as the top, is there.
        for folder in (here, *here.parents):
            old = (folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us")
            stated = (_read(folder / "cpu.max") or " ".join(map(_read, old))).split()
            if folder.is_relative_to(top) and len(stated) == 2 and "".join(stated).isdigit() and int(stated[1]):
                least = min(least, int(stated[0]) / int(stated[1]))
    return least


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
        return max(1, math.floor(len(_allowed()) - others + 0.5))


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
            share.threads, share.last = now.threads_that_fit(share.last), now
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
    if count < 1:
        raise ValueError(f"threads must be at least 1, got {count}")
    import torch

    with _share.lock:
        _share.wanted, _share.threads, _share.most = False, None, count
        torch.set_num_threads(count)


def check_arithmetic(device: str, dtype: str) -> None:
    """Raises ``ValueError`` for what no machine has; torch is not asked."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    if not re.fullmatch(r"[a-z]+(:\d+)?", device):
        raise ValueError(f"device must be cpu, cuda, cuda:1, mps or auto; got {device!r}")
    if dtype == "int8" and device not in ("auto", "cpu"):
        raise ValueError(f"dtype int8 runs on a CPU; on {device} take bfloat16 or float16")


def pick_device(wanted: str) -> str:
    """The device that is meant: ``auto`` is a GPU if there is one. Raises ``ValueError`` for one that is not here."""
    import torch

    gpus, apple = torch.cuda.device_count(), torch.backends.mps.is_available()
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if apple else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise ValueError(f"device must be cpu, cuda, cuda:1, mps or auto; got {wanted!r}") from None
    if (device.index or 0) >= {"cpu": 1, "cuda": gpus, "mps": int(apple)}.get(device.type, 1):
        raise ValueError(f"device {wanted}: PyTorch {torch.__version__} sees no such device here")
    return wanted


# Memory


@contextmanager
def weights_apart() -> Iterator[None]:
    """While weights are loaded, each is mapped by itself: what loading leaves free would lie in pieces between them.

    From then on, for the whole process, large tensors stay out of the heap, and of what is free at its end little is kept:
    packs of ever other sizes would fill it with holes.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", _KERNELS)  # read once, by the first product
    _map_from(_WEIGHT)
    try:
        yield
    finally:
        _map_from(_LARGE)
        give_back_memory()


def give_back_memory(spare: int = 0) -> None:
    """Return freed memory to the system, if there is more than ``spare`` bytes of it: to take a page again costs a fault.

    Free is what glibc calls so, holes included whose pages were given back before: rather too often than never.
    """
    if (libc := _glibc()) and (not (heap := heap_info()) or heap.fordblks > spare):
        libc.malloc_trim(0)


class HeapInfo(ctypes.Structure):
    """glibc's ``mallinfo2``."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def heap_info() -> HeapInfo | None:
    """The heap as it is; ``fordblks`` bytes of it are free. None where the C library does not tell (glibc does from 2.33)."""
    libc = _glibc()
    if libc is None or not hasattr(libc, "mallinfo2"):
        return None
    libc.mallinfo2.restype = HeapInfo
    return libc.mallinfo2()


def _map_from(size: int) -> None:
    if libc := _glibc():
        libc.mallopt(_M_MMAP_THRESHOLD, size)
        libc.mallopt(_M_TRIM_THRESHOLD, _TOP)


@cache
def _glibc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL("libc.so.6") if sys.platform == "linux" else None
    except OSError:
        return None
    return libc if hasattr(libc, "malloc_trim") and hasattr(libc, "mallopt") else None


def peak_bytes() -> int | None:
    """The largest resident memory of this process so far; None where the system does not say (Windows).

    Linux: of this program alone. ``ru_maxrss`` would count what its parent held when it started it.
    """
    for line in _read(Path("/proc/self/status")).splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# What figures were measured on


def machine() -> dict[str, Any]:
    import platform

    lines = _read(Path("/proc/cpuinfo")).splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "openblas_coretype": os.environ.get("OPENBLAS_CORETYPE"),
    }


def versions(packages: Iterable[str]) -> dict[str, str]:
    """The installed version of each package."""
    from importlib.metadata import distributions

    found = {name: next((each.version for each in distributions(name=name)), None) for name in sorted(set(packages))}
    return {name: version or "from the source tree" for name, version in found.items()}
