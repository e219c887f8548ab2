"""``whisper-moe upcycle``, from a source to a checkpoint that was read back, and what is taken over from the source."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
from commandline import Run, noise
from generate.tiny import CONFIG
from weights.whispers import hub_model, write_folder

from whisper_moe import WhisperMoE
from whisper_moe.weights import checkpoint
from whisper_moe.weights.checkpoint import Loaded, read_config, save_checkpoint
from whisper_moe.weights.load import load_model
from whisper_moe.weights.upcycle import answer

DENSE = CONFIG.model_copy(update={"moe": None, "ttt": None})
PLAIN = ["--experts", "2", "--router-layer", "1", "--ttt-layers", "1"]


@pytest.fixture
def whisper(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "whisper", hub_model(DENSE))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("quantize", [True, False])
def test_what_was_written_is_read_back_and_compared(
    whisper: Path, tmp_path: Path, run: Run, shared: bool, quantize: bool
) -> None:
    flags = ["--shared" if shared else "--no-shared", *(["--quantize"] if quantize else [])]
    status, _, said = run("upcycle", whisper, "-o", tmp_path / "m", *PLAIN, *flags, "--add-language", "or")
    assert status == 0
    assert "read back, logits differ by " in said
    difference = float(said.split("read back, logits differ by ")[1])
    loaded, source = load_model(tmp_path / "m"), load_model(whisper)
    expected = (answer(loaded.config, loaded.state) - answer(source.config, source.state)).abs().max().item()
    assert difference == pytest.approx(expected, rel=0.06, abs=1e-7)  # two digits are said
    assert difference > 3e-4 if quantize else difference < 1e-4


@pytest.mark.parametrize("damage", ["bytes", "weights", "zeros"])
def test_what_was_written_wrongly_is_not_called_done(
    whisper: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    def wrong(folder: Path, model: Loaded, **options: Any) -> None:
        if damage != "bytes":
            factor = 5.0 if damage == "weights" else 0.0
            state = {key: tensor * factor if ".ffn." in key else tensor for key, tensor in model.state.items()}
            model = replace(model, state=state)
        save_checkpoint(folder, model, **options)
        if damage == "bytes":
            file = folder / "core.safetensors"
            content = bytearray(file.read_bytes())
            content[-3] ^= 4
            file.write_bytes(content)

    monkeypatch.setattr(checkpoint, "save_checkpoint", wrong)
    status, _, said = run("upcycle", whisper, "-o", tmp_path / "m", *PLAIN)
    assert status == 1
    assert ("core.safetensors: sha256 differs" if damage == "bytes" else "do not use it: read back") in said
    assert "with 2 experts" not in said


def test_a_dense_fine_tune_of_this_project_is_upcycled_and_keeps_its_margin(
    whisper: Path, tmp_path: Path, run: Run
) -> None:
    loaded = load_model(whisper)
    config = loaded.config.model_copy(update={"context_margin": 0.7})
    save_checkpoint(tmp_path / "tuned", replace(loaded, config=config))
    assert run("upcycle", tmp_path / "tuned", "-o", tmp_path / "m", *PLAIN).status == 0
    config = read_config(tmp_path / "m" / "config.json")
    assert config.context_margin == 0.7 and config.moe is not None
    again = run("upcycle", tmp_path / "m", "-o", tmp_path / "again", *PLAIN)
    assert again.status == 1 and "only a dense Whisper can be upcycled" in again.err


def state_language(folder: Path, **stated: Any) -> None:
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | stated))


def test_the_language_that_a_fine_tune_states_is_told_and_taken_unless_another_is_asked_for(
    whisper: Path, tmp_path: Path, run: Run
) -> None:
    silent = run("upcycle", whisper, "-o", tmp_path / "silent", *PLAIN)
    assert silent.status == 0 and "states the language" not in silent.err
    state_language(whisper, language="hindi", task="transcribe")
    done = run("upcycle", whisper, "-o", tmp_path / "m", *PLAIN)
    assert done.status == 0 and "whisper states the language hi: what is heard is taken for that" in done.err
    sound = noise(tmp_path / "a.wav")
    model = WhisperMoE.from_pretrained(tmp_path / "m", dtype="float32")
    free = WhisperMoE.from_pretrained(tmp_path / "silent", dtype="float32")
    quick: dict[str, Any] = {"temperatures": (0.0,), "no_speech_threshold": None}
    assert model.stated_language == "hi" and free.stated_language is None
    assert model.transcribe(sound, **quick) == free.transcribe(sound, language="hi", **quick)
    assert model.transcribe(sound, language="auto", **quick) == free.transcribe(sound, **quick)
    assert model.transcribe(sound, language="en", **quick).language == "en"
    assert model.transcribe(sound, allowed_languages=("en",), **quick).language == "en"
    assert model.detect_language(sound) == free.detect_language(sound)


def test_a_model_that_gets_a_language_states_none(whisper: Path, tmp_path: Path, run: Run) -> None:
    state_language(whisper, forced_decoder_ids=[[1, 259], [2, 261]])
    done = run("upcycle", whisper, "-o", tmp_path / "m", *PLAIN, "--add-language", "or")
    assert done.status == 0 and "states the language" not in done.err
    assert WhisperMoE.from_pretrained(tmp_path / "m").stated_language is None
