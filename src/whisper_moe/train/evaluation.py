"""How a model in training is judged: by the cross-entropy of the texts it should say, and by the texts that it says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from whisper_moe.config import FULL_WINDOW
from whisper_moe.data.examples import Example, ExampleReader, pack_examples
from whisper_moe.data.sample import AnyCorpus, Sample, Skipped, left_out
from whisper_moe.generate.decode import WindowDecoder
from whisper_moe.generate.options import TranscribeOptions
from whisper_moe.media.tokenizer import Tokenizer
from whisper_moe.model.model import WhisperMoEModel
from whisper_moe.train.losses import IGNORED, cross_entropy, run_packs


@dataclass
class Judged:
    """Sums over the samples of a corpus."""

    cross_entropy: float = 0.0
    tokens: int = 0
    left_out: int = 0
    references: list[str] = field(default_factory=list)
    languages: list[str] = field(default_factory=list)
    texts: dict[str, list[str]] = field(default_factory=dict)
    """Of each way of listening: ``""`` for the model's own margin, ``_padded``."""


class _Stopped(Exception):
    """An evaluation is not to go on."""


class Judge:
    """Judges a model on corpora, always alike: greedily, without timestamps, in the language that the corpus gives."""

    def __init__(
        self, corpora: Sequence[AnyCorpus], reader: ExampleReader, tokenizer: Tokenizer, generation: Mapping[str, Any], *,
        margin: float, batch_size: int, limit: int | None, decode: bool, padded: bool = False,
        note: Callable[[Sequence[Skipped]], None] = lambda skipped: None,
    ) -> None:  # fmt: skip
        """``margin``: seconds of silence kept after each clip. ``decode``: also write the texts down, for WER and CER.
        ``padded``: once more with every clip padded to 30 s, where that is another margin. ``note`` is told of samples that
        are left out.
        """
        self._corpora, self._reader, self._tokenizer, self._generation = corpora, reader, tokenizer, generation
        self._margin, self._batch, self._limit, self._note = margin, batch_size, limit, note
        margins = {"": margin, "_padded": FULL_WINDOW} if padded and margin < FULL_WINDOW else {"": margin}
        self._margins: dict[str, float] = margins if decode else {}

    def __call__(
        self, model: WhisperMoEModel, stop_requested: Callable[[], bool] = lambda: False
    ) -> dict[str, float] | None:
        """``loss`` (nats a token), ``wer`` and ``cer`` (fractions) of all corpora, and of each as ``wer/name``; ``wer_padded``
        and ``cer_padded`` of clips that are padded to 30 s. None where ``stop_requested``, asked before each batch, said so."""
        training = model.training
        model.eval()
        try:
            found = {corpus.name: self._judge(model, corpus, stop_requested) for corpus in self._corpora}
        except _Stopped:
            return None
        finally:
            model.train(training)
        metrics: dict[str, float] = {}
        for name, judged in found.items() if len(found) > 1 else ():
            metrics |= {f"{key}/{name}": value for key, value in self._figures([judged]).items()}
        return self._figures(list(found.values())) | metrics

    def _judge(self, model: WhisperMoEModel, corpus: AnyCorpus, stop_requested: Callable[[], bool]) -> Judged:
        judged = Judged()
        device = next(model.parameters()).device
        decoder = WindowDecoder(model, self._tokenizer, self._generation)
        for batch in self._batches(corpus, judged):
            if stop_requested():
                raise _Stopped
            samples, clips, examples = zip(*batch, strict=True)
            with torch.inference_mode():
                for pack in pack_examples(examples):
                    pack = pack.to(device)
                    judged.cross_entropy += float(cross_entropy(run_packs(model, [pack]).logits, pack.labels_T))
                    judged.tokens += int((pack.labels_T != IGNORED).sum())
            if self._margins:
                self._transcribe(decoder, samples, clips, judged)
        return judged

    def _batches(
        self, corpus: AnyCorpus, judged: Judged
    ) -> Iterator[list[tuple[Sample, NDArray[np.float32], Example]]]:
        samples = iter(self._readable(corpus, judged))
        while batch := list(islice(samples, self._batch)):
            yield batch

    def _readable(self, corpus: AnyCorpus, judged: Judged) -> Iterator[tuple[Sample, NDArray[np.float32], Example]]:
        """Samples with their sound; what cannot be read or judged is left out and counted."""
        samples, number = iter(corpus), 0
        while self._limit is None or number < self._limit:
            number += 1
            named: Sample | str = corpus.name
            try:
                named = sample = next(samples)
                example = self._reader.read(sample, self._margin)
                assert sample.audio is not None  # else there was no example
                sound = sample.audio.read()
            except StopIteration:
                return
            except (
                ValueError
            ) as error:  # of the sample, or of a language or task that this model has no token or input for
                judged.left_out += 1
                self._note([left_out(named, error)])
                continue
            yield sample, sound, example

    def _transcribe(
        self, decoder: WindowDecoder, samples: Sequence[Sample], clips: Sequence[NDArray[np.float32]], judged: Judged
    ) -> None:
        """Clips of one task and language are decoded together."""
        kinds = sorted({(sample.task, sample.language) for sample in samples})
        for task, language in kinds:
            chosen = [i for i, sample in enumerate(samples) if (sample.task, sample.language) == (task, language)]
            multilingual = self._tokenizer.is_multilingual
            options = TranscribeOptions(
                task="translate" if task == "translate" else "transcribe", timestamps=False,
                language=language if multilingual else None,
            )  # fmt: skip
            judged.references += [samples[i].text for i in chosen]
            judged.languages += [samples[i].target_language for i in chosen]
            for name, margin in self._margins.items():
                takes = decoder.decode([clips[i] for i in chosen], options, temperature=0.0, margin=margin)
                ids = (self._tokenizer.text_ids(take.hypothesis.tokens) for take in takes)
                judged.texts.setdefault(name, []).extend(map(self._tokenizer.decode, ids))

    def _figures(self, judged: Sequence[Judged]) -> dict[str, float]:
        tokens = sum(part.tokens for part in judged)
        figures = {"loss": sum(part.cross_entropy for part in judged) / tokens if tokens else float("nan")}
        for name in self._margins:
            from whisper_moe.evaluate.metrics import character_counts, clip_counts

            references = [text for part in judged for text in part.references]
            texts = [text for part in judged for text in part.texts.get(name, ())]
            languages = [code for part in judged for code in part.languages]
            figures[f"wer{name}"] = clip_counts(references, texts, languages).value
            figures[f"cer{name}"] = character_counts(references, texts, languages).value
        if left_out := sum(part.left_out for part in judged):
            figures["left_out"] = float(left_out)
        return figures
