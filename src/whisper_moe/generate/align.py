"""When each word was said: the alignment heads' attention and dynamic time warping.

Some cross-attention heads of Whisper follow the audio as they write (openai/whisper's ``alignment_heads``). Their
weights, normalised and smoothed, score every pair of token and encoder position; the best monotonic path through the
scores gives each token its time (Sakoe and Chiba 1978). Results equal openai/whisper's ``timing.py``.

Shape suffixes: H heads, T tokens, P encoder positions, V vocabulary, N and M the rows and columns of a path's scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from whisper_moe.config import FRAMES_PER_SECOND, POSITIONS_PER_SECOND
from whisper_moe.generate.options import TranscribeOptions
from whisper_moe.generate.result import Segment, Word
from whisper_moe.media.tokenizer import Tokenizer

_SENTENCE_ENDS = ".。!！?？"
_LONGEST_MEDIAN = 0.7
"""Seconds: the median duration of a word is taken to be no longer than this."""
_MEDIAN_WIDTH = 7
"""Encoder positions that scores are smoothed over."""
_DIAGONAL, _UP, _LEFT = 0, 1, 2


@dataclass(frozen=True, slots=True)
class WordTiming:
    """A word and its tokens; times in seconds from the start of the window."""

    word: str
    tokens: tuple[int, ...]
    start: float
    end: float
    probability: float

    @property
    def duration(self) -> float:
        return self.end - self.start


def median_filter(x: Tensor, width: int) -> Tensor:
    """Running median over an odd ``width`` along the last dimension, which is reflected at its ends.

    A dimension too short to reflect is returned as it is.
    """
    assert width > 0 and width % 2 == 1, width
    half = width // 2
    size = x.shape[-1]
    if size <= half:
        return x
    padded = F.pad(x.reshape(-1, size), (half, half), mode="reflect")
    shifted = [padded[:, i : i + size] for i in range(width)]
    # Bubble the largest half + 1 of the values up; the smallest of those is the median. Exact, and it needs far less
    # memory than sorting an unfolded copy.
    for top in range(width - 1, half - 1, -1):
        for i in range(top):
            low, high = torch.minimum(shifted[i], shifted[i + 1]), torch.maximum(shifted[i], shifted[i + 1])
            shifted[i], shifted[i + 1] = low, high
    return shifted[half].reshape(x.shape)


def dtw(cost_NM: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The cheapest monotonic path from the first cell to the last: its rows and its columns, both ascending.

    Sums are kept in float32, and the left step is taken unless another is cheaper than both others, as in
    openai/whisper, so that paths are equal and not only as cheap.
    """
    i, j = cost_NM.shape
    assert i > 0 and j > 0, cost_NM.shape
    steps = _cheapest_steps(cost_NM)
    path: list[tuple[int, int]] = []
    while i > 0 and j > 0:
        path.append((i - 1, j - 1))
        step = steps[i + j, i]
        i -= step != _LEFT
        j -= step != _UP
    rows, columns = np.array(path[::-1]).T
    return rows, columns


def _cheapest_steps(cost_NM: np.ndarray) -> np.ndarray:
    """[N + M + 1, N + 1] int8: how cell (row i, column j), both counted from 1, is reached best, at [i + j, i].

    Cells of one anti-diagonal depend only on the two before, so each is computed as a vector over i.
    """
    n, m = cost_NM.shape
    skewed = np.full((n + m + 1, n + 1), np.inf, dtype=np.float32)
    for i in range(n):
        skewed[i + 2 : i + 2 + m, i + 1] = cost_NM[i]
    steps = np.empty((n + m + 1, n + 1), dtype=np.int8)
    before = np.full(n + 1, np.inf, dtype=np.float32)
    before[0] = 0.0  # anti-diagonal 0: the corner outside the first cell
    last = np.full(n + 1, np.inf, dtype=np.float32)
    for d in range(2, n + m + 1):
        rows = slice(max(1, d - m), min(n, d - 1) + 1)
        above = slice(rows.start - 1, rows.stop - 1)
        diagonal, up, left = before[above], last[above], last[rows]
        is_diagonal = (diagonal < up) & (diagonal < left)
        is_up = (up < diagonal) & (up < left)
        best = np.where(is_diagonal, diagonal, np.where(is_up, up, left))
        steps[d, rows] = np.where(is_diagonal, _DIAGONAL, np.where(is_up, _UP, _LEFT))
        before, last = last, np.full(n + 1, np.inf, dtype=np.float32)
        last[rows] = skewed[d, rows] + best
    return steps


