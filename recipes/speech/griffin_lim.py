"""Mel frames to a waveform without anything learned: Griffin-Lim (1984), what trained vocoders are measured against.

F frames; mels as Whisper normalises them (:mod:`whisper_moe.media.mel`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from whisper_moe.media.mel import HOP, N_FFT, mel_filters
from whisper_moe.model.speech import inverse


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
