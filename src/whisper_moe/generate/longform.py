"""Many recordings of any length, a bounded number of windows at a time.

Recordings are read as a stream and cut into windows of up to 30 s at their quietest moments. Windows of all recordings wait
in one buffer, are sorted by length, packed and decoded together; each goes back to its recording, and a recording is handed
on with its last one, whatever else of the buffer is to be decoded again. Memory does not grow with the length or the number
of recordings.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from whisper_moe.config import MAX_PACK_TOKENS, SAMPLE_RATE
from whisper_moe.generate.decode import DecodingResult, WindowDecoder, prompt_ids
from whisper_moe.generate.fallback import Batches, decode_with_fallback, is_silence, looks_wrong
from whisper_moe.generate.options import TranscribeOptions
from whisper_moe.generate.result import Segment, Transcription
from whisper_moe.generate.segments import (
    LEAST_ADVANCE,
    joined,
    numbered,
    placed,
    segments_of,
    too_much,
    without_inventions,
)
from whisper_moe.media.windows import Window, halved, sounding, speech_spans
from whisper_moe.model.block import Carry

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


@dataclass(eq=False)
class Recording:
    """A recording on its way: its windows so far, and what they said."""

    name: str
    windows: Iterator[Window]
    index: int = 0
    """Its place among those given."""
    duration: float = 0.0
    waiting: int = 0
    """Windows cut but not decoded yet."""
    exhausted: bool = False
    error: Exception | None = None
    notes: list[str] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    spoken: dict[str, float] = field(default_factory=dict)
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
    def complete(self) -> bool:
        return self.exhausted and self.waiting == 0

    def result(self) -> Transcription:
        segments = numbered(self.segments)
        return Transcription(
            text=joined(segments), segments=segments, language=self.language,
            language_probability=self.language_probability, duration=round(self.duration, 3), fallbacks=self.fallbacks,
            notes=tuple(self.notes),
            source=self.name,
        )  # fmt: skip


@dataclass(eq=False)
class _Job:
    recording: Recording
    window: Window
    take: DecodingResult = field(init=False)
    tries: int = 0
    """How often it was decoded until that take was accepted."""
    left: list[_Job] = field(default_factory=list)
    """What of the window is to be heard again."""


def _seconds(jobs: Sequence[_Job]) -> float:
    return sum(job.window.duration for job in jobs)


class Transcriber:
    """Runs a :class:`WindowDecoder` over recordings."""

    def __init__(
        self, decoder: WindowDecoder, options: TranscribeOptions, progress: Callable[[float], None] | None = None
    ) -> None:
        self.decoder, self.options, self.progress = decoder, options, progress
        self.one_by_one = options.carry_ttt or options.condition_on_previous_text
        self.buffered = 1 if self.one_by_one else BUFFERED_WINDOWS
        ttt = decoder.model.config.ttt
        if options.carry_ttt and (ttt is None or not ttt.encoder_layers or ttt.per_expert):
            raise ValueError("carry_ttt needs a model with TTT layers in its encoder that all experts share")

    def run(self, recordings: Iterable[Recording]) -> Iterator[Recording]:
        """Each recording as soon as it is complete or has failed: not in the order given."""
        buffer: list[_Job] = []
        for recording in recordings:
            job = None
            for job in self._read(recording):
                buffer.append(job)
                if len(buffer) >= self.buffered or _seconds(buffer) >= BUFFERED_SECONDS:
                    buffer = yield from self._work(buffer)
            if job is None:  # nothing in it to wait for
                yield recording
        while buffer:
            buffer = yield from self._work(buffer)

    def _read(self, recording: Recording) -> Iterator[_Job]:
        """Cut windows off a recording, the last one known to be the last; an error in its file ends it, and only it."""
        job = None
        if self.options.condition_on_previous_text:
            first = None if self.options.carry_initial_prompt else self.options.initial_prompt
            recording.said = prompt_ids(first, self.decoder.tokenizer)
        try:
            for window in recording.windows:
                recording.duration = max(recording.duration, window.end)
                heard = sounding(window)
                self._report(window.duration - heard.duration)
                if len(heard.samples):
                    recording.waiting += 1
                    if job is not None:
                        yield job
                    job = _Job(recording, heard)
        except ValueError as error:
            recording.error = error
        recording.exhausted = True
        if job is not None:
            yield job

    def _work(self, jobs: list[_Job]) -> Generator[Recording, None, list[_Job]]:
        """Decode all waiting windows; returns those that are left over: speech after a window's last timestamp."""
        while self.one_by_one and jobs:  # each goes on from what all before it left
            jobs = (yield from self._decode(jobs[:1])) + jobs[1:]
        return (yield from self._decode(jobs))

    def _decode(self, jobs: list[_Job]) -> Generator[Recording, None, list[_Job]]:
        for group in self._settled(jobs):
            for job in group:
                job.left = self._finish(job)
                self._report(job.window.duration - _seconds(job.left))
            if group[0].recording.complete:
                yield group[0].recording
        return [left for job in jobs for left in job.left]

    def _settled(self, jobs: Sequence[_Job]) -> Iterator[list[_Job]]:
        """As :meth:`_heard`, but windows in another language than their recording's are decoded again, those of all together."""
        again: dict[_Job, str] = {}
        for group in self._heard({job: job.recording.only_language for job in jobs}):
            astray = self._astray(group)
            again |= astray
            if not astray:
                yield group
        for group in self._heard({job: again[job] for job in jobs if job in again}):
            yield [job for job in jobs if job.recording is group[0].recording]

    def _heard(self, hints: Mapping[_Job, str | None]) -> Iterator[list[_Job]]:
        """Windows with their takes: those of one recording together, in order, as soon as the last of them has its own."""
        if not hints:
            return
        jobs, waiting = list(hints), Counter(job.recording for job in hints)
        clips, first = [job.window.samples for job in jobs], jobs[0].recording
        takes = decode_with_fallback(
            self.decoder, clips, self.options, hints=list(hints.values()), groups=self._batches(clips),
            carry=first.carry if self.options.carry_ttt else None, previous=first.said,
        )  # fmt: skip
        for index, take, thrown_away in takes:
            job = jobs[index]
            job.take, job.tries = take, job.tries + thrown_away + 1
            waiting[job.recording] -= 1
            if not waiting[job.recording]:
                yield [each for each in jobs if each.recording is job.recording]

    def _report(self, seconds: float) -> None:
        if self.progress is not None:
            self.progress(seconds)

    def _batches(self, clips: Sequence[np.ndarray]) -> Batches:
        def batches(indices: Sequence[int], margin: float, temperature: float) -> list[list[int]]:
            """Clips of about the same length together, as many as fit."""
            most = max(1, MAX_ROWS // self.options.search(temperature).beams)
            found: list[list[int]] = []
            used = MAX_POSITIONS
            for index in sorted(indices, key=lambda i: -len(clips[i])):
                positions = self.decoder.positions(len(clips[index]), margin)
                if not found or len(found[-1]) == most or used + positions > MAX_POSITIONS:
                    found.append([])
                    used = 0
                found[-1].append(index)
                used += positions
            return found

        return batches

    def _astray(self, jobs: Sequence[_Job]) -> dict[_Job, str]:
        """Windows of one recording in an unsure language, or not in its only one; with the language that it speaks most."""
        once, recording = self.options.detect_language_once, jobs[0].recording
        spoken, astray = recording.spoken, dict[_Job, str]()
        for job in jobs:
            take = job.take
            if take.language_probability is not None and take.language_probability >= SURE_LANGUAGE:
                spoken[take.language] = spoken.get(take.language, 0.0) + job.window.duration
                if once and recording.only_language is None and not is_silence(take, self.options):
                    recording.only_language = take.language
        only = recording.only_language
        for job in jobs:
            take = job.take
            sure = take.language_probability is None or take.language_probability >= SURE_LANGUAGE
            if sure and only is None:
                continue
            main = only or (max(spoken, key=lambda code: spoken[code]) if spoken else take.language)
            if main != take.language and not is_silence(take, self.options):
                astray[job] = main
        return astray

    def _finish(self, job: _Job) -> list[_Job]:
        """Give a window's segments to its recording; returns a job for speech that the take did not reach."""
        recording, window, take, tokenizer = job.recording, job.window, job.take, self.decoder.tokenizer
        recording.waiting -= 1
        silence = is_silence(take, self.options)
        halve = (
            not silence
            and too_much(take.hypothesis, window.duration, tokenizer)
            and looks_wrong(take, window.duration, tokenizer, self.options) is None
        )
        recording.fallbacks += job.tries > 1 or halve
        if halve:
            recording.waiting += 2
            return [_Job(recording, half) for half in halved(window)]
        recording.carry = take.carried or recording.carry
        segments = [] if silence else self._segments(take, window)
        segments, doubted = self._trusted(segments, window)
        shown = placed(segments, window)
        if recording.language is None or (shown and not recording.segments):
            recording.language, recording.language_probability = take.language, take.language_probability
        recording.segments += shown
        if recording.said is not None and not silence:
            tokens = [token for segment in segments for token in segment.tokens]
            recording.said = [] if take.temperature > HOT else [*recording.said, *tokens]
        if doubted is not None:
            recording.fallbacks += job.tries == 1
            return self._later(recording, window, doubted - window.start, least=0.0)
        if not segments or not self.options.timestamps:
            return []
        reached = max(each[-1].end for each in (segments, shown) if each) - window.start
        return self._later(recording, window, reached, LEAST_REST) if reached >= LEAST_ADVANCE else []

    def _segments(self, take: DecodingResult, window: Window) -> list[Segment]:
        marks = {"prepended": self.options.prepend_punctuations, "appended": self.options.append_punctuations}
        return segments_of(take, window.start, window.duration, self.decoder.tokenizer, **marks)

    def _trusted(self, segments: list[Segment], window: Window) -> tuple[list[Segment], float | None]:
        """Without what was probably made up in silence, if asked for; then also the time from which to listen again."""
        threshold = self.options.hallucination_silence_threshold
        if threshold is None:
            return segments, None
        marks = self.options.prepend_punctuations + self.options.append_punctuations
        return without_inventions(segments, window.start, window.end, threshold, marks)

    def _later(self, recording: Recording, window: Window, reached: float, least: float) -> list[_Job]:
        """A job for what a window holds after ``reached`` seconds, if more than ``least`` of it may be speech."""
        cut = round(reached * SAMPLE_RATE)
        samples = window.samples[cut:]
        speech = sum(end - start for start, end in speech_spans(samples)) if len(samples) else 0
        if window.duration - reached < least or speech < max(1, least * SAMPLE_RATE):
            return []
        recording.waiting += 1
        return [_Job(recording, sounding(Window(window.start + cut / SAMPLE_RATE, samples)))]
