"""The measurement of one system, in a process of its own: its peak memory and its threads are its alone.

Load, warm up on the first clip, transcribe all clips as fast as it can, then some of them one at a time for the latency, then
the cross-entropy of the references. What one clip breaks costs that clip: its text counts as empty, and the error is kept.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from threading import Thread
from typing import Any

import numpy as np

from whisper_moe.config import FULL_WINDOW
from whisper_moe.evaluate.convert import disk_bytes
from whisper_moe.evaluate.material import Clip
from whisper_moe.evaluate.peers import Adapter, Heard, Ours, Setup, WrittenTranscripts
from whisper_moe.evaluate.systems import System, loaded
from whisper_moe.machine import THREAD_VARIABLES, peak_bytes

CLIPS_AT_ONCE = 32
"""Clips whose sound is held at a time for the cross-entropy."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one process does."""

    system: System
    clips: tuple[Clip, ...]
    setup: Setup
    device: str = "cpu"
    dtype: str = "auto"
    margin: float | None
    detect: bool = False
    """Let the system detect the language instead of telling it the clip's."""
    latency_clips: int = 0


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What came of it. ``None`` where a system does not say, or where nothing was timed."""

    heard: list[Heard]
    wall: float | None = None
    """Seconds for all clips, files decoded within the time."""
    cpu: float | None = None
    latencies: list[float] = field(default_factory=list)
    """Seconds from a clip to its transcript, one at a time."""
    latencies_apart: bool = False
    """Whether they were measured after the job, since the system batches."""
    peak: int | None = None
    """Bytes of memory that the process has needed to transcribe; on a GPU, of the GPU's."""
    load: float | None = None
    disk: int | None = None
    device: str = "cpu"
    dtype: str | None = None
    margin: float | None = None
    """Seconds of silence after a clip, where the system has such a thing."""
    threads: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    """The model's own configuration, of this project's models."""
    surprise: list[tuple[float, int] | str] | None = None
    """Of each clip: the sum of −ln p over the reference's tokens and their number, or why there is none."""
    machine_load_before: float | None = None


class SystemFailed(RuntimeError):
    """A system that could not be loaded, or whose process ended before it was done."""


def measure_apart(work: Work, load: Callable[..., Any], progress: Callable[[float], None] | None = None) -> Measured:
    """:func:`measure` in a process of its own. ``progress`` is told the seconds of audio that are done.

    Raises :class:`SystemFailed` for whatever goes wrong there.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(sender, work, load), daemon=True)
    with _threads(work.setup.threads):
        process.start()
    sender.close()
    try:
        while True:
            kind, value = receiver.recv()
            if kind == "done":
                return value
            if kind == "failed":
                raise SystemFailed(f"{work.system.label}: {value}")
            if progress is not None:
                progress(value)
    except EOFError:
        process.join()
        cause = "killed, as by a system that is out of memory" if process.exitcode == -9 else "its process ended"
        raise SystemFailed(f"{work.system.label}: {cause} (exit status {process.exitcode})") from None
    finally:
        receiver.close()
        if process.is_alive():
            process.terminate()
        process.join()


def _serve(sender: Connection, work: Work, load: Callable[..., Any]) -> None:
    Thread(target=_end_with_the_parent, daemon=True).start()
    os.dup2(2, 1)  # what a system prints is no part of the report
    try:
        sender.send(("done", measure(work, load, lambda seconds: sender.send(("progress", seconds)))))
    except Exception as error:
        sender.send(("failed", f"{type(error).__name__}: {' '.join(str(error).split())}"))


def _end_with_the_parent() -> None:
    """A parent that is killed cannot end its children, and nobody wants their figures any more."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """What numeric libraries of a process started in here will be told."""
    before = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(count)))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def measure(work: Work, load: Callable[..., Any], progress: Callable[[float], None] = lambda _: None) -> Measured:
    """Everything about one system, in this process: its peak memory is that of all the process has done."""
    busy, begun = os.getloadavg()[0], time.perf_counter()
    adapter = loaded(
        work.system, work.setup, load, device=work.device, dtype=work.dtype, margin=work.margin
    )  # fmt: skip
    if isinstance(adapter, WrittenTranscripts):
        return Measured(heard=[adapter.of(clip.sample.id) for clip in work.clips])
    ready = time.perf_counter()
    _attempt(adapter, work, work.clips[0])
    cpu, start = time.process_time(), time.perf_counter()
    heard, latencies = _all(adapter, work, progress)
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    if adapter.batched:
        latencies = [_attempt(adapter, work, clip)[1] for clip in work.clips[: work.latency_clips]]
    latencies = latencies[: work.latency_clips]  # of the same clips for every system
    measured = Measured(
        heard=heard, wall=wall, cpu=cpu, latencies=latencies, latencies_apart=adapter.batched, peak=peak_bytes(),
        load=ready - begun, dtype=work.system.dtype, threads=work.setup.threads, options=_plain(adapter.options),
        machine_load_before=busy, disk=_disk(adapter),
    )  # fmt: skip
    return _ours(adapter, work, measured) if isinstance(adapter, Ours) else measured


def _disk(adapter: Adapter) -> int | None:
    """Bytes of a peer's weights, where they lie in a file or folder of their own; the report knows this project's."""
    if isinstance(adapter, Ours) or not adapter.weights.exists():
        return None
    return disk_bytes(adapter.weights)


def _ours(adapter: Ours, work: Work, measured: Measured) -> Measured:
    """What only this project's models say about themselves."""
    model = adapter.model
    peak = measured.peak
    if model.device.startswith("cuda"):
        import torch

        peak = torch.cuda.max_memory_allocated(model.device)
    surprise = _cross_entropies(model, work, adapter.margin)
    return replace(
        measured, device=model.device, dtype=model.dtype, config=model.config.model_dump(mode="json"), peak=peak,
        surprise=surprise, margin=adapter.margin,
    )  # fmt: skip


