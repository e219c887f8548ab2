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

from whisper_moe.config import SAMPLE_RATE
from whisper_moe.generate.decode import WindowDecoder

RIDGE = 0.25
"""λ as a share of all clips, on standardised features: of 0.01, 0.06 and 0.25 the best on second sources."""
COPIES = 3
"""Augmented copies of each clip, beside the clip itself."""
BATCH = 32
COOLEST = 0.05
"""The least temperature: of few clips that are all told apart, none would make them sure enough."""
KNOWN = 0.98
"""Share of the clips that were held out, of all experts and of each, that lie within its reach; beyond it a clip is unknown, and
for none."""
PREFERRED = 0.99
"""Share of a new expert's clips that are to prefer it."""
SHRINKAGE = 0.3
"""Of the mean variance, added to all of them: a few minutes are fewer clips than features."""
_TAIL = 2.05
"""Standard deviations beyond which 2 % lie: as many old clips may go to a new expert where they would not by themselves."""


def heard(
    decoder: WindowDecoder, clips: Sequence[np.ndarray], margins: Sequence[float | None] = (None,), seed: int = 0
) -> Tensor:
    """Features of clips and of their augmented copies, each with every margin of silence, [N, margins · (1 + COPIES), D]."""
    rng = np.random.default_rng(seed)
    every = [copy for clip in clips for copy in (clip, *(augmented(clip, rng) for _ in range(COPIES)))]
    batches = [every[i : i + BATCH] for i in range(0, len(every), BATCH)]
    parts = [torch.cat([decoder.features(batch, margin) for batch in batches]) for margin in margins]
    return torch.cat([part.unflatten(0, (len(clips), -1)) for part in parts], 1).double()


def fit(features: Sequence[Tensor]) -> dict[str, Tensor]:
    """The router's tensors from what was heard of each choice's clips, [N_c, copies, D] each; *none* last, may have no clips."""
    every = torch.cat([part.flatten(0, 1) for part in features])
    centre, scale = every.mean(0), every.std(0).clamp_min(1e-6)
    standard = [(part - centre) / scale for part in features]
    halves = [[part[i::2].flatten(0, 1) for part in standard] for i in (0, 1)]
    even, odd = (torch.stack([moments_of(part) for part in half]) for half in halves)
    whole = even + odd
    solved = columns(whole)
    fitted = {"weight": solved[:, 1:], "intercept": solved[:, 0], "moments": whole, "centre": centre, "scale": scale}
    fitted |= {"temperature": _temperature(columns(even), halves[1]), "whitening": whitening(whole[:-1])}
    pairs = [(seen, whitening(seen[:-1]), held_out) for seen, held_out in ((even, halves[1]), (odd, halves[0]))]
    far = [
        torch.cat([distances(held[c], seen[c], white) for seen, white, held in pairs]) for c in range(len(whole) - 1)
    ]
    pooled = torch.cat(far).quantile(KNOWN)
    own = torch.stack([each.quantile(KNOWN) for each in far])  # of very short clips much farther: means of few frames
    fitted["reach"] = torch.cat([own.clamp_min(pooled), own.new_zeros(1)])
    return {name: tensor.float() for name, tensor in fitted.items()}


def moments_of(x_ND: Tensor) -> Tensor:
    """Σ [1, x]ᵀ[1, x] of standardised features, [D + 1, D + 1] float64: counts, sums and products in one."""
    x = torch.cat([x_ND.new_ones(len(x_ND), 1), x_ND], 1)
    return x.T @ x


def whitening(moments: Tensor) -> Tensor:
    """L [D, D] so that ‖(x − mean) L‖ is the Mahalanobis distance within experts: L Lᵀ is the inverse of their pooled covariance.

    How far a clip is from all that its expert was probed with tells the unknown (Lee et al., arXiv 1807.03888).
    """
    counts, sums = moments[:, 0, 0], moments[:, 0, 1:]
    scatter = moments[:, 1:, 1:].sum(0) - (sums / counts[:, None]).T @ sums
    covariance = scatter / counts.sum()
    covariance.diagonal().add_(SHRINKAGE * covariance.diagonal().mean().clamp_min(1e-6))
    return torch.linalg.inv(torch.linalg.cholesky(covariance)).T


def distances(x_ND: Tensor, moments: Tensor, whitening_DD: Tensor) -> Tensor:
    """Of standardised features from the mean of one choice's clips, [N]."""
    return ((x_ND - moments[0, 1:] / moments[0, 0]) @ whitening_DD).norm(dim=1)


def reach_of(x_NCD: Tensor, whitening_DD: Tensor, others: Tensor) -> Tensor:
    """A new expert's: what most of one half of its clips (standardised, with their copies) keep from the mean of the other.

    At least what all experts have (the least of the ``others``), not what one of scattered clips has of its own.
    """
    halves = [x_NCD[i::2].flatten(0, 1) for i in (0, 1)]
    far = [distances(halves[i], moments_of(halves[1 - i]), whitening_DD) for i in (0, 1)]
    return torch.maximum(torch.cat(far).quantile(KNOWN).float(), others.amin())


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


