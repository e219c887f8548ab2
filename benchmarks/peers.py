"""The systems of the benchmark: :mod:`whisper_moe.evaluate.systems`, with more forms and settings, and more peers.

Torch and the peers' packages are only imported when a system is chosen.
"""

# The peers are optional: type checking must pass without them.
# pyright: reportMissingImports=false

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from whisper_moe.config import FULL_WINDOW as WINDOW_SECONDS
from whisper_moe.config import SAMPLE_RATE as SAMPLE_RATE
from whisper_moe.evaluate.systems import (
    Adapter,
    FasterWhisper,
    Heard,
    OpenAIWhisper,
    Ours,
    Source,
    Transformers,
    converted,
    hub_folder,
    samples_of,
    to_ctranslate2,
    to_openai,
)
from whisper_moe.generate.options import TEMPERATURES

if TYPE_CHECKING:
    import numpy as np

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


def decode(path: str) -> np.ndarray:
    """Mono float32 samples at 16 kHz."""
    return samples_of(path)


def ours(
    job: Job, *, default: bool, margin: float | None = None, dtype: Literal["float32", "int8"] = "float32"
) -> Ours:
    """This project, with its own checkpoint or with the peers' weights."""
    from whisper_moe import WhisperMoE

    source = None if default else job.weights
    model = WhisperMoE.from_pretrained(source, device="cpu", dtype=dtype, threads=job.threads)
    return Ours(model, beam=job.beam, temperatures=job.temperatures, margin=margin)


class FasterWhisperWorkers(FasterWhisper):
    """faster-whisper, ``workers`` clips at a time with the threads divided among them."""

    batched = True

    def __init__(self, job: Job, dtype: str, workers: int) -> None:
        self.workers = workers
        told: dict[str, Any] = job.decoding | {"threads": max(1, job.threads // workers)}
        super().__init__(job.weights, dtype=dtype, num_workers=workers, **told)

    def each(self, sources: Iterable[Source], told: dict[str, Any]) -> Iterator[Heard]:
        with ThreadPoolExecutor(self.workers) as pool:
            yield from pool.map(partial(self.one, told), sources)


class FasterWhisperBatched(Adapter):
    """faster-whisper's BatchedInferencePipeline, which takes one recording and batches its windows.

    Short clips are laid end to end and named as its ``clip_timestamps``, so that they share batches too.
    Recordings over 30 s are cut by its own voice activity detection.
    """

    batched, timestamps = True, "vad_filter"

    def __init__(self, job: Job, dtype: str) -> None:
        from faster_whisper import BatchedInferencePipeline, WhisperModel

        model = WhisperModel(job.weights, device="cpu", compute_type=dtype, cpu_threads=job.threads)
        self.pipeline = BatchedInferencePipeline(model)
        # It has no fallback.
        fixed = {"temperature": 0.0, "without_timestamps": True}
        self.options = {"beam_size": job.beam, "batch_size": job.batch, **fixed}

    def each(self, sources: Iterable[Source], told: dict[str, Any]) -> Iterator[Heard]:
        told = told | {"multilingual": told["language"] is None}
        if not told["vad_filter"]:
            yield from self._end_to_end([samples_of(source) for source in sources], told)
            return
        for source in sources:
            segments = list(self.pipeline.transcribe(source, **told)[0])
            yield Heard("".join(each.text for each in segments), sum(len(each.tokens) for each in segments))

    def _end_to_end(self, clips: Sequence[np.ndarray], told: dict[str, Any]) -> list[Heard]:
        import numpy as np

        bounds = np.cumsum([0, *(len(clip) for clip in clips)]) / SAMPLE_RATE
        spans = [{"start": start, "end": end} for start, end in pairwise(bounds)]
        found, _ = self.pipeline.transcribe(np.concatenate(clips), clip_timestamps=spans, **told)
        segments = list(found)
        if len(segments) != len(clips):
            raise RuntimeError(f"{len(clips)} clips gave {len(segments)} segments: they cannot be told apart")
        return [Heard(segment.text, len(segment.tokens)) for segment in segments]


class WhisperCpp(Adapter):
    """whisper.cpp through pywhispercpp, one clip at a time. It is told all when it is loaded."""

    def __init__(self, job: Job) -> None:
        from pywhispercpp.model import Model

        self.options: dict[str, Any] = {
            "n_threads": job.threads,
            "language": job.language or "auto",
            "no_timestamps": not job.long,
            "temperature_inc": 0.2 if job.fallback else 0.0,
            "greedy": {"best_of": 1},
            "beam_search": {"beam_size": job.beam, "patience": -1.0},
        }
        quiet = {"print_progress": False, "redirect_whispercpp_logs_to": None}
        self.model = Model(job.weights, params_sampling_strategy=int(job.beam > 1), **quiet, **self.options)

    def each(self, sources: Iterable[Source], told: dict[str, Any]) -> Iterator[Heard]:
        for source in sources:
            yield Heard("".join(segment.text for segment in self.model.transcribe(samples_of(source))))


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


def peer(make: Callable[..., Adapter], job: Job, **more: Any) -> Adapter:
    return make(job.weights, **job.decoding, **more)


def transformers(job: Job) -> Adapter:
    return peer(Transformers, job, batch=job.batch)


def installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of a dotted name's package
        return False


def systems(model: str) -> dict[str, System]:
    """Every system by name, in the order of the tables."""
    own = {"modules": ("torch", "whisper_moe.api"), "packages": ("whisper-moe", "torch", "av")}
    fast = {"modules": ("faster_whisper",), "packages": ("faster-whisper", "ctranslate2", "av")}
    table: dict[str, System] = {}
    for name, form in (("ours", ""), (f"ours-{Path(model).name}", "hub")):
        make = partial(ours, default=not form)
        table[name] = System(make, form, **own)
        table[f"{name}-padded"] = System(partial(make, margin=WINDOW_SECONDS), form, **own)
        table[f"{name}-int8"] = System(partial(make, dtype="int8"), form, **own)
        table[f"{name}-int8-padded"] = System(partial(make, dtype="int8", margin=WINDOW_SECONDS), form, **own)
    for kind in ("int8", "float32"):
        name, form = f"faster-whisper-{kind}", f"ct2-{kind}"
        table[name] = System(partial(peer, FasterWhisper, dtype=kind), form, **fast)
        table[f"{name}-batched"] = System(partial(FasterWhisperBatched, dtype=kind), form, **fast)
        table[f"{name}-workers"] = System(partial(FasterWhisperWorkers, dtype=kind, workers=2), form, **fast)
    openai = ("openai-whisper", "torch")
    hugging = ("transformers", "torch", "av")
    table["openai-whisper"] = System(
        partial(peer, OpenAIWhisper), "openai", ("whisper", "torch"), openai, needs_ffmpeg=True
    )
    table["transformers"] = System(transformers, "hub", ("transformers", "torch"), hugging)
    table["whisper.cpp"] = System(WhisperCpp, "ggml", ("pywhispercpp.model",), ("pywhispercpp", "av"))
    return table
