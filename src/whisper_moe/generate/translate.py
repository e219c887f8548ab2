"""Texts to texts in another language: sentences, their tokens in packs, the encoder once, beams.

A sentence is translated as it would be alone, whatever it shares a pack with.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from whisper_moe.generate.options import SearchOptions
from whisper_moe.generate.search import Hypothesis, Rules, search
from whisper_moe.media.normalize import letters_in_script
from whisper_moe.media.pieces import Pieces, sentences
from whisper_moe.media.tokenizer import Tokenizer
from whisper_moe.model.model import DecoderState, WhisperMoEModel
from whisper_moe.model.senses import Senses
from whisper_moe.packing import Layout, first_fit_decreasing

BEAMS = 4
LONGEST = 120
"""Tokens of a source that are translated as one; longer sentences are cut at a comma, or between words."""
TOGETHER = 64
"""Sentences that are decoded side by side: a pack may hold hundreds, and each has four beams."""
MOST = 250_000
"""Characters of one text."""
_PLACES_TO_CUT = (re.compile(r"(?<=[,;:])\s+"), re.compile(r"\s+"))


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
    """A model that reads texts, with the senses that it needs attached."""

    def __init__(self, model: WhisperMoEModel, senses: Senses, tokenizer: Tokenizer) -> None:
        self._model, self._senses, self._tokenizer = model, senses, tokenizer
        self.directions = senses.config.directions
        self._pieces = Pieces(tokenizer, senses.config.tokens, model.config.vocab_size)
        times = range(tokenizer.timestamp_begin, tokenizer.timestamp_end + 1)
        never = {*tokenizer.suppressed(()), *tokenizer.languages.values(), *times, *self._pieces.control}
        self._rules = Rules(tuple(sorted({*never, tokenizer.no_timestamps})), (tokenizer.eot,))

    def translate(
        self, text: str, *, source: str | None = None, target: str | None = None, beams: int = BEAMS
    ) -> Translation:
        """``text`` in ``target``. Languages by code; by default the source is that of most letters, and the target the only one.

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
        found = dict(zip(wanted, self._written(wanted, source, target, beams), strict=True))
        said = [" ".join(found[piece][0] if piece in found else piece for piece in line) for line in lines]
        sentences = tuple((piece, *found[piece]) for line in lines for piece in line if piece in found)
        return Translation("\n".join(said), source, target, sentences)

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
        return [piece for sentence in sentences(line) for piece in self._short(sentence, language)]

    def _short(self, sentence: str, language: str) -> list[str]:
        if len(self._pieces.source(sentence, language)) <= LONGEST:
            return [sentence] if sentence else []
        for place in _PLACES_TO_CUT:
            cuts = [found.start() for found in place.finditer(sentence)]
            if cuts:
                middle = min(cuts, key=lambda cut: abs(2 * cut - len(sentence)))
                break
        else:
            middle = len(sentence) // 2
        return [*self._short(sentence[:middle].strip(), language), *self._short(sentence[middle:].strip(), language)]

    @torch.inference_mode()
    def _written(self, texts: Sequence[str], source: str, target: str, beams: int) -> list[tuple[str, float]]:
        """Each text's translation, and how sure it is."""
        ids = [self._pieces.source(text, source) for text in texts]
        found: dict[int, tuple[str, float]] = {}
        packs = first_fit_decreasing(list(map(len, ids)))
        for pack in (whole[i : i + TOGETHER] for whole in packs for i in range(0, len(whole), TOGETHER)):
            for index, best in zip(pack, self._decoded([ids[i] for i in pack], target, beams), strict=True):
                found[index] = self._pieces.decode(best.tokens).strip(), best.avg_logprob
        return [found[index] for index in range(len(texts))]

    def _decoded(self, sources: Sequence[list[int]], target: str, beams: int) -> list[Hypothesis]:
        decoder, device = self._model.decoder, self._model.encoder.positions.device
        texts = [self._senses.embedded(torch.tensor(ids, device=device), decoder) for ids in sources]
        state = decoder.start(self._model.encoder(texts), beams)
        prompt = torch.tensor([self._pieces.prompt(target)] * (len(texts) * beams))
        logits, state = self._step(prompt, state)
        room = self._model.config.max_target_positions - prompt.shape[1]
        limits = [min(room, 2 * len(ids) + 32) for ids in sources]
        options = SearchOptions(beams=beams)
        return search(self._step, logits, state, self._rules, options, end_of_text=self._tokenizer.eot, limits=limits)

    def _step(self, tokens_Rn: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """As :mod:`whisper_moe.generate.search` asks for it."""
        decoder, rows = self._model.decoder, Layout([1] * len(tokens_Rn))
        tokens_T = tokens_Rn.flatten().to(self._model.encoder.positions.device)
        embedded_RnD = self._senses.rows(tokens_T, decoder).unflatten(0, tokens_Rn.shape)
        last_RD = decoder.extend(embedded_RnD, state)[:, -1]
        return self._senses.logits(decoder.logits(last_RD, state.routing, rows), last_RD).float(), state
