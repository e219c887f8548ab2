"""Everybody's own data: every way to write a table down, and mistakes by file, row and column."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data.miniatures import film, parquet
from media.recordings import encode, tone

from whisper_moe.data.corpus import Corpus, CorpusConfig
from whisper_moe.data.sample import DataError
from whisper_moe.data.table import open_corpus


def table(source: Path, **settings: Any) -> Corpus:
    settings.setdefault("languages", ["en"])
    return open_corpus(CorpusConfig(kind="table", source=str(source), **settings))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two recordings of 2 and 3 s."""
    (tmp_path / "audio").mkdir()
    for name, seconds in (("a", 2.0), ("b", 3.0)):
        encode(tmp_path / "audio" / f"{name}.wav", tone(seconds), 16_000, "pcm_s16le")
    return tmp_path


ROWS = [
    {"path": "audio/a.wav", "text": '"No," he said.', "language": "english", "speaker": "ada", "domain": "read"},
    {"path": "audio/b.wav", "text": "ହଁ", "language": "or", "start": 0.5, "end": 1.5},
    {"path": "audio/b.wav", "text": "yes", "language": "or", "task": "translate", "start": 0.5, "end": 1.5},
]
NAMES = ("path", "text", "start", "end", "language", "task", "speaker", "domain")


def written(folder: Path, form: str) -> Path:
    file = folder / f"rows.{form}"
    if form == "jsonl":
        file.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS), encoding="utf-8")
    elif form == "parquet":
        parquet(file, {name: [row.get(name) for row in ROWS] for name in NAMES})
    else:

        def cell(value: object) -> str:
            return '"' + str(value).replace('"', '""') + '"' if form == "csv" else str(value)

        lines = [[cell(row.get(name, "")) for name in NAMES] for row in ROWS]
        separator = "," if form == "csv" else "\t"
        file.write_text("\ufeff" + "\r\n".join(map(separator.join, [NAMES, *lines])), encoding="utf-8")
    return file


@pytest.mark.parametrize("form", ["tsv", "csv", "jsonl", "parquet"])
def test_every_form_of_a_table_says_the_same(folder: Path, form: str) -> None:
    whole, piece, english = table(written(folder, form), languages=[])
    assert (whole.id, whole.text, whole.speaker, whole.domain) == (
        "rows/train/audio/a.wav",
        '"No," he said.',
        "ada",
        "read",
    )
    assert (whole.language, whole.target_language, whole.task, whole.duration) == ("en", "en", "transcribe", None)
    assert piece.id == "rows/train/audio/b.wav#0.5-1.5" and piece.duration == 1.0
    assert (piece.language, piece.target_language, piece.text) == ("or", "or", "ହଁ")
    assert (english.task, english.language, english.target_language) == ("translate", "or", "en")
    assert piece.audio and whole.audio and english.audio == piece.audio
    assert len(piece.audio.read()) == 16_000 and len(whole.audio.read()) == 32_000
    assert [each.seconds() for each in (whole, piece, english)] == [2.0, 1.0, 1.0]


def test_ids_are_different_and_do_not_depend_on_the_rows_around(folder: Path) -> None:
    file = folder / "rows.tsv"
    line = "audio/a.wav\tone\n"
    file.write_text(f"path\ttext\n{line}{line}")
    assert [s.id for s in table(file)] == ["rows/train/audio/a.wav", "rows/train/audio/a.wav~2"]
    file.write_text(f"path\ttext\naudio/b.wav\ttwo\n{line}")
    assert table(file)[1].id == "rows/train/audio/a.wav"


