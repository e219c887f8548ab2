"""One residual block, encoder or decoder; its ``forward`` is its residual sum.

Self-attention → (decoder: cross-attention to the own segment) → TTT-MLP behind its gate →
(conformer variant: convolution module behind a gate) → feed-forward: dense, or experts,
or both (the dense one is then the shared expert), and a slim adapter beside them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from whisper_moe.config import ModelConfig
from whisper_moe.model.adapt import Adapted, AdaptedNorm, Adapter
from whisper_moe.model.attention import CrossAttention, KeyValueCache, Memory, SelfAttention
from whisper_moe.model.conformer import ConvolutionModule
from whisper_moe.model.fast_weights import FastWeights
from whisper_moe.model.feed_forward import FeedForward
from whisper_moe.model.moe import Experts
from whisper_moe.model.router import Choices, Router, Routing
from whisper_moe.model.ttt import TTTMLP, ExpertTTT, TTTState
from whisper_moe.packing import Layout

Source: TypeAlias = "tuple[Tensor, Layout]"
"""The encoder's states and where its segments lie: what a decoder block makes keys and values of."""


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
    memory: Memory
    ttt: TTTState | None = None


def _ttt(config: ModelConfig, side: Literal["encoder", "decoder"], layer: int) -> TTTMLP | ExpertTTT | None:
    ttt, decoder = config.ttt, side == "decoder"
    if ttt is None or layer not in (ttt.decoder_layers if decoder else ttt.encoder_layers):
        return None
    heads = config.decoder_heads if decoder else config.encoder_heads
    if ttt.per_expert and config.moe:
        experts = config.moe.n_experts
        return ExpertTTT(experts, config.d_model, heads, mini_batch=ttt.mini_batch, base_lr=ttt.base_lr)
    return TTTMLP(config.d_model, heads, mini_batch=ttt.mini_batch, base_lr=ttt.base_lr, causal=decoder)


