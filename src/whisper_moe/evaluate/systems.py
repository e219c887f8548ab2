"""The systems that can be evaluated and compared: how each is named, found and loaded.

``NAME`` alone is this project's: a whisper-moe folder or any Whisper. ``transcripts:FILE`` is what any system wrote. Torch is
imported when a model is loaded, and not needed otherwise.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from whisper_moe.config import model_name
from whisper_moe.generate.result import mean_gates
from whisper_moe.machine import THREAD_VARIABLES

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
