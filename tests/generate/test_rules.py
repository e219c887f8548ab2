"""The rules forbid exactly what transformers and openai/whisper forbid, and what is left obeys the grammar of times."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from whisper_moe import WhisperMoE
from whisper_moe.generate.options import SearchOptions, TranscribeOptions
from whisper_moe.generate.rules import Rules, Timestamps
from whisper_moe.generate.search import search

END_OF_TEXT, NO_TIMESTAMPS, BEGIN, END = 30, 39, 40, 59
"""Text is 0 to 29, 31 to 38 are control tokens: Whisper's order in small."""
MAX_INITIAL = 6
SUPPRESS, SUPPRESS_FIRST = (1, 7, *range(31, 40)), (3, END_OF_TEXT)
TIMES = Timestamps(BEGIN, END, END_OF_TEXT, MAX_INITIAL)


def random_logits(rows: int, vocabulary: int, seed: int, times_louder: float = 0.0) -> Tensor:
    logits = torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 2
    logits[:, BEGIN : END + 1] += times_louder
    return logits


def by_transformers(logits: Tensor, sampled: list[list[int]], timestamps: bool) -> Tensor:
    from transformers import GenerationConfig
    from transformers.generation.logits_process import (
        SuppressTokensAtBeginLogitsProcessor,
        SuppressTokensLogitsProcessor,
        WhisperTimeStampLogitsProcessor,
    )

    prompt = [31, 32, 33]
    ids = torch.tensor([prompt + tokens for tokens in sampled])
    config = GenerationConfig(eos_token_id=END_OF_TEXT)
    config.no_timestamps_token_id, config.max_initial_timestamp_index = NO_TIMESTAMPS, MAX_INITIAL
    processors: list[Any] = [
        SuppressTokensAtBeginLogitsProcessor(SUPPRESS_FIRST, len(prompt)),
        SuppressTokensLogitsProcessor(SUPPRESS),
    ]
    if timestamps:
        processors.append(WhisperTimeStampLogitsProcessor(config, len(prompt)))
    for process in processors:
        logits = process(ids, logits)
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


@pytest.mark.parametrize("reference", [by_transformers, by_openai])
@pytest.mark.parametrize("timestamps", [True, False], ids=["with times", "without times"])
@settings(max_examples=150, deadline=None)
@given(sampled=histories, seed=st.integers(0, 10**6), louder=st.sampled_from([-6.0, 0.0, 3.0]))
def test_the_same_tokens_are_forbidden(
    reference: Any, timestamps: bool, sampled: list[list[int]], seed: int, louder: float
) -> None:
    logits = random_logits(len(sampled), END + 1, seed, louder)
    expected = reference(logits.clone(), sampled, timestamps)
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


class _RandomModel:
    """Unrelated random logits at every step; ``louder`` weighs times against text."""

    def __init__(self, seed: int, louder: float, rows: int) -> None:
        self.seed, self.louder, self.rows = seed, louder, rows

    def step(self, tokens_Rn: Tensor, state: Any) -> tuple[Tensor, Any]:
        self.seed += 1
        return random_logits(len(tokens_Rn), END + 1, self.seed, self.louder), state


class _Stateless:
    def keep(self, segments: list[int]) -> _Stateless:
        return self

    def select(self, rows: Tensor) -> _Stateless:
        return self


GRAMMAR = re.compile(r"T(x+TT)*(x+T?)?")
"""A time begins, text and a time end a segment, a time begins the next; any of it may be cut off."""


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    louder=st.sampled_from([-3.0, 0.0, 1.0]),
    options=st.sampled_from([SearchOptions(), SearchOptions(beams=4), SearchOptions(beams=2, temperature=1.0)]),
)
def test_what_is_said_obeys_the_grammar(seed: int, louder: float, options: SearchOptions) -> None:
    segments = 4
    rows = segments * options.beams
    found = search(
        _RandomModel(seed, louder, rows).step,
        random_logits(rows, END + 1, seed, louder),
        _Stateless(),
        Rules(SUPPRESS, SUPPRESS_FIRST, TIMES),
        options,
        end_of_text=END_OF_TEXT,
        limits=[24] * segments,
    )
    assert any(found_one.tokens for found_one in found)
    for hypothesis in found:
        tokens = hypothesis.tokens
        times = [token for token in tokens if token >= BEGIN]
        shape = "".join("T" if token >= BEGIN else "x" for token in tokens)
        assert GRAMMAR.fullmatch(shape), shape
        assert times[0] <= BEGIN + MAX_INITIAL
        assert times == sorted(times)
        begins, ends = times[::2], times[1::2]
        assert all(begin < end for begin, end in zip(begins, ends, strict=False)), "a segment lasts no time"
        assert not set(tokens) & set(SUPPRESS)


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
