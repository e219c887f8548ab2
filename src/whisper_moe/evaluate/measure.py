"""The measurement of one system on clips, best in a process of its own.

Load, warm up on the first clip, transcribe all clips as fast as it can, then some of them one at a time for the latency, then
the cross-entropy of the references. What one clip breaks costs that clip: its text counts as empty, and the error is kept.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from whisper_moe.config import FULL_WINDOW, ModelConfig
from whisper_moe.data.sample import Sample
from whisper_moe.evaluate.systems import PEERS, Adapter, Heard, Ours, System
from whisper_moe.generate.options import TEMPERATURES
from whisper_moe.machine import peak_bytes, unshare_cores

CLIPS_AT_ONCE = 32
"""Clips whose sound is held at a time for the cross-entropy."""


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
    config: ModelConfig | None = None
    """Of this project's models."""
    cross_entropies: list[tuple[float, int] | str] | None = None
    """Of each clip: the sum of −ln p over the reference's tokens and their number, or why there is none."""
    machine_load_before: float | None = None


def measure(system: System, weights: str, clips: Sequence[Clip], asked: Options, load: Callable[..., Any]) -> Measured:
    """Everything about one system, in this process: its peak memory is that of all the process has done.

    ``weights``: where a peer's are. ``load`` is ``WhisperMoE.from_pretrained``.
    """
    if system.kind == "transcripts":
        return Measured(heard=_written(Path(weights), clips))
    busy, begun = os.getloadavg()[0], time.perf_counter()
    adapter = _loaded(system, weights, asked, load)
    ready = time.perf_counter()
    _attempt(adapter, clips[0], asked.detect)
    cpu, start = time.process_time(), time.perf_counter()
    heard, latencies = _all(adapter, clips, asked.detect)
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    if adapter.batched:
        latencies = [_attempt(adapter, clip, asked.detect)[1] for clip in clips[: asked.latency_clips]]
    measured = Measured(
        heard=heard,
        wall=wall,
        cpu=cpu,
        latencies=latencies[: asked.latency_clips],  # of the same clips for every system
        latencies_apart=adapter.batched,
        peak=peak_bytes(),
        load=ready - begun,
        disk=disk_bytes(Path(weights)) or None,
        dtype=system.needs.dtype or None,
        threads=asked.threads,
        options=adapter.options,
        machine_load_before=busy,
    )
    return _ours(adapter, clips, asked, measured) if isinstance(adapter, Ours) else measured


def _loaded(system: System, weights: str, asked: Options, load: Callable[..., Any]) -> Adapter:
    decoding: dict[str, Any] = {"beam": asked.beam, "temperatures": TEMPERATURES if asked.fallback else (0.0,)}
    if system.kind == "ours":
        model = load(system.source, device=asked.device, dtype=asked.dtype, threads=asked.threads)
        return Ours(model, margin=FULL_WINDOW if system.padded else asked.margin, **decoding)
    unshare_cores()
    return PEERS[system.kind](weights, threads=asked.threads, **decoding)


def _ours(adapter: Ours, clips: Sequence[Clip], asked: Options, measured: Measured) -> Measured:
    """What only this project's models say about themselves."""
    model, peak = adapter.model, measured.peak
    if model.device.startswith("cuda"):
        import torch

        peak = torch.cuda.max_memory_allocated(model.device)
    samples = [clip.sample for clip in clips]
    if asked.detect and not model.tokenizer.is_multilingual:
        samples = [replace(sample, language="en", target_language="en") for sample in samples]
    return replace(
        measured,
        device=model.device,
        dtype=model.dtype,
        config=model.config,
        peak=peak,
        margin=adapter.margin,
        cross_entropies=_cross_entropies(model, samples, adapter.margin),
    )


def _cross_entropies(model: Any, samples: Sequence[Sample], margin: float) -> list[tuple[float, int] | str]:
    from whisper_moe.data.examples import ExampleConfig, ExampleReader
    from whisper_moe.evaluate.evaluator import Evaluator

    reading = ExampleConfig(empty_text=True, margin=min(margin, FULL_WINDOW))
    reader = ExampleReader(model.tokenizer, model.config, reading)
    evaluator = Evaluator(reader, model.tokenizer, model.generation, margin=margin)
    found: list[tuple[float, int] | str] = []
    for first in range(0, len(samples), CLIPS_AT_ONCE):
        for each in evaluator.batch(model.model, samples[first : first + CLIPS_AT_ONCE]):
            found.append((each.cross_entropy, each.tokens) if each.skipped is None else each.skipped.cause)
    return found


def _all(adapter: Adapter, clips: Sequence[Clip], detect: bool) -> tuple[list[Heard], list[float]]:
    """Every clip; where the system batches, those of one language and task, and long ones apart: it is told once for a batch."""
    if not adapter.batched:
        pairs = [_attempt(adapter, clip, detect) for clip in clips]
        return [heard for heard, _ in pairs], [seconds for _, seconds in pairs]
    heard: dict[int, Heard] = {}
    groups: dict[tuple[tuple[str, Any], ...], list[int]] = {}
    for index, clip in enumerate(clips):
        groups.setdefault(tuple(_told(clip, detect).items()), []).append(index)
    for told, indices in groups.items():
        try:
            sounds = (clips[index].sound for index in indices)
            for index, result in zip(indices, adapter.hear(sounds, **dict(told)), strict=True):
                heard[index] = result
        except Exception:  # one of them may be to blame
            heard |= {index: _attempt(adapter, clips[index], detect)[0] for index in indices if index not in heard}
    return [heard[index] for index in range(len(clips))], []


def _attempt(adapter: Adapter, clip: Clip, detect: bool) -> tuple[Heard, float]:
    """One clip alone, and its seconds; whatever goes wrong with it is its result."""
    start = time.perf_counter()
    try:
        (heard,) = adapter.hear([clip.sound], **_told(clip, detect))
    except Exception as error:
        heard = Heard("", error=f"{type(error).__name__}: {' '.join(str(error).split())}")
    return heard, time.perf_counter() - start


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
        row = dict(zip(head, cells, strict=False))
        if len(cells) != len(head) or row["id"] in texts:
            cause = (
                f"the id {row['id']!r} is there twice" if len(cells) == len(head) else "not as many columns as row 1"
            )
            raise ValueError(f"{file}: row {number}: {cause}")
        texts[row["id"]] = row["text"]
    ids = [clip.sample.id for clip in clips]
    return [Heard(texts[id]) if id in texts else Heard("", error=f"{file} has no row {id!r}") for id in ids]


def disk_bytes(path: Path) -> int:
    """Bytes of the weights at ``path``, a file or a folder (safetensors only, where a folder has some)."""
    if not path.is_dir():
        return path.stat().st_size if path.exists() else 0
    for suffix in ("*.safetensors", "*.bin"):
        if files := list(path.rglob(suffix)):
            return sum(file.stat().st_size for file in files)
    return 0
