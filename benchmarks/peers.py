"""The systems of the benchmark: this project's models, and their peers.

Each decodes as its users would, greedily or with the same beam, with the same fallback temperatures where it has any. Torch and
the peers' packages are only imported when a system is chosen.
"""

# The peers are optional: type checking must pass without them.
# pyright: reportMissingImports=false

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from importlib.util import find_spec
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from whisper_moe.config import FULL_WINDOW, SAMPLE_RATE
from whisper_moe.evaluate.measure import Adapter, Heard, Source, apart, ours
from whisper_moe.generate.options import TEMPERATURES
from whisper_moe.machine import SPINS
from whisper_moe.media.audio import load_audio

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


def faster_whisper(
    weights: str, *, threads: int, beam: int, temperatures: tuple[float, ...], dtype: str, **more: Any
) -> Adapter:
    """faster-whisper, one clip at a time."""
    from faster_whisper import WhisperModel

    model = WhisperModel(weights, device="cpu", compute_type=dtype, cpu_threads=threads, **more)
    options = {"beam_size": beam, "temperature": list(temperatures), "condition_on_previous_text": False}

    def hear(sources: Iterable[Source], *, long: bool, **told: Any) -> Iterator[Heard]:
        for source in sources:
            segments = list(model.transcribe(source, without_timestamps=not long, **told, **options)[0])
            yield Heard("".join(each.text for each in segments), sum(len(each.tokens) for each in segments))

    return Adapter(hear, options)


def openai_whisper(weights: str, *, threads: int, beam: int, temperatures: tuple[float, ...]) -> Adapter:
    """openai-whisper, one clip at a time; files it decodes with the ``ffmpeg`` program."""
    import torch
    import whisper

    torch.set_num_threads(threads)
    model = whisper.load_model(weights, device="cpu")
    options = {"beam_size": beam if beam > 1 else None, "temperature": temperatures}
    options |= {"condition_on_previous_text": False, "fp16": False}

    def hear(sources: Iterable[Source], *, long: bool, **told: Any) -> Iterator[Heard]:
        for source in sources:
            result: dict[str, Any] = model.transcribe(source, without_timestamps=not long, **told, **options)
            yield Heard(str(result["text"]), sum(len(segment["tokens"]) for segment in result["segments"]))

    return Adapter(hear, options)


def transformers(weights: str, *, threads: int, beam: int, temperatures: tuple[float, ...], batch: int = 8) -> Adapter:
    """transformers' ``generate`` in float32 on batches of clips, as its pipeline calls it."""
    import torch
    from transformers import AutoProcessor, WhisperForConditionalGeneration

    torch.set_num_threads(threads)
    processor: Any = AutoProcessor.from_pretrained(weights)
    model: Any = WhisperForConditionalGeneration.from_pretrained(weights, dtype=torch.float32).eval()
    options: dict[str, Any] = {"num_beams": beam, "temperature": 0.0, "condition_on_prev_tokens": False}
    if len(temperatures) > 1:
        options |= {"temperature": temperatures, "compression_ratio_threshold": 1.35, "logprob_threshold": -1.0}
    special = set(processor.tokenizer.all_special_ids)

    def hear(sources: Iterable[Source], *, long: bool, **told: Any) -> Iterator[Heard]:
        waiting = map(samples_of, sources)
        padding = {"truncation": False, "padding": "longest"} if long else {}
        form = {"sampling_rate": SAMPLE_RATE, "return_tensors": "pt", "return_attention_mask": True}
        while clips := list(islice(waiting, batch)):
            with torch.inference_mode():
                inputs = processor(clips, **form, **padding)
                rows = model.generate(**inputs, return_timestamps=long, **told, **options)
            for text, row in zip(processor.batch_decode(rows, skip_special_tokens=True), rows.tolist(), strict=True):
                yield Heard(text, sum(token not in special for token in row))

    return Adapter(hear, options, batched=True)


def samples_of(source: Source) -> np.ndarray:
    """Mono float32 samples at 16 kHz, for peers that bring no decoder."""
    return load_audio(Path(source)) if isinstance(source, str) else source


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


def hub_folder(model: str) -> str:
    """A Whisper's folder, downloaded unless it is in the cache."""
    from huggingface_hub import snapshot_download

    from whisper_moe.weights.load import hub_id

    others = ["*.h5", "*.msgpack"]  # weights of other frameworks
    return model if Path(model).is_dir() else snapshot_download(hub_id(model) or model, ignore_patterns=others)


def converted(model: str, form: str, write: Callable[[str, Path], None], cache: Path) -> str:
    """A Whisper in a format that ``write`` writes, in ``cache`` unless it lies there. What is known of a local one is its path
    and its files' sizes and times: one that was written anew is converted anew.
    """
    path, state = Path(model), ""
    if path.exists():
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        state = "-" + sha256(f"{path.resolve()} {facts}".encode()).hexdigest()[:16]
    target = cache / f"{model.strip('/').replace('/', '--')}{state}-{form}"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        apart(_convert, write, model, target)
    return str(target)


def _convert(write: Callable[[str, Path], None], model: str, target: Path) -> None:
    """The target appears only when it is complete."""
    scratch = target.with_name(f"{target.name}.{os.getpid()}")
    try:
        write(model, scratch)
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch) if scratch.is_dir() else scratch.unlink(missing_ok=True)


def to_ctranslate2(quantization: str, model: str, target: Path) -> None:
    from ctranslate2.converters import TransformersConverter

    copied = ["tokenizer.json", "preprocessor_config.json"]
    TransformersConverter(model, copy_files=copied).convert(str(target), quantization=quantization, force=True)


def to_openai(model: str, target: Path) -> None:
    import torch
    from ggml import dims_of

    from whisper_moe.weights.load import load_model
    from whisper_moe.weights.whisper import OPENAI, state_to_whisper

    source = load_model(model)
    state = state_to_whisper(source.state, source.config, OPENAI)
    if all(torch.equal(tensor.half().float(), tensor) for tensor in state.values()):  # as most are published
        state = {name: tensor.half() for name, tensor in state.items()}
    torch.save({"dims": dims_of(source.config), "model_state_dict": state}, target)


def unshare_cores(environment: MutableMapping[str, str] = os.environ) -> None:
    """Take back how long this project's waiting threads spin: other programs are measured as they are."""
    if environment.get("GOMP_SPINCOUNT") == str(SPINS):
        del environment["GOMP_SPINCOUNT"]


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
