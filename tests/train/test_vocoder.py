"""Learning to sound: stretches are what they are cut of, no sound is far from itself, critics and vocoder keep apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from generate.tiny import tiny_whisper_moe
from media.recordings import encode
from model.speaking import TINY, tiny_speech
from train.tiny import recipe_tree

from recipes.speech.vocoder import (
    Critics,
    SoundReader,
    VocoderRecipe,
    adversarial,
    mel_distance,
    spectral_distance,
)
from whisper_moe.data.sample import AudioRef, DataError, Sample
from whisper_moe.media.mel import HOP, window_mel
from whisper_moe.train.reading import RecipeError, checked
from whisper_moe.train.recipe import load_recipe
from whisper_moe.train.run import run as train
from whisper_moe.weights.checkpoint import load_checkpoint

POSITIONS = 10
SPEAKS = tiny_whisper_moe()


def sound(seconds: float, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(seed).normal(0, 0.1, round(seconds * 16_000)).astype(np.float32)


def sample_of(folder: Path, seconds: float) -> Sample:
    path = encode(folder / f"{seconds}.wav", sound(seconds)[None], 16_000, "pcm_f32le")
    audio = AudioRef(path=str(path))
    return Sample(id="clip", task="transcribe", text="", language="en", target_language="en", audio=audio)


@pytest.mark.parametrize("margin", [0.0, 0.37, 1.0])
def test_a_stretch_is_of_one_place_in_the_sound_and_its_mels(tmp_path: Path, margin: float) -> None:
    reader = SoundReader(SPEAKS.tokenizer, SPEAKS.config, POSITIONS)
    sample, whole = sample_of(tmp_path, 1.0), sound(1.0)
    both = reader.read(sample, margin).mel
    assert both.shape == (80 + HOP, 2 * POSITIONS) and reader.measure(sample, 1.0) == (POSITIONS * 2 * HOP, 1)
    begin = 2 * round(margin * (50 - POSITIONS))
    torch.testing.assert_close(both[:80], window_mel(whole, 80, 50)[:, begin : begin + 2 * POSITIONS])
    samples = both[80:].T.flatten().numpy()
    np.testing.assert_array_equal(samples, whole[begin * HOP : (begin + 2 * POSITIONS) * HOP])
    short = reader.read(sample_of(tmp_path, 0.05), margin).mel
    assert short.shape == both.shape and short[80:].T.flatten()[801:].abs().max() == 0


def test_a_model_s_own_frames_stand_in_for_the_sound_s(tmp_path: Path) -> None:
    reader = SoundReader(SPEAKS.tokenizer, SPEAKS.config, POSITIONS)
    sample = sample_of(tmp_path, 1.0)
    made = np.random.default_rng(1).normal(size=(80, 98)).astype(np.float16)
    np.save(tmp_path / "1.0.mel.npy", made)
    both = reader.read(sample, 1.0).mel
    np.testing.assert_array_equal(both[:80, :18], made[:, 80:].astype(np.float32))
    assert (both[:80, 18:] == float(made.min())).all()
    np.testing.assert_array_equal(both[80:].T.flatten(), sound(1.0)[80 * HOP :])
    for wrong in (made[:, :50], made[:40], np.array(["x"])):
        np.save(tmp_path / "1.0.mel.npy", wrong)
        with pytest.raises(DataError, match=r"1\.0\.mel\.npy"):
            reader.read(sample, 1.0)
    (tmp_path / "1.0.mel.npy").write_bytes(b"")
    with pytest.raises(DataError, match=r"1\.0\.mel\.npy"):
        reader.read(sample, 1.0)
    short = sample_of(tmp_path, 0.1)
    np.save(tmp_path / "0.1.mel.npy", made[:, :10])
    assert reader.read(short, 0.0).mel.shape == both.shape


def test_a_sound_is_at_no_distance_from_itself_and_nearer_to_a_softer_one_than_to_noise() -> None:
    wave = torch.from_numpy(np.stack([sound(0.5, 1), sound(0.5, 2)]))
    tone = torch.sin(torch.arange(8_000) * 0.2)[None] * 0.2
    for distance in (spectral_distance, lambda a, b: mel_distance(a, b, 80)):
        assert distance(wave, wave) == 0
        assert 0 < distance(0.9 * tone, tone) < distance(wave[:1], tone)


def test_critics_and_vocoder_do_not_reach_each_other() -> None:
    vocoder, critics = tiny_speech().vocoder, Critics((4, 4))
    mel, wave = torch.randn(2, 80, 40), torch.randn(2, 40 * HOP)
    theirs, ours, seen = adversarial(critics, vocoder(mel), wave)
    (ours + seen).backward()
    assert all(parameter.grad is None for parameter in critics.parameters())
    assert all(parameter.grad is not None for parameter in vocoder.parameters())
    vocoder.zero_grad()
    theirs.backward()
    assert all(parameter.grad is None for parameter in vocoder.parameters())
    assert all(parameter.grad is not None for parameter in critics.parameters())
    exact = adversarial(critics, wave, wave)
    assert exact[2] == 0 and theirs > 0


@pytest.mark.parametrize("critics", [False, True])
def test_only_the_vocoder_learns_and_a_run_goes_on_as_if_it_had_not_stopped(
    material: Path, tmp_path: Path, critics: bool
) -> None:
    tree = recipe_tree(material / "model", material / "data")
    tree["model"]["speech"] = TINY.model_dump(mode="json")
    tree["vocoder"] = {"positions": POSITIONS, "critics": critics}
    tree["data"] |= {"loader": {"batch_size": 4}, "evaluation": tree["data"]["train"]}
    tree["evaluation"] = {"every": 2, "metric": "loss"}
    for name, steps in (("whole", (4,)), ("parts", (2, 4))):
        for most in steps:
            tree["optimisation"] |= {"steps": most}
            assert train(checked(VocoderRecipe, tree, "sounds"), tmp_path / name, resume=True) == 0
    whole, parts = (load_checkpoint(tmp_path / name / "model") for name in ("whole", "parts"))
    assert all(torch.equal(whole.state[key], parts.state[key]) for key in whole.state)
    tree["optimisation"] |= {"steps": 1, "lr": 1e-12}
    assert train(checked(VocoderRecipe, tree, "sounds"), tmp_path / "start") == 0
    start = load_checkpoint(tmp_path / "start/model").state
    moved = {key for key in start if (start[key] - whole.state[key]).abs().max() > 1e-6}
    assert moved and all(key.startswith("speech.vocoder.") for key in moved)
    assert whole.config.speech == TINY
    judged = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text("utf-8").splitlines()]
    losses = [row["evaluation"] for row in judged if "evaluation" in row]
    assert len(losses) == 2 and losses[1]["loss"] < losses[0]["loss"] and {*losses[0]} == {"loss", "spectra", "mel"}


def test_the_recipe_that_comes_along_is_one_and_knows_its_losses() -> None:
    path = Path(__file__).parents[2] / "recipes/speech/vocoder.yaml"
    assert load_recipe(path, ["vocoder.critics=true"], VocoderRecipe).optimisation.betas == (0.8, 0.99)
    with pytest.raises(
        RecipeError, match=r"vocoder\.factors\.letters.*: Input should be 'spectra', 'mel', .*, got 'letters'"
    ):
        load_recipe(path, ["vocoder.factors={letters: 1.0}"], VocoderRecipe)
