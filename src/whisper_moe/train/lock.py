"""One trainer for one directory: a lock that a dead trainer cannot keep.

The lock is the kernel's (``flock``), not the file's existence: it ends with the process that holds it, however that one
died, so a stale file never stands in the way. The file only says who holds it. POSIX systems only.

On a network file system the lock is worth what the server's locking is: Linux has passed ``flock`` on to NFS servers
since 2.6.12, but not where the mount says ``nolock`` or ``local_lock``. Two machines are then not kept apart; a line is
printed when the last holder was on another machine and did not say that it had ended.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOCK = "trainer.lock"
_held: set[int] = set()
"""Descriptors of locks that this process holds."""


class RunLockedError(ValueError):
    """Another trainer uses the directory. The message names the directory and the holder."""


@contextmanager
def run_lock(run: Path, *, announce: Callable[[str], None]) -> Iterator[None]:
    """Hold ``run`` (it is made if need be) for the block. ``announce`` is told of a holder that died.

    Raises :class:`RunLockedError` if another trainer has it.
    """
    run.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(run / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _lock(descriptor, run)
        _take_over(descriptor, run, announce)
        _held.add(descriptor)
        try:
            yield
        finally:
            os.ftruncate(descriptor, 0)
    finally:
        _held.discard(descriptor)
        os.close(descriptor)  # and the lock with it


def _lock(descriptor: int, run: Path) -> None:
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise OSError(error.errno, f"cannot be locked ({error.strerror})", str(run / LOCK)) from error
        holder = _holder(descriptor)
        who = "process {pid} on {host}, since {since}".format(**holder) if holder else "another process"
        raise RunLockedError(
            f"{run}: another trainer is at work there ({who}); wait for it to end, or name another directory"
        ) from None


def _take_over(descriptor: int, run: Path, announce: Callable[[str], None]) -> None:
    """Say who holds the lock now, and tell of a holder that did not end by itself."""
    if last := _holder(descriptor):
        who = "process {pid} on {host}".format(**last)
        if last["host"] == socket.gethostname():
            announce(f"{run}: {who} ended without a word; its lock is taken over")
        else:
            announce(
                f"WARNING: {run}: {who} did not say that it ended. Its lock is free and is taken over; "
                "make sure that the file system passes locks on between machines"
            )
    record = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(record).encode(), 0)
    os.fsync(descriptor)


def _holder(descriptor: int) -> dict[str, object] | None:
    """What the file says; None if it is empty, or half written by a holder that has just come."""
    with suppress(ValueError):
        record = json.loads(os.pread(descriptor, 4096, 0))
        if isinstance(record, dict) and {"host", "pid", "since"} <= record.keys():
            return record
    return None


def _forget_in_child() -> None:
    """A forked worker that outlives its trainer for a moment must not keep the trainer's lock."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget_in_child)
