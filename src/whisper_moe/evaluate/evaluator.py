"""How well a model says what it should: the cross-entropy of the references, and the errors of what it says itself.

A run's own evaluation and ``whisper-moe evaluate`` have the same cross-entropy: of the tokens that training counts, among all
that the model could say, with the margin of silence that a clip is transcribed with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F

from whisper_moe.config import FULL_WINDOW
from whisper_moe.data.examples import IGNORED, Example, ExampleReader, pack_examples
from whisper_moe.data.sample import AnyCorpus, Sample, Skipped, items, left_out
from whisper_moe.generate.decode import WindowDecoder
from whisper_moe.generate.options import TranscribeOptions
from whisper_moe.media.tokenizer import Tokenizer
from whisper_moe.model.model import WhisperMoEModel
from whisper_moe.packing import first_fit_decreasing


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
    """Evaluates models always alike: greedily, without timestamps, in the language that the corpus gives."""

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
        corpora: Sequence[AnyCorpus],
        *,
        batch_size: int,
        limit: int | None = None,
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
                rows = islice(items(corpus), limit)
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
        """Clips of one task and language are decoded together."""
        decoder = WindowDecoder(model, self._tokenizer, self._generation)
        for task, language in sorted({(sample.task, sample.language) for _, sample in pairs}):
            chosen = [(each, s) for each, s in pairs if (s.task, s.language) == (task, language)]
            clips = [sample.audio.read() for _, sample in chosen if sample.audio is not None]
            options = TranscribeOptions(
                task="translate" if task == "translate" else "transcribe",
                timestamps=False,
                language=language if self._tokenizer.is_multilingual else None,
            )
            for name, margin in self._margins.items():
                results = decoder.decode(clips, options, temperature=0.0, margin=margin)
                for (each, _), result in zip(chosen, results, strict=True):
                    each.texts[name] = self._tokenizer.decode(self._tokenizer.text_ids(result.hypothesis.tokens))

    def _sums(self, found: Sequence[Evaluated]) -> dict[str, float]:
        from whisper_moe.evaluate.metrics import character_counts, clip_counts

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


@torch.inference_mode()
def cross_entropy(model: WhisperMoEModel, examples: Sequence[Example]) -> list[tuple[float, int]]:
    """For each example the sum of −ln p over its labels, in nats, and their number. Examples share packs."""
    found: dict[int, tuple[float, int]] = {}
    like = model.encoder.positions
    for group in first_fit_decreasing([example.size for example in examples]):
        (pack,) = (pack.to(like.device, like.dtype) for pack in pack_examples([examples[index] for index in group]))
        lengths = list(pack.texts.lengths)
        logits_TV = model(pack.mels, pack.tokens_T.split(lengths), valid_lengths=pack.valid_lengths).float()
        lost_T = F.cross_entropy(logits_TV, pack.labels_T, ignore_index=IGNORED, reduction="none")
        for index, lost, labels in zip(group, lost_T.split(lengths), pack.labels_T.split(lengths), strict=True):
            found[index] = float(lost.sum()), int((labels != IGNORED).sum())
    return [found[index] for index in range(len(examples))]
