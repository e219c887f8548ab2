"""What the encoder hands to the decoder, and what decoding remembers between steps.

T tokens of all segments, D width. R rows: S segments with the same number of beams each, rows of a segment side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from whisper_moe.model.attention import causal
from whisper_moe.model.block import BlockState
from whisper_moe.model.router import Routing
from whisper_moe.packing import Layout


class Encoded(NamedTuple):
    """What the encoder says about some segments."""

    states_TD: Tensor
    layout: Layout
    """Where each segment lies."""
    routing: Routing | None
    """The experts of each segment; None without segment-scope experts."""
    choices: tuple[Routing, ...] = ()
    """Every choice that a router made or was given: one for the segments, or one for each routed layer's tokens."""
    senses: Routing | None = None
    """The expert of each segment's sense, where not all are heard."""

    def segments(self, places: Sequence[int]) -> Encoded:
        """Some of its segments, in this order."""
        rows = torch.tensor(places, device=self.states_TD.device)
        pieces = self.states_TD.split(self.layout.lengths)
        pieces = [pieces[place] for place in places]
        routing, senses = (choice and choice.rows(rows) for choice in (self.routing, self.senses))
        return Encoded(torch.cat(pieces), Layout(map(len, pieces)), routing, senses=senses)


@dataclass
class DecoderState:
    """Everything that decoding remembers: one :class:`BlockState` a block, and each row's experts.

    All rows end in the same column of the caches; those of a segment that joined on the way begin in a later one.
    """

    blocks: list[BlockState]
    routing: Routing | None
    senses: Routing | None
    beams: int
    begins: tuple[int, ...]
    """The first column of each segment."""

    @property
    def segments(self) -> int:
        return len(self.begins)

    @property
    def length(self) -> int:
        """Columns that are filled: the tokens of the longest rows."""
        return self.blocks[0].cache.length

    @property
    def joins(self) -> bool:
        """Whether rows may join: fast weights learn from mini-batches, which begin at the same time for all rows."""
        return all(block.ttt is None for block in self.blocks)

    def places(self, n: int, device: torch.device) -> Tensor:
        """The positions of n more tokens of each row, [R * n]."""
        return (torch.arange(self.length, self.length + n, device=device) - self._rows(device)[:, None]).flatten()

    def mask(self, n: int, device: torch.device) -> Tensor | None:
        """What n more tokens of each row may look at, [R, 1, n, columns]; None where all rows begin in the first column."""
        if not any(self.begins):
            return None
        own_R11c = (torch.arange(self.length + n, device=device) >= self._rows(device)[:, None])[:, None, None]
        return own_R11c & causal(n, self.length, device)

    def _rows(self, device: torch.device) -> Tensor:
        """The first column of each row."""
        return torch.tensor(self.begins, device=device).repeat_interleave(self.beams)

    def select(self, rows: Tensor) -> DecoderState:
        """The state with row ``rows[i]`` in place of row i: beams that moved within their segments."""
        blocks = [BlockState(b.cache.select(rows), b.cross, b.ttt.select(rows) if b.ttt else None) for b in self.blocks]
        return replace(self, blocks=blocks)

    def keep(self, segments: list[int]) -> DecoderState:
        """The state without the segments that are finished: their rows, keys and values leave the batch."""
        rows = torch.tensor([s * self.beams + b for s in segments for b in range(self.beams)])
        rows = rows.to(self.blocks[0].cache.keys.device)
        begins = [self.begins[segment] for segment in segments]
        first = min(begins)
        blocks = [
            BlockState(b.cache.select(rows, first), b.cross.select(segments), b.ttt.select(rows) if b.ttt else None)
            for b in self.blocks
        ]
        routing, senses = (part and part.rows(rows) for part in (self.routing, self.senses))
        return DecoderState(blocks, routing, senses, self.beams, tuple(begin - first for begin in begins))

    def joined(self, other: DecoderState) -> DecoderState:
        """Both batches as one, of as many beams each."""
        assert self.beams == other.beams, (self.beams, other.beams)
        blocks = [own.joined(more) for own, more in zip(self.blocks, other.blocks, strict=True)]
        length = blocks[0].cache.length
        begins = [begin + length - part.length for part in (self, other) for begin in part.begins]
        routing, senses = (
            None if one is None or more is None else Routing.cat([one, more])
            for one, more in ((self.routing, other.routing), (self.senses, other.senses))
        )
        return DecoderState(blocks, routing, senses, self.beams, tuple(begins))
