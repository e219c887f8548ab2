"""Many recordings of any length, a bounded number of windows at a time.

Windows of all recordings wait in one buffer, are sorted by length, packed and decoded together; a recording is handed on with
its last one, whatever else of the buffer is to be decoded again. Memory does not grow with the length or the number of
recordings.

A window is first decoded with a short margin of silence. Whisper always saw a full 30 s, so what looks wrong is padded to 30 s
and decoded again; if that looks wrong too, temperatures follow (Whisper, section 4.5). Nothing falls back silently: it is
counted.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from whisper_moe.config import FULL_WINDOW, MAX_PACK_TOKENS, SAMPLE_RATE
from whisper_moe.generate.decode import TOKENS_PER_SECOND, DecodingResult, WindowDecoder, prompt_ids
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
from whisper_moe.model.router import NONE, Routing

MAX_ROWS = 40
"""Rows decoded together: a window's beams or samples count each. More read the weights less often; their states take memory."""
MAX_POSITIONS = 4 * MAX_PACK_TOKENS
"""Encoder positions whose keys and values are held at a time: 24 kB each in whisper-base."""
BUFFERED_WINDOWS = 96
"""Windows that wait to be sorted by length …"""
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
    duration: float = 0.0
    waiting: int = 1
    """Windows cut but not decoded yet, and one more until the last has been cut."""
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
class _Job:
    """A window on its way."""

    recording: Recording
    window: Window
    hint: str | None = None
    """Its language, where that is known."""
    result: DecodingResult = field(init=False)
    tries: int = 0
    """How often it was decoded until that result was accepted."""

    @property
    def astray(self) -> bool:
        """Whether the language that was heard is to give way to the one that its recording speaks most."""
        recording, probability = self.recording, self.result.language_probability
        doubted = recording.only_language is not None or (probability is not None and probability < SURE_LANGUAGE)
        return doubted and recording.main_language not in (None, self.result.language)


