"""The systems that can be evaluated and compared, and the measurement of one of them on clips, best in a process of its own.

``NAME`` alone is this project's: a whisper-moe folder or any Whisper. ``transcripts:FILE`` is what any system wrote. Torch is
imported when a model is loaded, and not needed otherwise.

Load, warm up on the first clip, transcribe all clips as fast as it can, then some of them one at a time for the latency, then
the cross-entropy of the references. What one clip breaks costs that clip: its text counts as empty, and the error is kept.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread
from typing import Any, TypeAlias, TypeVar

import numpy as np

from whisper_moe.config import FULL_WINDOW, ModelConfig, model_name
from whisper_moe.data.sample import Sample
from whisper_moe.generate.options import TEMPERATURES
from whisper_moe.generate.result import mean_gates
from whisper_moe.machine import THREAD_VARIABLES, peak_bytes

Source: TypeAlias = str | np.ndarray
"""A file, or mono float32 samples at 16 kHz."""
T = TypeVar("T")
DEFAULT = "default"
"""The name of the model that comes along."""
CLIPS_AT_ONCE = 32
"""Clips whose sound is held at a time for the cross-entropy."""


@dataclass(frozen=True)
class Heard:
    """What one clip became."""

    text: str
    tokens: int | None = None
    """Tokens that were decoded, where the system says; those of tries that were given up are not among them."""
    experts: tuple[tuple[str, float], ...] = ()
    """Mean gate of each expert, *none* included; empty where there are none, or they are chosen per token."""
    fallbacks: int = 0
    """Windows that were decoded again."""
    error: str | None = None
    language: str | None = None
    """The language that it was taken for, where the system says."""


@dataclass
class Adapter:
    """A loaded system."""

    hear: Callable[..., Iterator[Heard]]
    """``(sources, *, language, task, long)`` → one result for each clip, in order. ``language`` None is detected. ``long``: over
    30 s, where the sequential peers need timestamps to move their window."""
    options: dict[str, Any]
    """What else it is told."""
    batched: bool = False
    """Whether it is given all clips at once, and one by one only for the latency."""
    model: Any = None
    """This project's ``WhisperMoE``."""
    margin: float | None = None
    """Seconds of silence after a clip, where the system has such a thing."""


def ours(model: Any, *, beam: int, temperatures: tuple[float, ...], margin: float | None) -> Adapter:
    """This project: all clips in one call, packed without padding. ``model``: a ``WhisperMoE``; ``margin``: None for its own.

    A clip that looks wrong with its margin is decoded again padded to 30 s, within the time; ``fallbacks`` counts them.
    """
    margin = model.context_margin if margin is None else margin
    options = {"beam_size": beam, "temperatures": temperatures, "context_margin": margin}

    def hear(sources: Iterable[Source], *, long: bool, **told: Any) -> Iterator[Heard]:
        for outcome in model.transcribe_each(sources, timestamps=long, **told, **options):
            if (result := outcome.transcription) is None:
                yield Heard("", error=str(outcome.error))
            else:
                tokens = sum(len(segment.tokens) for segment in result.segments)
                gates = mean_gates(result.segments)
                yield Heard(result.text, tokens, gates, result.fallbacks, language=result.language)

    return Adapter(hear, options, batched=True, model=model, margin=margin)


@dataclass(frozen=True)
class System:
    """A system by name; ``benchmarks/peers.py`` has more kinds."""

    kind: str
    name: str
    padded: bool = False
    """Every clip is padded to 30 s, whatever margin the model has of its own."""

    @classmethod
    def parse(cls, spec: str) -> System:
        """The system that ``spec`` names. Raises ``ValueError`` where it names none."""
        if not spec:
            raise ValueError(f"{spec!r} names no model")
        kind, _, name = spec.partition(":")
        if kind != "transcripts":
            return cls("ours", spec)
        if not Path(name).is_file():
            raise ValueError(f"{spec}: no such file")
        return cls(kind, name)

    @property
    def packages(self) -> tuple[str, ...]:
        """Those whose versions belong to its figures."""
        return ("whisper-moe", "torch", "av") if self.kind == "ours" else ()

    @property
    def label(self) -> str:
        """What it is called in the report."""
        name = model_name(Path(self.name)) if Path(self.name).exists() else self.name
        return f"{name}, padded" if self.padded else name if self.kind == "ours" else f"{self.kind}:{name}"

    @property
    def tasks(self) -> tuple[str, ...]:
        speech = ("transcribe", "translate")
        return (*speech, "translate-text", "sign") if self.kind == "transcripts" else speech

    @property
    def source(self) -> str | None:
        """What ``WhisperMoE.from_pretrained`` takes, for this project's models."""
        return None if self.name == DEFAULT and not Path(DEFAULT).exists() else self.name

    def weights(self) -> str:
        """Where its weights are, downloaded if need be."""
        if self.kind == "transcripts":
            return self.name
        from whisper_moe.weights.load import default, resolve

        return str(resolve(self.source or default()).path)


