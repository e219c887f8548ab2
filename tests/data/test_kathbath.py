"""Kathbath by its tables: every layout of its archives, what the Hub has, and what is missing or wrong."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("datasets")

from data.miniatures import (
    TEXTS,
    archives,
    hub_copy,
    hub_rows,
    name,
    parquet,
    recording,
    tarred,
)
from data.published import both, kathbath, opened

from whisper_moe.data.corpus import Corpus, CorpusConfig
from whisper_moe.data.sample import DataError, Sample, Skipped, items
from whisper_moe.data.table import open_corpus


def spoken(source: Path, out: Path, *splits: str, languages: tuple[str, ...] = (), **settings: Any) -> Corpus:
    """Of the first split that is asked for, or the training's."""
    kathbath.convert(source, out, splits, languages)
    split = settings.setdefault("split", splits[0] if splits else "train")
    return open_corpus(CorpusConfig(source=str(out / f"{split}.tsv"), name="kathbath", **settings))


def facts(corpus: Corpus) -> list[tuple[object, ...]]:
    return sorted((s.text, s.language, s.target_language, s.speaker, s.domain) for s in corpus)


def stem(sample: Sample) -> str:
    assert sample.audio is not None
    return Path(sample.audio.name).stem


def test_all_layouts_give_the_same_samples(tmp_path: Path) -> None:
    unpacked = spoken(archives(tmp_path / "unpacked"), tmp_path / "1")
    packed = spoken(tarred(tmp_path / "unpacked", tmp_path / "packed"), tmp_path / "2")
    squeezed = spoken(tarred(tmp_path / "unpacked", tmp_path / "squeezed", "gz"), tmp_path / "3")
    apart = spoken(archives(tmp_path / "apart", audio="audio", top="kb_data_clean_m4a"), tmp_path / "4")
    assert facts(unpacked) == facts(packed) == facts(squeezed) == facts(apart)
    first = unpacked[0]
    assert stem(first) == name("hindi", 0) == "8444249300-100-f"
    assert (first.text, first.speaker, first.language) == (TEXTS["hindi"][0], "100", "hi")
    assert packed[0].id == f"kathbath/train/sound/train/hindi/{name('hindi', 0)}.m4a"
    sounds = {stem(sample): sample.audio.read() for sample in unpacked if sample.audio}
    for sample in (*packed, *squeezed):
        assert sample.audio is not None and np.array_equal(sample.audio.read(), sounds[stem(sample)])
    said = {(sample.text, sample.language) for sample in unpacked}
    for form in ("bytes", "array"):
        root = hub_copy(tmp_path / form, form=form)
        hub = [sample for each in ("hindi", "odia") for sample in opened({"source": str(root / each)})]
        assert {(sample.text, sample.language) for sample in hub} == said and len(hub) == 6
        for sample in hub:
            assert sample.audio is not None
            assert len(sample.audio.read()) == pytest.approx(len(sounds[Path(sample.id).stem]), abs=1_500)


def test_tables_are_moved_with_their_recordings(tmp_path: Path) -> None:
    before = spoken(archives(tmp_path / "here" / "k"), tmp_path / "here" / "tables")
    (tmp_path / "here").rename(tmp_path / "there")
    after = opened({"source": str(tmp_path / "there" / "tables" / "train.tsv"), "name": "kathbath"})
    assert [sample.id for sample in after] == [sample.id for sample in before] and after.left_out == ()


def test_what_came_out_of_an_archive_is_not_written_again(tmp_path: Path) -> None:
    packed = tarred(archives(tmp_path / "k", ["hindi"]), tmp_path / "packed")
    first, other, _ = spoken(packed, tmp_path / "out")
    assert first.audio is not None and other.audio is not None
    stamp = os.stat(first.audio.name).st_mtime_ns
    Path(other.audio.name).write_bytes(b"cut off")
    assert all(sample.audio and len(sample.audio.read()) for sample in spoken(packed, tmp_path / "out"))
    assert os.stat(first.audio.name).st_mtime_ns == stamp


