"""TTT-MLP: a sequence layer whose hidden state is an MLP that learns while it reads (arXiv 2407.04620, section 2).

The causal form is the paper's dual form. The bidirectional form follows ttt-video (arXiv 2504.05298, section 3): every
token of a mini-batch sees every other, and the same weights also read the reversed segment, behind a gate of their own.
Differences from the paper's code: no convolution before q and k, no output gate besides tanh(α), and no learned token
position factor in the bidirectional form. The mathematics of a mini-batch is in :mod:`whisper_moe.model.fast_weights`.

Shapes: T tokens of all segments, D width, R rows (one direction of one segment), H heads, d = D / H, b mini-batch.
A *chunk* is one mini-batch of one row; C counts them over all rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whisper_moe.model import fast_weights
from whisper_moe.model.fast_weights import FastWeights, Norm, Tokens, causal_step, commit, empty_gradients
from whisper_moe.model.router import Routing
from whisper_moe.packing import Layout

ROPE_BASE = 10_000.0
INIT_STD = 0.02


@dataclass(frozen=True, slots=True)
class ChunkPlan:
    """Where the tokens of a layout go when every row is cut into mini-batches.

    Chunks are in order of time, then of decreasing row length: the rows that still have tokens are always the first
    ones, so that no chunk consists of padding alone.
    """

    tokens: int
    """T"""
    active: tuple[int, ...]
    """Rows that have an i-th chunk, for each i; the sum is C."""
    source: Tensor
    """[C, b] int64, the flat token behind each slot. Slots past a row's end repeat the row's last token."""
    valid: Tensor
    """[C, b] bool, False past a row's end."""
    place: Tensor
    """[directions * T] int64, the slot (of C * b) of each token: all of the forward direction, then of the reversed."""

    @property
    def times(self) -> list[slice]:
        """The chunks that are read at the same time, from first to last."""
        ends = list(accumulate(self.active))
        return [slice(end - count, end) for count, end in zip(self.active, ends, strict=True)]

    def cut(self, x_TGHd: Tensor, chunks: slice) -> Tensor:
        """Flat tokens to some chunks, [G, C, H, b, d]: one gather that splits off groups and heads as well."""
        _, groups, heads, d = x_TGHd.shape
        group, head = (torch.arange(n, device=x_TGHd.device) for n in (groups, heads))
        index = (self.source[chunks, None] * groups + group[:, None, None, None]) * heads + head[:, None]
        return x_TGHd.reshape(-1, d).index_select(0, index.flatten()).view(*index.shape, d)

    def restore(self, z_CHbd: Tensor) -> Tensor:
        """Chunks to flat tokens with their heads side by side, [directions, T, D]."""
        _, heads, b, d = z_CHbd.shape
        chunk, slot = self.place // b, self.place % b
        index = (chunk[:, None] * heads + torch.arange(heads, device=chunk.device)) * b + slot[:, None]
        return z_CHbd.reshape(-1, d).index_select(0, index.flatten()).view(-1, self.tokens, heads * d)


def plan_chunks(layout: Layout, mini_batch: int, directions: int, device: torch.device) -> ChunkPlan:
    """Cut ``layout`` into mini-batches; with two directions, each segment is also a row that runs backwards."""
    lengths = sorted(layout.lengths * directions, reverse=True)
    order = sorted(range(len(lengths)), key=lambda row: -layout.lengths[row % len(layout)])
    active = tuple(sum(length > start for length in lengths) for start in range(0, lengths[0], mini_batch))
    row = torch.tensor([r for count in active for r in order[:count]])
    chunk = torch.repeat_interleave(torch.arange(len(active)), torch.tensor(active))
    segment, backward = row % len(layout), row >= len(layout)
    start, length = (torch.tensor(values)[segment, None] for values in (layout.cu_seqlens[:-1], layout.lengths))
    position = chunk[:, None] * mini_batch + torch.arange(mini_batch)
    valid = position < length
    position = position.minimum(length - 1)
    source = start + torch.where(backward[:, None], length - 1 - position, position)
    slots = (source + backward[:, None] * layout.total)[valid]
    place = torch.empty(directions * layout.total, dtype=torch.int64)
    place[slots] = valid.flatten().nonzero().squeeze(1)
    return ChunkPlan(layout.total, active, source.to(device), valid.to(device), place.to(device))


