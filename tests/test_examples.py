"""Every file of ``examples/`` gives the transcript that lies beside it (float32, the embedded default)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from whisper_moe.generate.result import compression_ratio

if TYPE_CHECKING:
    from whisper_moe import WhisperMoE

EXAMPLES = Path(__file__).parent.parent / "examples"
MEDIA = sorted(p for p in EXAMPLES.iterdir() if p.suffix in {".m4a", ".ogg", ".mp3", ".mov", ".wav", ".flac"})


def test_there_are_six_examples() -> None:
    assert len(MEDIA) == 6


@pytest.mark.parametrize("path", [p for p in MEDIA if p.name != "noise.wav"], ids=lambda path: path.name)
def test_the_transcript_is_the_expected_one(path: Path, default_model: WhisperMoE) -> None:
    expected = (EXAMPLES / "expected" / f"{path.name}.txt").read_text(encoding="utf-8").strip()
    assert default_model.transcribe(path).text == expected


def test_each_window_has_its_own_language(default_model: WhisperMoE) -> None:
    result = default_model.transcribe(EXAMPLES / "languages.ogg")
    assert list(dict.fromkeys(segment.language for segment in result.segments)) == ["en", "it", "ru"]


def test_silence_is_empty_and_noise_is_bounded(default_model: WhisperMoE) -> None:
    assert default_model.transcribe(EXAMPLES / "silence.flac").text == ""
    noise = default_model.transcribe(EXAMPLES / "noise.wav").text
    assert len(noise) < 200
    assert not noise or compression_ratio(noise) < 2.4
