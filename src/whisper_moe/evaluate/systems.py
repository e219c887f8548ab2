"""The systems that can be evaluated and compared: how each is named, found and loaded.

``NAME`` alone is this project's: a whisper-moe folder or any Whisper. Peers: ``faster-whisper:NAME`` (int8),
``faster-whisper-float32:NAME``, ``openai:NAME``, ``transformers:NAME``, where NAME is a size that the peer knows, its own
format, or a Whisper of the Hub or in a folder, which is converted once. ``transcripts:FILE`` is what any system wrote.

Each decodes as its users would, greedily or with the same beam, with the same fallback temperatures where it has any. A
peer's package is imported when it is loaded, torch too; none is needed otherwise.
"""

# The peers are optional: type checking must pass without them.
# pyright: reportMissingImports=false

from __future__ import annotations

import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from importlib.util import find_spec
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

from whisper_moe.config import SAMPLE_RATE, model_name
from whisper_moe.generate.result import mean_gates
from whisper_moe.machine import THREAD_VARIABLES
from whisper_moe.media.audio import load_audio

if TYPE_CHECKING:
    import numpy as np

Source: TypeAlias = "str | np.ndarray"
"""A file, or mono float32 samples at 16 kHz."""
T = TypeVar("T")
DEFAULT = "default"
"""The name of the model that comes along."""


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


class Kind(NamedTuple):
    """Of systems: the module that it needs, the packages whose versions belong to its figures, and how a peer is loaded."""

    module: str
    packages: tuple[str, ...] = ()
    load: Callable[..., Adapter] | None = None
    dtype: str | None = None
    """The arithmetic of a peer; this project's models say themselves."""


_FASTER = ("faster-whisper", "ctranslate2")
KINDS = {
    "ours": Kind("torch", ("whisper-moe", "torch", "av")),
    "faster-whisper": Kind("faster_whisper", _FASTER, partial(faster_whisper, dtype="int8"), "int8"),
    "faster-whisper-float32": Kind("faster_whisper", _FASTER, partial(faster_whisper, dtype="float32"), "float32"),
    "openai": Kind("whisper", ("openai-whisper", "torch"), openai_whisper, "float32"),
    "transformers": Kind("transformers", ("transformers", "torch"), transformers, "float32"),
    "transcripts": Kind("jiwer"),
}


@dataclass(frozen=True)
class System:
    """A system by name."""

    kind: str
    name: str
    padded: bool = False
    """Every clip is padded to 30 s, whatever margin the model has of its own."""

    @classmethod
    def parse(cls, spec: str) -> System:
        """The system that ``spec`` names. Raises ``ValueError`` where it cannot run here, naming what is missing."""
        prefix, colon, name = spec.partition(":")
        peer = colon and prefix in KINDS and prefix != "ours"
        system = cls(prefix, name) if peer else cls("ours", spec)
        if not system.name:
            raise ValueError(f"{spec!r} names no model: {system.kind}:NAME")
        if find_spec(system.needs.module) is None:
            raise ValueError(f"{spec}: {(*system.needs.packages, system.needs.module)[0]} is not installed")
        if system.kind == "transcripts" and not Path(name).is_file():
            raise ValueError(f"{spec}: no such file")
        return system

    @property
    def needs(self) -> Kind:
        return KINDS[self.kind]

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
        """Where its weights are, in the format that it reads: downloaded and converted if need be."""
        match self.kind:
            case "faster-whisper" | "faster-whisper-float32":
                from faster_whisper import available_models, download_model

                if (Path(self.name) / "model.bin").is_file():
                    return self.name
                if self.name in available_models():
                    return download_model(self.name)
                return converted(self.name, f"ct2-{self.needs.dtype}", partial(to_ctranslate2, str(self.needs.dtype)))
            case "openai":
                import whisper

                known = self.name in whisper.available_models() or Path(self.name).is_file()
                return self.name if known else converted(self.name, "openai", to_openai)
            case "transformers":
                return hub_folder(self.name)
            case "ours":
                from whisper_moe.weights.load import default, resolve

                return str(resolve(self.source or default()).path)
        return self.name


def hub_folder(model: str) -> str:
    """A Whisper's folder, downloaded unless it is in the cache."""
    from huggingface_hub import snapshot_download

    from whisper_moe.weights.load import hub_id

    others = ["*.h5", "*.msgpack"]  # weights of other frameworks
    return model if Path(model).is_dir() else snapshot_download(hub_id(model) or model, ignore_patterns=others)


def converted(model: str, form: str, write: Callable[[str, Path], None], cache: Path | None = None) -> str:
    """A Whisper in a format that ``write`` writes, in ``cache`` unless it lies there. What is known of a local one is its path
    and its files' sizes and times: one that was written anew is converted anew.
    """
    cache = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "whisper-moe" / "converted"
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

    from whisper_moe.weights.load import load_model
    from whisper_moe.weights.whisper import OPENAI, config_to_openai, state_to_whisper

    source = load_model(model)
    state = state_to_whisper(source.state, source.config, OPENAI)
    if all(torch.equal(tensor.half().float(), tensor) for tensor in state.values()):  # as most are published
        state = {name: tensor.half() for name, tensor in state.items()}
    torch.save({"dims": config_to_openai(source.config), "model_state_dict": state}, target)


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
