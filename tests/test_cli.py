"""The command line as a user meets it: exit status, what goes to which stream, and that errors come before any loading."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from commandline import SAMPLE, noise, trusting_flags
from generate.tiny import CONFIG
from media.recordings import film_in, tone
from weights.whispers import hub_model, write_folder

from whisper_moe import MediaError, Outcome, WhisperMoE, cli, commands
from whisper_moe.config import FULL_WINDOW
from whisper_moe.generate.decode import DecodingResult, WindowDecoder
from whisper_moe.jobs import named

ROOT = Path(__file__).parent.parent
FACTS = re.compile(r"^(.+: )?[\d.]+ s, |loaded in|times real time|:$", re.MULTILINE)


class Done(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def said(self) -> list[str]:
        """Lines on standard error that are no facts."""
        return [line for line in self.err.splitlines() if not FACTS.search(line)]


Run = Callable[..., Done]


class _Pipe(io.BytesIO):
    name = "<stdin>"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Calls the command line in this process."""

    def call(*arguments: str | Path, stdin: bytes = b"") -> Done:
        monkeypatch.setattr(sys, "argv", ["whisper-moe", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(_Pipe(stdin)))
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return Done(stop.value.code if isinstance(stop.value.code, int) else 0, captured.out, captured.err)

    return call


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, tiny_model: WhisperMoE) -> list[str]:
    """Flags for a model that talks nonsense quickly, and is trusted."""
    return trusting_flags(tiny_model, tmp_path_factory.mktemp("model") / "tiny")


# Usage: what cannot work is said before anything is loaded.

NO_MODEL = ["--model", "no such model"]
"""Whoever gets as far as loading it is told so, with status 1."""


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--task", "sing"], "task must be transcribe or translate, got 'sing'"),
        (["--language", "klingon"], "unknown language 'klingon'"),
        (["--languages", "en,klingon"], "unknown language 'klingon'"),
        (["-f", "docx"], "unknown output format 'docx': one of txt,"),
        (["-f", "all"], "add -o DIR"),
        (["-f", "srt,json"], "add -o DIR"),
        (["-o", str(SAMPLE)], "is a file; -o needs a folder"),
        (["--dtype", "float64"], "--dtype must be one of"),
        (
            ["--compute_type", "int16"],
            "bfloat16, float16, default, int8_float32, int8_bfloat16, int8_float16, got 'int16'",
        ),
        (["--vad_filter", "maybe"], "--vad-filter must be True or False, got 'maybe'"),
        (["--dtype", "int8", "--device", "cuda"], "--dtype int8 runs on a CPU"),
        (["--device", "a toaster"], "--device must be cpu"),
        (["-o", str(SAMPLE / "folder")], "folder: cannot be written to"),
        (["--threads", "-1"], "--threads"),
        (["--vad", "maybe"], "vad must be none, energy or silero, got 'maybe'"),
        (["--beam-size", "0"], "--beam-size"),
        (["--best_of", "some"], "'some' is neither a number nor None"),
        (["--fp16", "maybe"], "--fp16 must be True or False, got 'maybe'"),
        (["--clip_timestamps=5,2"], "clip_timestamps must be ascending seconds, start,end,start,end …, got 5,2"),
        (["--clip_timestamps=a"], "clip_timestamps must be ascending seconds, start,end,start,end …, got a"),
        (
            ["--hallucination_silence_threshold", "2"],
            "hallucination_silence_threshold must be at least 0 and needs word",
        ),
        (["--condition_on_previous_text", "yes"], "--condition-on-previous-text must be True or False, got 'yes'"),
        (["--patience", "0"], "patience must be positive"),
        (["--temperature", "-1"], "--temperature"),
        (["--temperature", "nan"], "--temperature"),
        (["--context-margin", "-1"], "--context-margin"),
        (["--suppress-tokens", "1,two"], "--suppress-tokens must be numbers with commas between them, got '1,two'"),
        (["--suppress_tokens=-2"], "suppress_tokens are token ids"),
        (["--word-timestamps", "perhaps"], "--word-timestamps must be True or False, got 'perhaps'"),
        (["--max-line-width", "20"], "need --word-timestamps True"),
        (["--highlight_words", "True"], "need --word-timestamps True"),
        (["--verbose", "2"], "--verbose must be True or False"),
        (["-", "-"], "standard input (-) can be read only once"),
        (["--skip-existing"], "--skip-existing goes by the files of a folder: add -o DIR"),
        ([str(SAMPLE), "-f", "srt"], "2 files would be one broken srt on standard output: add -o DIR"),
        ([str(SAMPLE), "-f", "vtt"], "2 files would be one broken vtt on standard output: add -o DIR"),
        ([str(SAMPLE), "gone.wav", "-f", "tsv"], "3 files would be one broken tsv on standard output: add -o DIR"),
        (["--no-such-flag"], "No such option: --no-such-flag"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_flag_that_cannot_work_is_said_in_one_sentence(run: Run, flags: list[str], said: str) -> None:
    done = run("transcribe", SAMPLE, *NO_MODEL, *flags)
    assert (done.status, done.out) == (2, "")
    assert len(done.err.splitlines()) == 1
    assert done.err.startswith("whisper-moe")
    assert said in done.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sing"], "No such command 'sing'"),
        (["detect-language"], "files"),
        (["detect-language", "a.wav", "--languages", "xx"], "unknown language 'xx'"),
        (["upcycle", "source"], "--output"),
        (["upcycle", "source", "-o", str(ROOT)], "exists already; --overwrite replaces it"),
        (["upcycle", "source", "-o", "new", "--top-k", "9"], "top_k (9) is greater than n_experts (8)"),
        (["upcycle", "source", "-o", "new", "--scope", "word"], "scope: Input should be 'segment' or 'token'"),
        (["upcycle", "source", "-o", "new", "--ttt-layers", "1,b"], "--ttt-layers must be numbers"),
        (
            ["upcycle", "source", "-o", "new", "--add-language", "or=odia:bn"],
            "a new language is given as or, or=odia or",
        ),
        (
            ["upcycle", "source", "-o", "new", "--add-language", "or=hindi"],
            "'hindi' cannot be the name of the language",
        ),
        (
            ["upcycle", "s", "-o", "new", "--add-language", "or", "--add-language", "or"],
            "--add-language gives 'or' twice",
        ),
        (["export", "source", "-o", str(ROOT)], "exists already"),
        (["export", "source", "-o", "new", "--to", "tape"], "--to must be whisper, got 'tape'"),
    ],
    ids=lambda value: " ".join(value[:2] + value[-1:]) if isinstance(value, list) else "",
)
def test_other_commands_are_as_strict(run: Run, arguments: list[str], said: str) -> None:
    done = run(*arguments)
    assert (done.status, done.out, len(done.err.splitlines())) == (2, "", 1)
    assert said in done.err
    assert "pydantic" not in done.err


