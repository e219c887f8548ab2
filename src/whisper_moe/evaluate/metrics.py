"""Figures of a corpus from counts of its clips, with intervals: error rates, script fidelity, cross-entropy, BLEU, accuracy.

A figure is a function of sums over clips: all edits over all reference words, never a mean of clips' rates. Its interval, and
that of a difference between two systems, is a percentile bootstrap over clips (Bisani and Ney 2004): 1,000 resamples
from one seed, the same clips drawn for both systems. Both sides are normalised first (:mod:`whisper_moe.media.normalize`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from whisper_moe.media.languages import UNSPACED_LANGUAGES
from whisper_moe.media.normalize import letters_in_script, normalize, scripts_of, spoken

if TYPE_CHECKING:
    import jiwer

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
class Tally:
    """What each clip adds to the sums that a figure is computed from."""

    rows: np.ndarray
    """[clips, k]"""
    score: Callable[[np.ndarray], np.ndarray] = _ratio
    """Sums [..., k] → figures [...]; NaN where there is none. By default the quotient of two sums."""
    more_is_better: bool = False
    by_reference: bool = True
    """The second column follows from the references alone, so that two systems on the same clips have the same."""

    @classmethod
    def of(cls, part: Sequence[float] | np.ndarray, whole: Sequence[float] | np.ndarray, **kind: Any) -> Tally:
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

    def of_clips(self, index: Sequence[int] | np.ndarray) -> Tally:
        """The tally of some of the clips."""
        return Tally(self.rows[np.asarray(index, dtype=int)], self.score, self.more_is_better, self.by_reference)


def clip_counts(references: Sequence[str], transcripts: Sequence[str], languages: Sequence[str] | str = "en") -> Tally:
    """Word edits over reference words, clip by clip. ``languages``: of each clip, or one code for all."""
    said, written = _normalized(references, transcripts, languages)
    return _aligned(said, written, _process_words)


def character_counts(
    references: Sequence[str], transcripts: Sequence[str], languages: Sequence[str] | str = "en"
) -> Tally:
    """Edits of code points over the reference's; spaces included, where the language has them."""
    codes = [languages] * len(references) if isinstance(languages, str) else languages
    said, written = (
        [text.replace(" ", "") if code in UNSPACED_LANGUAGES else text for text, code in zip(texts, codes, strict=True)]
        for texts in _normalized(references, transcripts, languages)
    )
    return _aligned(said, written, _process_characters)


def joined_counts(references: Sequence[str], transcript: str, language: str = "en") -> Tally:
    """Word edits of one transcript of all clips in a row, each charged to the clip that its reference word is in.

    An insertion belongs to the clip of the word before it, so that the edits add up to those of the whole.
    """
    words = np.array([len(normalize(text, language).split()) for text in references])
    owner = np.repeat(np.arange(len(references)), words)
    whole = _process_words(
        [" ".join(normalize(text, language) for text in references)], [normalize(transcript, language)]
    )
    edits = np.zeros(len(references), dtype=int)
    for chunk in whole.alignments[0]:
        if chunk.type == "insert":
            edits[owner[max(chunk.ref_start_idx - 1, 0)]] += _cost(chunk)
        elif chunk.type != "equal":
            np.add.at(edits, owner[chunk.ref_start_idx : chunk.ref_end_idx], 1)
    return Tally.of(edits, words)


def _normalized(
    references: Sequence[str], transcripts: Sequence[str], languages: Sequence[str] | str
) -> tuple[list[str], list[str]]:
    codes = [languages] * len(references) if isinstance(languages, str) else languages
    sides = (
        [normalize(text, code) for text, code in zip(texts, codes, strict=True)] for texts in (references, transcripts)
    )
    said, written = sides
    return said, written


def _aligned(said: list[str], written: list[str], process: Callable[[list[str], list[str]], Any]) -> Tally:
    if not said:
        return Tally(np.zeros((0, 2), dtype=int))
    pairs = process(said, written)
    edits = [sum(_cost(chunk) for chunk in chunks) for chunks in pairs.alignments]
    return Tally.of(edits, [len(units) for units in pairs.references])


def _process_words(said: list[str], written: list[str]) -> jiwer.WordOutput:
    import jiwer

    return jiwer.process_words(said, written)


def _process_characters(said: list[str], written: list[str]) -> jiwer.CharacterOutput:
    import jiwer

    return jiwer.process_characters(said, written)


def _cost(chunk: jiwer.AlignmentChunk) -> int:
    if chunk.type == "equal":
        return 0
    return max(chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx)


def script_fidelity(transcripts: Sequence[str], languages: Sequence[str]) -> Tally:
    """Letters in a script of the language that was wanted, over all letters written."""
    found = [letters_in_script(text, code) for text, code in zip(transcripts, languages, strict=True)]
    rows = np.array(found, dtype=int).reshape(-1, 2)
    return Tally(rows, more_is_better=True, by_reference=False)


