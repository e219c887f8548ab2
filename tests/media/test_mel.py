"""The log-mel spectrogram against both references, and what it promises besides."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.media.recordings import tone
from whisper_moe.media.mel import HOP, MIN_SAMPLES, N_FFT, log_mel, mel_filters


def sounds() -> dict[str, Tensor]:
    """Loud, faint, narrow, sparse and silent; lengths that the hop divides and that it does not."""
    rng = torch.Generator().manual_seed(0)
    chirp = torch.sin(torch.arange(70_001) ** 1.7 / 300)
    click = torch.zeros(16_000)
    click[7_000] = 1
    speech_like = torch.randn(48_123, generator=rng) * torch.sin(torch.arange(48_123) / 4_000).abs() ** 4
    return {
        "noise": torch.randn(52_345, generator=rng) * 0.1,
        "faint": torch.randn(16_000, generator=rng) * 1e-4,
        "chirp": chirp * 0.5,
        "tone": torch.from_numpy(tone(1.23)[0]),
        "click": click,
        "pauses": speech_like * 0.3,
        "silence": torch.zeros(8_000),
        "shortest": torch.randn(MIN_SAMPLES, generator=rng),
    }


SOUNDS = sounds()


def openai_mel(audio: Tensor, n_mels: int) -> Tensor:
    whisper_audio = pytest.importorskip("whisper.audio")
    return whisper_audio.log_mel_spectrogram(audio, n_mels)


def transformers_mel(audio: Tensor, n_mels: int) -> Tensor:
    transformers = pytest.importorskip("transformers")
    extractor = transformers.WhisperFeatureExtractor(feature_size=n_mels)
    features = extractor(audio.numpy(), sampling_rate=16_000, padding=False, return_tensors="np")["input_features"][0]
    return torch.from_numpy(np.asarray(features))


@pytest.mark.parametrize("n_mels", [80, 128])
@pytest.mark.parametrize("reference", [openai_mel, transformers_mel])
@pytest.mark.parametrize("name", SOUNDS)
def test_equal_to_both_references(name: str, reference, n_mels: int) -> None:
    expected = reference(SOUNDS[name], n_mels)
    mel = log_mel(SOUNDS[name], n_mels)
    assert mel.shape == expected.shape == (n_mels, len(SOUNDS[name]) // HOP)
    torch.testing.assert_close(mel, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("n_mels", [80, 128])
def test_filters_are_the_ones_both_references_carry(n_mels: int) -> None:
    filters = mel_filters(n_mels, torch.device("cpu"), torch.float64)
    assert filters.shape == (n_mels, N_FFT // 2 + 1)
    openai = pytest.importorskip("whisper.audio").mel_filters("cpu", n_mels)
    torch.testing.assert_close(filters.float(), openai, rtol=1e-6, atol=0)
    extractor = pytest.importorskip("transformers").WhisperFeatureExtractor(feature_size=n_mels)
    torch.testing.assert_close(filters, torch.from_numpy(extractor.mel_filters).T, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("rows", [1, 3, 300])
def test_a_batch_is_its_rows_each_with_its_own_maximum(rows: int) -> None:
    audio = torch.stack([SOUNDS["noise"][:2_000] * 10.0 ** -(i % 4) for i in range(rows)])
    expected = torch.stack([log_mel(row) for row in audio])
    torch.testing.assert_close(log_mel(audio), expected, rtol=0, atol=1e-6)


def test_the_maximum_does_not_leak_between_utterances() -> None:
    faint, loud = SOUNDS["faint"], SOUNDS["noise"][:16_000] * 5
    together = log_mel(torch.cat([faint, loud]))[:, :90]
    assert (log_mel(faint)[:, :90] - together).abs().max() > 0.1
    torch.testing.assert_close(log_mel(torch.stack([faint, loud]))[0], log_mel(faint), rtol=0, atol=1e-6)


def test_padding_is_silence_behind_the_sound() -> None:
    audio = SOUNDS["pauses"]
    by_hand = torch.cat([audio, torch.zeros(64_000 - len(audio))])
    assert torch.equal(log_mel(audio, samples=64_000), log_mel(by_hand))
    assert torch.equal(log_mel(audio, samples=len(audio)), log_mel(audio))


@pytest.mark.parametrize("n", [0, 1, 160, MIN_SAMPLES - 1])
def test_the_shortest_sounds_are_refused_bare_and_fine_with_padding(n: int) -> None:
    with pytest.raises(ValueError, match=f"{MIN_SAMPLES} samples, got {n}"):
        log_mel(torch.ones(n))
    mel = log_mel(torch.ones(n), samples=3_200)
    assert mel.shape == (80, 20) and mel.isfinite().all()
    assert log_mel(torch.ones(MIN_SAMPLES)).shape == (80, 1)


@pytest.mark.parametrize("bad", [torch.zeros(800, dtype=torch.int16), torch.zeros(1, 1, 800), torch.tensor(0.5)])
def test_other_types_and_shapes_are_refused(bad: Tensor) -> None:
    with pytest.raises(ValueError, match="log_mel takes"):
        log_mel(bad)


def test_gradients_flow_and_are_right() -> None:
    audio = (
        torch.randn(2, 700, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 0.1
    ).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: log_mel(x, 80), audio, eps=1e-7, atol=1e-4, fast_mode=True)
    log_mel(audio).sum().backward()
    assert audio.grad is not None and audio.grad.abs().sum() > 0


def test_constants_first_made_in_inference_mode_still_train() -> None:
    mel_filters.cache_clear()
    log_mel.__globals__["_hann"].cache_clear()
    with torch.inference_mode():
        log_mel(SOUNDS["click"])
    audio = SOUNDS["click"].clone().requires_grad_()
    log_mel(audio).sum().backward()
    assert audio.grad is not None
