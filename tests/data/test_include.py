"""INCLUDE by its tables: its words and splits, where videos are found, and mistakes in its lists."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datasets")

from data.miniatures import (
    SIGNS,
    frames_of,
    parquet,
    sign_lists,
    signs,
)
from data.published import include

from whisper_moe.data.corpus import Corpus, CorpusConfig
from whisper_moe.data.sample import DataError
from whisper_moe.data.table import open_corpus


def signed(videos: Path, out: Path, lists: Path | None = None, split: str = "train") -> Corpus:
    include.convert(videos, out, lists)
    return read_signs(out, split)


def read_signs(out: Path, split: str) -> Corpus:
    return open_corpus(CorpusConfig(source=str(out), split=split, name="include"))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sign_lists(signs(tmp_path_factory.mktemp("include") / "videos"))


def test_the_word_is_the_second_part_whatever_lies_below(tree: Path, tmp_path: Path) -> None:
    corpus = signed(tree, tmp_path)
    assert [(s.text, s.domain) for s in corpus] == [("hello", "Greetings"), ("house", "Places"), ("good", "Adjectives")]
    house = corpus[1]
    assert house.id.startswith("include/train/") and house.id.endswith("Places/19. House/Extra/MVI_3439.MOV/ins-en")
    assert (house.task, house.language, house.target_language) == ("sign", "ins", "en")
    assert house.video is not None and frames_of(house.video).shape == (5, 64, 96, 3)
    assert [sample.seconds() for sample in corpus] == pytest.approx([0.2] * 3, abs=0.001)


def test_the_splits_and_the_fifty_words(tree: Path, tmp_path: Path) -> None:
    include.convert(tree, tmp_path)
    for split in ("val", "valid", "validation"):
        (sample,) = read_signs(tmp_path, split)
        assert sample.text == "good morning"
    assert [sample.text for sample in read_signs(tmp_path, "test")] == ["bird", "cell phone"]
    assert [sample.text for sample in read_signs(tmp_path, "test-50")] == ["bird"]
    assert {file.stem for file in tmp_path.glob("*.tsv")} == {
        f"{split}{tail}" for split in ("train", "val", "test") for tail in ("", "-50")
    }


def metadata() -> dict[str, list[Any]]:
    """The Hub's columns; the label column is wrong on purpose: the path counts."""
    rows = [(path, split) for split, paths in SIGNS.items() for path in paths]
    fifty = [path == SIGNS[split][0] for path, split in rows]
    columns = {"video_path": [path for path, _ in rows], "label": ["Extra"] * len(rows), "include_50": fifty}
    return columns | {"split": [split for _, split in rows]}


@pytest.mark.parametrize("form", ["csv", "parquet", "one-for-each-split"])
def test_metadata_says_the_same_as_the_lists(tree: Path, tmp_path: Path, form: str) -> None:
    columns = metadata()
    source = tmp_path / f"metadata.{form}"
    if form == "csv":
        lines = [",".join(map(str, row)) for row in zip(*columns.values(), strict=True)]
        source.write_text("\n".join([",".join(columns), *lines]))
    elif form == "parquet":
        parquet(source, columns)
    else:
        source = tmp_path / "hub"
        for split, ours in (("train", "train"), ("validation", "val"), ("test", "test")):
            rows = [number for number, its in enumerate(columns["split"]) if its == ours]
            some = {name: [column[row] for row in rows] for name, column in columns.items() if name != "split"}
            parquet(source / "data" / f"{split}-00000-of-00001.parquet", some)
    include.convert(tree, tmp_path / "lists")
    include.convert(tree, tmp_path / "metadata", source)
    for split in ("train", "val", "test", "train-50", "val-50", "test-50"):
        wanted, found = (read_signs(tmp_path / each, split) for each in ("lists", "metadata"))
        assert (
            [replace(s, row=None, video=None) for s in found]
            == [replace(s, row=None, video=None) for s in wanted]
            != []
        )
        assert [frames_of(sample.video).shape for sample in found] == [(5, 64, 96, 3)] * len(found)


def test_videos_are_found_where_archives_were_unpacked(tree: Path, tmp_path: Path) -> None:
    """In folders named after the archives, converted, with another case."""
    lists = sign_lists(tmp_path / "lists")
    for path in SIGNS["train"]:
        target = tmp_path / "zips" / f"{path.split('/')[0]}_1of2" / Path(path).with_suffix(".mp4")
        target.parent.mkdir(parents=True)
        target.write_bytes((tree / path).read_bytes())
    corpus = signed(tmp_path / "zips", tmp_path / "1", lists)
    assert [sample.text for sample in corpus] == [sample.text for sample in signed(tree, tmp_path / "2")]
    assert all(sample.video and "_1of2" in sample.video for sample in corpus)


