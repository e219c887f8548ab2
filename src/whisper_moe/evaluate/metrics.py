"""Figures of a corpus from counts of its clips, with intervals: error rates, script fidelity, cross-entropy, BLEU, accuracy.

A figure is a function of sums over clips: all edits over all reference words, never a mean of clips' rates. Its interval, and
that of a difference between two systems, is a percentile bootstrap over clips (Bisani and Ney 2004): 1,000 resamples
from one seed, the same clips drawn for both systems. Both sides are normalised first (:mod:`whisper_moe.media.normalize`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from whisper_moe.media.languages import UNSPACED_LANGUAGES
from whisper_moe.media.normalize import letters_in_script, normalize, scripts_of, spoken

RESAMPLES = 1_000
SEED = 20_240_229
PERCENTILES = (2.5, 97.5)
LONGEST_UNIT = 12
"""Words in the longest phrase whose repetition counts as a loop."""
_DRAWN_AT_ONCE = 4_000_000
"""Counts of draws that are held at a time, 32 MB: resamples times clips may be many more."""


def _ratio(sums: np.ndarray) -> np.ndarray:
    """[..., 2] → [...]: NaN where there is nothing to divide by."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(sums[..., 1] > 0, sums[..., 0] / sums[..., 1], np.nan)


@dataclass(frozen=True)
class ErrorCounts:
    """What each clip adds to the sums that a figure is computed from: edits and words, for an error rate."""

    rows: np.ndarray
    """[clips, k]"""
    score: Callable[[np.ndarray], np.ndarray] = _ratio
    """Sums [..., k] → figures [...]; NaN where there is none. By default the quotient of two sums."""
    more_is_better: bool = False
    signature: str = ""
    """How a figure of sacrebleu's was computed, in its own words."""

    @classmethod
    def of(cls, part: Sequence[float] | np.ndarray, whole: Sequence[float] | np.ndarray, **kind: Any) -> ErrorCounts:
        """The quotient of two sums, such as edits over words."""
        return cls(np.stack([np.asarray(part), np.asarray(whole)], axis=1), **kind)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def part(self) -> np.ndarray:
        return self.rows[:, 0]

    @property
    def whole(self) -> np.ndarray:
        return self.rows[:, 1]

    @property
    def value(self) -> float:
        """The figure of all clips; NaN where there is none."""
        return float(self.score(self.rows.sum(axis=0)))

    def of_clips(self, index: Sequence[int]) -> ErrorCounts:
        """The counts of some of the clips."""
        return replace(self, rows=self.rows[np.asarray(index, dtype=int)])


def clip_counts(
    references: Sequence[str], transcripts: Sequence[str], languages: Sequence[str] | str = "en"
) -> ErrorCounts:
    """Word edits over reference words, clip by clip. ``languages``: of each clip, or one code for all."""
    return _aligned(*_normalized(references, transcripts, languages), words=True)


def character_counts(
    references: Sequence[str], transcripts: Sequence[str], languages: Sequence[str] | str = "en"
) -> ErrorCounts:
    """Edits of code points over the reference's; spaces included, where the language has them."""
    codes = [languages] * len(references) if isinstance(languages, str) else languages
    said, written = (
        [text.replace(" ", "") if code in UNSPACED_LANGUAGES else text for text, code in zip(texts, codes, strict=True)]
        for texts in _normalized(references, transcripts, codes)
    )
    return _aligned(said, written, words=False)


def _normalized(
    references: Sequence[str], transcripts: Sequence[str], languages: Sequence[str] | str
) -> tuple[list[str], list[str]]:
    codes = [languages] * len(references) if isinstance(languages, str) else languages
    said, written = (
        [normalize(text, code) for text, code in zip(texts, codes, strict=True)] for texts in (references, transcripts)
    )
    return said, written


def _aligned(said: list[str], written: list[str], *, words: bool) -> ErrorCounts:
    import jiwer

    if not said:
        return ErrorCounts(np.zeros((0, 2), dtype=int))
    pairs = (jiwer.process_words if words else jiwer.process_characters)(said, written)
    edits = [sum(map(edits_of, chunks)) for chunks in pairs.alignments]
    return ErrorCounts.of(edits, [len(units) for units in pairs.references])


def edits_of(chunk: Any) -> int:
    """Of a stretch of jiwer's alignment."""
    if chunk.type == "equal":
        return 0
    return max(chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx)


def script_fidelity(transcripts: Sequence[str], languages: Sequence[str]) -> ErrorCounts:
    """Letters in a script of the language that was wanted, over all letters written."""
    found = [letters_in_script(text, code) for text, code in zip(transcripts, languages, strict=True)]
    return ErrorCounts(np.array(found, dtype=int).reshape(-1, 2), more_is_better=True)


