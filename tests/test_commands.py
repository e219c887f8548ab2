"""What the commands do: files and text that come in, transcripts that go out, models that are made."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import SAMPLE, Run, noise, trusting_flags
from generate.tiny import CONFIG
from media.recordings import film_in, tone
from weights.whispers import hub_model, write_folder

from whisper_moe import WhisperMoE
from whisper_moe.config import FULL_WINDOW
from whisper_moe.generate.decode import DecodingResult, Opened, WindowDecoder
from whisper_moe.weights import checkpoint
from whisper_moe.weights.checkpoint import Loaded, read_config, save_checkpoint
from whisper_moe.weights.load import load_model
from whisper_moe.weights.parts import frozen_model

NO_MODEL = ["--model", "no such model"]
"""Whoever gets as far as loading it is told so."""
QUICK = ["--dtype", "float32", "--temperature-increment-on-fallback", "0", "--no-speech-threshold", "1"]


def contents(folder: Path) -> dict[str, Any]:
    return {path.name: json.loads(path.read_text()) for path in folder.iterdir()}


# Files in.


def test_of_several_files_broken_ones_cost_only_themselves(run: Run, tiny: list[str], tmp_path: Path) -> None:
    whole = SAMPLE.read_bytes()
    good = [noise(tmp_path / f"noise{index}.wav", 0.5 + 0.1 * index, index) for index in range(5)]
    broken = {
        "empty.wav": b"",
        "half.m4a": whole[: len(whole) // 2],
        "list.m4a": b"#EXTM3U\n#EXTINF:10,\ngood.m4a\n",
        "one.wav": b"R",
        "text.wav": b"This is only text. " * 50,
    }
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
    files, flags = sorted(tmp_path.iterdir()), [*tiny, "--language", "en"]
    done = run("transcribe", *files, tmp_path / "gone.wav", "-o", tmp_path / "out", "-f", "json", *flags)
    assert done.status == 1
    written = contents(tmp_path / "out")
    assert written.keys() - {"half.partial.json"} == {f"{path.stem}.json" for path in good}
    first, *errors, last = [line for line in done.said if line.startswith("whisper-moe: ")]
    assert first == f"whisper-moe: {tmp_path}/gone.wav: no such file or directory"
    assert last == "whisper-moe: 6 of 11 files failed"
    assert done.err.index("gone.wav") < done.err.index("loaded in") < done.err.index("half.m4a: ")
    for name, error in zip(broken, errors, strict=True):
        assert error.startswith(f"whisper-moe: {tmp_path / name}: ")
        assert len(error) > len(f"whisper-moe: {tmp_path / name}: ") + 10
    for path in good[::2]:
        alone = run("transcribe", path, *flags)
        assert alone.status == 0
        assert "".join(alone.out.split()) == "".join(written[f"{path.stem}.json"]["text"].split())


def test_what_was_said_before_the_damage_is_kept(run: Run, tiny: list[str], tmp_path: Path) -> None:
    cut, short = tmp_path / "cut.wav", tmp_path / "short.wav"
    for path, seconds in ((cut, 50.0), (short, 6.0)):
        whole = noise(path, seconds).read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    namesake = noise(tmp_path / "cut.partial.wav")
    flags = [*tiny, "--language", "en"]
    done = run("transcribe", cut, short, namesake, "-o", tmp_path / "out", "-f", "json", *flags)
    assert done.status == 1
    heard = contents(tmp_path / "out")
    assert sorted(heard) == ["cut.partial.json", "cut.partial.partial.json", "short.partial.json"]
    assert "damage" not in heard["cut.partial.json"], "the whole transcript of another file"
    long, brief = heard["cut.partial.partial.json"], heard["short.partial.json"]
    assert 24 < long["duration"] < 26 and 20 < long["segments"][-1]["end"] < 26
    assert 2.5 < brief["duration"] < 3.5 and brief["segments"]
    assert str(cut) in long["damage"] and str(short) in brief["damage"]
    kept = sorted(line for line in done.said if "what was said before" in line)
    assert len(kept) == 2 and "cut.partial.partial.json" in kept[0] and "short.partial.json" in kept[1]
    alone = run("transcribe", cut, *flags, "--verbose", "False")
    assert alone.status == 1 and "".join(alone.out.split()) == "".join(long["text"].split())
    assert [line.rpartition(", ")[2] for line in alone.err.splitlines()[1:]] == ["is on standard output"]


@pytest.mark.parametrize("command", ["transcribe", "detect-language"])
def test_no_model_is_loaded_where_nothing_can_be_read(run: Run, command: str, tmp_path: Path) -> None:
    said = f"whisper-moe: {tmp_path}/gone.wav: no such file or directory\n"
    assert run(command, tmp_path / "gone.wav", *NO_MODEL) == (1, "", said)
    assert "no such model" in run(command, tmp_path / "gone.wav", noise(tmp_path / "a.wav"), *NO_MODEL).err


def test_pipes_give_the_same_text_as_the_file(run: Run, tiny: list[str], tmp_path: Path) -> None:
    path, pipe = noise(tmp_path / "a.wav"), tmp_path / "pipe"
    expected = run("transcribe", path, *tiny).out
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(path.read_bytes()))
    writer.start()
    done = run("transcribe", pipe, *tiny)
    writer.join()
    assert done.status == 0 and done.out == expected != ""
    piped = run("transcribe", "-", *tiny, stdin=path.read_bytes())
    assert (piped.status, piped.out) == (0, expected) and "<stdin>: 1.0 s" in piped.err
    broken = run("transcribe", "-", *tiny, stdin=b"RIFF")
    assert (broken.status, broken.out) == (1, "")
    assert any(line.startswith("whisper-moe: <stdin>: ") for line in broken.said)


# Transcripts out.


def test_each_of_several_outputs_says_whose_it_is(run: Run, tiny: list[str], tmp_path: Path) -> None:
    paths = [noise(tmp_path / name, seed=seed) for seed, name in enumerate(("ep.mka", "ep.wav"))]
    done = run("transcribe", *paths, "-o", tmp_path / "out", "-f", "json,srt", *tiny)
    for path, name in zip(paths, ("ep", "ep-2"), strict=True):
        result = json.loads((tmp_path / "out" / f"{name}.json").read_text())
        assert result["source"] == str(path) and list(result)[:3] == ["text", "segments", "language"]
        place = f"; in {tmp_path}/out/{name}.{{json,srt}}"
        assert any(line.startswith(f"{path}: 1.0 s") and line.endswith(place) for line in done.err.splitlines())
    printed = run("transcribe", tmp_path / "*", "-f", "json", *tiny)
    assert [json.loads(line)["source"] for line in printed.out.splitlines()] == list(map(str, paths))
    assert f"{paths[0]}:" not in printed.err.splitlines(), "said in the line itself"
    assert run("transcribe", *paths, "--verbose", "False", *tiny).err == f"{paths[0]}:\n{paths[1]}:\n"


def test_what_has_its_transcripts_already_is_left_out(run: Run, tiny: list[str], tmp_path: Path) -> None:
    paths = [noise(tmp_path / name, seed=seed) for seed, name in enumerate(("ep.mka", "ep.wav", "z.wav"))]
    flags = ["-o", tmp_path / "out", "--skip-existing", "--language", "en"]
    first = run("transcribe", *paths, *flags, *tiny)
    assert first.status == 0 and "0 of 3 files have their transcripts" in first.err
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    said = f"3 of 3 files have their transcripts in {tmp_path}/out already\n"
    assert run("transcribe", *paths, *flags, *NO_MODEL) == (0, "", said)
    (tmp_path / "out" / "ep-2.vtt").unlink()
    os.utime(tmp_path / "out" / "ep.json", (1, 1))
    grown = run("transcribe", *paths, noise(tmp_path / "new.wav", 0.5), *flags, *tiny)
    assert "2 of 4 files have their transcripts" in grown.err
    now = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    kept = {name: data for name, data in written.items() if not name.startswith("ep-2.")}  # these are of another pack
    assert written.keys() <= now.keys() and kept.items() <= now.items()
    assert (tmp_path / "out" / "ep.json").stat().st_mtime == 1


def test_a_file_is_written_before_anything_is_decoded_again_and_a_kill_does_not_cost_it(
    run: Run, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [noise(tmp_path / f"{name}.wav", seconds) for name, seconds in (("a", 0.6), ("b", 2.0), ("c", 0.9))]
    flags = ["-f", "json", "--language", "en", "--context-margin", "2", *tiny]
    heard, padded, killed, decode = list[int](), list[int](), True, WindowDecoder.open

    def wrong(take: DecodingResult, seconds: float, *_: Any) -> bool:
        return seconds == 2.0 and not padded

    def spy(self: WindowDecoder, clips: Any, *more: Any, margin: float, **how: Any) -> list[Opened]:
        if killed and margin == FULL_WINDOW:
            raise MemoryError(" ".join(sorted(path.name for path in (tmp_path / "out").iterdir())))
        heard.append(len(clips))
        padded.extend([len(clips)] if margin == FULL_WINDOW else [])
        return decode(self, clips, *more, margin=margin, **how)

    monkeypatch.setattr("whisper_moe.generate.longform.looks_wrong", wrong)
    monkeypatch.setattr("whisper_moe.generate.schedule.PATIENCE", 1_000)
    monkeypatch.setattr(WindowDecoder, "open", spy)
    with pytest.raises(MemoryError, match=r"^a\.json c\.json$"):
        run("transcribe", *paths, "-o", tmp_path / "out", *flags)
    killed = False
    again = run("transcribe", *paths, "-o", tmp_path / "out", "--skip-existing", *flags)
    assert "2 of 3 files have their transcripts" in again.err and heard == [3, 1, 1]
    assert "; 1 of its windows decoded again; in " in again.err
    padded.clear()
    printed = run("transcribe", *paths, *flags).out
    assert [json.loads(line)["source"] for line in printed.splitlines()] == list(map(str, paths))
    for path, line in zip(paths, printed.splitlines(), strict=True):
        written = json.loads((tmp_path / "out" / f"{path.stem}.json").read_text())
        assert written["text"] == json.loads(line)["text"] and written["source"] == str(path)


def test_a_transcript_is_written_before_a_file_that_comes_much_later_is_read(
    run: Run, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is killed loses what was under way."""
    for module in ("longform", "schedule"):
        monkeypatch.setattr(f"whisper_moe.generate.{module}.BUFFERED_WINDOWS", 2)
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


