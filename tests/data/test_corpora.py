"""Published corpora, by the tables that ``recipes/corpora`` writes: an epoch of each, map-style and streaming; stable ids; what
is missing or wrong is named."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("datasets")

from data.miniatures import (
    SIGNS,
    TEXTS,
    WIKI,
    archives,
    frames_of,
    hub_copy,
    parquet,
    recording,
    sign_lists,
    signs,
    tarred,
)
from data.published import FOLDER, both, include, kathbath, opened, wiki

from whisper_moe.data.sample import Sample
from whisper_moe.media.languages import FURTHER_LANGUAGES
from whisper_moe.media.languages import LANGUAGES as WHISPERS

KINDS = {
    "kathbath-archives": 6,
    "kathbath-tar": 6,
    "kathbath-hub": 3,
    "include": len(SIGNS["train"]),
    "wiki-translate": 14,
    "wiki-translate-parquet": 14,
    "table": 3,
}
"""Miniature: number of its samples."""


@pytest.fixture(scope="module")
def miniatures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The settings of each."""
    root = tmp_path_factory.mktemp("corpora")
    unpacked = archives(root / "unpacked")
    kathbath.convert(unpacked, root / "a" / "kathbath")
    kathbath.convert(tarred(unpacked, root / "packed"), root / "b" / "kathbath")
    shutil.rmtree(root / "packed")
    include.convert(sign_lists(signs(root / "videos")), root / "include")
    parquet(root / "wiki" / "train-00000-of-00001.parquet", WIKI)
    wiki.convert(str(root / "wiki"), root / "a" / "wiki-translate")
    wiki.convert(str(root / "wiki"), root / "b" / "wiki-translate", parquet=True)
    for number in range(3):
        recording(root / "table" / f"{number}.m4a", "hindi", number)
    lines = [f"{number}.m4a\t{text}\tspeaker-{number}\n" for number, text in enumerate(TEXTS["hindi"])]
    (root / "table" / "transcripts.tsv").write_text("path\ttext\tspeaker\n" + "".join(lines), encoding="utf-8")
    return {
        "kathbath-archives": {"source": str(root / "a" / "kathbath")},
        "kathbath-tar": {"source": str(root / "b" / "kathbath")},
        "kathbath-hub": {"source": str(hub_copy(root / "hub")), "configuration": "odia"},
        "include": {"source": str(root / "include")},
        "wiki-translate": {"source": str(root / "a" / "wiki-translate")},
        "wiki-translate-parquet": {"source": str(root / "b" / "wiki-translate")},
        "table": {"source": str(root / "table" / "transcripts.tsv"), "languages": ["hindi"]},
    }


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
        return
    # A stream does not know the numbers of its rows.
    assert [replace(sample, row=None) for sample in opened(miniatures[kind])] == [
        replace(sample, row=None) for sample in samples
    ]
    for ask in (lambda: len(corpus), lambda: corpus[0]):
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
        "import sys, json; from whisper_moe.data.table import CorpusConfig, open_corpus\n"
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
    assert re.search("^wiki-translate/train/[0-9a-f]{16}/en-hi$", run.stdout, re.MULTILINE)


def test_the_languages_are_known() -> None:
    assert len(wiki.LANGUAGES) == 15 == len(set(wiki.LANGUAGES.values())) and len(kathbath.LANGUAGES) == 12
    assert {*wiki.LANGUAGES.values(), *kathbath.LANGUAGES.values()} <= WHISPERS.keys() | FURTHER_LANGUAGES.keys()


def test_a_mistake_is_one_line_of_the_command(tmp_path: Path) -> None:
    for script, *words in (
        ("kathbath.py", "nowhere", "out", "--splits", "train"),
        ("include.py", "nowhere", "out", "lists"),
        ("wiki_translate.py", str(FOLDER / "README.md"), "out", "--directions", "en>hi"),
    ):
        run = subprocess.run(
            [sys.executable, FOLDER / script, *words], cwd=tmp_path, capture_output=True, text=True, timeout=280
        )
        assert (run.returncode, run.stdout, run.stderr.count("\n")) == (1, "", 1), run.stderr
        assert run.stderr.startswith(f"{script}: {words[0]}: ") and not (tmp_path / "out").exists()
