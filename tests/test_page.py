"""The page of an evaluation: it shows what the report says, needs nothing else, and takes no orders from what it shows."""

from __future__ import annotations

from base64 import b64decode
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

for needed in ("datasets", "rapidfuzz", "markdown_it", "matplotlib", "sacrebleu", "whisper_normalizer"):
    pytest.importorskip(needed, reason="what evaluation needs is an extra")

from evaluate.corpora import table
from evaluate.test_run import EVIL, evaluated, saved, saying

from recipes.report.page import main
from whisper_moe import WhisperMoE


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]


def page_of(folder: Path) -> str:
    main(folder / "out/report.json", folder / "page.html")
    return (folder / "page.html").read_text(encoding="utf-8")


def test_it_needs_nothing_else_and_takes_no_orders_from_what_it_shows(tmp_path: Path, tiny_model: WhisperMoE):
    file = table(tmp_path, domain=[EVIL, "b", "c", "d"])
    evaluated(tmp_path, saved(tiny_model, tmp_path / "m"), file, compare=[saying(tmp_path, file, name="<b>bold")])
    text = page_of(tmp_path)
    page = _Page()
    page.feed(text)
    pictures = [link.removeprefix("data:image/svg+xml;base64,") for link in page.links]
    assert len(pictures) == 5  # by duration, by language, experts at its own margin and padded, latency
    for drawing in map(b64decode, pictures):
        ElementTree.fromstring(drawing)
        assert b"<script" not in drawing and b"<b>" not in drawing
    assert "url(" not in text and "@import" not in text
    assert not {"script", "iframe", "link", "object", "b", "svg"} & set(page.tags)
    assert "&lt;script&gt;alert" in text and "&lt;b&gt;bold" in text


def test_it_names_what_was_left_out_and_draws_the_load_of_several_corpora(tmp_path: Path, tiny_model: WhisperMoE):
    (tmp_path / "birds").mkdir()
    tables = [table(tmp_path), table(tmp_path / "birds").rename(tmp_path / "birds/birds.tsv")]
    (tmp_path / "clip-1.wav").write_bytes(b"RIFF no sound")
    evaluated(tmp_path, saved(tiny_model, tmp_path / "m"), *tables, margin=0.5)
    text = page_of(tmp_path)
    assert "Expert load of m by corpus" in text and "clip-1.wav" in text