def test_a_split_may_be_called_as_others_call_it(folder: Path) -> None:
    names = ("train", "Training", "dev", "val", "valid", "validation", "test", "test-clean", "eval", "")
    (folder / "t.tsv").write_text("path\ttext\tsplit\n" + "".join(f"audio/a.wav\t{n or 'all'}\t{n}\n" for n in names))
    for split in ("dev", "valid"):
        assert [s.text for s in table(folder / "t.tsv", split=split)] == ["dev", "val", "valid", "validation", "all"]
    assert [s.text for s in table(folder / "t.tsv")] == ["train", "Training", "all"]
    assert [s.text for s in table(folder / "t.tsv", split="test")] == ["test", "all"]
    assert [s.text for s in table(folder / "t.tsv", split="test-clean")] == ["test-clean", "all"]
    (folder / "u.tsv").write_text("path\ttext\tsplit\naudio/a.wav\tx\ttrain\n")
    with pytest.raises(DataError, match="no rows of the split 'dev'"):
        table(folder / "u.tsv", split="dev")
    (folder / "u.tsv").write_text("path\ttext\naudio/a.wav\tx\naudio/b.wav\ty\n")
    assert [s.text for s in table(folder / "u.tsv", split="test")] == ["x", "y"], "no such column: the whole"
    (folder / "u.tsv").write_text("path\ttext\tsplit\naudio/a.wav\tx\ttrain\naudio/b.wav\ty\ttrian\n")
    (fault,) = table(folder / "u.tsv").left_out
    assert "row 3, column 'split': unknown split 'trian'" in fault.cause
    assert table(folder / "u.tsv", split="trian").left_out == (), "whose own name it is"


def test_datasets_audiofolder_is_read_by_split(folder: Path) -> None:
    for split, name in (("train", "a"), ("test", "b")):
        (folder / split).mkdir()
        (folder / "audio" / f"{name}.wav").rename(folder / split / f"{name}.wav")
        (folder / split / "metadata.csv").write_text(f"file_name,transcription,mood\n{name}.wav,well,happy\n")
    for split, seconds in (("train", 2.0), ("test", 3.0)):
        corpus = table(folder, split=split)
        assert [(sample.text, sample.seconds()) for sample in corpus] == [("well", seconds)]


def test_text_pairs_and_signs_are_tables_too(folder: Path) -> None:
    (folder / "pairs.tsv").write_text("A river.\tएक नदी।\nA town.\tएक शहर।\n", encoding="utf-8")
    columns = ["source_text", "text"]
    with pytest.raises(DataError, match=r"pairs\.tsv, row 1, column 'target_language': no language"):
        table(folder / "pairs.tsv", columns=columns, task="translate-text")
    (folder / "pairs.tsv").write_text("source_text\ttext\ttarget_language\nA river.\tएक नदी।\thi\n", encoding="utf-8")
    (pair,) = table(folder / "pairs.tsv", task="translate-text")
    assert (pair.source_text, pair.language, pair.target_language, pair.audio) == ("A river.", "en", "hi", None)
    film(folder / "hello.mov", [0, 0.04])
    (folder / "signs.tsv").write_text("path\ttext\nhello.mov\thello\n")
    (sign,) = table(folder / "signs.tsv", task="sign", languages=["ase"])
    assert (sign.language, sign.target_language, sign.audio) == ("ase", "en", None)
    assert sign.video == str(folder / "hello.mov")


def test_recordings_may_be_named_after_what_is_said(folder: Path) -> None:
    (folder / "audio" / "a.wav").rename(folder / "audio" / "good_morning-all.wav")
    (folder / "audio" / "notes.txt").write_text("not a recording")
    first, second = table(folder, text="file-name")
    assert (first.text, first.domain, second.text) == ("b", "audio", "good morning all")


def test_recordings_may_come_without_text(folder: Path) -> None:
    """For a teacher to transcribe: a bare folder, or a table with other columns."""
    assert [(s.text, s.id) for s in table(folder, text="none")] == [
        ("", f"{folder.name}/train/audio/{n}.wav") for n in "ab"
    ]
    (folder / "t.tsv").write_text("path\tspeaker\naudio/b.wav\tada\n")
    (sample,) = table(folder / "t.tsv", text="none")
    assert (sample.text, sample.speaker, sample.seconds()) == ("", "ada", 3.0)
    with pytest.raises(DataError, match="column 'text': the column is missing"):
        table(folder / "t.tsv")