def _cross_entropies(model: Any, work: Work, margin: float) -> list[tuple[float, int] | str]:
    """Of each clip's reference the sum of −ln p and the number of its tokens, or why there is none."""
    from whisper_moe.data.examples import ExampleConfig, ExampleReader
    from whisper_moe.data.sample import TooLong
    from whisper_moe.evaluate.evaluator import Evaluator

    reading = ExampleConfig(empty_text=True, margin=min(margin, FULL_WINDOW))
    reader = ExampleReader(model.tokenizer, model.config, reading)
    evaluator = Evaluator(reader, model.tokenizer, model.generation, margin=margin)
    samples = [clip.sample for clip in work.clips]
    if work.detect and not model.tokenizer.is_multilingual:
        samples = [replace(sample, language="en", target_language="en") for sample in samples]
    found: list[tuple[float, int] | str] = []
    for first in range(0, len(samples), CLIPS_AT_ONCE):
        for each in evaluator.batch(model.model, samples[first : first + CLIPS_AT_ONCE]):
            cause = each.error.cause if isinstance(each.error, TooLong) else str(each.error)
            found.append((each.cross_entropy, each.tokens) if each.error is None else cause)
    return found


def _all(adapter: Adapter, work: Work, progress: Callable[[float], None]) -> tuple[list[Heard], list[float]]:
    """Every clip; where the system batches, those of one language and task, and long ones apart: it is told once for a batch."""
    if not adapter.batched:
        pairs = []
        for clip in work.clips:
            pairs.append(_attempt(adapter, work, clip))
            progress(clip.seconds)
        return [heard for heard, _ in pairs], [seconds for _, seconds in pairs]
    heard: dict[int, Heard] = {}
    groups: dict[tuple[tuple[str, Any], ...], list[int]] = {}
    for index, clip in enumerate(work.clips):
        groups.setdefault(tuple(_asked(work, clip).items()), []).append(index)
    for asked, indices in groups.items():
        clips = [work.clips[index] for index in indices]
        for index, result in zip(indices, _batch(adapter, work, clips, dict(asked), progress), strict=True):
            heard[index] = result
    return [heard[index] for index in range(len(work.clips))], []


def _batch(
    adapter: Adapter, work: Work, clips: Sequence[Clip], asked: dict[str, Any], progress: Callable[[float], None]
) -> list[Heard]:
    """A batch that fails is tried clip by clip: one of them may be to blame."""
    results: list[Heard] = []
    try:
        for result, clip in zip(adapter.hear(map(_sound, clips), **asked), clips, strict=True):
            results.append(result)
            progress(clip.seconds)
    except Exception:
        return results + [_attempt(adapter, work, clip)[0] for clip in clips[len(results) :]]
    return results


def _attempt(adapter: Adapter, work: Work, clip: Clip) -> tuple[Heard, float]:
    """One clip alone, and its seconds; whatever goes wrong with it is its result."""
    start = time.perf_counter()
    try:
        (heard,) = adapter.hear([_sound(clip)], **_asked(work, clip))
    except Exception as error:
        heard = Heard("", error=f"{type(error).__name__}: {' '.join(str(error).split())}")
    return heard, time.perf_counter() - start


def _asked(work: Work, clip: Clip) -> dict[str, Any]:
    language = None if work.detect else clip.sample.language
    return {"language": language, "task": clip.sample.task, "long": clip.seconds > FULL_WINDOW}


def _sound(clip: Clip) -> np.ndarray:
    assert clip.sample.audio is not None, clip.sample.id
    return clip.sample.audio.read()


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in options.items()}