class Transcriber:
    """Runs a :class:`WindowDecoder` over recordings."""

    def __init__(
        self, decoder: WindowDecoder, options: TranscribeOptions, progress: Callable[[float], None] | None = None
    ) -> None:
        self.decoder, self.options, self.progress = decoder, options, progress or (lambda seconds: None)
        self.tries = attempts(options)
        self.one_by_one = options.carry_ttt or options.condition_on_previous_text
        self.most = 1 if self.one_by_one else BUFFERED_WINDOWS
        ttt = decoder.model.config.ttt
        if options.carry_ttt and (ttt is None or not ttt.encoder_layers or ttt.per_expert):
            raise ValueError("carry_ttt needs a model with TTT layers in its encoder that all experts share")

    def run(self, recordings: Iterable[Recording]) -> Iterator[Recording]:
        """Each recording as soon as it is complete or has failed: not in the order given."""
        waiting: list[_Job] = []
        for recording in recordings:
            job = None
            for job in self._read(recording):
                waiting.append(job)
                while len(waiting) >= self.most or sum(job.window.duration for job in waiting) >= BUFFERED_SECONDS:
                    waiting = yield from self._work(waiting)
            if job is None:
                yield recording
        while waiting:
            waiting = yield from self._work(waiting)

    def _read(self, recording: Recording) -> Iterator[_Job]:
        """Cut windows off a recording, the last one known to be the last; an error in its file ends it, and only it."""
        job = None
        if self.options.condition_on_previous_text:
            first = None if self.options.carry_initial_prompt else self.options.initial_prompt
            recording.said = prompt_ids(first, self.decoder.tokenizer)
        try:
            for window in recording.windows:
                recording.duration = max(recording.duration, window.end)
                sound = sounding(window)
                self.progress(window.duration - sound.duration)
                if len(sound.samples):
                    recording.waiting += 1
                    if job is not None:
                        yield job
                    job = _Job(recording, sound)
        except ValueError as error:
            recording.error = error
        recording.waiting -= 1
        if job is not None:
            yield job

    def _work(self, jobs: list[_Job]) -> Generator[Recording, None, list[_Job]]:
        """Decode what waits, or its first; returns what is to be decoded later, first what is left of these windows."""
        now, later = (jobs[:1], jobs[1:]) if self.one_by_one else (jobs, [])
        left: dict[_Job, list[_Job]] = {}
        for group in self._settled(now):
            recording = group[0].recording
            for job in group:
                left[job] = self._finish(job)
                recording.waiting += len(left[job]) - 1
                self.progress(job.window.duration - sum(rest.window.duration for rest in left[job]))
            if not recording.waiting:
                yield recording
        return [rest for job in now for rest in left[job]] + later

    def _settled(self, jobs: Sequence[_Job]) -> Iterator[list[_Job]]:
        """Windows with their results: those of one recording together, in order, as soon as the last of them has its own.

        Windows in another language than their recording's are decoded again, those of all recordings together.
        """
        again: set[_Job] = set()
        for job in jobs:
            job.hint = job.recording.only_language
        for group in self._decoded(jobs):
            for job in group:
                self._tell_language(job)
            astray = [job for job in group if job.astray and not is_silence(job.result, self.options)]
            for job in astray:
                job.hint = job.recording.main_language
            again.update(astray)
            if not astray:
                yield group
        for group in self._decoded([job for job in jobs if job in again]):
            yield [job for job in jobs if job.recording is group[0].recording]

    def _tell_language(self, job: _Job) -> None:
        """Tell a recording which language was surely heard in one of its windows."""
        recording, result = job.recording, job.result
        if (result.language_probability or 0.0) >= SURE_LANGUAGE:
            recording.spoken[result.language] += job.window.duration
            once = self.options.detect_language_once and recording.only_language is None
            if once and not is_silence(result, self.options):
                recording.only_language = result.language

    def _decoded(self, jobs: Sequence[_Job]) -> Iterator[list[_Job]]:
        waiting = Counter(job.recording for job in jobs)
        for job in self._accepted(jobs):
            waiting[job.recording] -= 1
            if not waiting[job.recording]:
                yield [each for each in jobs if each.recording is job.recording]

    def _accepted(self, jobs: Sequence[_Job]) -> Iterator[_Job]:
        """Each window as soon as its result is accepted: one that looks right, or the last.

        A window that fills its 30 s anyway is not decoded again just to be padded.
        """
        tried: dict[_Job, tuple[int, float]] = {}
        for attempt, (margin, temperature) in enumerate(self.tries):
            inputs = {job: (self.decoder.positions(len(job.window.samples), margin), temperature) for job in jobs}
            wrong = [job for job in jobs if tried.get(job) == inputs[job]]
            tried |= inputs
            for batch in self._batches([job for job in jobs if job not in wrong], margin, temperature):
                self._decode(batch, attempt)
                for job in batch:
                    if attempt < len(self.tries) - 1 and self._looks_wrong(job):
                        wrong.append(job)
                    else:
                        yield job
            jobs = wrong
        yield from jobs  # what they have already is what the last attempt would have given

    def _looks_wrong(self, job: _Job) -> bool:
        return bool(looks_wrong(job.result, job.window.duration, self.decoder.tokenizer, self.options))

    def _decode(self, jobs: Sequence[_Job], attempt: int) -> None:
        margin, temperature = self.tries[attempt]
        recording = jobs[0].recording  # the only one, where anything is handed on
        results = self.decoder.decode(
            [job.window.samples for job in jobs],
            self.options,
            temperature=temperature,
            margin=margin,
            hints=[job.hint for job in jobs],
            carry=recording.carry if self.options.carry_ttt else None,
            previous=recording.said,
            routing=self._kept(jobs, attempt),
        )
        for job, result in zip(jobs, results, strict=True):
            job.result, job.tries = result, job.tries + 1

    def _kept(self, jobs: Sequence[_Job], attempt: int) -> Routing | None:
        """Tries at a window keep the experts of the first; the last of many is the base's alone, if it may answer."""
        kept = [job.result.routing for job in jobs if attempt and job.result.routing is not None]
        if not kept:
            return None
        moe, allowed = self.decoder.model.config.moe, self.decoder.allowed_experts(self.options)
        none = moe is not None and moe.none_choice and (allowed is None or NONE in allowed)
        routing = Routing.cat(kept)
        return routing.without_experts() if none and attempt == len(self.tries) - 1 > 1 else routing

    def _batches(self, jobs: Sequence[_Job], margin: float, temperature: float) -> list[list[_Job]]:
        """Windows of about the same length together, as many as fit."""
        most = max(1, MAX_ROWS // self.options.search(temperature).beams)
        found: list[list[_Job]] = []
        used = MAX_POSITIONS
        for job in sorted(jobs, key=lambda job: -len(job.window.samples)):
            positions = self.decoder.positions(len(job.window.samples), margin)
            if not found or len(found[-1]) == most or used + positions > MAX_POSITIONS:
                found.append([])
                used = 0
            found[-1].append(job)
            used += positions
        return found

    def _finish(self, job: _Job) -> list[_Job]:
        """Give a window's segments to its recording; returns what of it is to be decoded later: two halves, or a rest."""
        recording, window, result, options = job.recording, job.window, job.result, self.options
        tokenizer, silence = self.decoder.tokenizer, is_silence(result, options)
        if not silence and too_much(result.hypothesis, window.duration, tokenizer) and not self._looks_wrong(job):
            recording.fallbacks += 1
            return [_Job(recording, half) for half in halved(window)]
        recording.carry = result.carried or recording.carry
        segments = [] if silence else segments_of(result, window, tokenizer, options)
        segments, doubted = without_inventions(segments, window, options)
        shown = placed(segments, window)
        recording.fallbacks += job.tries > 1 or doubted is not None
        if recording.language is None or (shown and not recording.segments):
            recording.language, recording.language_probability = result.language, result.language_probability
        recording.segments += shown
        if recording.said is not None and not silence:
            tokens = [token for segment in segments for token in segment.tokens]
            recording.said = [] if result.temperature > HOT else [*recording.said, *tokens]
        if doubted is not None:
            return _rest(job, doubted - window.start, least=0.0)
        if not segments or not options.timestamps:
            return []
        reached = max(each[-1].end for each in (segments, shown) if each) - window.start
        return _rest(job, reached, LEAST_REST) if reached >= LEAST_ADVANCE else []


def _rest(job: _Job, reached: float, least: float) -> list[_Job]:
    """A job for what a window holds after ``reached`` seconds, if at least ``least`` of it may be speech."""
    rest = job.window.part(round(reached * SAMPLE_RATE))
    speech = sum(end - start for start, end in speech_spans(rest.samples))
    if job.window.duration - reached < least or speech < max(1, least * SAMPLE_RATE):
        return []
    return [_Job(job.recording, sounding(rest))]