def test_a_folder_that_cannot_be_written_to_is_said_before_any_loading(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("transcribe", SAMPLE, *NO_MODEL, "-o", tmp_path / "new" / "folder").status == 1
    assert list((tmp_path / "new" / "folder").iterdir()) == []

    def refuse(**options: Any) -> None:  # permissions would not stop a root user
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    done = run("transcribe", SAMPLE, *NO_MODEL, "-o", tmp_path)
    assert done.status == 2 and f"{tmp_path}: cannot be written to: Read-only file system" in done.err


@pytest.mark.parametrize("flags", [["--device", "toaster"], ["--device", "cuda:99"], []], ids=" ".join)
def test_what_only_this_machine_can_tell_is_one_sentence_too(run: Run, flags: list[str]) -> None:
    done = run("transcribe", SAMPLE, *NO_MODEL, *flags)
    assert (done.status, done.out, len(done.err.splitlines())) == (1, "", 1)
    assert ("no such model" in done.err) == (not flags)


# Files in.


def test_of_twenty_files_five_broken_ones_cost_only_themselves(run: Run, tiny: list[str], tmp_path: Path) -> None:
    whole = SAMPLE.read_bytes()
    good = [noise(tmp_path / f"noise{index:02d}.wav", 0.5 + 0.1 * index, index) for index in range(14)]
    (tmp_path / "good.m4a").write_bytes(whole)
    broken = {
        "empty.wav": b"",
        "half.m4a": whole[: len(whole) // 2],
        "list.m4a": b"#EXTM3U\n#EXTINF:10,\ngood.m4a\n",
        "one.wav": b"R",
        "text.wav": b"This is only text. " * 50,
    }
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
    files = sorted([*good, *tmp_path.iterdir()])
    files = list(dict.fromkeys(files))
    assert len(files) == 20
    done = run("transcribe", *files, "-o", tmp_path / "out", "-f", "json", *tiny, "--language", "en")
    assert done.status == 1
    written = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "out").iterdir()}
    whole_ones = {path.stem for path in [*good, tmp_path / "good.m4a"]}
    assert written.keys() - {"half.partial"} == whole_ones, (
        "what could be read of half a file may be there, under its name"
    )
    errors = [line for line in done.said if line.startswith("whisper-moe: ")]
    assert len(errors) == 6 and errors[-1] == "whisper-moe: 5 of 20 files failed"
    for name, error in zip(broken, errors, strict=False):
        assert error.startswith(f"whisper-moe: {tmp_path / name}: ")
        assert len(error) > len(f"whisper-moe: {tmp_path / name}: ") + 10
    for path in good:
        alone = run("transcribe", path, *tiny, "--language", "en")
        assert alone.status == 0
        assert "".join(alone.out.split()) == "".join(written[path.stem]["text"].split())


def test_no_two_outputs_have_one_name() -> None:
    jobs = named(["a.wav", "a.partial.wav", "a.partial.partial.mp3"])
    given = [name for job in jobs for name in (job.name, job.partial)]
    assert given[:2] == ["a", "a.partial.partial.partial"] and len(set(given)) == len(given)


