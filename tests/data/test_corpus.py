"""A corpus: its rows go on behind one that is none, headers are read once, and settings that mean nothing are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from media.recordings import encode, tone
from pydantic import ValidationError

from whisper_moe.data.corpus import Corpus, CorpusConfig
from whisper_moe.data.sample import DataError, Sample
from whisper_moe.data.table import open_corpus


def test_headers_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probed: list[str] = []
    seconds = Sample.seconds
    monkeypatch.setattr(Sample, "seconds", lambda sample: probed.append(sample.id) or seconds(sample))
    for number in range(3):
        encode(tmp_path / f"{number}.wav", tone(1.0 + number), 16_000, "pcm_s16le")
    (tmp_path / "corrupt.wav").write_bytes(b"RIFF")
    rows = "".join(f"{name}.wav\tyes\n" for name in (0, 1, 2, "corrupt"))
    (tmp_path / "table.tsv").write_text("path\ttext\n" + rows)
    settings: dict[str, Any] = {"kind": "table", "source": str(tmp_path / "table.tsv"), "languages": ["en"]}
    corpus = open_corpus(CorpusConfig(**settings))
    lengths = corpus.lengths()
    assert lengths[:3].tolist() == [1.0, 2.0, 3.0] and np.isnan(lengths[3])
    assert len(probed) == 4
    encode(tmp_path / "1.wav", tone(5.0), 16_000, "pcm_s16le")
    assert open_corpus(CorpusConfig(**settings)).lengths()[1] == 5.0, "as the files are now"


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


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kind": "kathbath"}, "Input should be 'table'"),
        ({"task": "sing"}, "Input should be 'transcribe', 'translate', 'translate-text' or 'sign'"),
        ({"languages": ["klingon"]}, "unknown language 'klingon'"),
        ({"directions": ["en>hi"]}, "Extra inputs are not permitted"),
        ({"columns": {"sound": "clip"}}, "columns: there is no column 'sound': one of path, text"),
    ],
)
def test_a_configuration_that_means_nothing_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        CorpusConfig(**{"source": "x", **settings})


def test_languages_are_kept_as_codes_and_once() -> None:
    config = CorpusConfig(source="x", languages=["Odia", "hindi", "or"])  # pyright: ignore[reportArgumentType]
    assert config.languages == ("or", "hi")
    assert CorpusConfig(**config.model_dump()) == config
