"""When a transcript looks wrong, and what is tried next.

A clip is first decoded with a short margin of silence. Whisper always saw a full 30 s window, so if the result repeats
itself, is unsure, or says more than fits into its time, the clip is padded to 30 s and decoded again; if that looks wrong
too, temperatures follow (Whisper, section 4.5). Nothing falls back silently: the takes say what was done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import numpy as np

from whisper_moe.config import FULL_WINDOW, SAMPLE_RATE
from whisper_moe.generate.decode import TOKENS_PER_SECOND, DecodingResult, WindowDecoder
from whisper_moe.generate.options import TranscribeOptions
from whisper_moe.generate.result import compression_ratio
from whisper_moe.generate.segments import goes_on, too_much
from whisper_moe.media.tokenizer import Tokenizer
from whisper_moe.model.block import Carry

Batches: TypeAlias = Callable[[Sequence[int], float, float], list[list[int]]]
_SHORT_TEXT_TOKENS = 12
"""A text of so few tokens is never too long for its time: a cough of 0.2 s may hold a word."""


def is_silence(take: DecodingResult, options: TranscribeOptions) -> bool:
    """Whisper's rule: silence is likely, and the text is not sure enough to speak against it."""
    threshold = options.no_speech_threshold
    if threshold is None or take.no_speech_prob <= threshold:
        return False
    return options.logprob_threshold is None or take.hypothesis.avg_logprob <= options.logprob_threshold


def looks_wrong(take: DecodingResult, seconds: float, tokenizer: Tokenizer, options: TranscribeOptions) -> str | None:
    """Why a take should not be trusted, in a word or two; None if nothing speaks against it."""
    hypothesis = take.hypothesis
    if is_silence(take, options):
        return None
    limit = options.compression_ratio_threshold
    if limit is not None and compression_ratio(tokenizer.decode(hypothesis.tokens).strip()) > limit:
        return "repetitive"
    if len(hypothesis.tokens) > max(_SHORT_TEXT_TOKENS, TOKENS_PER_SECOND * seconds):
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


def decode_with_fallback(
    decoder: WindowDecoder,
    clips: Sequence[np.ndarray],
    options: TranscribeOptions,
    *,
    hints: Sequence[str | None] | None = None,
    groups: Batches,
    carry: Carry | None = None,
    previous: Sequence[int] | None = None,
) -> Iterator[tuple[int, DecodingResult, int]]:
    """Each clip's index, with its accepted take and how many takes were thrown away before it, as soon as it is accepted.

    ``groups(clip indices, margin, temperature)`` cuts clips into batches that fit. The last attempt is accepted as it is. A
    clip that fills its window anyway is not decoded again just to be padded.
    """
    results: dict[int, tuple[DecodingResult, int]] = {}
    pending = list(range(len(clips)))
    tried: dict[int, tuple[int, float]] = {}
    *_, last = tries = attempts(options)
    for attempt in tries:
        margin, temperature = attempt
        inputs = {i: (decoder.positions(len(clips[i]), margin), temperature) for i in pending}
        wrong = [i for i in pending if tried.get(i) == inputs[i]]
        tried |= inputs
        for batch in groups([i for i in pending if i not in wrong], margin, temperature):
            batch_hints = [hints[i] for i in batch] if hints else None
            takes = decoder.decode(
                [clips[i] for i in batch], options, temperature=temperature, margin=margin, hints=batch_hints,
                carry=carry, previous=previous,
            )  # fmt: skip
            for index, take in zip(batch, takes, strict=True):
                results[index] = (take, results[index][1] + 1 if index in results else 0)
                seconds = len(clips[index]) / SAMPLE_RATE
                if attempt is not last and looks_wrong(take, seconds, decoder.tokenizer, options):
                    wrong.append(index)
                else:
                    yield index, *results[index]
        pending = wrong
    for index in pending:  # what they had already is what the last attempt would have given
        yield index, *results[index]
