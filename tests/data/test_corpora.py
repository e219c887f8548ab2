"""Corpora through the public loader: an epoch of each, map-style and streaming; stable ids; what is missing or wrong is named."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from data.miniatures import (
    SIGNS,
    TEXTS,
    WIKI,
    archives,
    frames_of,
    hub_copy,
    hub_rows,
    name,
    parquet,
    recording,
    sign_lists,
    signs,
    tarred,
)

from whisper_moe.data.corpora import COLUMNS, LANGUAGES, open_corpus
from whisper_moe.data.corpus import Corpus, CorpusConfig
from whisper_moe.data.sample import DataError, Sample, Skipped, items
from whisper_moe.media.languages import FURTHER_LANGUAGES
from whisper_moe.media.languages import LANGUAGES as WHISPERS

KINDS = {
    "kathbath-archives": 6,
    "kathbath-tar": 6,
    "kathbath-hub": 6,
    "include": len(SIGNS["train"]),
    "wiki-translate": 14,
    "table": 3,
}
"""Miniature: number of its samples."""


@pytest.fixture(scope="module")
def miniatures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The settings of each."""
    root = tmp_path_factory.mktemp("corpora")
    unpacked = archives(root / "unpacked")
    signs(root / "include")
    sign_lists(root / "include")
    parquet(root / "wiki" / "train-00000-of-00001.parquet", WIKI)
    for number in range(3):
        recording(root / "table" / f"{number}.m4a", "hindi", number)
    lines = [f"{number}.m4a\t{text}\tspeaker-{number}\n" for number, text in enumerate(TEXTS["hindi"])]
    (root / "table" / "transcripts.tsv").write_text("path\ttext\tspeaker\n" + "".join(lines), encoding="utf-8")
    return {
        "kathbath-archives": {"kind": "kathbath", "source": str(unpacked)},
        "kathbath-tar": {"kind": "kathbath", "source": str(tarred(unpacked, root / "packed"))},
        "kathbath-hub": {"kind": "kathbath", "source": str(hub_copy(root / "hub"))},
        "include": {"kind": "include", "source": str(root / "include")},
        "wiki-translate": {"kind": "wiki-translate", "source": str(root / "wiki")},
        "table": {"kind": "table", "source": str(root / "table" / "transcripts.tsv"), "languages": ["hindi"]},
    }


def opened(settings: dict[str, Any], **more: Any) -> Corpus:
    return open_corpus(CorpusConfig(**settings, **more))


def read(sample: Sample) -> float:
    """What training does with a sample: seconds of its decoded sound or film."""
    assert sample.text
    if sample.audio is not None:
        sound = sample.audio.read()
        assert np.abs(sound).max() > 0.05
        return len(sound) / 16_000
    if sample.video is not None:
        return len(frames_of(sample.video)) / 25
    assert sample.source_text
    return 0.0


both = pytest.mark.parametrize("streaming", [False, True], ids=["map", "streaming"])


@pytest.mark.parametrize("kind", KINDS)
@both
def test_an_epoch_reads_every_sample_once(miniatures: dict[str, dict[str, Any]], kind: str, streaming: bool) -> None:
    corpus = opened(miniatures[kind], streaming=streaming)
    samples = list(corpus)
    assert len({sample.id for sample in samples}) == len(samples) == KINDS[kind]
    seconds = [read(sample) for sample in samples]
    assert [sample.seconds() for sample in samples] == pytest.approx(seconds, abs=0.15)
    assert corpus.streaming == streaming and corpus.left_out == ()
    assert list(corpus) == samples == list(pickle.loads(pickle.dumps(corpus))), "a second epoch, and in a worker"
    for limit in (2, 99):
        assert list(opened(miniatures[kind], streaming=streaming, limit=limit)) == samples[:limit]
    if not streaming:
        assert [corpus[index] for index in range(len(corpus))] == samples
        lengths = corpus.lengths()
        assert lengths.dtype == np.float32 and lengths == pytest.approx(seconds, abs=0.15)
        return
    assert samples == list(opened(miniatures[kind]))
    for ask in (lambda: len(corpus), lambda: corpus[0], corpus.lengths):
        with pytest.raises(TypeError, match="is streamed"):
            ask()


