"""The systems of the benchmark: :mod:`whisper_moe.evaluate.systems`, with more forms and settings, and more peers.

Torch and the peers' packages are only imported when a system is chosen.
"""

# The peers are optional: type checking must pass without them.
# pyright: reportMissingImports=false

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from whisper_moe.config import FULL_WINDOW, SAMPLE_RATE
from whisper_moe.evaluate.systems import (
    Adapter,
    Heard,
    Source,
    converted,
    faster_whisper,
    hub_folder,
    openai_whisper,
    ours,
    samples_of,
    to_ctranslate2,
    to_openai,
    transformers,
)
from whisper_moe.generate.options import TEMPERATURES

CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one process measures."""

    system: str
    clips: tuple[str, ...]
    long: bool
    """Whether the clips are over 30 s: the sequential peers need timestamps to move their window."""
    model: str
    weights: str
    threads: int
    language: str | None = None
    """None: the system detects it."""
    beam: int = 1
    batch: int = 8
    """Clips or windows in a batch of the batching peers."""
    fallback: bool = True
    passes: int = 1
    latency_clips: int = 0
    """How many clips a batching system also runs one by one, after the timed job."""

    @property
    def temperatures(self) -> tuple[float, ...]:
        return TEMPERATURES if self.fallback else (0.0,)

    @property
    def decoding(self) -> dict[str, Any]:
        """What every peer is told."""
        return {"threads": self.threads, "beam": self.beam, "temperatures": self.temperatures}


def own(job: Job, *, margin: float | None = None, dtype: Literal["float32", "int8"] = "float32") -> Adapter:
    """This project, with the weights of the job."""
    from whisper_moe import WhisperMoE

    model = WhisperMoE.from_pretrained(job.weights, device="cpu", dtype=dtype, threads=job.threads)
    return ours(model, beam=job.beam, temperatures=job.temperatures, margin=margin)


def faster_whisper_workers(job: Job, dtype: str, workers: int = 2) -> Adapter:
    """faster-whisper, ``workers`` clips at a time with the threads divided among them."""
    told: dict[str, Any] = job.decoding | {"threads": max(1, job.threads // workers)}
    alone = faster_whisper(job.weights, dtype=dtype, num_workers=workers, **told)

    def hear(sources: Iterable[Source], **told: Any) -> Iterator[Heard]:
        with ThreadPoolExecutor(workers) as pool:
            yield from pool.map(lambda source: next(alone.hear([source], **told)), sources)

    return replace(alone, hear=hear, batched=True)


def faster_whisper_batched(job: Job, dtype: str) -> Adapter:
    """faster-whisper's BatchedInferencePipeline, which takes one recording and batches its windows."""
    from faster_whisper import BatchedInferencePipeline, WhisperModel

    model = WhisperModel(job.weights, device="cpu", compute_type=dtype, cpu_threads=job.threads)
    # It has no fallback.
    options = {"beam_size": job.beam, "batch_size": job.batch, "temperature": 0.0, "without_timestamps": True}
    return Adapter(partial(hear_in_batches, BatchedInferencePipeline(model), options), options, batched=True)


def hear_in_batches(
    pipeline: Any, options: dict[str, Any], sources: Iterable[Source], *, long: bool, **told: Any
) -> Iterator[Heard]:
    """Short clips are laid end to end and named as its ``clip_timestamps``, so that they share batches too.
    Recordings over 30 s are cut by its own voice activity detection.
    """
    told |= options | {"multilingual": told["language"] is None, "vad_filter": long}
    if long:
        for source in sources:
            segments = list(pipeline.transcribe(source, **told)[0])
            yield Heard("".join(each.text for each in segments), sum(len(each.tokens) for each in segments))
        return
    clips = [samples_of(source) for source in sources]
    bounds = np.cumsum([0, *(len(clip) for clip in clips)]) / SAMPLE_RATE
    spans = [{"start": start, "end": end} for start, end in pairwise(bounds)]
    segments = list(pipeline.transcribe(np.concatenate(clips), clip_timestamps=spans, **told)[0])
    if len(segments) != len(clips):
        raise RuntimeError(f"{len(clips)} clips gave {len(segments)} segments: they cannot be told apart")
    yield from (Heard(segment.text, len(segment.tokens)) for segment in segments)


