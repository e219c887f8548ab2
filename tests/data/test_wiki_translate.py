"""wiki-translate by its tables: directions, sentences, and what cannot be paired."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datasets")

from data.miniatures import (
    WIKI,
    parquet,
)
from data.published import both, formats, wiki

from whisper_moe.data.corpus import Corpus, CorpusConfig
from whisper_moe.data.sample import DataError, Sample, Skipped, items
from whisper_moe.data.table import open_corpus


def translated(source: Path, out: Path, *directions: str, **asked: Any) -> Corpus:
    """By a table of parquet, where a ``streaming`` corpus is asked for."""
    streaming = asked.pop("streaming", False)
    wiki.convert(str(source), out, directions or wiki.DIRECTIONS, parquet=streaming, **asked)
    file = out / ("train.parquet" if streaming else "train.tsv")
    return open_corpus(CorpusConfig(source=str(file), name="wiki-translate", streaming=streaming))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return parquet(tmp_path_factory.mktemp("wiki") / "wiki" / "train.parquet", WIKI)


def pairs(corpus: Corpus) -> set[tuple[str, str, str | None, str]]:
    return {(s.language, s.target_language, s.source_text, s.text) for s in corpus}


@both
def test_a_direction_gives_its_pairs_and_none_for_empty_cells(source: Path, tmp_path: Path, streaming: bool) -> None:
    (river, mountain) = translated(source, tmp_path / "1", "en>hi", streaming=streaming)
    assert river.task == "translate-text" and river.audio is None
    assert pairs([river, mountain]) == {("en", "hi", "A river.", "एक नदी।"), ("en", "hi", "A mountain.", "एक पहाड़।")}  # pyright: ignore[reportArgumentType]
    assert pairs(translated(source, tmp_path / "2", "ory_Orya>Tamil", streaming=streaming)) == {
        ("or", "ta", "ଏକ ନଦୀ।", "ஒரு ஆறு."),
        ("or", "ta", "ଏକ ସହର।", "ஒரு நகரம்."),
    }


def test_any_is_every_language_there_is(source: Path, tmp_path: Path) -> None:
    filled = {"en": {1, 2, 3}, "hi": {1, 2}, "or": {1, 3}, "ta": {1, 2, 3}}
    expected = {(a, b): len(filled[a] & filled[b]) for a in filled for b in filled if a != b}

    def found(*directions: str, **asked: Any) -> Counter[tuple[str, str]]:
        samples = list(translated(source, tmp_path, *directions, **asked))
        assert len({sample.id for sample in samples}) == len(samples)
        return Counter((s.language, s.target_language) for s in samples)

    assert found("any>any") == expected and found("any>any", limit=3).total() == 3
    assert set(found("any>en")) == {("hi", "en"), ("or", "en"), ("ta", "en")}
    assert set(found()) == {pair for pair in expected if "en" in pair}
    assert set(found("en>any", languages=["hi", "or"])) == {("en", "hi"), ("en", "or")}


def test_lists_are_paired_sentence_by_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {
        "doc_id": ["d1", "d2", "d3", "d4"],
        "eng_Latn": [["One.", "Two.", " "], ["Three."], ["Four.", "Five."], None],
        "hin_Deva": [["एक।", None, "तीन।"], ["तीन।"], ["चार।"], ["पाँच।"]],
    }
    file = parquet(tmp_path / "lists.parquet", rows)
    for streaming in (False, True):
        corpus = translated(file, tmp_path / "out", "en>hi", streaming=streaming)
        assert capsys.readouterr().out == "en>hi: 2 pairs, and 1 that cannot be made\n"
        found = list(items(corpus))
        assert [(s.source_text, s.text) for s in found if isinstance(s, Sample)] == [
            ("One.", "एक।"),
            ("Three.", "तीन।"),
        ]
        (left,) = [item for item in (*found, *corpus.left_out) if isinstance(item, Skipped)]
        assert left.corrupt and str(left).endswith("column 'text': no text")
    row = (tmp_path / "out" / "train.tsv").read_text("utf-8").splitlines()[3].split("\t")
    assert row[-2:] == ["d3", "2 sentences against 1: they cannot be paired"]


def test_ids_come_from_what_is_said_not_from_where_it_stands(source: Path, tmp_path: Path) -> None:
    backwards = parquet(tmp_path / "train.parquet", {name: cells[::-1] for name, cells in WIKI.items()})

    def by_id(file: Path) -> dict[str, Sample]:
        corpus = translated(file, tmp_path / file.parent.name, "any>any")
        return {sample.id: replace(sample, row=None) for sample in corpus}

    assert by_id(source) == by_id(backwards)


def test_json_lines_and_folders_are_read_too(source: Path, tmp_path: Path) -> None:
    rows = [dict(zip(WIKI, cells, strict=True)) for cells in zip(*WIKI.values(), strict=True)]
    (tmp_path / "wiki").mkdir()
    (tmp_path / "wiki" / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    wanted = list(translated(source, tmp_path / "out", "any>any"))
    for place in (tmp_path / "wiki", tmp_path / "wiki" / "pairs.jsonl"):
        assert list(translated(place, tmp_path / "out", "any>any")) == wanted
    with pytest.raises(DataError, match=r"no files .* of the split 'test'"):
        wiki.convert(str(tmp_path / "wiki"), tmp_path / "out", split="test")


@pytest.mark.parametrize(
    ("directions", "said"),
    [
        (["en-hi"], "'en-hi' is no direction"),
        (["en>klingon"], "unknown language 'klingon'"),
        (["en>ml"], "no column for 'ml'; there are en, hi, ta, or"),
        (["en>en"], "no two languages"),
    ],
)
def test_directions_that_cannot_be_are_refused(source: Path, tmp_path: Path, directions: list[str], said: str) -> None:
    with pytest.raises(DataError, match=f"column 'directions': {said}"):
        wiki.convert(str(source), tmp_path / "out", directions)


def test_cells_of_another_kind_are_named(tmp_path: Path) -> None:
    rows = {"doc_id": [7, 8], "eng_Latn": [3.5, None], "hin_Deva": ["तीन।", "चार।"], "tam_Taml": ["மூன்று.", "நான்கு."]}
    file = parquet(tmp_path / "train.parquet", rows)
    wiki.convert(str(file), tmp_path / "out", ["en>hi", "hi>ta"])
    lines = (tmp_path / "out" / "train.tsv").read_text("utf-8").splitlines()
    assert lines[1].split("\t")[-2:] == ["7", "a float where a text or a list of texts is expected"]
    long = parquet(tmp_path / "long.parquet", {"hin_Deva": ["न" * 200_000, "एक।"], "tam_Taml": ["ஒன்று.", "ஒன்று."]})
    corpus = translated(long, tmp_path / "long", "hi>ta")
    assert [sample.text for sample in corpus] == ["ஒன்று."] and len(corpus.left_out) == 1
    for other, said in (("train.txt", "not a file of rows"), ("broken.parquet", "cannot be read")):
        (tmp_path / other).write_bytes(b"PAR1 no more")
        with pytest.raises(DataError, match=f"{other}: {said}"):
            wiki.convert(str(tmp_path / other), tmp_path / "other")


def test_a_table_stays_as_it_is_until_the_new_one_is_whole(source: Path, tmp_path: Path) -> None:
    before = list(translated(source, tmp_path / "out", "en>hi"))
    broken = parquet(tmp_path / "b.parquet", {"eng_Latn": [["a"]], "hin_Deva": [["b", "c"]]})
    with pytest.raises(DataError, match=r"b\.parquet: no pairs of en>hi, and 1 that cannot be made"):
        wiki.convert(str(broken), tmp_path / "out", ["en>hi"])
    with pytest.raises(DataError, match=r"train\.tsv, row 2, column 'b': 'x\\ty' would be two cells"):
        formats.write(tmp_path / "out" / "train.tsv", [{"a": "x", "b": "x\ty"}], ("a", "b"))
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["train.tsv"]
    assert list(open_corpus(CorpusConfig(source=str(tmp_path / "out"), name="wiki-translate"))) == before