def test_missing_files_are_named_and_cost_nothing_else(folder: Path) -> None:
    (folder / "t.tsv").write_text("path\ttext\naudio/a.wav\tx\naudio/lost.wav\ty\n")
    corpus = table(folder / "t.tsv")
    assert [s.text for s in corpus] == ["x"] and list(map(str, corpus.left_out)) == [
        "t/train/audio/lost.wav: no such file"
    ]
    (folder / "t.tsv").write_text("path\ttext\na.wav\tx\nb.wav\ty\n")
    with pytest.raises(DataError, match=r"t\.tsv, column 'path': none of its 2 files is there, such as .*a\.wav"):
        table(folder / "t.tsv")


MISTAKES = {
    "path\ttranslation\naudio/a.wav\tx\n": "column 'text': the column is missing; there are path, trans",
    "path\ttext\tspeeker\naudio/a.wav\tx\ty\n": "row 2, column 'speeker': unknown column; did you mean 'speaker'",
    "path\ttext\ttext\na\tb\tc\n": "row 1, column 'text': the column stands there twice",
    "path\ttext\tstart\naudio/a.wav\tx\tnan\n": "row 2, column 'start': 'nan' is no number of seconds",
    "path\ttext\tend\naudio/a.wav\tx\t-1\n": "row 2, column 'end': '-1' is no number of seconds",
    "path\ttext\tlanguage\naudio/a.wav\tx\thindo\n": "no rows in en; there are hindo",
    "path\ttext\ttask\naudio/a.wav\tx\tsing\n": "row 2, column 'task': unknown task 'sing': one of transcribe",
    "path\ttext\na.wav\t\nb.wav\t \n": "row 2, column 'text': no text; none of its 2 rows can be used",
    "path\ttext\n": "no rows",
    "": "no rows",
}


@pytest.mark.parametrize(("content", "said"), MISTAKES.items())
def test_a_mistake_is_named_by_file_row_and_column(folder: Path, content: str, said: str) -> None:
    file = folder / "mine.tsv"
    file.write_text(content)
    with pytest.raises(DataError) as caught:
        table(file)
    assert str(caught.value).startswith(str(file)) and said in str(caught.value) and "\n" not in str(caught.value)


def test_a_row_that_is_no_sample_costs_itself_and_is_named(folder: Path) -> None:
    rows = [
        *("audio/a.wav\tone\ten\t0\t1", "audio/a.wav\t\ten\t0\t1", "audio/a.wav\tone\thindo\t0\t1"),
        *("audio/a.wav\tone\ten\t2\t1", "audio/a.wav\tone\0\ten\t0\t1", "audio/a.wav\t<|en|> one\ten\t0\t1"),
        *("audio/a.wav\tone\ten\tsoon\t1", "\tone\ten\t0\t1", "audio/a.wav\t<|0.00|> b<|1.01|>\ten\t0\t1"),
        *("audio/a.wav\tone\ten\t0\t1\tmore", "audio/b.wav\ttwo\ten\t0\t1"),
    ]
    (folder / "t.tsv").write_text("\n".join(["path\ttext\tlanguage\tstart\tend", *rows]) + "\n")
    corpus = table(folder / "t.tsv", languages=[])
    assert [sample.text for sample in corpus] == ["one", "two"]
    assert [each.place for each in corpus.left_out] == [f"{folder / 't.tsv'}, row {row}" for row in range(3, 12)]
    assert all(each.corrupt and each.cause.startswith(each.place) for each in corpus.left_out)
    named = ("no text", "'hindo'", "ends at 1 s", "NUL", "'<|en|>'", "'soon'", "nothing there", "1.01", "6 cells")
    assert all(said in each.cause for said, each in zip(named, corpus.left_out, strict=True))
    assert corpus[1].place == f"{folder / 't.tsv'}, row 12"


