"""Memory that glibc keeps after it was freed: packs of ever other sizes would leave hundreds of MB of holes in its heap."""

from __future__ import annotations

import ctypes
import sys
from functools import lru_cache

_M_MMAP_THRESHOLD = -3
_LARGE = 16 << 20
"""Bytes from which a tensor is mapped by itself, and unmapped when it is freed. glibc would raise this to 32 MB as it goes."""


def keep_heap_small() -> None:
    """For the whole process: large tensors stay out of the heap. What is free now goes back to the system."""
    if libc := _glibc():
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGE)
    give_back_memory()


def give_back_memory() -> None:
    """Return freed memory to the system."""
    if libc := _glibc():
        libc.malloc_trim(0)


@lru_cache(maxsize=1)
def _glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return None
    return libc if hasattr(libc, "malloc_trim") and hasattr(libc, "mallopt") else None
