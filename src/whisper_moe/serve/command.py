"""``whisper-moe serve``, and ``whisper-moe listen``: captions on the terminal."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import queue
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from signal import SIGINT
from types import FrameType, SimpleNamespace
from typing import Any

import av
import numpy as np
from av import AudioResampler
from av.error import FFmpegError

from whisper_moe.config import SAMPLE_RATE
from whisper_moe.generate.result import Transcription
from whisper_moe.jobs import UsageError, load
from whisper_moe.serve.guard import Limits
from whisper_moe.serve.live import Caption, Live

logger = logging.getLogger(__name__)

KEY = "WHISPER_MOE_API_KEY"
"""The environment variable with a key, or several with commas between."""
BLOCK = SAMPLE_RATE // 10
"""Samples that are read at a time."""


def serve(
    *,
    model: str | None,
    model_dir: Path | None,
    host: str,
    port: int,
    api_key_file: Path | None,
    insecure: bool,
    device: str,
    dtype: str,
    threads: int | None,
    **limits: Any,
) -> int:
    """Serve until a signal; returns the exit status. Raises ``ValueError`` for what cannot be started."""
    try:
        import uvicorn

        from whisper_moe.serve.app import Server
        from whisper_moe.serve.engine import Engine
    except ImportError as error:
        raise UsageError(f"serve needs {error.name}: pip install 'whisper-moe[serve]'") from None
    keys = keys_of(api_key_file)
    if not keys and not insecure and not _is_loopback(host):
        raise UsageError(f"{host} is open to others: give keys (--api-key-file, {KEY}), or --insecure")
    how = {"model": model, "model_dir": model_dir, "device": device, "dtype": dtype, "threads": threads or None}
    engine = Engine(how, Limits(**{name.removeprefix("max_"): value for name, value in limits.items()}))
    server = Server(engine, keys)

    class Draining(uvicorn.Server):
        """Says that it is not ready before it stops taking requests; those it has taken are answered."""

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            server.draining, self.force_exit, self.should_exit = True, self.should_exit and sig == SIGINT, True

        async def on_tick(self, counter: int) -> bool:
            return engine.broken.is_set() or await super().on_tick(counter)

    config = uvicorn.Config(
        server.app,
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=round(engine.limits.deadline) + 5,
        http="h11",  # which limits the size of headers
        h11_max_incomplete_event_size=16_384,
        ws_max_size=2 << 20,
        ws_max_queue=4,
        limit_concurrency=2 * engine.limits.queue,
        server_header=False,
    )
    logger.info("http://%s:%d, %s", host, port, "with keys" if keys else "without keys")
    Draining(config).run()
    return int(engine.broken.is_set())


def keys_of(file: Path | None) -> list[str]:
    """Keys from a file, one a line (``#`` begins a comment), and from the environment."""
    lines = file.read_text("utf-8").splitlines() if file else []
    own = [key.strip() for key in lines if key.strip() and not key.lstrip().startswith("#")]
    if file and not own:
        raise UsageError(f"{file}: has no key in it")
    return own + [key.strip() for key in os.environ.get(KEY, "").split(",") if key.strip()]


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


# Listening


def listen(*, input: str | None, language: str | None, **model: Any) -> int:
    """Until the sound ends; returns the exit status. ``model``: which one, and where, as :func:`load` takes it. Raises
    ``ValueError`` for a device that cannot be opened."""
    blocks = device_sound(input) if input else raw_sound()
    loaded = load(SimpleNamespace(**model), [language] if language else [])

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
