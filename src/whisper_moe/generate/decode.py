"""One batch of windows to tokens: log-mels → packs → states → language → search → timed words.

A batch is decoded as often as its windows need (see :mod:`whisper_moe.generate.longform`); nothing here judges the result.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from whisper_moe.config import FULL_WINDOW, POSITIONS_PER_SECOND, SAMPLE_RATE, SAMPLES_PER_POSITION
from whisper_moe.generate.align import WordTiming, align, token_probabilities
from whisper_moe.generate.options import TranscribeOptions
from whisper_moe.generate.search import Hypothesis, Rules, Timestamps, search
from whisper_moe.machine import SPARE, fitting_threads, give_back_memory
from whisper_moe.media.mel import window_mel
from whisper_moe.media.tokenizer import Tokenizer
from whisper_moe.model.block import Carry
from whisper_moe.model.model import ROUTED_SECONDS, DecoderState, Encoded, WhisperMoEModel
from whisper_moe.model.router import NONE, Routing
from whisper_moe.packing import Layout, first_fit_decreasing
from whisper_moe.weights.tokens import EXPERT_LANGUAGES

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
    experts: tuple[tuple[str, float], ...]
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


def middle(clip: np.ndarray) -> np.ndarray:
    """As much of a clip as a router that chooses ahead listens to."""
    most = round(ROUTED_SECONDS * SAMPLE_RATE)
    begin = max(0, len(clip) - most) // 2
    return clip[begin : begin + most]


class WindowDecoder:
    """A model with its tokenizer and generation config, ready to decode windows of up to 30 s."""

    def __init__(self, model: WhisperMoEModel, tokenizer: Tokenizer, generation: Mapping[str, Any]) -> None:
        self.model, self.tokenizer, self.generation = model, tokenizer, generation
        self.chooses = model.encoder.routes_ahead
        """Whether the router chooses before the pass of the experts."""
        self.window_positions = min(model.config.max_source_positions, round(FULL_WINDOW * POSITIONS_PER_SECOND))

    def start(self, encoded: Encoded, beams: int = 1) -> Any:
        """The state before the first token; searching hands it from step to step."""
        return self.model.decoder.start(encoded, beams)

    def restarted(self, state: Any) -> Any:
        """The state before the first token again; what was computed of the sound is kept."""
        return self.model.decoder.restarted(state)

    def step(self, tokens_Rn: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """As :mod:`whisper_moe.generate.search` asks for it."""
        states_RnD = self.model.decoder.extend(tokens_Rn.to(self._like.device), state)
        rows = Layout([1] * len(tokens_Rn))
        return self.model.decoder.logits(states_RnD[:, -1], state.routing, rows).float(), state

    @property
    def window_seconds(self) -> float:
        """What a window may last: 30 s, or less in a model that has fewer positions."""
        return self.window_positions / POSITIONS_PER_SECOND

    @property
    def _like(self) -> Tensor:
        """A tensor of the model's device and type."""
        return self.model.encoder.positions

    def positions(self, samples: int, margin: float) -> int:
        """Encoder positions of a clip with its margin of silence."""
        wanted = math.ceil((samples + margin * SAMPLE_RATE) / SAMPLES_PER_POSITION)
        return max(1, min(wanted, self.window_positions))

    @torch.inference_mode()
    @fitting_threads()
    def decode(
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
    ) -> list[DecodingResult]:
        """One result for each clip of float32 samples at 16 kHz. ``hints``: languages already known, window by window.

        ``carry``: what the window before this single one left; it is not changed, the result has what comes after.
        ``previous``: the tokens before it, where windows are conditioned on them. ``routing``: a row for each clip, where its
        experts are chosen already.
        """
        carried = carry.copy() if carry is not None else None
        encoded = self.encode(clips, margin, carried, self.allowed_experts(options), routing)
        give_back_memory(SPARE)  # packs of ever other sizes leave holes that would add up to hundreds of MB
        samples, stated = list(map(len, clips)), self.stated_languages(encoded.routing, len(clips), options)
        found = self.decode_encoded(encoded, samples, told(stated, hints), options, temperature, margin, previous)
        del encoded
        give_back_memory(SPARE)
        return [replace(unheard(*pair), carried=carried) for pair in zip(found, stated, strict=True)]

    @torch.inference_mode()
    @fitting_threads()
    def detect_language(self, clip: np.ndarray, options: TranscribeOptions, margin: float) -> dict[str, float]:
        """Probabilities of the allowed languages, likeliest first."""
        state = self.start(self.encode([clip], margin))
        logits, _ = self.step(torch.tensor([[self.tokenizer.sot]]), state)
        codes, probabilities = self._language_probabilities(logits, options)
        pairs = zip(codes, probabilities[0].tolist(), strict=True)
        return dict(sorted(pairs, key=lambda pair: -pair[1]))

    def allowed_experts(self, options: TranscribeOptions) -> list[int] | None:
        """Which experts may answer, -1 for *none*; None for all. Raises ``ValueError`` for a name that is none of the model's."""
        if not (options.experts or options.exclude):
            return None
        moe = self.model.config.moe
        if moe is None or moe.scope == "token":
            raise ValueError("experts, exclude: this model has no experts that are chosen for a whole segment")
        known = {name: index for index, name in enumerate(moe.names)} | ({"none": NONE} if moe.none_choice else {})
        if unknown := [name for name in (*options.experts, *options.exclude) if name not in known]:
            raise ValueError(f"no expert is called {', '.join(unknown)}; there are {', '.join(known)}")
        chosen = [known[name] for name in options.experts or known if name not in options.exclude]
        if not chosen:
            raise ValueError("experts, exclude: no expert is left to answer")
        return chosen

    def encode(
        self,
        clips: Sequence[np.ndarray],
        margin: float,
        carry: Carry | None = None,
        allowed: Sequence[int] | None = None,
        routing: Routing | None = None,
    ) -> Encoded:
        """Clips packed and encoded, one batch of decoding rows in the order given."""
        if routing is None and self.chooses:
            routing = self.choose(clips, allowed)
        parts: list[Encoded] = []
        places, packs = self._packs(clips, margin)
        for pack, mels in packs:
            heard = [self.positions(len(clips[i]), 0) for i in pack]
            own = None if routing is None else routing.rows(torch.tensor(pack, device=self._like.device))
            parts.append(self.heard(mels, valid_lengths=heard, routing=own, carry=carry, allowed=allowed))
        pieces = [piece for part in parts for piece in part.states_TD.split(part.layout.lengths)]
        pieces = [pieces[place] for place in places]
        routings = [part.routing for part in parts if part.routing is not None]
        if routings:
            routing = Routing.cat(routings).rows(torch.tensor(places, device=self._like.device))
        return Encoded(torch.cat(pieces), Layout(map(len, pieces)), routing)

    def heard(self, mels: Sequence[Tensor], **how: Any) -> Encoded:
        """A pack, as :meth:`Encoder.forward` encodes it."""
        return self.model.encoder(mels, **how)

    def stated_languages(self, routing: Routing | None, segments: int, options: TranscribeOptions) -> list[str | None]:
        """Of each window, the one language that its expert was made for, where it is known and allowed."""
        stated: Mapping[str, str] = self.generation.get(EXPERT_LANGUAGES, {})
        if routing is None or self.model.config.moe is None or not stated:
            return [None] * segments
        names, limits = self.model.config.moe.names, options.allowed_languages
        spoken = [None if first == NONE else stated.get(names[first]) for first, *_ in routing.choices]
        return [None if limits and code not in limits else code for code in spoken]

    def choose(self, clips: Sequence[np.ndarray], allowed: Sequence[int] | None = None) -> Routing:
        """The experts of each clip, before they hear it; ``allowed``: see :meth:`Router.forward`."""
        assert self.model.encoder.router is not None
        return self.model.encoder.router(self.features(clips), allowed)

    @torch.inference_mode()
    def features(self, clips: Sequence[np.ndarray], margin: float | None = None) -> Tensor:
        """What the router reads of each clip, [clips, D]; one that chooses ahead, of its middle, as the base alone hears it."""
        encoder, margin = self.model.encoder, self.model.config.margin if margin is None else margin
        if encoder.routes_ahead:
            clips, margin = [middle(clip) for clip in clips], 0.0
        places, packs = self._packs(clips, margin)
        sounding = [self.positions(len(clip), 0) for clip in clips]
        parts = [encoder.features(mels, [sounding[i] for i in pack]) for pack, mels in packs]
        return torch.cat(parts)[places]

    def _packs(
        self, clips: Sequence[np.ndarray], margin: float
    ) -> tuple[list[int], Iterator[tuple[list[int], list[Tensor]]]]:
        """Where each clip comes among all packs' segments; and the packs: which clips, and their mels."""
        lengths = [self.positions(len(clip), margin) for clip in clips]
        packs = first_fit_decreasing(lengths)
        order = [i for pack in packs for i in pack]
        places = sorted(range(len(order)), key=order.__getitem__)
        mels = lambda i: window_mel(clips[i], self.model.config.n_mels, lengths[i]).to(self._like)  # noqa: E731
        return places, ((pack, [mels(i) for i in pack]) for pack in packs)

    def decode_encoded(
        self,
        encoded: Encoded,
        samples: Sequence[int],
        hints: Sequence[str | None],
        options: TranscribeOptions,
        temperature: float,
        margin: float,
        previous: Sequence[int] | None = None,
    ) -> list[DecodingResult]:
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
        room = self.model.config.max_target_positions - len(opening) - len(prefixes[0])
        limits = [min(room, self._token_limit(n, margin)) for n in samples]
        rules = self._rules(options)
        best = search(
            self.step, logits, state, rules, choice, end_of_text=tokenizer.eot, limits=limits, seed=options.seed
        )
        timings = self.timings(encoded, samples, best, [language for language, _ in languages], options)
        found = [
            DecodingResult(hypothesis, language, probability, silence, temperature, experts, timing)
            for hypothesis, (language, probability), silence, experts, timing in zip(
                best, languages, no_speech, self._experts(encoded.routing, segments), timings, strict=True
            )
        ]
        return self.with_choices(found, encoded.routing)

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
            most = self.generation.get("max_initial_timestamp_index", 50)
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

    def _experts(self, routing: Routing | None, segments: int) -> list[tuple[tuple[str, float], ...]]:
        """Names and gates of each window's experts; empty where they are chosen per token or there are none."""
        if routing is None or self.model.config.moe is None:
            return [()] * segments
        names = (*self.model.config.moe.names, "none")  # index -1 is *none*
        named = []
        for experts, gates in zip(routing.experts.tolist(), routing.gates.tolist(), strict=True):
            sums: defaultdict[str, float] = defaultdict(float)
            for expert, gate in zip(experts, gates, strict=True):  # *none* may take several slots
                if gate:  # 0 of an expert that may not answer, where fewer than two may
                    sums[names[expert]] += gate
            named.append(tuple(sums.items()))
        return named

    def with_choices(self, found: Sequence[DecodingResult], routing: Routing | None) -> list[DecodingResult]:
        """The results, each with its row of ``routing``; of a fitted router, also how probable it found every choice."""
        if routing is None:
            return list(found)
        found = [replace(result, routing=row) for result, row in zip(found, routing.each(), strict=True)]
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
    ) -> list[tuple[WordTiming, ...] | None]:
        """Words and their times from the alignment heads, by one teacher-forced pass over the texts just found."""
        if not options.word_timestamps:
            return [None] * len(best)
        tokenizer = self.tokenizer
        texts = [tokenizer.text_ids(hypothesis.tokens) for hypothesis in best]
        inputs = [
            [*tokenizer.sot_sequence(language, options.task), tokenizer.no_timestamps, *text, tokenizer.eot]
            for text, language in zip(texts, languages, strict=True)
        ]
        layout = Layout(map(len, inputs))
        flat = torch.tensor([token for tokens in inputs for token in tokens], device=self._like.device)
        attention = self.model.decoder.alignment(flat, layout, encoded, self._alignment_heads)
        states_TD = self.model.decoder(flat, layout, encoded).states_TD
        logits_TV = self.model.decoder.logits(states_TD, encoded.routing, layout)
        logits_TV = logits_TV[:, : self.model.config.source_vocab_size]
        timings = []
        for index, (rows, text, language) in enumerate(zip(layout.slices(), texts, languages, strict=True)):
            heard = attention[index][..., : self.positions(samples[index], 0)]  # no word lies in the silence behind
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
