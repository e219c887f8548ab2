"""A window's tokens become the segments that openai/whisper's ``transcribe`` makes of them, and none is lost or invented."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib import import_module
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from parity.openai_whisper import hub_backend

from whisper_moe.generate.align import WordTiming
from whisper_moe.generate.decode import DecodingResult
from whisper_moe.generate.options import TranscribeOptions
from whisper_moe.generate.result import Segment, Word
from whisper_moe.generate.search import Hypothesis
from whisper_moe.generate.segments import (
    goes_on,
    numbered,
    placed,
    segments_of,
    split_at_timestamps,
    without_inventions,
)
from whisper_moe.media.tokenizer import Tokenizer
from whisper_moe.media.windows import Window

DURATION = 12.0
"""Seconds of the window."""


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer(hub_backend())


def at(seconds: float) -> int:
    """The timestamp token."""
    return tokenizer().timestamp_begin + round(seconds / 0.02)


def say(text: str) -> list[int]:
    return tokenizer().encode(text)


def result(tokens: list[int], finished: bool = True, **changes: Any) -> DecodingResult:
    found = Hypothesis(tuple(tokens), -0.25 * (len(tokens) + 1), finished)
    return replace(DecodingResult(found, "en", 0.9, 0.1, 0.0, (("hindi", 1.0),)), **changes)


def segments(found: DecodingResult, start: float = 0.0, seconds: float = DURATION) -> list[Segment]:
    window = Window(start, np.zeros(round(seconds * 16_000), np.float32))
    return segments_of(found, window, tokenizer(), TranscribeOptions())


def openai_transcribe(answer: Callable[[torch.Tensor], list[int] | None], **options: Any) -> list[dict[str, Any]]:
    """The segments that openai/whisper makes of a model that answers windows so; None is silence."""
    from whisper.decoding import DecodingResult

    def decode(mel: torch.Tensor, _: Any) -> DecodingResult:
        tokens = answer(mel)
        sure = {"avg_logprob": -0.25, "no_speech_prob": 0.1} if tokens is not None else {}
        unsure = {"avg_logprob": -9.0, "no_speech_prob": 1.0, "temperature": 0.0, "compression_ratio": 1.0}
        return DecodingResult(mel, "en", tokens=tokens or [], **(unsure | sure))

    dims = SimpleNamespace(n_mels=80, n_audio_ctx=1500, n_text_ctx=448)
    device = torch.device("cpu")
    model = SimpleNamespace(device=device, dims=dims, is_multilingual=True, num_languages=99, decode=decode)
    whole = {"language": "en", "fp16": False, "temperature": (0.0,), "condition_on_previous_text": False}
    audio = np.zeros(round(DURATION * 16_000), np.float32)
    return import_module("whisper.transcribe").transcribe(model, audio, **whole, **options)["segments"]


def by_openai(tokens: list[int]) -> tuple[list[dict[str, Any]], float | None]:
    """Segments with text that openai/whisper makes of a window's tokens; where it goes on to listen in the same window."""
    answers = iter([tokens, [at(0), *say(" again"), at(0.02)]])
    found = [segment for segment in openai_transcribe(lambda _: next(answers, None)) if segment["text"].strip()]
    rest = [segment["start"] for segment in found if segment["text"] == " again"]
    return [segment for segment in found if segment["text"] != " again"], rest[0] if rest else None


def described(segments: list[Segment] | list[dict[str, Any]]) -> list[tuple[float, float, str, list[int]]]:
    plain = [segment.to_dict() if isinstance(segment, Segment) else segment for segment in segments]
    return [(round(s["start"], 3), round(s["end"], 3), s["text"], list(s["tokens"])) for s in plain]


@st.composite
def spoken(draw: st.DrawFn) -> list[int]:
    """Closed segments one after another, some of them blank."""
    count = draw(st.integers(2, 5))
    times = sorted(draw(st.lists(st.integers(1, int(DURATION * 50)), min_size=count, max_size=count, unique=True)))
    starts = [draw(st.integers(0, times[0] - 1)), *times[:-1]]
    texts = draw(st.lists(st.sampled_from([" Hello.", " wörld", " ", " नमस्ते दुनिया"]), min_size=count, max_size=count))
    tokens: list[int] = []
    for start, end, text in zip(starts, times, texts, strict=True):
        tokens += [at(start * 0.02), *say(text), at(end * 0.02)]
    return tokens