def test_what_was_said_before_the_damage_goes_when_all_is_said(run: Run, tiny: list[str], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    sound, out = noise(tmp_path / "in" / "cut.wav", 6.0), tmp_path / "out"
    whole = sound.read_bytes()

    def names(content: bytes, *flags: str | Path, formats: str = "txt,json") -> list[str]:
        sound.write_bytes(content)
        run("transcribe", sound, "-o", out, "-f", formats, *tiny, "--language", "en", *flags)
        return sorted(path.name for path in out.iterdir())

    assert names(whole[: len(whole) // 2]) == ["cut.partial.json", "cut.partial.txt"]
    assert names(whole, formats="txt") == ["cut.partial.json", "cut.txt"], "only of what is written now"
    assert names(whole) == ["cut.json", "cut.txt"]

    namesake = noise(tmp_path / "in" / "cut.partial.wav")
    run("transcribe", namesake, "-o", out, "-f", "txt,json", *tiny)
    assert "cut.partial.txt" in names(whole, formats="txt"), "the whole transcript of another file"
    namesake.unlink()
    assert "cut.partial.json" in names(whole), "which says so itself"


def test_what_was_said_before_the_damage_is_kept(run: Run, tiny: list[str], tmp_path: Path) -> None:
    cut, short, bad = tmp_path / "cut.wav", tmp_path / "short.wav", tmp_path / "bad.wav"
    for path, seconds in ((cut, 50.0), (short, 6.0)):
        whole = noise(path, seconds).read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    bad.write_bytes(b"R")
    namesake = noise(tmp_path / "cut.partial.wav")
    flags = [*tiny, "--language", "en"]
    done = run("transcribe", cut, short, bad, namesake, "-o", tmp_path / "out", "-f", "json", *flags)
    assert done.status == 1
    names = ["cut.partial.json", "cut.partial.partial.json", "short.partial.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    heard = {path.name: json.loads(path.read_text()) for path in (tmp_path / "out").iterdir()}
    assert "damage" not in heard["cut.partial.json"], "the whole transcript of another file"
    long, brief = heard["cut.partial.partial.json"], heard["short.partial.json"]
    assert 24 < long["duration"] < 26 and 20 < long["segments"][-1]["end"] < 26
    assert 2.5 < brief["duration"] < 3.5 and brief["segments"]
    assert str(cut) in long["damage"] and str(short) in brief["damage"]
    errors = [line for line in done.said if line.startswith("whisper-moe: ")]
    named_there = {line.split(": ")[1] for line in errors if str(tmp_path) in line}
    assert named_there == {str(cut), str(short), str(bad)}
    kept = sorted(line for line in done.said if "what was said before" in line)
    assert len(kept) == 2 and "cut.partial.partial.json" in kept[0] and "short.partial.json" in kept[1]
    alone = run("transcribe", cut, *flags)
    assert alone.status == 1 and "".join(alone.out.split()) == "".join(long["text"].split())
    assert "on standard output" in alone.err


def test_a_result_that_cannot_be_written_costs_only_itself(run: Run, tiny: list[str], tmp_path: Path) -> None:
    files = [noise(tmp_path / name) for name in ("a.wav", "b.wav", "c.wav")]
    (tmp_path / "out" / "b.txt").mkdir(parents=True)
    done = run("transcribe", *files, "-o", tmp_path / "out", "-f", "txt", *tiny)
    assert done.status == 1
    assert (tmp_path / "out" / "a.txt").is_file() and (tmp_path / "out" / "c.txt").is_file()
    assert len(done.said) == 2 and done.said[1] == "whisper-moe: 1 of 3 files failed"
    assert done.said[0] == f"whisper-moe: {tmp_path}/out/b.txt: Is a directory"


def test_a_missing_file_is_an_error_of_its_own(run: Run, tiny: list[str], tmp_path: Path) -> None:
    done = run("transcribe", tmp_path / "gone.wav", noise(tmp_path / "here.wav"), *tiny)
    assert done.status == 1
    assert done.out.strip()
    assert f"whisper-moe: {tmp_path / 'gone.wav'}: no such file or directory" in done.said


def test_what_is_missing_is_said_first_and_costs_one_line_each(run: Run, tiny: list[str], tmp_path: Path) -> None:
    """A name with brackets is missing like any other, and not a pattern that has to match."""
    (tmp_path / "folder").mkdir()
    names = ["missing.wav", "missing [abc].wav", "no-*.wav", "[", "**/no.wav", "café.wav", "~nobody/a.wav", "x" * 300]
    faults = ["no such file or directory"] * 7 + ["file name too long"]
    gone = [tmp_path / name for name in names]
    done = run("transcribe", *gone, tmp_path / "folder", noise(tmp_path / "here.wav"), *tiny)
    assert done.status == 1 and done.out.strip()
    lines = done.err.splitlines()
    expected = [*zip(gone, faults, strict=True), (tmp_path / "folder", "is a directory")]
    assert lines[:9] == [f"whisper-moe: {path}: {fault}" for path, fault in expected]
    assert "loaded in" in lines[9] and lines[-1] == "whisper-moe: 9 of 10 files failed"


@pytest.mark.parametrize("command", ["transcribe", "detect-language"])
def test_no_model_is_loaded_where_nothing_can_be_read(run: Run, command: str, tmp_path: Path) -> None:
    done = run(command, tmp_path / "gone.wav", *NO_MODEL)
    assert (done.status, done.out, done.err) == (
        1,
        "",
        f"whisper-moe: {tmp_path}/gone.wav: no such file or directory\n",
    )
    assert "no such model" in run(command, tmp_path / "gone.wav", noise(tmp_path / "a.wav"), *NO_MODEL).err


def test_a_pipe_is_not_opened_before_its_time(run: Run, tiny: list[str], tmp_path: Path) -> None:
    path, pipe = noise(tmp_path / "a.wav"), tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(path.read_bytes()))
    writer.start()
    done = run("transcribe", pipe, *tiny)
    writer.join()
    assert done.status == 0 and done.out == run("transcribe", path, *tiny).out


def test_standard_input_gives_the_same_text_as_the_file(run: Run, tiny: list[str], tmp_path: Path) -> None:
    path = noise(tmp_path / "a.wav")
    piped = run("transcribe", "-", *tiny, stdin=path.read_bytes())
    assert piped.status == 0
    assert piped.out == run("transcribe", path, *tiny).out != ""
    assert "<stdin>: 1.0 s" in piped.err
    broken = run("transcribe", "-", *tiny, stdin=b"RIFF")
    assert (broken.status, broken.out) == (1, "")
    assert any(line.startswith("whisper-moe: <stdin>: ") for line in broken.said)


def test_globs_name_files_in_order_unless_such_a_file_is_there(run: Run, tiny: list[str], tmp_path: Path) -> None:
    paths = [noise(tmp_path / name, seed=seed) for seed, name in enumerate(("b.wav", "a.wav", "[a].wav"))]
    several = run("transcribe", tmp_path / "?.wav", *tiny)
    named = [line for line in several.err.splitlines() if line.endswith(".wav:")]
    assert named == [f"{tmp_path}/a.wav:", f"{tmp_path}/b.wav:"]
    literal = run("transcribe", paths[2], *tiny)
    assert literal.out == run("transcribe", paths[2], "--verbose", "False", *tiny).out
    assert f"{paths[2]}: 1.0 s" in literal.err


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
    ],
)
def test_a_part_of_a_path_that_is_there_is_no_pattern(
    run: Run, asked: str, meant: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "My [2024] talks").mkdir()
    for name in ("My [2024] talks/a.wav", "My [2024] talks/[1] b.wav", "caf\u00e9.wav", "-x.wav"):
        noise(tmp_path / name)
    heard: list[str] = []

    def transcribe_each(audio: Iterable[str], **options: Any) -> list[Outcome]:
        heard.extend(audio)
        return [Outcome(path, None, MediaError(path, "not heard")) for path in heard]

    def load(*_: Any, **__: Any) -> SimpleNamespace:
        return SimpleNamespace(stated_language=None, name="", device="", dtype="", transcribe_each=transcribe_each)

    monkeypatch.setattr(WhisperMoE, "from_pretrained", load)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    done = run("transcribe", "--", asked)
    assert heard == [path.replace("HERE", str(tmp_path)) for path in meant], done.err


# Transcripts out.


def test_each_of_several_outputs_says_whose_it_is(run: Run, tiny: list[str], tmp_path: Path) -> None:
    paths = [noise(tmp_path / name, seed=seed) for seed, name in enumerate(("ep.wav", "ep.mka"))]
    done = run("transcribe", *paths, "-o", tmp_path / "out", "-f", "json,srt", *tiny)
    for path, name in zip(paths, ("ep", "ep-2"), strict=True):
        result = json.loads((tmp_path / "out" / f"{name}.json").read_text())
        assert result["source"] == str(path) and list(result)[:3] == ["text", "segments", "language"]
        assert any(line.startswith(f"{path}: 1.0 s") and line.endswith(f"; in {tmp_path}/out/{name}.{{json,srt}}")
                   for line in done.err.splitlines())  # fmt: skip
    printed = run("transcribe", *paths, "-f", "json", *tiny)
    assert [json.loads(line)["source"] for line in printed.out.splitlines()] == list(map(str, paths))
    assert f"{paths[0]}:" not in printed.err.splitlines(), "said in the line itself"


def test_one_file_of_a_pattern_may_be_printed_in_any_format(run: Run, tiny: list[str], tmp_path: Path) -> None:
    noise(tmp_path / "only.wav")
    assert run("transcribe", tmp_path / "*.wav", "-f", "vtt", *tiny).out.startswith("WEBVTT")


def test_what_has_its_transcripts_already_is_left_out(run: Run, tiny: list[str], tmp_path: Path) -> None:
    paths = [noise(tmp_path / name, seed=seed) for seed, name in enumerate(("ep.mka", "ep.wav", "z.wav"))]
    flags = ["-o", tmp_path / "out", "--skip-existing", "--language", "en"]
    first = run("transcribe", *paths, *flags, *tiny)
    assert first.status == 0 and "0 of 3 files have their transcripts" in first.err
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    again = run("transcribe", *paths, *flags, *NO_MODEL)
    assert (again.status, again.out) == (0, "")
    assert again.err == f"3 of 3 files have their transcripts in {tmp_path}/out already\n"
    (tmp_path / "out" / "ep-2.vtt").unlink()
    os.utime(tmp_path / "out" / "ep.json", (1, 1))
    grown = run("transcribe", *paths, noise(tmp_path / "new.wav", 0.5), *flags, *tiny)
    assert "2 of 4 files have their transcripts" in grown.err
    assert written.items() <= {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}.items()
    assert (tmp_path / "out" / "ep.json").stat().st_mtime == 1


def test_a_file_is_written_before_anything_is_decoded_again_and_a_kill_does_not_cost_it(
    run: Run, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [noise(tmp_path / f"{name}.wav", seconds) for name, seconds in (("a", 0.6), ("b", 2.0), ("c", 0.9))]
    flags = ["-f", "json", "--language", "en", "--context-margin", "2", *tiny]
    heard, killed, decode = list[int](), True, WindowDecoder.decode

    def wrong(take: DecodingResult, seconds: float, *_: Any) -> bool:
        return seconds == 2.0 and take.margin < FULL_WINDOW

    def spy(self: WindowDecoder, clips: Any, *more: Any, margin: float, **how: Any) -> list[DecodingResult]:
        if killed and margin == FULL_WINDOW:
            raise MemoryError(" ".join(sorted(path.name for path in (tmp_path / "out").iterdir())))
        heard.append(len(clips))
        return decode(self, clips, *more, margin=margin, **how)

    monkeypatch.setattr("whisper_moe.generate.fallback.looks_wrong", wrong)
    monkeypatch.setattr(WindowDecoder, "decode", spy)
    with pytest.raises(MemoryError, match=r"^a\.json c\.json$"):
        run("transcribe", *paths, "-o", tmp_path / "out", *flags)
    killed = False
    again = run("transcribe", *paths, "-o", tmp_path / "out", "--skip-existing", *flags)
    assert "2 of 3 files have their transcripts" in again.err and heard == [3, 1, 1]
    printed = run("transcribe", *paths, *flags).out
    assert [json.loads(line)["source"] for line in printed.splitlines()] == list(map(str, paths))
    for path, line in zip(paths, printed.splitlines(), strict=True):
        written = json.loads((tmp_path / "out" / f"{path.stem}.json").read_text())
        assert written["text"] == json.loads(line)["text"] and written["source"] == str(path)


def test_a_transcript_of_another_file_of_that_name_is_not_taken_for_its_own(
    run: Run, tiny: list[str], tmp_path: Path
) -> None:
    (tmp_path / "b").mkdir()
    old, new = noise(tmp_path / "ep.wav"), noise(tmp_path / "ep.mka", 0.5)
    far = noise(tmp_path / "b" / "ep.wav", 0.7)
    flags = ["-o", tmp_path / "out", "--skip-existing"]
    assert run("transcribe", old, *flags, *tiny).status == 0
    done = run("transcribe", new, old, far, *flags, *tiny)
    assert "0 of 3 files have their transcripts" in done.err
    durations = {path.name: json.loads(path.read_text())["duration"] for path in (tmp_path / "out").glob("*.json")}
    assert durations == {"ep.json": 0.5, "ep-2.json": 1.0, "ep-3.json": 0.7}
    assert "no such model" in run("transcribe", "-", "-o", tmp_path / "out", "--skip-existing", *NO_MODEL).err


def test_a_transcript_is_written_before_a_file_that_comes_much_later_is_read(
    run: Run, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is killed loses what was under way."""
    monkeypatch.setattr("whisper_moe.generate.longform.BUFFERED_WINDOWS", 2)
    paths = [noise(tmp_path / f"{name}.wav", seed=ord(name)) for name in "abcde"]
    pipe = tmp_path / "z.wav"
    os.mkfifo(pipe)
    there: list[list[str]] = []

    def feed() -> None:
        with pipe.open("wb") as stream:  # opens when the reader has come so far
            there.append(sorted(path.name for path in (tmp_path / "out").iterdir()))
            stream.write(paths[0].read_bytes())

    writer = threading.Thread(target=feed)
    writer.start()
    assert run("transcribe", *paths, pipe, "-o", tmp_path / "out", "-f", "txt", *tiny).status == 0
    writer.join()
    assert there == [["a.txt", "b.txt", "c.txt", "d.txt"]]


def test_a_full_disk_is_said_of_the_output(
    run: Run, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [noise(tmp_path / name) for name in ("a.wav", "b.wav")]

    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    done = run("transcribe", *paths, "-o", tmp_path / "out", "-f", "srt", *tiny)
    assert (done.status, list((tmp_path / "out").iterdir())) == (1, [])
    expected = [f"whisper-moe: {tmp_path}/out/{name}.srt: No space left on device" for name in "ab"]
    assert done.said == [*expected, "whisper-moe: 2 of 2 files failed"]


def test_each_format_is_printed_whole(run: Run, tiny: list[str], tmp_path: Path) -> None:
    path = noise(tmp_path / "a.wav", 40.0)
    printed = {name: run("transcribe", path, "-f", name, *tiny).out for name in ("txt", "srt", "vtt", "tsv", "json")}
    assert run("transcribe", path, *tiny).out == printed["txt"]
    assert printed["srt"].startswith("1\n00:00:0")
    assert printed["vtt"].startswith("WEBVTT\n\n00:0")
    assert printed["tsv"].startswith("start\tend\ttext\n")
    assert printed["json"].endswith("}\n")
    written = run("transcribe", path, "-o", tmp_path / "new" / "folder", *tiny)
    assert (written.status, written.out) == (0, "")
    files = {path.suffix[1:]: path.read_text() for path in (tmp_path / "new" / "folder").iterdir()}
    assert {name: text.rstrip("\n") for name, text in files.items()} == {n: t.rstrip("\n") for n, t in printed.items()}


def test_two_results_as_json_are_two_lines(run: Run, tiny: list[str], tmp_path: Path) -> None:
    done = run("transcribe", noise(tmp_path / "a.wav"), noise(tmp_path / "b.wav", 2.0), "-f", "json", *tiny)
    assert [json.loads(line)["duration"] for line in done.out.splitlines()] == [1.0, 2.0]


def test_the_json_names_each_segments_experts_and_their_gates(run: Run, tiny: list[str], tmp_path: Path) -> None:
    result = json.loads(run("transcribe", noise(tmp_path / "a.wav", 65.0), "-f", "json", *tiny).out)
    assert len(result["segments"]) >= 3
    for segment in result["segments"]:
        assert segment["experts"].keys() <= {"hindi", "tamil", "english", "none"}
        assert sum(segment["experts"].values()) == pytest.approx(1.0)


def test_words_come_with_their_times(run: Run, tiny: list[str], tmp_path: Path) -> None:
    path = noise(tmp_path / "a.wav", 3.0)
    result = json.loads(run("transcribe", path, "-f", "json", "--word-timestamps", "True", *tiny).out)
    words = [word for segment in result["segments"] for word in segment["words"]]
    assert words and all(0 <= word["start"] <= word["end"] <= 3.0 for word in words)
    marked = run("transcribe", path, "-f", "srt", "--word_timestamps", "True", "--highlight_words", "True", *tiny)
    assert "<u>" in marked.out


def test_underscores_in_flags_give_the_same_output(run: Run, tiny: list[str], tmp_path: Path) -> None:
    path = noise(tmp_path / "a.wav", 2.0)
    values = {"output-format": "json", "initial-prompt": "Pune", "without-timestamps": None, "beam-size": "2"}
    outputs = [
        run("transcribe", path, *tiny, *(part for name, value in values.items() for part in (
            f"--{name.replace('-', joint)}", *([value] if value else [])))).out
        for joint in "-_"
    ]  # fmt: skip
    assert outputs[0] == outputs[1] != run("transcribe", path, *tiny, "-f", "json").out


def test_facts_go_to_standard_error_unless_nobody_asked(run: Run, tiny: list[str], tmp_path: Path) -> None:
    path = noise(tmp_path / "a.wav")
    facts = run("transcribe", path, *tiny)
    assert re.search(r"tiny on cpu \(float32\), loaded in [\d.]+ s", facts.err)
    assert re.search(rf"{re.escape(str(path))}: 1\.0 s, (en|hi); experts \w+ 0\.\d\d, \w+ 0\.\d\d", facts.err)
    assert re.search(r"1\.0 s of audio in [\d.]+ s: [\d.]+ times real time", facts.err)
    fallen = run("transcribe", path, *tiny, "--logprob-threshold", "99")
    assert "; 1 of its windows decoded again\n" in fallen.err
    silent = run("transcribe", path, "--verbose", "False", *tiny)
    assert (silent.out, silent.err) == (facts.out, "")


def test_stopping_it_by_hand_has_its_own_status(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(**flags: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "transcribe", stop)
    assert run("transcribe", SAMPLE).status == 130


def test_a_track_is_chosen_and_a_silent_one_tells_of_it(run: Run, tiny: list[str], tmp_path: Path) -> None:
    path = film_in(["eng", "hin"], [tone(2, level=0), tone(2)], tmp_path / "film.mkv")
    done = run("transcribe", path, "-f", "json", *tiny)
    assert done.status == 0 and (notes := json.loads(done.out)["notes"])
    assert "there is also 1 (hin, aac)" in notes[0] and f"{path}: {notes[0]}" in done.said
    chosen = run("transcribe", path, "-f", "json", "--track", "Hindi", *tiny)
    assert chosen.status == 0 and "notes" not in json.loads(chosen.out)
    for command, flags in (("transcribe", tiny), ("detect-language", tiny[:4])):
        gone = run(command, path, "--track", "7", *flags)
        assert gone.status == 1 and any("its sound tracks are 0 (eng, aac), 1 (hin, aac)" in line for line in gone.said)
        assert run(command, path, "--track=-1", *NO_MODEL).status == 2, "before a model is loaded"
    assert run("detect-language", path, "--track", "1", *tiny[:4]).status == 0
    assert any("there is also 1" in line for line in run("detect-language", path, *tiny[:4]).said)


# The other commands.


def test_languages_are_told_line_by_line(run: Run, tiny: list[str], tmp_path: Path) -> None:
    path = noise(tmp_path / "a.wav")
    done = run("detect-language", path, tmp_path / "gone.wav", path, *tiny[:4])
    assert done.status == 1
    lines = [line.split("\t") for line in done.out.splitlines()]
    assert [line[2] for line in lines] == [str(path)] * 2
    assert lines[0] == lines[1] and lines[0][0] in {"en", "hi"} and 0 < float(lines[0][1]) <= 1
    assert any("gone.wav: no such file" in line for line in done.said)
    chosen = run("detect-language", path, "--languages", "hindi", *tiny[:4])
    assert (chosen.status, chosen.out) == (0, f"hi\t1.0000\t{path}\n")


def test_a_whisper_becomes_a_mixture_and_a_dense_one_goes_back(run: Run, tmp_path: Path) -> None:
    from transformers import WhisperForConditionalGeneration

    dense = CONFIG.model_copy(update={"moe": None, "ttt": None})
    source = write_folder(tmp_path / "whisper", hub_model(dense))
    flags = ["--experts", "4", "--expert-dim", "6", "--router-layer", "1", "--ttt-layers", "0,1"]
    mixed = run("upcycle", source, "-o", tmp_path / "moe", *flags)
    assert mixed.status == 0
    assert "with 4 experts" in mixed.err
    plain = ["--experts", "0"]
    assert run("upcycle", source, "-o", tmp_path / "dense", *plain).status == 0
    assert run("upcycle", source, "-o", tmp_path / "dense", *plain).status == 2
    assert run("upcycle", source, "-o", tmp_path / "dense", *plain, "--overwrite").status == 0
    assert json.loads((tmp_path / "dense" / "config.json").read_text())["ttt"] is None

    sound = noise(tmp_path / "a.wav", 2.0)
    flags = ["--dtype", "float32", "--temperature-increment-on-fallback", "0", "--no-speech-threshold", "1"]
    said = [
        run("transcribe", sound, "-f", "tsv", "--model", tmp_path / n, *flags).out for n in ("whisper", "moe", "dense")
    ]
    assert said[0] == said[1] == said[2]
    assert len(said[0].splitlines()) > 1

    refused = run("export", tmp_path / "moe", "-o", tmp_path / "no")
    assert refused.status == 1 and not (tmp_path / "no").exists()
    assert len(refused.err.splitlines()) == 1 and "only a dense model" in refused.err
    assert run("export", tmp_path / "dense", "-o", tmp_path / "back").status == 0
    first, back = (WhisperForConditionalGeneration.from_pretrained(tmp_path / name) for name in ("whisper", "back"))
    features, ids = torch.randn(1, 80, 3000), torch.tensor([[257, 258, 261]])
    with torch.inference_mode():
        logits = [model.eval()(features, decoder_input_ids=ids).logits for model in (first, back)]
    assert torch.equal(*logits)


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense Whisper as transformers writes it, which knows English and Hindi."""
    dense = CONFIG.model_copy(update={"moe": None, "ttt": None})
    return write_folder(tmp_path_factory.mktemp("whisper") / "dense", hub_model(dense))


def test_a_language_is_added_and_then_spoken_and_detected_by_name(run: Run, whisper: Path, tmp_path: Path) -> None:
    flags = ["--expert-dim", "6", "--router-layer", "1", "--ttt-layers", "1"]
    new = ["--add-language", "or=odia:like=hi", "--add_language", "tcy=Tulu"]
    done = run("upcycle", whisper, "-o", tmp_path / "m", *flags, *new)
    assert done.status == 0 and "with 8 experts, odia (or), tulu (tcy), " in done.err
    assert (tmp_path / "m" / "tokens.safetensors").is_file()
    sound = noise(tmp_path / "a.wav", 2.0)
    quick = ["--model", tmp_path / "m", "--dtype", "float32", "--temperature-increment-on-fallback", "0"]
    for name, code in (("or", "or"), ("Oriya", "or"), ("tulu", "tcy"), ("TCY", "tcy"), ("hindi", "hi")):
        result = run("transcribe", sound, "-f", "json", "--language", name, *quick)
        assert result.status == 0 and json.loads(result.out)["language"] == code
    within = run("transcribe", sound, "-f", "json", "--languages", "odia,tulu", *quick)
    assert json.loads(within.out)["language"] in ("or", "tcy")
    told = run("detect-language", sound, "--languages", "tulu", "--model", tmp_path / "m")
    assert (told.status, told.out) == (0, f"tcy\t1.0000\t{sound}\n")
    free = run("detect-language", sound, "--model", tmp_path / "m")
    assert free.out.split("\t")[0] in ("en", "hi")


def no_torch(*arguments: str | Path) -> tuple[int, str]:
    """Status and what is said of a command line in a process of its own, which must end without having imported torch."""
    code = (
        "import sys\nfrom whisper_moe.cli import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    print(stop.code, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=True
    )
    status, torch_there = done.stdout.split()
    assert torch_there == "False"
    return int(status), done.stderr


def test_a_language_nobody_knows_is_said_before_any_loading(run: Run, whisper: Path, tmp_path: Path) -> None:
    """Also where a model's own list had to be looked at; of a model on the Hub, only once it is there."""
    sound = noise(tmp_path / "a.wav", 2.0)
    assert run("upcycle", whisper, "-o", tmp_path / "m", "--router-layer", "1", "--ttt-layers", "1",
               "--add-language", "tcy=tulu").status == 0  # fmt: skip
    for flags in (["--language", "tuluu"], ["--languages", "hi,tuluu"]):
        status, said = no_torch("transcribe", sound, "--model", tmp_path / "m", *flags)
        assert (status, said) == (2, "whisper-moe: unknown language 'tuluu': did you mean tulu or telugu?\n")
    for model in ([], ["--model", whisper]):
        status, said = no_torch("transcribe", sound, "--language", "tulu", *model)
        assert status == 2 and said.startswith("whisper-moe: unknown language 'tulu'") and len(said.splitlines()) == 1
    for model in ([], ["--model", whisper], ["--model", tmp_path / "m"]):
        status, said = no_torch("transcribe", sound, "--language", "Konkani", *model)
        assert status == 2 and said.startswith("whisper-moe: this model does not know the language 'kok'; it knows ")


def test_a_training_run_and_a_name_in_a_folder_are_models(run: Run, tiny: list[str], tmp_path: Path) -> None:
    sound = noise(tmp_path / "a.wav")
    made = tmp_path / "runs" / "mine"
    shutil.copytree(tiny[1], made / "model")
    (made / "run.json").write_text("{}")
    for flags in (["--model", made], ["--model", "mine", "--model_dir", made.parent]):
        said = run("transcribe", sound, *tiny, *flags)
        assert (said.status, said.out) == (0, run("transcribe", sound, *tiny).out) and "mine on cpu" in said.err
        assert run("detect-language", sound, *flags).status == 0
    assert json.loads(run("info", made, "--json").out)["name"] == "mine"
    assert "only a dense Whisper can be upcycled" in run("upcycle", made, "-o", tmp_path / "x").err
    assert "only a dense model" in run("export", made, "-o", tmp_path / "x").err
    assert no_torch("transcribe", sound, "--model", made, "--language", "klingon")[0] == 2


def test_a_language_that_only_the_loaded_model_can_refuse_is_refused_alike(
    run: Run, whisper: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = noise(tmp_path / "a.wav", 2.0)
    for flags in (["--language", "odia"], ["--languages", "en,odia"], ["--language", "bengali"]):
        done = run("transcribe", sound, "--model", whisper, "--verbose", "False", *flags)
        assert (done.status, done.out, len(done.err.splitlines())) == (2, "", 1)
        assert done.err.startswith("whisper-moe: this model does not know the language ")
        assert done.err.endswith("it knows en, hi\n")
    assert run("detect-language", sound, "--model", whisper, "--languages", "odia").status == 2

    def load(model: str, **options: Any) -> WhisperMoE:
        assert model == "somebody/whisper-tulu", "a Hub id: nothing is known of it before it is loaded"
        return real(whisper, **options)

    real = WhisperMoE.from_pretrained
    monkeypatch.setattr(WhisperMoE, "from_pretrained", load)
    done = run("transcribe", sound, "--model", "somebody/whisper-tulu", "--language", "tulu", "--verbose", "False")
    assert done.status == 2 and done.err.startswith("whisper-moe: unknown language 'tulu'")


def test_a_dense_model_with_a_language_more_goes_back(run: Run, whisper: Path, tmp_path: Path) -> None:
    from transformers import WhisperForConditionalGeneration

    assert run("upcycle", whisper, "-o", tmp_path / "m", "--experts", "0", "--add-language", "or").status == 0
    assert run("export", tmp_path / "m", "-o", tmp_path / "back").status == 0
    back = WhisperForConditionalGeneration.from_pretrained(tmp_path / "back")
    assert back.config.vocab_size == CONFIG.vocab_size + 1
    assert back.generation_config.lang_to_id["<|or|>"] == CONFIG.vocab_size
    sound = noise(tmp_path / "a.wav", 2.0)
    flags = [
        "--dtype",
        "float32",
        "--temperature-increment-on-fallback",
        "0",
        "--no-speech-threshold",
        "1",
        "-f",
        "tsv",
    ]
    said = [run("transcribe", sound, "--model", tmp_path / name, "--language", "or", *flags) for name in ("m", "back")]
    assert said[0].status == 0 and said[0].out == said[1].out
    assert len(said[0].out.splitlines()) > 1


def test_info_counts_the_parts(run: Run) -> None:
    done = run("info", "8x39m", "--json")
    assert done.status == 0
    facts = json.loads(done.out)
    assert facts["parameters_total"] == sum(facts["parameters"].values())
    assert len(facts["experts"]) == 8
