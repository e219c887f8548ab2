"""Memory that stays taken after it was freed: by glibc, whose heap packs of ever other sizes fill with holes, and by oneDNN."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGE = 16 << 20
"""Bytes from which a tensor is mapped by itself, and unmapped when it is freed. glibc would raise this to 32 MB as it goes."""
_WEIGHT = 128 << 10
"""The same while weights are loaded."""
_TOP = 64 << 20
"""Bytes free at the heap's end that stay there until :func:`give_back_memory`: a pack's next tensor takes them again, where
glibc would return all but 128 kB and get fresh pages, one fault each."""
SPARE = 384 << 20
"""Bytes free in the whole heap that decoding leaves there for its next batch: what two batches of other sizes need."""
_KERNELS = "64"
"""Products that oneDNN keeps compiled, one for each shape. Its own limit of 1,024 takes 60 MB within a minute of decoding."""


@contextmanager
def weights_apart() -> Iterator[None]:
    """While weights are loaded, each is mapped by itself: what loading leaves free would lie in pieces between them.

    From then on, for the whole process, large tensors stay out of the heap, and of what is free at its end little is kept.
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
    """The heap as it is; ``fordblks`` bytes of it are free. None from a glibc before 2.33 and other libraries, which do not
    tell."""
    libc = _glibc()
    if libc is None or not hasattr(libc, "mallinfo2"):
        return None
    libc.mallinfo2.restype = HeapInfo
    return libc.mallinfo2()


def _map_from(size: int) -> None:
    if libc := _glibc():
        libc.mallopt(_M_MMAP_THRESHOLD, size)
        libc.mallopt(_M_TRIM_THRESHOLD, _TOP)


@lru_cache(maxsize=1)
def _glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return None
    return libc if hasattr(libc, "malloc_trim") and hasattr(libc, "mallopt") else None