OTHER_MISTAKES = {
    "mine.jsonl": [
        (b'{"path": "audio/a.wav", "text": "x"}\n{"path": ', "row 2: not JSON"),
        (b'{"path": "audio/a.wav", "text": "x"}\n\n[1]\n', "row 3: a list where an object"),
        (b'{"path": "audio/a.wav", "text": ["x"]}\n', "row 1, column 'text': a list, where words"),
        (b'{"path": "audio/a.wav", "text": "\\ud800"}\n', "row 1, column 'text': NUL, or half a character"),
        (b'{"path": "audio/a.wav", "text": "x", "start": true}\n', "row 1, column 'start': True is no number"),
        (b'{"text": "x"}\n', "row 1, column 'path': nothing there"),
    ],
    "mine.csv": [
        (b'path,text\naudio/a.wav,"x"y"\n', "row 2: not a table"),
        (b"path,text\naudio/a.wav,x\naudio/b.wav,\xff\n", "row 3: not UTF-8 text"),
    ],
    "mine.parquet": [(b"PAR1", "cannot be read: Parquet file size")],
    "mine.xlsx": [(b"PK", "not a table: one of .tsv")],
}


@pytest.mark.parametrize(
    ("name", "content", "said"), [(n, *case) for n, cases in OTHER_MISTAKES.items() for case in cases]
)
def test_mistakes_of_other_forms(folder: Path, name: str, content: bytes, said: str) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        table(folder / name)
    assert str(caught.value).startswith(str(folder / name)) and said in str(caught.value)


def test_mistakes_of_settings(folder: Path) -> None:
    file = folder / "t.tsv"
    file.write_text("path\ttext\naudio/a.wav\tx\n")
    with pytest.raises(DataError, match=r"row 2, column 'language': no language: add the column"):
        table(file, languages=[])
    with pytest.raises(DataError, match=r"row 2: the path '\{speaker\}/\{path\}' names a column that is not there"):
        table(file, path="{speaker}/{path}")
    with pytest.raises(DataError, match="no such file or folder"):
        table(folder / "nowhere.tsv")
    with pytest.raises(DataError, match="no table in it: metadata or transcripts"):
        table(folder)
    for name in ("metadata.csv", "manifest.jsonl"):
        (folder / name).write_text("")
    with pytest.raises(DataError, match=r"several tables: metadata\.csv, manifest\.jsonl"):
        table(folder)


@pytest.mark.parametrize(
    ("source", "settings", "samples", "hours"),
    [
        ("english-read/transcripts.tsv", {}, 101, 0.223),
        ("english-prompts/transcripts.tsv", {}, 568, 0.43),
        ("english-digits", {}, 1200, None),
        (
            "spoken-words/labels_geography_from_cldr.tsv",
            {"columns": ["language", "path", "label", "text"], "path": "{language}/{path}", "languages": []},
            548,
            None,
        ),
        ("spoken-words/en/words", {"text": "file-name"}, 564, None),
        ("english-orders/audio", {"text": "none"}, 619, 1.5),
    ],
)
def test_real_recordings_are_read(
    shared_data: Path, source: str, settings: dict[str, Any], samples: int, hours: float | None
) -> None:
    corpus = table(shared_data / source, **settings)
    assert len(corpus) == samples and corpus.left_out == ()
    lengths = np.array([sample.seconds() for sample in corpus])
    assert np.isfinite(lengths).all() and (lengths > 0.1).all()
    assert hours is None or lengths.sum() / 3600 == pytest.approx(hours, rel=0.05)
    for index in range(0, samples, samples // 4):
        audio = corpus[index].audio
        assert audio is not None and len(audio.read()) / 16_000 == pytest.approx(lengths[index], abs=0.05)