# The measurement


@dataclass(frozen=True, kw_only=True)
class Options:
    """How systems are measured."""

    device: str = "auto"
    """Of this project's models, like ``dtype``."""
    dtype: str = "auto"
    threads: int = 1
    beam: int = 1
    fallback: bool = True
    margin: float | None = None
    """None: each model's own; the first model is then measured with every clip padded to 30 s, too."""
    detect: bool = False
    """Let the system detect the language instead of telling it the clip's."""
    latency_clips: int = 40


@dataclass(frozen=True)
class Clip:
    """A sample that can be read, with the seconds that it really has."""

    corpus: str
    sample: Sample
    seconds: float

    @property
    def sound(self) -> np.ndarray:
        assert self.sample.audio is not None, self.sample.id
        return self.sample.audio.read()


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What came of it. ``None`` where a system does not say, or where nothing was timed."""

    heard: list[Heard]
    wall_seconds: float | None = None
    """For all clips, files decoded within the time."""
    cpu_seconds: float | None = None
    load_seconds: float | None = None
    latencies: list[float] = field(default_factory=list)
    """Seconds from a clip to its transcript, one at a time."""
    latencies_apart: bool = False
    """Whether they were measured after the job, since the system batches."""
    peak_bytes: int | None = None
    """Memory that the process has needed to transcribe; on a GPU, of the GPU's."""
    disk_bytes: int | None = None
    device: str = "cpu"
    dtype: str | None = None
    margin: float | None = None
    threads: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    machine_load_before: float | None = None
    config: ModelConfig | None = None
    """Of this project's models."""
    cross_entropies: list[tuple[float, int] | str] | None = None
    """Of each clip: the sum of −ln p over the reference's tokens and their number, or why there is none."""


def measure(system: System, weights: str, clips: Sequence[Clip], asked: Options, load: Callable[..., Any]) -> Measured:
    """Everything about one system, in this process: its peak memory is that of all the process has done.

    ``load`` is ``WhisperMoE.from_pretrained``.
    """
    if system.kind == "transcripts":
        return Measured(heard=_written(Path(weights), clips))
    adapter, measured = take_times(partial(_loaded, system, asked, load), weights, clips, asked)
    return _ours(adapter, clips, asked.detect, measured)


def take_times(
    load: Callable[[], Adapter], weights: str, clips: Sequence[Clip], asked: Options
) -> tuple[Adapter, Measured]:
    """What any system writes, its times and its memory. ``weights``: where they lie."""
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else None  # Windows has none
    begun = time.perf_counter()
    adapter = load()
    ready = time.perf_counter()
    _hear(adapter, clips[:1], asked.detect)
    cpu, start = time.process_time(), time.perf_counter()
    heard, latencies = hear_all(adapter, clips, asked.detect)
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    if adapter.batched:
        latencies = [_timed(adapter, [clip], asked.detect)[1] for clip in clips[: asked.latency_clips]]
    measured = Measured(
        heard=heard,
        wall_seconds=wall,
        cpu_seconds=cpu,
        load_seconds=ready - begun,
        latencies=latencies[: asked.latency_clips],  # of the same clips for every system
        latencies_apart=adapter.batched,
        peak_bytes=peak_bytes(),
        disk_bytes=disk_bytes(Path(weights)) or None,
        margin=adapter.margin,
        threads=asked.threads,
        options=adapter.options,
        machine_load_before=busy,
    )
    return adapter, measured


def _loaded(system: System, asked: Options, load: Callable[..., Any]) -> Adapter:
    model = load(system.source, device=asked.device, dtype=asked.dtype, threads=asked.threads)
    margin = FULL_WINDOW if system.padded else asked.margin
    return ours(model, beam=asked.beam, temperatures=TEMPERATURES if asked.fallback else (0.0,), margin=margin)


def _ours(adapter: Adapter, clips: Sequence[Clip], detect: bool, measured: Measured) -> Measured:
    """What only this project's models say about themselves."""
    from whisper_moe.data.examples import ExampleConfig, ExampleReader
    from whisper_moe.evaluate.metrics import Evaluator

    model, margin = adapter.model, adapter.margin or 0.0
    if model.device.startswith("cuda"):
        import torch

        measured = replace(measured, peak_bytes=torch.cuda.max_memory_allocated(model.device))
    measured = replace(measured, device=model.device, dtype=model.dtype, config=model.config)
    if model.config.moe and model.config.moe.granularity == "model":  # one pass would be the base's alone
        return measured
    samples = [clip.sample for clip in clips]
    if detect and not model.tokenizer.is_multilingual:
        samples = [replace(sample, language="en", target_language="en") for sample in samples]
    reading = ExampleConfig(empty_text=True, margin=min(margin, FULL_WINDOW))
    reader = ExampleReader(model.tokenizer, model.config, reading)
    evaluator = Evaluator(reader, model.tokenizer, model.generation, margin=margin)
    batches = (samples[first : first + CLIPS_AT_ONCE] for first in range(0, len(samples), CLIPS_AT_ONCE))
    found = [each for batch in batches for each in evaluator.batch(model.model, batch)]
    sums = [(each.cross_entropy, each.tokens) if each.skipped is None else each.skipped.cause for each in found]
    return replace(measured, cross_entropies=sums)


