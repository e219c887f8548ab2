"""What a user may ask of a transcription; defaults are ``whisper``'s where it has the option."""

from __future__ import annotations

import dataclasses
import math
import re
from itertools import pairwise
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from whisper_moe.config import DEFAULT_MARGIN, FULL_WINDOW

DEFAULT_WINDOW = 20.0
"""Seconds of a long recording that are decoded as one; chosen by measurement (``docs/lab.md``)."""
PREPENDED_PUNCTUATION = "\"'“¿([{-"
"""Marks that join the word after them."""
APPENDED_PUNCTUATION = "\"'.。,，!！?？:：”)]}、"
"""Marks that join the word before them."""
TEMPERATURES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


@dataclasses.dataclass(frozen=True)
class SearchOptions:
    """How to choose. ``temperature`` 0 is greedy, or beam search when ``beams`` > 1; above 0, ``beams`` samples."""

    beams: int = 1
    temperature: float = 0.0
    patience: float = 1.0
    length_penalty: float | None = None
    """None ranks by the average log-probability; a number is Google NMT's alpha (arXiv 1609.08144, eq. 14)."""

    @property
    def branches(self) -> bool:
        """Whether rows are beams, of which the best go on; else each is a sample for itself."""
        return self.beams > 1 and self.temperature == 0

    def score(self, sum_logprob: float, tokens: int) -> float:
        """How good a text of so many tokens is, to compare it with others of its segment."""
        length = max(tokens, 1)
        penalty = length if self.length_penalty is None else ((5 + length) / 6) ** self.length_penalty
        return sum_logprob / penalty


def _separate(given: Any) -> Any:
    return [part for part in given.split(",") if part.strip()] if isinstance(given, str) else given


def _ascending(times: tuple[float, ...]) -> tuple[float, ...]:
    for index, (time, after) in enumerate(pairwise([*times, math.inf])):
        if not (0 <= time < after or (time == after < math.inf and index % 2)):  # a stretch may begin where one ends
            raise ValueError(
                f"must be ascending seconds, start,end,start,end …, got {','.join(map('{:g}'.format, times))}"
            )
    return times


def _track(given: int | str) -> int | str:
    if re.match(r"\s*(-|$)", str(given)):
        raise ValueError(f"must be a number from 0 or a language, got {given!r}")
    return given


Temperature: TypeAlias = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Tokens: TypeAlias = Annotated[tuple[Annotated[int, Field(ge=-1)], ...], BeforeValidator(_separate)]
Stretches: TypeAlias = Annotated[tuple[float, ...], BeforeValidator(_separate), AfterValidator(_ascending)]
Track: TypeAlias = Annotated[int | str, AfterValidator(_track)]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class TranscribeOptions:
    """Everything about a call to ``transcribe`` but its files. Lists may be given as text, ``0,5,9``."""

    task: Literal["transcribe", "translate"] = "transcribe"
    language: str | None = None
    """A code or name; ``auto`` detects it for every window, as does None, unless the model states one of its own."""
    allowed_languages: tuple[str, ...] = ()
    """Detection chooses among these; empty for all."""
    detect_language_once: bool = False
    """The first window whose language is sure decides for all of its recording, instead of each for itself."""
    experts: tuple[str, ...] = ()
    """Only these may answer, by name; ``none`` is the shared expert or base alone. Empty for all."""
    exclude: tuple[str, ...] = ()
    """These may not."""
    beam_size: int = Field(default=1, ge=1)
    best_of: int = Field(default=5, ge=1)
    """Samples to choose from at a temperature above 0."""
    patience: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    length_penalty: float | None = None
    temperatures: tuple[Temperature, ...] = Field(default=TEMPERATURES, min_length=1)
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
    hallucination_silence_threshold: float | None = Field(default=None, ge=0)
    """Seconds of silence that are skipped before words that look made up; needs ``word_timestamps``."""
    suppress_tokens: Tokens | None = None
    """Tokens never to say; -1 stands for annotations such as ♪. None: what the checkpoint lists."""
    clip_timestamps: Stretches = ()
    """Seconds: start, end, start, end … of the stretches to transcribe; without the last end, to the recording's."""
    context_margin: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Seconds of silence kept after each clip, up to the 30 s window; 30 pads as Whisper always did. None: what the model was
    trained to do with (``ModelConfig.context_margin``), else :data:`~whisper_moe.config.DEFAULT_MARGIN`."""
    window: float | None = Field(default=None, ge=1, le=FULL_WINDOW)
    """Seconds that a recording is cut into, at most: shorter windows share more batches, longer ones have more context. None
    takes 20 s, and Whisper's 30 s where every window is padded to them anyway."""
    track: Track | None = None
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

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.hallucination_silence_threshold is not None and not self.word_timestamps:
            raise ValueError("hallucination_silence_threshold needs word_timestamps")
        return self

    @property
    def margin(self) -> float:
        """``context_margin``, or its default."""
        return DEFAULT_MARGIN if self.context_margin is None else self.context_margin

    @property
    def window_seconds(self) -> float:
        """What a window may last."""
        return self.window or (DEFAULT_WINDOW if self.margin < FULL_WINDOW else FULL_WINDOW)

    def search(self, temperature: float) -> SearchOptions:
        """Beams without a temperature, samples with one."""
        rows = self.beam_size if temperature == 0 else self.best_of
        return SearchOptions(rows, temperature, self.patience, self.length_penalty)


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class SubtitleOptions:
    """How timed words are laid out in vtt and srt; without word timestamps nothing here has an effect."""

    highlight_words: bool = False
    """A cue for every word, in which it is underlined."""
    max_line_width: int | None = Field(default=None, ge=1)
    """Characters in a line."""
    max_line_count: int | None = Field(default=None, ge=1)
    """Lines in a subtitle; with ``max_line_width``, subtitles no longer break where segments do."""
    max_words_per_line: int | None = Field(default=None, ge=1)
    """Words in a subtitle; no effect where subtitles do not break with the segments."""
