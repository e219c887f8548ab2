"""INCLUDE: words by the second part of a path, splits by lists or metadata, videos wherever they were unpacked."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from data.miniatures import SIGNS, parquet, sign_lists, signs

from whisper_moe.data.corpora import open_corpus
from whisper_moe.data.corpus import Corpus, CorpusConfig
from whisper_moe.data.sample import DataError
from whisper_moe.media.video import load_frames


def include(source: Path, **settings: Any) -> Corpus:
    settings.setdefault("cache_dir", str(source.parent / "cache"))
    return open_corpus(CorpusConfig(kind="include", source=str(source), **settings))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sign_lists(signs(tmp_path_factory.mktemp("include") / "videos"))


def test_the_word_is_the_second_part_whatever_lies_below(tree: Path) -> None:
    corpus = include(tree)
    assert [(s.text, s.domain) for s in corpus] == [("hello", "Greetings"), ("house", "Places"), ("good", "Adjectives")]
    house = corpus[1]
    assert house.id == "include/train/Places/19. House/Extra/MVI_3439"
    assert (house.task, house.language, house.target_language) == ("sign", "ins", "en")
    assert house.video is not None and load_frames(house.video, rate=25).shape == (5, 64, 96, 3)
    assert corpus.lengths() == pytest.approx([0.2] * 3, abs=0.001)


def test_the_splits_and_the_fifty_words(tree: Path) -> None:
    for split in ("val", "valid", "validation"):
        (sample,) = include(tree, split=split)
        assert sample.text == "good morning" and sample.id.startswith("include/val/")
    assert [sample.text for sample in include(tree, split="test")] == ["bird", "cell phone"]
    assert [sample.text for sample in include(tree, split="test", include_50=True)] == ["bird"]
    with pytest.raises(DataError, match="no split 'dusk': one of train, val, test"):
        include(tree, split="dusk")


def metadata() -> dict[str, list[Any]]:
    """The Hub's columns; the label column is wrong on purpose: the path counts."""
    rows = [(path, split) for split, paths in SIGNS.items() for path in paths]
    return {
        "video_path": [path for path, _ in rows],
        "parent_label": [path.split("/")[0] for path, _ in rows],
        "label": ["Extra"] * len(rows),
        "include_50": [path == SIGNS[split][0] for path, split in rows],
        "split": [split for _, split in rows],
    }


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
    for settings in ({}, {"split": "val"}, {"split": "test"}, {"split": "test", "include_50": True}):
        wanted = list(include(tree, **settings))
        assert list(include(source, videos=str(tree), **settings)) == wanted != []


def test_videos_are_found_where_archives_were_unpacked(tree: Path, tmp_path: Path) -> None:
    """In folders named after the archives, converted, with another case."""
    lists = sign_lists(tmp_path / "lists")
    for path in SIGNS["train"]:
        target = tmp_path / "zips" / f"{path.split('/')[0]}_1of2" / Path(path).with_suffix(".mp4")
        target.parent.mkdir(parents=True)
        target.write_bytes((tree / path).read_bytes())
    corpus = include(lists, videos=str(tmp_path / "zips"))
    assert [sample.id for sample in corpus] == [sample.id for sample in include(tree)]
    assert all(sample.video and "_1of2" in sample.video for sample in corpus)


def test_missing_videos_are_counted_and_named(tree: Path, tmp_path: Path) -> None:
    root = sign_lists(tmp_path / "videos")
    (root / SIGNS["train"][0]).parent.mkdir(parents=True)
    (root / SIGNS["train"][0]).write_bytes((tree / SIGNS["train"][0]).read_bytes())
    corpus = include(root)
    assert [sample.text for sample in corpus] == ["hello"]
    assert tuple(map(str, corpus.left_out)) == (
        "include/train/Places/19. House/Extra/MVI_3439: no such file",
        "include/train/Adjectives/94. good/MVI_9269: no such file",
    )
    with pytest.raises(DataError, match=r"none of its 2 files is there, such as .*MOV"):
        include(root, split="test")


def test_mistakes_name_file_row_and_column(tree: Path, tmp_path: Path) -> None:
    listed = tmp_path / "include_train.txt"
    for bad in (
        "MVI_0089.MOV",
        "../Greetings/48. Hello/MVI_0089.MOV",
        "/Greetings/48. Hello/MVI.MOV",
        "A/48. /MVI.MOV",
    ):
        listed.write_text(f"{SIGNS['train'][0]}\n\n{bad}\n")
        with pytest.raises(DataError, match=r"include_train\.txt, row 3, column 'video_path': .*is not <category>/"):
            include(listed, videos=str(tree))
    listed.write_text("\n")
    with pytest.raises(DataError, match=r"include_train\.txt: no samples of the split 'train'"):
        include(listed, videos=str(tree))
    listed.write_bytes(b"\xff\xfe\n")
    with pytest.raises(DataError, match="not UTF-8"):
        include(listed, videos=str(tree))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no files \(include_train\.txt, \.csv, \.tsv, \.parquet\) of the split"):
        include(tmp_path / "empty")
    (tmp_path / "metadata.csv").write_text("path,label\na,b\n")
    with pytest.raises(DataError, match="column 'video_path': the column is missing; there are path, label"):
        include(tmp_path / "metadata.csv", videos=str(tree))
    (tmp_path / "none.csv").write_text(f"video_path,split\n{SIGNS['train'][0]},\n")
    with pytest.raises(DataError, match="column 'include_50'"):
        include(tmp_path / "none.csv", videos=str(tree), include_50=True)


def test_the_real_lists_have_the_published_numbers(shared_data: Path, tmp_path: Path) -> None:
    """4,292 videos (empty files here: nothing is opened) of 263 words, 958 of 50."""
    lists = shared_data / "include-metadata"
    for file in (lists / "train_test_paths").glob("include_*.txt"):
        for path in file.read_text().splitlines():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).touch()
    for fifty, labels, counts in ((False, "include", (3127, 348, 817)), (True, "include50", (689, 77, 192))):
        parts = [
            include(lists, videos=str(tmp_path), split=split, include_50=fifty) for split in ("train", "val", "test")
        ]
        assert [len(part) for part in parts] == list(counts) and not any(part.left_out for part in parts)
        ids = {sample.id.split("/", 2)[2] for part in parts for sample in part}
        assert len(ids) == sum(counts), "the splits share no video"
        keys = {"".join(re.findall("[a-z]", sample.text)) for part in parts for sample in part}
        assert keys == set(json.loads((lists / "label_maps" / f"label_map_{labels}.json").read_text()))
    assert len({sample.domain for part in parts for sample in part}) == 15
