"""Mel frames to a waveform: a trained vocoder (Vocos, arXiv 2306.00814), and Griffin-Lim (1984) as the reference.

A frame becomes the short-time spectrum around it, magnitudes and phases, and the inverse transform the sound: all of the
network runs at 100 frames a second. F frames, N samples; mels as Whisper normalises them (:mod:`whisper_moe.media.mel`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whisper_moe.media.mel import HOP, N_FFT, mel_filters

WINDOW = 4 * HOP
"""Samples of the vocoder's own windows: 640, three quarters overlap."""
_LOUDEST = 5.0
"""Of a log-magnitude: keeps exp from overflowing where training has just begun."""


class _Mix(nn.Module):
    """ConvNeXt's block (arXiv 2201.03545) in one dimension: depthwise convolution → LayerNorm → feed-forward, scaled."""

    def __init__(self, width: int, hidden: int, scale: float) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.scale = nn.Parameter(torch.full((width,), scale))

    def forward(self, x_BDF: Tensor) -> Tensor:
        mixed_BFD = self.norm(self.depthwise(x_BDF).transpose(1, 2))
        return x_BDF + (self.scale * self.down(F.gelu(self.up(mixed_BFD)))).transpose(1, 2)


class Vocoder(nn.Module):
    """[B, n_mels, F] → [B, F · 160] samples at 16 kHz."""

    def __init__(self, n_mels: int, width: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.stem = nn.Conv1d(n_mels, width, 7, padding=3)
        self.stem_norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(_Mix(width, hidden, 1 / layers) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, WINDOW + 2)

    def forward(self, mel_BMF: Tensor) -> Tensor:
        x_BDF = self.stem_norm(self.stem(mel_BMF).transpose(1, 2)).transpose(1, 2)
        for block in self.blocks:
            x_BDF = block(x_BDF)
        with torch.autocast(mel_BMF.device.type, enabled=False):  # phases and logarithms need all digits
            loudness, phase = self.head(self.norm(x_BDF.float().transpose(1, 2))).transpose(1, 2).chunk(2, dim=1)
        magnitude = loudness.clamp_max(_LOUDEST).exp()
        window = torch.hann_window(WINDOW, device=mel_BMF.device)
        return inverse(torch.complex(magnitude * phase.cos(), magnitude * phase.sin()), window)


def inverse(spectrum_BKF: Tensor, window: Tensor) -> Tensor:
    """Overlap-add of F windows centred on samples 0, 160, …: [B, F · 160] samples. As frames of log-mels lie."""
    size, frames = len(window), spectrum_BKF.shape[-1]
    pieces = torch.fft.irfft(spectrum_BKF, n=size, dim=1) * window[:, None]
    length = (frames - 1) * HOP + size

    def added(columns: Tensor) -> Tensor:
        return F.fold(columns, (1, length), (1, size), stride=(1, HOP))[:, 0, 0]

    weight = added(window.square()[None, :, None].expand(1, size, frames))
    begin = size // 2
    return (added(pieces) / weight.clamp_min(1e-8))[:, begin : begin + frames * HOP]


def power_of(mel_MF: Tensor) -> Tensor:
    """Power in each band [n_mels, F] of mels as Whisper normalises them; what lay under its floor is not known any more."""
    return 10.0 ** (4.0 * mel_MF.double() - 4.0)


def _spread(power_MF: Tensor, bands_MK: Tensor, rounds: int = 40) -> Tensor:
    """The power in each bin that is in these bands, never negative (multiplicative updates, Lee and Seung 2001): bands are
    narrower than bins at the low end, where a pseudo-inverse makes much of little errors."""
    wanted_KF, both_KK = bands_MK.T @ power_MF, bands_MK.T @ bands_MK
    power_KF = wanted_KF / bands_MK.sum(0)[:, None].clamp_min(1e-12)
    for _ in range(rounds):
        power_KF = power_KF * wanted_KF / (both_KK @ power_KF).clamp_min(1e-30)
    return power_KF


@torch.no_grad()
def griffin_lim(mel_MF: Tensor, rounds: int = 60, momentum: float = 0.99) -> Tensor:
    """[n_mels, F] → [F · 160]: phases that agree with the magnitudes of their neighbours (fast form, Perraudin et al. 2013)."""
    bands = mel_filters(len(mel_MF), mel_MF.device, torch.float64)
    magnitude = _spread(power_of(mel_MF), bands).sqrt()[None]
    window = torch.hann_window(N_FFT, dtype=torch.float64, device=mel_MF.device)
    random = torch.Generator().manual_seed(0)
    angles = 2 * torch.pi * torch.rand(magnitude.shape, generator=random, dtype=torch.float64)
    spectrum, before = torch.polar(magnitude, angles.to(mel_MF.device)), torch.zeros((), dtype=torch.complex128)
    for _ in range(rounds):
        sound = inverse(spectrum, window)
        padded = F.pad(sound, (N_FFT // 2, N_FFT // 2))
        found = torch.fft.rfft(padded.unfold(-1, N_FFT, HOP)[:, : magnitude.shape[-1]] * window, dim=-1).transpose(1, 2)
        moved = found + momentum * (found - before)
        spectrum, before = magnitude * moved / moved.abs().clamp_min(1e-12), found
    return inverse(spectrum, window)[0].float()
