"""The scripts of ``recipes/corpora``, and the tables that they write, opened."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from whisper_moe.data.corpus import Corpus, CorpusConfig
from whisper_moe.data.table import open_corpus

FOLDER = Path(__file__).parents[2] / "recipes" / "corpora"
sys.path.insert(0, str(FOLDER))
formats, kathbath, include, wiki = map(import_module, ("formats", "kathbath", "include", "wiki_translate"))
sys.path.remove(str(FOLDER))
both = pytest.mark.parametrize("streaming", [False, True], ids=["map", "streaming"])


def opened(settings: dict[str, Any], **more: Any) -> Corpus:
    return open_corpus(CorpusConfig(**settings, **more))
