"""The whole encoder-decoder as one ``nn.Module``; everything around it (files, text, search) lives elsewhere.

T tokens of all segments, D width. Decoding rows R: S segments with the same number of beams each, rows of a segment side by
side; n new tokens a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import groupby, zip_longest
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whisper_moe.config import POSITIONS_PER_SECOND, ModelConfig
from whisper_moe.model.block import Block, Carry, DecoderState, Encoded, listed
from whisper_moe.model.delta import add_differences, assigned
from whisper_moe.model.layers import AudioStem, TextHead, sinusoids
from whisper_moe.model.router import NONE, Router, Routing, pool_segments
from whisper_moe.model.senses import Embedded, Senses, is_sensed
from whisper_moe.model.speech import SpeechModel
from whisper_moe.packing import Layout

_FIRST_CAPACITY = 64
"""Tokens a cache has room for at first: most clips need fewer, and it doubles when they do not."""
ROUTED_SECONDS = 5.0
"""Of each window, what a router that chooses before the pass of the experts listens to."""


class Decoded(NamedTuple):
    """What a teacher-forced pass of the decoder gives."""

    states_TD: Tensor
    """Before the head."""
    depths: tuple[Tensor, ...]
    """Behind each block, [T, D]."""
    choices: tuple[Routing, ...]
    """One for each routed layer's tokens."""
    attention: list[Tensor]
    """Of the heads asked for, before the softmax: [heads, tokens, positions] a segment."""


class Output(NamedTuple):
    """What a pass of the whole model gives."""

    logits: Tensor
    """[T, vocab]"""
    states_TD: Tensor
    """The decoder's states before the head."""
    routings: tuple[Routing, ...]
    """Every choice that a router made, in order: one for the segments, or one for each routed layer's tokens."""
    depths: tuple[Tensor, ...]
    """The decoder's states behind each of its blocks, [T, D]."""


