"""``whisper-moe translate``: texts, files, pipes and recordings in; translations out; mistakes before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from commandline import noise
from generate.test_translate import SENSES
from generate.tiny import CONFIG, tiny_whisper_moe

if TYPE_CHECKING:
    from commandline import Run


@pytest.fixture(scope="module")
def reads(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags for a tiny model that reads texts."""
    folder = tmp_path_factory.mktemp("models")
    tiny_whisper_moe(config=CONFIG.model_copy(update={"senses": SENSES})).save_pretrained(folder / "reads")
    tiny_whisper_moe().save_pretrained(folder / "hears")
    return ["--model", str(folder / "reads"), "--dtype", "float32", "--device", "cpu"]


def test_a_text_a_file_and_a_pipe_say_the_same(run: Run, reads: list[str], tmp_path: Path) -> None:
    (tmp_path / "said.txt").write_text("\ufeffA dog.\nA cat.\n", "utf-8")
    said = [
        run("translate", "A dog.\nA cat.", "--from", "English", *reads),
        run("translate", str(tmp_path / "said.txt"), "--to", "hi", *reads),
        run("translate", "-", *reads, stdin=b"A dog.\nA cat."),
    ]
    assert {each.status for each in said} == {0}
    assert len({each.out for each in said}) == 1 and len(said[0].out.splitlines()) == 2


def test_facts_go_to_a_file(run: Run, reads: list[str], tmp_path: Path) -> None:
    assert run("translate", "A dog.", *reads, "--json", "-o", str(tmp_path / "facts.json")).out == ""
    facts = json.loads((tmp_path / "facts.json").read_text("utf-8"))
    assert (facts["source"], facts["target"], facts["sentences"][0]["source"]) == ("en", "hi", "A dog.")


def test_what_is_said_in_a_recording_is_translated(run: Run, reads: list[str], tmp_path: Path) -> None:
    sound = noise(tmp_path / "a.wav", 1.0)
    english = run("translate", sound, "--from", "hi", "--json", *reads)
    model = ["--model", reads[1], "-f", "txt", "--dtype", "float32"]
    heard = [
        run("transcribe", sound, "--language", "hi", "--task", task, *model).out for task in ("translate", "transcribe")
    ]
    facts = json.loads(english.out)
    assert (facts["source"], facts["target"], facts["text"].split()) == ("hi", "en", heard[0].split())
    hindi = run("translate", sound, "--from", "en", "--to", "hi", "--json", *reads)
    assert json.loads(hindi.out)["target"] == "hi"
    assert run("translate", sound, "--from", "hi", "--to", "hi", *reads).out.split() == heard[1].split()


@pytest.mark.parametrize(
    ("flags", "status", "said"),
    [
        (["A dog", "--to", "Klingon"], 2, "Klingon"),
        (["A dog", "--to", "ta"], 1, "the model translates en to hi, hi to en"),
        (["gone.txt"], 2, "gone.txt: no such file"),
        (["A dog", "-o", "gone/out.txt"], 2, "there is no folder gone"),
        (["A dog", "--speak", "out.xyz"], 2, "out.xyz: sound is written as"),
        (["A dog", "--speak", "out.wav"], 1, "does not speak"),
        (["…"], 1, "nothing in it can be translated"),
        (["A dog", "--dtype", "int9"], 2, "int9"),
    ],
)
def test_a_mistake_is_one_sentence(
    run: Run,
    reads: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    status: int,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("translate", *reads, *flags)
    assert done.status == status
    assert said in done.err and done.out == ""
    assert not list(tmp_path.iterdir())


def test_a_model_that_only_hears_says_so(run: Run, reads: list[str]) -> None:
    done = run("translate", "A dog", "--model", reads[1].replace("reads", "hears"))
    assert done.status == 1 and "it has no part for texts" in done.err
