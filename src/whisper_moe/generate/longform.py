"""A recording on its way: which of its windows' results to trust, what to try next, and what they say together.

A window is first decoded with a short margin of silence. Whisper always saw a full 30 s, so what looks wrong is padded to 30 s
and decoded again; if that looks wrong too, temperatures follow (Whisper, section 4.5). Nothing falls back silently: it is
counted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from whisper_moe.config import FULL_WINDOW, SAMPLE_RATE
from whisper_moe.generate.decode import TOKENS_PER_SECOND, DecodingResult
from whisper_moe.generate.options import TranscribeOptions
from whisper_moe.generate.result import Outcome, Segment, Transcription, compression_ratio
from whisper_moe.generate.segments import (
    LEAST_ADVANCE,
    goes_on,
    joined,
    numbered,
    placed,
    segments_of,
    too_much,
    without_inventions,
)
from whisper_moe.media.audio import MediaError
from whisper_moe.media.tokenizer import Tokenizer
from whisper_moe.media.windows import Window, halved, sounding, speech_spans
from whisper_moe.model.block import Carry

BUFFERED_WINDOWS = 96
"""Windows that wait …"""
BUFFERED_SECONDS = 450
"""… and the audio in them: 64 kB a second."""
SURE_LANGUAGE = 0.5
"""Below this probability a window takes the language that its recording has spoken most."""
HOT = 0.5
"""What was said at a temperature above this prompts no later window."""
LEAST_REST = 1.5
"""Seconds of speech after the last timestamp that are worth a window of their own."""
SHORT_TEXT_TOKENS = 12
"""A text of so few tokens is never too long for its time: a cough of 0.2 s may hold a word."""


def is_silence(result: DecodingResult, options: TranscribeOptions) -> bool:
    """Whisper's rule: silence is likely, and the text is not sure enough to speak against it."""
    threshold = options.no_speech_threshold
    if threshold is None or result.no_speech_prob <= threshold:
        return False
    return options.logprob_threshold is None or result.hypothesis.avg_logprob <= options.logprob_threshold


def looks_wrong(result: DecodingResult, seconds: float, tokenizer: Tokenizer, options: TranscribeOptions) -> str | None:
    """Why a result should not be trusted, in a word or two; None if nothing speaks against it."""
    hypothesis = result.hypothesis
    if is_silence(result, options):
        return None
    limit = options.compression_ratio_threshold
    if limit is not None and compression_ratio(tokenizer.decode(hypothesis.tokens).strip()) > limit:
        return "repetitive"
    if len(hypothesis.tokens) > max(SHORT_TEXT_TOKENS, TOKENS_PER_SECOND * seconds):
        return "too long for its time"
    if options.logprob_threshold is not None and hypothesis.avg_logprob < options.logprob_threshold:
        return "unsure"
    if hypothesis.finished or goes_on(hypothesis, seconds, tokenizer) or too_much(hypothesis, seconds, tokenizer):
        return None
    return "endless"


def attempts(options: TranscribeOptions) -> list[tuple[float, float]]:
    """(margin, temperature) pairs in the order they are tried."""
    first, *rest = options.temperatures
    padded = [(FULL_WINDOW, first)] if options.margin < FULL_WINDOW else []
    return [(options.margin, first), *padded, *((FULL_WINDOW, temperature) for temperature in rest)]


