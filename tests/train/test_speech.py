"""Learning to speak: letters that are tones, texts that were never heard, and a core that stays as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from media.recordings import hz_of
from model.speaking import TINY
from train.tiny import LETTERS, recipe_tree, tones

from recipes.speech.griffin_lim import griffin_lim
from recipes.speech.speech import Pronounced, SpeechRecipe
from whisper_moe.generate.speech import Speaker
from whisper_moe.train.reading import RecipeError, checked
from whisper_moe.train.run import run as train
from whisper_moe.weights.checkpoint import load_checkpoint, load_speech

TONE = 0.2
PAUSE = 0.04


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tones with what is known of them beside them, and how their letters are pronounced: as they are written."""
    folder = tones(tmp_path_factory.mktemp("spoken"), clips=48)
    head, *lines = (folder / "transcripts.tsv").read_text("utf-8").splitlines()
    said = []
    for number, line in enumerate(lines):
        path, text = line.split("\t")
        plan = {"phonemes": text, "seconds": [0.0, *[TONE] * len(text), 0.0]}
        plan |= {name: [0.0] * (len(text) + 2) for name in ("pitch", "loudness")}  # only its letter says what sounds
        (folder / path).with_suffix(".json").write_text(json.dumps(plan))
        lines[number] = f"{line}\ten\tann"
        said.append(f"en\t{text}\t{text}")
    (folder / "transcripts.tsv").write_text("\n".join([f"{head}\tlanguage\tspeaker", *lines]) + "\n", "utf-8")
    (folder / "said.tsv").write_text("\n".join(said) + "\n", "utf-8")
    return folder


def recipe(material: Path, spoken: Path, **optimisation: Any) -> dict[str, Any]:
    tree = recipe_tree(material / "model", spoken / "transcripts.tsv", **optimisation)
    tree["model"]["speech"] = TINY.model_dump(mode="json") | {"d_model": 48, "ffn_dim": 96}
    tree["speech"] = {"pronounced": str(spoken / "said.tsv"), "words": 8, "factors": {"mel": 4.0, "letters": 1.0}}
    tree["data"]["loader"] = {"batch_size": 8}
    return tree


