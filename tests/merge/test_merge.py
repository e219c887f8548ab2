"""Fine-tunes become one model that asks the right one: built from tiny Whispers, with noises that a router can tell apart."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from generate.tiny import tiny_whisper_moe

from whisper_moe import WhisperMoE
from whisper_moe.cli import app
from whisper_moe.config import SAMPLE_RATE, ModelConfig
from whisper_moe.generate.mixture import Mixture
from whisper_moe.generate.options import TranscribeOptions
from whisper_moe.weights.checkpoint import load_checkpoint

KINDS = {"low": (120, 400), "high": (2500, 6000), "other": (700, 1500)}
"""Bands of noise, in Hz: two that experts are for, and one that none is."""
DENSE = ModelConfig.model_validate(tiny_whisper_moe().config.model_dump() | {"moe": None, "ttt": None})


def noise(kind: str, seed: int, seconds: float = 1.5) -> np.ndarray:
    low, high = KINDS[kind]
    samples = np.random.default_rng(seed).standard_normal(round(seconds * SAMPLE_RATE))
    spectrum, hertz = np.fft.rfft(samples), np.fft.rfftfreq(len(samples), 1 / SAMPLE_RATE)
    found = np.fft.irfft(np.where((hertz > low) & (hertz < high), spectrum, 0), len(samples))
    return (found / np.abs(found).max() / 2).astype(np.float32)


def write_probe(folder: Path, kind: str, clips: int = 8) -> str:
    folder.mkdir()
    lines = ["path\ttext\tlanguage"]
    for index in range(clips):
        with wave.open(str(folder / f"{index}.wav"), "wb") as file:
            file.setparams((1, 2, SAMPLE_RATE, 0, "NONE", ""))
            file.writeframes((noise(kind, index) * 32767).astype("<i2").tobytes())
        lines.append(f"{index}.wav\thello\ten")
    (folder / "clips.tsv").write_text("\n".join(lines) + "\n")
    return str(folder / "clips.tsv")


class Family:
    """A base, two fine-tunes of it, and the folder that all lie in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = tiny_whisper_moe(config=DENSE)
        self.base.save_pretrained(folder / "base")
        for name, seed in (("low", 1), ("high", 2)):
            expert = tiny_whisper_moe(config=DENSE)
            torch.manual_seed(seed)
            with torch.no_grad():
                for key, parameter in expert.model.named_parameters():
                    if "token_embedding" not in key and key != "decoder.positions":
                        parameter += 0.3 * torch.randn_like(parameter) * parameter.std().nan_to_num(1.0)
            expert.save_pretrained(folder / name)
        self.probes = {kind: write_probe(folder / f"{kind}-clips", kind) for kind in KINDS}

    def merge(self, output: str, *more: str) -> Path:
        given = ["merge", str(self.folder / "low"), str(self.folder / "high"), "--base", str(self.folder / "base")]
        given += ["--probe", self.probes["low"], "--probe", self.probes["high"], "--none", self.probes["other"]]
        app([*given, "-o", str(self.folder / output), *more], standalone_mode=False)
        return self.folder / output


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(tmp_path_factory.mktemp("merge"))


@pytest.fixture(scope="module")
def delta(family: Family) -> Path:
    return family.merge("delta", "--delta-rank", "16")


@pytest.fixture(scope="module")
def whole(family: Family) -> Path:
    return family.merge("model", "--granularity", "model", "--gate-threshold", "0.5")


def said(model: WhisperMoE, clips: list[np.ndarray]) -> list[tuple[int, ...]]:
    options = TranscribeOptions(language="en", temperatures=(0.0,))
    return [r.hypothesis.tokens for r in model._decoder.decode(clips, options, temperature=0.0, margin=2.5)]


CLIPS = [(kind, noise(kind, seed)) for seed in (100, 101) for kind in KINDS]


@pytest.mark.parametrize("granularity", ["delta", "whole"])
def test_each_clip_is_answered_by_its_expert(granularity: str, family: Family, request: pytest.FixtureRequest) -> None:
    merged = WhisperMoE.from_pretrained(request.getfixturevalue(granularity), dtype="float32")
    options = TranscribeOptions(language="en", temperatures=(0.0,))
    results = merged._decoder.decode([clip for _, clip in CLIPS], options, temperature=0.0, margin=2.5)
    alone = {
        name: WhisperMoE.from_pretrained(family.folder / name, dtype="float32") for name in ("low", "high", "base")
    }
    for (kind, clip), result in zip(CLIPS, results, strict=True):
        expert = "none" if kind == "other" else kind
        assert [name for name, gate in result.experts if gate > 0] == [expert]
        assert result.hypothesis.tokens == said(alone["base" if kind == "other" else kind], [clip])[0]
    assert len({result.hypothesis.tokens for result in results[:3]}) == 3, "the experts say different things"


def test_an_expert_of_full_rank_is_the_fine_tune_but_for_float16(delta: Path, family: Family) -> None:
    merged, alone = load_checkpoint(delta), load_checkpoint(family.folder / "high")
    base, key = load_checkpoint(family.folder / "base"), "encoder.blocks.1.ffn.up"
    down, up = (merged.state[f"{key}.experts.{name}"][1] for name in ("down", "up"))
    weight = base.state[f"{key}.weight"] + up[:-1].T @ down
    change = (alone.state[f"{key}.weight"] - base.state[f"{key}.weight"]).abs().max()
    assert (weight - alone.state[f"{key}.weight"]).abs().max() < 2e-3 * change
    assert [path.name for path in sorted((delta / "experts").iterdir())] == [
        "00-low.safetensors",
        "01-high.safetensors",
    ]


def test_two_whole_models_are_mixed_by_their_gates(whole: Path, family: Family) -> None:
    merged = WhisperMoE.from_pretrained(whole, dtype="float32")
    mixture = merged._decoder
    assert isinstance(mixture, Mixture)
    gates = torch.tensor([[0.7, 0.3], [0.2, 0.8]])
    clips = [clip for _, clip in CLIPS[:2]]
    pair = mixture._decoder((0, 1), gates)
    encoded = pair.encode(clips, 2.5)
    tokens = torch.tensor([[merged.tokenizer.sot]] * 2)
    logits, state = pair.step(tokens, pair.start(encoded))
    each = [
        decoder.step(tokens, decoder.start(decoder.encode(clips, 2.5)))[0] for decoder in (f() for f in mixture._each)
    ]
    expected = sum(gates[:, i : i + 1] * logits.softmax(-1) for i, logits in enumerate(each))
    torch.testing.assert_close(logits.exp(), expected)
    kept = state.select(torch.tensor([0, 1])).keep([1])
    torch.testing.assert_close(
        pair.step(torch.tensor([[5]]), kept)[0], pair.step(torch.tensor([[5], [5]]), state)[0][1:]
    )


def test_lazy_experts_say_the_same(whole: Path) -> None:
    clips = [clip for _, clip in CLIPS]
    eager, lazy = (WhisperMoE.from_pretrained(whole, dtype="float32", lazy=lazy) for lazy in (False, True))
    assert said(eager, clips) == said(lazy, clips)
