"""Texts to texts in another language, sentence by sentence (:mod:`whisper_moe.generate.senses`)."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import Any

import torch

from whisper_moe.generate.senses import Asked, Job, SensesDecoder, Written
from whisper_moe.media.normalize import letters_in_script
from whisper_moe.media.pieces import sentences, shortened

LONGEST = 120
"""Tokens of a source that are translated as one; longer sentences are cut at a comma, or between words."""
MOST = 250_000
"""Characters of one text."""


@dataclass(frozen=True)
class Translation:
    """What a text says in another language."""

    text: str
    """Line by line as the source."""
    source: str
    target: str
    sentences: tuple[tuple[str, str, float], ...]
    """Of each piece: the source, the translation, and the mean log-probability of its tokens."""

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        pairs = [{"source": a, "text": b, "avg_logprob": round(sure, 4)} for a, b, sure in self.sentences]
        return {"source": self.source, "target": self.target, "text": self.text, "sentences": pairs}


class Translator:
    """Translates, with a model that reads texts."""

    def __init__(self, decoder: SensesDecoder) -> None:
        """Raises ``ValueError`` for a model that reads none."""
        self._decoder, self.directions = decoder, decoder.senses.config.directions
        if not self.directions:
            raise ValueError("this model reads no texts: it has no part for that")

    def job(self, text: str, *, source: str | None = None, target: str | None = None) -> Job:
        """The sentences of a text, and how their translations become its own. Languages by code; by default the source is that of
        most letters, and the target the only one.

        Raises ``ValueError`` for a direction that the model is not for, for a text without a word, and for one of more than
        :data:`MOST` characters.
        """
        if len(text) > MOST:
            raise ValueError(
                f"the text has {len(text):,} characters; at most {MOST:,} are translated at a time: cut it"
            )
        source, target = self._direction(text, source, target)
        lines = [self._cut(" ".join(unicodedata.normalize("NFC", line).split()), source) for line in text.splitlines()]
        wanted = [*dict.fromkeys(piece for line in lines for piece in line if any(map(str.isalnum, piece)))]
        if not wanted:
            raise ValueError(f"nothing in it can be translated: {text[:40]!r}")

        def finish(written: list[Written]) -> Translation:
            found = dict(zip(wanted, written, strict=True))
            said = [" ".join(found[piece].text if piece in found else piece for piece in line) for line in lines]
            sentences = tuple(
                (piece, found[piece].text, found[piece].avg_logprob)
                for line in lines
                for piece in line
                if piece in found
            )
            return Translation("\n".join(said), source, target, sentences)

        return Job([self._asked(piece, source, target) for piece in wanted], finish)

    def _direction(self, text: str, source: str | None, target: str | None) -> tuple[str, str]:
        source = source or max((code for code, _ in self.directions), key=lambda code: letters_in_script(text, code)[0])
        fit = [pair for pair in self.directions if pair[0] == source and target in (None, pair[1])]
        if len(fit) != 1:
            known = ", ".join(" to ".join(pair) for pair in self.directions)
            said = f"a text in {source!r} into {target!r}" if target else f"a text in {source!r}: no target is said"
            raise ValueError(f"{said}; the model translates {known}")
        return fit[0]

    def _cut(self, line: str, language: str) -> list[str]:
        """Sentences, none longer than the model is good at."""
        fits = lambda part: len(self._decoder.pieces.source(part, language)) <= LONGEST  # noqa: E731
        return [piece for sentence in sentences(line) for piece in shortened(sentence, fits)]

    def _asked(self, text: str, source: str, target: str) -> Asked:
        """The segment of a sentence."""
        ids = self._decoder.pieces.source(text, source)
        return Asked(torch.tensor(ids), self._decoder.pieces.opening(target), 2 * len(ids) + 32)
