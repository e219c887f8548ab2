"""Eight fine-tuned Whispers in one model that routes between them, packs what it hears, and learns while it listens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from whisper_moe.machine import share_cores

if TYPE_CHECKING:
    from whisper_moe.api import WhisperMoE as WhisperMoE
    from whisper_moe.generate.mixed import Request as Request
    from whisper_moe.generate.options import TranscribeOptions as TranscribeOptions
    from whisper_moe.generate.result import Outcome as Outcome
    from whisper_moe.generate.result import Segment as Segment
    from whisper_moe.generate.result import Transcription as Transcription
    from whisper_moe.generate.result import Word as Word
    from whisper_moe.media.audio import MediaError as MediaError

__version__ = "0.1.0"
__all__ = [
    "MediaError",
    "Outcome",
    "Request",
    "Segment",
    "TranscribeOptions",
    "Transcription",
    "WhisperMoE",
    "Word",
    "__version__",
]

_HOMES = {
    "Outcome": "whisper_moe.generate.result",
    "Request": "whisper_moe.generate.mixed",
    "WhisperMoE": "whisper_moe.api",
    "TranscribeOptions": "whisper_moe.generate.options",
    "Segment": "whisper_moe.generate.result",
    "Transcription": "whisper_moe.generate.result",
    "Word": "whisper_moe.generate.result",
    "MediaError": "whisper_moe.media.audio",
}

share_cores()  # before anything loads torch, whose OpenMP reads it once


def __getattr__(name: str) -> Any:
    """Public names are imported when they are first used: importing the package does not cost torch's seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module 'whisper_moe' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