@dataclass(eq=False)
class Recording:
    """A recording on its way: its windows so far, and what they said."""

    name: str
    windows: Iterator[Window]
    index: int = 0
    """Its place among those given."""
    options: TranscribeOptions = field(default_factory=TranscribeOptions)
    duration: float = 0.0
    unsettled: list[Job] = field(default_factory=list)
    """Windows that were cut and whose text is not settled, in order."""
    ended: bool = False
    """No window is left to cut."""
    error: Exception | None = None
    notes: list[str] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    spoken: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Seconds of each detected language."""
    only_language: str | None = None
    """What all of it is taken to be in, once that is known, where this is decided once."""
    language: str | None = None
    language_probability: float | None = None
    fallbacks: int = 0
    carry: Carry = field(default_factory=Carry)
    """Fast weights that its windows hand on, if asked to."""
    said: list[int] | None = None
    """Tokens that its next window goes on from, where windows are conditioned on them."""

    @property
    def one_by_one(self) -> bool:
        """Whether a window needs what the one before it left."""
        return self.options.carry_ttt or self.options.condition_on_previous_text

    @property
    def full(self) -> bool:
        """Whether no more of its windows may wait."""
        if self.one_by_one:
            return bool(self.unsettled)
        seconds = sum(job.window.duration for job in self.unsettled)
        return len(self.unsettled) >= BUFFERED_WINDOWS or seconds >= BUFFERED_SECONDS

    @property
    def main_language(self) -> str | None:
        """The only one, or the one that was spoken most so far."""
        return self.only_language or max(self.spoken, key=lambda code: self.spoken[code], default=None)

    def result(self) -> Transcription:
        segments = numbered(self.segments)
        return Transcription(
            text=joined(segments),
            segments=segments,
            language=self.language,
            language_probability=self.language_probability,
            duration=round(self.duration, 3),
            fallbacks=self.fallbacks,
            notes=tuple(self.notes),
            source=self.name,
        )

    def outcome(self) -> Outcome:
        if self.error is None:
            return Outcome(self.name, self.result(), None, index=self.index)
        error = self.error if isinstance(self.error, MediaError) else MediaError(self.name, str(self.error))
        partial = replace(self.result(), damage=str(error)) if self.segments else None
        return Outcome(self.name, None, error, partial, self.index)


@dataclass(eq=False)
class Job:
    """A window on its way."""

    recording: Recording
    window: Window
    hint: str | None = None
    """Its language, where that is known."""
    attempt: int = 0
    """Which of :func:`attempts` is the next, or the one that is under way."""
    tries: int = 0
    """How often it was decoded."""
    since: int | None = None
    """Since when it waits to be decoded; None where it does not."""
    result: DecodingResult | None = None
    accepted: bool = False
    """Whether that result is not tried again, unless in another language."""
    told: bool = False
    """Whether its recording knows what language was heard."""

    @property
    def found(self) -> DecodingResult:
        assert self.result is not None
        return self.result

    @property
    def silent(self) -> bool:
        return is_silence(self.found, self.recording.options)

    @property
    def unsure(self) -> bool:
        """Whether its language may be another one, as far as its recording does not know that already."""
        probability = self.found.language_probability
        return probability is not None and probability < SURE_LANGUAGE and not self.silent

    @property
    def astray(self) -> bool:
        """Whether the language that was heard is to give way to the one that its recording speaks most."""
        recording = self.recording
        doubted = self.unsure or (recording.only_language is not None and not self.silent)
        return doubted and recording.main_language not in (None, self.found.language)

    def looks_wrong(self, tokenizer: Tokenizer) -> bool:
        return bool(looks_wrong(self.found, self.window.duration, tokenizer, self.recording.options))

    def tell_language(self) -> None:
        """Tell the recording which language was surely heard."""
        recording, result, self.told = self.recording, self.found, True
        if (result.language_probability or 0.0) >= SURE_LANGUAGE:
            recording.spoken[result.language] += self.window.duration
            once = recording.options.detect_language_once and recording.only_language is None
            if once and not self.silent:
                recording.only_language = result.language


def finish(job: Job, tokenizer: Tokenizer) -> list[Window]:
    """Give a window's segments to its recording; returns what of it is to be decoded next: two halves, or a rest."""
    recording, window, result, options = job.recording, job.window, job.found, job.recording.options
    if not job.silent and too_much(result.hypothesis, window.duration, tokenizer) and not job.looks_wrong(tokenizer):
        recording.fallbacks += 1
        return halved(window)
    recording.carry = result.carried or recording.carry
    segments = [] if job.silent else segments_of(result, window, tokenizer, options)
    segments, doubted = without_inventions(segments, window, options)
    shown = placed(segments, window)
    recording.fallbacks += job.tries > 1 or doubted is not None
    if recording.language is None or (shown and not recording.segments):
        recording.language, recording.language_probability = result.language, result.language_probability
    recording.segments += shown
    if recording.said is not None and not job.silent:
        tokens = [token for segment in segments for token in segment.tokens]
        recording.said = [] if result.temperature > HOT else [*recording.said, *tokens]
    if doubted is not None:
        return _rest(window, doubted - window.start, least=0.0)
    if not segments or not options.timestamps:
        return []
    reached = max(each[-1].end for each in (segments, shown) if each) - window.start
    return _rest(window, reached, LEAST_REST) if reached >= LEAST_ADVANCE else []


def _rest(window: Window, reached: float, least: float) -> list[Window]:
    """What a window holds after ``reached`` seconds, if at least ``least`` of it may be speech."""
    rest = window.part(round(reached * SAMPLE_RATE))
    speech = sum(end - start for start, end in speech_spans(rest.samples))
    if window.duration - reached < least or speech < max(1, least * SAMPLE_RATE):
        return []
    return [sounding(rest)]
