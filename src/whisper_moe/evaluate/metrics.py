"""How well a model says what it should: figures of a corpus from counts of its clips, and the evaluator that a run has.

A figure (error rates, script fidelity, cross-entropy, BLEU, accuracy) is a function of sums over clips: all edits over all
reference words, never a mean of clips' rates. Its interval, and that of a difference between two systems, is a percentile
bootstrap over clips (Bisani and Ney 2004): 1,000 resamples from one seed, the same clips drawn for both systems. Both sides
are normalised first (:mod:`whisper_moe.media.normalize`).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from whisper_moe.config import FULL_WINDOW
from whisper_moe.data.corpus import Corpus
from whisper_moe.data.examples import IGNORED, Example, ExampleReader, pack_examples
from whisper_moe.data.sample import Sample, Skipped, items, left_out
from whisper_moe.generate.decode import WindowDecoder
from whisper_moe.generate.options import TranscribeOptions
from whisper_moe.media.languages import UNSPACED_LANGUAGES
from whisper_moe.media.normalize import letters_in_script, normalize, scripts_of, spoken
from whisper_moe.media.tokenizer import Tokenizer
from whisper_moe.model.model import WhisperMoEModel
from whisper_moe.packing import first_fit_decreasing

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
    sides = (_normalized(each, languages) for each in (references, transcripts))
    return _edits(*([text.split() for text in side] for side in sides))


def character_counts(
    references: Sequence[str], transcripts: Sequence[str], languages: Sequence[str] | str = "en"
) -> ErrorCounts:
    """Edits of code points over the reference's; spaces included, where the language has them."""
    sides = (_normalized(each, languages, joined=UNSPACED_LANGUAGES) for each in (references, transcripts))
    return _edits(*([text.strip() for text in side] for side in sides))


def _normalized(texts: Sequence[str], languages: Sequence[str] | str, joined: Container[str] = ()) -> list[str]:
    """Without spaces in the languages that are ``joined``."""
    codes = [languages] * len(texts) if isinstance(languages, str) else languages
    pairs = [(normalize(text, code), code) for text, code in zip(texts, codes, strict=True)]
    return [text.replace(" ", "") if code in joined else text for text, code in pairs]


def _edits(said: Sequence[Sequence[str]], written: Sequence[Sequence[str]]) -> ErrorCounts:
    from rapidfuzz.distance import Levenshtein

    edits = [Levenshtein.distance(*pair) for pair in zip(said, written, strict=True)]
    return ErrorCounts.of(edits, [len(units) for units in said])


def script_fidelity(transcripts: Sequence[str], languages: Sequence[str]) -> ErrorCounts:
    """Letters in a script of the language that was wanted, over all letters written."""
    found = [letters_in_script(text, code) for text, code in zip(transcripts, languages, strict=True)]
    return ErrorCounts(np.array(found, dtype=int).reshape(-1, 2), more_is_better=True)


def label_accuracy(references: Sequence[str], transcripts: Sequence[str], languages: Sequence[str]) -> ErrorCounts:
    """Of isolated labels: 1 where the transcript is the label, spaces apart."""
    said, written = (_normalized(each, languages, joined=languages) for each in (references, transcripts))
    return ErrorCounts.of([a == b for a, b in zip(said, written, strict=True)], [1] * len(said), more_is_better=True)


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
    chrfs = dict.fromkeys(languages, CHRF(word_order=2))
    texts = [([spoken(text)], [[spoken(said)]]) for said, text in zip(references, transcripts, strict=True)]
    found = {}
    for name, metrics in (("bleu", bleus), ("chrf", chrfs)):
        pairs = zip(languages, texts, strict=True)
        rows = [metrics[code]._extract_corpus_statistics(*pair)[0] for code, pair in pairs]
        score = partial(_sacrebleu_score, next(iter(metrics.values())))
        signature = "; ".join(sorted({str(metric.get_signature()) for metric in metrics.values()}))
        found[name] = ErrorCounts(np.array(rows, dtype=int), score, more_is_better=True, signature=signature)
    return found


def _bleu_tokenizer(language: str) -> str:
    if language in UNSPACED_LANGUAGES:
        return "zh" if language in ("zh", "yue") else "char"
    return "13a" if scripts_of(language) == {"LATIN"} else "intl"