def label_accuracy(references: Sequence[str], transcripts: Sequence[str], languages: Sequence[str]) -> Tally:
    """Of isolated labels: 1 where the transcript is the label, spaces apart."""
    said, written = _normalized(references, transcripts, languages)
    right = [a.replace(" ", "") == b.replace(" ", "") for a, b in zip(said, written, strict=True)]
    return Tally.of(np.array(right, dtype=int), np.ones(len(right), dtype=int), more_is_better=True)


def translation_scores(
    references: Sequence[str], transcripts: Sequence[str], languages: Sequence[str]
) -> dict[str, tuple[Tally, str]]:
    """BLEU (arXiv 1804.08771) and chrF++ (Popović 2017), 0 to 100, each with sacrebleu's signature.

    Texts are compared as they are written, timestamps aside: case and punctuation count. BLEU's words are those of the target
    language's tokenizer: 13a where it is written in Latin letters, ``zh`` and ``char`` where words are not spaced, else ``intl``,
    which knows the punctuation of all scripts, dandas among it. Languages are tokenised each their own way and then added up.
    """
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    used = {code: BLEU(tokenize=_bleu_tokenizer(code)) for code in dict.fromkeys(languages)}
    chrf, any_bleu = CHRF(word_order=2), next(iter(used.values()), BLEU())
    bleu_rows: list[list[int]] = []
    chrf_rows: list[list[int]] = []
    for said, written, code in zip(map(spoken, references), map(spoken, transcripts), languages, strict=True):
        bleu_rows += used[code]._extract_corpus_statistics([written], [[said]])
        chrf_rows += chrf._extract_corpus_statistics([written], [[said]])
    signatures = sorted({str(metric.get_signature()) for metric in used.values()} if used else [])
    return {
        "bleu": (_sacrebleu_tally(bleu_rows, any_bleu), "; ".join(signatures)),
        "chrf": (_sacrebleu_tally(chrf_rows, chrf), str(chrf.get_signature()) if chrf_rows else ""),
    }


def _bleu_tokenizer(language: str) -> str:
    if language in UNSPACED_LANGUAGES:
        return "zh" if language in ("zh", "yue") else "char"
    return "13a" if scripts_of(language) == {"LATIN"} else "intl"


def _sacrebleu_tally(rows: list[list[int]], metric: Any) -> Tally:
    width = len(rows[0]) if rows else 1

    def score(sums: np.ndarray) -> np.ndarray:
        flat = sums.reshape(-1, sums.shape[-1])
        found = [metric._compute_score_from_stats(row.tolist()).score if row.any() else np.nan for row in flat]
        return np.array(found).reshape(sums.shape[:-1])

    return Tally(np.array(rows, dtype=int).reshape(-1, width), score, more_is_better=True, by_reference=False)


def resampled(clips: int, resamples: int = RESAMPLES) -> np.ndarray:
    """How often each resample draws each clip: [resamples, clips]. The same for every system."""
    return np.concatenate(list(_draws(clips, resamples)))


def _draws(clips: int, resamples: int = RESAMPLES) -> Iterator[np.ndarray]:
    """:func:`resampled`, a few resamples at a time."""
    random, even = np.random.default_rng(SEED), np.full(clips, 1 / clips)
    step = max(1, _DRAWN_AT_ONCE // clips)
    for first in range(0, resamples, step):
        yield random.multinomial(clips, even, size=min(step, resamples - first))


def interval(each: Tally) -> tuple[float, float]:
    """The 95 % interval of a figure; NaN twice where no resample has one."""
    if not len(each):
        return np.nan, np.nan
    return _percentiles(np.concatenate([each.score(draws @ each.rows) for draws in _draws(len(each))]))


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    known = values[~np.isnan(values)]
    if not len(known):
        return np.nan, np.nan
    low, high = np.percentile(known, PERCENTILES)
    return float(low), float(high)


def paired_difference(each: Tally, baseline: Tally) -> dict[str, float]:
    """A figure of one system less that of another on the same clips, with its 95 % interval.

    ``share_worse`` is the share of resamples in which the first is worse than the second.
    """
    alike = len(each) == len(baseline) and (not each.by_reference or (each.whole == baseline.whole).all())
    assert alike, "the two systems were scored on different clips"
    if not len(each):
        return dict.fromkeys(("difference", "low", "high", "share_worse"), np.nan)
    parts = [each.score(draws @ each.rows) - baseline.score(draws @ baseline.rows) for draws in _draws(len(each))]
    differences = np.concatenate(parts)
    low, high = _percentiles(differences)
    worse = differences < 0 if each.more_is_better else differences > 0
    return {
        "difference": each.value - baseline.value,
        "low": low,
        "high": high,
        "share_worse": float(worse.mean()),
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
