"""Pieces: every text comes back, the longest piece wins, control tokens are never read from text."""

from __future__ import annotations

import pytest
from generate.tiny import tiny_tokenizer

from whisper_moe.config_aside import TEXT
from whisper_moe.media.tokenizer import Pieces, shortened

TOKENS = (TEXT, " ना", " नाम", "म", "े", "रा", " है", "।")


@pytest.fixture(scope="module")
def pieces() -> Pieces:
    return Pieces(tiny_tokenizer(), TOKENS, first=5_000)


@pytest.mark.parametrize(
    "text", ["", " मेरा नाम है।", "Firefox 3.5 नाम", "  नाम\tab ", "<|text|> नाम <|en|>", "नामनाम 😀 ő"]
)
def test_every_text_comes_back(pieces: Pieces, text: str) -> None:
    assert pieces.decode(pieces.encode(text)) == text


def test_the_longest_piece_wins(pieces: Pieces) -> None:
    assert pieces.encode(" नाम") == [pieces.ids[" नाम"]]
    assert pieces.encode(" नाम है") == [pieces.ids[" नाम"], pieces.ids[" है"]]


def test_control_tokens_are_not_read_from_text_nor_written(pieces: Pieces) -> None:
    assert pieces.ids[TEXT] not in pieces.encode(f"{TEXT} नाम")
    assert pieces.decode([pieces.ids[TEXT], pieces.ids["म"], pieces.tokenizer.eot]) == "म"
    assert pieces.control == {5_000}


def test_a_source_says_its_language_and_a_prompt_the_other(pieces: Pieces) -> None:
    tokenizer = pieces.tokenizer
    source = pieces.source(" नाम ", "hi")
    assert source == [tokenizer.languages["hi"], pieces.ids[" नाम"], tokenizer.eot]
    assert pieces.opening("en") == [tokenizer.sot, tokenizer.languages["en"], 5_000, tokenizer.no_timestamps]


def test_a_long_sentence_is_cut_at_the_comma_nearest_to_its_middle_else_between_words() -> None:
    def cut(sentence: str) -> list[str]:
        return shortened(sentence, lambda part: len(part) <= 12)

    assert cut("one, two three, four five six") == ["one,", "two three,", "four", "five six"]
    assert list(map(len, cut("x" * 30))) == [7, 8, 7, 8]
    assert cut("short, this") == ["short, this"] and cut("") == []
