"""Attention as its definition reads: every product over the whole pack, then a boolean mask.

Slow, and dependent on nothing but the weights and where segments lie; the oracle for attention that loops over segments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from whisper_moe.model.attention import CrossAttention, SelfAttention
from whisper_moe.packing import Layout


def same_segment(queries: Layout, keys: Layout) -> Tensor:
    """[queries, keys] bool: whether both belong to one segment."""
    segment = [torch.tensor([i for i, n in enumerate(layout.lengths) for _ in range(n)]) for layout in (queries, keys)]
    return segment[0][:, None] == segment[1]


def masked_self_attention(attention: SelfAttention, x_TD: Tensor, layout: Layout) -> Tensor:
    mask = same_segment(layout, layout)
    if attention.causal:
        mask = mask.tril()
    q, k, v = attention.qkv(x_TD).chunk(3, dim=-1)
    return attention.out(_mixed(q, k, v, mask, attention.heads))


def masked_cross_attention(
    attention: CrossAttention, x_TD: Tensor, layout: Layout, states_TD: Tensor, states_layout: Layout
) -> Tensor:
    mask = same_segment(layout, states_layout)
    q = attention.q(x_TD)
    k, v = attention.kv(states_TD).chunk(2, dim=-1)
    return attention.out(_mixed(q, k, v, mask, attention.heads))


def _mixed(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, heads: int) -> Tensor:
    weights = _logits(q, k, mask, heads).softmax(-1)
    return torch.cat([w @ own for w, own in zip(weights, v.chunk(heads, dim=-1), strict=True)], dim=-1)


def _logits(q: Tensor, k: Tensor, mask: Tensor, heads: int) -> Tensor:
    scale = (q.shape[-1] // heads) ** -0.5
    pairs = zip(q.chunk(heads, dim=-1), k.chunk(heads, dim=-1), strict=True)
    return torch.stack([(a @ b.T * scale).masked_fill(~mask, -torch.inf) for a, b in pairs])
