"""Packed text decoder: teacher-forced over whole segments, or token by token with a typed state.

Decoding rows: S segments with the same number of beams each, rows of a segment side by side, all rows equally long.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from whisper_moe.config import ModelConfig
from whisper_moe.model.attention import KeyValueCache, Memory
from whisper_moe.model.block import Block, BlockState
from whisper_moe.model.encoder import Encoded
from whisper_moe.model.heads import TextHead
from whisper_moe.model.router import Choices, Routing
from whisper_moe.model.ttt import TTTMLP, TTTState
from whisper_moe.packing import Layout

_FIRST_CAPACITY = 64
"""Tokens a cache has room for at first: most clips need fewer, and it doubles when they do not."""


@dataclass
class DecoderState:
    """Everything that decoding remembers: one :class:`BlockState` a block, and each row's experts."""

    blocks: list[BlockState]
    routing: Routing | None
    segments: int
    beams: int

    @property
    def length(self) -> int:
        """Tokens decoded so far, the same for every row."""
        return self.blocks[0].cache.length

    def select(self, rows: Tensor) -> DecoderState:
        """The state with row ``rows[i]`` in place of row i: beams that moved within their segments."""
        blocks = [
            BlockState(b.cache.select(rows), b.memory, b.ttt.select(rows) if b.ttt else None) for b in self.blocks
        ]
        return DecoderState(blocks, self.routing, self.segments, self.beams)

    def keep(self, segments: list[int]) -> DecoderState:
        """The state without the segments that are finished: their rows and their memory leave the batch."""
        rows = torch.tensor([s * self.beams + b for s in segments for b in range(self.beams)])
        rows = rows.to(self.blocks[0].cache.keys.device)
        kept = self.select(rows)
        blocks = [BlockState(b.cache, b.memory.select(segments), b.ttt) for b in kept.blocks]
        return DecoderState(blocks, self.routing.rows(rows) if self.routing else None, len(segments), self.beams)


