"""One residual block, encoder or decoder, whose ``forward`` is its residual sum; and what blocks hand on: the encoder to the
decoder, and decoding from step to step.

Self-attention → (decoder: cross-attention to the own segment) → TTT-MLP behind its gate →
(conformer variant: convolution module behind a gate) → feed-forward: dense, or experts,
or both (the dense one is then the shared expert), and a slim adapter beside them.

T tokens of all segments, D width. R rows: S segments with the same number of beams each, rows of a segment side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from typing import Literal, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from whisper_moe.config import ModelConfig
from whisper_moe.model.attention import CrossAttention, CrossAttentionCache, KeyValueCache, SelfAttention, causal
from whisper_moe.model.delta import keeping, narrowed
from whisper_moe.model.fast_weights import FastWeights
from whisper_moe.model.layers import Adapter, ConvolutionModule, FeedForward, Norm
from whisper_moe.model.moe import Experts
from whisper_moe.model.router import Router, Routing
from whisper_moe.model.ttt import TTTMLP, ExpertTTT, TTTState
from whisper_moe.packing import Layout

Source: TypeAlias = "tuple[Tensor, Layout] | CrossAttentionCache"
"""What a decoder block attends to: the encoder's states and where its segments lie, or what was made of them already."""


@dataclass
class Carry:
    """Fast weights on their way through one recording, by encoder layer: what one window leaves to the next."""

    weights: dict[int, FastWeights] = field(default_factory=dict)

    def copy(self) -> Carry:
        """For another try at the same window, which must not learn from the first."""
        return Carry(dict(self.weights))


@dataclass
class BlockState:
    """What one decoder block remembers between steps."""

    cache: KeyValueCache
    cross: CrossAttentionCache
    ttt: TTTState | None = None

    def joined(self, other: BlockState) -> BlockState:
        """The rows of both."""
        assert self.ttt is None and other.ttt is None, "a mini-batch is of one time for all rows"
        return BlockState(self.cache.joined(other.cache), self.cross.joined(other.cross))


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


class BlockOutput(NamedTuple):
    """The states, and what the block's own router chose, if it has one."""

    x_TD: Tensor
    chosen: Routing | None


