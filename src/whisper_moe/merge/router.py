"""A router without training: ridge regression from pooled features to the index of the expert (arXiv 2603.29765).

All that is needed of the clips are second moments, one matrix for each choice. They stay with the router, so that an expert
can be added or removed without the others' clips: a new one is a new column, and every old one stays as it is.

N clips, C choices (the experts, then *none*), D features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from whisper_moe.generate.decode import WindowDecoder
from whisper_moe.merge.augment import augmented

RIDGE = 0.25
"""λ as a share of all clips, on standardised features: of 0.01, 0.06 and 0.25 the best on second sources."""
COPIES = 3
"""Augmented copies of each clip, beside the clip itself."""
BATCH = 32
COOLEST = 0.05
"""The least temperature: of few clips that are all told apart, none would make them sure enough."""
KEPT = 0.99
"""Share of the clips that were held out whose expert is not taken for unknown, and of a new expert's that are to prefer it."""
_TAIL = 2.05
"""Standard deviations beyond which 2 % lie: as many old clips may go to a new expert where they would not by themselves."""


def heard(decoder: WindowDecoder, clips: Sequence[np.ndarray], seed: int = 0) -> Tensor:
    """Features of clips and of their augmented copies, [N, 1 + COPIES, D]."""
    rng = np.random.default_rng(seed)
    every = [copy for clip in clips for copy in (clip, *(augmented(clip, rng) for _ in range(COPIES)))]
    parts = [decoder.features(every[i : i + BATCH]) for i in range(0, len(every), BATCH)]
    return torch.cat(parts).unflatten(0, (len(clips), -1)).double()


def fit(features: Sequence[Tensor]) -> dict[str, Tensor]:
    """The router's tensors from what was heard of each choice's clips, [N_c, copies, D] each; *none* last, may have no clips."""
    every = torch.cat([part.flatten(0, 1) for part in features])
    centre, scale = every.mean(0), every.std(0).clamp_min(1e-6)
    fitted = {"centre": centre, "scale": scale}
    even, odd = ([moments_of(part[i::2].flatten(0, 1), centre, scale) for part in features] for i in (0, 1))
    temperature, threshold = _calibrated(columns(torch.stack(even)), [part[1::2] for part in features], fitted)
    whole = torch.stack(even) + torch.stack(odd)
    solved = columns(whole)
    fitted |= {"weight": solved[:, 1:], "intercept": solved[:, 0], "moments": whole}
    fitted |= {"temperature": temperature, "threshold": threshold}
    return {name: tensor.float() for name, tensor in fitted.items()}


def moments_of(features_ND: Tensor, centre_D: Tensor, scale_D: Tensor) -> Tensor:
    """Σ [1, x]ᵀ[1, x] of standardised features, [D + 1, D + 1] float64: counts, sums and products in one."""
    x = (features_ND - centre_D) / scale_D
    x = torch.cat([x.new_ones(len(x), 1), x], 1)
    return x.T @ x


def columns(moments: Tensor, which: Sequence[int] | None = None) -> Tensor:
    """Intercept and weight, [1 + D], of all choices or of some: the regression onto "it is this one", 1 or 0, over all clips.

    (Σ M + λN diag(0, 1, …, 1))⁻¹ m_c, where m_c, the first column of M_c, is Σ [1, x] over the clips of choice c. Every choice
    counts as if it had as many clips as the others.
    """
    counts = moments[:, 0, 0]
    weights = torch.where(counts > 0, counts[counts > 0].mean() / counts.clamp_min(1), 0.0)
    balanced = moments.double() * weights[:, None, None]
    total = balanced.sum(0)
    penalty = torch.full((len(total),), RIDGE, dtype=total.dtype) * total[0, 0]
    penalty[0] = 0
    wanted = balanced if which is None else balanced[list(which)]
    return torch.linalg.solve(total + penalty.diag(), wanted[:, :, 0].T).T


def _calibrated(solved: Tensor, held_out: Sequence[Tensor], fitted: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The temperature of least cross-entropy on clips that were held out, and the share that nearly all their experts reach."""
    features = torch.cat([part.flatten(0, 1) for part in held_out])
    labels = torch.cat([torch.full((len(part.flatten(0, 1)),), c) for c, part in enumerate(held_out)])
    logits = (features - fitted["centre"]) / fitted["scale"] @ solved[:, 1:].T + solved[:, 0]
    tried = torch.logspace(math.log10(COOLEST), 0, 51, dtype=logits.dtype)
    temperature = min(tried, key=lambda t: float(torch.nn.functional.cross_entropy(logits / t, labels)))
    experts = labels < len(held_out) - 1
    shares = (logits[experts, :-1] / temperature).softmax(1).gather(1, labels[experts, None])
    return temperature, shares.quantile(1 - KEPT).clamp(max=0.9)


def lifted(new: Tensor, old: Tensor, clips_ND: Tensor, moments: Tensor) -> Tensor:
    """A further column beside old ones that stay: its intercept is raised until its own clips prefer it, if old ones allow it.

    ``new`` [1 + D], ``old`` [C, 1 + D]; ``clips_ND``: standardised features of the new expert's clips; ``moments``: of the old
    choices, whose clips are taken to be normally distributed. At most 2 % of them may change to the new one for that.
    """
    x = torch.cat([clips_ND.new_ones(len(clips_ND), 1), clips_ND], 1)
    wanted = ((x @ old.T).amax(1) - x @ new).quantile(KEPT)
    known = moments[:, 0, 0] > 1
    each = moments[known] / moments[known, :1, :1]  # E [1, x]ᵀ[1, x]
    ahead = old[known] - new
    mean = (each[:, 0] * ahead).sum(1)
    variance = torch.einsum("ci,cij,cj->c", ahead, each, ahead) - mean.square()
    room = (mean - _TAIL * variance.clamp_min(0).sqrt()).amin()
    lift = torch.minimum(wanted, room.clamp_min(0)).clamp_min(0)
    return torch.cat([new[:1] + lift, new[1:]])
