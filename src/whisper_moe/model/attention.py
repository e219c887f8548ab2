"""Attention that never crosses a segment (Vaswani et al. 2017; Whisper's variant: ``k_proj`` has no bias).

Shapes: T tokens (all segments, flat), D width, H heads, R rows of a decoding batch, n new tokens a row, dh = D / H.
Projections run on the flat tensor; only the product of queries and keys looks at the layout, one segment at a time. On a
CPU this beats a masked product over the whole pack several times, and it works on any device. The masked form is the
tests' oracle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whisper_moe.packing import Layout

ROOM = 32
"""Columns that a cache has left when rows have joined it."""
SHORT = 64
"""Segments of one length up to here are attended to in one product; of longer ones each call is work enough. In training, where
a call costs more, those of lengths up to the next power of two are, padded."""


def attended_together(
    q_THd: Tensor, k_THd: Tensor, v_THd: Tensor, queries: Layout, keys: Layout, *, causal: bool
) -> Tensor:
    """Every segment's attention in one product over segments that are padded to the longest, [T, H, dh].

    Written out: on a CPU the gradient of the fused form costs five times as much in bfloat16.
    """
    device = q_THd.device
    (nq, nk), ids = (max(queries.lengths), max(keys.lengths)), queries.segment_ids(device)
    places_q = ids * nq + queries.positions(device)
    places_k = keys.segment_ids(device) * nk + keys.positions(device)
    q, k, v = (
        x.new_zeros(len(queries) * n, *x.shape[1:]).index_copy(0, places, x).unflatten(0, (-1, n)).transpose(1, 2)
        for x, n, places in ((q_THd, nq, places_q), (k_THd, nk, places_k), (v_THd, nk, places_k))
    )
    real_S11k = (torch.arange(nk, device=device) < torch.tensor(keys.lengths, device=device)[:, None])[:, None, None]
    mask = real_S11k & torch.ones(nq, nk, dtype=torch.bool, device=device).tril() if causal else real_S11k
    logits_SHqk = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, float("-inf"))
    return (logits_SHqk.softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(0, 1)[places_q]


def attended(
    q: Sequence[Tensor], k: Sequence[Tensor], v: Sequence[Tensor], biases: Sequence[Tensor | None] = (), *, causal: bool
) -> Tensor:
    """Every segment's attention, [T, H, dh], of its parts [1, H, n, dh]; in training, of short ones of about one length in one
    product. Parts of a split, not slices: each slice's gradient would be as large as the whole."""
    each = list(zip(q, k, v, biases or (None,) * len(q), strict=True))

    def alone(place: int) -> Tensor:
        one, key, value, bias = each[place]
        return F.scaled_dot_product_attention(one, key, value, attn_mask=bias, is_causal=causal)[0].transpose(0, 1)

    if biases or not torch.is_grad_enabled():
        return torch.cat([alone(place) for place in range(len(each))])
    groups: dict[int, list[int]] = {}
    for place, longest in enumerate(max(one.shape[2], key.shape[2]) for one, key, _, _ in each):
        groups.setdefault((longest - 1).bit_length() if longest <= SHORT else -1 - place, []).append(place)
    mixed = dict[int, Tensor]()
    for places in groups.values():
        if len(places) == 1:
            mixed[places[0]] = alone(places[0])
            continue
        own, read = (Layout(parts[place].shape[2] for place in places) for parts in (q, k))
        some = (torch.cat([parts[place] for place in places], 2)[0].transpose(0, 1) for parts in (q, k, v))
        q_THd, k_THd, v_THd = some
        together = attended_together(q_THd, k_THd, v_THd, own, read, causal=causal)
        mixed |= zip(places, together.split(own.lengths), strict=True)
    return torch.cat([mixed[place] for place in range(len(each))])


def causal(n: int, past: int, device: torch.device) -> Tensor:
    """What n tokens behind so many others may look at, [n, past + n]."""
    return torch.ones(n, past + n, dtype=torch.bool, device=device).tril(past)