def label_accuracy(references: Sequence[str], transcripts: Sequence[str], languages: Sequence[str]) -> ErrorCounts:
    """Of isolated labels: 1 where the transcript is the label, spaces apart."""
    said, written = _normalized(references, transcripts, languages)
    right = [int(a.replace(" ", "") == b.replace(" ", "")) for a, b in zip(said, written, strict=True)]
    return ErrorCounts.of(right, [1] * len(right), more_is_better=True)


def translation_scores(
    references: Sequence[str], transcripts: Sequence[str], languages: Sequence[str]
) -> dict[str, ErrorCounts]:
    """BLEU (arXiv 1804.08771) and chrF++ (Popović 2017), 0 to 100.

    Texts are compared as they are written, timestamps aside: case and punctuation count. BLEU's words are those of the target
    language's tokenizer: 13a where it is written in Latin letters, ``zh`` and ``char`` where words are not spaced, else ``intl``,
    which knows the punctuation of all scripts, dandas among it. Languages are tokenised each their own way and then added up.
    """
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    bleus = {code: BLEU(tokenize=_bleu_tokenizer(code)) for code in dict.fromkeys(languages)}
    found = {}
    for name, metrics in (("bleu", bleus), ("chrf", dict.fromkeys(languages, CHRF(word_order=2)))):
        rows = [
            metrics[code]._extract_corpus_statistics([spoken(text)], [[spoken(said)]])[0]
            for said, text, code in zip(references, transcripts, languages, strict=True)
        ]
        signatures = sorted({str(metric.get_signature()) for metric in metrics.values()})
        found[name] = _sacrebleu_counts(rows, next(iter(metrics.values())), "; ".join(signatures))
    return found


def _bleu_tokenizer(language: str) -> str:
    if language in UNSPACED_LANGUAGES:
        return "zh" if language in ("zh", "yue") else "char"
    return "13a" if scripts_of(language) == {"LATIN"} else "intl"


def _sacrebleu_counts(rows: list[list[int]], metric: Any, signature: str) -> ErrorCounts:
    def score(sums: np.ndarray) -> np.ndarray:
        flat = sums.reshape(-1, sums.shape[-1])
        found = [metric._compute_score_from_stats(row.tolist()).score if row.any() else np.nan for row in flat]
        return np.array(found).reshape(sums.shape[:-1])

    return ErrorCounts(np.array(rows, dtype=int), score, more_is_better=True, signature=signature)


def _resampled(*systems: ErrorCounts) -> list[np.ndarray]:
    """Figures of resampled clips, [resamples] for each system: the same clips for all of them."""
    clips = len(systems[0])
    random, even = np.random.default_rng(SEED), np.full(clips, 1 / clips)
    step = max(1, _DRAWN_AT_ONCE // clips)
    parts = []
    for first in range(0, RESAMPLES, step):
        draws = random.multinomial(clips, even, size=min(step, RESAMPLES - first))
        parts.append([counts.score(draws @ counts.rows) for counts in systems])
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


def interval(counts: ErrorCounts) -> tuple[float, float]:
    """The 95 % interval of a figure; NaN twice where no resample has one."""
    return _percentiles(_resampled(counts)[0]) if len(counts) else (np.nan, np.nan)


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    known = values[~np.isnan(values)]
    if not len(known):
        return np.nan, np.nan
    low, high = np.percentile(known, PERCENTILES)
    return float(low), float(high)


def paired_difference(counts: ErrorCounts, baseline: ErrorCounts) -> dict[str, float]:
    """A figure of one system less that of another on the same clips, with its 95 % interval.

    ``share_worse`` is the share of resamples in which the first is worse than the second.
    """
    assert len(counts) == len(baseline), "the two systems were scored on different clips"
    if not len(counts):
        return dict.fromkeys(("difference", "low", "high", "share_worse"), np.nan)
    mine, theirs = _resampled(counts, baseline)
    low, high = _percentiles(mine - theirs)
    return {
        "difference": counts.value - baseline.value,
        "low": low,
        "high": high,
        "share_worse": float((mine < theirs if counts.more_is_better else mine > theirs).mean()),
    }


def longest_loop(text: str, language: str = "en") -> int:
    """How often a phrase of up to 12 words is said in a row at most: 1 when nothing repeats."""
    words = normalize(text, language).split()
    longest = min(len(words), 1)
    for unit in range(1, LONGEST_UNIT + 1):
        run = 0
        for index in range(unit, len(words)):
            run = run + 1 if words[index] == words[index - unit] else 0
            longest = max(longest, run // unit + 1)
    return longest