def test_it_says_what_it_never_heard_and_the_core_stays(material: Path, spoken: Path, tmp_path: Path) -> None:
    tree = recipe(material, spoken, steps=240, lr=2e-2, warmup=20, schedule="cosine", clip=None)
    assert (
        train(
            checked(SpeechRecipe, tree | {"run": {"threads": 1, "checkpoint_every": None}}, "tones"), tmp_path / "run"
        )
        == 0
    )
    before, after = load_checkpoint(material / "model"), load_checkpoint(tmp_path / "run/model", aside=False)
    assert before.config == after.config.model_copy(update={"context_margin": before.config.context_margin})
    assert all(torch.equal(before.state[key], after.state[key]) for key in before.state)
    text = "hcafbd"
    assert text not in (spoken / "said.tsv").read_text()
    speech = Speaker(load_speech(tmp_path / "run/model"), griffin_lim).speak(text, voice="ann")
    assert speech.sentences[0][1] == text and speech.duration == pytest.approx(TONE * len(text), rel=0.15)
    pieces = np.array_split(speech.samples, len(text))
    heard = [hz_of(piece[len(piece) // 4 : -len(piece) // 4]) for piece in pieces]
    nearest = [LETTERS[min(7, max(0, round((hz - 300) / 150)))] for hz in heard]
    assert sum(a == b for a, b in zip(nearest, text, strict=True)) >= 4, heard


def test_a_run_goes_on_as_if_it_had_not_stopped(material: Path, spoken: Path, tmp_path: Path) -> None:
    for name, steps in (("whole", (6,)), ("parts", (3, 6))):
        for most in steps:
            tree = recipe(material, spoken, steps=most)
            tree["data"]["evaluation"] = tree["data"]["train"]
            tree["evaluation"] = {"every": 3, "metric": "loss", "limit": 5}
            assert train(checked(SpeechRecipe, tree, "tones"), tmp_path / name, resume=True) == 0
    whole, parts = (load_checkpoint(tmp_path / name / "model").state for name in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    judged = [rows_of(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts")]
    assert judged[0] == judged[1] and [row["step"] for row in judged[0]] == [3, 6]
    first, last = (row["evaluation"] for row in judged[0])
    assert 0 < last["mel"] < first["mel"] and last["letters"] < first["letters"] and last["durations"] > 0


def test_only_the_loss_tells_how_speaking_goes(material: Path, spoken: Path, tmp_path: Path) -> None:
    tree = recipe(material, spoken, steps=2)
    tree["data"]["evaluation"] = tree["data"]["train"]
    with pytest.raises(ValueError, match=r"evaluation\.metric is wer, and the loss is all there is here"):
        train(checked(SpeechRecipe, tree, "tones"), tmp_path / "run")


def rows_of(metrics: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in metrics.read_text("utf-8").splitlines()]
    return [row for row in rows if "evaluation" in row]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seconds": [0.1]}, "must be of each phoneme"),
        ({"seconds": [-1.0, 0.1, 0.1]}, "must be of each phoneme"),
        ({"pitch": "high"}, "says nothing of what each phoneme sounds like"),
        (None, "says nothing of what each phoneme sounds like"),
        ({"speaker": "eve"}, "its speaker 'eve' is none of ann, bob, uma"),
    ],
)
def test_a_sound_without_a_plan_is_named(
    material: Path, spoken: Path, tmp_path: Path, change: dict[str, Any] | None, said: str
) -> None:
    plan = {"phonemes": "a", "seconds": [0.1, 0.1, 0.1], "pitch": [0, 0, 0], "loudness": [0, 0, 0]} | (change or {})
    (tmp_path / "0.wav").write_bytes((spoken / "0.wav").read_bytes())
    if change is not None:
        (tmp_path / "0.json").write_text(json.dumps(plan))
    table = tmp_path / "table.tsv"
    table.write_text(f"path\ttext\tlanguage\tspeaker\n0.wav\ta\ten\t{plan.get('speaker', 'ann')}\n")
    tree = recipe(material, tmp_path)
    tree["data"]["train"][0]["source"], tree["speech"]["pronounced"] = str(table), None
    with pytest.raises(ValueError, match=said):
        train(checked(SpeechRecipe, tree, "broken"), tmp_path / "run")


def test_longer_texts_are_read_oftener_and_lines_that_are_none_are_named(tmp_path: Path) -> None:
    table = tmp_path / "said.tsv"
    table.write_text("en\tab\tab\nhi\tabcdefgh abcdefgh ab\tabc\nfr\tx\tx\nen\ta\tabcdefg\n")
    letters, phonemes = Pronounced(table, TINY).drawn(400, 5, torch.device("cpu"))
    assert {*map(len, phonemes)} == {2, 3} and letters[1].lengths.count(20) > 5 * letters[1].lengths.count(2) > 0
    assert all(
        (length == 20) == bool(language) for length, language in zip(letters[1].lengths, letters[2], strict=True)
    )
    for content, said in (("en\tab\n", "line 1: needs a language"), ("fr\tx\tx\n", "no row is of en or hi")):
        table.write_text(content)
        with pytest.raises(ValueError, match=said):
            Pronounced(table, TINY)


def test_the_recipe_that_comes_along_is_one(material: Path) -> None:
    path = Path(__file__).parents[2] / "recipes/speech/speech.yaml"
    given = checked(SpeechRecipe, yaml.safe_load(path.read_text("utf-8")), "speech")
    assert given.model.speech is not None and given.speech.pronounced is not None
    assert len(set(given.model.speech.phonemes)) == len(given.model.speech.phonemes)
    assert len(set(given.model.speech.letters)) == len(given.model.speech.letters)


def test_what_cannot_learn_to_speak_is_told(material: Path, spoken: Path, tmp_path: Path) -> None:
    tree = recipe(material, spoken)
    with pytest.raises(RecipeError, match=r"speech\.factors\.mels.*: Input should be 'mel', 'durations'.*, got 'mels'"):
        checked(SpeechRecipe, tree | {"speech": {"factors": {"mels": 1.0}}}, "test")
    del tree["model"]["speech"]
    with pytest.raises(RecipeError, match=r"the model has no part that speaks; model\.speech adds one"):
        train(checked(SpeechRecipe, tree, "test"), tmp_path / "run")