@settings(max_examples=20, deadline=None)
@given(tokens=spoken())
def test_closed_segments_are_openais(tokens: list[int]) -> None:
    expected, _ = by_openai(tokens)
    assert described(segments(result(tokens))) == described(expected)


@settings(max_examples=20, deadline=None)
@given(tokens=spoken(), text=st.sampled_from([[], [" and then"]]))
def test_a_text_that_was_cut_off_ends_with_its_last_closed_segment(tokens: list[int], text: list[str]) -> None:
    """There openai/whisper listens again, and so do we."""
    last = tokens[-1]
    assume(tokenizer().seconds(last) < DURATION)
    tokens = [*tokens, last, *(token for words in text for token in say(words))]
    expected, rest = by_openai(tokens)
    cut_off = result(tokens, finished=False)
    assert rest == pytest.approx(tokenizer().seconds(last))
    assert goes_on(cut_off.hypothesis, DURATION, tokenizer()) == (rest >= 1.0)
    if rest >= 1.0:  # otherwise nothing was gained, and the take does not pass for a good one
        assert described(segments(cut_off)) == described(expected)


ONE = {
    "one": [at(0), *say(" Hello."), at(3.5)],
    "unclosed": [at(0), *say(" Hello.")],
    "without times": say(" Hello."),
    "blank": [at(0), *say(" "), at(3)],
    "a time": [at(0)],
    "two times": [at(0), at(2)],
    "nothing": [],
}


@pytest.mark.parametrize("tokens", ONE.values(), ids=ONE)
def test_a_window_of_one_segment_is_openais(tokens: list[int]) -> None:
    expected, _ = by_openai(tokens)
    assert described(segments(result(tokens))) == described(expected)


def test_unlike_openais_a_single_segment_begins_at_its_own_time() -> None:
    tokens = [at(0.5), *say(" Hello."), at(3)]
    (ours,) = segments(result(tokens))
    assert (ours.start, ours.end) == (0.5, 3.0)
    assert [(s["start"], s["end"]) for s in by_openai(tokens)[0]] == [(0.0, 3.0)]


def test_unlike_openais_a_finished_text_without_a_last_time_is_kept() -> None:
    tokens = [at(0), *say(" Hello."), at(3), at(3), *say(" And then")]
    ours = segments(result(tokens))
    assert described(ours)[0] == described(by_openai(tokens)[0])[0]
    assert [(s.start, s.end, s.text) for s in ours] == [(0.0, 3.0, " Hello."), (3.0, DURATION, " And then")]


def test_nothing_ends_in_the_silence_that_was_put_behind_the_window() -> None:
    tokens = [at(0), *say(" Hello."), at(5), at(5.5), *say(" you"), at(7)]
    ours = segments(result(tokens), 0.0, 4.0)
    assert [(s.start, s.end, s.text) for s in ours] == [(0.0, 4.0, " Hello.")]


def test_a_segment_knows_its_place_in_the_recording_and_how_it_was_found() -> None:
    tokens = [at(0), *say(" Hello."), at(3), at(3.2), *say(" Again."), at(4)]
    first, second = segments(result(tokens, temperature=0.4, no_speech_prob=0.2), 61.5, DURATION)
    assert (first.start, first.end, second.start, second.end) == (61.5, 64.5, 64.7, 65.5)
    assert (first.id, second.id, first.seek, second.seek) == (0, 1, 6150, 6150)
    assert (first.temperature, first.no_speech_prob, first.language) == (0.4, 0.2, "en")
    assert first.avg_logprob == pytest.approx(-0.25)
    assert first.experts == (("hindi", 1.0),)


