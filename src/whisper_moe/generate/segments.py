"""Tokens of one window to segments with times in the recording (``openai/whisper`` transcribe semantics)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from whisper_moe.config import FRAMES_PER_SECOND
from whisper_moe.generate.align import add_words
from whisper_moe.generate.decode import Take
from whisper_moe.generate.result import Segment, compression_ratio
from whisper_moe.generate.search import Hypothesis
from whisper_moe.media.text import UNSPACED_LANGUAGES, Tokenizer

LEAST_ADVANCE = 1.0
"""Seconds that a window must have reached for its rest to be tried again: each retry gets somewhere, so they end."""

LEAST_HALVED = 8.0
"""Seconds of a window that may hold more words than a decoder has positions. Nobody says 224 tokens in less."""


def split_at_timestamps(tokens: Sequence[int], tokenizer: Tokenizer) -> list[list[int]]:
    """Cut between two timestamps that stand side by side: one ends a segment, the next begins another."""
    pieces: list[list[int]] = [[]]
    for token in tokens:
        if pieces[-1] and tokenizer.is_timestamp(token) and tokenizer.is_timestamp(pieces[-1][-1]):
            pieces.append([])
        pieces[-1].append(token)
    return [piece for piece in pieces if piece]


def goes_on(hypothesis: Hypothesis, seconds: float, tokenizer: Tokenizer) -> bool:
    """Whether a text that was cut off at the token limit told enough, up to its last two times, to go on from there.

    30 s of some languages are more tokens than a decoder has positions.
    """
    closed = split_at_timestamps(hypothesis.tokens, tokenizer)[:-1]
    return bool(closed) and LEAST_ADVANCE <= tokenizer.seconds(closed[-1][-1]) <= seconds


def too_much(hypothesis: Hypothesis, seconds: float, tokenizer: Tokenizer) -> bool:
    """Whether a text was cut off at the token limit with no time in it to go on from, and its window can be halved."""
    return not hypothesis.finished and not goes_on(hypothesis, seconds, tokenizer) and seconds >= LEAST_HALVED


def segments_of(take: Take, start: float, duration: float, tokenizer: Tokenizer) -> list[Segment]:
    """The segments of a window that begins at ``start`` and lasts ``duration`` seconds; ids are given out later.

    A segment without a time of its own begins or ends with the window. Blank segments and those that last no time say
    nothing and are left out, and so is an unfinished one behind those that :func:`goes_on` trusts.
    """
    text_ratio = compression_ratio(tokenizer.decode(take.hypothesis.tokens).strip())
    pieces = split_at_timestamps(take.hypothesis.tokens, tokenizer)
    if not take.hypothesis.finished and goes_on(take.hypothesis, duration, tokenizer):
        pieces = [piece for piece in pieces if tokenizer.is_timestamp(piece[-1])]
    segments = []
    for piece in pieces:
        begin, end = _times(piece, duration, tokenizer)
        segments.append(
            Segment(
                id=len(segments), seek=round(start * FRAMES_PER_SECOND), start=round(start + begin, 3),
                end=round(start + end, 3), text=tokenizer.decode(piece), tokens=tuple(piece), temperature=take.temperature,
                avg_logprob=take.hypothesis.avg_logprob, compression_ratio=text_ratio,
                no_speech_prob=take.no_speech_prob, experts=take.experts, language=take.language,
            )
        )  # fmt: skip
    if take.timings is not None:
        segments = add_words(segments, take.timings, tokenizer, last_speech_end=start)
    return [segment for segment in segments if segment.text.strip() and segment.end > segment.start]


def _times(piece: Sequence[int], duration: float, tokenizer: Tokenizer) -> tuple[float, float]:
    """Begin and end of a piece in its window; never past the window's end, where the silence was put."""
    begin = tokenizer.seconds(piece[0]) if tokenizer.is_timestamp(piece[0]) else 0.0
    closed = len(piece) > 1 and tokenizer.is_timestamp(piece[-1])
    end = tokenizer.seconds(piece[-1]) if closed else duration
    return min(begin, duration), min(end, duration)


def numbered(segments: Sequence[Segment]) -> tuple[Segment, ...]:
    """In order of time, with ids from 0."""
    ordered = sorted(segments, key=lambda segment: segment.start)
    return tuple(replace(segment, id=number) for number, segment in enumerate(ordered))


def joined(segments: Sequence[Segment]) -> str:
    """The text of all segments; those of a model that says no space before its first word get one between them."""
    text = ""
    for segment in segments:
        apart = not text or text[-1].isspace() or segment.text[:1].isspace() or segment.language in UNSPACED_LANGUAGES
        text += segment.text if apart else f" {segment.text}"
    return text.strip()
