"""What a transcription is: words, segments and the whole, as plain frozen values.

``to_dict`` gives the keys of openai/whisper's JSON, in its order, and adds keys of our own after them: a reader of
that format finds everything where it expects it. Times are seconds from the start of the recording.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


def compression_ratio(text: str) -> float:
    """UTF-8 bytes over zlib's bytes: above about 2.4 a transcript repeats itself (arXiv 2212.04356, section 4.5)."""
    data = text.encode()
    return len(data) / len(zlib.compress(data))


@dataclass(frozen=True, slots=True)
class Word:
    """A word with the punctuation and the leading space that belong to it."""

    start: float
    end: float
    word: str
    probability: float
    """Mean probability of its tokens."""

    def to_dict(self) -> dict[str, Any]:
        return {"word": self.word, "start": self.start, "end": self.end, "probability": self.probability}


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A stretch of speech between two timestamps."""

    id: int
    """Its place in the transcription, counted from 0."""
    seek: int
    """Mel frame (1/100 s) at which the window that it was decoded in begins."""
    start: float
    end: float
    text: str
    tokens: tuple[int, ...]
    """Its tokens, timestamps included."""
    temperature: float
    avg_logprob: float
    """Mean log-probability of the window's tokens."""
    compression_ratio: float
    no_speech_prob: float
    experts: tuple[tuple[str, float], ...] = ()
    """Names and gates of the experts that computed it, *none* included; empty for a dense model."""
    words: tuple[Word, ...] | None = None
    """``None`` unless word timestamps were asked for."""
    language: str | None = None
    """The language of its window, where each has its own."""

    def to_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = {
            "id": self.id,
            "seek": self.seek,
            "start": self.start,
            "end": self.end,
            "text": self.text,
            "tokens": list(self.tokens),
            "temperature": self.temperature,
            "avg_logprob": self.avg_logprob,
            "compression_ratio": self.compression_ratio,
            "no_speech_prob": self.no_speech_prob,
        }
        if self.words is not None:
            values["words"] = [word.to_dict() for word in self.words]
        if self.language is not None:
            values["language"] = self.language
        return values | {"experts": dict(self.experts)}


def mean_gates(segments: Sequence[Segment]) -> tuple[tuple[str, float], ...]:
    """Each expert's gate, averaged over the segments of a transcription."""
    sums: dict[str, float] = {}
    for segment in segments:
        for name, gate in segment.experts:
            sums[name] = sums.get(name, 0.0) + gate / len(segments)
    return tuple(sums.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class Transcription:
    """The transcript of one recording."""

    text: str
    segments: tuple[Segment, ...]
    language: str | None
    """Code of its (first) language; None where nothing was said and none was given."""
    language_probability: float | None = None
    """``None`` where the language was given and not detected."""
    duration: float
    """Seconds of the recording."""
    fallbacks: int = 0
    """Windows that were decoded again because their first transcript looked wrong: with full padding, at another
    temperature, in the recording's main language, or in two halves."""
    damage: str | None = None
    """Why there is no more of it, where a damaged file was read in part; ``duration`` is then that of what was read."""
    notes: tuple[str, ...] = ()
    """What is no damage and yet worth knowing about the file: channels that cancelled out, a silent track beside others."""
    source: str | None = None
    """The recording's path or name."""

    def to_dict(self) -> dict[str, Any]:
        """Keys of openai/whisper first (``text``, ``segments``, ``language``), then ours; ``source``, ``damage``
        and ``notes`` where there are any."""
        return {
            "text": self.text,
            "segments": [segment.to_dict() for segment in self.segments],
            "language": self.language,
            "language_probability": self.language_probability,
            "duration": self.duration,
            "fallbacks": self.fallbacks,
            **{key: value for key, value in (("source", self.source), ("damage", self.damage)) if value is not None},
            **({"notes": list(self.notes)} if self.notes else {}),
        }