def _sacrebleu_score(metric: Any, sums: np.ndarray) -> np.ndarray:
    def one(row: np.ndarray) -> float:
        return metric._compute_score_from_stats(row.tolist()).score if row.any() else np.nan

    return np.apply_along_axis(one, -1, sums)


def _resampled(*systems: ErrorCounts) -> np.ndarray:
    """Figures of resampled clips, [systems, resamples]: the same clips for all of them. NaN without clips."""
    if not (clips := len(systems[0])):
        return np.full((len(systems), 1), np.nan)
    random, even, step = np.random.default_rng(SEED), np.full(clips, 1 / clips), max(1, _DRAWN_AT_ONCE // clips)
    parts = []
    for first in range(0, RESAMPLES, step):
        draws = random.multinomial(clips, even, size=min(step, RESAMPLES - first))
        parts.append([counts.score(draws @ counts.rows) for counts in systems])
    return np.concatenate(parts, axis=1)


def interval(counts: ErrorCounts) -> tuple[float, float]:
    """The 95 % interval of a figure; NaN twice where no resample has one."""
    return _percentiles(_resampled(counts)[0])


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    known = values[~np.isnan(values)]
    low, high = np.percentile(known, PERCENTILES) if len(known) else (np.nan, np.nan)
    return float(low), float(high)


def paired_difference(counts: ErrorCounts, baseline: ErrorCounts) -> dict[str, float]:
    """A figure of one system less that of another on the same clips, with its 95 % interval; NaN without clips.

    ``share_worse`` is the share of resamples in which the first is worse than the second.
    """
    assert len(counts) == len(baseline), "the two systems were scored on different clips"
    mine, theirs = _resampled(counts, baseline)
    low, high = _percentiles(mine - theirs)
    worse = (mine < theirs if counts.more_is_better else mine > theirs).mean()
    return {"difference": counts.value - baseline.value, "low": low, "high": high, "share_worse": float(worse)}


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


@dataclass
class Evaluated:
    """What a model made of a sample."""

    reference: str
    language: str
    """Of the reference."""
    cross_entropy: float = 0.0
    """The sum of −ln p over the reference's tokens, in nats."""
    tokens: int = 0
    texts: dict[str, str] = field(default_factory=dict)
    """What it wrote: ``""`` with the model's own margin, ``_padded`` with 30 s."""
    skipped: Skipped | None = None
    """Why the sample cannot be read, or not be judged by."""


class Evaluator:
    """Evaluates models always alike: greedily, without timestamps, in the language that the corpus gives.

    A run's own evaluation and ``whisper-moe evaluate`` have the same cross-entropy: of the tokens that training counts, among
    all that the model could say, with the margin of silence that a clip is transcribed with.
    """

    def __init__(
        self,
        reader: ExampleReader,
        tokenizer: Tokenizer,
        generation: Mapping[str, Any],
        *,
        margin: float,
        decode: bool = False,
        padded: bool = False,
    ) -> None:
        """``margin``: seconds of silence kept after each clip. ``decode``: also write the texts down, for WER and CER;
        ``padded``: once more with every clip padded to 30 s, where that is another margin.
        """
        self._reader, self._tokenizer, self._generation, self._margin = reader, tokenizer, generation, margin
        margins = {"": margin, "_padded": FULL_WINDOW} if padded and margin < FULL_WINDOW else {"": margin}
        self._margins = margins if decode else {}

    def figures(
        self,
        model: WhisperMoEModel,
        corpora: Sequence[Corpus],
        *,
        batch_size: int,
        stop_requested: Callable[[], bool] = lambda: False,
        note: Callable[[Sequence[Skipped]], None] = lambda skipped: None,
    ) -> dict[str, float] | None:
        """``loss`` (nats a token), ``wer`` and ``cer`` (fractions) of all corpora, and of each as ``wer/name``; ``wer_padded``
        and ``cer_padded`` of clips that are padded to 30 s. None where ``stop_requested``, asked before each batch, said so.
        ``note`` is told of samples that are left out.
        """
        training, found = model.training, dict[str, list[Evaluated]]()
        model.eval()
        try:
            for corpus in corpora:
                found[corpus.name] = []
                rows = items(corpus)
                while batch := list(islice(rows, batch_size)):
                    if stop_requested():
                        return None
                    found[corpus.name] += (results := self.batch(model, batch))
                    if skipped := [each.skipped for each in results if each.skipped is not None]:
                        note(skipped)
        finally:
            model.train(training)
        parts = {name: self._sums(part) for name, part in found.items()} if len(found) > 1 else {}
        whole = self._sums([each for part in found.values() for each in part])
        return whole | {f"{key}/{name}": value for name, part in parts.items() for key, value in part.items()}

    def batch(self, model: WhisperMoEModel, rows: Sequence[Sample | Skipped]) -> list[Evaluated]:
        """Of rows whose sound fits in memory together."""
        found: list[Evaluated] = []
        read: list[tuple[Evaluated, Sample, Example]] = []
        for row in rows:
            if isinstance(row, Skipped):
                found.append(Evaluated("", "", skipped=row))
                continue
            found.append(Evaluated(row.text, row.target_language))
            try:
                read.append((found[-1], row, self._reader.read(row, self._margin)))
            except ValueError as error:  # of the sample, or of a language or task that this model cannot do
                found[-1].skipped = left_out(row, error)
        sums = cross_entropy(model, [example for _, _, example in read])
        for (each, _, _), (lost, tokens) in zip(read, sums, strict=True):
            each.cross_entropy, each.tokens = lost, tokens
        if self._margins:
            self._transcribe(model, [(each, sample) for each, sample, _ in read])
        return found

    def _transcribe(self, model: WhisperMoEModel, pairs: Sequence[tuple[Evaluated, Sample]]) -> None:
        decoder = WindowDecoder(model, self._tokenizer, self._generation)
        clips = [(sample, sample.audio.read()) for _, sample in pairs if sample.audio is not None]
        for name, margin in self._margins.items():
            for (each, _), text in zip(pairs, written(decoder, clips, margin), strict=True):
                each.texts[name] = text

    def _sums(self, found: Sequence[Evaluated]) -> dict[str, float]:
        judged = [each for each in found if each.skipped is None]
        tokens = sum(each.tokens for each in judged)
        figures = {"loss": sum(each.cross_entropy for each in judged) / tokens if tokens else float("nan")}
        references, languages = [each.reference for each in judged], [each.language for each in judged]
        for name in self._margins:
            texts = [each.texts[name] for each in judged]
            figures[f"wer{name}"] = clip_counts(references, texts, languages).value
            figures[f"cer{name}"] = character_counts(references, texts, languages).value
        if len(judged) < len(found):
            figures["left_out"] = float(len(found) - len(judged))
        return figures


def written(
    decoder: WindowDecoder, clips: Sequence[tuple[Sample, np.ndarray]], margin: float, experts: tuple[str, ...] = ()
) -> list[str]:
    """What is heard in clips of up to 30 s: greedily, without timestamps, those of one task and language decoded together.

    ``experts``: those that may answer, where there are any.
    """
    texts, tokenizer = [""] * len(clips), decoder.tokenizer
    kinds = [(sample.task, sample.language) for sample, _ in clips]
    for task, language in sorted(set(kinds)):
        own = [index for index, kind in enumerate(kinds) if kind == (task, language)]
        options = TranscribeOptions(
            task="translate" if task == "translate" else "transcribe",
            timestamps=False,
            language=language if tokenizer.is_multilingual else None,
            experts=experts,
        )
        results = decoder.decode([clips[index][1] for index in own], options, temperature=0.0, margin=margin)
        for index, result in zip(own, results, strict=True):
            texts[index] = tokenizer.decode(tokenizer.text_ids(result.hypothesis.tokens))
    return texts


@torch.inference_mode()
def cross_entropy(model: WhisperMoEModel, examples: Sequence[Example]) -> list[tuple[float, int]]:
    """For each example the sum of −ln p over its labels, in nats, and their number. Examples share packs."""
    found: dict[int, tuple[float, int]] = {}
    like = model.encoder.positions
    for group in first_fit_decreasing([example.size for example in examples]):
        (pack,) = (pack.to(like.device, like.dtype) for pack in pack_examples([examples[index] for index in group]))
        lengths = list(pack.texts.lengths)
        logits_TV = model(pack.mels, pack.tokens_T.split(lengths), valid_lengths=pack.valid_lengths).logits.float()
        lost_T = F.cross_entropy(logits_TV, pack.labels_T, ignore_index=IGNORED, reduction="none")
        for index, lost, labels in zip(group, lost_T.split(lengths), pack.labels_T.split(lengths), strict=True):
            found[index] = float(lost.sum()), int((labels != IGNORED).sum())
    return [found[index] for index in range(len(examples))]