def hear_all(adapter: Adapter, clips: Sequence[Clip], detect: bool) -> tuple[list[Heard], list[float]]:
    """Every clip, and the seconds of each call. Where the system batches, those of one language and task are heard together, and
    long ones apart: it is told once for a batch."""
    groups: dict[Any, list[int]] = {}
    for index, clip in enumerate(clips):
        groups.setdefault(tuple(_told(clip, detect).values()) if adapter.batched else index, []).append(index)
    heard, waits = dict[int, Heard](), list[float]()
    for indices in groups.values():
        found, seconds = _timed(adapter, [clips[index] for index in indices], detect)
        heard |= zip(indices, found, strict=True)
        waits.append(seconds)
    return [heard[index] for index in range(len(clips))], waits


def _timed(adapter: Adapter, clips: Sequence[Clip], detect: bool) -> tuple[list[Heard], float]:
    start = time.perf_counter()
    return _hear(adapter, clips, detect), time.perf_counter() - start


def _hear(adapter: Adapter, clips: Sequence[Clip], detect: bool) -> list[Heard]:
    """Clips of which the system is told the same. What goes wrong with one alone is its result; with several, one of them may
    be to blame."""
    found: list[Heard] = []
    try:
        heard = adapter.hear((clip.sound for clip in clips), **_told(clips[0], detect))
        for _, each in zip(clips, heard, strict=True):
            found.append(each)
    except Exception as error:
        if len(clips) == 1:
            return [Heard("", error=f"{type(error).__name__}: {' '.join(str(error).split())}")]
        found += [_hear(adapter, [clip], detect)[0] for clip in clips[len(found) :]]
    return found


def _told(clip: Clip, detect: bool) -> dict[str, Any]:
    language = None if detect else clip.sample.language
    return {"language": language, "task": clip.sample.task, "long": clip.seconds > FULL_WINDOW}


def _written(file: Path, clips: Sequence[Clip]) -> list[Heard]:
    """What another system wrote: a TSV with the columns ``id`` and ``text``; a clip that it lacks is an error of that clip."""
    head, *rows = [line.split("\t") for line in file.read_text(encoding="utf-8-sig").split("\n") if line] or [[]]
    if not {"id", "text"} <= set(head):
        raise ValueError(f"{file}: row 1: the columns id and text are needed, found {head}")
    texts: dict[str, str] = {}
    for number, cells in enumerate(rows, start=2):
        if len(cells) != len(head):
            raise ValueError(f"{file}: row {number}: not as many columns as row 1")
        row = dict(zip(head, cells, strict=True))
        if row["id"] in texts:
            raise ValueError(f"{file}: row {number}: the id {row['id']!r} is there twice")
        texts[row["id"]] = row["text"]
    ids = [clip.sample.id for clip in clips]
    return [Heard(texts[id]) if id in texts else Heard("", error=f"{file} has no row {id!r}") for id in ids]


def disk_bytes(path: Path) -> int:
    """Bytes of the weights at ``path``, a file or a folder (safetensors only, where a folder has some)."""
    files = [path] if path.is_file() else [*path.rglob("*.safetensors")] or [*path.rglob("*.bin")]
    return sum(file.stat().st_size for file in files)


# A process of its own


class SystemFailed(RuntimeError):
    """What was done in a process of its own failed there, or took the process with it."""


def apart(work: Callable[..., T], *arguments: Any, threads: int | None = None) -> T:
    """What a function gives in a process of its own: its peak memory and its threads are its alone.

    Raises :class:`SystemFailed` for whatever goes wrong there.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(sender, work, arguments), daemon=True)
    before = dict(os.environ)
    try:
        os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(threads)) if threads else {})
        process.start()
    finally:
        os.environ.clear()
        os.environ.update(before)
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        process.join()
        cause = "killed, as by a system that is out of memory" if process.exitcode == -9 else "its process ended"
        raise SystemFailed(f"{cause} (exit status {process.exitcode})") from None
    finally:
        process.terminate()
        process.join()
    if isinstance(result, SystemFailed):
        raise result
    return result


def _serve(sender: Connection, work: Callable[..., Any], arguments: Sequence[Any]) -> None:
    Thread(target=_end_with_the_parent, daemon=True).start()
    os.dup2(2, 1)  # what a system prints is no part of the report
    try:
        sender.send(work(*arguments))
    except Exception as error:
        sender.send(SystemFailed(f"{type(error).__name__}: {' '.join(str(error).split())}"))


def _end_with_the_parent() -> None:
    """A parent that is killed cannot end its children, and nobody wants their results any more."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)