def test_a_full_disk_is_said_of_each_output(
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
    path, flags = noise(tmp_path / "a.wav", 22.0), [*tiny, "--word-timestamps", "True", "--highlight_words", "True"]
    assert run("transcribe", path, *flags, "-o", tmp_path / "new" / "folder").out == ""
    files = {file.suffix[1:]: file.read_text() for file in (tmp_path / "new" / "folder").iterdir()}
    assert files["vtt"].startswith("WEBVTT\n\n00:0") and "<u>" in files["srt"]
    for name in files if run("transcribe", path, *tiny).out == files["txt"] else ():
        printed = run("transcribe", path, "-f", name, *flags).out
        assert printed.rstrip("\n") == files[name].rstrip("\n") and printed.endswith("\n")
    result = json.loads(files["json"])
    assert len(result["segments"]) >= 2
    for segment in result["segments"]:
        assert segment["experts"].keys() <= {"hindi", "tamil", "english", "none"}
        assert sum(segment["experts"].values()) == pytest.approx(1.0)
        assert all(0 <= word["start"] <= word["end"] <= 22.0 for word in segment["words"])


def test_facts_go_to_standard_error_unless_nobody_asked(run: Run, tiny: list[str], tmp_path: Path) -> None:
    path = noise(tmp_path / "a.wav")
    facts = run("transcribe", path, *tiny)
    assert re.search(r"tiny on cpu \(float32\), loaded in [\d.]+ s", facts.err)
    assert re.search(rf"{re.escape(str(path))}: 1\.0 s, (en|hi); experts \w+ 0\.\d\d, \w+ 0\.\d\d", facts.err)
    assert re.search(r"1\.0 s of audio in [\d.]+ s: [\d.]+ times real time", facts.err)
    assert run("transcribe", path, "--verbose", "False", *tiny) == (0, facts.out, "")


def test_a_track_is_chosen_and_a_silent_one_tells_of_it(run: Run, tiny: list[str], tmp_path: Path) -> None:
    path = film_in(["eng", "hin"], [tone(2, level=0), tone(2)], tmp_path / "film.mkv")
    done = run("transcribe", path, "-f", "json", *tiny)
    assert done.status == 0 and (notes := json.loads(done.out)["notes"])
    assert "there is also 1 (hin, aac)" in notes[0] and f"{path}: {notes[0]}" in done.said
    chosen = run("transcribe", path, "-f", "json", "--track", "Hindi", *tiny)
    assert chosen.status == 0 and "notes" not in json.loads(chosen.out)
    for command in ("transcribe", "detect-language"):
        gone = run(command, path, "--track", "7")
        assert gone.status == 1 and any("its sound tracks are 0 (eng, aac), 1 (hin, aac)" in line for line in gone.said)
    assert run("detect-language", path, "--track", "1").status == 0
    assert any("there is also 1" in line for line in run("detect-language", path).said)


# The other commands.


def test_languages_are_told_line_by_line(run: Run, tiny: list[str], tmp_path: Path) -> None:
    path = noise(tmp_path / "a.wav")
    done = run("detect-language", path, tmp_path / "gone.wav", path)
    assert done.status == 1
    lines = [line.split("\t") for line in done.out.splitlines()]
    assert [line[2] for line in lines] == [str(path)] * 2
    assert lines[0] == lines[1] and lines[0][0] in {"en", "hi"} and 0 < float(lines[0][1]) <= 1
    assert any("gone.wav: no such file" in line for line in done.said)
    chosen = run("detect-language", path, "--languages", "hindi")
    assert (chosen.status, chosen.out) == (0, f"hi\t1.0000\t{path}\n")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense Whisper as transformers writes it, which knows English and Hindi."""
    dense = CONFIG.model_copy(update={"moe": None, "ttt": None})
    return write_folder(tmp_path_factory.mktemp("whisper") / "whisper", hub_model(dense))


@pytest.fixture
def whisper(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "whisper"))


PLAIN = ["--experts", "2", "--router-layer", "1", "--ttt-layers", "1"]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("quantize", [True, False])
def test_what_was_written_says_what_its_source_says(
    whisper: Path, tmp_path: Path, run: Run, shared: bool, quantize: bool
) -> None:
    flags = ["--shared" if shared else "--no-shared", *(["--quantize"] if quantize else [])]
    assert run("upcycle", whisper, "-o", tmp_path / "m", *PLAIN, *flags, "--add-language", "or").status == 0
    difference = (answer(load_model(tmp_path / "m")) - answer(load_model(whisper))).abs().max().item()
    assert 3e-4 < difference < 1 if quantize else difference < 1e-4


@torch.inference_mode()
def answer(loaded: Loaded) -> torch.Tensor:
    """[n, source's vocabulary]: what a model says of noise."""
    config = loaded.config
    mel = torch.randn(config.n_mels, 40, generator=torch.Generator().manual_seed(0))
    logits = frozen_model(config, loaded.state)([mel], [torch.arange(4)]).logits
    return logits[:, : config.source_vocab_size]


def test_what_was_written_wrongly_is_not_called_done(
    whisper: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(folder: Path, model: Loaded, **options: Any) -> None:
        save_checkpoint(folder, model, **options)
        file = folder / "core.safetensors"
        content = bytearray(file.read_bytes())
        content[-3] ^= 4
        file.write_bytes(content)

    monkeypatch.setattr(checkpoint, "save_checkpoint", wrong)
    status, _, said = run("upcycle", whisper, "-o", tmp_path / "m", *PLAIN)
    assert status == 1
    assert "core.safetensors: sha256 differs" in said and "with 2 experts" not in said


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


def test_a_whisper_becomes_a_mixture_and_a_dense_one_goes_back(run: Run, whisper: Path, tmp_path: Path) -> None:
    from transformers import WhisperForConditionalGeneration

    flags = ["--experts", "4", "--expert-dim", "6", "--router-layer", "1", "--ttt-layers", "0,1"]
    mixed = run("upcycle", whisper, "-o", tmp_path / "moe", *flags)
    assert mixed.status == 0 and "with 4 experts, " in mixed.err
    plain = ["upcycle", whisper, "-o", tmp_path / "dense", "--experts", "0"]
    assert [run(*plain, *more).status for more in ([], [], ["--overwrite", "--add-language", "or"])] == [0, 2, 0]
    assert json.loads((tmp_path / "dense" / "config.json").read_text())["ttt"] is None
    refused = run("export", tmp_path / "moe", "-o", tmp_path / "no")
    assert refused.status == 1 and not (tmp_path / "no").exists()
    assert len(refused.err.splitlines()) == 1 and "only a dense model" in refused.err
    assert run("export", tmp_path / "dense", "-o", tmp_path / "back").status == 0

    sound = noise(tmp_path / "a.wav", 2.0)
    models = (whisper, tmp_path / "moe", tmp_path / "dense", tmp_path / "back")
    said = [run("transcribe", sound, "-f", "tsv", "--language", "hi", "--model", m, *QUICK).out for m in models]
    assert len(set(said)) == 1 and len(said[0].splitlines()) > 1
    first, back = (WhisperForConditionalGeneration.from_pretrained(folder).eval() for folder in models[::3])
    assert back.config.vocab_size == CONFIG.vocab_size + 1
    assert back.generation_config.lang_to_id["<|or|>"] == CONFIG.vocab_size
    features, ids = torch.randn(1, 80, 3000), torch.tensor([[257, 258, 261]])
    with torch.inference_mode():
        logits = [model(features, decoder_input_ids=ids).logits[..., : CONFIG.vocab_size] for model in (first, back)]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-6)  # some CPUs' kernels go by where a tensor lies


def no_torch(*arguments: str | Path) -> tuple[int, str]:
    """Status and what is said of a command line in a process of its own, which must end without having imported torch."""
    code = (
        "import sys\nfrom whisper_moe.cli import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    print(stop.code, 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    status, torch_there = done.stdout.split()
    assert torch_there == "False"
    return int(status), done.stderr


def test_a_language_is_added_spoken_and_detected_by_name_and_another_refused_before_loading(
    run: Run, whisper: Path, tmp_path: Path
) -> None:
    flags = ["--expert-dim", "6", "--router-layer", "1", "--ttt-layers", "1"]
    new = ["--add-language", "or=odia:like=hi", "--add_language", "tcy=Tulu"]
    done = run("upcycle", whisper, "-o", tmp_path / "m", *flags, *new)
    assert done.status == 0 and "with 8 experts, odia (or), tulu (tcy), " in done.err
    assert (tmp_path / "m" / "tokens.safetensors").is_file()
    sound, model = noise(tmp_path / "a.wav", 2.0), ["--model", tmp_path / "m"]
    for name, code in (("Oriya", "or"), ("TCY", "tcy"), ("hindi", "hi")):
        result = run("transcribe", sound, "-f", "json", "--language", name, *model, *QUICK)
        assert result.status == 0 and json.loads(result.out)["language"] == code
    within = run("transcribe", sound, "-f", "json", "--languages", "odia,tulu", *model, *QUICK)
    assert json.loads(within.out)["language"] in ("or", "tcy")
    told = run("detect-language", sound, "--languages", "tulu", *model)
    assert (told.status, told.out) == (0, f"tcy\t1.0000\t{sound}\n")

    assert no_torch("transcribe", sound, *model, "--languages", "hi,tuluu") == (
        2,
        "whisper-moe: unknown language 'tuluu': did you mean tulu or telugu?\n",
    )
    status, said = no_torch("transcribe", sound, *model, "--language", "Konkani")
    assert status == 2 and said.startswith("whisper-moe: this model does not know the language 'Konkani'; it knows ")
    for language, cause in (("tulu", "unknown language 'tulu'"), ("odia", "this model does not know the language ")):
        for command, flag in (("transcribe", "--language"), ("detect-language", "--languages")):
            refused = run(command, sound, flag, language, "--model", whisper)
            assert (refused.status, refused.out, len(refused.err.splitlines())) == (2, "", 1)
            assert refused.err.startswith(f"whisper-moe: {cause}")


def test_of_a_model_on_the_hub_a_language_is_refused_once_it_is_loaded(
    run: Run, whisper: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(model: str, **options: Any) -> WhisperMoE:
        assert model == "somebody/whisper-tulu", "a Hub id: nothing is known of it before it is loaded"
        return real(whisper, **options)

    real = WhisperMoE.from_pretrained
    monkeypatch.setattr(WhisperMoE, "from_pretrained", load)
    flags = ["--model", "somebody/whisper-tulu", "--language", "tulu", "--verbose", "False"]
    done = run("transcribe", noise(tmp_path / "a.wav"), *flags)
    assert done.status == 2 and done.err.startswith("whisper-moe: unknown language 'tulu'")


def test_a_training_run_and_a_name_in_a_folder_are_models(
    run: Run, tiny: list[str], tiny_model: WhisperMoE, tmp_path: Path
) -> None:
    sound, made = noise(tmp_path / "a.wav"), tmp_path / "runs" / "mine"
    trusting_flags(tiny_model, made / "model")
    (made / "run.json").write_text("{}")
    for flags in (["--model", made], ["--model", "mine", "--model_dir", made.parent]):
        said = run("transcribe", sound, *tiny, *flags)
        assert (said.status, said.out) == (0, run("transcribe", sound, *tiny).out) and "mine on cpu" in said.err
    assert json.loads(run("info", made, "--json").out)["name"] == "mine"
    assert "only a dense Whisper can be upcycled" in run("upcycle", made, "-o", tmp_path / "x").err
    assert no_torch("transcribe", sound, "--model", made, "--language", "klingon")[0] == 2


def test_info_counts_the_parts(run: Run) -> None:
    done = run("info", "8x39m", "--json")
    assert done.status == 0
    facts = json.loads(done.out)
    assert facts["parameters_total"] == sum(facts["parameters"].values())
    assert len(facts["experts"]) == 8
