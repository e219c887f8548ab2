"""The systems of the benchmark: :mod:`whisper_moe.evaluate.peers`, with the forms and settings they are measured in.

Torch and the peers' packages are only imported when a system is chosen.
"""

# The peers are optional: type checking must pass without them.
# pyright: reportMissingImports=false

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from whisper_moe.config import FULL_WINDOW as WINDOW_SECONDS
from whisper_moe.config import SAMPLE_RATE as SAMPLE_RATE
from whisper_moe.evaluate.peers import (
    Adapter,
    FasterWhisper,
    FasterWhisperBatched,
    Heard,
    OpenAIWhisper,
    Ours,
    Setup,
    Source,
    Transformers,
    samples_of,
)

if TYPE_CHECKING:
    import numpy as np

CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"


@dataclass(frozen=True, kw_only=True)
class Job(Setup):
    """What one process measures."""

    system: str
    clips: tuple[str, ...]
    model: str
    passes: int
    latency_clips: int
    """How many clips a batching system also runs one by one, after the timed job."""


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
    return Ours(model, job, margin=margin, weights=CHECKPOINTS if default else Path(job.weights))


class WhisperCpp:
    """whisper.cpp through pywhispercpp, one clip at a time."""

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

    def hear(self, sources: Iterable[Source], **asked: Any) -> Iterator[Heard]:
        for source in sources:
            yield Heard("".join(segment.text for segment in self.model.transcribe(samples_of(source), **asked)))


@dataclass(frozen=True)
class System:
    """How to build an adapter, and what must be there for it."""

    make: Callable[[Job], Adapter]
    form: str
    """The format of its weights, one of :data:`whisper_moe.evaluate.convert.FORMATS`; "" for the project's own checkpoint."""
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
        table[name] = System(partial(FasterWhisper, compute_type=kind), form, **fast)
        table[f"{name}-batched"] = System(partial(FasterWhisperBatched, compute_type=kind), form, **fast)
        table[f"{name}-workers"] = System(partial(FasterWhisper, compute_type=kind, workers=2), form, **fast)
    openai = ("openai-whisper", "torch")
    hugging = ("transformers", "torch", "av")
    table["openai-whisper"] = System(OpenAIWhisper, "openai", ("whisper", "torch"), openai, needs_ffmpeg=True)
    table["transformers"] = System(Transformers, "hub", ("transformers", "torch"), hugging)
    table["whisper.cpp"] = System(WhisperCpp, "ggml", ("pywhispercpp.model",), ("pywhispercpp", "av"))
    return table
