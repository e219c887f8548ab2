"""``whisper-moe data inspect``: what is counted, what is named, and what it costs to ask."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from data.miniatures import film, recording
from generate.tiny import tiny_tokenizer, tiny_whisper_moe
from media.recordings import encode, tone

from whisper_moe import cli
from whisper_moe.config import ModelConfig
from whisper_moe.data.corpus import CorpusConfig
from whisper_moe.data.inspect import EDGES, KINDS, Inspection
from whisper_moe.data.loader import PackedLoader
from whisper_moe.data.sample import DataError
from whisper_moe.data.sampler import LoaderConfig
from whisper_moe.data.table import open_corpus


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """Sound of 0.5, 1.5, 1.6 and 31 s, one file that is no sound, one with damage at its end, one that is not there."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for name, seconds in (("a", 0.5), ("b", 1.5), ("c", 1.6), ("d", 31.0)):
        encode(folder / f"{name}.wav", tone(seconds, 8_000), 8_000, "pcm_s16le")
    (folder / "noise.wav").write_bytes(b"no sound at all")
    flac = encode(folder / "damaged.flac", tone(2.5, level=0.9), 16_000, "flac")
    data = bytearray(flac.read_bytes())
    data[-40] ^= 0xFF
    flac.write_bytes(data)
    rows = [f"{name}.wav\tyes\tspeaker-{name in 'ab'}" for name in ("a", "b", "c", "d", "noise", "gone")]
    (folder / "transcripts.tsv").write_text("\n".join(["path\ttext\tspeaker", *rows, "damaged.flac\tno\t"]))
    return folder


def config(folder: Path, **settings: Any) -> CorpusConfig:
    return CorpusConfig(kind="table", source=str(folder), languages=["en"], **settings)  # pyright: ignore[reportArgumentType]


def inspected(*configs: CorpusConfig, **how: Any) -> Inspection:
    seen = Inspection()
    for each in configs:
        seen.look(each, **how)
    return seen


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "streaming"])
def test_samples_are_counted_and_what_cannot_be_used_is_named(mine: Path, streaming: bool) -> None:
    seen = inspected(config(mine, streaming=streaming))
    (group,) = seen.groups.values()
    assert (group.corpus, group.split, group.task, group.language) == ("mine", "train", "transcribe", "en")
    assert (seen.samples, group.samples, len(group.speakers)) == (5, 5, 2)
    assert seen.seconds == pytest.approx(0.5 + 1.5 + 1.6 + 31 + 2.5, abs=0.01) and group.longest == 31
    assert {edge: count for edge, count in seen.histogram.items() if count} == {0: 1, 1: 2, 2: 1, 30: 1}
    assert [each.id for each in seen.of_kind("corrupt")] == ["mine/train/noise.wav"]
    assert "not sound or film" in seen.of_kind("corrupt")[0].cause
    assert list(map(str, seen.of_kind("missing"))) == ["mine/train/gone.wav: no such file"]


def test_decoding_finds_what_headers_do_not_tell(mine: Path) -> None:
    seen = inspected(config(mine), decode=True)
    assert [each.id for each in seen.of_kind("corrupt")] == ["mine/train/noise.wav", "mine/train/damaged.flac"]
    assert seen.samples == 4 and seen.seconds == pytest.approx(0.5 + 1.5 + 1.6 + 31, abs=0.01)


