"""Windows to tokens: what was heard → language → search → timed words.

Windows are opened together, searched beside others, and closed one by one; as often as they need (see
:mod:`whisper_moe.generate.schedule`): nothing here judges the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from whisper_moe.config import SAMPLE_RATE
from whisper_moe.generate.align import WordTiming, align, token_probabilities
from whisper_moe.generate.hearing import Hearing
from whisper_moe.generate.options import TranscribeOptions
from whisper_moe.generate.search import MAX_INITIAL_TIMESTAMP, Hypothesis, Lane, Rules, Search, Step, Timestamps
from whisper_moe.machine import SPARE, fitting_threads, give_back_memory
from whisper_moe.media.tokenizer import Tokenizer
from whisper_moe.model.block import Carry, DecoderState, Encoded
from whisper_moe.model.router import Routing
from whisper_moe.packing import Layout

TOKENS_PER_SECOND = 40
"""More than anybody says, in the languages that cost most tokens a letter; a text that is longer is a loop."""
MINIMUM_TOKEN_LIMIT = 32


@dataclass(frozen=True)
class DecodingResult:
    """One decoding of one window."""

    hypothesis: Hypothesis
    language: str
    language_probability: float | None
    """None where the language was given."""
    no_speech_prob: float
    temperature: float
    experts: tuple[tuple[str, float], ...] = ()
    timings: tuple[WordTiming, ...] | None = None
    carried: Carry | None = None
    """The fast weights after this window, where they are carried through the recording."""
    expert_probabilities: tuple[tuple[str, float], ...] | None = None
    """See :class:`~whisper_moe.generate.result.Segment`."""
    routing: Routing | None = field(default=None, compare=False)
    """The window's choice, one row, which another try at it may keep."""


def prompt_ids(text: str | None, tokenizer: Tokenizer) -> list[int]:
    """Tokens of a text that comes before a window; none of a blank one."""
    return tokenizer.encode(f" {text.strip()}") if text and text.strip() else []


def unheard(result: DecodingResult, stated: str | None) -> DecodingResult:
    """A language that an expert states has no probability."""
    return replace(result, language_probability=None) if stated else result


def told(stated: Sequence[str | None], hints: Sequence[str | None] | None) -> list[str | None]:
    """Each window's language: the one that its expert states, else the one that is known already."""
    return [own or other for own, other in zip(stated, hints or [None] * len(stated), strict=True)]


NOTHING = Hypothesis((), 0.0, finished=False)
"""Of a window that is still searched for."""


@dataclass(eq=False)
class Opened:
    """Windows that were heard and are ready to be searched, together or beside others."""

    step: Step
    end_of_text: int
    searches: list[Search]
    logits_RV: Tensor | None
    state: Any
    drafts: list[DecodingResult]
    """What is known of each already."""
    finish: Callable[[Sequence[int], list[DecodingResult]], list[DecodingResult]] | None
    """Adds what takes another look at the sound, for the windows of these places."""
    places: list[int]
    """Which of the clips given each one is."""

    @torch.inference_mode()
    def close(self, places: Sequence[int]) -> list[DecodingResult]:
        """The results of some, whose searches are done."""
        found = [replace(self.drafts[place], hypothesis=self.searches[place].best) for place in places]
        return self.finish(places, found) if self.finish else found

    def enter(self, lane: Lane) -> None:
        """Search beside those that are in a lane already."""
        assert self.logits_RV is not None
        lane.join(self.searches, self.logits_RV, self.state)
        self.logits_RV = self.state = None  # the lane lets go of them when their rows leave

    @fitting_threads()
    def run(self) -> list[DecodingResult]:
        """All results, without company."""
        lane = Lane(self.step, self.end_of_text)
        self.enter(lane)
        lane.run()
        return self.close(range(len(self.searches)))


