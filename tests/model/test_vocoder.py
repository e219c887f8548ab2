"""Mel frames to a waveform: windows add up to the sound they were taken of, and Griffin-Lim finds one with the same mels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from commandline import SAMPLE
from model.speaking import tiny_speech

from recipes.speech.griffin_lim import griffin_lim
from whisper_moe.media.audio import load_audio
from whisper_moe.media.mel import HOP, N_FFT, log_mel
from whisper_moe.model.speech import WINDOW, inverse


def sweep(samples: int = 16_000) -> torch.Tensor:
    """A tone that rises, with two overtones."""
    phase = torch.cumsum(torch.linspace(0.05, 0.25, samples), 0)
    return 0.2 * (phase.sin() + 0.5 * (2 * phase).sin() + 0.3 * (3 * phase).sin())


def test_windows_add_up_to_their_sound() -> None:
    sound = sweep().double()
    for size in (N_FFT, WINDOW):
        window = torch.hann_window(size, dtype=torch.float64)
        pieces = F.pad(sound[None], (size // 2, size // 2)).unfold(-1, size, HOP)[:, : len(sound) // HOP]
        found = inverse(torch.fft.rfft(pieces * window, dim=-1).transpose(1, 2), window)[0]
        assert len(found) == len(sound)
        torch.testing.assert_close(found[:-WINDOW], sound[:-WINDOW], rtol=0, atol=1e-9)


def test_griffin_lim_finds_a_sound_with_these_mels() -> None:
    sound = torch.from_numpy(load_audio(SAMPLE))[:32_000]
    mel = log_mel(sound)
    found = griffin_lim(mel)
    assert found.shape == (32_000,) and torch.equal(found, griffin_lim(mel))
    apart = (log_mel(0.1 * torch.randn(32_000)) - mel).abs().mean()
    assert (log_mel(found) - mel).abs().mean() < 0.06 * apart


def test_the_vocoder_gives_160_samples_a_frame_and_learns() -> None:
    vocoder = tiny_speech().vocoder.train()
    mel = torch.randn(2, 80, 30)
    sound = vocoder(mel)
    assert sound.shape == (2, 30 * HOP)
    sound.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in vocoder.parameters())
    torch.testing.assert_close(vocoder(mel)[1], vocoder(mel[1:])[0], rtol=0, atol=1e-5)
