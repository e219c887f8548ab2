"""``whisper-moe speak``: texts, files and pipes in; sounds and facts out; mistakes before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commandline import Run
from generate.tiny import tiny_whisper_moe
from media.recordings import encode, tone
from model.speaking import TINY

from whisper_moe import Outcome, TranscribeOptions, Transcription, WhisperMoE
from whisper_moe.media.audio import load_audio
from whisper_moe.weights.checkpoint import load_checkpoint, save_checkpoint
from whisper_moe.weights.upcycle import add_parts

NO_MODEL = ["--model", "no such model"]


@pytest.fixture(scope="module")
def speaks(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("model")
    tiny_whisper_moe().save_pretrained(folder / "plain")
    plain = load_checkpoint(folder / "plain")
    config, state = add_parts(plain.config, plain.state, speech=TINY)
    state["speech.reader.out.bias"][:: 1 + len(TINY.phonemes)] = -20.0  # some phoneme for every letter
    save_checkpoint(folder / "speaks", replace(plain, config=config, state=state))
    return ["--model", str(folder / "speaks")]


def test_a_text_a_file_and_a_pipe_say_the_same(run: Run, speaks: list[str], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\ufeffabc def ghi", "utf-8")
    sounds = []
    for given in ("abc def ghi", str(tmp_path / "text.txt"), "-"):
        done = run("speak", given, "-o", str(tmp_path / "said.wav"), *speaks, "--json", stdin=b"abc def ghi")
        assert done.status == 0 and "times real time" in done.err
        facts = json.loads(done.out)
        assert facts["voice"] == "ann" and facts["sentences"][0]["text"] == "abc def ghi"
        sounds.append(load_audio(tmp_path / "said.wav"))
        assert len(sounds[-1]) / 16_000 == pytest.approx(facts["duration"], abs=1e-3)
    assert all((sound == sounds[0]).all() for sound in sounds)


@pytest.mark.parametrize(
    ("flags", "status", "said"),
    [
        (["abc", "-o", "a.txt", *NO_MODEL], 2, "a.txt: sound is written as .m4a"),
        (["abc", "-o", "a.wav", "--language", "klingon", *NO_MODEL], 2, "klingon"),
        (["abc", "-o", "a.wav", "--model", "base.en"], 1, "a Whisper, which does not speak"),
        (
            ["abc", "-o", "a.wav", "--voice", "eve"],
            1,
            "no voice is called 'eve'; there are ann (en), bob (en), uma (hi)",
        ),
        (["", "-o", "a.wav"], 1, "nothing in it can be read aloud"),
        (["abc", "-o", "a.wav", "--rate", "9"], 1, "rate must be 0.5 to 2"),
        (["abc", "-o", "none/a.wav", *NO_MODEL], 2, "there is no folder none"),
    ],
)
def test_mistakes_are_one_sentence(
    run: Run,
    speaks: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    status: int,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    if "base.en" in flags:
        flags = [*flags[:-1], str(tmp_path / "whisper")]
        (tmp_path / "whisper").mkdir()
        (tmp_path / "whisper/config.json").write_text("{}")
        (tmp_path / "whisper/model.safetensors").write_bytes(b"")
    done = run("speak", *flags, *([] if "--model" in flags else speaks))
    assert done.status == status and said in done.err and "Traceback" not in done.err
    assert not list(tmp_path.rglob("a.*"))


def test_what_is_no_text_is_named(run: Run, tmp_path: Path) -> None:
    (tmp_path / "sound.m4a").write_bytes(b"\xff\xfe\x00abc")
    done = run("speak", str(tmp_path / "sound.m4a"), "-o", str(tmp_path / "a.wav"), *NO_MODEL)
    assert done.status == 2 and "sound.m4a: not a text in UTF-8" in done.err


def test_a_transcript_is_read_aloud(
    run: Run, speaks: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = {"one": "abc def", "two": "", "three": "你好"}

    def transcribe_each(
        self: WhisperMoE, sources: Iterable[str], options: TranscribeOptions, **_: Any
    ) -> list[Outcome]:
        texts = [heard[Path(source).stem] for source in sources]
        made = [Transcription(text=text, segments=(), language="en", duration=1.0) for text in texts]
        return [Outcome("", each, None, index=index) for index, each in enumerate(made)]

    monkeypatch.setattr(WhisperMoE, "transcribe_each", transcribe_each)
    files = [encode(tmp_path / f"{name}.wav", tone(0.1), 16_000, "pcm_s16le") for name in heard]
    done = run("transcribe", *files, *speaks, "-f", "txt", "--speak", str(tmp_path / "aloud"))
    assert done.status == 1 and "three.m4a: not read aloud: nothing in it can be read aloud" in done.err
    assert [file.name for file in (tmp_path / "aloud").iterdir()] == ["one.m4a"]
    assert len(load_audio(tmp_path / "aloud/one.m4a")) > 1_000
    silent = run(
        "transcribe", files[0], "--model", speaks[1].replace("speaks", "plain"), "--speak", str(tmp_path / "aloud")
    )
    assert silent.status == 1 and "this model does not speak" in silent.err


def test_reading_aloud_never_overwrites_what_is_heard(
    run: Run, speaks: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recording = Path(encode(tmp_path / "talk.m4a", tone(0.5), 16_000, "aac"))
    before = recording.read_bytes()
    for folder in (".", str(tmp_path)):
        done = run("transcribe", "talk.m4a", *speaks, "--speak", folder)
        assert done.status == 2 and "talk.m4a: an input, which reading aloud would overwrite" in done.err
    assert recording.read_bytes() == before
