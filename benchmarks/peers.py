"""The systems that are compared: how each is loaded, and how it turns files into transcripts.

Each adapter decodes as its users would, greedily or with the same beam, with the same fallback temperatures where it has
any; whatever else it was told is in ``options``. Only the standard library is imported until a system is chosen.
"""

# The peers are optional: type checking must pass without them.
# pyright: reportMissingImports=false

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import numpy as np

SAMPLE_RATE = 16_000
WINDOW_SECONDS = 30.0
FALLBACK = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"


@dataclass(frozen=True)
class Job:
    """What one process measures. ``language`` None means that the system detects it."""

    system: str
    clips: tuple[str, ...]
    longest: float
    """Seconds of the longest clip: over 30 s the sequential peers need timestamps to move their window."""
    model: str
    weights: str
    threads: int
    language: str | None
    beam: int
    batch: int
    fallback: bool
    passes: int
    latency_clips: int
    """How many clips a batching system also runs one by one, after the timed job."""

    @property
    def long(self) -> bool:
        return self.longest > WINDOW_SECONDS

    @property
    def temperatures(self) -> tuple[float, ...]:
        return FALLBACK if self.fallback else (0.0,)


class Adapter(Protocol):
    """A loaded system. ``batched``: it is given all clips at once, and one by one only for the latency."""

    batched: bool
    options: dict[str, Any]
    weights: Path

    def transcribe(self, paths: Sequence[str]) -> list[str]:
        """One transcript for each file, in order."""
        ...


def decode(path: str) -> np.ndarray:
    """Mono float32 samples at 16 kHz, for peers that bring no decoder (PyAV)."""
    import av
    import numpy as np

    resampler = av.AudioResampler("s16", "mono", SAMPLE_RATE)
    with av.open(path, metadata_errors="ignore") as container:
        frames = [out for frame in container.decode(audio=0) for out in resampler.resample(frame)]
        frames += resampler.resample(None)
    samples = np.concatenate([frame.to_ndarray().reshape(-1) for frame in frames])
    return samples.astype(np.float32) / 32_768


class Ours:
    """This project: all files in one call, packed without padding; ``margin`` None is its default.

    A clip that looks wrong with its margin is decoded again padded to 30 s, within the time; ``fallbacks`` counts them.
    """

    batched = True

    def __init__(
        self, job: Job, *, default: bool, margin: float | None = None, dtype: Literal["float32", "int8"] = "float32"
    ) -> None:
        from whisper_moe import WhisperMoE
        from whisper_moe.generate.options import DEFAULT_MARGIN

        self.weights = CHECKPOINTS if default else Path(job.weights)
        source = None if default else job.weights
        self.model = WhisperMoE.from_pretrained(source, device="cpu", dtype=dtype, threads=job.threads)
        self.options: dict[str, Any] = {
            "language": job.language,
            "task": "transcribe",
            "beam_size": job.beam,
            "temperatures": job.temperatures,
            "timestamps": job.long,
            "context_margin": DEFAULT_MARGIN if margin is None else margin,
        }
        self.fallbacks = 0

    def transcribe(self, paths: Sequence[str]) -> list[str]:
        results = self.model.transcribe(list(paths), **self.options)
        self.fallbacks = sum(result.fallbacks for result in results)
        return [result.text for result in results]


class FasterWhisper:
    """faster-whisper, one file at a time, or ``workers`` files at a time with the threads divided among them."""

    batched = False

    def __init__(self, job: Job, *, compute_type: str, workers: int = 1) -> None:
        from faster_whisper import WhisperModel

        self.weights, self.batched, self.workers = Path(job.weights), workers > 1, workers
        threads = max(1, job.threads // workers)
        self.model = WhisperModel(
            job.weights, device="cpu", compute_type=compute_type, cpu_threads=threads, num_workers=workers
        )
        self.options: dict[str, Any] = {
            "language": job.language,
            "beam_size": job.beam,
            "temperature": list(job.temperatures),
            "condition_on_previous_text": False,
            "without_timestamps": not job.long,
        }

    def one(self, path: str) -> str:
        segments, _ = self.model.transcribe(path, **self.options)
        return "".join(segment.text for segment in segments)

    def transcribe(self, paths: Sequence[str]) -> list[str]:
        if self.workers == 1:
            return [self.one(path) for path in paths]
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(self.one, paths))


class FasterWhisperBatched:
    """faster-whisper's BatchedInferencePipeline, which takes one recording and batches its windows.

    Short files are laid end to end and named as its ``clip_timestamps``, so that they share batches too.
    Recordings over 30 s are cut by its own voice activity detection.
    """

    batched = True

    def __init__(self, job: Job, *, compute_type: str) -> None:
        from faster_whisper import BatchedInferencePipeline, WhisperModel

        self.weights, self.long = Path(job.weights), job.long
        model = WhisperModel(job.weights, device="cpu", compute_type=compute_type, cpu_threads=job.threads)
        self.pipeline = BatchedInferencePipeline(model)
        self.options: dict[str, Any] = {
            "language": job.language,
            "multilingual": job.language is None,
            "beam_size": job.beam,
            "temperature": 0.0,  # it has no fallback
            "batch_size": job.batch,
            "without_timestamps": True,
            "vad_filter": job.long,
        }

    def transcribe(self, paths: Sequence[str]) -> list[str]:
        if self.long:
            found = [self.pipeline.transcribe(path, **self.options)[0] for path in paths]
            return ["".join(segment.text for segment in segments) for segments in found]
        return self._end_to_end([decode(path) for path in paths])

    def _end_to_end(self, clips: Sequence[np.ndarray]) -> list[str]:
        import numpy as np

        bounds = np.cumsum([0, *(len(clip) for clip in clips)]) / SAMPLE_RATE
        spans = [{"start": start, "end": end} for start, end in pairwise(bounds)]
        found, _ = self.pipeline.transcribe(np.concatenate(clips), clip_timestamps=spans, **self.options)
        segments = list(found)
        if len(segments) != len(clips):
            raise RuntimeError(f"{len(clips)} clips gave {len(segments)} segments: they cannot be told apart")
        return [segment.text for segment in segments]


