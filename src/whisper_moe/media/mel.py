"""Whisper's log-mel spectrogram (arXiv 2212.04356, section 2.2), equal to openai/whisper's and to transformers'.

Windows of 25 ms every 10 ms, power spectrum, Slaney mel bands, log10, and a floor 80 dB below the loudest band of
*this* utterance: concatenating utterances first would leak one's maximum into the other. Silence is therefore not 0:
pad the sound, never the spectrogram.

The arithmetic is the references'; the order is not. They transform the whole recording in one call; here 256 windows
at a time stay in the processor's cache from the window to the mel bands, which takes about half the time for 30 s.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from whisper_moe.config import HOP, SAMPLE_RATE, SAMPLES_PER_POSITION

N_FFT = SAMPLE_RATE // 40
"""Samples in a window: 400, 25 ms."""
MIN_SAMPLES = N_FFT // 2 + 1
"""The shortest sound with a spectrogram: the first window is centred on sample 0 and mirrors 200 samples around it."""

_POWER_FLOOR = 1e-10
_DYNAMIC_RANGE = 8.0
"""log10 of power: 80 dB."""
_WINDOWS_AT_ONCE = 256
"""410 kB of float32 windows: they and their spectrum fit in a second-level cache."""


def log_mel(audio: Tensor, n_mels: int = 80, *, samples: int | None = None) -> Tensor:
    """Sound to log-mel frames, differentiable, in the sound's own floating-point type and on its device.

    :param audio: [n] or [B, n] at 16 kHz, full scale 1.
    :param n_mels: 80 for most Whispers, 128 for large-v3.
    :param samples: zero-pad the sound to this length first.
    :returns: [n_mels, n // 160] or [B, n_mels, n // 160]; each row of a batch is an utterance with its own maximum.
    :raises ValueError: for integers, for a third dimension, for fewer than :data:`MIN_SAMPLES` samples after padding.
    """
    if not audio.is_floating_point() or audio.dim() not in (1, 2):
        raise ValueError(f"log_mel takes floating-point [n] or [batch, n], got {audio.dtype} {list(audio.shape)}")
    if samples is not None:
        if samples < audio.shape[-1]:
            raise ValueError(f"cannot pad {audio.shape[-1]} samples to {samples}")
        audio = F.pad(audio, (0, samples - audio.shape[-1]))
    if audio.shape[-1] < MIN_SAMPLES:
        raise ValueError(f"a spectrogram needs {MIN_SAMPLES} samples, got {audio.shape[-1]}: pad the sound (samples=…)")
    power = mel_power(audio if audio.dim() == 2 else audio[None], n_mels)
    log = power.clamp(min=_POWER_FLOOR).log10()
    log = torch.maximum(log, log.amax(dim=(-2, -1), keepdim=True) - _DYNAMIC_RANGE)
    mel = (log + 4.0) / 4.0
    return mel if audio.dim() == 2 else mel[0]


def window_mel(clip: NDArray[np.float32], n_mels: int, positions: int) -> Tensor:
    """[n_mels, 2 · positions] of a clip [n] at 16 kHz, cut or padded with silence to so many encoder positions."""
    samples = positions * SAMPLES_PER_POSITION
    return log_mel(torch.from_numpy(clip[:samples]), n_mels, samples=samples)


def mel_power(audio: Tensor, n_mels: int) -> Tensor:
    """[B, n] -> [B, n_mels, n // 160]. Like the references, the window centred beyond the last sample is left out."""
    filters = mel_filters(n_mels, audio.device, audio.dtype)
    hann = _hann(audio.device, audio.dtype)
    mirrored = F.pad(audio, (N_FFT // 2, N_FFT // 2), mode="reflect")
    windows = mirrored.unfold(-1, N_FFT, HOP)[:, : audio.shape[-1] // HOP]
    parts = []
    for part in windows.split(max(1, _WINDOWS_AT_ONCE // len(audio)), dim=1):
        spectrum = torch.fft.rfft(part * hann)
        parts.append(filters @ (spectrum.real.square() + spectrum.imag.square()).transpose(1, 2))
    return torch.cat(parts, dim=-1)


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def _hann(device: torch.device, dtype: torch.dtype) -> Tensor:
    """[400], periodic, computed in ``dtype``: a window rounded from float64 moves bands near the floor by up to 6e-5.

    An ordinary tensor even if first asked for in inference mode: training shares it.
    """
    return torch.hann_window(N_FFT, dtype=dtype, device=device)


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def mel_filters(n_mels: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[n_mels, 201]: triangles of equal area between 0 and 8 kHz on Slaney's mel scale (Auditory Toolbox, 1998)."""
    frequencies = torch.linspace(0, SAMPLE_RATE / 2, N_FFT // 2 + 1, dtype=torch.float64)
    top = _hz_to_mel(torch.tensor(SAMPLE_RATE / 2, dtype=torch.float64))
    edges = _mel_to_hz(torch.linspace(0, 1, n_mels + 2, dtype=torch.float64) * top)
    low, centre, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising = (frequencies - low) / (centre - low)
    falling = (high - frequencies) / (high - centre)
    triangles = torch.minimum(rising, falling).clamp(min=0)
    return (triangles * 2 / (high - low)).to(device, dtype)


_LINEAR_HZ = 200.0 / 3.0
"""Hz in a mel below 1 kHz, where the scale is linear."""
_BREAK_HZ, _BREAK_MEL = 1_000.0, 15.0
_LOG_STEP = 27.0
"""Mels above the break for a factor of 6.4 in frequency."""
_LOG_FACTOR = 6.4


def _hz_to_mel(hz: Tensor) -> Tensor:
    above = _BREAK_MEL + torch.log(hz / _BREAK_HZ) * _LOG_STEP / torch.log(torch.tensor(_LOG_FACTOR, dtype=hz.dtype))
    return torch.where(hz < _BREAK_HZ, hz / _LINEAR_HZ, above)


def _mel_to_hz(mel: Tensor) -> Tensor:
    above = _BREAK_HZ * _LOG_FACTOR ** ((mel - _BREAK_MEL) / _LOG_STEP)
    return torch.where(mel < _BREAK_MEL, mel * _LINEAR_HZ, above)