def test_missing_videos_are_counted_and_named(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = sign_lists(tmp_path / "videos")
    with pytest.raises(DataError, match=r"videos: none of the 6 videos is there, such as .*MOV"):
        include.convert(root, tmp_path / "out")
    (root / SIGNS["train"][0]).parent.mkdir(parents=True)
    (root / SIGNS["train"][0]).write_bytes((tree / SIGNS["train"][0]).read_bytes())
    corpus = signed(root, tmp_path / "out")
    assert "train: 3 rows, 2 of them without a video\n" in capsys.readouterr().out
    assert [sample.text for sample in corpus] == ["hello"]
    assert tuple(re.sub("train/.*videos/", "train/", str(each)) for each in corpus.left_out) == (
        "include/train/Places/19. House/Extra/MVI_3439.MOV/ins-en: no such file",
        "include/train/Adjectives/94. good/MVI_9269.MOV/ins-en: no such file",
    )
    with pytest.raises(DataError, match=r"none of its 2 files is there, such as .*MOV"):
        read_signs(tmp_path / "out", "test")


SIGN = SIGNS["train"][0]
MISTAKES = {
    **{
        f"include_train.txt: {bad}": (
            f"{SIGN}\n\n{bad}\n".encode(),
            r"row 3, column 'video_path': .*is not <category>/",
        )
        for bad in ("MVI.MOV", "../A/4. Hello/MVI.MOV", "/A/4. Hello/MVI.MOV", "A/48. /MVI.MOV")
    },
    "include_train.txt: nothing": (b"\n", r"no lists such as include_train\.txt with a video in them"),
    "include_train.txt: other": (b"\xff\xfe\n", "row 1: not UTF-8"),
    "metadata.csv": (b"path,label\na,b\n", "column 'video_path': the column is missing; there are path, label"),
    "metadata.csv: dusk": (f"video_path,split\n{SIGN},dusk\n".encode(), "no lists .*: it says no split"),
    "metadata.csv: above": (b"video_path,split\n../a/b,train\n", "row 1, column 'video_path': .*is not <category>/"),
    "metadata.txt": (b"", r"not a file of rows: one of \.csv, \.tsv, \.parquet is"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_in_lists_name_file_row_and_column(tree: Path, tmp_path: Path, name: str) -> None:
    content, said = MISTAKES[name]
    listed = tmp_path / name.split(":")[0]
    with pytest.raises(DataError, match=r"no files \(\.csv, \.tsv, \.parquet\) of the split 'test'"):
        include.convert(tree, tmp_path / "out", tmp_path)
    listed.write_bytes(content)
    with pytest.raises(DataError, match=said):
        include.convert(tree, tmp_path / "out", tmp_path if listed.name.startswith("include") else listed)
    assert not (tmp_path / "out").exists()


def test_metadata_that_cannot_be_read_is_not_passed_over(tree: Path, tmp_path: Path) -> None:
    """Other splits may be there: one that is broken is no reason to write those alone."""
    columns = {"video_path": SIGNS["test"]}
    parquet(tmp_path / "data" / "test-00000-of-00001.parquet", columns)
    (tmp_path / "data" / "train-00000-of-00001.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(DataError, match=r"train-00000-of-00001\.parquet: cannot be read"):
        include.convert(tree, tmp_path / "out", tmp_path / "data")


def test_the_real_lists_have_the_published_numbers(shared_data: Path, tmp_path: Path) -> None:
    """4,292 videos (empty files here: nothing is opened) of 263 words, 958 of 50."""
    lists = shared_data / "include-metadata"
    for file in (lists / "train_test_paths").glob("include_*.txt"):
        for path in file.read_text().splitlines():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).touch()
    include.convert(tmp_path, tmp_path / "tables", lists)
    for tail, labels, counts in (("", "include", (3127, 348, 817)), ("-50", "include50", (689, 77, 192))):
        parts = [read_signs(tmp_path / "tables", f"{split}{tail}") for split in ("train", "val", "test")]
        assert [len(part) for part in parts] == list(counts) and not any(part.left_out for part in parts)
        ids = {sample.id.split("/", 2)[2] for part in parts for sample in part}
        assert len(ids) == sum(counts), "the splits share no video"
        keys = {"".join(re.findall("[a-z]", sample.text)) for part in parts for sample in part}
        assert keys == set(json.loads((lists / "label_maps" / f"label_map_{labels}.json").read_text()))
    assert len({sample.domain for part in parts for sample in part}) == 15