class OpenAIWhisper:
    """openai-whisper, one file at a time; it decodes with the ``ffmpeg`` program."""

    batched = False

    def __init__(self, job: Job) -> None:
        import torch
        import whisper

        torch.set_num_threads(job.threads)
        self.weights = Path(job.weights)
        self.model = whisper.load_model(job.weights, device="cpu")
        self.options: dict[str, Any] = {
            "language": job.language,
            "beam_size": job.beam if job.beam > 1 else None,
            "temperature": job.temperatures,
            "condition_on_previous_text": False,
            "without_timestamps": not job.long,
            "fp16": False,
        }

    def transcribe(self, paths: Sequence[str]) -> list[str]:
        return [str(self.model.transcribe(path, **self.options)["text"]) for path in paths]


class Transformers:
    """transformers' ``generate`` in float32 on batches of files, as its pipeline calls it."""

    batched = True

    def __init__(self, job: Job) -> None:
        import torch
        from transformers import AutoProcessor, WhisperForConditionalGeneration

        torch.set_num_threads(job.threads)
        self.weights, self.batch, self.long = Path(job.weights), job.batch, job.long
        self.processor: Any = AutoProcessor.from_pretrained(job.weights)
        self.model = WhisperForConditionalGeneration.from_pretrained(job.weights, dtype=torch.float32).eval()
        self.options: dict[str, Any] = {
            "language": job.language,
            "task": "transcribe",
            "num_beams": job.beam,
            "temperature": job.temperatures if job.fallback else 0.0,
            "return_timestamps": job.long,
            "condition_on_prev_tokens": False,
        }
        if job.fallback:
            self.options |= {"compression_ratio_threshold": 1.35, "logprob_threshold": -1.0}

    def transcribe(self, paths: Sequence[str]) -> list[str]:
        batches = (paths[start : start + self.batch] for start in range(0, len(paths), self.batch))
        return [text for batch in batches for text in self._one_batch(batch)]

    def _one_batch(self, paths: Sequence[str]) -> list[str]:
        import torch

        padding = {"truncation": False, "padding": "longest"} if self.long else {}
        inputs = self.processor(
            [decode(path) for path in paths],
            sampling_rate=SAMPLE_RATE,
            return_tensors="pt",
            return_attention_mask=True,
            **padding,
        )
        with torch.inference_mode():
            tokens = self.model.generate(**inputs, **self.options)
        return self.processor.batch_decode(tokens, skip_special_tokens=True)


class WhisperCpp:
    """whisper.cpp through pywhispercpp, one file at a time."""

    batched = False

    def __init__(self, job: Job) -> None:
        from pywhispercpp.model import Model

        self.weights = Path(job.weights)
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

    def transcribe(self, paths: Sequence[str]) -> list[str]:
        return ["".join(segment.text for segment in self.model.transcribe(decode(path))) for path in paths]


@dataclass(frozen=True)
class System:
    """How to build an adapter, and what must be there for it."""

    make: Callable[[Job], Adapter]
    form: str
    """The format of its weights, one of :data:`convert.FORMATS`; "" for the project's own checkpoint."""
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


def installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of a dotted name's package
        return False


def systems(model: str) -> dict[str, System]:
    """Every system by name, in the order of the tables."""
    ours = {"modules": ("torch", "whisper_moe.api"), "packages": ("whisper-moe", "torch", "av")}
    fast = {"modules": ("faster_whisper",), "packages": ("faster-whisper", "ctranslate2", "av")}
    table: dict[str, System] = {}
    for name, form in (("ours", ""), (f"ours-{Path(model).name}", "hub")):
        make = partial(Ours, default=not form)
        table[name] = System(make, form, **ours)
        table[f"{name}-padded"] = System(partial(make, margin=WINDOW_SECONDS), form, **ours)
        table[f"{name}-int8"] = System(partial(make, dtype="int8"), form, **ours)
        table[f"{name}-int8-padded"] = System(partial(make, dtype="int8", margin=WINDOW_SECONDS), form, **ours)
    for kind in ("int8", "float32"):
        name, form = f"faster-whisper-{kind}", f"ct2-{kind}"
        table[name] = System(partial(FasterWhisper, compute_type=kind), form, **fast)
        table[f"{name}-batched"] = System(partial(FasterWhisperBatched, compute_type=kind), form, **fast)
        table[f"{name}-workers"] = System(partial(FasterWhisper, compute_type=kind, workers=2), form, **fast)
    openai = ("openai-whisper", "torch")
    hugging = ("transformers", "torch", "av")
    table["openai-whisper"] = System(OpenAIWhisper, "openai", ("whisper", "torch"), openai, needs_ffmpeg=True)
    table["transformers"] = System(Transformers, "hub", ("transformers", "torch"), hugging)
    table["whisper.cpp"] = System(WhisperCpp, "ggml", ("pywhispercpp.model",), ("pywhispercpp", "av"))
    return table