class Encoder(nn.Module):
    """Stem, positions, blocks: log-mels of several segments → flat states, and the router's choice for each segment.

    Blocks before ``moe.router_layer`` are unrouted; the router reads what they made.
    """

    positions: Tensor
    sense_experts = 0
    """How many other senses have an expert."""
    routes_senses = False
    """Whether the router chooses for their segments, too."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.stem = AudioStem(config.n_mels, config.d_model)
        self.register_buffer("positions", sinusoids(config.max_source_positions, config.d_model))
        self.blocks = listed(Block(config, "encoder", i) for i in range(config.encoder_layers))
        self.norm = nn.LayerNorm(config.d_model)
        self.core_alone = config.core_alone_on_full_windows
        moe = config.moe if config.moe and config.moe.scope == "segment" else None
        self.router = Router(config.d_model, moe) if moe else None
        self.router_layer = moe.router_layer if moe else None
        self.routes_ahead = moe is not None and moe.granularity != "ffn"
        self.deltas = _differences(config)

    def forward(
        self,
        inputs: Sequence[Tensor | Embedded],
        *,
        valid_lengths: Sequence[int] | None = None,
        routing: Routing | None = None,
        carry: Carry | None = None,
        allowed: Sequence[int] | None = None,
    ) -> Encoded:
        """``inputs``: a mel [n_mels, frames] a segment, or what another sense embedded.

        ``valid_lengths``: how many positions of each segment the router reads (those of the sound, not of the silence kept
        after it); default all. ``routing``: a choice made elsewhere, which the router then does not make. ``carry``: fast
        weights of the same recording's window before, advanced in place; for one segment at a time. ``allowed``: see
        :meth:`Router.forward`.
        """
        if routing is not None and self.router is None:
            raise ValueError("routing is given to a model whose segments are not routed")
        mels = [each for each in inputs if not isinstance(each, Embedded)]
        if self.deltas and routing is None:
            routing = self.choose(mels, valid_lengths)
        x_TD, layout = self._positioned(inputs, routing)
        alone, sensed = self._alone(layout, inputs), _sensed(inputs, x_TD)
        choices: list[Routing] = [routing] if routing is not None and self.routes_ahead else []
        with assigned(routing if self.deltas else sensed, layout, self.deltas or self.sense_experts):
            for depth in range(len(self.blocks) + 1):
                if depth == self.router_layer and self.router is not None and not self.routes_ahead:
                    found = routing or self.router(pool_segments(x_TD, layout, valid_lengths), allowed)
                    apart = None if self.routes_senses else sensed
                    routing = found if apart is None else found.excepting(apart)
                    choices.append(found if apart is None else found.rows(_heard(inputs, x_TD.device)))
                if depth < len(self.blocks):
                    x_TD, chosen = self.blocks[depth](x_TD, layout, routing, carry=carry, alone=alone)
                    choices += [chosen] if chosen else []
            return Encoded(self.norm(x_TD), layout, routing, tuple(choices), sensed)

    def choose(self, mels: Sequence[Tensor], valid_lengths: Sequence[int] | None = None) -> Routing:
        """The experts of each segment by the base alone, from the middle of its sound: where experts differ from the stem on,
        a pass before theirs."""
        assert self.router is not None
        heard = []
        for mel, valid in zip(mels, valid_lengths or [(mel.shape[1] + 1) // 2 for mel in mels], strict=True):
            most = min(valid, round(ROUTED_SECONDS * POSITIONS_PER_SECOND))
            begin = (valid - most) // 2
            heard.append(mel[:, 2 * begin : 2 * (begin + most)])
        return self.router(self.features(heard))

    def features(self, mels: Sequence[Tensor], valid_lengths: Sequence[int] | None = None) -> Tensor:
        """What the router reads of each segment, [S, D]."""
        x_TD, layout = self._positioned(mels, None)
        for block in self.blocks[: self.router_layer]:
            x_TD = block(x_TD, layout, None, alone=self._alone(layout)).x_TD
        return pool_segments(x_TD, layout, valid_lengths)

    def _alone(self, layout: Layout, inputs: Sequence[Tensor | Embedded] = ()) -> list[bool]:
        """The segments that the core answers for alone, without what adapts it: full windows, and those of other senses."""
        full = [self.core_alone and length == len(self.positions) for length in layout.lengths]
        return [alone or isinstance(each, Embedded) for alone, each in zip_longest(full, inputs)]

    def _positioned(self, inputs: Sequence[Tensor | Embedded], routing: Routing | None) -> tuple[Tensor, Layout]:
        """Segments of all kinds in one pack, with positions."""
        mels = [each for each in inputs if not isinstance(each, Embedded)]
        sounds: Sequence[Tensor] = ()
        if mels:
            x_TD, layout = self._stem(mels, routing)
            x_TD = self.placed(x_TD, layout)
            if len(mels) == len(inputs):
                return x_TD, layout
            sounds = x_TD.split(layout.lengths)
        heard = iter(sounds)
        parts = [each.x_ND if isinstance(each, Embedded) else next(heard) for each in inputs]
        return torch.cat(parts), Layout(map(len, parts))

    def placed(self, x_TD: Tensor, layout: Layout | None = None) -> Tensor:
        """Segments, by default one, with the positions of sound. Raises ``ValueError`` for one that is too long."""
        layout = layout or Layout([len(x_TD)])
        longest, limit = max(layout.lengths), self.positions.shape[0]
        if longest > limit:
            raise ValueError(f"a segment has {longest} positions; the encoder has {limit}")
        return x_TD + self.positions[layout.positions(x_TD.device)]

    def _stem(self, mels: Sequence[Tensor], routing: Routing | None) -> tuple[Tensor, Layout]:
        """The stem; kernels that differ by expert serve the segments of one choice together."""
        if self.deltas and routing is not None:
            choices = routing.choices
            alone = routing.experts.shape[1] > 1  # its gates are its own
            runs = [list(run) for _, run in groupby(range(len(mels)), lambda i: (choices[i], i if alone else 0))]
            parts = []
            for run in runs:
                with assigned(routing.rows(torch.tensor(run)), Layout([1] * len(run)), self.deltas):
                    parts.append(self.stem([mels[i] for i in run]))
            x_TD = torch.cat([x for x, _ in parts])
            layout = Layout(length for _, part in parts for length in part.lengths)
            return x_TD, layout
        return self.stem(mels)


def _heard(inputs: Sequence[Tensor | Embedded], device: torch.device) -> Tensor:
    """The places of segments that are sound: of others a router learns nothing."""
    places = [i for i, each in enumerate(inputs) if not isinstance(each, Embedded)]
    return torch.tensor(places, dtype=torch.int64, device=device)


def _sensed(inputs: Sequence[Tensor | Embedded], like: Tensor) -> Routing | None:
    """The expert of each segment's sense; None where all are heard."""
    experts = [each.expert if isinstance(each, Embedded) else NONE for each in inputs]
    if {*experts} == {NONE}:
        return None
    column = torch.tensor(experts, device=like.device)[:, None]
    return Routing(column, torch.ones_like(column, dtype=like.dtype))


