"""What a model hears in windows of sound: clips → log-mels → packs → states, and who is to answer for each."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from whisper_moe.config import FULL_WINDOW, POSITIONS_PER_SECOND, SAMPLE_RATE, SAMPLES_PER_POSITION
from whisper_moe.generate.options import TranscribeOptions
from whisper_moe.media.mel import window_mel
from whisper_moe.media.tokenizer import Tokenizer
from whisper_moe.model.block import Carry, Encoded
from whisper_moe.model.model import ROUTED_SECONDS, WhisperMoEModel
from whisper_moe.model.router import NONE, Routing
from whisper_moe.packing import Layout, first_fit_decreasing
from whisper_moe.weights.tokens import EXPERT_LANGUAGES


def middle(clip: np.ndarray) -> np.ndarray:
    """As much of a clip as a router that chooses ahead listens to."""
    most = round(ROUTED_SECONDS * SAMPLE_RATE)
    begin = max(0, len(clip) - most) // 2
    return clip[begin : begin + most]


class Hearing:
    """A model with its tokenizer and generation config, ready to encode windows of up to 30 s."""

    def __init__(self, model: WhisperMoEModel, tokenizer: Tokenizer, generation: Mapping[str, Any]) -> None:
        self.model, self.tokenizer, self.generation = model, tokenizer, generation
        self.chooses = model.encoder.routes_ahead
        """Whether the router chooses before the pass of the experts."""
        self.window_positions = min(model.config.max_source_positions, round(FULL_WINDOW * POSITIONS_PER_SECOND))

    @property
    def window_seconds(self) -> float:
        """What a window may last: 30 s, or less in a model that has fewer positions."""
        return self.window_positions / POSITIONS_PER_SECOND

    @property
    def like(self) -> Tensor:
        """A tensor of the model's device and type."""
        return self.model.encoder.positions

    def positions(self, samples: int, margin: float) -> int:
        """Encoder positions of a clip with its margin of silence."""
        wanted = math.ceil((samples + margin * SAMPLE_RATE) / SAMPLES_PER_POSITION)
        return max(1, min(wanted, self.window_positions))

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
            own = None if routing is None else routing.rows(torch.tensor(pack, device=self.like.device))
            parts.append(self.heard(mels, valid_lengths=heard, routing=own, carry=carry, allowed=allowed))
        pieces = [piece for part in parts for piece in part.states_TD.split(part.layout.lengths)]
        pieces = [pieces[place] for place in places]
        routings = [part.routing for part in parts if part.routing is not None]
        if routings:
            routing = Routing.cat(routings).rows(torch.tensor(places, device=self.like.device))
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
        mels = lambda i: window_mel(clips[i], self.model.config.n_mels, lengths[i]).to(self.like)  # noqa: E731
        return places, ((pack, [mels(i) for i in pack]) for pack in packs)

    def experts(self, routing: Routing) -> list[tuple[tuple[str, float], ...]]:
        """Names and gates of each window's experts."""
        assert self.model.config.moe is not None
        names = (*self.model.config.moe.names, "none")  # index -1 is *none*
        named = []
        for experts, gates in zip(routing.experts.tolist(), routing.gates.tolist(), strict=True):
            sums: defaultdict[str, float] = defaultdict(float)
            for expert, gate in zip(experts, gates, strict=True):  # *none* may take several slots
                if gate:  # 0 of an expert that may not answer, where fewer than two may
                    sums[names[expert]] += gate
            named.append(tuple(sums.items()))
        return named