@dataclass(frozen=True, slots=True)
class TTTState:
    """The memory of a causal layer while it decodes: committed fast weights, and the mini-batch that is still open.

    Every row has read the same number of tokens. States are values: no call changes one in place. Rows share one copy
    of the fast weights until the first commit, so up to b tokens cost no copies of them.
    """

    weights: FastWeights
    opened: fast_weights.Gradients
    """Of fewer than b tokens."""

    def select(self, rows: Tensor) -> TTTState:
        """The state whose row i is this one's row ``rows[i]`` (int64, [R']): for beams and for rows that have ended."""
        return TTTState(self.weights.select(rows), self.opened.select(rows))


def rotate(x: Tensor, first: int) -> Tensor:
    """Rotary position embedding of adjacent pairs (arXiv 2104.09864); x [..., n, d] is at first to first + n."""
    n, d = x.shape[-2:]
    frequencies = ROPE_BASE ** (-torch.arange(0, d, 2, device=x.device, dtype=x.dtype) / d)
    angles = torch.arange(first, first + n, device=x.device, dtype=x.dtype)[:, None] * frequencies
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


class TTTMLP(nn.Module):
    """A TTT-MLP layer with its gate: ``h + ttt(ttt_norm(h))`` is the whole residual branch.

    It starts as the identity and alive: the gate α is 0, so the output is exactly 0, and ``out`` is random, so that α
    has a gradient. Give gates and fast weights a parameter group of their own (a larger rate, no weight decay).
    """

    tau: nn.Parameter | None
    """τ [b], causal only: a learned change of 1/t."""
    gate_backward: nn.Parameter | None
    """α of the reversed direction [D], bidirectional only."""

    def __init__(self, d_model: int, n_heads: int, *, mini_batch: int, base_lr: float = 0.1, causal: bool) -> None:
        """``mini_batch`` tokens share one gradient step; ``base_lr`` is η_base. Raises ``ValueError`` for odd heads."""
        super().__init__()
        if d_model % n_heads or (d_model // n_heads) % 2:
            raise ValueError(f"TTT needs heads of equal, even width (RoPE); {d_model} in {n_heads} heads is not")
        if mini_batch < 1:
            raise ValueError(f"a TTT mini-batch has at least one token; got {mini_batch}")
        self.n_heads, self.mini_batch, self.base_lr, self.causal = n_heads, mini_batch, base_lr, causal
        d, hidden = d_model // n_heads, 4 * d_model // n_heads
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.rate = nn.Linear(d_model, n_heads)
        self.tau = nn.Parameter(torch.empty(mini_batch)) if causal else None
        self.w1 = nn.Parameter(torch.empty(n_heads, d, hidden))
        self.b1 = nn.Parameter(torch.empty(n_heads, 1, hidden))
        self.w2 = nn.Parameter(torch.empty(n_heads, hidden, d))
        self.b2 = nn.Parameter(torch.empty(n_heads, 1, d))
        self.gamma = nn.Parameter(torch.empty(n_heads, 1, d))
        self.beta = nn.Parameter(torch.empty(n_heads, 1, d))
        self.post_norm = nn.LayerNorm(d_model, eps=fast_weights.LN_EPS)
        self.out = nn.Linear(d_model, d_model, bias=False)
        self.gate_forward = nn.Parameter(torch.empty(d_model))
        self.gate_backward = None if causal else nn.Parameter(torch.empty(d_model))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The start of the paper (W and w_h ~ N(0, 0.02), the rest neutral), with closed gates."""
        for weight in (self.qkv.weight, self.rate.weight, self.out.weight, self.w1, self.w2):
            nn.init.normal_(weight, std=INIT_STD)
        for zero in (self.rate.bias, self.b1, self.b2, self.beta, self.gate_forward, self.gate_backward, self.tau):
            if zero is not None:
                nn.init.zeros_(zero)
        nn.init.ones_(self.gamma)
        self.post_norm.reset_parameters()

    def skippable(self) -> bool:
        """Whether the output is known to be 0 and nobody needs its gradient: inference, and gates of exactly 0."""
        if self.training or torch.is_grad_enabled():
            return False
        return not any(gate.any() for gate in (self.gate_forward, self.gate_backward) if gate is not None)

    def forward(self, x_TD: Tensor, layout: Layout) -> Tensor:
        """The gated update of every token, [T, D] in x's dtype; each segment starts from the learned fast weights."""
        assert x_TD.shape[0] == layout.total, (x_TD.shape, layout)
        if self.skippable():
            return torch.zeros_like(x_TD)
        return self._run(x_TD, layout, self._learned())[0]

    def forward_carry(self, x_TD: Tensor, carried: FastWeights | None) -> tuple[Tensor, FastWeights]:
        """One window of one recording, in order: the forward direction goes on from the window before. Not if causal.

        ``carried`` is what the call for the window before returned, None for the first. Everything else restarts: the
        reversed direction begins at the learned fast weights, RoPE at 0. Windows of a multiple of b tokens equal one
        long sequence (forward direction). Returns the update [T, D] and the fast weights to carry.
        """
        assert not self.causal
        learned = self._learned()
        carried = carried or learned
        if self.skippable():
            return torch.zeros_like(x_TD), carried
        y, end = self._run(x_TD, Layout([x_TD.shape[0]]), carried.stack(learned))
        return y, end.first(1)

    def initial_state(self, rows: int) -> TTTState:
        """The decoding state of ``rows`` sequences that have read nothing yet."""
        weights = self._learned()
        return TTTState(weights, empty_gradients(rows, weights))

    def extend(self, x_RTD: Tensor, state: TTTState) -> tuple[Tensor, TTTState]:
        """The next n tokens of every row, [R, n, D]; a mini-batch that becomes full is committed.

        Equals the last n outputs of :meth:`forward` over all tokens so far. Raises ``ValueError`` if not causal.
        """
        if not self.causal:
            raise ValueError("a bidirectional TTT layer reads whole segments; only a causal one decodes step by step")
        assert x_RTD.shape[0] == state.opened.rows, (x_RTD.shape, state.opened.rows)
        if self.skippable():
            return torch.zeros_like(x_RTD), state
        outputs = []
        while x_RTD.shape[1]:
            fitting, x_RTD = x_RTD.tensor_split([self.mini_batch - state.opened.length], dim=1)
            z, state = self._advance(fitting, state)
            outputs.append(z)
        return self._gated(torch.cat(outputs, dim=1), self.gate_forward), state

    def _advance(self, x_RTD: Tensor, state: TTTState) -> tuple[Tensor, TTTState]:
        """Tokens that fit into the open mini-batch."""
        qkv, rate = self._project(x_RTD)
        with _no_autocast(x_RTD):
            heads = qkv.unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
            tokens = _tokens(heads, rate.mT[..., None], first=state.opened.length)
            factors = self._factors()
            now = factors[state.opened.length : state.opened.length + x_RTD.shape[1]]
            opened, z = causal_step(state.weights, self._norm(), state.opened, tokens, now)
            if opened.length == self.mini_batch:
                weights = commit(state.weights, opened, factors[-1])
                state = TTTState(weights, empty_gradients(state.opened.rows, weights))
            else:
                state = TTTState(state.weights, opened)
        return z.transpose(1, 2).flatten(2).to(x_RTD.dtype), state

    def _run(self, x_TD: Tensor, layout: Layout, start: FastWeights) -> tuple[Tensor, FastWeights]:
        """All segments from the fast weights ``start``; also those after the last mini-batch, but of a causal layer."""
        plan = plan_chunks(layout, self.mini_batch, 1 if self.causal else 2, x_TD.device)
        qkv, rate = self._project(x_TD)
        with _no_autocast(x_TD):
            chunks = _chunks(plan, qkv.unflatten(-1, (3, self.n_heads, -1)), rate)
            loop = self._causal_loop if self.causal else self._bidirectional_loop
            z, end = loop(chunks, plan.active, start)
        z = plan.restore(z).to(x_TD.dtype)
        y = self._gated(z[0], self.gate_forward)
        if self.gate_backward is not None:
            y = y + self._gated(z[1], self.gate_backward)
        return y, end

    def _causal_loop(
        self, chunks: Iterable[Tokens], active: tuple[int, ...], weights: FastWeights
    ) -> tuple[Tensor, FastWeights]:
        """All chunks in order of time."""
        norm, factors, outputs = self._norm(), self._factors(), []
        for chunk, following in zip(chunks, (*active[1:], 0), strict=True):
            gradients, z = causal_step(weights, norm, None, chunk, factors)
            outputs.append(z)
            if following:  # A row's last mini-batch changes nothing that is still read.
                weights = commit(weights, gradients.first(following), factors[-1])
        return torch.cat(outputs), weights

    def _bidirectional_loop(
        self, chunks: Iterable[Tokens], active: tuple[int, ...], weights: FastWeights
    ) -> tuple[Tensor, FastWeights]:
        norm, outputs = self._norm(), []
        for chunk, rows in zip(chunks, active, strict=True):
            own = bool(outputs) and not torch.is_grad_enabled()  # the first step's result is this loop's alone
            weights, z = fast_weights.bidirectional_step(weights.first(rows), norm, chunk, in_place=own)
            outputs.append(z)
        return torch.cat(outputs), weights

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """q, k, v [..., 3 D] and each token's own rate η_s [..., H] (divided by b where there is no 1/t to do it)."""
        dtype = self._dtype
        with _no_autocast(x):
            rate = F.linear(x.to(dtype), self.rate.weight.to(dtype), self.rate.bias.to(dtype)).sigmoid()
        span = x.shape[-1] // self.n_heads * (1 if self.causal else self.mini_batch)
        return self.qkv(x).to(dtype), rate * (self.base_lr / span)

    def _gated(self, z: Tensor, gate: Tensor) -> Tensor:
        return (gate.tanh() * self.out(self.post_norm(z))).to(z.dtype)

    @property
    def _dtype(self) -> torch.dtype:
        """The inner loop's: float32 at least. In bfloat16 the state is 4.6 % off after 1,504 tokens."""
        return torch.promote_types(self.w1.dtype, torch.float32)

    def _learned(self) -> FastWeights:
        """The start of every segment, one row for all."""
        return FastWeights(*(w[None].to(self._dtype) for w in (self.w1, self.b1, self.w2, self.b2)))

    def _norm(self) -> Norm:
        return Norm(self.gamma.to(self._dtype), self.beta.to(self._dtype))

    def _factors(self) -> Tensor:
        """c_t = max(0, 1/t + τ_t) for t = 1 to b, [b]."""
        assert self.tau is not None
        t = torch.arange(1, self.mini_batch + 1, device=self.tau.device, dtype=self._dtype)
        return (1 / t + self.tau.to(self._dtype)).clamp_min(0)


def _chunks(plan: ChunkPlan, qkv_T3Hd: Tensor, rate_TH: Tensor) -> Iterator[Tokens]:
    """What is read at each time. Inference on a CPU gathers it then, which keeps it in the cache; a backward pass would make
    a gradient of all tokens for each gather, so training gathers once."""

    def cut(chunks: slice) -> Tokens:
        rate = plan.cut(rate_TH[:, None, :, None], chunks)[0] * plan.valid[chunks, None, :, None]
        return _tokens(plan.cut(qkv_T3Hd, chunks), rate, first=0)

    if qkv_T3Hd.device.type == "cpu" and not torch.is_grad_enabled():
        return map(cut, plan.times)
    whole = cut(slice(None))
    return (whole.rows(time.start, time.stop) for time in plan.times)


def _tokens(qkv_3RHnd: Tensor, rate: Tensor, *, first: int) -> Tokens:
    """RoPE applied; the n tokens of each row begin at place ``first`` of their mini-batch."""
    q, k = rotate(qkv_3RHnd[:2], first)
    return Tokens(q, k, qkv_3RHnd[2], rate)


def _no_autocast(x: Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, enabled=False)


class ExpertTTT(nn.ModuleList):
    """One TTT layer for each routed expert: Σ gate_e · TTT_e(x) over those that each segment chose; encoder only."""

    def __init__(self, n_experts: int, d_model: int, heads: int, *, mini_batch: int, base_lr: float) -> None:
        super().__init__(
            TTTMLP(d_model, heads, mini_batch=mini_batch, base_lr=base_lr, causal=False) for _ in range(n_experts)
        )

    def skippable(self) -> bool:
        return all(layer.skippable() for layer in self)  # pyright: ignore[reportCallIssue]

    def forward(self, x_TD: Tensor, layout: Layout, routing: Routing) -> Tensor:
        """Runs each expert's layer on the segments that chose it; the others' states are never computed."""
        mixed_TD = torch.zeros_like(x_TD)
        spans = layout.slices()
        for expert, layer in enumerate(self):
            chosen, slot = (routing.experts == expert).nonzero(as_tuple=True)
            if not len(chosen) or layer.skippable():  # pyright: ignore[reportCallIssue]
                continue
            rows = torch.cat([torch.arange(spans[i].start, spans[i].stop, device=x_TD.device) for i in chosen.tolist()])
            own = Layout(layout.lengths[i] for i in chosen.tolist())
            gates = routing.gates[chosen, slot].repeat_interleave(torch.tensor(own.lengths, device=x_TD.device))
            mixed_TD = mixed_TD.index_add(0, rows, layer(x_TD[rows], own) * gates[:, None].to(x_TD.dtype))
        return mixed_TD
