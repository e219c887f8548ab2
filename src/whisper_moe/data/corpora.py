"""Which corpora there are: each is opened by a function of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

from whisper_moe.data.corpus import Corpus, CorpusConfig, Kind
from whisper_moe.data.include import open_include
from whisper_moe.data.kathbath import LANGUAGES, TRANSCRIPTS, open_kathbath
from whisper_moe.data.table import open_table
from whisper_moe.data.wiki_translate import open_wiki_translate

_OPENERS: dict[Kind, Callable[[CorpusConfig], Corpus]] = {
    "kathbath": open_kathbath,
    "include": open_include,
    "wiki-translate": open_wiki_translate,
    "table": open_table,
}


def open_corpus(config: CorpusConfig) -> Corpus:
    """Open what a recipe names. Raises :class:`DataError` for a corpus that cannot be read as it says."""
    corpus = _OPENERS[config.kind](config)
    return corpus if config.limit is None else replace(corpus, dataset=corpus.dataset.take(config.limit))


def kind_of(source: str) -> Kind:
    """By the Hub id, or by what lies in the folder."""
    path, plain = Path(source), source.lower()
    if path.is_file():
        return "table"
    if not path.is_dir():
        return next((kind for kind in get_args(Kind) if plain.endswith(f"/{kind}")), "table")
    if any(path.rglob("include*_train.txt")) or any(path.rglob("include*_test.txt")):
        return "include"
    if any(path.rglob(TRANSCRIPTS)) or any((path / name).is_dir() for name in LANGUAGES):
        return "kathbath"
    return "table"
