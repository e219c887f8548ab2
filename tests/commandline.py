"""What the tests of the command line share: a way to call it in this process, something to transcribe, and a quick model."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import pytest
from media.recordings import encode

from whisper_moe import WhisperMoE, cli

SAMPLE = Path(__file__).parent.parent / "examples" / "sample.m4a"
RATE = 16_000
TRUSTING = (
    "--logprob-threshold -99 --no-speech-threshold 1 --compression-ratio-threshold 99 "
    "--temperature-increment-on-fallback 0 --dtype float32"
).split()
"""Whatever a model says is believed at once."""
FACTS = re.compile(r"^(.+: )?[\d.]+ s, |loaded in|times real time|:$", re.MULTILINE)


class Done(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def said(self) -> list[str]:
        """Lines on standard error that are no facts."""
        return [line for line in self.err.splitlines() if not FACTS.search(line)]


class Run(Protocol):
    def __call__(self, *arguments: str | Path, stdin: bytes = b"") -> Done: ...


class _Pipe(io.BytesIO):
    name = "<stdin>"


def runner(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Calls the command line in this process."""

    def call(*arguments: str | Path, stdin: bytes = b"") -> Done:
        monkeypatch.setattr(sys, "argv", ["whisper-moe", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(_Pipe(stdin)))
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return Done(stop.value.code if isinstance(stop.value.code, int) else 0, captured.out, captured.err)

    return call


def noise(path: Path, seconds: float = 1.0, seed: int = 0) -> Path:
    wave = np.random.default_rng(seed).normal(0, 0.1, round(seconds * RATE)).astype(np.float32)
    return encode(path, wave[None], RATE, "pcm_f32le")


def trusting_flags(model: WhisperMoE, folder: Path) -> list[str]:
    """Flags for a model that is saved there, for processes of their own."""
    model.save_pretrained(folder)
    return ["--model", str(folder), *TRUSTING]