def test_the_first_word_of_a_later_window_keeps_its_length() -> None:
    """A pause before it is counted from the window's begin, not from the recording's."""
    said = [(" Hello", 0.0, 0.7), (" and", 0.7, 0.9), (" good", 0.9, 1.1), (" day", 1.1, 1.3)]
    timings = tuple(WordTiming(word, tuple(say(word)), start, end, 0.9) for word, start, end in said)
    tokens = [at(0), *(token for timing in timings for token in timing.tokens), at(3)]
    (segment,) = segments(result(tokens, timings=timings), 60.0, DURATION)
    assert [(w.word, w.start, w.end) for w in segment.words or ()] == [
        (word, pytest.approx(60 + start), pytest.approx(60 + end)) for word, start, end in said
    ]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 1000), st.integers(50_364, 51_864)), max_size=20))
def test_no_token_is_lost_between_the_pieces(tokens: list[int]) -> None:
    pieces = split_at_timestamps(tokens, tokenizer())
    assert [token for piece in pieces for token in piece] == tokens
    seams = [(before[-1], after[0]) for before, after in pairwise(pieces)]
    assert all(tokenizer().is_timestamp(token) for seam in seams for token in seam)
    adjacent = sum(map(tokenizer().is_timestamp, tokens[:-1]))
    assert len(pieces) <= adjacent + 1


@st.composite
def timed(draw: st.DrawFn) -> tuple[list[Segment], Window]:
    """What add_words may make of a window: segments and words that overlap, run backwards, last no time or leave the window."""
    start, seconds = draw(st.integers(0, 1_600_000)) / 16_000, draw(st.floats(1, 30))
    wave = np.zeros(int(seconds * 16_000), np.float32)
    for loud in draw(st.lists(st.integers(0, len(wave)), max_size=3)):
        wave[loud : loud + 16_000] = 0.1
    found: list[Segment] = []
    for count in draw(st.lists(st.integers(0, 6), max_size=5)):
        times = draw(st.lists(st.floats(-1, 31), min_size=2 * count + 2, max_size=2 * count + 2))
        if draw(st.booleans()):
            times = [round(time) for time in times]
        begin, end, *rest = (start + time for time in times)
        words = tuple(Word(a, b, " a", 0.5) for a, b in zip(rest[::2], rest[1::2], strict=True))
        segment = segments(result([at(0), *say(" a")]))[0]
        found.append(replace(segment, start=begin, end=end, words=words or draw(st.sampled_from([None, ()]))))
    return found, Window(start, wave)


@settings(max_examples=150, deadline=None)
@given(timed())
def test_every_time_can_be_shown(found: tuple[list[Segment], Window]) -> None:
    """Whole milliseconds within the window, in order, no cue and no word without length, words within their segments."""
    segments, window = found
    shown = placed(segments, window)
    assert [(s.text, len(s.words or ())) for s in shown] == [(s.text, len(s.words or ())) for s in segments]
    for parts in (shown, [part for s in shown for part in s.words or ()]):
        times = [time for part in parts for time in (part.start, part.end)]
        assert times == sorted(times) == [round(time, 3) for time in times]
        assert all(part.end >= part.start + 0.019 for part in parts)
        assert all(window.start - 1e-9 <= time <= window.end + 1e-9 for time in times)
    for segment in shown:
        if segment.words:
            assert (segment.start, segment.end) == (segment.words[0].start, segment.words[-1].end)


def test_words_that_take_no_time_share_that_of_their_neighbours() -> None:
    said = [(" one", 0.0, 0.5), (" two", 0.5, 0.5), (" three", 0.5, 0.5), (" four", 0.5, 0.9)]
    timings = tuple(WordTiming(word, tuple(say(word)), start, end, 0.9) for word, start, end in said)
    tokens = [at(0), *(token for timing in timings for token in timing.tokens), at(1)]
    wave = np.full(16_000, 0.1, np.float32)
    (segment,) = placed(segments(result(tokens, timings=timings), 0.0, 1.0), Window(0.0, wave))
    times = [(word.start, word.end) for word in segment.words or ()]
    assert times == [(0.0, 0.5), (0.5, 0.52), (0.52, 0.54), (0.54, 0.9)]


