"""What the tests of the command line share: something to transcribe, and flags for a model that does it quickly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from media.recordings import encode

from whisper_moe import WhisperMoE

SAMPLE = Path(__file__).parent.parent / "examples" / "sample.m4a"
RATE = 16_000


def noise(path: Path, seconds: float = 1.0, seed: int = 0) -> Path:
    wave = np.random.default_rng(seed).normal(0, 0.1, round(seconds * RATE)).astype(np.float32)
    return encode(path, wave[None], RATE, "pcm_f32le")


def trusting_flags(model: WhisperMoE, folder: Path) -> list[str]:
    """Saves the model there; with these flags whatever it says is believed at once."""
    model.save_pretrained(folder)
    trusting = ["--logprob-threshold", "-99", "--no-speech-threshold", "1", "--compression-ratio-threshold", "99"]
    return ["--model", str(folder), "--dtype", "float32", "--temperature-increment-on-fallback", "0", *trusting]