def attention_scores(logits_HTP: Tensor) -> Tensor:
    """[T, P]: how well each token fits each position: softmax, standardised over tokens, smoothed, mean over heads."""
    weights_HTP = logits_HTP.float().softmax(dim=-1)
    std, mean = torch.std_mean(weights_HTP, dim=-2, keepdim=True, correction=0)
    # A position to which all tokens attend alike tells nothing; its zero deviation must not become NaN.
    scores_HTP = torch.where(std > 0, (weights_HTP - mean) / std, 0.0)
    return median_filter(scores_HTP, _MEDIAN_WIDTH).mean(dim=0)


def token_probabilities(logits_TV: Tensor, text_tokens: Sequence[int], tokenizer: Tokenizer) -> list[float]:
    """The probability of each text token among all text tokens.

    ``logits_TV`` are the decoder's outputs for the inputs that :func:`align` names, one row for each.
    """
    rows_TV = logits_TV[-len(text_tokens) - 2 : -2, : tokenizer.eot].float().softmax(dim=-1)
    return rows_TV.gather(1, torch.tensor(text_tokens, dtype=torch.long, device=rows_TV.device)[:, None])[:, 0].tolist()


def align(
    logits_HTP: Tensor,
    probabilities: Sequence[float],
    text_tokens: Sequence[int],
    tokenizer: Tokenizer,
    *,
    language: str | None = None,
) -> list[WordTiming]:
    """The words of ``text_tokens`` and their times; none for no tokens.

    ``logits_HTP`` are the scaled dot products, before the softmax, of the alignment heads in the decoder's
    cross-attention, for the inputs ``[*sot_sequence, no_timestamps, *text_tokens, eot]`` and the positions that hold
    audio (``frames // 2`` of them; padding left out). Log-probabilities serve as well. ``probabilities``: one for each
    text token; there must be no others among ``text_tokens``.
    """
    assert len(probabilities) == len(text_tokens) <= logits_HTP.shape[1] - 2
    if not text_tokens:
        return []
    # <|notimestamps|> predicts the first text token, the last text token the end, and the end nothing.
    scores_TP = attention_scores(logits_HTP)[-len(text_tokens) - 2 : -1]
    rows, positions = dtw(-scores_TP.cpu().numpy())
    begins = np.flatnonzero(np.diff(rows, prepend=-1))
    times = (positions[begins] / POSITIONS_PER_SECOND).tolist()
    timings: list[WordTiming] = []
    done = 0
    for word, tokens in zip(*tokenizer.split_to_words(text_tokens, language), strict=True):
        stop = done + len(tokens)
        probability = float(np.mean(probabilities[done:stop]))
        timings.append(WordTiming(word, tuple(tokens), times[done], times[stop], probability))
        done = stop
    return timings


def merge_punctuation(timings: Sequence[WordTiming], options: TranscribeOptions) -> list[WordTiming]:
    """Join marks that stand alone to the word after or before them, which keeps its own times."""
    words: list[WordTiming] = []
    for timing in reversed(timings):
        if words and timing.word.startswith(" ") and timing.word.strip() in options.prepend_punctuations:
            mark, after = timing, words.pop()
            timing = replace(after, word=mark.word + after.word, tokens=mark.tokens + after.tokens)
        words.append(timing)
    merged: list[WordTiming] = []
    for timing in reversed(words):
        if merged and not merged[-1].word.endswith(" ") and timing.word in options.append_punctuations:
            before, mark = merged.pop(), timing
            timing = replace(before, word=before.word + mark.word, tokens=before.tokens + mark.tokens)
        merged.append(timing)
    return merged


