"""A text and its translation become what the encoder reads and what the decoder is to say."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from typing import TYPE_CHECKING

from whisper_moe.config import ModelConfig
from whisper_moe.data.sample import DataError, Sample, TooLong
from whisper_moe.media.tokenizer import Pieces, Tokenizer

if TYPE_CHECKING:
    from torch import Tensor


class PairReader:
    """Samples of the task ``translate-text``, for a model that reads texts."""

    def __init__(self, tokenizer: Tokenizer, model: ModelConfig) -> None:
        assert model.senses is not None
        self._pieces = Pieces(tokenizer, model.senses.tokens, model.vocab_size)
        self._directions = model.senses.directions
        self._limits = model.max_source_positions, model.max_target_positions

    def tokens(self, sample: Sample) -> tuple[list[int], list[int]]:
        """The prompt, and the tokens of the text, in NFC with single spaces.

        Raises :class:`DataError` for one that is none, :class:`TooLong` for one over the model's positions, and ``ValueError``
        for a direction that the model is not for.
        """
        direction = sample.language, sample.target_language
        if direction not in self._directions:
            known = ", ".join(">".join(each) for each in self._directions)
            raise ValueError(f"{sample.id}: the model translates {known}, not {'>'.join(direction)}")
        source, prompt = self._source(sample), self._pieces.opening(sample.target_language)
        text = encoded(sample, sample.text, "text", lambda said: self._pieces.encode(f" {said}"))
        for name, length, most in zip(
            ("source", "text"), (len(source), len(prompt) + len(text)), self._limits, strict=True
        ):
            if length > most:
                raise TooLong(sample.id, f"its {name} has {length} tokens; there are {most} positions")
        return prompt, text

    def size(self, sample: Sample) -> int:
        """Tokens that the encoder reads."""
        return len(self._source(sample))

    def read(self, sample: Sample, draw: float) -> Tensor:
        """What the encoder reads, int64 [n]."""
        import torch

        return torch.tensor(self._source(sample))

    def _source(self, sample: Sample) -> list[int]:
        return encoded(
            sample, sample.source_text, "source_text", lambda said: self._pieces.source(said, sample.language)
        )


def encoded(sample: Sample, text: str | None, column: str, encode: Callable[[str], list[int]]) -> list[int]:
    """Tokens of a text in NFC, with single spaces. Raises :class:`DataError` for one that is none."""
    said = " ".join(unicodedata.normalize("NFC", text or "").split())
    if not said:
        raise DataError(sample.id, "it has no text", column=column)
    try:
        return encode(said)
    except ValueError as error:
        raise DataError(sample.id, str(error), column=column) from error
