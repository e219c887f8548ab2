"""Which systems can be named, how each is found, and how it is loaded.

``NAME`` alone is this project's: a whisper-moe folder or any Whisper. Peers: ``faster-whisper:NAME`` (int8),
``faster-whisper-float32:NAME``, ``openai:NAME``, ``transformers:NAME``, where NAME is a size that the peer knows, its own
format, or a Whisper of the Hub or in a folder, which is converted once. ``transcripts:FILE`` is what any system wrote.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeAlias

from whisper_moe.config import FULL_WINDOW
from whisper_moe.data.sample import Task
from whisper_moe.evaluate.convert import to_hub, weights
from whisper_moe.evaluate.peers import (
    Adapter,
    FasterWhisper,
    OpenAIWhisper,
    Ours,
    Setup,
    Transformers,
    WrittenTranscripts,
)
from whisper_moe.machine import unshare_cores

Kind: TypeAlias = Literal["ours", "faster-whisper", "faster-whisper-float32", "openai", "transformers", "transcripts"]
_NEEDS: dict[Kind, tuple[str, tuple[str, ...]]] = {
    "ours": ("torch", ("whisper-moe", "torch", "av")),
    "faster-whisper": ("faster_whisper", ("faster-whisper", "ctranslate2")),
    "faster-whisper-float32": ("faster_whisper", ("faster-whisper", "ctranslate2")),
    "openai": ("whisper", ("openai-whisper", "torch")),
    "transformers": ("transformers", ("transformers", "torch")),
    "transcripts": ("jiwer", ()),
}
"""The module that must be there, and the packages whose versions belong to the figures."""
SPEECH: tuple[Task, ...] = ("transcribe", "translate")
"""What a system that hears can be asked for."""
DEFAULT = "default"
"""The name of the model that comes along."""


@dataclass(frozen=True)
class System:
    """A system by name; ``weights`` once it has been found."""

    kind: Kind
    name: str
    weights: str = ""
    padded: bool = False
    """Every clip is padded to 30 s, whatever margin the model has of its own."""

    @property
    def label(self) -> str:
        """What it is called in the report."""
        name = self.name.rstrip("/")
        if (path := Path(name)).exists():
            # A training run's model is always called so; the run has the name.
            name = path.resolve().parent.name if path.name == "model" else path.name
        return f"{name}, padded" if self.padded else name if self.kind == "ours" else f"{self.kind}:{name}"

    @property
    def tasks(self) -> tuple[Task, ...]:
        return (*SPEECH, "translate-text", "sign") if self.kind == "transcripts" else SPEECH

    @property
    def packages(self) -> tuple[str, ...]:
        return _NEEDS[self.kind][1]

    @property
    def dtype(self) -> str | None:
        """The arithmetic of a peer; this project's models say themselves."""
        return {"faster-whisper": "int8", "ours": None, "transcripts": None}.get(self.kind, "float32")


def parse(spec: str) -> System:
    """The system that ``spec`` names. Raises ``ValueError`` where it cannot run here, naming what is missing."""
    prefix, colon, name = spec.partition(":")
    peers: dict[str, Kind] = {kind: kind for kind in _NEEDS if kind != "ours"}
    kind: Kind = peers.get(prefix, "ours") if colon else "ours"
    system = System(kind, spec if kind == "ours" else name)
    if not system.name:
        raise ValueError(f"{spec!r} names no model: {kind}:NAME")
    module = _NEEDS[kind][0]
    if find_spec(module) is None:
        package = system.packages[0] if system.packages else module
        raise ValueError(f"{spec}: {package} is not installed")
    if kind == "transcripts" and not Path(name).is_file():
        raise ValueError(f"{spec}: no such file")
    return system


def prepared(system: System, cache: Path | None = None) -> System:
    """The system with its weights in the format that it reads, converted if need be; that takes a peer's converter.

    Raises ``RuntimeError`` with the converter's own words when it fails.
    """
    cache = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "whisper-moe" / "converted"
    match system.kind:
        case "faster-whisper" | "faster-whisper-float32":
            found = _faster_whisper(system, cache)
        case "openai":
            found = _openai(system.name, cache)
        case "transformers":
            found = str(to_hub(system.name))
        case _:
            found = system.name
    return replace(system, weights=found)


def _faster_whisper(system: System, cache: Path) -> str:
    from faster_whisper import available_models, download_model  # pyright: ignore[reportMissingImports]

    if (Path(system.name) / "model.bin").is_file():
        return system.name
    if system.name in available_models():
        return download_model(system.name)
    return str(weights(f"ct2-{system.dtype}", system.name, cache))


def _openai(name: str, cache: Path) -> str:
    import whisper  # pyright: ignore[reportMissingImports]

    return name if name in whisper.available_models() or Path(name).is_file() else str(weights("openai", name, cache))


def loaded(
    system: System, setup: Setup, load: Callable[..., Any], *, device: str, dtype: str, margin: float | None
) -> Adapter | WrittenTranscripts:
    """The system, ready. ``load`` is ``WhisperMoE.from_pretrained``; ``device`` and ``dtype`` are of this project's."""
    if system.kind != "ours":
        unshare_cores()
    match system.kind:
        case "ours":
            source = None if system.name == DEFAULT and not Path(DEFAULT).exists() else system.name
            model = load(source, device=device, dtype=dtype, threads=setup.threads)
            return Ours(model, setup, margin=FULL_WINDOW if system.padded else margin, weights=Path(source or "."))
        case "faster-whisper" | "faster-whisper-float32":
            return FasterWhisper(setup, compute_type=system.dtype or "int8")
        case "openai":
            return OpenAIWhisper(setup)
        case "transformers":
            return Transformers(setup)
        case "transcripts":
            return WrittenTranscripts(Path(system.name))
