"""Captions while somebody speaks: the growing utterance is decoded again and again, and what two decodings agree on is final
(LocalAgreement-2: Macháček et al. 2023, arXiv 2307.14743, section 3). A pause ends the utterance.

A short window costs only its own length here, which is what makes this cheap.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from whisper_moe.config import SAMPLE_RATE
from whisper_moe.generate.result import Transcription
from whisper_moe.media.windows import speech_spans

STEP = 0.6
"""Seconds of new sound that are worth another look."""
PAUSE = 0.7
"""Seconds without speech that end an utterance."""
LONGEST = 14.0
"""Seconds of sound that are decoded at most: then what is final is cut off."""
REPEATED = 5
"""Words that a decoding may say again of what is final, where it was cut in the middle of a word."""


class Word(NamedTuple):
    text: str
    start: float
    """Seconds from the start of the stream."""
    end: float

    @property
    def said(self) -> str:
        """What two decodings have to agree on."""
        return re.sub(r"\W", "", self.text).casefold()


@dataclass
class Agreement:
    """What is final, and what one decoding has said beyond that."""

    final: list[Word] = field(default_factory=list)
    open: list[Word] = field(default_factory=list)

    def take(self, words: list[Word]) -> list[Word]:
        """The words that are final now: those that this decoding and the one before say alike."""
        fresh = self._beyond(words)
        agreed = 0
        while agreed < min(len(fresh), len(self.open)) and fresh[agreed].said == self.open[agreed].said:
            agreed += 1
        self.final += fresh[:agreed]
        self.open = fresh[agreed:]
        return fresh[:agreed]

    def close(self, words: list[Word]) -> list[Word]:
        """The rest of an utterance that has ended, as the last decoding has it."""
        fresh = self._beyond(words)
        self.final, self.open = [], []
        return fresh

    def _beyond(self, words: list[Word]) -> list[Word]:
        """Without what is final already."""
        if not self.final:
            return words
        until = self.final[-1].end
        fresh = [word for word in words if word.end > until + 0.1 or word.start > until - 0.1]
        for count in range(min(REPEATED, len(fresh), len(self.final)), 0, -1):
            tail = [word.said for word in self.final[-count:]]
            if tail == [word.said for word in fresh[:count]] and fresh[0].start - until < 1.0:
                return fresh[count:]
        return fresh


class Caption(NamedTuple):
    """What can be said now."""

    utterance: int
    final: str
    """What is new and will not change."""
    open: str
    """What comes after it, as far as one decoding says."""
    ended: bool
    """Whether the utterance ends with it."""


Hear = Callable[[np.ndarray], Awaitable[Transcription]]
"""A transcript with word times of float32 samples at 16 kHz."""


class Live:
    """A stream of sound on its way to captions."""

    def __init__(self, hear: Hear) -> None:
        self._hear, self._agreement = hear, Agreement()
        self._samples, self._begin, self._looked = np.zeros(0, np.float32), 0, 0
        self.utterance = 0

    @property
    def waiting(self) -> bool:
        """Whether there is enough new sound for another look."""
        return len(self._samples) - self._looked >= STEP * SAMPLE_RATE

    @property
    def seconds(self) -> float:
        """Of sound that is kept."""
        return len(self._samples) / SAMPLE_RATE

    def append(self, samples: np.ndarray) -> None:
        self._samples = np.concatenate((self._samples, samples))

    async def look(self, *, end: bool = False) -> AsyncIterator[Caption]:
        """What can be said of the sound so far. ``end``: nothing more comes of this utterance."""
        samples = self._samples
        spans = speech_spans(samples) if len(samples) else []
        if not spans:
            if self._agreement.final or self._agreement.open:
                yield self._ended([])
            self._cut(max(0, len(samples) - round(PAUSE * SAMPLE_RATE)))
            return
        silence = len(samples) - spans[-1][1]
        ends = end or silence >= PAUSE * SAMPLE_RATE
        self._looked = len(samples)
        words = self._words(await self._hear(samples))
        if ends:
            yield self._ended(words)
            self._cut(len(samples) if end else spans[-1][1])
            return
        final = self._agreement.take(words)
        yield Caption(self.utterance, _text(final), _text(self._agreement.open), False)
        if len(samples) > LONGEST * SAMPLE_RATE and self._agreement.final:
            self._cut(round(self._agreement.final[-1].end * SAMPLE_RATE) - self._begin)

    def _ended(self, words: list[Word]) -> Caption:
        caption = Caption(self.utterance, _text(self._agreement.close(words)), "", True)
        self.utterance += 1
        return caption

    def _words(self, heard: Transcription) -> list[Word]:
        offset = self._begin / SAMPLE_RATE
        words = [word for segment in heard.segments for word in segment.words or ()]
        return [Word(word.word, word.start + offset, word.end + offset) for word in words]

    def _cut(self, samples: int) -> None:
        """Forget the first of the sound."""
        self._samples, self._begin = self._samples[samples:], self._begin + samples
        self._looked = max(0, self._looked - samples)


def _text(words: list[Word]) -> str:
    return "".join(word.text for word in words)
