"""A window's tokens to segments with times in the recording (``openai/whisper`` transcribe semantics).

Three steps: the segments that the tokens say, without those that were probably made up, at times that can be shown.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise, zip_longest

import numpy as np

from whisper_moe.config import FRAMES_PER_SECOND, SAMPLE_RATE
from whisper_moe.generate.align import add_words
from whisper_moe.generate.decode import DecodingResult
from whisper_moe.generate.options import TranscribeOptions
from whisper_moe.generate.result import Segment, Word, compression_ratio
from whisper_moe.generate.search import Hypothesis
from whisper_moe.media.tokenizer import UNSPACED_LANGUAGES, Tokenizer
from whisper_moe.media.windows import Window, speech_spans

LEAST_ADVANCE = 1.0
"""Seconds that a window must have reached for its rest to be tried again: each retry gets somewhere, so they end."""

LEAST_HALVED = 8.0
"""Seconds of a window that may hold more words than a decoder has positions. Nobody says 224 tokens in less."""

LEAST_LASTING = 20
"""Milliseconds that every cue and every word lasts: a timestamp's step, and the aligner's."""

EDGE = 200
"""Milliseconds that a cue may begin before the sound and end after it: no level says more exactly where a word begins."""


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


def segments_of(
    result: DecodingResult, window: Window, tokenizer: Tokenizer, options: TranscribeOptions
) -> list[Segment]:
    """The segments of a window; ids are given out later.

    A segment without a time of its own begins or ends with the window. Blank segments and those that last no time say
    nothing and are left out, and so is an unfinished one behind those that :func:`goes_on` trusts.
    """
    hypothesis, start = result.hypothesis, window.start
    ratio = compression_ratio(tokenizer.decode(hypothesis.tokens).strip())
    pieces = split_at_timestamps(hypothesis.tokens, tokenizer)
    if not hypothesis.finished and goes_on(hypothesis, window.duration, tokenizer):
        pieces = [piece for piece in pieces if tokenizer.is_timestamp(piece[-1])]
    segments = []
    for piece in pieces:
        begin, end = _times(piece, window.duration, tokenizer)
        segments.append(
            Segment(
                id=len(segments),
                seek=round(start * FRAMES_PER_SECOND),
                start=round(start + begin, 3),
                end=round(start + end, 3),
                text=tokenizer.decode(piece),
                tokens=tuple(piece),
                temperature=result.temperature,
                avg_logprob=hypothesis.avg_logprob,
                compression_ratio=ratio,
                no_speech_prob=result.no_speech_prob,
                experts=result.experts,
                expert_probabilities=result.expert_probabilities,
                language=result.language,
            )
        )
    worded = segments
    if result.timings is not None:
        with_words = add_words(segments, result.timings, tokenizer, options, last_speech_end=start)
        worded = [_spread(new, old) for new, old in zip(with_words, segments, strict=True)]
    return [new for new, old in zip(worded, segments, strict=True) if old.text.strip() and old.end > old.start]


def _times(piece: Sequence[int], duration: float, tokenizer: Tokenizer) -> tuple[float, float]:
    """Begin and end of a piece in its window; never past the window's end, where the silence was put."""
    begin = tokenizer.seconds(piece[0]) if tokenizer.is_timestamp(piece[0]) else 0.0
    closed = len(piece) > 1 and tokenizer.is_timestamp(piece[-1])
    end = tokenizer.seconds(piece[-1]) if closed else duration
    return min(begin, duration), min(end, duration)


def _spread(segment: Segment, told: Segment) -> Segment:
    """The segment; where all its words together take no time, they share that of its timestamps."""
    if not segment.words or segment.end > segment.start:
        return segment
    return _moved(segment, list(pairwise(np.linspace(told.start, told.end, len(segment.words) + 1).tolist())))


def _moved(segment: Segment, times: Sequence[tuple[float, float]]) -> Segment:
    """The segment with new times for its words, or for itself where it has none."""
    pairs = zip(segment.words, times, strict=True) if segment.words else ()
    words = tuple(replace(word, start=start, end=end) for word, (start, end) in pairs)
    return replace(segment, start=times[0][0], end=times[-1][1], words=words or segment.words)


# What was made up.


