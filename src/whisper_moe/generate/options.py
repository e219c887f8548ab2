"""What a user may ask of a transcription; defaults are ``whisper``'s where it has the option."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from whisper_moe.config import DEFAULT_MARGIN, FULL_WINDOW

DEFAULT_WINDOW = 20.0
"""Seconds of a long recording that are decoded as one; chosen by measurement (``docs/lab.md``)."""
PREPENDED_PUNCTUATION = "\"'“¿([{-"
"""Marks that join the word after them."""
APPENDED_PUNCTUATION = "\"'.。,，!！?？:：”)]}、"
"""Marks that join the word before them."""
TEMPERATURES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


@dataclass(frozen=True)
class SearchOptions:
    """How to choose. ``temperature`` 0 is greedy, or beam search when ``beams`` > 1; above 0, ``beams`` samples."""

    beams: int = 1
    temperature: float = 0.0
    patience: float = 1.0
    length_penalty: float | None = None
    """None ranks by the average log-probability; a number is Google NMT's alpha (arXiv 1609.08144, eq. 14)."""

    def score(self, sum_logprob: float, tokens: int) -> float:
        """How good a text of so many tokens is, to compare it with others of its segment."""
        length = max(tokens, 1)
        penalty = length if self.length_penalty is None else ((5 + length) / 6) ** self.length_penalty
        return sum_logprob / penalty


@dataclass(frozen=True, kw_only=True)
class TranscribeOptions:
    """Everything about a call to ``transcribe`` but its files."""

    task: Literal["transcribe", "translate"] = "transcribe"
    language: str | None = None
    """A code or name; ``auto`` detects it for every window, as does None, unless the model states one of its own."""
    allowed_languages: tuple[str, ...] = ()
    """Detection chooses among these; empty for all."""
    detect_language_once: bool = False
    """The first window whose language is sure decides for all of its recording, instead of each for itself."""
    beam_size: int = 1
    best_of: int = 5
    """Samples to choose from at a temperature above 0."""
    patience: float = 1.0
    length_penalty: float | None = None
    temperatures: tuple[float, ...] = TEMPERATURES
    """Tried in turn while a transcript looks wrong."""
    initial_prompt: str | None = None
    """Text that every window is taken to continue: names, spelling, style. Of a longer one than fits, the end counts."""
    carry_initial_prompt: bool = False
    """With ``condition_on_previous_text``: before every window, as it always is without, not only while there is room."""
    condition_on_previous_text: bool = False
    """Each window is prompted with what was said before it, unless that needed a temperature above 0.5; one window at a time."""
    hotwords: str | None = None
    """Words to expect, put before the initial prompt."""
    timestamps: bool = True
    word_timestamps: bool = False
    prepend_punctuations: str = PREPENDED_PUNCTUATION
    append_punctuations: str = APPENDED_PUNCTUATION
    hallucination_silence_threshold: float | None = None
    """Seconds of silence that are skipped before words that look made up; needs ``word_timestamps``."""
    suppress_tokens: tuple[int, ...] | None = None
    """Tokens never to say; -1 stands for annotations such as ♪. None: what the checkpoint lists."""
    clip_timestamps: Sequence[float] = ()
    """Seconds, or as text ``0,5,9``: start, end, start, end … of the stretches to transcribe, in order; without the last end,
    to the recording's."""
    context_margin: float | None = None
    """Seconds of silence kept after each clip, up to the 30 s window; 30 pads as Whisper always did. None: what the model was
    trained to do with (``ModelConfig.context_margin``), else :data:`~whisper_moe.config.DEFAULT_MARGIN`."""
    window: float | None = None
    """Seconds that a recording is cut into, at most: shorter windows share more batches, longer ones have more context. None
    takes 20 s, and Whisper's 30 s where every window is padded to them anyway."""
    track: int | str | None = None
    """Which sound track of a file: its number, from 0, or its language as the file states it; samples have none. None takes the
    one that FFmpeg calls best."""
    vad: Literal["none", "energy", "silero"] = "none"
    """Drop what is not speech before transcribing."""
    compression_ratio_threshold: float | None = 2.4
    logprob_threshold: float | None = -1.0
    no_speech_threshold: float | None = 0.6
    carry_ttt: bool = False
    """Let fast weights learn through a whole recording instead of starting afresh in every window; one window at a time."""
    seed: int = 0
    """Of the samples at temperatures above 0."""

    def __post_init__(self) -> None:
        if self.task not in ("transcribe", "translate"):
            raise ValueError(f"task must be transcribe or translate, got {self.task!r}")
        if self.vad not in ("none", "energy", "silero"):
            raise ValueError(f"vad must be none, energy or silero, got {self.vad!r}")
        if self.track is not None and re.match(r"\s*(-|$)", str(self.track)):
            raise ValueError(f"track must be a number from 0 or a language, got {self.track!r}")
        bounds = {"beam_size": 1, "best_of": 1, "patience": 1e-9} | (
            {} if self.context_margin is None else {"context_margin": 0}
        )
        for name, least in bounds.items():
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= least):
                raise ValueError(f"{name} must be {'positive' if least else 'at least 0'}, got {value}")
        if self.window is not None and not 1 <= self.window <= FULL_WINDOW:  # NaN fails too
            raise ValueError(f"window must be 1 to {FULL_WINDOW:.0f} seconds, got {self.window}")
        if not self.temperatures or not all(math.isfinite(t) and t >= 0 for t in self.temperatures):
            raise ValueError(f"temperatures must be numbers of at least 0, got {self.temperatures}")
        if any(token < -1 for token in self.suppress_tokens or ()):
            raise ValueError(f"suppress_tokens are token ids, or -1 for annotations, got {self.suppress_tokens}")

        object.__setattr__(self, "clip_timestamps", _stretches(self.clip_timestamps))
        threshold = self.hallucination_silence_threshold
        if threshold is not None and not (self.word_timestamps and threshold >= 0):
            raise ValueError(
                f"hallucination_silence_threshold must be at least 0 and needs word_timestamps, got {threshold}"
            )

    @property
    def margin(self) -> float:
        """``context_margin``, or its default."""
        return DEFAULT_MARGIN if self.context_margin is None else self.context_margin

    @property
    def window_seconds(self) -> float:
        """What a window may last."""
        if self.window is not None:
            return self.window
        return DEFAULT_WINDOW if self.margin < FULL_WINDOW else FULL_WINDOW

    def search(self, temperature: float) -> SearchOptions:
        """Beams without a temperature, samples with one."""
        rows = self.beam_size if temperature == 0 else self.best_of
        return SearchOptions(rows, temperature, self.patience, self.length_penalty)


def _stretches(given: str | Sequence[float]) -> tuple[float, ...]:
    """``clip_timestamps`` as numbers. Raises ``ValueError`` for what is no such list."""
    try:
        times = tuple(map(float, filter(str.strip, given.split(",")) if isinstance(given, str) else given))
    except (TypeError, ValueError):
        times = (math.nan,)
    for index, (time, after) in enumerate(pairwise([*times, math.inf])):
        if not (0 <= time < after or (time == after < math.inf and index % 2)):  # a stretch may begin where one ends
            raise ValueError(f"clip_timestamps must be ascending seconds, start,end,start,end …, got {given}")
    return times