@dataclass
class KeyValueCache:
    """Self-attention keys and values of the tokens decoded so far, [R, H, capacity, dh] each; ``length`` are filled."""

    keys: Tensor
    values: Tensor
    length: int = 0

    @classmethod
    def empty(cls, rows: int, heads: int, capacity: int, head_dim: int, like: Tensor) -> KeyValueCache:
        shape = (rows, heads, capacity, head_dim)
        return cls(like.new_empty(shape), like.new_empty(shape))

    def extended(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append [R, H, n, dh] keys and values; returns all of them, new ones included. Grows by doubling."""
        end = self.length + keys.shape[2]
        if end > self.keys.shape[2]:
            room = (0, 0, 0, max(end, 2 * self.keys.shape[2]) - self.keys.shape[2])
            self.keys, self.values = F.pad(self.keys, room), F.pad(self.values, room)
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def select(self, rows: Tensor, first: int = 0) -> KeyValueCache:
        """The cache with these rows, in this order: beams that moved, finished rows that left. Without the columns before
        ``first``."""
        keys, values = (part.index_select(0, rows)[:, :, first:] for part in (self.keys, self.values))
        return KeyValueCache(keys, values, self.length - first)

    def joined(self, other: KeyValueCache) -> KeyValueCache:
        """The rows of both, which end in the same column; what is before a shorter one's first is 0."""
        length = max(self.length, other.length)

        def both(one: Tensor, more: Tensor) -> Tensor:
            parts = ((one, self.length), (more, other.length))
            return torch.cat([F.pad(part[:, :, :own], (0, 0, length - own, ROOM)) for part, own in parts])

        return KeyValueCache(both(self.keys, other.keys), both(self.values, other.values), length)


@dataclass(frozen=True)
class CrossAttentionCache:
    """Keys and values of the encoder's states, one [1, H, positions, dh] pair a segment; all its beams read them."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...] = ()
    """[tokens, positions] a segment, added before the softmax: where its tokens are expected to look."""

    def select(self, segments: list[int]) -> CrossAttentionCache:
        return CrossAttentionCache(tuple(self.keys[i] for i in segments), tuple(self.values[i] for i in segments))

    def joined(self, other: CrossAttentionCache) -> CrossAttentionCache:
        """The segments of both."""
        return CrossAttentionCache(self.keys + other.keys, self.values + other.values)


class SelfAttention(nn.Module):
    """Multi-head self-attention with one fused projection to queries, keys and values."""

    def __init__(self, d_model: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.out = nn.Linear(d_model, d_model)
        with torch.no_grad():  # Whisper has no bias on the keys; softmax is blind to one, so it never gets a gradient.
            self.qkv.bias[d_model : 2 * d_model] = 0

    def forward(self, x_TD: Tensor, layout: Layout) -> Tensor:
        """Every token attends to its own segment, to its past only if ``causal``."""
        qkv = self.qkv(x_TD).unflatten(-1, (3, self.heads, -1))
        if len(layout) > 1 and max(layout.lengths) == min(layout.lengths) <= SHORT:
            q, k, v = qkv.unflatten(0, (len(layout), -1)).permute(2, 0, 3, 1, 4)
            mixed_SHnd = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
            return self.out(mixed_SHnd.transpose(1, 2).reshape(len(x_TD), -1))  # of fewer heads, where they are cut
        q, k, v = zip(*(part.permute(1, 2, 0, 3).unsqueeze(1) for part in qkv.split(layout.lengths)), strict=True)
        return self.out(attended(q, k, v, causal=self.causal).flatten(1))

    def extend(self, x_TD: Tensor, cache: KeyValueCache, mask: Tensor | None = None) -> Tensor:
        """n more tokens for each of the cache's R rows, x_TD = [R * n, D] with a row's tokens together.

        ``mask``: what they may look at, [R, 1, n, columns]; None for all tokens of their row before them.
        """
        rows = cache.keys.shape[0]
        q, k, v = self.qkv(x_TD).view(rows, -1, 3, self.heads, cache.keys.shape[3]).permute(2, 0, 3, 1, 4)
        past, n = cache.length, q.shape[2]
        keys, values = cache.extended(k, v)
        mask = causal(n, past, x_TD.device) if mask is None and n > 1 else mask
        mixed = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        return self.out(mixed.transpose(1, 2).reshape(x_TD.shape))


class CrossAttention(nn.Module):
    """Attention from decoder tokens to the encoder's states of the same segment."""

    def __init__(self, d_model: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(d_model, d_model)
        self.kv = nn.Linear(d_model, 2 * d_model)
        self.out = nn.Linear(d_model, d_model)
        with torch.no_grad():
            self.kv.bias[:d_model] = 0

    def cache(self, states_TD: Tensor, layout: Layout) -> CrossAttentionCache:
        """Keys and values of every segment, computed once and read at every decoding step."""
        kv = self.kv(states_TD).unflatten(-1, (2, self.heads, -1))
        pairs = [part.permute(1, 2, 0, 3).unsqueeze(1).contiguous() for part in kv.split(layout.lengths)]
        return CrossAttentionCache(tuple(pair[0] for pair in pairs), tuple(pair[1] for pair in pairs))

    def forward(self, x_TD: Tensor, layout: Layout, cache: CrossAttentionCache) -> Tensor:
        """``layout`` gives each segment's tokens in x_TD: one teacher-forced text, or the new tokens of all its beams."""
        q_THd = self.q(x_TD).unflatten(-1, (self.heads, -1))
        q = [part.transpose(0, 1)[None] for part in q_THd.split(layout.lengths)]
        return self.out(attended(q, cache.keys, cache.values, cache.biases, causal=False).flatten(1))

    def logits(self, x_TD: Tensor, layout: Layout, cache: CrossAttentionCache, heads: list[int]) -> list[Tensor]:
        """Scaled products of queries and keys, before softmax, [heads, tokens, positions] a segment: for alignment."""
        q_THd = self.q(x_TD).unflatten(-1, (self.heads, -1))
        scale = q_THd.shape[-1] ** -0.5
        return [
            q_nHd[:, heads].transpose(0, 1) @ k[0, heads].transpose(1, 2) * scale
            for q_nHd, k in zip(q_THd.split(layout.lengths), cache.keys, strict=True)
        ]
