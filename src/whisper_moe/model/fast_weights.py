"""The inner loop of TTT-MLP (arXiv 2407.04620, sections 2.3 to 2.7): pure functions (state, inputs) -> (state, output).

The state is a small MLP in each head, and its learning is the layer's memory. ``f`` maps a key to a value, and every
mini-batch of b tokens is one gradient step on ½‖f(k) − v‖²:

    f(x; S) = x + γ·LN(gelu(x W1 + b1) W2 + b2) + β                          S = (W1, b1, W2, b2)
    Z1 = K W1 + b1;   X2 = gelu(Z1);   Z2 = X2 W2 + b2;   ĥ = (Z2 − μ)/σ     at the mini-batch's first state S
    a  = γ ⊙ (γ ĥ + β − (V − K));      G2 = (a − mean(a) − ĥ·mean(a ⊙ ĥ))/σ
    G1 = (G2 W2ᵀ) ⊙ gelu'(Z1)

The rate that output t applies to source s is a product, η_ts = c_t·η_s, so it is kept as its two factors: η_s is
multiplied into G once (G1 is linear in G2), and c_t = max(0, 1/t + τ_t) scales the rows of the output. Autograd
differentiates through all of it: the outer loss learns S, γ, β, τ and what makes K, V, Q and η.

Shapes: R rows (one sequence each), H heads, n tokens, d head width, f = 4d hidden units.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LN_EPS = 1e-6


class FastWeights(NamedTuple):
    """S of every row and head. A single row serves any number of rows: they share it until their first commit."""

    w1: Tensor
    """[R or 1, H, d, f]"""
    b1: Tensor
    """[R or 1, H, 1, f]"""
    w2: Tensor
    """[R or 1, H, f, d]"""
    b2: Tensor
    """[R or 1, H, 1, d]"""

    @property
    def rows(self) -> int:
        return self.w1.shape[0]

    def first(self, rows: int) -> FastWeights:
        """The first ``rows`` rows, as views; a shared row stays shared."""
        return FastWeights(*(t[:rows] for t in self))

    def stack(self, other: FastWeights) -> FastWeights:
        """These rows, then the other's."""
        return FastWeights(*map(torch.cat, zip(self, other, strict=True)))

    def select(self, rows: Tensor) -> FastWeights:
        """Rows ``rows`` [R'] int64, copied; a shared row is not copied, it serves the new rows as well."""
        return self if self.rows == 1 else FastWeights(*(t.index_select(0, rows) for t in self))


class Norm(NamedTuple):
    """γ and β of the inner LayerNorm, each [H, 1, d]: learned by the outer loss only."""

    gamma: Tensor
    beta: Tensor


class Tokens(NamedTuple):
    """What the inner loop reads of n tokens: q, k, v [R, H, n, d] and the rates η_s [R, H, n, 1] (0 on padding)."""

    q: Tensor
    k: Tensor
    v: Tensor
    rate: Tensor

    def rows(self, start: int, stop: int) -> Tokens:
        return Tokens(*(t[start:stop] for t in self))


class Gradients(NamedTuple):
    """Each token's gradient in factors: the one of W1 is kᵀ g1 and that of W2 is x2ᵀ g2, both multiplied by η_s."""

    k: Tensor
    """[R, H, n, d]"""
    g1: Tensor
    """[R, H, n, f], η_s G1"""
    x2: Tensor
    """[R, H, n, f]"""
    g2: Tensor
    """[R, H, n, d], η_s G2"""

    @property
    def rows(self) -> int:
        return self.k.shape[0]

    @property
    def length(self) -> int:
        """n, the number of tokens."""
        return self.k.shape[2]

    def first(self, rows: int) -> Gradients:
        """The first ``rows`` rows, as views."""
        return Gradients(*(t[:rows] for t in self))

    def select(self, rows: Tensor) -> Gradients:
        """Rows ``rows`` [R'] int64, copied."""
        return Gradients(*(t.index_select(0, rows) for t in self))

    def append(self, new: Gradients) -> Gradients:
        return Gradients(*(torch.cat(pair, dim=2) for pair in zip(self, new, strict=True)))


def empty_gradients(rows: int, like: FastWeights) -> Gradients:
    """A mini-batch of no tokens yet for ``rows`` rows."""
    _, heads, d, f = like.w1.shape
    return Gradients(*(like.w1.new_empty(rows, heads, 0, width) for width in (d, f, f, d)))


def token_gradients(weights: FastWeights, norm: Norm, tokens: Tokens) -> Gradients:
    """η_s·G of every token at one state; tokens do not see each other here.

    G2 and G1 are what the backward kernels of LayerNorm and GELU compute, and those kernels are differentiable again.
    """
    z1 = _affine(tokens.k, weights.w1, weights.b1)
    x2 = F.gelu(z1, approximate="tanh")
    z2 = _affine(x2, weights.w2, weights.b2)
    h, mean, rstd = torch.native_layer_norm(z2, z2.shape[-1:], None, None, LN_EPS)
    a = norm.gamma * torch.addcmul(norm.beta - (tokens.v - tokens.k), norm.gamma, h)
    g2 = torch.ops.aten.native_layer_norm_backward(
        a * tokens.rate, z2, z2.shape[-1:], mean, rstd, None, None, [True, False, False]
    )[0]
    g1 = torch.ops.aten.gelu_backward(_affine(g2, weights.w2.mT, None), z1, approximate="tanh")
    return Gradients(tokens.k, g1, x2, g2)


