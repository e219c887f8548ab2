"""Files of strangers are read in processes of their own, which may take so much memory and time and no more; no torch."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

import numpy as np

from whisper_moe.config import SAMPLE_RATE
from whisper_moe.config_aside import FilmConfig
from whisper_moe.media import video
from whisper_moe.media.audio import MediaError, stream_audio
from whisper_moe.serve.guard import Limits, Refused

try:
    import resource
except ImportError:  # Windows has no such limits
    resource = None


def end_with_parent() -> None:
    """A process whose parent was killed ends within a second, whatever it is doing; an interrupt is for the parent to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _limited(limits: Limits) -> None:
    if resource is not None:
        used = time.process_time()
        resource.setrlimit(resource.RLIMIT_AS, (limits.memory, resource.getrlimit(resource.RLIMIT_AS)[1]))
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (int(used + limits.decoding) + 1, hard))


def sound_of(content: bytes, name: str, limits: Limits) -> tuple[np.ndarray, list[str]]:
    """Samples at 16 kHz, and what is worth knowing about the file."""
    _limited(limits)
    blocks, samples, notes = list[np.ndarray](), 0, list[str]()
    try:
        for block in stream_audio(io.BytesIO(content), name=name, note=notes.append):
            samples += len(block)
            if samples > limits.seconds * SAMPLE_RATE:
                raise Refused(413, f"{name}: more than {limits.seconds:g} s of sound", "file", "too_long")
            blocks.append(block)
    except MediaError as error:
        raise _refusal(error) from None
    return np.concatenate([np.zeros(0, np.float32), *blocks]), notes


def film_of(content: bytes, name: str, film: FilmConfig, limits: Limits) -> np.ndarray:
    """A film's tubelets, uint8 [time, rows, columns, values]."""
    _limited(limits)
    video.MAX_PIXELS, video.MAX_DECODED = limits.pixels, limits.frames
    try:
        return video.tubelets(video.load_film(io.BytesIO(content), film, name=name), film)
    except MediaError as error:
        raise _refusal(error) from None


def _refusal(error: MediaError) -> Refused:
    too_much = "more than the limit" in error.cause or "over the limit" in error.cause
    foreign = error.cause.startswith("a playlist")
    return Refused(413 if too_much else 415 if foreign else 400, str(error), "file", "unreadable_file")


class Readers:
    """A few processes that read files; one that a file has broken is replaced."""

    def __init__(self, limits: Limits, processes: int = 2) -> None:
        self.limits, self._processes = limits, processes
        self._pool = self._fresh()

    def _fresh(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(self._processes, get_context("spawn"), initializer=end_with_parent)

    async def read(self, function: Any, *given: Any) -> Any:
        """What :func:`sound_of` or :func:`film_of` makes of it. Raises ``Refused``."""
        pool = self._pool
        try:
            return await asyncio.get_running_loop().run_in_executor(pool, function, *given, self.limits)
        except BrokenProcessPool:
            if pool is self._pool:  # others whose reading broke off with it find the new one
                self._pool = self._fresh()
                pool.shutdown(wait=False, cancel_futures=True)
            raise Refused(400, "reading this file took too much memory or time", "file", "unreadable_file") from None

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
