"""Files of strangers are read in processes of their own, which may take so much memory and time and no more; no torch."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import threading
import time
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
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


def begin() -> None:
    """In a process of the server's: the parent says when it ends, also where a signal goes to all; and where the parent was
    killed, it ends within a second."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)


def _limited(limits: Limits) -> None:
    """So much more memory and CPU time than the process has taken up to now."""
    if resource is None:
        return
    pages = Path("/proc/self/statm")
    mapped = int(pages.read_text().split()[0]) * resource.getpagesize() if pages.exists() else 0
    for kind, most in (
        (resource.RLIMIT_AS, mapped + limits.memory),
        (resource.RLIMIT_CPU, int(time.process_time() + limits.decoding) + 1),
    ):
        resource.setrlimit(kind, (most, resource.getrlimit(kind)[1]))


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
        return np.concatenate([np.zeros(0, np.float32), *blocks]), notes
    except (MediaError, MemoryError) as error:
        raise _refusal(error, name) from None


def film_of(content: bytes, name: str, film: FilmConfig, limits: Limits) -> np.ndarray:
    """A film's tubelets, uint8 [time, rows, columns, values]."""
    _limited(limits)
    video.MAX_PIXELS, video.MAX_DECODED = limits.pixels, limits.frames
    try:
        return video.tubelets(video.load_film(io.BytesIO(content), film, name=name), film)
    except (MediaError, MemoryError) as error:
        raise _refusal(error, name) from None


def _refusal(error: MediaError | MemoryError, name: str) -> Refused:
    if isinstance(error, MemoryError) or isinstance(error.__context__, MemoryError):
        return Refused(413, f"{name}: it takes too much memory to read", "file", "too_large")
    too_much = "more than the limit" in error.cause or "over the limit" in error.cause
    foreign = error.cause.startswith("a playlist")
    return Refused(413 if too_much else 415 if foreign else 400, str(error), "file", "unreadable_file")


class Readers:
    """A few processes that read files; one that a file has broken is replaced, and costs no other file."""

    def __init__(self, limits: Limits, processes: int = 2) -> None:
        self.limits = limits
        self._free: asyncio.Queue[ProcessPoolExecutor] = asyncio.Queue()
        for _ in range(processes):
            self._free.put_nowait(self._fresh())

    @staticmethod
    def _fresh() -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, get_context("spawn"), initializer=begin)

    async def read(self, function: Any, *given: Any, expires: float) -> Any:
        """What :func:`sound_of` or :func:`film_of` makes of it. Raises ``Refused``."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(expires - time.monotonic()):
                reader = await self._free.get()
                reading = reader.submit(function, *given, self.limits)
                reading.add_done_callback(lambda done: loop.call_soon_threadsafe(self._give_back, reader, done))
                return await asyncio.wrap_future(reading)
        except TimeoutError:
            raise Refused(504, f"not done within {self.limits.deadline:g} s", code="deadline") from None
        except BrokenProcessPool:
            raise Refused(400, "reading this file took too much memory or time", "file", "unreadable_file") from None

    def _give_back(self, reader: ProcessPoolExecutor, done: Future[Any]) -> None:
        if not done.cancelled() and isinstance(done.exception(), BrokenProcessPool):
            reader.shutdown(wait=False)
            reader = self._fresh()
        self._free.put_nowait(reader)

    def close(self) -> None:
        while not self._free.empty():
            self._free.get_nowait().shutdown(wait=False, cancel_futures=True)