def test_all_that_training_leaves_out_or_stops_for_is_shown_before(tmp_path: Path) -> None:
    for name, seconds in (("a", 0.5), ("long", 31.0)):
        encode(tmp_path / f"{name}.wav", tone(seconds, 8_000), 8_000, "pcm_s16le")
    (tmp_path / "noise.wav").write_bytes(b"no sound at all")
    rows = ["a.wav\tyes\ten", "a.wav\t\ten", "a.wav\t<|0.0|> no\ten", f"a.wav\t{'no ' * 300}\ten", "long.wav\tyes\ten"]
    rows += ["a.wav\tyes\tklingon", "noise.wav\tyes\ten", "gone.wav\tyes\ten", "a.wav\tyes\tor", "a.wav\tyes\tor"]
    (tmp_path / "t.tsv").write_text("\n".join(["path\ttext\tlanguage", *rows]) + "\n")
    config = CorpusConfig(kind="table", source=str(tmp_path / "t.tsv"))
    seen = inspected(config, model=(tiny_tokenizer(), ModelConfig()))
    rows_of = {kind: sorted(int(each.place.split()[-1]) for each in seen.of_kind(kind)) for kind in KINDS}
    assert rows_of == {"corrupt": [3, 4, 7, 8], "missing": [9], "too long": [5, 6]}
    assert (
        "its text has" in str(seen) and "31.00 s; the window has 30" in str(seen) and "'<|0.0|>' is markup" in str(seen)
    )
    (remark,) = seen.as_json()["remarks"]
    assert "t: training stops: this model does not know the language 'or'" in remark and "(2 samples)" in remark
    assert seen.remarks.total() == 2


def test_what_training_stops_for_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    encode(tmp_path / "a.wav", tone(0.5, 8_000), 8_000, "pcm_s16le")
    tiny_whisper_moe().save_pretrained(tmp_path / "model")
    for code, status in (("en", 0), ("or", 1)):
        (tmp_path / "t.tsv").write_text(f"path\ttext\tlanguage\na.wav\tyes\t{code}\n")
        assert command(monkeypatch, tmp_path / "t.tsv", "--model", tmp_path / "model") == status
    assert "training stops: this model does not know the language 'or'" in capsys.readouterr().out


def test_so_much_left_out_that_training_stops_is_said_in_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    encode(tmp_path / "a.wav", tone(0.5, 8_000), 8_000, "pcm_s16le")
    model = tiny_whisper_moe()
    model.save_pretrained(tmp_path / "model")
    for bad, stops in ((1, False), (2, True)):
        rows = [*(f"a.wav\tyes {i}" for i in range(19)), *[f"a.wav\t{'no ' * 300}"] * 5, *["a.wav\t..."] * bad]
        (tmp_path / "t.tsv").write_text("\n".join(["path\ttext", *rows]) + "\n")
        assert command(monkeypatch, tmp_path / "t.tsv", "--languages", "en", "--model", tmp_path / "model") == 1
        said = capsys.readouterr().err
        corpora = [open_corpus(config(tmp_path / "t.tsv"))]
        if stops:
            with pytest.raises(DataError, match=r"9\.5% of 21 samples are corrupt, more than 5\.0%") as error:
                PackedLoader(corpora, model.tokenizer, model.config, LoaderConfig())
            assert said == f"whisper-moe: training stops: {error.value}\n"
        else:
            assert PackedLoader(corpora, model.tokenizer, model.config, LoaderConfig()) and said == ""


def test_the_text_says_what_the_json_says(mine: Path) -> None:
    seen = inspected(config(mine))
    said, facts = str(seen), json.loads(json.dumps(seen.as_json()))
    assert facts["samples"] == 5 and facts["groups"][0]["speakers"] == 2
    assert [bar["from_seconds"] for bar in facts["histogram"]] == list(EDGES)
    assert sum(bar["samples"] for bar in facts["histogram"]) == 5
    row = next(line for line in said.splitlines() if line.startswith("mine")).split()
    assert row == ["mine", "train", "transcribe", "en", "5", "0.01", "7.42", "31.00", "2"]
    assert "1–2             2 " + "█" * 40 in said and "over 30         1 " + "█" * 20 in said
    assert "corrupt: 1\n" in said and "missing: 1\n" in said
    assert "  mine/train/noise.wav: " in said and "  mine/train/gone.wav: no such file" in said