def test_noisy_tests_are_other_samples_than_clean_ones(tmp_path: Path) -> None:
    archives(tmp_path / "k", ["tamil"], "test_known", top="clean/kb_data_clean_m4a")
    archives(tmp_path / "k", ["tamil"], "test_unknown", top="clean/kb_data_clean_m4a", audio="")
    archives(tmp_path / "k", ["tamil", "urdu"], "test_known", top="kb_data_noisy_m4a")
    archives(tmp_path / "k", ["tamil"], "test", top="testunk_audio_noisy/kb_data_noisy_m4a")
    counts = {"test-known": 3, "test-unknown": 3, "test-known-noisy": 6, "test-unknown-noisy": 3}
    kathbath.convert(tmp_path / "k", tmp_path / "out" / "kathbath")
    assert {file.stem for file in (tmp_path / "out" / "kathbath").glob("*.tsv")} == set(counts)
    for split, count in counts.items():
        corpus = opened({"source": str(tmp_path / "out" / "kathbath")}, split=split)
        assert len(corpus) == count and corpus.left_out == ()
        assert {sample.domain for sample in corpus} == {split.removeprefix("test-")}
        assert corpus[0].id.startswith(f"kathbath/{split}/")
    noisy, clean = (
        spoken(tmp_path / "k", tmp_path / split, split, languages=("ta",), split=split.replace("_", "-"))[0]
        for split in ("test_known_noisy", "test_known")
    )
    assert noisy.audio and "noisy" in noisy.audio.name and clean.audio and "clean" in clean.audio.name


def test_a_recording_is_found_whatever_it_was_converted_to_and_wherever_its_transcript_is(tmp_path: Path) -> None:
    archives(tmp_path / "k", ["hindi"])
    audio = tmp_path / "k/data/hindi/train/audio"
    for file in audio.glob("*.m4a"):
        file.unlink()
    for number in range(3):
        recording(tmp_path / "k/wavs/hindi/train" / f"{name('hindi', number)}.wav", "hindi", number)
    corpus = spoken(tmp_path / "k", tmp_path / "out", languages=("hi",))
    assert len(corpus) == 3 and all(sample.audio and sample.audio.name.endswith(".wav") for sample in corpus)


def test_what_is_missing_is_named_and_costs_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = archives(tmp_path / "k", ["hindi"]) / "data/hindi/train"
    (folder / "audio" / f"{name('hindi', 0)}.m4a").unlink()
    for other in ("999-1-m", "888-1-m"):
        recording(folder / "audio" / f"{other}.m4a", "hindi", 1)
    with open(folder / "transcription_n2w.txt", "a", encoding="utf-8") as lines:
        lines.write(f"\n{name('hindi', 1)}.m4a\t{TEXTS['hindi'][1]}\n888-1-m.m4a\n")
    corpus = spoken(tmp_path / "k", tmp_path / "out")
    assert capsys.readouterr().out == "train: 5 rows, 1 of them without a recording, 2 without a text\n"
    assert [stem(sample) for sample in corpus] == [name("hindi", number) for number in (1, 2)]
    table = (tmp_path / "out" / "train.tsv").read_text("utf-8").splitlines()
    faults = {}
    for each in corpus.left_out:
        row = table[int(each.place.rpartition("row ")[2]) - 1]
        faults[Path(row.partition("\t")[0]).stem] = str(each).rpartition(": ")[2]
    assert faults == {name("hindi", 0): "no such file", "888-1-m": "no text", "999-1-m": "no text"}


