"""Whole models as experts: the router picks two, and the probabilities of the next token are mixed by their gates.

Where the second gate is under the threshold the first is exactly 1: that expert alone runs, its logits pass untouched, and it
decodes by its own generation config. Clips of one choice are decoded together. *None* is the base.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from whisper_moe.generate.align import WordTiming
from whisper_moe.generate.decode import DecodingResult, Opened, WindowDecoder, told, unheard
from whisper_moe.generate.options import TranscribeOptions
from whisper_moe.media.tokenizer import Tokenizer
from whisper_moe.model.block import Carry, DecoderState, Encoded
from whisper_moe.model.router import NONE, Routing
from whisper_moe.weights.tokens import UNTIMED_EXPERTS

_SENTENCE_ENDS = (*".?!।॥؟。？！", "\u06d4")  # the last is Urdu's full stop


class Mixture(WindowDecoder):
    """The base, whose encoder the router reads, and experts that are fetched when they are needed."""

    def __init__(self, base: WindowDecoder, experts: Sequence[Callable[[], WindowDecoder]]) -> None:
        super().__init__(base.model, base.tokenizer, base.generation)
        assert base.model.config.moe is not None
        self._base, self._each, self._threshold = base, experts, base.model.config.moe.gate_threshold
        base.chooses = False
        self._untimed = [name in base.generation.get(UNTIMED_EXPERTS, ()) for name in base.model.config.moe.names]

    def open(
        self,
        clips: Sequence[np.ndarray],
        options: TranscribeOptions,
        *,
        hints: Sequence[str | None] | None = None,
        routing: Routing | None = None,
        **how: Any,
    ) -> list[Opened]:
        """As :meth:`WindowDecoder.open`, each clip by its own experts: those of one choice together."""
        routing = routing or self._sure(self.choose(clips, self.allowed_experts(options)))
        stated = self.stated_languages(routing, len(clips), options)
        languages, free = told(stated, hints), replace(options, experts=(), exclude=())
        parts: list[Opened] = []
        for choice in dict.fromkeys(routing.choices):
            own = [index for index, each in enumerate(routing.choices) if each == choice]
            untimed = free.timestamps and choice[0] != NONE and self._untimed[choice[0]]
            asked = replace(free, timestamps=False, word_timestamps=False) if untimed else free
            rows = routing.rows(torch.tensor(own, device=routing.gates.device))
            decoder, heard = self._decoder(choice, rows.gates), [clips[i] for i in own]
            (opened,) = decoder.open(heard, asked, hints=[languages[i] for i in own], **how)
            drafts = [unheard(draft, stated[i]) for i, draft in zip(own, opened.drafts, strict=True)]
            opened.drafts = self.with_choices(drafts, rows)
            opened.places = own
            if untimed:
                opened.finish = partial(self._retimed, heard, free)
            parts.append(opened)
        return parts

    def _retimed(
        self,
        heard: Sequence[np.ndarray],
        options: TranscribeOptions,
        places: Sequence[int],
        results: Sequence[DecodingResult],
    ) -> list[DecodingResult]:
        """The same texts with the times at which the base hears their words: a cue for each sentence."""
        clips = [heard[place] for place in places]
        encoded, samples = self._base.encode(clips, options.margin), list(map(len, clips))
        worded, languages = replace(options, word_timestamps=True), [result.language for result in results]
        texts = [result.hypothesis for result in results]
        found = []
        for result, words in zip(results, self._base.timings(encoded, samples, texts, languages, worded), strict=True):
            told, tokens = result.hypothesis, tuple(cued(words or (), self.tokenizer))
            text = replace(told, tokens=tokens, sum_logprob=told.avg_logprob * (len(tokens) + 1)) if tokens else told
            found.append(replace(result, hypothesis=text, timings=words if options.word_timestamps else None))
        return found

    def _sure(self, routing: Routing) -> Routing:
        """A second gate under the threshold gives its share to the first: (e, e) is e alone, as in a model of one expert."""
        experts, gates = (part[:, [0, -1]] for part in (routing.experts, routing.gates))
        alone = (gates[:, 1] < self._threshold) | (experts[:, 0] == experts[:, 1])
        experts[alone, 1] = experts[alone, 0]
        gates[alone] = gates.new_tensor([1.0, 0.0])
        return Routing(experts, gates, routing.logits)

    def _decoder(self, choice: tuple[int, ...], gates_S2: Tensor) -> WindowDecoder:
        first, second = (self._base if expert == NONE else self._each[expert]() for expert in choice)
        return first if first is second else Pair(first, second, gates_S2)


def cued(words: Sequence[WordTiming], tokenizer: Tokenizer) -> Iterator[int]:
    """The words' tokens, each sentence between two timestamps."""
    begins = True
    for word, after in zip(words, [*words[1:], None], strict=True):
        if begins:
            yield tokenizer.timestamp(word.start)
        yield from word.tokens
        begins = after is None or word.word.rstrip().endswith(_SENTENCE_ENDS)
        if begins:
            yield tokenizer.timestamp(word.end)


@dataclass
class PairState:
    """What two models remember of the same rows, and the gates of each segment, [S, 2]."""

    states: tuple[Any, ...]
    gates_S2: Tensor
    joins = False
    """A :class:`Pair` is of one batch."""

    def select(self, rows: Tensor) -> PairState:
        return replace(self, states=tuple(state.select(rows) for state in self.states))

    def keep(self, segments: list[int]) -> PairState:
        return PairState(tuple(state.keep(segments) for state in self.states), self.gates_S2[segments])


class Pair(WindowDecoder):
    """Two whole models for one batch: p = g₁ p₁ + g₂ p₂. What is not a probability is the first one's: rules, word times."""

    def __init__(self, first: WindowDecoder, second: WindowDecoder, gates_S2: Tensor) -> None:
        super().__init__(first.model, first.tokenizer, first.generation)
        self._both, self._gates = (first, second), gates_S2

    def encode(
        self,
        clips: Sequence[np.ndarray],
        margin: float,
        carry: Carry | None = None,
        allowed: Sequence[int] | None = None,
        routing: Routing | None = None,
    ) -> Encoded:
        self._other = self._both[1].encode(clips, margin)
        return self._both[0].encode(clips, margin, carry)

    def start(self, encoded: Encoded, beams: int = 1) -> PairState:
        states = self._both[0].start(encoded, beams), self._both[1].start(self._other, beams)
        return PairState(states, self._gates)

    def restarted(self, state: PairState) -> PairState:
        first, second = (own.restarted(part) for own, part in zip(self._both, state.states, strict=True))
        return replace(state, states=(first, second))

    def step(self, tokens_Rn: Tensor, state: PairState | DecoderState) -> tuple[Tensor, Any]:
        assert isinstance(state, PairState)
        found = [own.step(tokens_Rn, part) for own, part in zip(self._both, state.states, strict=True)]
        gates_R2 = state.gates_S2.repeat_interleave(len(tokens_Rn) // len(state.gates_S2), 0)
        mixed = [
            logits.log_softmax(-1) + gate_R.log()[:, None]
            for (logits, _), gate_R in zip(found, gates_R2.unbind(1), strict=True)
        ]
        return torch.logaddexp(*mixed), replace(state, states=(found[0][1], found[1][1]))
