"""Silence, noise, tones and clips too short for a word: little is written, and never a loop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from media.recordings import tone

from whisper_moe import WhisperMoE
from whisper_moe.generate.result import compression_ratio
from whisper_moe.media.audio import load_audio

SAMPLE = Path(__file__).parents[2] / "examples" / "sample.m4a"
RATE = 16_000


def bounded(text: str, seconds: float) -> bool:
    """Whether what was written where nobody spoke is short, or at least no loop."""
    return len(text) <= 20 + 15 * seconds and (len(text) < 30 or compression_ratio(text) < 2.4)


def sounds_that_are_no_speech(seconds: float) -> dict[str, np.ndarray]:
    time = np.arange(round(seconds * RATE)) / RATE
    click = np.zeros(len(time), np.float32)
    click[len(click) // 2] = 0.9
    notes = [
        np.sin(2 * np.pi * hz * time) * np.sin(2 * np.pi * pace * time) ** 2
        for hz, pace in ((261.6, 1.0), (329.6, 0.7), (392.0, 0.5), (523.3, 1.3))
    ]
    return {
        "silence": np.zeros(len(time), np.float32),
        "noise": np.random.default_rng(0).normal(0, 0.1, len(time)).astype(np.float32),
        "440 Hz": tone(seconds)[0],
        "music": (0.1 * sum(notes)).astype(np.float32),
        "click": click,
    }


def test_where_nobody_speaks_little_is_written(default_model: WhisperMoE) -> None:
    """Sounds of 0.2 and 1 s, and pieces of words, which are no loops either."""
    speech, texts = load_audio(SAMPLE), {}
    sounds = {(name, s): sound for s in (0.2, 1.0) for name, sound in sounds_that_are_no_speech(s).items()}
    sounds |= {("piece", 0.2 + at): speech[at * RATE :][: RATE // 5] for at in range(1, 5)}
    results = default_model.transcribe(list(sounds.values()))
    for (name, seconds), result in zip(sounds, results, strict=True):
        assert bounded(result.text, min(seconds, 1.0)), (name, seconds, result.text)
        texts[name, seconds] = result.text
        assert name != "piece" or sum(len(segment.tokens) for segment in result.segments) <= 40
    assert texts["silence", 0.2] == texts["silence", 1.0] == ""


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [5.0, 35.0])
def test_where_nobody_speaks_for_long_little_is_written(default_model: WhisperMoE, seconds: float) -> None:
    sounds = sounds_that_are_no_speech(seconds)
    texts = [result.text for result in default_model.transcribe(list(sounds.values()))]
    for name, text in zip(sounds, texts, strict=True):
        assert bounded(text, seconds), (name, text)