def commit(weights: FastWeights, gradients: Gradients, factor: Tensor | None, *, in_place: bool = False) -> FastWeights:
    """The gradient step of a mini-batch: W ← W − c Σ_s η_s x_sᵀ G_s, with c = ``factor`` (a scalar tensor; None is 1).

    ``gradients`` may hold fewer rows than ``weights``: the first ones; the others end here. ``in_place``: the old weights
    are given up, and nobody differentiates.
    """
    k, g1, x2, g2 = gradients.k, gradients.g1, gradients.x2, gradients.g2
    if factor is not None:
        g1, g2 = g1 * factor, g2 * factor
    old = weights.first(gradients.rows)
    return FastWeights(
        _minus_product(old.w1, k, g1, in_place),
        old.b1 - g1.sum(2, keepdim=True),
        _minus_product(old.w2, x2, g2, in_place),
        old.b2 - g2.sum(2, keepdim=True),
    )


def apply(weights: FastWeights, norm: Norm, q: Tensor) -> Tensor:
    """f(q; S), [R, H, n, d]."""
    x2 = F.gelu(_affine(q, weights.w1, weights.b1), approximate="tanh")
    return _output(norm, q, _affine(x2, weights.w2, weights.b2))


def bidirectional_step(
    weights: FastWeights, norm: Norm, tokens: Tokens, *, in_place: bool = False
) -> tuple[FastWeights, Tensor]:
    """One mini-batch in which every token sees every other (ttt-video: E is not lower triangular and has equal rows).

    With equal rows the dual form Q W1 − (E ⊙ Q Kᵀ) G1 is Q (W1 − (e ⊙ K)ᵀ G1), the committed weights: that is computed.
    ``in_place``: as in :func:`commit`.
    """
    weights = commit(weights, token_gradients(weights, norm, tokens), None, in_place=in_place)
    return weights, apply(weights, norm, tokens.q)


def causal_step(
    weights: FastWeights, norm: Norm, opened: Gradients | None, tokens: Tokens, factors: Tensor
) -> tuple[Gradients, Tensor]:
    """The next n tokens of a mini-batch that already holds ``opened``; c_t of the n tokens in ``factors`` [n].

    Dual form, with E = tril(c_t η_s), where η_s is inside G already and the bias joins the scores:

        Z̄1  = Q W1 + b1 − c ⊙ tril(Q Kᵀ + 1) G1;     X̄2 = gelu(Z̄1)
        Z̄2  = X̄2 W2 + b2 − c ⊙ tril(X̄2 X2ᵀ + 1) G2;  out = Q + LN(Z̄2)

    Returns the mini-batch with the n tokens in it, not committed, and the output [R, H, n, d].
    """
    gradients = token_gradients(weights, norm, tokens)
    if opened is not None:
        gradients = opened.append(gradients)
    before = gradients.length - tokens.q.shape[2]
    c = factors[:, None]
    scores = (tokens.q @ gradients.k.mT + 1).tril(before)
    x2 = F.gelu(_affine(tokens.q, weights.w1, weights.b1) - c * (scores @ gradients.g1), approximate="tanh")
    scores = (x2 @ gradients.x2.mT + 1).tril(before)
    z2 = _affine(x2, weights.w2, weights.b2) - c * (scores @ gradients.g2)
    return gradients, _output(norm, tokens.q, z2)


def _output(norm: Norm, q: Tensor, z2: Tensor) -> Tensor:
    h = F.layer_norm(z2, z2.shape[-1:], eps=LN_EPS)
    return torch.addcmul(q + norm.beta, norm.gamma, h)


def _affine(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """x W + b for every row and head. Rows that share W become more tokens of one product, so W is never repeated."""
    rows, heads, n, _ = x.shape
    if w.shape[0] == rows:
        b = None if b is None else b.flatten(0, 1)
        return _batched(x.flatten(0, 1), w.flatten(0, 1), b).view(rows, heads, n, -1)
    assert w.shape[0] == 1
    merged = _batched(x.transpose(0, 1).flatten(1, 2), w[0], b if b is None else b[0])
    return merged.view(heads, rows, n, -1).transpose(0, 1)


def _batched(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    return torch.bmm(x, w) if b is None else torch.baddbmm(b, x, w)


def _minus_product(w: Tensor, x: Tensor, g: Tensor, in_place: bool) -> Tensor:
    """W − xᵀ g for every row and head, [R, H, ...]; a shared W is copied here, once for each row."""
    if in_place:
        w.view(-1, *w.shape[2:]).baddbmm_(x.flatten(0, 1).mT, g.flatten(0, 1), alpha=-1)
        return w
    w = w.expand(x.shape[0], -1, -1, -1)
    return torch.baddbmm(w.flatten(0, 1), x.flatten(0, 1).mT, g.flatten(0, 1), alpha=-1).view(w.shape)
