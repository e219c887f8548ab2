"""Texts and films to texts: packs, the encoder once, beams. What shares a pack says what each would say alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from whisper_moe.generate.options import SearchOptions
from whisper_moe.generate.search import Rules, search
from whisper_moe.media.pieces import Pieces
from whisper_moe.media.tokenizer import Tokenizer
from whisper_moe.model.model import WhisperMoEModel
from whisper_moe.model.senses import Embedded, Senses
from whisper_moe.model.state import DecoderState, Encoded
from whisper_moe.packing import Layout, first_fit_decreasing

BEAMS = 4
TOGETHER = 64
"""Segments that are decoded side by side: a pack may hold hundreds, and each has four beams."""


class Asked(NamedTuple):
    """A segment, and what is to be written of it."""

    part: Tensor
    """A text's tokens [n], or a film uint8 [t, h, w, P]."""
    prompt: list[int]
    limit: int
    """Tokens that are written at most."""

    @property
    def size(self) -> int:
        """Positions of the encoder."""
        return self.part.shape[:3].numel()


class Written(NamedTuple):
    text: str
    avg_logprob: float
    """Of its tokens."""


class Job(NamedTuple):
    """Segments, and what is made of what is written of them."""

    asked: list[Asked]
    finish: Callable[[list[Written]], Any]


class SensesDecoder:
    """A model with the senses beside hearing attached, ready to write what segments of them say."""

    def __init__(self, model: WhisperMoEModel, senses: Senses, tokenizer: Tokenizer) -> None:
        self.model, self.senses, self.tokenizer = model, senses, tokenizer
        self.pieces = Pieces(tokenizer, senses.config.tokens, model.config.vocab_size)
        times = range(tokenizer.timestamp_begin, tokenizer.timestamp_end + 1)
        never = {*tokenizer.suppressed(()), *tokenizer.languages.values(), *times, *self.pieces.control}
        self._rules = Rules(tuple(sorted({*never, tokenizer.no_timestamps})), (tokenizer.eot,))

    def run(self, jobs: Sequence[Job]) -> list[Any]:
        """What becomes of each job; the segments of all share packs."""
        written = iter(self.write([each for job in jobs for each in job.asked]))
        return [job.finish([*islice(written, len(job.asked))]) for job in jobs]

    @torch.inference_mode()
    def write(self, asked: Sequence[Asked]) -> list[Written]:
        """What each segment says."""
        found: dict[int, Written] = {}
        packs = first_fit_decreasing([each.size for each in asked])
        for pack in (whole[i : i + TOGETHER] for whole in packs for i in range(0, len(whole), TOGETHER)):
            own = [asked[i] for i in pack]
            encoded = self.model.encoder([self.embedded(each) for each in own])
            found |= zip(pack, self.decoded(encoded, own), strict=True)
        return [found[index] for index in range(len(asked))]

    def embedded(self, asked: Asked) -> Embedded:
        part = self.senses.embedded(asked.part.to(self.model.encoder.positions.device), self.model)
        assert isinstance(part, Embedded)
        return part

    @torch.inference_mode()
    def decoded(self, encoded: Encoded, asked: Sequence[Asked]) -> list[Written]:
        """What segments say that are encoded already."""
        state = self.model.decoder.start(encoded, BEAMS)
        prompts = torch.tensor([each.prompt for each in asked]).repeat_interleave(BEAMS, 0)
        logits, state = self._step(prompts, state)
        room = self.model.config.max_target_positions - prompts.shape[1]
        limits = [min(room, each.limit) for each in asked]
        options, end = SearchOptions(beams=BEAMS), self.tokenizer.eot
        best = search(self._step, logits, state, self._rules, options, end_of_text=end, limits=limits)
        return [Written(self.pieces.decode(each.tokens).strip(), each.avg_logprob) for each in best]

    def _step(self, tokens_Rn: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """As :mod:`whisper_moe.generate.search` asks for it."""
        decoder, rows = self.model.decoder, Layout([1] * len(tokens_Rn))
        tokens_T = tokens_Rn.flatten().to(self.model.encoder.positions.device)
        embedded_RnD = self.senses.rows(tokens_T, decoder).unflatten(0, tokens_Rn.shape)
        last_RD = decoder.extend(embedded_RnD, state)[:, -1]
        return self.senses.logits(decoder.logits(last_RD, state.routing, rows), last_RD).float(), state