class Block(nn.Module):
    """A block of the encoder or the decoder at depth ``layer``; the configuration says which parts it carries."""

    recompute = False
    """Activation checkpointing (arXiv 1604.06174): a training pass keeps the block's input only, and computes it again."""

    def __init__(self, config: ModelConfig, side: Literal["encoder", "decoder"], layer: int) -> None:
        super().__init__()
        self.layer = layer
        d, decoder = config.d_model, side == "decoder"
        heads = config.decoder_heads if decoder else config.encoder_heads
        hidden = config.decoder_ffn_dim if decoder else config.encoder_ffn_dim
        adapt = config.adapted(side, layer)
        norm = partial(AdaptedNorm, always=adapt.full_windows) if adapt and adapt.norms else nn.LayerNorm
        self.attn_norm = norm(d)
        self.attn = SelfAttention(d, heads, causal=decoder)
        self.cross_norm = norm(d) if decoder else None
        self.cross_attn = CrossAttention(d, heads) if decoder else None
        self.ttt = _ttt(config, side, layer)
        self.ttt_norm = nn.LayerNorm(d) if self.ttt is not None else None
        conformer = config.conformer if not decoder else None
        carries = conformer is not None and layer in conformer.encoder_layers
        self.conv = ConvolutionModule(d, conformer.kernel_size) if conformer and carries else None
        self.conv_norm = nn.LayerNorm(d) if carries else None
        self.ffn_norm = norm(d)
        self.adapter = Adapter(d, adapt.adapter_dim) if adapt and adapt.adapter_dim else None
        moe = config.moe if config.routed(side, layer) else None
        self.ffn = FeedForward(d, hidden) if moe is None or moe.shared else None
        self.experts = Experts(d, moe.expert_dim, moe.n_experts) if moe else None
        self.router = None
        if moe and moe.scope == "token":
            self.router = Router(d, moe.n_experts, moe.top_k, moe.none_choice, biased=moe.balance_bias)

    def forward(
        self, x_TD: Tensor, layout: Layout, routing: Routing | None, memory: Memory | Source | None = None,
        carry: Carry | None = None, choices: Choices | None = None, adapted: Adapted = True,
    ) -> Tensor:  # fmt: skip
        """Whole segments at once. ``routing``: one choice per segment; ``memory``: what a decoder block attends to.
        ``adapted``: the tokens that norms' differences, the adapter and the TTT layer change.

        ``carry``: the one segment goes on where the recording's window before left the fast weights; it is advanced.
        ``choices``: where the choice of this block's own router, if it has one, is noted.
        """
        if self.recompute and torch.is_grad_enabled():
            x_TD, chosen = checkpoint(
                self._compute,
                x_TD,
                layout,
                routing,
                memory,
                carry,
                adapted,
                use_reentrant=False,
                preserve_rng_state=False,
            )  # pyright: ignore[reportGeneralTypeIssues]
        else:
            x_TD, chosen = self._compute(x_TD, layout, routing, memory, carry, adapted)
        if choices is not None and chosen is not None:
            choices.made.append(chosen)
        return x_TD

    def _compute(
        self, x_TD: Tensor, layout: Layout, routing: Routing | None, memory: Memory | Source | None, carry: Carry | None,
        adapted: Adapted,
    ) -> tuple[Tensor, Routing | None]:  # fmt: skip
        """The residual sum, and what this block's own router chose."""
        x_TD = x_TD + self.attn(_normed(self.attn_norm, x_TD, adapted), layout)
        if self.cross_attn is not None and self.cross_norm is not None:
            assert memory is not None, "a decoder block needs the encoder's states"
            memory = memory if isinstance(memory, Memory) else self.cross_attn.memory(*memory)
            x_TD = x_TD + self.cross_attn(self.cross_norm(x_TD), layout, memory)
        if self.ttt is not None and self.ttt_norm is not None and adapted is not False and not self.ttt.skippable():
            x_TD = x_TD + _kept(self._adapt(self.ttt_norm(x_TD), layout, routing, carry), adapted)
        if self.conv is not None and self.conv_norm is not None:
            x_TD = x_TD + self.conv(self.conv_norm(x_TD), layout)
        return self._feed_forward(x_TD, layout, routing, adapted)

    def extend(self, x_TD: Tensor, layout: Layout, routing: Routing | None, state: BlockState, beams: Layout) -> Tensor:
        """n more tokens for each row; ``layout`` has a segment for each row, ``beams`` one for each of the memory's."""
        assert self.cross_attn is not None and self.cross_norm is not None
        x_TD = x_TD + self.attn.extend(self.attn_norm(x_TD), state.cache)
        x_TD = x_TD + self.cross_attn(self.cross_norm(x_TD), beams, state.memory)
        if isinstance(self.ttt, TTTMLP) and self.ttt_norm is not None and not self.ttt.skippable():
            assert state.ttt is not None
            update, state.ttt = self.ttt.extend(self.ttt_norm(x_TD).view(len(layout), -1, x_TD.shape[1]), state.ttt)
            x_TD = x_TD + update.flatten(0, 1)
        return self._feed_forward(x_TD, layout, routing)[0]

    def _adapt(self, x_TD: Tensor, layout: Layout, routing: Routing | None, carry: Carry | None) -> Tensor:
        if isinstance(self.ttt, ExpertTTT):
            assert routing is not None and carry is None
            return self.ttt(x_TD, layout, routing)
        assert self.ttt is not None
        if carry is None:
            return self.ttt(x_TD, layout)
        assert len(layout) == 1, "windows of a recording follow one another; they cannot share a pack"
        update, carry.weights[self.layer] = self.ttt.forward_carry(x_TD, carry.weights.get(self.layer))
        return update

    def cross_logits(self, x_TD: Tensor, layout: Layout, memory: Memory, heads: list[int]) -> list[Tensor]:
        """Cross-attention logits of some heads on what enters this block, one [heads, tokens, positions] a segment."""
        assert self.cross_attn is not None and self.cross_norm is not None
        x_TD = x_TD + self.attn(self.attn_norm(x_TD), layout)
        return self.cross_attn.logits(self.cross_norm(x_TD), layout, memory, heads)

    def _feed_forward(
        self, x_TD: Tensor, layout: Layout, routing: Routing | None, adapted: Adapted = True
    ) -> tuple[Tensor, Routing | None]:
        """Its residual sum, and the choice of this block's own router, if it has one."""
        normed, chosen = _normed(self.ffn_norm, x_TD, adapted), None
        if self.ffn is not None:
            x_TD = x_TD + self.ffn(normed)
        if self.adapter is not None and adapted is not False:
            x_TD = x_TD + _kept(self.adapter(normed), adapted)
        if self.experts is None:
            return x_TD, chosen
        if self.router is not None:
            chosen = self.router(normed)
            return x_TD + self.experts(normed, chosen), chosen
        assert routing is not None, "experts that are chosen per segment need the router's choice"
        return x_TD + self.experts(normed, routing, layout), chosen


def _normed(norm: nn.Module, x_TD: Tensor, adapted: Adapted) -> Tensor:
    return norm(x_TD, adapted) if isinstance(norm, AdaptedNorm) else norm(x_TD)


def _kept(update_TD: Tensor, adapted: Adapted) -> Tensor:
    """An update of the tokens that are adapted, exactly 0 for the others."""
    return update_TD if isinstance(adapted, bool) else torch.where(adapted, update_TD, 0)