def _improbable(word: Word) -> float:
    """How odd a word is: unsure, very short, very long."""
    duration = word.end - word.start
    return (word.probability < 0.15) + max(0.0, 0.133 - duration) * 15 + max(0.0, duration - 2.0)


def _looks_invented(segment: Segment | None, marks: str) -> bool:
    if segment is None or not segment.words:
        return False
    words = [word for word in segment.words if word.word not in marks][:8]
    score = sum(map(_improbable, words))
    return score >= 3 or score + 0.01 >= len(words)


def without_inventions(
    segments: Sequence[Segment], window: Window, options: TranscribeOptions
) -> tuple[list[Segment], float | None]:
    """The segments of a window that are trusted, and the time from which it is to be decoded again, if any is not.

    ``openai/whisper``'s ``hallucination_silence_threshold``: an odd segment behind more than that many seconds of silence,
    or with silence or another odd one on both sides, was probably made up; silence before it is skipped.
    """
    threshold, start, end = options.hallucination_silence_threshold, window.start, window.end
    if threshold is None:
        return list(segments), None
    marks = options.prepend_punctuations + options.append_punctuations
    worded = [segment for segment in segments if segment.words]
    if worded and _looks_invented(worded[0], marks) and worded[0].start - start > max(threshold, LEAST_ADVANCE):
        return [], worded[0].start
    last_end = start
    for segment, after in zip_longest(worded, worded[1:]):
        if _looks_invented(segment, marks):
            next_start = after.words[0].start if after is not None and after.words else end
            quiet_before = (
                segment.start - last_end > threshold or segment.start < threshold or segment.start - start < 2
            )
            quiet_after = next_start - segment.end > threshold or _looks_invented(after, marks) or end - segment.end < 2
            if quiet_before and quiet_after:
                return list(segments[: segments.index(segment)]), max(start + LEAST_ADVANCE, segment.start)
        last_end = segment.end
    return list(segments), None


# Times that can be shown.


def placed(segments: Sequence[Segment], window: Window) -> list[Segment]:
    """The segments of a window at times that can be shown: whole milliseconds inside the window, one after the other, none
    of them empty, and none that begins long before the sound or ends long after it. A segment lasts as long as its words.

    A window with more words than there is time for has no segments.
    """
    low, high = math.ceil(round(window.start * 1000, 3)), math.floor(round(window.end * 1000, 3))
    begin, per_ms = window.start * 1000, SAMPLE_RATE / 1000
    sound = [(begin + a / per_ms, begin + b / per_ms) for a, b in speech_spans(window.samples, padding=0)]
    times: list[tuple[int, int]] = []
    for segment in segments:
        parts = segment.words or (segment,)
        first, last = min(segment.start, parts[0].start), max(segment.end, parts[-1].end)
        first, last = _trimmed(1000 * first, 1000 * last, sound)
        for part in parts:
            start, end = (min(max(1000 * time, first), last) for time in (part.start, part.end))
            start, end = _trimmed(start, end, sound)
            times.append((round(start), round(end)))
    if len(times) > high - low:
        return []
    laid = ((start / 1000, end / 1000) for start, end in _apart(times, low, high))
    return [_moved(segment, [next(laid) for _ in segment.words or (segment,)]) for segment in segments]


def _trimmed(start: float, end: float, sound: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """A stretch without the silence at its ends; of sound that goes on beyond them, a bit is a neighbour's."""
    inside = [(a, b) for a, b in sound if min(b, end) - max(a, start) > (0 if start <= a and b <= end else EDGE)]
    return (max(start, inside[0][0] - EDGE), min(end, inside[-1][1] + EDGE)) if inside else (start, end)


def _apart(times: Sequence[tuple[int, int]], low: int, high: int) -> list[tuple[int, int]]:
    """Each at least :data:`LEAST_LASTING` long, or what there is room for, at a neighbour's cost where there is no gap."""
    least = min(LEAST_LASTING, (high - low) // max(1, len(times)))
    laid: list[tuple[int, int]] = []
    for start, end in times:
        low = max(start, low)
        laid.append((low, low := max(end, low + least)))
    for index, (start, end) in reversed(list(enumerate(laid))):
        end = min(end, high)
        high = min(start, end - least)
        laid[index] = (high, end)
    return laid


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
