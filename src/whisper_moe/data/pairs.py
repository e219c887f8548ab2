"""A text and its translation become what the encoder reads and what the decoder is to say."""

from __future__ import annotations

import unicodedata
from typing import NamedTuple

from whisper_moe.config import ModelConfig
from whisper_moe.data.sample import DataError, Sample, TooLong
from whisper_moe.media.pieces import Pieces
from whisper_moe.media.tokenizer import Tokenizer


class Pair(NamedTuple):
    """Token ids."""

    source: list[int]
    prompt: list[int]
    text: list[int]
    """Without the end of text."""


class PairReader:
    """Samples of the task ``translate-text``, for a model that reads texts."""

    def __init__(self, tokenizer: Tokenizer, model: ModelConfig) -> None:
        assert model.senses is not None
        self._pieces = Pieces(tokenizer, model.senses.tokens, model.vocab_size)
        self._directions = model.senses.directions
        self._limits = model.max_source_positions, model.max_target_positions

    def read(self, sample: Sample) -> Pair:
        """Texts in NFC, with single spaces.

        Raises :class:`DataError` for one that is none, :class:`TooLong` for one over the model's positions, and ``ValueError``
        for a direction that the model is not for.
        """
        direction = sample.language, sample.target_language
        if direction not in self._directions:
            known = ", ".join(">".join(each) for each in self._directions)
            raise ValueError(f"{sample.id}: the model translates {known}, not {'>'.join(direction)}")
        texts = [
            " ".join(unicodedata.normalize("NFC", each or "").split()) for each in (sample.source_text, sample.text)
        ]
        if not all(texts):
            raise DataError(sample.id, "it has no text", column="source_text" if texts[1] else "text")
        try:
            source, text = self._pieces.source(texts[0], sample.language), self._pieces.encode(f" {texts[1]}")
        except ValueError as error:
            raise DataError(sample.id, str(error), column="text") from error
        pair = Pair(source, self._pieces.prompt(sample.target_language), text)
        sizes = (len(source), len(pair.prompt) + len(text))
        for name, length, most in zip(("source", "text"), sizes, self._limits, strict=True):
            if length > most:
                raise TooLong(sample.id, f"its {name} has {length} tokens; there are {most} positions")
        return pair