def whisper_cpp(job: Job) -> Adapter:
    """whisper.cpp through pywhispercpp, one clip at a time. It is told all when it is loaded."""
    from pywhispercpp.model import Model

    options: dict[str, Any] = {
        "n_threads": job.threads,
        "language": job.language or "auto",
        "no_timestamps": not job.long,
        "temperature_inc": 0.2 if job.fallback else 0.0,
        "greedy": {"best_of": 1},
        "beam_search": {"beam_size": job.beam, "patience": -1.0},
    }
    quiet = {"print_progress": False, "redirect_whispercpp_logs_to": None}
    model = Model(job.weights, params_sampling_strategy=int(job.beam > 1), **quiet, **options)

    def hear(sources: Iterable[Source], **_: Any) -> Iterator[Heard]:
        for source in sources:
            yield Heard("".join(segment.text for segment in model.transcribe(samples_of(source))))

    return Adapter(hear, options)


@dataclass(frozen=True)
class System:
    """How to build an adapter, and what must be there for it."""

    make: Callable[[Job], Adapter]
    form: str
    """The format of its weights, as :func:`weights_of` knows it; "" for the project's own checkpoint."""
    modules: tuple[str, ...]
    packages: tuple[str, ...]
    needs_ffmpeg: bool = False

    def missing(self) -> str | None:
        """Why this system cannot run here, or None."""
        absent = [module for module in self.modules if not installed(module)]
        if absent:
            return f"{', '.join(absent)} not installed"
        if self.needs_ffmpeg and not shutil.which("ffmpeg"):
            return "no ffmpeg program on PATH"
        return None


def weights_of(form: str, model: str, cache: Path) -> str:
    """Where a Whisper lies in a format: ``hub``, ``ct2-float32``, ``ct2-int8``, ``openai``, ``ggml``; converted if need be."""
    if form in ("", "hub"):
        return hub_folder(model) if form else str(CHECKPOINTS)
    if form == "ggml":
        from ggml import to_ggml

        return converted(model, form, to_ggml, cache)
    return converted(model, form, to_openai if form == "openai" else partial(to_ctranslate2, form[4:]), cache)


def peer(load: Callable[..., Adapter], job: Job, **more: Any) -> Adapter:
    return load(job.weights, **job.decoding, **more)


def installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of a dotted name's package
        return False


def systems(model: str) -> dict[str, System]:
    """Every system by name, in the order of the tables."""
    torch = {"modules": ("torch", "whisper_moe.api"), "packages": ("whisper-moe", "torch", "av")}
    fast = {"modules": ("faster_whisper",), "packages": ("faster-whisper", "ctranslate2", "av")}
    table: dict[str, System] = {}
    for name, form in (("ours", ""), (f"ours-{Path(model).name}", "hub")):
        for suffix, more in (("", {}), ("-int8", {"dtype": "int8"})):
            table[name + suffix] = System(partial(own, **more), form, **torch)
            table[f"{name}{suffix}-padded"] = System(partial(own, margin=FULL_WINDOW, **more), form, **torch)
    for kind in ("int8", "float32"):
        name, form = f"faster-whisper-{kind}", f"ct2-{kind}"
        table[name] = System(partial(peer, faster_whisper, dtype=kind), form, **fast)
        table[f"{name}-batched"] = System(partial(faster_whisper_batched, dtype=kind), form, **fast)
        table[f"{name}-workers"] = System(partial(faster_whisper_workers, dtype=kind), form, **fast)
    openai = partial(peer, openai_whisper)
    table["openai-whisper"] = System(
        openai, "openai", ("whisper", "torch"), ("openai-whisper", "torch"), needs_ffmpeg=True
    )
    hugging = ("transformers", "torch", "av")
    table["transformers"] = System(
        lambda job: peer(transformers, job, batch=job.batch), "hub", ("transformers", "torch"), hugging
    )
    table["whisper.cpp"] = System(whisper_cpp, "ggml", ("pywhispercpp.model",), ("pywhispercpp", "av"))
    return table
