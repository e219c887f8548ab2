"""The same speech by another microphone: speed, room, band, tilt, noise, companding, level.

A router that has heard each expert's clips through one channel learns the channel. What is drawn here is none of it kept.
"""

from __future__ import annotations

import numpy as np

from whisper_moe.config import SAMPLE_RATE

_MU = 255
"""Of µ-law, the telephone's companding (ITU-T G.711)."""


def augmented(samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Float32 samples at 16 kHz by another path; about as many as before."""
    x = samples.astype(np.float64)
    if rng.random() < 0.5:
        x = _faster(x, rng.uniform(0.88, 1.12))
    if rng.random() < 0.5:
        x = in_room(x, rng.uniform(0.1, 0.6), rng)
    x = _filtered(x, rng)
    if rng.random() < 0.6:
        x = x + noise(x, rng.uniform(5, 35), rng)
    if rng.random() < 0.3:
        x = _companded(x)
    return (x / max(float(np.abs(x).max()), 1e-9) * rng.uniform(0.1, 0.9)).astype(np.float32)


def _faster(x: np.ndarray, factor: float) -> np.ndarray:
    """Speed and pitch together."""
    return np.interp(np.arange(0, len(x) - 1, factor), np.arange(len(x)), x)


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
