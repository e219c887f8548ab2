"""``whisper-moe listen``: captions on the terminal."""

from __future__ import annotations

import asyncio
import queue
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
from av import AudioResampler
from av.error import FFmpegError

from whisper_moe.config import SAMPLE_RATE
from whisper_moe.generate.result import Transcription
from whisper_moe.jobs import UsageError, load
from whisper_moe.serve.live import Caption, Live

BLOCK = SAMPLE_RATE // 10
"""Samples that are read at a time."""


def listen(
    *,
    input: str | None,
    language: str | None,
    model: str | None,
    model_dir: Path | None,
    device: str,
    dtype: str,
    threads: int | None,
) -> int:
    """Until the sound ends; returns the exit status. Raises ``ValueError`` for a device that cannot be opened."""
    blocks = device_sound(input) if input else raw_sound()
    flags = SimpleNamespace(model=model, model_dir=model_dir, device=device, dtype=dtype, threads=threads)
    loaded = load(flags, [language] if language else [])

    async def hear(samples: np.ndarray) -> Transcription:
        how = {"language": language, "word_timestamps": True, "temperatures": (0.0,)}
        return await asyncio.to_thread(loaded.transcribe, samples, **how)

    asyncio.run(captions(Live(hear), blocks))
    return 0


async def captions(live: Live, blocks: Iterator[np.ndarray]) -> None:
    """Reads in a thread, so that nothing is missed while the model listens."""
    sound: queue.SimpleQueue[np.ndarray | None] = queue.SimpleQueue()

    def read() -> None:
        try:
            for block in blocks:
                sound.put(block)
        finally:
            sound.put(None)

    threading.Thread(target=read, daemon=True).start()
    ended = False
    while not ended:
        block = await asyncio.to_thread(sound.get)
        while block is not None:
            live.append(block)
            if sound.empty():
                break
            block = sound.get()
        ended = block is None
        if ended or live.waiting:
            async for caption in live.look(end=ended):
                show(caption)


def show(caption: Caption) -> None:
    """What is final to standard output; what may change after it, where somebody looks on."""
    watched = sys.stdout.isatty()
    print("\x1b[K" * watched + caption.final, end="\n" * caption.ended, flush=True)
    if watched and caption.open:
        print(f"\x1b[2m\x1b7{caption.open}\x1b8\x1b[0m", end="", flush=True)


def raw_sound() -> Iterator[np.ndarray]:
    """Standard input."""
    while content := sys.stdin.buffer.read(2 * BLOCK):
        yield np.frombuffer(content[: len(content) // 2 * 2], "<i2") / np.float32(32_768)


def device_sound(named: str) -> Iterator[np.ndarray]:
    kind, _, name = named.partition(":")
    try:
        container = av.open(name, format=kind)
    except (FFmpegError, ValueError, OSError) as error:
        raise UsageError(f"--input {named}: {error}") from None
    resampler = AudioResampler("flt", "mono", SAMPLE_RATE)
    for frame in container.decode(audio=0):
        yield from (each.to_ndarray()[0] for each in resampler.resample(frame))