def test_every_task_is_summed_up(tmp_path: Path) -> None:
    for number in range(3):
        recording(tmp_path / f"{number}.m4a", "hindi", number)
        film(tmp_path / f"{number}.MOV", [0, 0.04, 0.08])
    rows = [f"{number}.m4a\t\tx\t{code}\t\ttranscribe\t{number}" for number in range(3) for code in ("hi", "or")]
    rows += [f"{number}.MOV\t\tx\tins\ten\tsign\t" for number in range(3)]
    (tmp_path / "seen.tsv").write_text(
        "\n".join(["path\tsource_text\ttext\tlanguage\ttarget_language\ttask\tspeaker", *rows]) + "\n"
    )
    pairs = ["source_text\ttext\tlanguage\ttarget_language", "a\tx\ten\tor", "b\ty\ten\tor"]
    (tmp_path / "read.tsv").write_text("\n".join(pairs) + "\n")
    settings: list[dict[str, Any]] = [
        {"source": str(tmp_path / "seen.tsv")},
        {"source": str(tmp_path / "read.tsv"), "task": "translate-text", "streaming": True},
    ]
    seen = inspected(*(CorpusConfig(**each) for each in settings))
    groups = {(g.corpus, g.task, g.language): (g.samples, len(g.speakers)) for g in seen.groups.values()}
    assert groups == {
        ("seen", "transcribe", "hi"): (3, 3),
        ("seen", "transcribe", "or"): (3, 3),
        ("seen", "sign", "ins>en"): (3, 0),
        ("read", "translate-text", "en>or"): (2, 0),
    }
    assert sum(seen.histogram.values()) == 9, "pairs of texts have no duration"


# The command.


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["whisper-moe", "data", "inspect", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


def test_the_command_says_by_its_status_whether_all_can_be_used(
    mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, mine, "--languages", "en") == 1
    assert "mine    train  transcribe  en" in capsys.readouterr().out
    whole = tmp_path / "whole"
    recording(whole / "a.m4a", "hindi", 0)
    (whole / "train.tsv").write_text("path\ttext\tlanguage\na.m4a\tyes\thi\n")
    assert command(monkeypatch, whole, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert {group["corpus"] for group in facts["groups"]} == {"whole"} and facts["corrupt"] == []
    assert command(monkeypatch, whole, tmp_path / "nowhere", "--json") == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["samples"] == 1 and "nowhere: no such file or folder" in captured.err
    assert command(monkeypatch, mine / "transcripts.tsv", "--languages", "en", "--limit", 2, "--json") == 1
    assert json.loads(capsys.readouterr().out)["samples"] == 2


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["x", "--text", "said"], 2, "text: Input should be 'column'"),
        (["x", "--languages", "klingon"], 2, "languages: unknown language 'klingon'"),
        (["x", "--columns", "sound=clip"], 2, "columns: there is no column 'sound'"),
        (["x", "--limit", "0"], 2, "'--limit': Input should be greater"),
        ([], 2, "Missing argument 'sources'"),
        (["no such folder"], 1, "no such folder: no such file or folder"),
    ],
)
def test_what_cannot_work_is_one_sentence(
    arguments: list[str], status: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, *arguments) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("whisper-moe") and said in line


def test_neither_help_nor_a_mistake_imports_torch_or_datasets() -> None:
    code = (
        "import sys\nfrom whisper_moe.cli import main\nsys.argv = ['whisper-moe', *{!r}]\n"
        "try: main()\nexcept SystemExit: pass\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    )
    for arguments in (["data", "inspect", "--help"], ["data", "inspect", "x", "--languages", "klingon"]):
        run = subprocess.run(
            [sys.executable, "-c", code.format(arguments)], capture_output=True, text=True, timeout=280
        )
        assert run.returncode == 0, run.stderr
        assert {"torch", "datasets", "pandas"} & set(run.stdout.splitlines()[-1].split()) == set()
        assert "whisper_moe" in run.stdout.splitlines()[-1]
