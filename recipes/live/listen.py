"""Captions on the terminal of what is being said, while it is said.

    python recipes/live/listen.py --input pulse:default
    ffmpeg -i talk.m4a -f s16le -ac 1 -ar 16000 - | python recipes/live/listen.py

Standard input is raw 16-bit mono at 16 kHz; a device is called as FFmpeg calls it, with its kind: pulse:default, alsa:hw:0,
avfoundation::0, dshow:audio=Microphone.
"""

from __future__ import annotations

import argparse
import asyncio
import queue
import sys
import threading
from collections.abc import Iterator

import av
import numpy as np
from av import AudioResampler
from av.error import FFmpegError

from whisper_moe import WhisperMoE
from whisper_moe.config import SAMPLE_RATE
from whisper_moe.generate.result import Transcription
from whisper_moe.serve.live import Caption, Live

BLOCK = SAMPLE_RATE // 10
"""Samples that are read at a time."""


def main(asked: argparse.Namespace) -> None:
    blocks = device_sound(asked.input) if asked.input else raw_sound()
    model = WhisperMoE.from_pretrained(asked.model)

    async def hear(samples: np.ndarray) -> Transcription:
        how = {"language": asked.language, "word_timestamps": True, "temperatures": (0.0,)}
        return await asyncio.to_thread(model.transcribe, samples, **how)

    asyncio.run(captions(Live(hear), blocks))


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
        raise SystemExit(f"--input {named}: {error}") from None
    resampler = AudioResampler("flt", "mono", SAMPLE_RATE)
    for frame in container.decode(audio=0):
        yield from (each.to_ndarray()[0] for each in resampler.resample(frame))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", help="a device; default: standard input")
    parser.add_argument("--language", help="by code or name; default: detected for each utterance")
    parser.add_argument("--model", help="default: the one that comes along")
    main(parser.parse_args())
