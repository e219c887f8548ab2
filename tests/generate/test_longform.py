"""Recordings of any length and number pass through a bounded buffer; each comes out whole, in its place, by itself. What looks
wrong is tried again: padded first, then at rising temperatures, and all of it is counted."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from generate.tiny import CONFIG, tiny_tokenizer, tiny_whisper_moe

from whisper_moe import MediaError
from whisper_moe.config import MoEConfig
from whisper_moe.generate.align import WordTiming
from whisper_moe.generate.decode import DecodingResult, Opened, WindowDecoder
from whisper_moe.generate.longform import (
    BUFFERED_SECONDS,
    BUFFERED_WINDOWS,
    Recording,
    attempts,
    is_silence,
    looks_wrong,
)
from whisper_moe.generate.options import TranscribeOptions
from whisper_moe.generate.schedule import MAX_POSITIONS, MAX_ROWS, Schedule
from whisper_moe.generate.search import Hypothesis, Lane, Rules, Search
from whisper_moe.media.windows import Window, cut_windows
from whisper_moe.model.router import NONE, Routing

TOKENIZER = tiny_tokenizer()
OPTIONS = TranscribeOptions()
RATE = 16_000


def said(
    text: str = " word", *, until: float | None = None, language: str = "en", sure: float | None = 0.9
) -> DecodingResult:
    """A result that ends at a time in its window, or with the window."""
    tokens = [TOKENIZER.timestamp_begin, *TOKENIZER.encode(text)]
    if until is not None:
        tokens.append(TOKENIZER.timestamp_begin + round(until / 0.02))
    return DecodingResult(Hypothesis(tuple(tokens), -0.1, True), language, sure, 0.01, 0.0, ())


def silence() -> DecodingResult:
    quiet = said(" you")
    return replace(quiet, no_speech_prob=0.9, hypothesis=replace(quiet.hypothesis, sum_logprob=-99.0))


class Rows:
    """A state of as many rows as there are."""

    joins = True

    def joined(self, other: Rows) -> Rows:
        return self

    def keep(self, segments: list[int]) -> Rows:
        return self


@dataclass
class Listener:
    """A decoder that hears the loudness of a clip and answers by ``answers``; anything else it calls by its loudness."""

    answers: dict[float, Callable[[float, str | None], DecodingResult]] = field(default_factory=dict)
    good_from: dict[float, int] = field(default_factory=dict)
    """By loudness: the attempt from which on the answer is a good one."""
    batches: list[list[int]] = field(default_factory=list)
    calls: list[tuple[tuple[float, ...], float, float, tuple[str | None, ...]]] = field(default_factory=list)
    """Loudness of each clip, margin, temperature, hints."""
    routings: list[Routing | None] = field(default_factory=list)
    tokenizer: Any = TOKENIZER
    model: Any = field(default_factory=lambda: SimpleNamespace(config=CONFIG))

    allowed_experts = WindowDecoder.allowed_experts

    def positions(self, samples: int, margin: float) -> int:
        return min(1500, round((samples / RATE + margin) * 50))

    def open(self, clips: Sequence[np.ndarray], options: TranscribeOptions, **how: Any) -> list[Opened]:
        """Windows whose search ends with the next step."""
        results = self.decode(clips, options, **how)
        choice = options.search(how["temperature"])
        searches = [Search(Rules(()), choice, limit=1) for _ in clips]
        logits = torch.zeros(choice.beams * len(clips), 2 * choice.beams)
        finish = lambda places, found: [results[place] for place in places]  # noqa: E731
        return [Opened(self.step, 0, searches, logits, Rows(), results, finish, [*range(len(clips))])]

    def step(self, tokens: torch.Tensor, state: Rows) -> tuple[torch.Tensor, Rows]:
        raise AssertionError("nothing is left to decode")

    def decode(
        self,
        clips: Sequence[np.ndarray],
        options: TranscribeOptions,
        *,
        temperature: float,
        margin: float,
        hints: Sequence[str | None] | None = None,
        carry: Any = None,
        previous: Any = None,
        routing: Routing | None = None,
    ) -> list[DecodingResult]:
        self.routings.append(routing)
        loud = [round(float(clip[0]), 4) for clip in clips]
        hints = hints or [None] * len(clips)
        before = [level for levels, *_ in self.calls for level in levels]
        self.batches.append([self.positions(len(clip), margin) for clip in clips])
        self.calls.append((tuple(loud), margin, temperature, tuple(hints)))
        results = []
        for clip, level, hint in zip(clips, loud, hints, strict=True):
            answer = self.answers.get(level)
            result = answer(len(clip) / RATE, hint) if answer else said(f" {level:g}")
            if before.count(level) < self.good_from.get(level, 0):
                result = unsure(0.0, None)
            results.append(result if answer else replace(result, temperature=temperature))
        return results


def window(start: float, seconds: float, loudness: float) -> Window:
    return Window(start, np.full(round(seconds * RATE), loudness, np.float32))


def recording(name: str, *loudness: float, seconds: float = 2.0) -> Recording:
    return Recording(name, iter([window(i * seconds, seconds, level) for i, level in enumerate(loudness)]))


def run(listener: Listener, recordings: Sequence[Recording], **more: Any) -> list[Recording]:
    """In the order given."""
    options = more.pop("options", TranscribeOptions(temperatures=(0.0,)))
    for each in recordings:
        each.options = options
    done = list(Schedule(listener, **more).run(recordings))
    assert len(done) == len(recordings)
    return sorted(done, key=list(recordings).index)


def batches_until(listener: Listener, recordings: Sequence[Recording], **options: Any) -> dict[str, int]:
    """How many batches had been decoded when each recording was handed on, in that order."""
    for each in recordings:
        each.options = TranscribeOptions(temperatures=(0.0,), **options)
    done = Schedule(listener).run(recordings)  # pyright: ignore[reportArgumentType]
    return {each.name: len(listener.batches) for each in done}


# How much waits.


@pytest.mark.parametrize(
    ("seconds", "count", "most"), [(1.0, 1_000, BUFFERED_WINDOWS), (30.0, 100, BUFFERED_SECONDS / 30)]
)
def test_no_more_windows_are_held_than_the_buffer_takes(seconds: float, count: int, most: float) -> None:
    held: list[weakref.ref[np.ndarray]] = []
    highest = 0

    def windows() -> Iterator[Window]:
        nonlocal highest
        for index in range(count):
            new = window(index * seconds, seconds, 0.1)
            held.append(weakref.ref(new.samples))
            highest = max(highest, sum(each() is not None for each in held))
            yield new
            del new

    (done,) = run(Listener(), [Recording("long", windows())])
    assert len(done.segments) == count
    assert most <= highest <= most + 2
    assert sum(each() is not None for each in held) <= 1, "windows outlive their recording"


def test_a_result_does_not_wait_for_the_end_of_a_long_recording() -> None:
    read: list[int] = []

    def long() -> Iterator[Window]:
        for index in range(10 * BUFFERED_WINDOWS):
            read.append(index)
            yield window(index, 1.0, 0.1)

    first = next(Schedule(Listener()).run([recording("short", 0.2), Recording("long", long())]))
    assert (first.name, first.result().text) == ("short", "0.2")
    assert len(read) <= BUFFERED_WINDOWS


def unsure(seconds: float, hint: str | None) -> DecodingResult:
    result = said(" unsure")
    return replace(result, hypothesis=replace(result.hypothesis, sum_logprob=-99.0))


def test_a_recording_does_not_wait_for_what_is_tried_again_of_another() -> None:
    recordings = [recording("a", 0.2), recording("b", 0.1), recording("c", 0.1, 0.2), recording("d", 0.1, 0.1)]
    assert list(batches_until(Listener({0.2: unsure}), recordings).items()) == [("b", 1), ("d", 1), ("a", 2), ("c", 2)]


def test_unsure_languages_of_all_recordings_are_settled_in_one_batch_and_hold_up_nobody_else() -> None:
    listener = Listener({0.1: speaking("en", 0.9), 0.2: speaking("cy", 0.3), 0.3: unsure})
    talks = [recording(name, *levels) for name, *levels in (("a", 0.1, 0.2), ("b", 0.3), ("c", 0.1), ("d", 0.2, 0.1))]
    assert list(batches_until(listener, talks).items()) == [("c", 1), ("b", 2), ("a", 3), ("d", 3)]
    assert list(map(len, listener.batches)) == [6, 1, 2]
    assert [talk.result().text for talk in talks] == ["en en", "unsure", "en", "en en"]


def test_recordings_say_together_what_each_says_alone() -> None:
    """Windows that are tried again, settled, halved, silent, or leave a rest."""
    answers = {
        0.1: speaking("en", 0.9),
        0.2: speaking("cy", 0.3),
        0.3: unsure,
        0.4: cut_off,
        0.5: lambda *_: silence(),
        0.6: lambda seconds, hint: said(f" {seconds:g}", until=seconds / 2),
        0.7: speaking("hi", 0.8),
    }
    levels = [[0.1 * (1 + (i * i + 3 * j) % 7) for j in range(1 + i % 5)] for i in range(40)]

    def talk(i: int) -> Recording:
        return recording(str(i), *levels[i], seconds=4.0 + i % 9)

    for options in (TranscribeOptions(), TranscribeOptions(detect_language_once=True, condition_on_previous_text=True)):
        together = run(Listener(answers), [talk(i) for i in range(40)], options=options)
        alone = [run(Listener(answers), [talk(i)], options=options)[0] for i in range(40)]
        assert [each.result() for each in together] == [each.result() for each in alone]
        assert 10 < sum(each.fallbacks > 0 for each in alone) < 40


def test_batches_fit_and_hold_clips_of_about_one_length() -> None:
    listener = Listener()
    lengths = [1.0 + (i * 7 % 29) for i in range(200)]
    recordings = [recording(str(i), 0.1, seconds=length) for i, length in enumerate(lengths)]
    run(listener, recordings, options=TranscribeOptions(context_margin=0.0, temperatures=(0.0,)))
    assert sorted(n for batch in listener.batches for n in batch) == sorted(round(length * 50) for length in lengths)
    assert all(len(batch) <= MAX_ROWS and sum(batch) <= MAX_POSITIONS for batch in listener.batches)
    assert all(batch == sorted(batch, reverse=True) for batch in listener.batches)


def test_a_short_recording_does_not_wait_for_a_long_one_that_came_first() -> None:
    """Recordings take turns: one of ten hours before one of a second."""
    read: list[int] = []

    def ten_hours() -> Iterator[Window]:
        for index in range(3600):
            read.append(index)
            yield window(index * 10.0, 10.0, 0.1)

    schedule = Schedule(Listener(), None)  # pyright: ignore[reportArgumentType]
    schedule.submit(Recording("long", ten_hours()))
    schedule.tick()
    short = recording("short", 0.2)
    schedule.submit(short)
    assert len(read) < 2 * BUFFERED_WINDOWS
    assert schedule.tick() == [short]


def test_what_is_cancelled_is_not_decoded() -> None:
    listener = Listener()
    schedule, gone = Schedule(listener), recording("gone", *[0.3] * 50)  # pyright: ignore[reportArgumentType]
    kept = recording("kept", 0.2)
    schedule.submit(gone)
    schedule.submit(kept)
    schedule.cancel(gone)
    assert schedule.tick() == [kept] and not schedule.recordings
    assert {level for levels, *_ in listener.calls for level in levels} == {0.2}


def test_windows_that_join_others_say_what_they_say_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model with room for four rows: windows of twelve recordings, some with beams, come and go."""
    monkeypatch.setattr("whisper_moe.generate.schedule.MAX_ROWS", 4)
    # It never ends a text: by their length they end at different times.
    monkeypatch.setattr(WindowDecoder, "_token_limit", lambda self, samples, margin: 4 + samples // 8_000)
    model, lanes = tiny_whisper_moe(), list[int]()
    join = Lane.join

    def spy(self: Lane, *more: Any) -> None:
        lanes.append(len(self))
        join(self, *more)

    monkeypatch.setattr(Lane, "join", spy)
    noise = np.random.default_rng(3).normal(0, 0.1, 12 * RATE).astype(np.float32)
    clips = [noise[: round((1 + i * 5 % 9) * RATE)] for i in range(12)]
    changes: list[dict[str, Any]] = [
        {},
        {"beam_size": 2},
        {"temperatures": (0.8,), "best_of": 2},
        {"word_timestamps": True},
    ]
    for change in changes:
        asked = {"logprob_threshold": None, "no_speech_threshold": None, "language": "en"} | change
        lanes.clear()
        together = model.transcribe(clips, **asked)
        assert any(lanes), "none joined others"
        for clip, found in zip(clips, together, strict=True):
            (alone,) = model.transcribe([clip], **asked)
            assert [each.tokens for each in found.segments] == [each.tokens for each in alone.segments]
            assert [each.words for each in found.segments] == [each.words for each in alone.segments]


@pytest.mark.parametrize(("options", "most"), [({"beam_size": 5}, MAX_ROWS // 5), ({"beam_size": MAX_ROWS + 1}, 1)])
def test_beams_count_among_the_rows_of_a_batch(options: dict[str, int], most: int) -> None:
    listener = Listener()
    run(listener, [recording(str(i), 0.1) for i in range(50)], options=TranscribeOptions(**options))
    assert sum(map(len, listener.batches)) == 50
    assert max(map(len, listener.batches)) == most


# What is tried again.


def at(seconds: float) -> int:
    return TOKENIZER.timestamp_begin + round(seconds / 0.02)


def verdict(
    text: str = "Four words are said", *, average: float = -0.2, finished: bool = True, **changes: Any
) -> DecodingResult:
    tokens = tuple(TOKENIZER.encode(text))
    found = Hypothesis(tokens, average * (len(tokens) + 1), finished)
    return replace(DecodingResult(found, "en", None, 0.01, 0.0, ()), **changes)


def why(found: DecodingResult, seconds: float = 3.0, **options: Any) -> str | None:
    return looks_wrong(found, seconds, TOKENIZER, replace(OPTIONS, **options))


def test_a_good_take_is_trusted() -> None:
    assert why(verdict()) is None
    assert why(verdict(average=-1.0)) is None, "a threshold itself is still good"
    assert why(verdict("ten letters"), seconds=0.05) is None, "a short word fits into any time"


@pytest.mark.parametrize(
    ("found", "seconds", "reason", "off"),
    [
        (verdict("Fail better. " * 9), 30.0, "repetitive", {"compression_ratio_threshold": None}),
        (verdict(average=-1.01), 3.0, "unsure", {"logprob_threshold": None}),
        (verdict(finished=False), 3.0, "endless", None),
        (verdict("The quick brown fox jumps"), 0.5, "too long for its time", None),
    ],
    ids=["repetitive", "unsure", "endless", "too long"],
)
def test_each_reason_speaks_against_a_verdict(
    found: DecodingResult, seconds: float, reason: str, off: dict[str, None] | None
) -> None:
    assert why(found, seconds) == reason
    if off is not None:
        assert why(found, seconds, **off) is None


def test_a_text_cut_off_behind_closed_segments_goes_on_and_is_no_loop() -> None:
    """Some languages need more tokens for 30 s than the decoder may sample."""
    closed = [at(0), *TOKENIZER.encode("one"), at(2.5), at(2.5)]
    cut_off = Hypothesis((*closed, *TOKENIZER.encode("tw")), -1.0, False)
    assert why(verdict(hypothesis=cut_off), seconds=3.0) is None
    assert why(verdict(hypothesis=cut_off), seconds=2.0) == "endless", "it went on behind the end of the sound"
    early = Hypothesis((at(0), *TOKENIZER.encode("one"), at(0.5), at(0.5), 65), -1.0, False)
    assert why(verdict(hypothesis=early), seconds=3.0) == "endless", "it got nowhere"


def test_silence_is_silence_however_it_reads() -> None:
    for found in (
        verdict(average=-1.5),
        verdict("Fail better. " * 9, average=-1.5),
        verdict(average=-1.5, finished=False),
    ):
        quiet = replace(found, no_speech_prob=0.7)
        assert is_silence(quiet, OPTIONS)
        assert why(quiet) is None
        assert why(found) is not None


def test_a_sure_text_speaks_against_silence() -> None:
    assert not is_silence(verdict(average=-0.2, no_speech_prob=0.9), OPTIONS)
    assert is_silence(verdict(average=-0.2, no_speech_prob=0.9), replace(OPTIONS, logprob_threshold=None))
    assert not is_silence(verdict(average=-3.0, no_speech_prob=0.9), replace(OPTIONS, no_speech_threshold=None))


def test_first_padding_then_temperatures() -> None:
    assert attempts(TranscribeOptions(context_margin=2.0, temperatures=(0.0, 0.4, 1.0))) == [
        (2.0, 0.0),
        (30.0, 0.0),
        (30.0, 0.4),
        (30.0, 1.0),
    ]
    assert attempts(TranscribeOptions(context_margin=30.0, temperatures=(0.0, 0.4))) == [(30.0, 0.0), (30.0, 0.4)]
    assert attempts(TranscribeOptions(context_margin=1.0, temperatures=(0.2,))) == [(1.0, 0.2), (30.0, 0.2)]


def tried_again(*good_from: int, seconds: float = 1.0, **options: Any) -> tuple[Listener, list[Recording]]:
    """Windows whose result is good from that attempt on, each a recording; their loudness is their place."""
    listener = Listener(good_from={0.1 * (i + 1): number for i, number in enumerate(good_from)})
    listener.good_from = {round(level, 4): number for level, number in listener.good_from.items()}
    asked = TranscribeOptions(**{"context_margin": 2.0, "temperatures": (0.0, 0.5, 1.0)} | options)
    talks = [recording(str(i), round(0.1 * (i + 1), 4), seconds=seconds) for i in range(len(good_from))]
    return listener, run(listener, talks, options=asked)


def test_only_what_looks_wrong_is_tried_again_and_is_counted() -> None:
    listener, done = tried_again(0, 3, 1, 2)
    assert [(levels, margin, temperature) for levels, margin, temperature, _ in listener.calls] == [
        ((0.1, 0.2, 0.3, 0.4), 2.0, 0.0),
        ((0.2, 0.3, 0.4), 30.0, 0.0),
        ((0.2, 0.4), 30.0, 0.5),
        ((0.2,), 30.0, 1.0),
    ]
    assert [each.segments[0].temperature for each in done] == [0.0, 1.0, 0.0, 0.5]
    assert [each.fallbacks for each in done] == [0, 1, 1, 1]


def test_a_window_that_fills_its_thirty_seconds_is_not_decoded_twice_alike() -> None:
    listener, (done,) = tried_again(1, seconds=29.0)
    assert [(margin, temperature) for _, margin, temperature, _ in listener.calls] == [(2.0, 0.0), (30.0, 0.5)]
    assert done.fallbacks == 1
    listener, (done,) = tried_again(1, seconds=29.0, temperatures=(0.0,))
    assert (len(listener.calls), done.fallbacks) == (1, 0)


# What comes out.


def test_a_recording_that_fails_hurts_no_neighbour() -> None:
    def broken() -> Iterator[Window]:
        yield window(0.0, 2.0, 0.3)
        raise MediaError("broken", "the sound is damaged", 2.0)

    recordings = [
        recording("a", 0.1, 0.2),
        Recording("broken", broken()),
        recording("b", 0.4),
        Recording("none", iter(())),
    ]
    done = run(Listener(), recordings)
    assert [each.name for each in done] == ["a", "broken", "b", "none"]
    assert [str(each.error) if each.error else None for each in done] == [
        None,
        "broken: the sound is damaged (decoding stopped after 2.00 s)",
        None,
        None,
    ]
    assert [each.result().text for each in done if not each.error] == ["0.1 0.2", "0.4", ""]


def test_silent_windows_are_not_decoded_and_still_take_their_time() -> None:
    listener, heard = Listener(), []
    (done,) = run(listener, [recording("quiet", 0.0, 0.1, 0.00001)], progress=heard.append)
    result = done.result()
    assert sum(map(len, listener.batches)) == 1
    assert (result.text, result.duration, [s.start for s in result.segments]) == ("0.1", 6.0, [2.0])
    assert sum(heard) == pytest.approx(6.0)


# What is left behind the last timestamp.


def test_what_a_window_left_unsaid_is_heard_again_from_there() -> None:
    listener, heard = Listener({0.1: lambda seconds, hint: said(f" {seconds:g}", until=4.0)}), []
    (done,) = run(listener, [recording("long", 0.1, 0.2, seconds=10.0)], progress=heard.append)
    times = [(s.start, s.end, s.text) for s in done.result().segments]
    assert times == [(0.0, 4.0, " 10"), (4.0, 8.0, " 6"), (8.0, 10.0, " 2"), (10.0, 20.0, " 0.2")]
    assert [s.id for s in done.result().segments] == [0, 1, 2, 3]
    assert sum(heard) == pytest.approx(20.0)


@pytest.mark.parametrize(
    ("until", "again"), [(0.02, 0), (0.98, 0), (1.0, 28), (5.0, 5), (28.4, 1), (28.6, 0), (30.0, 0)]
)
def test_a_window_is_heard_again_only_while_that_gets_somewhere(until: float, again: int) -> None:
    listener = Listener({0.1: lambda seconds, hint: said(until=until)})
    run(listener, [recording("long", 0.1, seconds=30.0)])
    assert len(listener.batches) == 1 + again


def test_a_rest_without_speech_is_left() -> None:
    samples = np.concatenate([np.full(6 * RATE, 0.1, np.float32), np.zeros(20 * RATE, np.float32)])
    listener = Listener({0.1: lambda seconds, hint: said(until=5.5)})
    run(listener, [Recording("half", iter([Window(0.0, samples)]))])
    assert len(listener.batches) == 1


def test_without_times_nothing_is_left() -> None:
    listener = Listener({0.1: lambda seconds, hint: said(until=4.0)})
    run(listener, [recording("a", 0.1, seconds=30.0)], options=TranscribeOptions(timestamps=False))
    assert len(listener.batches) == 1


# When it was said.

NOISE = np.random.default_rng(0).normal(0, 1, 60 * RATE).astype(np.float32)
VOICE = NOISE * np.tile(np.repeat([1.0, 0.3], RATE // 8), 240).astype(np.float32) * 0.1
"""Syllables four times a second."""


def spoken_between(seconds: float, *spans: tuple[float, float], floor: float = 0.0) -> np.ndarray:
    """Speech in the spans, and a noise of so much over all of it."""
    sound = NOISE[: round(seconds * RATE)] * np.float32(floor)
    for start, end in spans:
        sound[round(start * RATE) : round(end * RATE)] += VOICE[: round(end * RATE) - round(start * RATE)]
    return sound


class Teller(Listener):
    """Says one segment from the start of a window to its end, as Whisper does; its first word swallows the silence before."""

    def decode(self, clips: Sequence[np.ndarray], options: TranscribeOptions, **_: Any) -> list[DecodingResult]:
        results: list[DecodingResult] = []
        for clip in clips:
            loud, end = np.flatnonzero(np.abs(clip) > 0.02), len(clip) // 320 * 0.02
            results.append(said(" ab c", until=end) if len(loud) else silence())
            if len(loud) and options.word_timestamps:
                starts = [0.0, *(loud[0] / RATE + 0.5 * np.arange(1, 10)).tolist()]
                words = zip([" a", *"bcdefghij"], starts, [*starts[1:], end], strict=True)
                timings = tuple(WordTiming(word, tuple(TOKENIZER.encode(word)), a, b, 0.9) for word, a, b in words)
                tokens = [id for timing in timings for id in timing.tokens]
                hypothesis = replace(said(until=end).hypothesis, tokens=(TOKENIZER.timestamp_begin, *tokens))
                results[-1] = replace(results[-1], hypothesis=hypothesis, timings=timings)
        return results


@pytest.mark.parametrize("timed", [False, True], ids=["cues", "words"])
@pytest.mark.parametrize("floor", [0.0, 1e-3], ids=["digital silence", "noise"])
def test_a_cue_begins_with_the_sound_and_ends_with_it(floor: float, timed: bool) -> None:
    wave = spoken_between(60.0, (40.0, 45.0), floor=floor)
    recording = Recording("late", cut_windows([wave], max_seconds=30.0))
    (done,) = run(Teller(), [recording], options=TranscribeOptions(temperatures=(0.0,), word_timestamps=timed))
    (segment,) = done.result().segments
    assert 39.75 <= segment.start <= 40.0 and 45.0 <= segment.end <= 45.25
    if timed:
        words = segment.words or ()
        assert (len(words), words[0].start, words[-1].end) == (10, segment.start, segment.end)


def test_quiet_speech_before_loud_speech_belongs_to_its_cue() -> None:
    """20 dB below, and well above the noise."""
    wave = spoken_between(12.0, (6.0, 11.0), floor=1e-4)
    wave[2 * RATE : 5 * RATE] += VOICE[: 3 * RATE] / 10
    (done,) = run(Teller(), [Recording("quiet", iter([Window(0.0, wave)]))])
    (segment,) = done.result().segments
    assert 1.75 <= segment.start <= 2.0 and 11.0 <= segment.end <= 11.25


def test_what_was_said_before_a_pause_does_not_hold_the_cue_after_it() -> None:
    """The second cue is told to begin where the first ends, as speech dies away, ten seconds before its own words."""
    begin = TOKENIZER.timestamp_begin
    tokens = (begin, *TOKENIZER.encode(" a"), begin + 245, begin + 245, *TOKENIZER.encode(" b"), begin + 900)
    wave = spoken_between(18.0, (0.0, 5.0), (15.0, 18.0), floor=1e-4)
    wave[0] = 0.2
    result = replace(said(), hypothesis=Hypothesis(tokens, -0.1, True))
    (done,) = run(Listener({0.2: lambda *_: result}), [Recording("pause", iter([Window(0.0, wave)]))])
    first, second = done.result().segments
    assert (first.start, first.end) == (0.0, 4.9)
    assert 14.75 <= second.start <= 15.0 and second.end == 18.0


def test_what_was_made_up_is_left_and_what_is_behind_its_silence_heard_again() -> None:
    """An odd word behind 8 s of silence, then speech: the window is heard again from there."""

    def made_up(seconds: float, hint: str | None) -> DecodingResult:
        if seconds < 12:
            return said(" real")
        timing = WordTiming(" you", tuple(TOKENIZER.encode(" you")), 8.0, 8.1, 0.01)
        return replace(said(" you"), timings=(timing,))

    wave = spoken_between(12.0, (9.0, 12.0), floor=1e-4)
    wave[0] = wave[8 * RATE] = 0.3
    options = TranscribeOptions(temperatures=(0.0,), word_timestamps=True)
    strict = replace(options, hallucination_silence_threshold=2.0)
    texts = []
    for asked in (options, strict):
        (done,) = run(Listener({0.3: made_up}), [Recording("a", iter([Window(0.0, wave)]))], options=asked)
        texts.append([(s.text, s.seek) for s in done.result().segments])
    assert texts[0][0] == (" you", 0) and texts[1] == [(" real", 800)]


# Languages.


def speaking(language: str, sure: float) -> Callable[[float, str | None], DecodingResult]:
    return lambda seconds, hint: said(f" {hint or language}", language=hint or language, sure=sure)


def test_a_window_that_is_unsure_takes_the_language_spoken_most() -> None:
    listener = Listener({0.1: speaking("en", 0.9), 0.2: speaking("cy", 0.3), 0.3: speaking("hi", 0.8)})
    (done,) = run(listener, [recording("talk", 0.2, 0.1, 0.1, 0.3, 0.2)])
    assert done.result().text == "en en en hi en"
    assert [s.language for s in done.result().segments] == ["en", "en", "en", "hi", "en"]


def test_a_language_that_was_asked_for_is_not_settled_again() -> None:
    listener = Listener({0.1: lambda seconds, hint: said(language="hi", sure=None)})
    (done,) = run(listener, [recording("a", 0.1, 0.1)])
    assert len(listener.batches) == 1
    assert (done.result().language, done.result().language_probability) == ("hi", None)


def test_a_language_decided_once_is_that_of_the_first_window_that_is_sure() -> None:
    answers = {0.1: speaking("hi", 0.9), 0.2: speaking("en", 0.9), 0.3: speaking("cy", 0.3), 0.4: lambda *_: silence()}
    listener = Listener(answers)
    once = TranscribeOptions(temperatures=(0.0,), detect_language_once=True)
    talk = [0.4, 0.3, 0.1, *[0.2] * BUFFERED_WINDOWS]
    first, second = run(listener, [recording("a", *talk), recording("b", 0.2, 0.1)], options=once)
    assert set(first.result().text.split()) == {"hi"} and first.result().language == "hi"
    assert second.result().text == "en en"
    (each,) = run(listener, [recording("a", *talk)])
    assert set(each.result().text.split()) == {"hi", "en"}


def test_noise_does_not_name_the_language_of_what_follows() -> None:
    listener = Listener({0.1: lambda seconds, hint: silence(), 0.2: speaking("hi", 0.8)})
    (done,) = run(listener, [recording("a", 0.1, 0.2)])
    assert (done.result().language, done.result().language_probability) == ("hi", 0.8)
    assert done.result().text == "hi"


# Fast weights carried through a recording.


def test_carried_fast_weights_change_what_follows_and_not_what_came_before(monkeypatch: pytest.MonkeyPatch) -> None:
    scores: dict[int, float] = {}
    lengths: dict[Opened, list[int]] = {}
    begin, end = WindowDecoder.open, Opened.close

    def opening(self: WindowDecoder, clips: Sequence[np.ndarray], *more: Any, **how: Any) -> list[Opened]:
        (opened,) = begin(self, clips, *more, **how)
        lengths[opened] = [len(clip) for clip in clips]
        return [opened]

    def closing(self: Opened, places: Sequence[int]) -> list[DecodingResult]:
        results = end(self, places)
        found = zip(places, results, strict=True)
        scores.update((lengths[self][place], result.hypothesis.avg_logprob) for place, result in found)
        return results

    def listen(*waves: np.ndarray, **options: Any) -> dict[int, float]:
        """How sure each window's text is, by the window's length."""
        scores.clear()
        trusting = {"logprob_threshold": 0.0, "compression_ratio_threshold": None, "no_speech_threshold": None}
        whole = {"temperatures": (0.0,), "timestamps": False, "language": "en", "context_margin": 30.0}
        model.transcribe(list(waves), **trusting, **whole, **options)
        return dict(scores)

    monkeypatch.setattr(WindowDecoder, "open", opening)
    monkeypatch.setattr(Opened, "close", closing)
    model = tiny_whisper_moe()
    wave = np.random.default_rng(0).normal(0, 0.1, 40 * RATE).astype(np.float32)
    other = wave[::-1][: 5 * RATE]
    afresh, carried = listen(wave, other), listen(wave, other, carry_ttt=True)
    alone = 5 * RATE
    first, second = (length for length in carried if length != alone)
    assert first + second == 40 * RATE and alone in carried
    assert carried[second] != pytest.approx(afresh[second], abs=1e-4)
    assert carried[first] == pytest.approx(listen(wave[:first], carry_ttt=True)[first], abs=1e-6)
    only = listen(other, carry_ttt=True)[alone]
    assert carried[alone] == pytest.approx(only, abs=1e-6), "another recording's weights were carried over"
    fresh = listen(wave[first:], carry_ttt=True)[second]
    assert carried[second] != pytest.approx(fresh, abs=1e-4), "nothing was carried"


def test_a_model_without_shared_ttt_layers_cannot_carry_them() -> None:
    dense = tiny_whisper_moe(config=CONFIG.model_copy(update={"ttt": None}))
    with pytest.raises(ValueError, match="carry_ttt"):
        dense.transcribe(np.full(RATE, 0.1, np.float32), carry_ttt=True)


# Windows that go on from the text before them.


def prompts(monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[list[int]]:
    """What each of three windows is prompted with by a tiny model."""
    seen: list[list[int]] = []
    prompt = WindowDecoder._prompt

    def spy(self: WindowDecoder, *more: Any) -> list[int]:
        seen.append(prompt(self, *more))
        return seen[-1]

    with monkeypatch.context() as patch:
        patch.setattr(WindowDecoder, "_prompt", spy)
        trusting = {"logprob_threshold": None, "compression_ratio_threshold": None, "no_speech_threshold": None}
        whole = {"temperatures": (0.0,), "timestamps": False, "language": "en", "context_margin": 30.0, "window": 4}
        result = tiny_whisper_moe().transcribe(NOISE[: 10 * RATE] * 0.1, **trusting, **whole, **options)
    seen += [list(segment.tokens) for segment in result.segments]
    return seen


def test_a_window_is_prompted_with_the_text_before_it_as_in_whisper(monkeypatch: pytest.MonkeyPatch) -> None:
    room, prev = CONFIG.max_target_positions // 2 - 1, TOKENIZER.sot_prev
    initial = TOKENIZER.encode(" Hi")
    first, second, third, one, two, _ = prompts(monkeypatch, initial_prompt="Hi", condition_on_previous_text=True)
    assert first == [prev, *initial] and one and two
    assert second == [prev, *[*initial, *one][-room:]]
    assert third == [prev, *[*initial, *one, *two][-room:]]

    carried = {"condition_on_previous_text": True, "carry_initial_prompt": True}
    *each, one, two, _ = prompts(monkeypatch, initial_prompt="Hi", **carried)
    before = [[], one, [*one, *two]]
    assert each == [[prev, *initial, *said[-(room - len(initial)) :]] for said in before]

    assert prompts(monkeypatch, initial_prompt="Hi")[0] == [prev, *initial], "without, all windows are decoded at once"


def test_a_text_that_took_a_high_temperature_prompts_nothing() -> None:
    prompted: list[Any] = []

    class Prompted(Listener):
        def decode(self, *more: Any, previous: Any = None, **how: Any) -> list[DecodingResult]:
            prompted.append(None if previous is None else TOKENIZER.decode(previous))
            return super().decode(*more, **how)

    hot = {0.2: lambda *_: replace(said(" hot"), temperature=0.6)}
    options = TranscribeOptions(temperatures=(0.0,), condition_on_previous_text=True)
    run(Prompted(hot), [recording("a", 0.1, 0.2, 0.3, 0.4), recording("b", 0.5)], options=options)
    assert prompted == ["", " 0.1", "", " 0.3", ""]


def test_one_after_the_other_what_a_window_left_comes_before_the_next() -> None:
    options = TranscribeOptions(temperatures=(0.0,), condition_on_previous_text=True)
    listener = Listener({0.1: lambda *_: said(until=3.0)})
    run(listener, [recording("a", 0.1, 0.2, seconds=9.0)], options=replace(options, context_margin=0.0))
    assert [levels for levels, *_ in listener.calls] == [(0.1,), (0.1,), (0.1,), (0.2,)]
    assert listener.batches == [[450], [300], [150], [450]]


# Windows that say more than a decoder has positions.


def cut_off(seconds: float, hint: str | None) -> DecodingResult:
    """A long text without a single time to go on from, unless the window is short."""
    whole = said(f" {seconds:g}")
    return whole if seconds < 10 else replace(whole, hypothesis=replace(whole.hypothesis, finished=False))


def test_a_window_that_says_too_much_is_halved_until_all_of_it_is_written_down() -> None:
    listener = Listener({0.3: cut_off})
    heard: list[float] = []
    (done,) = run(listener, [recording("fast talker", 0.3, seconds=30.0)], progress=heard.append)
    result = done.result()
    assert len(result.segments) > 2 and result.fallbacks > 1
    assert [segment.start for segment in result.segments[1:]] == [segment.end for segment in result.segments[:-1]]
    assert (result.segments[0].start, result.segments[-1].end) == (0.0, 30.0)
    assert sum(heard) == pytest.approx(30.0)


def test_a_loop_is_not_halved() -> None:
    loop = replace(
        said("round and " * 40), hypothesis=Hypothesis(tuple(TOKENIZER.encode("round and " * 40)), -0.1, False)
    )
    listener = Listener({0.3: lambda seconds, hint: loop})
    run(listener, [recording("loop", 0.3, seconds=30.0)])
    assert {positions for batch in listener.batches for positions in batch} == {1500}


# What a recording's text and language are.


def test_windows_of_a_model_that_says_no_leading_space_are_told_apart() -> None:
    listener = Listener({0.1: lambda s, h: said("ab", language="hi"), 0.2: lambda s, h: said("cd", language="ja")})
    (done,) = run(listener, [recording("a", 0.1, 0.1, 0.2, 0.2)])
    assert done.result().text == "ab abcdcd"


def test_nothing_said_has_no_language_but_the_one_that_was_given() -> None:
    quiet = np.zeros(RATE, np.float32)
    assert tiny_whisper_moe().transcribe(quiet).language is None
    assert tiny_whisper_moe().transcribe(quiet, language="hi").language == "hi"


def test_a_model_with_a_shorter_window_hears_all_of_a_recording() -> None:
    model = tiny_whisper_moe(config=CONFIG.model_copy(update={"max_source_positions": 250}))
    wave = np.random.default_rng(0).normal(0, 0.1, 14 * RATE).astype(np.float32)
    windows = list(model._recording(wave, TranscribeOptions()).windows)
    assert max(each.duration for each in windows) <= 5.0
    assert np.array_equal(np.concatenate([each.samples for each in windows]), wave)


# Who answers another try.


@pytest.mark.parametrize(("exclude", "last"), [((), [(NONE, NONE)] * 2), (("none",), [(2, 1), (0, NONE)])])
def test_another_try_keeps_the_experts_of_the_first_and_the_last_is_the_base_s(exclude: Any, last: Any) -> None:
    """A router would choose anew by a padded window, and the text that looked wrong would be another expert's."""

    def choice(*experts: int) -> Callable[[float, str | None], DecodingResult]:
        routing = Routing(torch.tensor([experts]), torch.tensor([[0.75, 0.25]]))
        return lambda seconds, hint: replace(unsure(0.0, None), routing=routing)

    config = CONFIG.model_copy(update={"moe": MoEConfig(n_experts=3)})
    listener = Listener({0.1: choice(2, 1), 0.2: choice(0, NONE)}, model=SimpleNamespace(config=config))
    options = TranscribeOptions(temperatures=(0.0, 0.4, 1.0), exclude=exclude)
    run(listener, [recording("two", 0.1, 0.2)], options=options)
    first, *middle, final = listener.routings
    assert first is None
    assert [each and each.choices for each in middle] == [((2, 1), (0, NONE))] * 2
    assert final is not None
    assert list(final.choices) == last
    assert torch.equal(final.gates, torch.tensor([[0.75, 0.25]] * 2))


def test_two_tries_are_both_of_the_first_choice() -> None:
    routing = Routing(torch.tensor([[2, 1]]), torch.tensor([[0.75, 0.25]]))
    config = CONFIG.model_copy(update={"moe": MoEConfig(n_experts=3)})
    wrong = lambda seconds, hint: replace(unsure(0.0, None), routing=routing)  # noqa: E731
    listener = Listener({0.1: wrong}, model=SimpleNamespace(config=config))
    run(listener, [recording("one", 0.1)])
    assert [each and each.choices for each in listener.routings] == [None, ((2, 1),)]