class Decoder(nn.Module):
    """Token embedding, learned positions, blocks, tied head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.source_vocab_size, config.d_model)
        self._own_tokens = config.source_vocab_size
        self.positions = nn.Parameter(torch.randn(config.max_target_positions, config.d_model) * 0.02)
        self.blocks = nn.ModuleList(Block(config, "decoder", i) for i in range(config.decoder_layers))
        self.norm = nn.LayerNorm(config.d_model)
        self.new_tokens = nn.Embedding(len(config.new_tokens), config.d_model) if config.new_tokens else None
        self.head: nn.Module = TextHead(self.token_embedding, self.new_tokens)

    def forward(
        self, tokens_T: Tensor, layout: Layout, encoded: Encoded, choices: Choices | None = None,
        depths: list[Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """Teacher forcing: flat tokens [T] of all segments, ``layout`` their texts. Returns states x_TD before the head.

        ``choices``: where what the tokens' routers choose is noted. ``depths``: where the states behind each block are.
        """
        x_TD = self._embed(tokens_T, self._places(layout, tokens_T.device))
        for block in self.blocks:
            x_TD = block(x_TD, layout, encoded.routing, (encoded.states_TD, encoded.layout), choices=choices)
            if depths is not None:
                depths.append(x_TD)
        return self.norm(x_TD)

    def start(self, encoded: Encoded, beams: int = 1) -> DecoderState:
        """The state before the first token, ``beams`` rows for each segment."""
        segments = len(encoded.layout)
        rows = segments * beams
        routing = encoded.routing
        if routing is not None:
            routing = routing.rows(torch.arange(segments, device=routing.experts.device).repeat_interleave(beams))
        return DecoderState([self._start(block, encoded, rows) for block in self.blocks], routing, segments, beams)

    def restarted(self, state: DecoderState) -> DecoderState:
        """The state before the first token again; what was computed of the sound is kept."""
        rows = state.segments * state.beams
        blocks = [
            BlockState(replace(old.cache, length=0), old.memory, _fresh_ttt(block, rows))
            for block, old in zip(self.blocks, state.blocks, strict=True)
        ]
        return replace(state, blocks=blocks)

    def extend(self, tokens_Rn: Tensor, state: DecoderState) -> Tensor:
        """n more tokens for each row, [R, n]; advances ``state`` and returns states [R, n, D] before the head."""
        rows, n = tokens_Rn.shape
        end, limit = state.length + n, self.positions.shape[0]
        if end > limit:
            raise ValueError(f"{end} tokens; the decoder has {limit} positions")
        places = torch.arange(state.length, end, device=tokens_Rn.device).repeat(rows)
        x_TD = self._embed(tokens_Rn.flatten(), places)
        layout, beams = Layout([n] * rows), Layout([n * state.beams] * state.segments)
        for block, memory in zip(self.blocks, state.blocks, strict=True):
            x_TD = block.extend(x_TD, layout, state.routing, memory, beams)  # pyright: ignore[reportCallIssue]
        return self.norm(x_TD).view(rows, n, -1)

    def alignment(
        self, tokens_T: Tensor, layout: Layout, encoded: Encoded, heads: list[tuple[int, int]]
    ) -> list[Tensor]:
        """Cross-attention logits of (layer, head) pairs for a teacher-forced text: [heads, tokens, positions] a segment.

        Pairs come out by ascending layer, those of one layer in the order given.
        """
        x_TD = self._embed(tokens_T, self._places(layout, tokens_T.device))
        found: list[list[Tensor]] = [[] for _ in layout.lengths]
        for depth, block in enumerate(self.blocks):
            memory = self._memory(block, encoded)
            wanted = [head for layer, head in heads if layer == depth]
            if wanted:
                for segment, logits in enumerate(block.cross_logits(x_TD, layout, memory, wanted)):  # pyright: ignore[reportCallIssue]
                    found[segment].append(logits)
            x_TD = block(x_TD, layout, encoded.routing, memory)
        return [torch.cat(logits) for logits in found]

    def _places(self, layout: Layout, device: torch.device) -> Tensor:
        longest, limit = max(layout.lengths), self.positions.shape[0]
        if longest > limit:
            raise ValueError(f"a text has {longest} tokens; the decoder has {limit} positions")
        return layout.positions(device)

    def own_logits(self, x_TD: Tensor) -> Tensor:
        """[…, vocabulary] of the source's own tokens, the same to the last bit whether there are new ones or not.

        ``head`` gives those of the new tokens too.
        """
        return self.head(x_TD) if self.new_tokens is None else self.head.own(x_TD)  # pyright: ignore[reportCallIssue]

    def _embed(self, tokens_T: Tensor, places_T: Tensor) -> Tensor:
        if self.new_tokens is None:
            return self.token_embedding(tokens_T) + self.positions[places_T]
        beyond_T = tokens_T - self._own_tokens
        own_TD = self.token_embedding(tokens_T.clamp_max(self._own_tokens - 1))
        added_TD = self.new_tokens(beyond_T.clamp_min(0))
        return torch.where((beyond_T >= 0)[:, None], added_TD, own_TD) + self.positions[places_T]

    def _memory(self, block: nn.Module, encoded: Encoded) -> Memory:
        assert isinstance(block, Block) and block.cross_attn is not None
        return block.cross_attn.memory(encoded.states_TD, encoded.layout)

    def _start(self, block: nn.Module, encoded: Encoded, rows: int) -> BlockState:
        assert isinstance(block, Block)
        heads, width = block.attn.heads, self.positions.shape[1]
        capacity = min(_FIRST_CAPACITY, self.positions.shape[0])
        cache = KeyValueCache.empty(rows, heads, capacity, width // heads, encoded.states_TD)
        return BlockState(cache, self._memory(block, encoded), _fresh_ttt(block, rows))


def _fresh_ttt(block: nn.Module, rows: int) -> TTTState | None:
    return block.ttt.initial_state(rows) if isinstance(block.ttt, TTTMLP) else None
