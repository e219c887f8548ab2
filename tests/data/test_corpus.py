"""A corpus: its rows go on behind one that is none, all are looked at once, and settings that mean nothing are refused."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from whisper_moe.data.corpus import Corpus, CorpusConfig
from whisper_moe.data.sample import DataError, Sample, Skipped, looked_at


def test_rows_are_looked_at_once_and_keep_their_order() -> None:
    rows, looked = [Skipped(id=str(number), cause="") for number in range(300)], list[str]()

    def look(row: Sample | Skipped) -> str:
        looked.append(row.id)
        return row.id

    assert list(looked_at(iter(rows), look)) == [(row, row.id) for row in rows]
    assert sorted(looked) == sorted(row.id for row in rows)


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
