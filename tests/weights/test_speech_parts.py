"""What speaks lies in files of its own: left alone by who only listens, and all that is read by who only speaks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from generate.tiny import tiny_whisper_moe
from model.speaking import TINY

from whisper_moe import WhisperMoE
from whisper_moe.generate.speech import Speaker
from whisper_moe.weights.checkpoint import describe, load_checkpoint, load_speech, save_checkpoint
from whisper_moe.weights.files import CheckpointError
from whisper_moe.weights.upcycle import add_parts

FILES = {"speech", "reader", "vocoder"}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint that listens, and the same one with what speaks."""
    folder = tmp_path_factory.mktemp("speaks")
    tiny_whisper_moe().save_pretrained(folder / "listens")
    plain = load_checkpoint(folder / "listens")
    config, state = add_parts(plain.config, plain.state, speech=TINY, seed=3)
    state["speech.reader.out.bias"][:: 1 + len(TINY.phonemes)] = -20.0  # some phoneme for every letter
    save_checkpoint(folder / "speaks", replace(plain, config=config, state=state))
    save_checkpoint(folder / "int8", replace(plain, config=config, state=state), quantize=True)
    return folder / "listens", folder / "speaks"


def test_who_only_listens_reads_what_was_there_before(both: tuple[Path, Path]) -> None:
    before, after = load_checkpoint(both[0]), load_checkpoint(both[1], aside=False)
    assert before.config == after.config and before.state.keys() == after.state.keys()
    assert all(torch.equal(before.state[key], after.state[key]) for key in before.state)
    for name in ("router.safetensors", "experts/00-hindi.safetensors", "core.safetensors"):
        assert (both[0] / name).read_bytes() == (both[1] / name).read_bytes()
    sizes = describe(both[1])[1]
    assert sizes.keys() - describe(both[0])[1].keys() == FILES


def test_who_only_speaks_reads_its_own_files(both: tuple[Path, Path], tmp_path: Path) -> None:
    whole = load_checkpoint(both[1]).state
    model = load_speech(both[1])
    assert all(torch.equal(whole[f"speech.{key}"], tensor) for key, tensor in model.state_dict().items())
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in both[1].rglob("*"):
        if file.is_file():
            (damaged / file.relative_to(both[1])).parent.mkdir(exist_ok=True)
            (damaged / file.relative_to(both[1])).write_bytes(file.read_bytes())
    (damaged / "core.safetensors").write_bytes(b"")
    load_speech(damaged)
    (damaged / "speech.safetensors").write_bytes(b"x" + (both[1] / "speech.safetensors").read_bytes()[1:])
    with pytest.raises(CheckpointError, match=r"speech\.safetensors"):
        load_speech(damaged)


def test_int8_keeps_the_sound(both: tuple[Path, Path]) -> None:
    folder = both[1].with_name("int8")
    assert (folder / "speech.safetensors").stat().st_size < 0.7 * (both[1] / "speech.safetensors").stat().st_size
    ours, theirs = (load_speech(each).state_dict() for each in (both[1], folder))
    for key, tensor in ours.items():
        assert (tensor - theirs[key]).abs().max() <= tensor.abs().max() / 127, key


def test_a_model_reads_what_speaks_when_it_is_asked_to(both: tuple[Path, Path]) -> None:
    model = WhisperMoE.from_pretrained(both[1], device="cpu", dtype="float32")
    assert model.model.speech is None
    spoken = model.speak("abc def", voice="bob")
    whole = WhisperMoE.from_pretrained(both[1], device="cpu", for_inference=False)
    assert whole.model.speech is not None
    for other in (whole, Speaker.from_pretrained(both[1])):
        again = other.speak("abc def", voice="bob")
        assert again.sentences == spoken.sentences and abs(again.samples - spoken.samples).max() < 1e-5
    for silent in (WhisperMoE.from_pretrained(both[0]), tiny_whisper_moe()):
        with pytest.raises(ValueError, match="this model does not speak"):
            silent.speak("abc")


def test_a_model_has_one_part_that_speaks(both: tuple[Path, Path]) -> None:
    model = load_checkpoint(both[1])
    with pytest.raises(ValueError, match="has speech already"):
        add_parts(model.config, model.state, speech=TINY)
