"""The rules forbid exactly what openai/whisper forbids."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from whisper_moe import WhisperMoE
from whisper_moe.generate.options import TranscribeOptions
from whisper_moe.generate.search import Rules, Timestamps

END_OF_TEXT, NO_TIMESTAMPS, BEGIN, END = 30, 39, 40, 59
"""Text is 0 to 29, 31 to 38 are control tokens: Whisper's order in small."""
MAX_INITIAL = 6
SUPPRESS, SUPPRESS_FIRST = (1, 7, *range(31, 40)), (3, END_OF_TEXT)
TIMES = Timestamps(BEGIN, END, END_OF_TEXT, MAX_INITIAL)


def random_logits(rows: int, vocabulary: int, seed: int, times_louder: float = 0.0) -> Tensor:
    logits = torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 2
    logits[:, BEGIN : END + 1] += times_louder
    return logits


def by_openai(logits: Tensor, sampled: list[list[int]], timestamps: bool) -> Tensor:
    from whisper.decoding import ApplyTimestampRules, SuppressBlank, SuppressTokens

    tokenizer: Any = SimpleNamespace(
        encode=lambda text: [3], eot=END_OF_TEXT, no_timestamps=NO_TIMESTAMPS, timestamp_begin=BEGIN
    )
    prompt = [31, 32, 33]
    tokens = torch.tensor([prompt + row for row in sampled])
    filters: list[Any] = [SuppressBlank(tokenizer, len(prompt)), SuppressTokens(SUPPRESS)]
    if timestamps:
        filters.append(ApplyTimestampRules(tokenizer, len(prompt), MAX_INITIAL))
    logits = logits.clone()
    for each in filters:
        each.apply(logits, tokens)
    return logits


token = st.one_of(st.integers(0, 29), st.integers(BEGIN, END), st.just(END_OF_TEXT))
histories = st.integers(0, 6).flatmap(
    lambda length: st.lists(st.lists(token, min_size=length, max_size=length), min_size=1, max_size=4)
)


@pytest.mark.parametrize("timestamps", [True, False], ids=["with times", "without times"])
@settings(max_examples=150, deadline=None)
@given(sampled=histories, seed=st.integers(0, 10**6), louder=st.sampled_from([-6.0, 0.0, 3.0]))
def test_the_same_tokens_are_forbidden(timestamps: bool, sampled: list[list[int]], seed: int, louder: float) -> None:
    logits = random_logits(len(sampled), END + 1, seed, louder)
    expected = by_openai(logits, sampled, timestamps)
    rules = Rules(SUPPRESS, SUPPRESS_FIRST, TIMES if timestamps else None)
    assert torch.equal(rules.apply(logits.clone(), sampled), expected)


@settings(max_examples=100, deadline=None)
@given(
    sampled=histories,
    seed=st.integers(0, 10**6),
    louder=st.sampled_from([-6.0, 0.0, 3.0]),
    weight=st.sampled_from([0.0, 3.0, 6.0]),
)
def test_text_that_somebody_appended_is_text_like_any_other(
    sampled: list[list[int]], seed: int, louder: float, weight: float
) -> None:
    """The same rules as for a vocabulary in which these tokens stand before the end of text."""
    appended = 5
    logits = random_logits(len(sampled), END + 1 + appended, seed, louder)
    logits[:, END + 1 :] += weight  # often between the loudest text and all times together
    ruled = Rules(SUPPRESS, SUPPRESS_FIRST, TIMES).apply(logits.clone(), sampled)
    order = [*range(END + 1, END + 1 + appended), *range(END + 1)]
    elsewhere = Timestamps(BEGIN + appended, END + appended, END_OF_TEXT + appended, MAX_INITIAL)
    moved = Rules(*(tuple(i + appended for i in ids) for ids in (SUPPRESS, SUPPRESS_FIRST)), elsewhere)
    expected = moved.apply(logits[:, order].clone(), [[token + appended for token in row] for row in sampled])
    assert torch.equal(ruled[:, order], expected)


def test_a_token_behind_the_last_timestamp_is_no_time() -> None:
    """After it the text goes on: no closing time is due, and no time is too early because of it."""
    logits = torch.zeros(1, END + 6)
    logits[:, BEGIN:] = -9.0
    ruled = Rules((), (), TIMES).apply(logits, [[BEGIN + 2, END + 3]])
    assert torch.isfinite(ruled[0, :BEGIN]).all()
    assert torch.isfinite(ruled[0]).nonzero()[:, 0].tolist() == [*range(BEGIN), *range(BEGIN + 3, END + 6)]


def test_the_checkpoints_rules_are_those_of_openai(default_model: WhisperMoE) -> None:
    from whisper.decoding import DecodingOptions, DecodingTask
    from whisper.tokenizer import get_tokenizer

    rules = default_model._decoder._rules(TranscribeOptions())
    theirs = get_tokenizer(True, language="en")
    task = SimpleNamespace(tokenizer=theirs, options=DecodingOptions())
    assert rules.suppress_first == (*theirs.encode(" "), theirs.eot)
    assert set(rules.suppress) == {*DecodingTask._get_suppress_tokens(task), theirs.no_timestamps}
    assert rules.timestamps == Timestamps(theirs.timestamp_begin, theirs.timestamp_begin + 1500, theirs.eot, 50)


def test_a_checkpoint_may_suppress_nothing(tiny_model: WhisperMoE) -> None:
    from whisper_moe.generate.decode import WindowDecoder

    tokenizer = tiny_model.tokenizer
    control = {*tokenizer.suppressed(()), tokenizer.no_timestamps}
    listed = WindowDecoder(tiny_model.model, tokenizer, {"suppress_tokens": []})
    silent = WindowDecoder(tiny_model.model, tokenizer, {})
    assert set(listed._rules(TranscribeOptions()).suppress) == control
    assert set(silent._rules(TranscribeOptions()).suppress) == control | set(tokenizer.non_speech_tokens)
    assert set(silent._rules(TranscribeOptions(suppress_tokens=(5,))).suppress) == control | {5}