def _median_duration(timings: Sequence[WordTiming]) -> float:
    """Seconds; of the words that take any time, 0 if none does."""
    durations = [timing.duration for timing in timings if timing.duration]
    return min(_LONGEST_MEDIAN, float(np.median(durations))) if durations else 0.0


def _shorten_at_sentence_ends(timings: Sequence[WordTiming], longest: float) -> list[WordTiming]:
    """Cut a long word next to the end of a sentence: the pause there is not part of it."""
    shortened = list(timings[:1])
    for before, timing in pairwise(timings):
        if timing.duration > longest:
            if timing.word in _SENTENCE_ENDS:
                timing = replace(timing, end=timing.start + longest)
            elif before.word in _SENTENCE_ENDS:
                timing = replace(timing, start=timing.end - longest)
        shortened.append(timing)
    return shortened


def _deal_out(timings: Sequence[WordTiming], counts: Sequence[int], offset: float) -> list[list[Word]]:
    """The words of each segment, by its count of text tokens, ``offset`` seconds later than in the window."""
    dealt: list[list[Word]] = []
    remaining = iter(timings)
    for count in counts:
        words: list[Word] = []
        while count > 0 and (timing := next(remaining, None)):
            count -= len(timing.tokens)
            if timing.word:
                start, end = round(offset + timing.start, 2), round(offset + timing.end, 2)
                words.append(Word(start, end, timing.word, timing.probability))
        dealt.append(words)
    return dealt


def _shorten_after_pause(words: Sequence[Word], pause_start: float, median: float) -> list[Word]:
    """Cut the first two words after a pause (over four medians long) to at most two medians each."""
    first, *rest = words
    longest = median * 2
    if first.end - pause_start <= median * 4:
        return [first, *rest]
    first_is_long = first.end - first.start > longest
    if not first_is_long and not (rest and rest[0].end - first.start > longest * 2):
        return [first, *rest]
    if rest and rest[0].end - rest[0].start > longest:
        boundary = rest[0].end - longest
        first, rest[0] = replace(first, end=boundary), replace(rest[0], start=boundary)
    return [replace(first, start=max(0.0, first.end - longest)), *rest]


def _reconcile(segment: Segment, words: list[Word], median: float) -> Segment:
    """Give the segment its words; each of its two ends moves to theirs, or theirs to it if a word is far too long."""
    first = words[0]
    start, end = first.start, words[-1].end
    if segment.start < first.end and segment.start - 0.5 > first.start:
        start = segment.start
        words[0] = replace(first, start=max(0.0, min(first.end - median, start)))
    last = words[-1]
    if segment.end > last.start and segment.end + 0.5 < last.end:
        end = segment.end
        words[-1] = replace(last, end=max(last.start + median, end))
    return replace(segment, start=start, end=end, words=tuple(words))


def add_words(
    segments: Sequence[Segment],
    timings: Sequence[WordTiming],
    tokenizer: Tokenizer,
    options: TranscribeOptions,
    *,
    last_speech_end: float = 0.0,
) -> list[Segment]:
    """The segments of one window with their words, each segment's ends drawn to its words'.

    ``timings`` are what :func:`align` gave for the text tokens of these segments. ``last_speech_end``: seconds, in
    the recording, at which the speech before this window ended; a word after a long pause is cut to a usual length.
    """
    if not segments:
        return []
    median = _median_duration(timings)
    timings = merge_punctuation(_shorten_at_sentence_ends(timings, 2 * median), options)
    counts = [len(tokenizer.text_ids(segment.tokens)) for segment in segments]
    finished: list[Segment] = []
    dealt = _deal_out(timings, counts, segments[0].seek / FRAMES_PER_SECOND)
    for segment, words in zip(segments, dealt, strict=True):
        if words:
            segment = _reconcile(segment, _shorten_after_pause(words, last_speech_end, median), median)
            last_speech_end = segment.end
        else:
            segment = replace(segment, words=())
        finished.append(segment)
    return finished