class Decoder(nn.Module):
    """Token embedding, learned positions, blocks, tied head: teacher-forced, or token by token with a typed state.

    Tokens are ids, or rows that are embedded already.
    """

    sense_experts = 0
    """As the encoder's."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.vocabulary = config.vocab_size
        self.token_embedding = nn.Embedding(config.source_vocab_size, config.d_model)
        self.positions = nn.Parameter(torch.randn(config.max_target_positions, config.d_model) * 0.02)
        self.blocks = listed(Block(config, "decoder", i) for i in range(config.decoder_layers))
        self.norm = nn.LayerNorm(config.d_model)
        self.new_tokens = nn.Embedding(len(config.new_tokens), config.d_model) if config.new_tokens else None
        self.deltas = _differences(config)
        self.head: nn.Module = TextHead(self.token_embedding, self.new_tokens)

    def forward(
        self, tokens_T: Tensor, layout: Layout, encoded: Encoded, heads: Sequence[tuple[int, int]] = ()
    ) -> Decoded:
        """Teacher forcing: flat tokens [T] (or [T, D]) of all segments, ``layout`` their texts.

        ``heads``: (layer, head) pairs of the cross-attention that is wanted, which comes out by ascending layer, that of one
        layer in the order given.
        """
        depths, choices, attention = list[Tensor](), list[Routing](), list[list[Tensor]]()
        source = encoded.states_TD, encoded.layout
        with self._assigned(encoded, layout, encoded.layout):
            x_TD = self._embed(tokens_T, self._places(layout, tokens_T.device))
            for depth, block in enumerate(self.blocks):
                if wanted := [head for layer, head in heads if layer == depth]:
                    attention.append(block.cross_logits(x_TD, layout, source, wanted))
                x_TD, chosen = block(x_TD, layout, encoded.routing, source)
                depths.append(x_TD)
                choices += [chosen] if chosen else []
            found = [torch.cat(each) for each in zip(*attention, strict=True)]
            return Decoded(self.norm(x_TD), tuple(depths), tuple(choices), found)

    def start(self, encoded: Encoded, beams: int = 1) -> DecoderState:
        """The state before the first token, ``beams`` rows for each segment."""
        states_TD, layout = encoded[:2]
        segments = len(layout)
        rows = torch.arange(segments, device=states_TD.device).repeat_interleave(beams)
        routing, senses = (part and part.rows(rows) for part in (encoded.routing, encoded.senses))
        capacity = min(_FIRST_CAPACITY, self.positions.shape[0])
        with self._assigned(encoded, layout, layout):
            blocks = [block.start(segments * beams, capacity, (states_TD, layout)) for block in self.blocks]
        return DecoderState(blocks, routing, senses, beams, (0,) * segments)

    def restarted(self, state: DecoderState) -> DecoderState:
        """The state before the first token again; what was computed of the sound is kept."""
        blocks = [block.restarted(old) for block, old in zip(self.blocks, state.blocks, strict=True)]
        return replace(state, blocks=blocks, begins=(0,) * state.segments)

    def extend(self, tokens_Rn: Tensor, state: DecoderState) -> Tensor:
        """n more tokens for each row, [R, n] (or [R, n, D]); advances ``state`` and returns states [R, n, D] before the head."""
        rows, n = tokens_Rn.shape[:2]
        longest, limit = state.length + n - min(state.begins), self.positions.shape[0]
        if longest > limit:
            raise ValueError(f"{longest} tokens; the decoder has {limit} positions")
        places, mask = state.places(n, tokens_Rn.device), state.mask(n, tokens_Rn.device)
        layout, beams = Layout([n] * rows), Layout([n * state.beams] * state.segments)
        with self._assigned(state, layout):
            x_TD = self._embed(tokens_Rn.flatten(0, 1), places)
            for block, own in zip(self.blocks, state.blocks, strict=True):
                x_TD = block.extend(x_TD, layout, state.routing, own, beams, mask)
            return self.norm(x_TD).view(rows, n, -1)

    def logits(self, states_TD: Tensor, routing: Routing | None, layout: Layout) -> Tensor:
        """The text head, [T, vocab]; ``layout``: of the segments or rows that ``routing`` is of."""
        with assigned(routing, layout, self.deltas):
            return self.head(states_TD)

    def _places(self, layout: Layout, device: torch.device) -> Tensor:
        longest, limit = max(layout.lengths), self.positions.shape[0]
        if longest > limit:
            raise ValueError(f"a text has {longest} tokens; the decoder has {limit} positions")
        return layout.positions(device)

    def embedded(self, tokens_T: Tensor) -> Tensor:
        """Ids to rows, [T, D], without positions."""
        if self.new_tokens is None:
            return self.token_embedding(tokens_T)
        own = self.token_embedding.num_embeddings
        own_TD = self.token_embedding(tokens_T.clamp_max(own - 1))
        new_TD = self.new_tokens((tokens_T - own).clamp_min(0))
        return torch.where((tokens_T < own)[:, None], own_TD, new_TD)

    def _assigned(
        self, of: Encoded | DecoderState, layout: Layout, source: Layout | None = None
    ) -> AbstractContextManager[None]:
        """Whose differences from the core are added."""
        return assigned(of.routing if self.deltas else of.senses, layout, self.deltas or self.sense_experts, source)

    def _embed(self, tokens_T: Tensor, places_T: Tensor) -> Tensor:
        rows_TD = tokens_T if tokens_T.is_floating_point() else self.embedded(tokens_T)
        return rows_TD + self.positions[places_T]


def _differences(config: ModelConfig) -> int:
    """Experts that are differences from the base."""
    return config.moe.n_experts if config.moe and config.moe.granularity == "delta" else 0


class WhisperMoEModel(nn.Module):
    """Whisper with packed segments, test-time training and experts, as far as ``config`` names them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        if config.moe and (experts := _differences(config)):
            add_differences(self, experts, config.moe.delta_rank)
        self.speech = SpeechModel(config.speech, config.n_mels) if config.speech else None
        self.senses = Senses(config.senses, config) if config.senses else None
        if self.senses is not None:
            self.senses.attach(self)

    def forward(
        self,
        inputs: Sequence[Tensor | Embedded],
        texts: Sequence[Tensor],
        *,
        valid_lengths: Sequence[int] | None = None,
        among: Tensor | None = None,
    ) -> Output:
        """Teacher forcing over packed pairs: an input and token ids [n] a segment.

        An input is a mel [n_mels, frames], a text [n] or a film [t, h, w, P]; beside the last two, logits are of the senses'
        tokens, too; ``among``: of these tokens only. ``valid_lengths``: the positions of each segment that a router of segments
        reads (:meth:`Encoder.forward`).
        """
        layout, tokens_T = Layout(len(text) for text in texts), torch.cat(list(texts))
        senses = self.senses if any(isinstance(each, Embedded) or is_sensed(each) for each in inputs) else None
        if senses is not None:
            inputs = [senses.embedded(each, self) for each in inputs]
            tokens_T = senses.rows(tokens_T, self.decoder)
        encoded = self.encoder(inputs, valid_lengths=valid_lengths)
        states_TD, depths, choices, _ = self.decoder(tokens_T, layout, encoded)
        if among is not None:
            rows = self.senses.rows(among, self.decoder) if self.senses else self.decoder.embedded(among)
            logits = F.linear(states_TD, rows)
        else:
            logits = self.decoder.logits(states_TD, encoded.routing, layout)
            logits = senses.logits(logits, states_TD) if senses else logits
        return Output(logits, states_TD, encoded.choices + choices, depths)
