"""TTT-MLP in its primal form, one token at a time, in float64: W_t = W − Σ_s η_ts ∇loss_s, with ∇ from autograd.

Written from the equations (arXiv 2407.04620, section 2) without any of the layer's own functions; it only reads the
layer's parameters. Slow on purpose: every W_t is built. One segment, no packing. Below it, the layers and inputs that
the tests compare it on.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from whisper_moe.model.ttt import TTTMLP


class Weights(NamedTuple):
    """The fast weights of one head."""

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return weight * centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6) + bias


def inner_model(x: Tensor, weights: Weights, gamma: Tensor, beta: Tensor) -> Tensor:
    """f(x; S) = x + LN(gelu(x W1 + b1) W2 + b2)."""
    return x + layer_norm(gelu(x @ weights.w1 + weights.b1) @ weights.w2 + weights.b2, gamma, beta)


def token_gradient(k: Tensor, v: Tensor, weights: Weights, gamma: Tensor, beta: Tensor) -> Weights:
    """∇_S ½‖f(k; S) − v‖² of one token, by autograd; differentiable again."""
    leaves = Weights(*(w if w.requires_grad else w.detach().requires_grad_() for w in weights))
    loss = 0.5 * (inner_model(k, leaves, gamma, beta) - v).square().sum()
    return Weights(*torch.autograd.grad(loss, leaves, create_graph=True))


def rope(x: Tensor, position: int) -> Tensor:
    """Rotates each adjacent pair of x [d] by position · 10000^(−2i/d), one rotation matrix after the other."""
    pairs = []
    for i in range(0, len(x), 2):
        angle = position * 10_000.0 ** (-i / len(x))
        rotation = torch.tensor(
            [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=x.dtype
        )
        pairs.append(rotation @ x[i : i + 2])
    return torch.cat(pairs)


def head_pass(ttt: TTTMLP, x: Tensor, head: int, weights: Weights) -> tuple[Tensor, Weights]:
    """z of one head over x [T, D], and the fast weights at the end (a partial mini-batch flushed)."""
    d, b = ttt.w1.shape[1], ttt.mini_batch
    q, k, v = ((x @ m.T).view(len(x), -1, d)[:, head] for m in ttt.qkv.weight.chunk(3))
    rate = ttt.base_lr * torch.sigmoid(x @ ttt.rate.weight[head] + ttt.rate.bias[head]) / d
    gamma, beta = ttt.gamma[head, 0], ttt.beta[head, 0]
    outputs = []
    for begin in range(0, len(x), b):
        batch = range(begin, min(begin + b, len(x)))
        gradients = [token_gradient(rope(k[s], s - begin), v[s], weights, gamma, beta) for s in batch]
        now = weights
        for t in batch:
            if ttt.causal:
                assert ttt.tau is not None
                place = t - begin
                factor, seen = (1 / (place + 1) + ttt.tau[place]).clamp_min(0), range(begin, t + 1)
            else:
                factor, seen = 1 / b, batch
            now = Weights(
                *(w - sum(factor * rate[s] * gradients[s - begin][i] for s in seen) for i, w in enumerate(weights))
            )
            outputs.append(inner_model(rope(q[t], t - begin), now, gamma, beta))
        weights = now  # The last token's W_t is the committed one: e is the last row of η.
    return torch.stack(outputs), weights


def learned(ttt: TTTMLP) -> list[Weights]:
    """The start value of every head."""
    return [Weights(ttt.w1[h], ttt.b1[h, 0], ttt.w2[h], ttt.b2[h, 0]) for h in range(ttt.n_heads)]


def direction(ttt: TTTMLP, x: Tensor, gate: Tensor, start: list[Weights]) -> tuple[Tensor, list[Weights]]:
    """One direction of one segment with its gate, [T, D], and every head's fast weights at the end."""
    heads = [head_pass(ttt, x, h, start[h]) for h in range(ttt.n_heads)]
    z = torch.cat([z for z, _ in heads], dim=-1)
    z = layer_norm(z, ttt.post_norm.weight, ttt.post_norm.bias)
    return torch.tanh(gate) * (z @ ttt.out.weight.T), [end for _, end in heads]


def layer(ttt: TTTMLP, x: Tensor, start: list[Weights] | None = None) -> tuple[Tensor, list[Weights]]:
    """The whole layer on one segment x [T, D]; ``start``: what the forward direction carries in."""
    y, end = direction(ttt, x, ttt.gate_forward, start or learned(ttt))
    if ttt.gate_backward is not None:
        y = y + direction(ttt, x.flip(0), ttt.gate_backward, learned(ttt))[0].flip(0)
    return y, end


D, H, B = 8, 2, 4
"""Width, heads and mini-batch of the layers that are tested."""


def make_layer(causal: bool, *, seed: int = 0, dtype: torch.dtype = torch.float64, lr: float = 2.0) -> TTTMLP:
    """A layer with open gates and large random parameters, so that the inner updates matter to the output."""
    torch.manual_seed(seed)
    layer = TTTMLP(D, H, mini_batch=B, base_lr=lr, causal=causal).to(dtype)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter += torch.randn_like(parameter) * (0.1 if name in ("tau", "gamma") else 0.4)
    return layer


def tokens(n: int, *, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def only_forward(layer: TTTMLP) -> TTTMLP:
    assert layer.gate_backward is not None
    layer.gate_backward.data.zero_()
    return layer


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()
