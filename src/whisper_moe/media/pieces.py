"""Sentences of a text; and subwords of scripts that Whisper spells in single characters: a Hindi word is five tokens to it, and
one or two of these.

A text is cut from left to right into the longest pieces that are known; what lies between them (Latin, digits) is the source's
own tokens. So nothing but the pieces themselves has to be kept, and every text comes back as it was.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby, pairwise

from whisper_moe.config_aside import TEXT
from whisper_moe.media.tokenizer import Tokenizer

_SENTENCE = re.compile(
    r"(?<=[.!?।])(?<!\b[A-Z]\.)(?<!\b(?:Mr|Ms|Dr|St|vs)\.)(?<!\bMrs\.)(?<!\b(?:e\.g|i\.e)\.)(?<!^\d\.)[\"'”\u2019)]*\s+"
)
_PLACES_TO_CUT = (re.compile(r"(?<=[,;:])\s+"), re.compile(r"\s+"))
_CONTROL = re.compile(r"<\|[^\s<|>]+\|>")


def sentences(text: str) -> list[str]:
    """A text cut behind its sentences, closing quotes with theirs. Initials, titles and the number of a list end none."""
    ends = [found.end() for found in _SENTENCE.finditer(text)]
    return [text[begin:end].strip() for begin, end in pairwise([0, *ends, len(text)])]


def shortened(sentence: str, fits: Callable[[str], bool]) -> list[str]:
    """A sentence in parts that fit: cut where a comma is nearest to its middle, else between words, else in the middle."""
    if fits(sentence):
        return [sentence] if sentence else []
    for place in _PLACES_TO_CUT:
        cuts = [found.start() for found in place.finditer(sentence)]
        if cuts:
            middle = min(cuts, key=lambda cut: abs(2 * cut - len(sentence)))
            break
    else:
        middle = len(sentence) // 2
    return [*shortened(sentence[:middle].strip(), fits), *shortened(sentence[middle:].strip(), fits)]


class Pieces:
    """A tokenizer with more tokens behind its own: control tokens, such as ``<|text|>``, and pieces of text."""

    def __init__(self, tokenizer: Tokenizer, tokens: Sequence[str], first: int) -> None:
        """``first``: the id of the first of ``tokens``."""
        self.tokenizer, self.tokens, self.first = tokenizer, tokens, first
        self.ids = {token: first + place for place, token in enumerate(tokens)}
        self.control = {id for token, id in self.ids.items() if _CONTROL.fullmatch(token)}
        """Ids that stand for no text."""
        known = sorted((token for token, id in self.ids.items() if id not in self.control), key=len, reverse=True)
        self._known = re.compile(f"({'|'.join(map(re.escape, known))})") if known else re.compile("((?!))")

    def source(self, text: str, language: str) -> list[int]:
        """What the encoder reads: language, text, end."""
        return [self.tokenizer.language_id(language), *self.encode(f" {text.strip()}"), self.tokenizer.eot]

    def opening(self, language: str, task: str = TEXT) -> list[int]:
        """What the decoder begins with, to write in this language. ``task``: the token of what was read, a text or signs."""
        tokenizer = self.tokenizer
        return [tokenizer.sot, tokenizer.language_id(language), self.ids[task], tokenizer.no_timestamps]

    def encode(self, text: str) -> list[int]:
        """Text to ids; control tokens are never read from it. Raises ``ValueError`` as :meth:`Tokenizer.encode` does."""
        ids: list[int] = []
        for place, part in enumerate(self._known.split(text)):
            ids += [self.ids[part]] if place % 2 else self.tokenizer.encode(part)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text, without control tokens."""
        said: list[str] = []
        for further, run in groupby(ids, lambda id: id >= self.first):
            own = list(run)
            said += (
                [self.tokens[id - self.first] for id in own if id not in self.control]
                if further
                else [self.tokenizer.decode(own)]
            )
        return "".join(said)
