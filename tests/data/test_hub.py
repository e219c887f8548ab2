"""Ordinary data of the Hub and of other toolkits: every form of the same clips gives the same samples, without a map."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from media.recordings import encode, tone

datasets = pytest.importorskip("datasets")

from whisper_moe.data.corpus import Corpus, CorpusConfig
from whisper_moe.data.inspect import Inspection
from whisper_moe.data.sample import DataError
from whisper_moe.data.table import open_corpus

CLIPS = {"a": ("one", "en"), "b": ("दो", "hi"), "c": ("three", "en"), "d": ("ଚାରି", "or")}
SECONDS = {"a": 0.5, "b": 0.75, "c": 1.0, "d": 1.25}


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for number, (name, seconds) in enumerate(SECONDS.items()):
        encode(folder / f"{name}.wav", tone(seconds, level=0.2 + 0.1 * number), 16_000, "pcm_s16le")
    return folder


def rows(clips: Path, sound: str) -> Any:
    """A dataset whose column ``audio`` holds the sounds in this form, beside a path that leads nowhere."""
    cells: list[Any] = []
    for name in CLIPS:
        data = (clips / f"{name}.wav").read_bytes()
        array = (np.frombuffer(data[-round(SECONDS[name] * 32_000) :], "<i2") / 32_768).tolist()
        cells.append(
            {
                "bytes": {"bytes": data, "path": f"{name}.wav"},
                "audio": {"bytes": data, "path": f"{name}.wav"},
                "array": {"array": array, "sampling_rate": 16_000, "path": f"{name}.wav"},
                "plain": data,
                "path": {"bytes": None, "path": str(clips / f"{name}.wav")},
            }[sound]
        )
    found = datasets.Dataset.from_dict(
        {
            "id": list(range(4)),
            "path": [f"/elsewhere/{name}.wav" for name in CLIPS],
            "audio": cells,
            "sentence": [text for text, _ in CLIPS.values()],
            "locale": [code for _, code in CLIPS.values()],
        }
    )
    return found.cast_column("audio", datasets.Audio(decode=False)) if sound == "audio" else found


def parquet_file(clips: Path, to: Path, sound: str = "bytes") -> Path:
    rows(clips, sound).to_parquet(to / "mine.parquet")
    return to / "mine.parquet"


def hub_folder(clips: Path, to: Path, *, sound: str = "audio", where: str = "data") -> Path:
    (to / where).mkdir(parents=True)
    rows(clips, sound).to_parquet(to / where / "train-00000-of-00001.parquet")
    return to


def saved(clips: Path, to: Path, *, splits: bool = False) -> Path:
    found = rows(clips, "audio")
    (datasets.DatasetDict({"train": found, "validation": found.take(1)}) if splits else found).save_to_disk(
        to / "saved"
    )
    return to / "saved"


def common_voice(clips: Path, to: Path) -> Path:
    shutil.copytree(clips, to / "clips")
    columns = "client_id path sentence_id sentence sentence_domain up_votes down_votes age gender accents variant locale segment"
    head = columns.replace(" ", "\t")
    lines = [f"c0\t{name}.wav\ts0\t{text}\t\t2\t0\t\t\t\t\t{code}-IN\t" for name, (text, code) in CLIPS.items()]
    for split, part in (("train", lines), ("dev", lines[:1]), ("validated", lines * 2)):
        (to / f"{split}.tsv").write_text("\n".join([head, *part]) + "\n", encoding="utf-8")
    return to


def nemo(clips: Path, to: Path, *, array: bool = False) -> Path:
    lines = [
        {
            "audio_filepath": str(clips / f"{name}.wav"),
            "offset": 0,
            "duration": SECONDS[name],
            "text": text,
            "lang": code,
        }
        for name, (text, code) in CLIPS.items()
    ]
    written = json.dumps(lines, indent=1) if array else "\n".join(map(json.dumps, lines))
    (to / "train_manifest.json").write_text(written)
    return to


FORMS = {
    "parquet of bytes": parquet_file,
    "parquet of arrays": lambda clips, to: parquet_file(clips, to, "array"),
    "parquet of plain bytes": lambda clips, to: parquet_file(clips, to, "plain"),
    "parquet of paths": lambda clips, to: parquet_file(clips, to, "path"),
    "a folder of the Hub": hub_folder,
    "save_to_disk": saved,
    "save_to_disk of splits": lambda clips, to: saved(clips, to, splits=True),
    "Common Voice": common_voice,
    "NeMo": nemo,
    "a list in JSON": lambda clips, to: nemo(clips, to, array=True),
    "arrow": lambda clips, to: next(saved(clips, to).glob("*.arrow")),
}


def opened(source: Path | str, **settings: Any) -> Corpus:
    return open_corpus(CorpusConfig(kind="table", source=str(source), **settings))


def facts(corpus: Corpus) -> list[tuple[str, str, float]]:
    found = []
    for sample in corpus:
        assert sample.audio is not None and sample.seconds() == pytest.approx(len(sample.audio.read()) / 16_000)
        assert np.abs(sample.audio.read()).max() > 0.05
        found.append((sample.text, sample.language, sample.seconds()))
    return found


EXPECTED = [(text, code, SECONDS[name]) for name, (text, code) in CLIPS.items()]


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "streaming"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_samples(clips: Path, tmp_path: Path, form: str, streaming: bool) -> None:
    source = FORMS[form](clips, tmp_path)
    corpus = opened(source, streaming=streaming)
    assert facts(corpus) == EXPECTED == facts(pickle.loads(pickle.dumps(corpus))) and corpus.left_out == ()
    assert len({sample.id for sample in corpus}) == len(CLIPS)
    if not streaming:
        assert [each.seconds() for each in corpus] == list(SECONDS.values()) and corpus[2].text == "three"
    some = opened(source, streaming=streaming, languages=["en", "or"])
    assert [text for text, _, _ in facts(some)] == ["one", "three", "ଚାରି"]
    assert streaming or some.remarks[-1] == "rows in other languages are not read: 1 in hi"


def test_streamed_sounds_of_one_text_are_different_samples(clips: Path, tmp_path: Path) -> None:
    sounds = [{"bytes": (clips / f"{name}.wav").read_bytes(), "path": None} for name in CLIPS]
    source = tmp_path / "train.parquet"
    datasets.Dataset.from_list([{"audio": sound, "text": "yes", "language": "en"} for sound in sounds]).to_parquet(
        source
    )
    ids = [[sample.id for sample in opened(source, streaming=True)] for _ in range(2)]
    assert len(set(ids[0])) == len(CLIPS) and ids[0] == ids[1]
    (other := tmp_path / "other").mkdir()
    datasets.Dataset.from_list([{"audio": sounds[1], "text": "yes", "language": "en"}]).to_parquet(
        other / "train.parquet"
    )
    assert [sample.id for sample in opened(other / "train.parquet", streaming=True)] == [ids[0][1]], "wherever it is"


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "streaming"])
def test_a_hub_id_is_a_table_with_its_configurations(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    calls: list[tuple[Any, ...]] = []

    def load(source: str, name: str | None, *, split: str, streaming: bool, **options: Any) -> Any:
        calls.append((source, name, split))
        if split != "validation":
            raise ValueError(f"Unknown split {split!r}. Should be one of ['validation'].")
        found = rows(clips, "audio")
        return found.to_iterable_dataset() if streaming else found

    monkeypatch.setattr(datasets, "load_dataset", load)
    corpus = opened("some/speech", configuration="hi_in", split="valid", streaming=streaming)
    assert facts(corpus) == EXPECTED and corpus.name == "speech"
    assert calls == [("some/speech", "hi_in", "valid"), ("some/speech", "hi_in", "validation")]
    with pytest.raises(DataError, match="some/speech: cannot be read: Unknown split 'test'"):
        opened("some/speech", split="test", streaming=streaming)


def test_what_the_hub_says_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise OSError("Dataset is a gated dataset.\nAsk for access.")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match=r"^some/speech: cannot be read: Dataset is a gated dataset\. Ask for"):
        opened("some/speech")


def test_columns_of_any_name_are_named_by_the_corpus(clips: Path, tmp_path: Path) -> None:
    names = {"audio": "clip_1", "sentence": "label", "locale": "tongue", "path": "where"}
    found = rows(clips, "audio").rename_columns(names)
    found = found.class_encode_column("label")
    found.to_parquet(tmp_path / "odd.parquet")
    source, columns = tmp_path / "odd.parquet", {"audio": "clip_1", "text": "label", "language": "tongue"}
    assert facts(opened(source, columns=columns)) == EXPECTED
    guessed = opened(source, columns={"text": "label", "language": "tongue"})
    assert facts(guessed) == EXPECTED and guessed.remarks == (
        "path is the column 'clip_1', the only one that holds sounds",
    )
    with pytest.raises(DataError, match="column 'lable': the column is missing; there are clip_1, id, label"):
        opened(source, columns={"text": "lable", "language": "tongue"})
    with pytest.raises(DataError, match="column 'text': the column is missing"):
        opened(source, columns={"language": "tongue"})
    with pytest.raises(ValueError, match="columns: there is no column 'sound': one of path, text"):
        opened(source, columns={"sound": "clip_1"})


@pytest.mark.parametrize("form", ["tsv", "jsonl"])
def test_of_several_columns_the_one_that_is_taken_is_told(clips: Path, tmp_path: Path, form: str) -> None:
    row = {"wav": str(clips / "a.wav"), "normalized_text": "one", "raw_text": "One.", "lang": "en", "locale": "en-GB"}
    separated = "\t".join(row) + "\n" + "\t".join(row.values()) + "\n"
    (tmp_path / f"t.{form}").write_text(json.dumps(row) if form == "jsonl" else separated)
    corpus = opened(tmp_path / f"t.{form}")
    assert [sample.text for sample in corpus] == ["One."]
    assert corpus.remarks == (
        "text is the column 'raw_text', not 'normalized_text'",
        "language is the column 'locale', not 'lang'",
    )
    other = opened(tmp_path / f"t.{form}", columns={"text": "normalized_text"})
    assert [sample.text for sample in other] == ["one"] and len(other.remarks) == 1
    with pytest.raises(DataError, match="column 'said': the column is missing; there are lang, locale"):
        opened(tmp_path / f"t.{form}", columns={"domain": "said"})


def test_languages_of_rows_that_say_theirs_and_of_others(clips: Path, tmp_path: Path) -> None:
    table = tmp_path / "t.tsv"
    lines = [f"{clips / 'a.wav'}\t{text}\t{code}" for text, code in (("a", "en"), ("b", ""), ("c", "hi"), ("d", "xx"))]
    table.write_text("\n".join(["path\ttext\tlanguage", *lines]) + "\n")
    one = opened(table, languages=["hi"])
    assert [(sample.text, sample.language) for sample in one] == [("b", "hi"), ("c", "hi")]
    assert one.remarks == ("rows in other languages are not read: 1 in en, 1 in xx",) and one.left_out == ()
    two = opened(table, languages=["hi", "en"])
    assert [sample.text for sample in two] == ["a", "c"]
    assert [each.cause.partition("column ")[2][:24] for each in two.left_out] == ["'language': no language:"]
    every = opened(table)
    assert [each.cause.partition("column ")[2][:24] for each in every.left_out] == [
        "'language': no language:",
        "'language': unknown lang",
    ]
    table.write_text("\n".join(["path\ttext\tlanguage", lines[0], lines[2]]) + "\n")
    with pytest.raises(DataError, match=r"no rows in ta; there are en, hi"):
        opened(table, languages=["ta"])


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "streaming"])
def test_a_stored_row_that_is_no_sample_costs_itself(clips: Path, tmp_path: Path, streaming: bool) -> None:
    found = rows(clips, "bytes").to_dict()
    found["sentence"][0], found["audio"][1], found["locale"][3] = (
        "<|0.0|> a",
        {"bytes": b"no sound", "path": None},
        "xx",
    )
    datasets.Dataset.from_dict(found).to_parquet(tmp_path / "t.parquet")
    config = CorpusConfig(kind="table", source=str(tmp_path / "t.parquet"), streaming=streaming)
    (seen := Inspection()).look(config)
    assert seen.samples == 1 and len(seen.of_kind("corrupt")) == 3
    assert streaming or sorted(each.place for each in seen.of_kind("corrupt")) == [
        f"{tmp_path / 't.parquet'}, row {row}" for row in (1, 2, 4)
    ]


def test_what_is_no_such_data_is_said(clips: Path, tmp_path: Path) -> None:
    source = saved(clips, tmp_path, splits=True)
    with pytest.raises(DataError, match="no split 'test'; there are train, validation"):
        opened(source, split="test")
    assert len(opened(source, split="dev")) == 1
    (source / "train" / "state.json").write_text("{")
    with pytest.raises(DataError, match="saved: cannot be read"):
        opened(source)
    with pytest.raises(DataError, match="nowhere: no such file or folder"):
        opened(tmp_path / "nowhere")
