"""Corpora through the public loader: an epoch of each, map-style and streaming; stable ids; what a configuration refuses."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data.miniatures import SIGNS, TEXTS, WIKI, archives, hub_copy, parquet, recording, sign_lists, signs, tarred
from media.recordings import encode, tone
from pydantic import ValidationError

from whisper_moe.data.corpora import open_corpus
from whisper_moe.data.corpus import Corpus, CorpusConfig
from whisper_moe.data.sample import DataError, Sample
from whisper_moe.media.video import load_frames

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
    cache = {"cache_dir": str(root / "cache")}
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
        "kathbath-hub": {"kind": "kathbath", "source": str(hub_copy(root / "hub")), **cache},
        "include": {"kind": "include", "source": str(root / "include")},
        "wiki-translate": {"kind": "wiki-translate", "source": str(root / "wiki"), **cache},
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
        return len(load_frames(sample.video, rate=25)) / 25
    assert sample.source_text
    return 0.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("streaming", [False, True], ids=["map", "streaming"])
def test_an_epoch_reads_every_sample_once(miniatures: dict[str, dict[str, Any]], kind: str, streaming: bool) -> None:
    corpus = opened(miniatures[kind], streaming=streaming)
    samples = list(corpus)
    assert len({sample.id for sample in samples}) == len(samples) == KINDS[kind]
    seconds = [read(sample) for sample in samples]
    assert [sample.seconds() for sample in samples] == pytest.approx(seconds, abs=0.15)
    assert corpus.streaming == streaming and corpus.left_out == ()


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_gives_what_the_index_gives(miniatures: dict[str, dict[str, Any]], kind: str) -> None:
    corpus, stream = opened(miniatures[kind]), opened(miniatures[kind], streaming=True)
    by_index = [corpus[index] for index in range(len(corpus))]
    assert list(stream) == by_index == list(corpus)
    assert list(stream) == by_index, "a second epoch"


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
    import json

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


@pytest.mark.parametrize("kind", KINDS)
def test_a_corpus_goes_to_loader_workers(miniatures: dict[str, dict[str, Any]], kind: str) -> None:
    for streaming in (False, True):
        corpus = opened(miniatures[kind], streaming=streaming)
        assert list(pickle.loads(pickle.dumps(corpus))) == list(corpus)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("streaming", [False, True], ids=["map", "streaming"])
def test_the_limit_takes_the_first_samples(miniatures: dict[str, dict[str, Any]], kind: str, streaming: bool) -> None:
    everything = list(opened(miniatures[kind], streaming=streaming))
    assert list(opened(miniatures[kind], streaming=streaming, limit=2)) == everything[:2]
    assert list(opened(miniatures[kind], streaming=streaming, limit=99)) == everything


def test_a_stream_says_that_it_has_no_length(miniatures: dict[str, dict[str, Any]]) -> None:
    stream = opened(miniatures["table"], streaming=True)
    for ask in (lambda: len(stream), lambda: stream[0], stream.lengths):
        with pytest.raises(TypeError, match="table is streamed"):
            ask()


# Lengths.


@pytest.mark.parametrize("kind", KINDS)
def test_lengths_are_those_of_the_decoded_samples(miniatures: dict[str, dict[str, Any]], kind: str) -> None:
    corpus = opened(miniatures[kind])
    lengths = corpus.lengths()
    assert lengths.dtype == np.float32 and lengths.shape == (len(corpus),)
    assert lengths == pytest.approx([read(sample) for sample in corpus], abs=0.15)
    assert (lengths > 0.1).all() == (kind != "wiki-translate")


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


def test_headers_are_read_once_as_long_as_the_files_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("whisper_moe.data.corpus.REMEMBERED_FROM", 2)
    probed: list[str] = []
    seconds = Sample.seconds
    monkeypatch.setattr(Sample, "seconds", lambda sample: probed.append(sample.id) or seconds(sample))
    for number in range(3):
        encode(tmp_path / f"{number}.wav", tone(1.0 + number), 16_000, "pcm_s16le")
    (tmp_path / "corrupt.wav").write_bytes(b"RIFF")
    rows = "".join(f"{name}.wav\tyes\n" for name in (0, 1, 2, "corrupt"))
    (tmp_path / "table.tsv").write_text("path\ttext\n" + rows)
    settings = {"kind": "table", "source": str(tmp_path / "table.tsv"), "languages": ["en"]}

    corpus = opened(settings)
    for lengths in (corpus.lengths(), corpus.lengths(), opened(settings).lengths()):
        assert lengths[:3].tolist() == [1.0, 2.0, 3.0] and np.isnan(lengths[3])
    assert len(probed) == 4
    encode(tmp_path / "1.wav", tone(5.0), 16_000, "pcm_s16le")
    assert opened(settings).lengths()[1] == 5.0
    assert len(probed) == 8


# Rows that are no samples.


def test_an_iterator_goes_on_behind_a_row_that_is_no_sample() -> None:
    def sample(row: dict[str, Any]) -> Sample:
        if row["n"] == 1:
            raise DataError("file", "broken", row=2)
        return Sample(id=str(row["n"]), task="transcribe", text="x", language="en", target_language="en")

    samples = iter(Corpus("mine", [{"n": n} for n in range(3)], sample))  # pyright: ignore[reportArgumentType]
    assert next(samples).id == "0"
    with pytest.raises(DataError, match="file, row 2: broken"):
        next(samples)
    assert [sample.id for sample in samples] == ["2"]


# Configuration.

TABLE: dict[str, Any] = {"kind": "table", "source": "x.tsv"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kind": "librispeech"}, "kathbath"),
        ({"kind": "kathbath", "colour": "red"}, "Extra inputs"),
        ({"kind": "kathbath", "task": "sign"}, "kathbath has the task transcribe, not sign"),
        ({"kind": "kathbath", "languages": ["klingon"]}, "unknown language 'klingon'"),
        ({"kind": "kathbath", "columns": ["path"]}, "columns is a setting of table"),
        ({"kind": "kathbath", "include_50": True}, "include_50 is a setting of include"),
        ({"kind": "table", "directions": ["en>hi"]}, "directions is a setting of wiki-translate"),
        ({"kind": "table", "columns": {"sound": "clip"}}, "columns: there is no column 'sound': one of path, text"),
        ({"kind": "include", "languages": ["hi"]}, "Indian Sign Language"),
        ({"kind": "table", "limit": 0}, "greater than or equal to 1"),
        ({"kind": "table", "limit": "5"}, "valid integer"),
        ({"kind": "table", "weight": float("nan")}, "finite"),
        ({"kind": "table", "weight": 0.0}, "greater than 0"),
        ({"kind": "table", "streaming": "yes"}, "boolean"),
        ({"kind": "table", "source": ""}, "at least 1 character"),
    ],
)
def test_a_configuration_that_means_nothing_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        CorpusConfig(**{"source": "x", **settings})


def test_languages_are_kept_as_codes_and_once() -> None:
    config = CorpusConfig(kind="kathbath", source="x", languages=["Odia", "hindi", "or"])  # pyright: ignore[reportArgumentType]
    assert config.languages == ("or", "hi")
    assert CorpusConfig(**config.model_dump()) == config
    with pytest.raises(ValidationError, match="frozen"):
        config.limit = 3
