"""Kathbath: the Hub's layout and the archives' give the same samples; what is missing or wrong is named."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from data.miniatures import TEXTS, archives, hub_copy, hub_rows, name, parquet, recording, tarred

from whisper_moe.data.corpora import LANGUAGES, open_corpus
from whisper_moe.data.corpus import Corpus, CorpusConfig
from whisper_moe.data.sample import DataError, Sample, Skipped, items


def kathbath(source: Path | str, **settings: Any) -> Corpus:
    if Path(source).is_dir():
        settings.setdefault("cache_dir", str(Path(source).parent / "cache"))
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
    for corpus in (packed, hub):
        for sample in corpus:
            assert sample.audio is not None
            assert len(sample.audio.read()) == pytest.approx(len(sounds[sample.id]), abs=1_500)
    for sample in packed:
        assert sample.audio is not None and np.array_equal(sample.audio.read(), sounds[sample.id])


def test_sound_in_arrays_is_the_sound_itself(tmp_path: Path) -> None:
    """22,050 Hz in the cells, 16 kHz out, and the loudest frequency stays."""
    rows = hub_rows("hindi", "array")
    wave = 0.4 * np.sin(2 * np.pi * 1_000 * np.arange(22_050) / 22_050)
    rows["audio_filepath"][0]["array"] = wave.tolist()
    parquet(tmp_path / "hub" / "hindi" / "train-00000-of-00001.parquet", rows)
    for streaming in (False, True):
        sample = next(iter(kathbath(tmp_path / "hub", streaming=streaming)))
        assert sample.audio is not None
        sound = sample.audio.read()
        assert len(sound) == pytest.approx(16_000, abs=40)
        assert np.abs(np.fft.rfft(sound)).argmax() == pytest.approx(1_000, abs=2)


def test_the_twelve_languages_have_whispers_codes_and_odia_its_own() -> None:
    from whisper_moe.media.languages import FURTHER_LANGUAGES, language_code
    from whisper_moe.media.languages import LANGUAGES as WHISPERS

    assert len(LANGUAGES) == 12
    assert {hub: language_code(hub) for hub in LANGUAGES} == LANGUAGES
    assert [code for code in LANGUAGES.values() if code not in WHISPERS] == ["or"] and "or" in FURTHER_LANGUAGES


@pytest.mark.parametrize("language", LANGUAGES)
def test_each_language_is_asked_of_the_hub_by_its_name(language: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []

    def load(source: str, configuration: str, *, split: str, streaming: bool, **_: Any) -> datasets.Dataset:
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
        raise datasets.exceptions.DatasetNotFoundError("Dataset is a gated dataset.\nAsk for access.")

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
    recording(folder / "audio" / "999-1-m.m4a", "hindi", 1)
    with open(folder / "transcription_n2w.txt", "a", encoding="utf-8") as lines:
        lines.write(f"\n{name('hindi', 1)}.m4a\t{TEXTS['hindi'][1]}\n888-1-m.m4a\n")
    recording(folder / "audio" / "888-1-m.m4a", "hindi", 1)
    corpus = kathbath(tmp_path / "k")
    prefix = "kathbath/hindi/train"
    assert [sample.id for sample in corpus] == [f"{prefix}/{name('hindi', number)}" for number in (1, 2)]
    assert set(map(str, corpus.left_out)) == {
        f"{prefix}/{name('hindi', 0)}: no recording",
        f"{prefix}/888-1-m: no text",
        f"{prefix}/999-1-m: no transcript",
    }


def test_mistakes_name_what_was_given_and_why(tmp_path: Path) -> None:
    root = archives(tmp_path / "k", ["hindi"])
    transcripts = root / "data/hindi/train/transcription_n2w.txt"
    with pytest.raises(DataError, match=r"no split 'evening': one of train, valid, test-known"):
        kathbath(root, split="evening")
    with pytest.raises(DataError, match="no language en; it has bn, gu"):
        kathbath(root, languages=["en"])
    with pytest.raises(DataError, match=r"no recordings and no transcription_n2w\.txt of tamil, train"):
        kathbath(root, languages=["tamil"])
    with pytest.raises(DataError, match="no samples of the split 'valid'"):
        kathbath(root, split="valid")
    with pytest.raises(DataError, match="a file, where"):
        kathbath(transcripts)
    transcripts.write_bytes(transcripts.read_bytes() + b"1.m4a\t\xff\xfe\n")
    with pytest.raises(DataError, match=r"transcription_n2w\.txt, row 4: not UTF-8"):
        kathbath(root)
    transcripts.write_text(f"{name('hindi', 0)}.m4a\tone\n{name('hindi', 0)}.m4a\ttwo\n")
    with pytest.raises(DataError, match=r"transcription_n2w\.txt, row 2, column 'file': .*twice, with two texts"):
        kathbath(root)
    transcripts.unlink()
    with pytest.raises(DataError, match=r"3 recordings and no transcription_n2w\.txt of hindi, train"):
        kathbath(root)


def test_archives_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    packed = tarred(archives(tmp_path / "k", ["hindi"]), tmp_path / "packed")
    damaged = packed / "train_audio.tar"
    damaged.write_bytes(b"no tar at all" * 100)
    with pytest.raises(DataError, match=r"train_audio\.tar: not a tar archive"):
        kathbath(packed)
    shutil.move(damaged, packed / "train_audio.tar.gz")
    with pytest.raises(DataError, match=r"train_audio\.tar\.gz: a compressed archive"):
        kathbath(packed)


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "streaming"])
def test_a_column_that_the_hub_renamed_is_named(tmp_path: Path, streaming: bool) -> None:
    rows = hub_rows("hindi")
    rows["transcript"] = rows.pop("text")
    parquet(tmp_path / "hub" / "hindi" / "train-00000-of-00001.parquet", rows)
    with pytest.raises(
        DataError, match=r"hub.*hindi/train-.*parquet, column 'text': the column is missing; there are .*transcript"
    ):
        kathbath(tmp_path / "hub", streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "streaming"])
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