class Block(nn.Module):
    """A block of the encoder or the decoder at depth ``layer``; the configuration says which parts it carries.

    ``parallel``: a decoder's, of tokens that are all there at once: they attend both ways, and may carry convolutions.
    """

    recompute = False
    """Activation checkpointing (arXiv 1604.06174): a training pass keeps the block's input only, and computes it again."""

    def __init__(
        self, config: ModelConfig, side: Literal["encoder", "decoder"], layer: int, *, parallel: bool = False
    ) -> None:
        super().__init__()
        self.layer = layer
        d, decoder = config.d_model, side == "decoder"
        heads = config.decoder_heads if decoder else config.encoder_heads
        hidden = config.decoder_ffn_dim if decoder else config.encoder_ffn_dim
        adapt, conformer = config.adapted(side, layer), config.conformer if parallel or not decoder else None
        adapted_norms = adapt is not None and adapt.norms
        self.attn_norm = Norm(d, adapted=adapted_norms)
        self.attn = SelfAttention(d, heads, causal=decoder and not parallel)
        self.cross_norm = Norm(d, adapted=adapted_norms) if decoder else None
        self.cross_attn = CrossAttention(d, heads) if decoder else None
        self.ttt = _ttt(config, layer, heads, decoder=decoder)
        self.ttt_norm = nn.LayerNorm(d) if self.ttt is not None else None
        carries = conformer is not None and layer in conformer.encoder_layers
        self.conv = ConvolutionModule(d, conformer.kernel_size) if conformer and carries else None
        self.conv_norm = nn.LayerNorm(d) if carries else None
        self.ffn_norm = Norm(d, adapted=adapted_norms)
        self.adapter = Adapter(d, adapt.adapter_dim) if adapt and adapt.adapter_dim else None
        moe = config.moe if config.routed(side, layer) else None
        self.ffn = FeedForward(d, hidden) if moe is None or moe.shared else None
        self.experts = Experts(d, moe.expert_dim, moe.n_experts) if moe else None
        self.router = Router(d, moe) if moe and moe.scope == "token" else None

    def forward(
        self,
        x_TD: Tensor,
        layout: Layout,
        routing: Routing | None,
        source: Source | None = None,
        carry: Carry | None = None,
        alone: Sequence[bool] = (),
    ) -> BlockOutput:
        """Whole segments at once. ``routing``: one choice per segment; ``source``: what a decoder block attends to.

        ``carry``: the one segment goes on where the recording's window before left the fast weights; it is advanced.
        ``alone``: the segments that the core answers for alone, without what adapts it; they are computed apart.
        """
        compute: Callable[..., BlockOutput] = self._compute
        if self.recompute and torch.is_grad_enabled():
            apart = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
            compute = lambda *args: apart(keeping(self._compute), *args)  # noqa: E731
        if len(set(alone)) < 2:
            output = compute(x_TD, layout, routing, source, carry, not any(alone))
            if any(alone) and torch.is_grad_enabled() and not output.x_TD.requires_grad:
                # The core is frozen: what adapts it gets a gradient of 0, as there is a backward pass in every process.
                idle = compute(x_TD, layout, routing, source, None, True)
                output = output._replace(x_TD=output.x_TD + 0 * idle.x_TD)
            return output
        outputs, cu_seqlens = [], layout.cu_seqlens
        for core, run in groupby(range(len(layout)), key=alone.__getitem__):
            segments = list(run)
            part = Layout(layout.lengths[i] for i in segments)
            own = routing and routing.rows(torch.tensor(segments, device=x_TD.device))
            rows = slice(cu_seqlens[segments[0]], cu_seqlens[segments[-1] + 1])
            with narrowed(rows):
                outputs.append(compute(x_TD[rows], part, own, None, None, not core))
        chosen = [output.chosen for output in outputs if output.chosen is not None]
        return BlockOutput(torch.cat([output.x_TD for output in outputs]), Routing.cat(chosen) if chosen else None)

    def _compute(
        self,
        x_TD: Tensor,
        layout: Layout,
        routing: Routing | None,
        source: Source | None,
        carry: Carry | None,
        adapted: bool,
    ) -> BlockOutput:
        """The residual sum."""
        x_TD = x_TD + self.attn(self.attn_norm(x_TD, adapted), layout)
        if self.cross_attn is not None and self.cross_norm is not None:
            assert source is not None, "a decoder block needs the encoder's states"
            cache = source if isinstance(source, CrossAttentionCache) else self.cross_attn.cache(*source)
            x_TD = x_TD + self.cross_attn(self.cross_norm(x_TD), layout, cache)
        whose = adapted and (routing is not None or not isinstance(self.ttt, ExpertTTT))  # a base alone has no expert's
        if self.ttt is not None and self.ttt_norm is not None and whose and not self.ttt.skippable():
            x_TD = x_TD + self._learn(self.ttt_norm(x_TD), layout, routing, carry)
        if self.conv is not None and self.conv_norm is not None:
            x_TD = x_TD + self.conv(self.conv_norm(x_TD), layout)
        return self._feed_forward(x_TD, layout, routing, adapted)

    def extend(
        self,
        x_TD: Tensor,
        layout: Layout,
        routing: Routing | None,
        state: BlockState,
        beams: Layout,
        mask: Tensor | None = None,
    ) -> Tensor:
        """n more tokens for each row; ``layout`` has a segment for each row, ``beams`` one for all of a segment's.

        ``mask``: see :meth:`~whisper_moe.model.attention.SelfAttention.extend`.
        """
        assert self.cross_attn is not None and self.cross_norm is not None
        x_TD = x_TD + self.attn.extend(self.attn_norm(x_TD), state.cache, mask)
        x_TD = x_TD + self.cross_attn(self.cross_norm(x_TD), beams, state.cross)
        if isinstance(self.ttt, TTTMLP) and self.ttt_norm is not None and not self.ttt.skippable():
            assert state.ttt is not None
            update, state.ttt = self.ttt.extend(self.ttt_norm(x_TD).view(len(layout), -1, x_TD.shape[1]), state.ttt)
            x_TD = x_TD + update.flatten(0, 1)
        return self._feed_forward(x_TD, layout, routing).x_TD

    def start(self, rows: int, capacity: int, source: tuple[Tensor, Layout]) -> BlockState:
        """The state of a decoder block before the first token."""
        assert self.cross_attn is not None
        states_TD, layout = source
        cache = KeyValueCache.empty(rows, self.attn.heads, capacity, states_TD.shape[1] // self.attn.heads, states_TD)
        return self.restarted(BlockState(cache, self.cross_attn.cache(states_TD, layout)))

    def restarted(self, state: BlockState) -> BlockState:
        """The state before the first token again; what was computed of the sound is kept."""
        ttt = self.ttt.initial_state(state.cache.keys.shape[0]) if isinstance(self.ttt, TTTMLP) else None
        return BlockState(replace(state.cache, length=0), state.cross, ttt)

    def cross_logits(
        self, x_TD: Tensor, layout: Layout, source: tuple[Tensor, Layout], heads: list[int]
    ) -> list[Tensor]:
        """Cross-attention logits of some heads on what enters this block, one [heads, tokens, positions] a segment."""
        assert self.cross_attn is not None and self.cross_norm is not None
        x_TD = x_TD + self.attn(self.attn_norm(x_TD), layout)
        return self.cross_attn.logits(self.cross_norm(x_TD), layout, self.cross_attn.cache(*source), heads)

    def _learn(self, x_TD: Tensor, layout: Layout, routing: Routing | None, carry: Carry | None) -> Tensor:
        if isinstance(self.ttt, ExpertTTT):
            assert routing is not None and carry is None
            return self.ttt(x_TD, layout, routing)
        assert self.ttt is not None
        if carry is None:
            return self.ttt(x_TD, layout)
        assert len(layout) == 1, "windows of a recording follow one another; they cannot share a pack"
        update, carry.weights[self.layer] = self.ttt.forward_carry(x_TD, carry.weights.get(self.layer))
        return update

    def _feed_forward(self, x_TD: Tensor, layout: Layout, routing: Routing | None, adapted: bool = True) -> BlockOutput:
        normed_TD = self.ffn_norm(x_TD, adapted)
        if self.ffn is not None:
            x_TD = x_TD + self.ffn(normed_TD)
        if self.adapter is not None and adapted:
            x_TD = x_TD + self.adapter(normed_TD)
        if self.experts is None:
            return BlockOutput(x_TD, None)
        if self.router is not None:
            chosen = self.router(normed_TD)
            return BlockOutput(x_TD + self.experts(normed_TD, chosen), chosen)
        assert routing is not None, "experts that are chosen per segment need the router's choice"
        return BlockOutput(x_TD + self.experts(normed_TD, routing, layout), None)


def listed(blocks: Iterable[Block]) -> Sequence[Block]:
    """A ``ModuleList``, by the type that it would have if it could say what it holds."""
    return cast("Sequence[Block]", nn.ModuleList(blocks))


def _ttt(config: ModelConfig, layer: int, heads: int, *, decoder: bool) -> TTTMLP | ExpertTTT | None:
    ttt = config.ttt
    if ttt is None or layer not in (ttt.decoder_layers if decoder else ttt.encoder_layers):
        return None
    if ttt.per_expert and config.moe:
        experts = config.moe.n_experts
        return ExpertTTT(experts, config.d_model, heads, mini_batch=ttt.mini_batch, base_lr=ttt.base_lr)
    return TTTMLP(config.d_model, heads, mini_batch=ttt.mini_batch, base_lr=ttt.base_lr, causal=decoder)
