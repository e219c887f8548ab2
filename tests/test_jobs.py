"""Which inputs are meant, what their outputs are called, and that these are written whole."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from generate.test_result import segment, transcription
from hypothesis import given
from hypothesis import strategies as st

from whisper_moe import MediaError, Outcome
from whisper_moe.generate.options import SubtitleOptions
from whisper_moe.generate.result import FORMATS, as_text
from whisper_moe.jobs import Job, Outputs, UsageError, expand, named, put, readable

PLAIN = SubtitleOptions()


def names(paths: list[str]) -> list[str]:
    return [job.name for job in named(paths)]


def test_inputs_of_one_name_get_different_names() -> None:
    paths = ["a/talk.m4a", "b/talk.mp3", "talk-2.wav", "c/Talk.mp4", "-", "x.tar.gz"]
    assert names(paths) == ["talk", "talk-3", "talk-2", "Talk-4", "stdin", "x.tar"]
    composed, decomposed = names(["caf\u00e9.wav", "cafe\u0301.wav"])
    assert composed == "caf\u00e9" and decomposed == "cafe\u0301-2"
    assert names([f"{folder}/audio.wav" for folder in range(20_000)])[-1] == "audio-20000"  # in no time


PATHS = st.sampled_from(["a", "A", "a-2", "a-2-2", "a.partial", "a.partial.partial", "b", "stdin", "-", "a.b"])


@given(st.lists(PATHS.map(lambda stem: f"{stem}.wav"), max_size=12))
def test_no_output_name_is_given_twice(paths: list[str]) -> None:
    jobs = named(paths)
    assert len({name.casefold() for job in jobs for name in (job.name, job.partial)}) == 2 * len(paths)
    assert all(job.name.startswith(Path(path).stem) for job, path in zip(jobs, paths, strict=True))
    assert named(paths) == jobs


def test_a_name_is_one_that_every_format_can_be_written_to(tmp_path: Path) -> None:
    inputs = ["न" * 83 + ".wav", "न" * 84 + ".wav", "x" * 251 + ".wav", "a\\b.wav", "-", os.fsdecode(b"\xff.wav")]
    jobs = named(inputs)
    assert [job.name[-2:] for job in jobs] == ["नन", "-2", "xx", "_b", "in", "\udcff"]
    for job in jobs:
        (tmp_path / f"{job.partial}.json").touch()


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("My [2024] talks/*.wav", ["My [2024] talks/[1] b.wav", "My [2024] talks/a.wav"]),
        ("?y [[]2024] talks/a.wav", ["My [2024] talks/a.wav"]),
        ("M* talks/[1] b.wav", ["My [2024] talks/[1] b.wav"]),
        ("**/*.wav", ["-x.wav", "My [2024] talks/[1] b.wav", "My [2024] talks/a.wav", "caf\u00e9.wav"]),
        ("*", ["-x.wav", "caf\u00e9.wav"]),
        ("cafe\u0301.wav", ["caf\u00e9.wav"]),
        ("cafe\u0301*", ["caf\u00e9.wav"]),
        ("~/caf\u00e9.wav", ["HERE/caf\u00e9.wav"]),
        ("~/My [2024] talks/?.wav", ["HERE/My [2024] talks/a.wav"]),
        ("./My [2024] talks//?.wav", ["./My [2024] talks/a.wav"]),
        ("-x.wav", ["-x.wav"]),
        ("gone [abc].wav", ["gone [abc].wav"]),
    ],
)
def test_a_part_of_a_path_that_is_there_is_no_pattern(
    asked: str, meant: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "My [2024] talks").mkdir()
    for name in ("My [2024] talks/a.wav", "My [2024] talks/[1] b.wav", "caf\u00e9.wav", "-x.wav"):
        (tmp_path / name).touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert expand([asked]) == [path.replace("HERE", str(tmp_path)) for path in meant]


def test_each_input_that_is_missing_is_said_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "here.wav").touch()
    os.mkfifo(tmp_path / "pipe")  # to open it would wait for a writer
    gone = ["missing [abc].wav", "no-*.wav", "[", "**/no.wav", "~nobody/a.wav", "nul\0", "x" * 300, "folder"]
    faults = ["no such file or directory"] * 6 + ["file name too long", "is a directory"]
    with caplog.at_level(logging.INFO):
        there = readable([Job(str(tmp_path / name), "", "") for name in (*gone, "here.wav", "pipe")])
    assert [Path(job.path).name for job in there] == ["here.wav", "pipe"]
    assert caplog.messages == [f"whisper-moe: {tmp_path / n}: {fault}" for n, fault in zip(gone, faults, strict=True)]


# Files out.


def written(folder: Path, result: Any, formats: str, subtitles: SubtitleOptions = PLAIN, **how: Any) -> bool:
    outputs = Outputs(formats, folder, subtitles, inputs=1)
    return outputs.deliver(Outcome("talk.m4a", result, None, **how), Job("talk.m4a", "talk", "talk.partial"))


def test_saved_files_equal_openais(tmp_path: Path) -> None:
    utils = pytest.importorskip("whisper.utils")
    result = transcription(segment(" Grüße --> 你好\t!"), segment("", 1.0, 2.0))
    assert written(tmp_path / "new" / "ours", result, "all")
    (tmp_path / "theirs").mkdir()
    utils.get_writer("all", str(tmp_path / "theirs"))(result.to_dict(), "a/talk.m4a", {})
    assert {path.name for path in (tmp_path / "new" / "ours").iterdir()} == {f"talk.{format}" for format in FORMATS}
    for name in FORMATS[:-1]:
        ours, theirs = tmp_path / "new" / "ours" / f"talk.{name}", tmp_path / "theirs" / f"talk.{name}"
        assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize("fault", ["not JSON", "full disk", "a folder of that name"])
def test_a_result_that_cannot_be_written_costs_only_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    old = tmp_path / "talk.json"
    old.mkdir() if fault == "a folder of that name" else old.write_text("older")
    if fault == "full disk":

        def refuse(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", refuse)
    result = transcription(segment(avg_logprob=float("inf") if fault == "not JSON" else -1.0))
    assert not written(tmp_path, result, "json")
    cause = {"not JSON": "JSON compliant", "full disk": "No space left on device"}.get(fault, "Is a directory")
    (said,) = caplog.messages
    assert cause in said and said.startswith("whisper-moe: ") and ("talk.m4a" in said or str(old) in said)
    assert [path.name for path in tmp_path.iterdir()] == ["talk.json"]
    assert fault == "a folder of that name" or old.read_text() == "older"


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    Outputs(None, tmp_path / "new" / "folder", PLAIN, inputs=1)
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    for path, cause in ((tmp_path / "file", "is a file"), (tmp_path / "file" / "sub", "cannot be written to")):
        with pytest.raises(UsageError, match=cause):
            Outputs(None, path, PLAIN, inputs=1)

    def refuse(**options: Any) -> None:  # permissions would not stop a root user
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(UsageError, match=f"{tmp_path}: cannot be written to: Read-only file system"):
        Outputs(None, tmp_path, PLAIN, inputs=1)


def test_several_formats_and_subtitles_of_several_files_need_a_folder() -> None:
    for formats, inputs, said in (
        ("all", 1, "several formats need a folder"),
        ("srt,json", 1, "several formats need a folder"),
        ("vtt", 2, "2 files would be one broken vtt"),
        ("docx", 1, "unknown output format 'docx': one of txt, vtt, srt, tsv, json, all"),
    ):
        with pytest.raises(UsageError, match=said):
            Outputs(formats, None, PLAIN, inputs)
    assert Outputs("srt,all,srt", Path(tempfile.gettempdir()), PLAIN, 2).formats == ["srt", "txt", "vtt", "tsv", "json"]
    assert Outputs(None, None, PLAIN, 2).formats == ["txt"]


def test_a_part_goes_when_the_whole_is_there_and_not_before(tmp_path: Path) -> None:
    part = transcription(segment())
    error = MediaError("talk.m4a", "cut off")
    outputs, job = Outputs("json,txt", tmp_path, PLAIN, inputs=1), Job("talk.m4a", "talk", "talk.partial")
    damaged = type(part)(**{**{f: getattr(part, f) for f in part.__slots__}, "damage": "cut off"})
    assert not outputs.deliver(Outcome("talk.m4a", None, error, damaged), job)
    assert {path.name for path in tmp_path.iterdir()} == {"talk.partial.json", "talk.partial.txt"}
    assert outputs.deliver(Outcome("talk.m4a", part, None), job)
    assert {path.name for path in tmp_path.iterdir()} == {"talk.json", "talk.txt"}


def test_a_transcript_is_known_by_its_files_and_the_input_that_its_json_names(tmp_path: Path) -> None:
    outputs = Outputs("json,txt", tmp_path, PLAIN, inputs=1)
    assert not outputs.has(Job("a/talk.m4a", "talk", ""))
    (tmp_path / "talk.txt").touch()
    for said, known in (({"source": "x/a/talk.m4a"}, True), ({"source": "b/talk.m4a"}, False), ({}, True), ([], True)):
        (tmp_path / "talk.json").write_text(json.dumps(said))
        assert outputs.has(Job("a/talk.m4a", "talk", "")) == known
    assert not outputs.has(Job("-", "talk", ""))
    (tmp_path / "talk.txt").unlink()
    assert not outputs.has(Job("a/talk.m4a", "talk", ""))


def test_an_output_that_cannot_be_written_to_says_that_it_is_that(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.StringIO):
        def flush(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("whisper_moe.jobs.give_up_output", lambda: None)
    monkeypatch.setattr("sys.stdout", Full())
    with pytest.raises(OSError, match="standard output"):
        put(as_text(transcription(), "txt", PLAIN))
