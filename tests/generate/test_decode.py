"""A window's take depends on the window and on what was asked, not on the windows beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from generate.tiny import CONFIG, tiny_whisper_moe

from whisper_moe import WhisperMoE
from whisper_moe.generate.decode import MINIMUM_TOKEN_LIMIT, DecodingResult, WindowDecoder
from whisper_moe.generate.options import TranscribeOptions

RATE = 16_000


def noise(seconds: float, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, round(seconds * RATE)).astype(np.float32)


CLIPS = [noise(seconds, seed) for seed, seconds in enumerate((0.2, 4.0, 2.5, 9.0, 1.0, 0.01))]


def decode(
    model: WhisperMoE,
    clips: Sequence[np.ndarray],
    *,
    temperature: float = 0.0,
    margin: float = 0.5,
    hints: Sequence[str | None] | None = None,
    **options: Any,
) -> list[DecodingResult]:
    asked = TranscribeOptions(**options)
    return model._decoder.decode(clips, asked, temperature=temperature, margin=margin, hints=hints)


@pytest.mark.parametrize(
    "options",
    [{}, {"beam_size": 3}, {"temperature": 0.7, "best_of": 3}, {"timestamps": False}, {"word_timestamps": True}],
    ids=["greedy", "beams", "samples", "without times", "words"],
)
def test_windows_decoded_together_say_what_each_says_alone(tiny_model: WhisperMoE, options: dict[str, Any]) -> None:
    together = decode(tiny_model, CLIPS, **options)
    assert len({take.hypothesis.tokens for take in together}) > 3
    for clip, take in zip(CLIPS, together, strict=True):
        (alone,) = decode(tiny_model, [clip], **options)
        assert (take.hypothesis.tokens, take.language) == (alone.hypothesis.tokens, alone.language)
        assert take.hypothesis.avg_logprob == pytest.approx(alone.hypothesis.avg_logprob, abs=1e-4)
        assert take.no_speech_prob == pytest.approx(alone.no_speech_prob, abs=1e-6)
        assert [name for name, _ in take.experts] == [name for name, _ in alone.experts]
        assert [(t.start, t.end) for t in take.timings or ()] == [(t.start, t.end) for t in alone.timings or ()]


def test_every_window_names_its_experts_and_their_gates_sum_to_one(tiny_model: WhisperMoE) -> None:
    takes = decode(tiny_model, CLIPS)
    assert len({take.experts for take in takes}) > 1
    for take in takes:
        assert {name for name, _ in take.experts} <= {"hindi", "tamil", "english", "none"}
        assert len({name for name, _ in take.experts}) == len(take.experts)
        assert sum(gate for _, gate in take.experts) == pytest.approx(1.0)


def test_a_dense_model_names_no_experts() -> None:
    dense = tiny_whisper_moe(config=CONFIG.model_copy(update={"moe": None, "ttt": None}))
    assert decode(dense, CLIPS[:1])[0].experts == ()


def test_only_allowed_languages_are_detected(tiny_model: WhisperMoE) -> None:
    free = decode(tiny_model, CLIPS)
    (main,) = {take.language for take in free[1:2]}
    other = "hi" if main == "en" else "en"
    (bound,) = decode(tiny_model, CLIPS[1:2], allowed_languages=(other,))
    assert (bound.language, bound.language_probability) == (other, 1.0)
    probabilities = tiny_model._decoder.detect_language(CLIPS[1], TranscribeOptions(), margin=0.5)
    assert next(iter(probabilities)) == main
    assert probabilities[main] == pytest.approx(free[1].language_probability)
    assert sum(probabilities.values()) == pytest.approx(1.0)


def test_a_hint_is_followed_and_keeps_its_own_probability(tiny_model: WhisperMoE) -> None:
    (free,) = decode(tiny_model, CLIPS[1:2])
    other = "hi" if free.language == "en" else "en"
    (hinted,) = decode(tiny_model, CLIPS[1:2], hints=[other])
    assert hinted.language == other
    assert free.language_probability is not None
    assert hinted.language_probability == pytest.approx(1 - free.language_probability, abs=1e-6)


@pytest.mark.parametrize("changed", [{"initial_prompt": "Bombay"}, {"hotwords": "Bombay"}, {"task": "translate"}])
def test_what_is_asked_for_is_heard_by_the_decoder(tiny_model: WhisperMoE, changed: dict[str, Any]) -> None:
    (plain,), (asked,) = (decode(tiny_model, CLIPS[1:2], language="en", **options) for options in ({}, changed))
    assert plain.hypothesis != asked.hypothesis


def test_a_prompt_is_opened_kept_short_and_follows_the_hotwords(tiny_model: WhisperMoE) -> None:
    decoder, tokenizer = tiny_model._decoder, tiny_model.tokenizer
    prompt = decoder._prompt(TranscribeOptions(initial_prompt=" of Pune ", hotwords="Asha"))
    assert prompt == [tokenizer.sot_prev, *tokenizer.encode(" Asha of Pune")]
    long = decoder._prompt(TranscribeOptions(initial_prompt="Pune " * 99))
    assert len(long) == CONFIG.max_target_positions // 2
    assert long[1:] == tokenizer.encode(" " + "Pune " * 98 + "Pune")[-(len(long) - 1) :]
    both = decoder._prompt(TranscribeOptions(hotwords="Asha", initial_prompt="x" * 500))
    words = tokenizer.encode(" Asha")
    assert len(both) == len(long) and both[1 : 1 + len(words)] == words and both[-1:] == tokenizer.encode("x")
    assert len(decoder._prompt(TranscribeOptions(hotwords="y" * 500, initial_prompt="x" * 500))) == len(long)
    assert decoder._prompt(TranscribeOptions(hotwords=" ", initial_prompt="  ")) == []


def test_a_short_clip_may_say_little(tiny_model: WhisperMoE) -> None:
    """A loop in a cut window ends soon; a full window has half the decoder's positions, as ever."""
    big = CONFIG.model_copy(update={"max_target_positions": 448})
    decoder = WindowDecoder(tiny_whisper_moe(config=big).model, tiny_model.tokenizer, {})
    assert decoder._token_limit(RATE // 5, 2.0) == MINIMUM_TOKEN_LIMIT + 8
    assert decoder._token_limit(2 * RATE, 2.0) == MINIMUM_TOKEN_LIMIT + 80
    assert decoder._token_limit(25 * RATE, 2.0) == decoder._token_limit(RATE // 5, 30.0) == 224


@pytest.mark.parametrize(("task", "written"), [("transcribe", "hi"), ("translate", "en")])
def test_words_are_those_of_the_language_that_is_written(
    tiny_model: WhisperMoE, monkeypatch: pytest.MonkeyPatch, task: str, written: str
) -> None:
    """What matters for those without spaces: their translations have some."""
    asked: list[str] = []
    split = tiny_model.tokenizer.split_to_words
    monkeypatch.setattr(
        tiny_model.tokenizer, "split_to_words", lambda ids, code: asked.append(code) or split(ids, code)
    )
    decode(tiny_model, CLIPS[1:2], language="hi", task=task, word_timestamps=True, timestamps=False)
    assert asked == [written]


def test_words_lie_within_the_sound(tiny_model: WhisperMoE) -> None:
    """Never in the silence that was put behind it."""
    for margin in (0.5, 30.0):
        takes = decode(tiny_model, CLIPS[1:3], margin=margin, word_timestamps=True, timestamps=False)
        for clip, take in zip(CLIPS[1:3], takes, strict=True):
            assert take.timings
            assert "".join(t.word for t in take.timings) == tiny_model.tokenizer.decode(take.hypothesis.tokens)
            assert all(0 <= t.start <= t.end <= len(clip) / RATE for t in take.timings)


def test_a_prompt_does_not_change_the_language_that_is_heard(tiny_model: WhisperMoE) -> None:
    plain = decode(tiny_model, CLIPS, beam_size=2)
    told = decode(tiny_model, CLIPS, beam_size=2, initial_prompt="Kubernetes, Docker and so on")
    assert [take.language for take in told] == [take.language for take in plain]
    for one, other in zip(told, plain, strict=True):
        assert one.language_probability == pytest.approx(other.language_probability, abs=1e-5)
    given = decode(tiny_model, CLIPS[:2], language=told[0].language, initial_prompt="Kubernetes, Docker and so on")
    asked = decode(tiny_model, CLIPS[:1], initial_prompt="Kubernetes, Docker and so on")
    assert given[0].language_probability is None, "what is given is not detected"
    assert given[0].hypothesis.tokens == asked[0].hypothesis.tokens, "the step that hears the language left its traces"
    assert given[0].hypothesis.sum_logprob == pytest.approx(asked[0].hypothesis.sum_logprob, abs=1e-4)
