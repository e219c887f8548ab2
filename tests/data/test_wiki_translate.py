"""Wide rows become pairs: any direction, texts or lists of sentences, the same ids in every order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from data.miniatures import WIKI, parquet

from whisper_moe.data.corpora import COLUMNS, open_corpus
from whisper_moe.data.corpus import Corpus, CorpusConfig
from whisper_moe.data.sample import DataError, Sample


def wiki(source: Path, *directions: str, **settings: Any) -> Corpus:
    if directions:
        settings["directions"] = directions
    settings.setdefault("cache_dir", str(source.parent / "cache"))
    return open_corpus(CorpusConfig(kind="wiki-translate", source=str(source), **settings))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return parquet(tmp_path_factory.mktemp("wiki") / "wiki" / "train.parquet", WIKI)


def pairs(corpus: Corpus) -> set[tuple[str, str, str | None, str]]:
    return {(s.language, s.target_language, s.source_text, s.text) for s in corpus}


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "streaming"])
def test_a_direction_gives_its_pairs_and_none_for_empty_cells(source: Path, streaming: bool) -> None:
    (river, mountain) = wiki(source, "en>hi", streaming=streaming)
    assert river.task == "translate-text" and river.audio is None
    assert pairs([river, mountain]) == {("en", "hi", "A river.", "एक नदी।"), ("en", "hi", "A mountain.", "एक पहाड़।")}  # pyright: ignore[reportArgumentType]
    assert pairs(wiki(source, "ory_Orya>Tamil")) == {
        ("or", "ta", "ଏକ ନଦୀ।", "ஒரு ஆறு."),
        ("or", "ta", "ଏକ ସହର।", "ஒரு நகரம்."),
    }


def test_any_is_every_language_there_is(source: Path) -> None:
    filled = {"en": "111", "hi": "110", "or": "101", "ta": "111"}
    expected = {
        (a, b): sum(x == y == "1" for x, y in zip(filled[a], filled[b], strict=True))
        for a in filled
        for b in filled
        if a != b
    }
    samples = list(wiki(source, "any>any"))
    found = {key: sum((s.language, s.target_language) == key for s in samples) for key in expected}
    assert found == expected and len(samples) == sum(expected.values()) == len({s.id for s in samples})
    assert {(s.language, s.target_language) for s in wiki(source, "any>en")} == {
        ("hi", "en"),
        ("or", "en"),
        ("ta", "en"),
    }
    both = {(s.language, s.target_language) for s in wiki(source)}
    assert both == {(a, b) for a, b in expected if "en" in (a, b)}
    some = {(s.language, s.target_language) for s in wiki(source, "en>any", languages=["hi", "or"])}
    assert some == {("en", "hi"), ("en", "or")}


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


def test_the_columns_are_those_of_the_corpus() -> None:
    from whisper_moe.media.languages import FURTHER_LANGUAGES, LANGUAGES

    assert len(COLUMNS) == 15 == len(set(COLUMNS.values()))
    assert set(COLUMNS.values()) <= LANGUAGES.keys() | FURTHER_LANGUAGES.keys()


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
    (tmp_path / "train.txt").write_text("x")
    with pytest.raises(DataError, match=r"train\.txt: not a file of rows"):
        wiki(tmp_path / "train.txt")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(DataError, match="cannot be read"):
        wiki(tmp_path / "broken.parquet")