def test_mistakes_name_what_was_given_and_why(tmp_path: Path) -> None:
    root = archives(tmp_path / "k", ["hindi"])
    transcripts = root / "data/hindi/train/transcription_n2w.txt"

    def refused(said: str, *splits: str, source: Path = root, languages: tuple[str, ...] = ()) -> None:
        with pytest.raises(DataError, match=said):
            kathbath.convert(source, tmp_path / "out", splits, languages)
        assert not list((tmp_path / "out").glob("*.tsv"))

    refused(r"no split 'evening': one of train, valid, test-known", "train", "evening")
    refused("no language en; it has bn, gu", languages=("en",))
    refused("unknown language 'klingon'", languages=("klingon",))
    refused(r"no recordings and no transcription_n2w\.txt of tamil, train", languages=("tamil", "hindi"))
    refused("no samples of the split 'valid'", "valid")
    refused("no such folder", source=transcripts)
    refused("neither recordings nor a transcription_n2w", source=tmp_path / "k" / "data" / "hindi" / "train" / "audio")
    transcripts.write_bytes(transcripts.read_bytes() + b"1.m4a\t\xff\xfe\n")
    refused(r"transcription_n2w\.txt, row 4: not UTF-8")
    transcripts.write_text(f"{name('hindi', 0)}.m4a\tone\n{name('hindi', 0)}.m4a\ttwo\n")
    refused(r"transcription_n2w\.txt, row 2, column 'file': .*twice, with two texts")
    transcripts.unlink()
    refused(r"3 recordings and no transcription_n2w\.txt of hindi, train")
    (root / "audio.tar").write_bytes(b"no tar at all" * 100)
    refused(r"audio\.tar: not a tar archive")
    (root / "audio.tar").unlink()
    whole = next(tarred(archives(tmp_path / "l", ["hindi"]), tmp_path / "m", "gz").glob("train*")).read_bytes()
    (root / "data" / "audio.tar.gz").write_bytes(whole[: len(whole) // 2])
    refused(r"audio\.tar\.gz.*: (not a tar archive that can|cannot) be read")


@pytest.mark.parametrize("language", ["odia", "hindi"])
@both
def test_a_language_of_a_copy_of_the_hub_is_its_configuration(tmp_path: Path, language: str, streaming: bool) -> None:
    root = hub_copy(tmp_path / "hub", valid="hindi")
    corpus = opened({"source": str(root), "configuration": language}, streaming=streaming)
    assert [sample.text for sample in corpus] == TEXTS[language]
    assert {sample.language for sample in corpus} == {{"odia": "or", "hindi": "hi"}[language]}
    if language == "hindi":
        assert [s.text for s in opened({"source": str(root), "configuration": language}, split="valid")] == TEXTS[
            "hindi"
        ][:1]
    else:
        with pytest.raises(DataError, match="hub: cannot be read: Unknown split"):
            opened({"source": str(root), "configuration": language}, split="valid")


@both
def test_a_column_that_the_hub_renamed_is_named(tmp_path: Path, streaming: bool) -> None:
    rows = hub_rows("hindi")
    rows["said"] = rows.pop("text")
    parquet(tmp_path / "hub" / "hindi" / "train-00000-of-00001.parquet", rows)
    with pytest.raises(DataError, match=r"hub/hindi, column 'text': the column is missing; there are .*said"):
        opened({"source": str(tmp_path / "hub" / "hindi")}, streaming=streaming)


@both
def test_a_row_of_the_hub_without_sound_or_text_costs_that_row(tmp_path: Path, streaming: bool) -> None:
    rows = hub_rows("hindi")
    rows["audio_filepath"][0] = None
    rows["text"][1] = " "
    parquet(tmp_path / "hub" / "hindi" / "train-00000-of-00001.parquet", rows)
    corpus = opened({"source": str(tmp_path / "hub" / "hindi")}, streaming=streaming)
    found = list(items(corpus))
    assert [item.text for item in found if isinstance(item, Sample)] == [TEXTS["hindi"][2]]
    left_out = [str(item) for item in (*found, *corpus.left_out) if isinstance(item, Skipped)]
    assert len(left_out) == 2 and "column 'audio': no sound" in left_out[0]
    assert left_out[1].endswith("column 'text': no text")