@pytest.mark.parametrize("kind", KINDS)
def test_the_ranks_of_a_stream_share_its_ids(miniatures: dict[str, dict[str, Any]], kind: str) -> None:
    from datasets.distributed import split_dataset_by_node

    stream = opened(miniatures[kind], streaming=True)
    shares = [
        [sample.id for sample in replace(stream, dataset=split_dataset_by_node(stream.dataset, rank, 2))]
        for rank in range(2)
    ]
    assert all(shares)
    assert sorted(shares[0] + shares[1]) == sorted(sample.id for sample in stream)


def test_ids_do_not_depend_on_the_process(miniatures: dict[str, dict[str, Any]]) -> None:
    settings = miniatures["wiki-translate"]
    code = (
        "import sys, json; from whisper_moe.data.corpora import CorpusConfig, open_corpus\n"
        "for sample in open_corpus(CorpusConfig(**json.loads(sys.argv[1]))): print(sample.id)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, json.dumps({**settings, "streaming": True})],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [sample.id for sample in opened(settings)]
    assert "wiki-translate/train/11/en-hi/" in run.stdout


def test_a_corpus_that_states_lengths_is_not_probed(
    miniatures: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def probe(*_: object) -> float:
        raise AssertionError("a header was read")

    hub, archive = opened(miniatures["kathbath-hub"]), opened(miniatures["kathbath-archives"])
    monkeypatch.setattr(Sample, "seconds", probe)
    assert (hub.lengths() > 0.1).all()
    with pytest.raises(AssertionError, match="header"):
        archive.lengths()


# Kathbath.


def kathbath(source: Path | str, **settings: Any) -> Corpus:
    return open_corpus(CorpusConfig(kind="kathbath", source=str(source), **settings))


def facts(corpus: Corpus) -> list[tuple[object, ...]]:
    return sorted((s.id, s.text, s.language, s.target_language, s.speaker, s.domain) for s in corpus)


def test_all_layouts_give_the_same_samples(tmp_path: Path) -> None:
    unpacked = kathbath(archives(tmp_path / "unpacked"))
    packed = kathbath(tarred(tmp_path / "unpacked", tmp_path / "packed"))
    hub = kathbath(hub_copy(tmp_path / "hub"))
    arrays = kathbath(hub_copy(tmp_path / "arrays", form="array"))
    apart = kathbath(archives(tmp_path / "apart", audio="audio", top="kb_data_clean_m4a"))
    assert facts(unpacked) == facts(packed) == facts(hub) == facts(arrays) == facts(apart)
    first = unpacked[0]
    assert first.id == f"kathbath/hindi/train/{name('hindi', 0)}" == "kathbath/hindi/train/8444249300-100-f"
    assert (first.text, first.speaker, first.language) == (TEXTS["hindi"][0], "100", "hi")
    sounds = {sample.id: sample.audio.read() for sample in unpacked if sample.audio}
    for corpus in (packed, hub, arrays):
        for sample in corpus:
            assert sample.audio is not None
            assert len(sample.audio.read()) == pytest.approx(len(sounds[sample.id]), abs=1_500)
    for sample in packed:
        assert sample.audio is not None and np.array_equal(sample.audio.read(), sounds[sample.id])


@pytest.mark.parametrize("language", ["odia", "hindi"])
def test_each_language_is_asked_of_the_hub_by_its_name(language: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []

    def load(source: str, configuration: str, *, split: str, streaming: bool, **_: Any) -> Any:
        asked.append((source, configuration, split))
        whole = datasets.Dataset.from_dict(
            {"audio_filepath": [{"bytes": b"x", "path": "1-2-m.wav"}], "text": ["a\xa0 b "]}
        )
        whole = whole.cast_column("audio_filepath", datasets.Audio())
        return whole.to_iterable_dataset() if streaming else whole

    monkeypatch.setattr(datasets, "load_dataset", load)
    for streaming in (False, True):
        (sample,) = kathbath("ai4bharat/Kathbath", languages=[language], split="valid", streaming=streaming)
        assert sample.id == f"kathbath/{language}/valid/1-2-m"
        assert (sample.language, sample.text, sample.speaker) == (LANGUAGES[language], "a b", "2")
        assert sample.audio is not None and sample.audio.data == b"x"
    assert asked == [("ai4bharat/Kathbath", language, "valid")] * 2


def test_what_the_hub_says_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise OSError("Dataset is a gated dataset.\nAsk for access.")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match=r"^ai4bharat/Kathbath: cannot be read: Dataset is a gated dataset\. Ask for"):
        kathbath("ai4bharat/Kathbath")


def test_noisy_tests_are_other_samples_than_clean_ones(tmp_path: Path) -> None:
    archives(tmp_path / "k", ["tamil"], "test_known", top="clean/kb_data_clean_m4a")
    archives(tmp_path / "k", ["tamil"], "test_unknown", top="clean/kb_data_clean_m4a", audio="")
    archives(tmp_path / "k", ["tamil", "urdu"], "test_known", top="kb_data_noisy_m4a")
    archives(tmp_path / "k", ["tamil"], "test", top="testunk_audio_noisy/kb_data_noisy_m4a")
    counts = {"test-known": 3, "test-unknown": 3, "test-known-noisy": 6, "test-unknown-noisy": 3}
    for split, count in counts.items():
        corpus = kathbath(tmp_path / "k", split=split)
        assert len(corpus) == count and corpus.left_out == ()
        assert {sample.domain for sample in corpus} == {split.removeprefix("test-")}
        assert corpus[0].id.split("/")[2] == split
    noisy, clean = (
        kathbath(tmp_path / "k", split=split, languages=["ta"])[0] for split in ("test_known_noisy", "test_known")
    )
    assert noisy.audio and "noisy" in noisy.audio.name and clean.audio and "clean" in clean.audio.name


def test_a_recording_is_found_whatever_it_was_converted_to_and_wherever_its_transcript_is(tmp_path: Path) -> None:
    archives(tmp_path / "k", ["hindi"])
    audio = tmp_path / "k/data/hindi/train/audio"
    for file in audio.glob("*.m4a"):
        file.unlink()
    for number in range(3):
        recording(tmp_path / "k/wavs/hindi/train" / f"{name('hindi', number)}.wav", "hindi", number)
    corpus = kathbath(tmp_path / "k", languages=["hi"])
    assert len(corpus) == 3 and all(sample.audio and sample.audio.name.endswith(".wav") for sample in corpus)


def test_what_is_missing_is_named_and_costs_nothing_else(tmp_path: Path) -> None:
    folder = archives(tmp_path / "k", ["hindi"]) / "data/hindi/train"
    (folder / "audio" / f"{name('hindi', 0)}.m4a").unlink()
    for stem in ("999-1-m", "888-1-m"):
        recording(folder / "audio" / f"{stem}.m4a", "hindi", 1)
    with open(folder / "transcription_n2w.txt", "a", encoding="utf-8") as lines:
        lines.write(f"\n{name('hindi', 1)}.m4a\t{TEXTS['hindi'][1]}\n888-1-m.m4a\n")
    corpus = kathbath(tmp_path / "k")
    prefix = "kathbath/hindi/train/"
    assert [sample.id for sample in corpus] == [f"{prefix}{name('hindi', number)}" for number in (1, 2)]
    faults = {name("hindi", 0): "no recording", "888-1-m": "no text", "999-1-m": "no transcript"}
    assert {str(each) for each in corpus.left_out} == {f"{prefix}{stem}: {fault}" for stem, fault in faults.items()}


def test_mistakes_name_what_was_given_and_why(tmp_path: Path) -> None:
    root = archives(tmp_path / "k", ["hindi"])
    transcripts = root / "data/hindi/train/transcription_n2w.txt"

    def refused(said: str, source: Path = root, **settings: Any) -> None:
        with pytest.raises(DataError, match=said):
            kathbath(source, **settings)

    refused(r"no split 'evening': one of train, valid, test-known", split="evening")
    refused("no language en; it has bn, gu", languages=["en"])
    refused(r"no recordings and no transcription_n2w\.txt of tamil, train", languages=["tamil"])
    refused("no samples of the split 'valid'", split="valid")
    refused("a file, where", transcripts)
    transcripts.write_bytes(transcripts.read_bytes() + b"1.m4a\t\xff\xfe\n")
    refused(r"transcription_n2w\.txt, row 4: not UTF-8")
    transcripts.write_text(f"{name('hindi', 0)}.m4a\tone\n{name('hindi', 0)}.m4a\ttwo\n")
    refused(r"transcription_n2w\.txt, row 2, column 'file': .*twice, with two texts")
    transcripts.unlink()
    refused(r"3 recordings and no transcription_n2w\.txt of hindi, train")
    (root / "audio.tar").write_bytes(b"no tar at all" * 100)
    refused(r"audio\.tar: not a tar archive")
    (root / "audio.tar").rename(root / "audio.tar.gz")
    refused(r"audio\.tar\.gz: a compressed archive")


@both
def test_a_column_that_the_hub_renamed_is_named(tmp_path: Path, streaming: bool) -> None:
    rows = hub_rows("hindi")
    rows["transcript"] = rows.pop("text")
    parquet(tmp_path / "hub" / "hindi" / "train-00000-of-00001.parquet", rows)
    with pytest.raises(
        DataError, match=r"hub.*hindi/train-.*parquet, column 'text': the column is missing; there are .*transcript"
    ):
        kathbath(tmp_path / "hub", streaming=streaming)


@both
def test_a_row_of_the_hub_without_sound_or_text_costs_that_row(tmp_path: Path, streaming: bool) -> None:
    rows = hub_rows("hindi")
    rows["audio_filepath"][0] = None
    rows["text"][1] = " "
    parquet(tmp_path / "hub" / "hindi" / "train-00000-of-00001.parquet", rows)
    corpus = kathbath(tmp_path / "hub", streaming=streaming)
    found = list(items(corpus))
    assert [item.text for item in found if isinstance(item, Sample)] == [TEXTS["hindi"][2]]
    left_out = [str(item) for item in (*found, *corpus.left_out) if isinstance(item, Skipped)]
    assert len(left_out) == 2 and "kathbath/hindi/train/8444249300-100-f, column 'audio': no sound" in left_out[0]
    assert left_out[1].endswith("8444249301-101-m.m4a, column 'text': no text")


def test_only_the_files_of_the_split_and_language_are_read(tmp_path: Path) -> None:
    root = hub_copy(tmp_path / "hub")
    parquet(root / "hindi" / "valid-00000-of-00001.parquet", {k: v[:1] for k, v in hub_rows("hindi").items()})
    assert len(kathbath(root, split="valid", languages=["hi"])) == 1
    assert len(kathbath(root, languages=["hi"])) == 3 and len(kathbath(root)) == 6
    assert len(kathbath(root / "hindi", languages=["hi"])) == 3
    with pytest.raises(DataError, match="no parquet files of the split 'valid' for odia"):
        kathbath(root, split="valid", languages=["or"])


# INCLUDE.


def include(source: Path, **settings: Any) -> Corpus:
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
    assert house.video is not None and frames_of(house.video).shape == (5, 64, 96, 3)
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


SIGN = SIGNS["train"][0]
MISTAKES = {
    **{
        f"include_train.txt: {bad}": (
            f"{SIGN}\n\n{bad}\n".encode(),
            r"row 3, column 'video_path': .*is not <category>/",
        )
        for bad in ("MVI.MOV", "../A/4. Hello/MVI.MOV", "/A/4. Hello/MVI.MOV", "A/48. /MVI.MOV")
    },
    "include_train.txt: nothing": (b"\n", "no samples of the split 'train'"),
    "include_train.txt: other": (b"\xff\xfe\n", "row 1: not UTF-8"),
    "metadata.csv": (b"path,label\na,b\n", "column 'video_path': the column is missing; there are path, label"),
    "fifty.csv": (f"video_path,split\n{SIGN},\n".encode(), "column 'include_50'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_in_lists_name_file_row_and_column(tree: Path, tmp_path: Path, name: str) -> None:
    content, said = MISTAKES[name]
    listed = tmp_path / name.split(":")[0]
    with pytest.raises(DataError, match=r"no files \(include_train\.txt, \.csv, \.tsv, \.parquet\) of the split"):
        include(tmp_path)
    listed.write_bytes(content)
    with pytest.raises(DataError, match=f"{listed.name}.*{said}"):
        include(listed, videos=str(tree), include_50=name == "fifty.csv")


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


# wiki-translate.


def wiki(source: Path, *directions: str, **settings: Any) -> Corpus:
    if directions:
        settings["directions"] = directions
    return open_corpus(CorpusConfig(kind="wiki-translate", source=str(source), **settings))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return parquet(tmp_path_factory.mktemp("wiki") / "wiki" / "train.parquet", WIKI)


def pairs(corpus: Corpus) -> set[tuple[str, str, str | None, str]]:
    return {(s.language, s.target_language, s.source_text, s.text) for s in corpus}


@both
def test_a_direction_gives_its_pairs_and_none_for_empty_cells(source: Path, streaming: bool) -> None:
    (river, mountain) = wiki(source, "en>hi", streaming=streaming)
    assert river.task == "translate-text" and river.audio is None
    assert pairs([river, mountain]) == {("en", "hi", "A river.", "एक नदी।"), ("en", "hi", "A mountain.", "एक पहाड़।")}  # pyright: ignore[reportArgumentType]
    assert pairs(wiki(source, "ory_Orya>Tamil")) == {
        ("or", "ta", "ଏକ ନଦୀ।", "ஒரு ஆறு."),
        ("or", "ta", "ଏକ ସହର।", "ஒரு நகரம்."),
    }


def test_any_is_every_language_there_is(source: Path) -> None:
    filled = {"en": {1, 2, 3}, "hi": {1, 2}, "or": {1, 3}, "ta": {1, 2, 3}}
    expected = {(a, b): len(filled[a] & filled[b]) for a in filled for b in filled if a != b}

    def found(*directions: str, **settings: Any) -> Counter[tuple[str, str]]:
        return Counter((s.language, s.target_language) for s in wiki(source, *directions, **settings))

    assert found("any>any") == expected and len({s.id for s in wiki(source, "any>any")}) == sum(expected.values())
    assert set(found("any>en")) == {("hi", "en"), ("or", "en"), ("ta", "en")}
    assert set(found()) == {pair for pair in expected if "en" in pair}
    assert set(found("en>any", languages=["hi", "or"])) == {("en", "hi"), ("en", "or")}


def test_lists_are_paired_sentence_by_sentence(tmp_path: Path) -> None:
    rows = {
        "doc_id": ["d1", "d2", "d3", "d4"],
        "eng_Latn": [["One.", "Two.", " "], ["Three."], ["Four.", "Five."], None],
        "hin_Deva": [["एक।", None, "तीन।"], ["तीन।"], ["चार।"], ["पाँच।"]],
    }
    file = parquet(tmp_path / "lists.parquet", rows)
    for streaming in (False, True):
        samples = iter(wiki(file, "en>hi", streaming=streaming))
        assert [(s.source_text, s.text) for s in (next(samples), next(samples))] == [
            ("One.", "एक।"),
            ("Three.", "तीन।"),
        ]
        with pytest.raises(DataError, match=r"^wiki-translate/train/d3/en-hi: 2 sentences against 1"):
            next(samples)
        assert next(samples, None) is None


def test_ids_come_from_what_is_said_not_from_where_it_stands(source: Path, tmp_path: Path) -> None:
    backwards = parquet(tmp_path / "train.parquet", {name: cells[::-1] for name, cells in WIKI.items()})

    def by_id(corpus: Corpus) -> dict[str, Sample]:
        return {sample.id: sample for sample in corpus}

    assert by_id(wiki(source, "any>any")) == by_id(wiki(backwards, "any>any"))


def test_json_lines_and_folders_are_read_too(source: Path, tmp_path: Path) -> None:
    rows = [dict(zip(WIKI, cells, strict=True)) for cells in zip(*WIKI.values(), strict=True)]
    (tmp_path / "wiki").mkdir()
    (tmp_path / "wiki" / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    for place in (tmp_path / "wiki", tmp_path / "wiki" / "pairs.jsonl"):
        assert list(wiki(place, "any>any")) == list(wiki(source, "any>any"))
    with pytest.raises(DataError, match=r"no files .* of the split 'test'"):
        wiki(tmp_path / "wiki", split="test")


def test_the_languages_are_known() -> None:
    assert len(COLUMNS) == 15 == len(set(COLUMNS.values())) and len(LANGUAGES) == 12
    assert {*COLUMNS.values(), *LANGUAGES.values()} <= WHISPERS.keys() | FURTHER_LANGUAGES.keys()


@pytest.mark.parametrize(
    ("directions", "said"),
    [
        (["en-hi"], "'en-hi' is no direction"),
        (["en>klingon"], "unknown language 'klingon'"),
        (["en>ml"], "no column for 'ml'; there are en, hi, ta, or"),
        (["en>en"], "no two languages"),
    ],
)
def test_directions_that_cannot_be_are_refused(source: Path, directions: list[str], said: str) -> None:
    with pytest.raises(DataError, match=f"column 'directions': {said}"):
        wiki(source, *directions)


def test_cells_of_another_kind_are_named(tmp_path: Path) -> None:
    file = parquet(tmp_path / "train.parquet", {"doc_id": [7], "eng_Latn": [3.5], "hin_Deva": ["तीन।"]})
    with pytest.raises(DataError, match=r"^wiki-translate/train/7/en-hi: a float where a text"):
        next(iter(wiki(file, "en>hi")))
    for other, said in (("train.txt", "not a file of rows"), ("broken.parquet", "cannot be read")):
        (tmp_path / other).write_bytes(b"PAR1 no more")
        with pytest.raises(DataError, match=f"{other}: {said}"):
            wiki(tmp_path / other)