def test_a_text_is_kept_whose_words_together_take_no_time() -> None:
    timings = tuple(WordTiming(word, tuple(say(word)), 0.6, 0.6, 0.9) for word in (" one", " two"))
    tokens = [at(0.2), *(token for timing in timings for token in timing.tokens), at(1)]
    (segment,) = segments(result(tokens, timings=timings))
    assert [(w.word, w.start, w.end) for w in segment.words or ()] == [
        (" one", 0.2, pytest.approx(0.6)),
        (" two", pytest.approx(0.6), 1.0),
    ]


# What is made up in silence.


def openai_skips(segments: list[Segment], threshold: float) -> tuple[list[str], float | None]:
    """The texts of a first window of 30 s that openai/whisper keeps, and where it goes on to listen."""
    module, seeks = import_module("whisper.transcribe"), list[float]()

    def answer(mel: torch.Tensor) -> list[int] | None:
        seeks.append(round(30.0 - float((mel[0] > -5).sum()) / 100, 2))
        return [token for segment in segments for token in segment.tokens] if len(seeks) == 1 else None

    def add_words(found: list[dict[str, Any]], **_: Any) -> None:
        for segment, known in zip(found, segments, strict=True):
            segment |= {"start": known.start, "end": known.end, "words": [w.to_dict() for w in known.words or ()]}

    def cut_or_pad(mel: torch.Tensor, length: int) -> torch.Tensor:
        return torch.nn.functional.pad(mel, (0, length - mel.shape[1]), value=-9.0)

    mel = torch.cat([torch.zeros(80, 3000), torch.full((80, 3000), -9.0)], dim=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "add_word_timestamps", lambda *, segments, **how: add_words(segments, **how))
        patch.setattr(module, "log_mel_spectrogram", lambda *_, **__: mel)
        patch.setattr(module, "pad_or_trim", cut_or_pad)
        kept = openai_transcribe(answer, word_timestamps=True, hallucination_silence_threshold=threshold)
    return [segment["text"] for segment in kept], seeks[1] if len(seeks) > 1 else None


@st.composite
def doubtful(draw: st.DrawFn) -> tuple[list[Segment], float]:
    """Segments of a window of 30 s, with sure and odd words, and silence of some length between them."""
    found: list[Segment] = []
    time = draw(st.sampled_from([0.0, 0.0, 1.5, 4.0, 9.0]))
    for index in range(draw(st.integers(1, 4))):
        length, odd = draw(st.sampled_from([0.1, 0.6, 2.5])), draw(st.booleans())
        words = (Word(time, time + length, f" w{index}", 0.05 if odd else 0.9),)
        tokens = (at(time), *say(f" w{index}"), at(time + length))
        plain = segments(result(list(tokens)), 0.0, 30.0)[0]
        found.append(replace(plain, words=words))
        time = round(time + length + draw(st.sampled_from([0.0, 0.4, 2.6, 5.0])), 2)
    assume(found[-1].end < 29.0)
    return found, draw(st.sampled_from([0.5, 2.0, 4.0]))


@settings(max_examples=80, deadline=None)
@given(doubtful())
def test_what_is_made_up_in_silence_is_skipped_as_in_openais(found: tuple[list[Segment], float]) -> None:
    segments, threshold = found
    assume(not threshold < segments[0].start <= 1.0)  # so near a window's start we do not listen again
    options = TranscribeOptions(word_timestamps=True, hallucination_silence_threshold=threshold)
    kept, again = without_inventions(segments, Window(0.0, np.zeros(480_000, np.float32)), options)
    texts, seek = openai_skips(segments, threshold)
    assert [segment.text for segment in kept] == texts
    doubted = segments[len(kept)] if len(kept) < len(segments) else None
    if doubted is not None and 30.0 - doubted.end >= threshold:  # otherwise openai/whisper is at the recording's end
        assert again == pytest.approx(seek, abs=0.011)
    else:
        assert (again is None) == (doubted is None)


def test_segments_are_numbered_in_order_of_time() -> None:
    found = segments(result([at(0), *say(" a"), at(1), at(1), *say(" b"), at(2)]))
    assert [(s.id, s.text) for s in numbered(found[::-1])] == [(0, " a"), (1, " b")]
