"""Captions: what is final never changes, nothing is lost or said twice, and memory does not grow with the stream."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from whisper_moe.generate.result import Segment, Transcription, Word
from whisper_moe.serve import live
from whisper_moe.serve.live import Agreement, Caption, Live

RATE = 16_000
NAMES = [f"w{i}" for i in range(400)]


def word(text: str, start: float, end: float | None = None) -> live.Word:
    return live.Word(f" {text}", start, start + 0.3 if end is None else end)


def test_what_two_decodings_agree_on_is_final() -> None:
    agreement = Agreement()
    assert agreement.take([word("the", 0.0), word("cat", 0.4)]) == []
    assert [w.text for w in agreement.take([word("the", 0.0), word("cut", 0.4)])] == [" the"]
    assert [w.text for w in agreement.open] == [" cut"]
    assert [w.text for w in agreement.take([word("The,", 0.02), word("cut", 0.41), word("is", 0.9)])] == [" cut"]
    assert [w.text for w in agreement.close([word("the", 0.0), word("cut", 0.4), word("is", 0.9)])] == [" is"]
    assert (agreement.final, agreement.open) == ([], [])


def test_what_is_final_is_not_said_again_where_its_times_have_moved() -> None:
    agreement = Agreement([word("one", 0.0, 0.5), word("two", 0.5, 1.0)])
    assert agreement._beyond([word("two", 0.95, 1.3), word("three", 1.4)]) == [word("three", 1.4)]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.randoms(use_true_random=False))
def test_words_whose_ends_are_misheard_at_first_come_out_once_and_in_order(
    kinds: list[int], chance: random.Random
) -> None:
    """The last word of every decoding is another one, as of a word that is cut in two."""
    spoken = [word(f"{NAMES[i]}", 0.4 * i, 0.4 * i + 0.3) for i in range(len(kinds))]
    agreement, said = Agreement(), list[live.Word]()
    for heard in range(1, len(spoken) + 1):
        now = [*spoken[: heard - 1], word(f"x{chance.random()}", spoken[heard - 1].start)]
        new = agreement.take(now)
        assert all(each not in said for each in new)
        said += new
    said += agreement.close(spoken)
    assert [each.text for each in said] == [each.text for each in spoken]


def transcription(words: list[Word]) -> Transcription:
    segment = Segment(
        id=0, seek=0, start=0.0, end=1.0, text="", tokens=(), temperature=0.0, avg_logprob=0.0, compression_ratio=1.0,
        no_speech_prob=0.0, words=tuple(words),
    )  # fmt: skip
    return Transcription(text="", segments=(segment,), language="en", duration=1.0)


SYLLABLE, GAP = RATE * 3 // 10, RATE // 10


def speech(words: int) -> np.ndarray:
    """Words of 0.3 s, 0.1 s apart, each with a loudness of its own."""
    parts = [np.r_[np.full(SYLLABLE, 0.1 + i / 10_000), np.full(GAP, 1e-5)] for i in range(words)]
    noise = np.random.default_rng(0).normal(0, 1, words * (SYLLABLE + GAP))
    return (np.concatenate(parts) * noise).astype(np.float32)


def hearer(wave: np.ndarray, longest: list[int]) -> Callable[[np.ndarray], object]:
    """Finds the samples in the wave, and says the words that lie in them whole; of one that is cut, something else."""

    async def hear(samples: np.ndarray) -> Transcription:
        longest.append(len(samples))
        (begin,) = np.flatnonzero(np.all(np.lib.stride_tricks.sliding_window_view(wave, 2) == samples[:2], axis=1))
        found = []
        for i in range(len(wave) // (SYLLABLE + GAP)):
            start, end = i * (SYLLABLE + GAP) - begin, i * (SYLLABLE + GAP) + SYLLABLE - begin
            if start >= 0 and start < len(samples):
                cut = end > len(samples)
                found.append(Word(start / RATE, min(end, len(samples)) / RATE, f" {'cut' if cut else NAMES[i]}", 0.9))
        return transcription(found)

    return hear


async def played(wave: np.ndarray, block: float, then: np.ndarray) -> tuple[list[Caption], list[int]]:
    longest: list[int] = []
    whole = np.concatenate((wave, then))
    stream, captions = Live(hearer(whole, longest)), list[Caption]()  # pyright: ignore[reportArgumentType]
    size = round(block * RATE)
    for begin in range(0, len(whole), size):
        stream.append(whole[begin : begin + size])
        if stream.waiting:
            captions += [caption async for caption in stream.look()]
    captions += [caption async for caption in stream.look(end=True)]
    return captions, longest


@pytest.mark.parametrize("block", [0.1, 0.7, 2.3])
def test_a_stream_is_written_down_once_in_a_bounded_window(block: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "speech_spans", lambda samples: [(0, len(samples))])
    count = 120
    captions, longest = asyncio.run(played(speech(count), block, np.zeros(0, np.float32)))
    assert "".join(caption.final for caption in captions).split() == NAMES[:count]
    assert sum(caption.ended for caption in captions) == 1 and captions[-1].ended
    assert max(longest) < (live.LONGEST + block + 2) * RATE


def test_a_pause_ends_an_utterance_without_being_told() -> None:
    before, pause, after, rest = np.split(speech(26), np.cumsum([6, 7, 6]) * (SYLLABLE + GAP))
    wave = np.concatenate((before, pause * np.float32(1e-6), after))
    captions, _ = asyncio.run(played(wave, 0.2, rest * np.float32(1e-6)))
    ends = [caption for caption in captions if caption.ended]
    assert [caption.utterance for caption in ends] == [0, 1, 2] and not ends[2].final  # the last one was asked for


def test_silence_says_nothing_and_is_not_kept() -> None:
    captions, longest = asyncio.run(played(np.zeros(30 * RATE, np.float32), 0.5, np.zeros(0, np.float32)))
    assert [(caption.final, caption.ended) for caption in captions] == [("", True)] and longest == []