class WindowDecoder(Hearing):
    """A model that hears windows of up to 30 s and writes down what is said in them."""

    def start(self, encoded: Encoded, beams: int = 1) -> Any:
        """The state before the first token; searching hands it from step to step."""
        return self.model.decoder.start(encoded, beams)

    def restarted(self, state: Any) -> Any:
        """The state before the first token again; what was computed of the sound is kept."""
        return self.model.decoder.restarted(state)

    def step(self, tokens_Rn: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """As :mod:`whisper_moe.generate.search` asks for it."""
        states_RnD = self.model.decoder.extend(tokens_Rn.to(self.like.device), state)
        rows = Layout([1] * len(tokens_Rn))
        return self.model.decoder.logits(states_RnD[:, -1], state.routing, rows).float(), state

    def decode(self, clips: Sequence[np.ndarray], options: TranscribeOptions, **how: Any) -> list[DecodingResult]:
        """One result for each clip: those of :meth:`open`, all at once."""
        found: dict[int, DecodingResult] = {}
        for opened in self.open(clips, options, **how):
            found |= zip(opened.places, opened.run(), strict=True)
        return [found[place] for place in range(len(clips))]

    @torch.inference_mode()
    @fitting_threads()
    def open(
        self,
        clips: Sequence[np.ndarray],
        options: TranscribeOptions,
        *,
        temperature: float,
        margin: float,
        hints: Sequence[str | None] | None = None,
        carry: Carry | None = None,
        previous: Sequence[int] | None = None,
        routing: Routing | None = None,
    ) -> list[Opened]:
        """Clips of float32 samples at 16 kHz, heard. ``hints``: languages already known, window by window.

        ``carry``: what the window before this single one left; it is not changed, the result has what comes after.
        ``previous``: the tokens before it, where windows are conditioned on them. ``routing``: a row for each clip, where its
        experts are chosen already.
        """
        carried = carry.copy() if carry is not None else None
        encoded = self.encode(clips, margin, carried, self.allowed_experts(options), routing)
        give_back_memory(SPARE)  # packs of ever other sizes leave holes that would add up to hundreds of MB
        stated = self.stated_languages(encoded.routing, len(clips), options)
        lengths, hints = list(map(len, clips)), told(stated, hints)
        opened = self.open_encoded(encoded, lengths, hints, options, temperature, margin, previous)
        opened.drafts = [replace(unheard(*pair), carried=carried) for pair in zip(opened.drafts, stated, strict=True)]
        return [opened]

    @torch.inference_mode()
    @fitting_threads()
    def detect_language(self, clip: np.ndarray, options: TranscribeOptions, margin: float) -> dict[str, float]:
        """Probabilities of the allowed languages, likeliest first."""
        state = self.start(self.encode([clip], margin))
        logits, _ = self.step(torch.tensor([[self.tokenizer.sot]]), state)
        codes, probabilities = self._language_probabilities(logits, options)
        pairs = zip(codes, probabilities[0].tolist(), strict=True)
        return dict(sorted(pairs, key=lambda pair: -pair[1]))

    def open_encoded(
        self,
        encoded: Encoded,
        samples: Sequence[int],
        hints: Sequence[str | None],
        options: TranscribeOptions,
        temperature: float,
        margin: float,
        previous: Sequence[int] | None = None,
    ) -> Opened:
        """Clips of so many samples that are encoded already."""
        tokenizer, segments, choice = self.tokenizer, len(samples), options.search(temperature)
        state = self.start(encoded, choice.beams)
        rows, prompt, heard = segments * choice.beams, self._prompt(options, previous), None
        if prompt and self.given_language(options) is None:  # a prompt has a language of its own
            heard, state = self.step(torch.tensor([[tokenizer.sot]] * rows), state)
            state = self.restarted(state)
        opening = [*prompt, tokenizer.sot]
        logits, state = self.step(torch.tensor([opening] * rows), state)
        own = self.model.config.source_vocab_size  # new tokens take no share of a probability: they are never said
        no_speech = logits[:: choice.beams, :own].softmax(-1)[:, tokenizer.no_speech].tolist()
        languages = self._languages((logits if heard is None else heard)[:: choice.beams], hints, options)
        plain = [] if options.timestamps else [tokenizer.no_timestamps]
        prefixes = [[*tokenizer.sot_sequence(code, options.task)[1:], *plain] for code, _ in languages]
        if prefixes[0]:
            logits, state = self.step(torch.tensor(prefixes).repeat_interleave(choice.beams, 0), state)
        room, rules = self.model.config.max_target_positions - len(opening) - len(prefixes[0]), self._rules(options)
        drafts = [
            DecodingResult(NOTHING, language, probability, silence, temperature)
            for (language, probability), silence in zip(languages, no_speech, strict=True)
        ]
        return Opened(
            self.step,
            tokenizer.eot,
            [Search(rules, choice, min(room, self._token_limit(n, margin)), options.seed) for n in samples],
            logits,
            state,
            self.with_choices(drafts, encoded.routing),
            partial(self._timed, encoded, samples, options) if options.word_timestamps else None,
            [*range(segments)],
        )

    def _timed(
        self,
        encoded: Encoded,
        samples: Sequence[int],
        options: TranscribeOptions,
        places: Sequence[int],
        found: Sequence[DecodingResult],
    ) -> list[DecodingResult]:
        """Results of some of the segments, with their words' times."""
        best, languages = [each.hypothesis for each in found], [each.language for each in found]
        timings = self.timings(encoded.segments(places), [samples[place] for place in places], best, languages, options)
        return [replace(each, timings=words) for each, words in zip(found, timings, strict=True)]

    def _token_limit(self, samples: int, margin: float) -> int:
        """Half the decoder's positions as in ``whisper``; less for a cut window, where loops are likelier."""
        most = self.model.config.max_target_positions // 2
        if self.positions(samples, margin) == self.window_positions:
            return most
        return min(most, MINIMUM_TOKEN_LIMIT + math.ceil(TOKENS_PER_SECOND * samples / SAMPLE_RATE))

    def _prompt(self, options: TranscribeOptions, previous: Sequence[int] | None = None) -> list[int]:
        """Hotwords, then the prompt or the text before; where they are too long, as much of the end as there is room for."""
        room = self.model.config.max_target_positions // 2 - 1
        words, prompt = (prompt_ids(text, self.tokenizer) for text in (options.hotwords, options.initial_prompt))
        if previous is not None:
            words, prompt = [*words, *(prompt if options.carry_initial_prompt else ())], list(previous)
        words = words[:room]
        ids = words + prompt[max(0, len(prompt) - room + len(words)) :]
        return [self.tokenizer.sot_prev, *ids] if ids else []

    def _rules(self, options: TranscribeOptions) -> Rules:
        tokenizer = self.tokenizer
        asked = self.generation.get("suppress_tokens") if options.suppress_tokens is None else options.suppress_tokens
        asked = (-1,) if asked is None else asked  # fine-tunes list none, and mean it
        own, end = self.model.config.source_vocab_size, self.model.config.vocab_size
        unsaid = range(min(own, tokenizer.vocab_size), end)  # rows of padding, and new tokens
        never = {id for id in (*tokenizer.suppressed(asked), tokenizer.no_timestamps, *unsaid) if id < end}
        first = self.generation.get("begin_suppress_tokens") or (*tokenizer.encode(" "), tokenizer.eot)
        times = None
        if options.timestamps:
            most = self.generation.get("max_initial_timestamp_index", MAX_INITIAL_TIMESTAMP)
            times = Timestamps(tokenizer.timestamp_begin, tokenizer.timestamp_end, tokenizer.eot, most)
        return Rules(tuple(sorted(never)), tuple(id for id in first if id < end), times)

    def _languages(
        self, logits_SV: Tensor, hints: Sequence[str | None], options: TranscribeOptions
    ) -> list[tuple[str, float | None]]:
        """Each window's language: asked for, hinted, or read off the logits after the start of the transcript."""
        if given := self.given_language(options):
            return [(given, None)] * len(hints)
        codes, probabilities = self._language_probabilities(logits_SV, options)
        likeliest = [codes[index] for index in probabilities.argmax(-1).tolist()]
        best = [hint or heard for hint, heard in zip(hints, likeliest, strict=True)]
        # An expert may state a language that is not among those that are detected.
        shares = [dict(zip(codes, row, strict=True)) for row in probabilities.tolist()]
        return [(code, row.get(code)) for code, row in zip(best, shares, strict=True)]

    def given_language(self, options: TranscribeOptions) -> str | None:
        """The language that need not be detected: the one asked for, or an English-only model's."""
        return options.language or (None if self.tokenizer.is_multilingual else "en")

    def _language_probabilities(self, logits_SV: Tensor, options: TranscribeOptions) -> tuple[list[str], Tensor]:
        """Codes, and [S, codes] probabilities among the allowed languages only."""
        allowed = {code: self.tokenizer.language_id(code) for code in options.allowed_languages}
        ids = allowed or self.tokenizer.detected
        return list(ids), logits_SV[:, list(ids.values())].softmax(-1)

    def with_choices(self, found: Sequence[DecodingResult], routing: Routing | None) -> list[DecodingResult]:
        """The results, each with its row of ``routing`` and its experts; of a fitted router, also how probable it found every
        choice."""
        if routing is None:
            return list(found)
        rows = zip(found, routing.each(), self.experts(routing), strict=True)
        found = [replace(result, routing=row, experts=experts) for result, row, experts in rows]
        moe = self.model.config.moe
        if moe is None or not moe.fitted_router or routing.logits is None:
            return found
        names = (*moe.names, *(["none"] if moe.none_choice else []))
        rows = routing.logits.softmax(1).tolist()
        return [
            replace(result, expert_probabilities=tuple(zip(names, row, strict=True)))
            for result, row in zip(found, rows, strict=True)
        ]

    def timings(
        self,
        encoded: Encoded,
        samples: Sequence[int],
        best: Sequence[Hypothesis],
        languages: Sequence[str],
        options: TranscribeOptions,
    ) -> list[tuple[WordTiming, ...]]:
        """Words and their times from the alignment heads, by one teacher-forced pass over the texts just found."""
        tokenizer = self.tokenizer
        texts = [tokenizer.text_ids(hypothesis.tokens) for hypothesis in best]
        inputs = [
            [*tokenizer.sot_sequence(language, options.task), tokenizer.no_timestamps, *text, tokenizer.eot]
            for text, language in zip(texts, languages, strict=True)
        ]
        layout = Layout(map(len, inputs))
        flat = torch.tensor([token for tokens in inputs for token in tokens], device=self.like.device)
        decoded = self.model.decoder(flat, layout, encoded, self._alignment_heads)
        logits_TV = self.model.decoder.logits(decoded.states_TD, encoded.routing, layout)
        logits_TV = logits_TV[:, : self.model.config.source_vocab_size]
        timings = []
        for index, (rows, text, language) in enumerate(zip(layout.slices(), texts, languages, strict=True)):
            sound = self.positions(samples[index], 0)  # no word lies in the silence behind
            heard = decoded.attention[index][..., :sound]
            probabilities = token_probabilities(logits_TV[rows], text, tokenizer)
            written = "en" if options.task == "translate" else language
            timings.append(tuple(align(heard, probabilities, text, tokenizer, language=written)))
        return timings

    @cached_property
    def _alignment_heads(self) -> list[tuple[int, int]]:
        """(layer, head) pairs that follow the sound; by default all heads of the upper half of the layers."""
        config = self.model.config
        upper = range(config.decoder_layers // 2, config.decoder_layers)
        listed = self.generation.get("alignment_heads") or [(i, h) for i in upper for h in range(config.decoder_heads)]
        return sorted((layer, head) for layer, head in listed)