def _temperature(solved: Tensor, held_out: Sequence[Tensor]) -> Tensor:
    """That of least cross-entropy on clips that were held out."""
    labels = torch.cat([torch.full((len(part),), choice) for choice, part in enumerate(held_out)])
    logits = torch.cat(list(held_out)) @ solved[:, 1:].T + solved[:, 0]
    tried = torch.logspace(math.log10(COOLEST), 0, 51, dtype=logits.dtype)
    return min(tried, key=lambda t: float(torch.nn.functional.cross_entropy(logits / t, labels)))


def lifted(new: Tensor, old: Tensor, clips_ND: Tensor, moments: Tensor) -> Tensor:
    """A further column beside old ones that stay: its intercept is raised until its own clips prefer it, if old ones allow it.

    ``new`` [1 + D], ``old`` [C, 1 + D]; ``clips_ND``: standardised features of the new expert's clips; ``moments``: of the old
    choices, whose clips are taken to be normally distributed. At most 2 % of them may change to the new one for that.
    """
    x = torch.cat([clips_ND.new_ones(len(clips_ND), 1), clips_ND], 1)
    wanted = ((x @ old.T).amax(1) - x @ new).quantile(PREFERRED)
    known = moments[:, 0, 0] > 1
    each = moments[known] / moments[known, :1, :1]  # E [1, x]ᵀ[1, x]
    ahead = old[known] - new
    mean = (each[:, 0] * ahead).sum(1)
    variance = torch.einsum("ci,cij,cj->c", ahead, each, ahead) - mean.square()
    room = (mean - _TAIL * variance.clamp_min(0).sqrt()).amin()
    lift = torch.minimum(wanted, room.clamp_min(0)).clamp_min(0)
    return torch.cat([new[:1] + lift, new[1:]])


# The same speech by another microphone

_MU = 255
"""Of µ-law, the telephone's companding (ITU-T G.711)."""


def augmented(samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Float32 samples at 16 kHz by another path: speed, room, band, tilt, noise, companding, level; about as many as before.

    A router that has heard each expert's clips through one channel learns the channel. What is drawn here is none of it kept.
    """
    x = samples.astype(np.float64)
    if rng.random() < 0.5:
        x = np.interp(
            np.arange(0, len(x) - 1, rng.uniform(0.88, 1.12)), np.arange(len(x)), x
        )  # speed and pitch together
    if rng.random() < 0.5:
        x = in_room(x, rng.uniform(0.1, 0.6), rng)
    x = _filtered(x, rng)
    if rng.random() < 0.6:
        x = x + noise(x, rng.uniform(5, 35), rng)
    if rng.random() < 0.3:
        x = _companded(x)
    return (x / max(float(np.abs(x).max()), 1e-9) * rng.uniform(0.1, 0.9)).astype(np.float32)


def in_room(x: np.ndarray, seconds: float, rng: np.random.Generator) -> np.ndarray:
    """Decaying noise as the room's answer: 60 dB in so many ``seconds``, the direct sound before it."""
    length = round(SAMPLE_RATE * seconds)
    answer = rng.standard_normal(length) * np.exp(-6.9 * np.arange(length) / length)
    answer[0] = rng.uniform(2, 10) * np.abs(answer).max()
    size = 1 << (len(x) + length).bit_length()
    return np.fft.irfft(np.fft.rfft(x, size) * np.fft.rfft(answer, size), size)[: len(x)]


def _filtered(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A band and a tilt."""
    hertz = np.fft.rfftfreq(len(x), 1 / SAMPLE_RATE)
    low = rng.uniform(20, 350) if rng.random() < 0.6 else 20.0
    high = rng.choice([3400, 4000, 5500, 7000]) if rng.random() < 0.6 else 8000.0
    tilt = 10 ** (rng.uniform(-3, 3) * np.log2(np.maximum(hertz, 60) / 1000) / 20)
    band = 1 / ((1 + (hertz / high) ** 16) * (1 + (low / np.maximum(hertz, 1)) ** 8))
    return np.fft.irfft(np.fft.rfft(x) * tilt * band, len(x))


def noise(x: np.ndarray, decibels: float, rng: np.random.Generator) -> np.ndarray:
    """White or pink, so far below the sound."""
    drawn = rng.standard_normal(len(x))
    if rng.random() < 0.5:
        spectrum = np.fft.rfft(drawn) / np.sqrt(np.maximum(np.fft.rfftfreq(len(x), 1 / SAMPLE_RATE), 20))
        drawn = np.fft.irfft(spectrum, len(x))
    return below(x, drawn, decibels)


def below(x: np.ndarray, other: np.ndarray, decibels: float) -> np.ndarray:
    """The other sound, so many decibels under ``x``."""
    return other * (x.std() / max(float(other.std()), 1e-9) * 10 ** (-decibels / 20))


def _companded(x: np.ndarray) -> np.ndarray:
    """Eight bits by µ-law, and back."""
    y = x / max(float(np.abs(x).max()), 1e-9)
    levels = np.round(np.sign(y) * np.log1p(_MU * np.abs(y)) / np.log1p(_MU) * 127) / 127
    return np.sign(levels) * np.expm1(np.abs(levels) * np.log1p(_MU)) / _MU
