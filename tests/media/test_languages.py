"""Languages by code and name, also those that Whisper has no token for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from whisper_moe.media import languages
from whisper_moe.media.languages import (
    FURTHER_LANGUAGES,
    LANGUAGE_CODES,
    LANGUAGES,
    NewLanguage,
    language_code,
)
from whisper_moe.media.tokenizer import Tokenizer


def test_no_language_is_two() -> None:
    assert not FURTHER_LANGUAGES.keys() & LANGUAGES.keys()
    assert not set(FURTHER_LANGUAGES.values()) & (LANGUAGE_CODES.keys() | LANGUAGES.keys())
    for code, name in FURTHER_LANGUAGES.items():
        assert language_code(name) == language_code(code) == code
        assert all(relative in LANGUAGES for relative in NewLanguage(code=code).relatives)
    assert NewLanguage(code="or").relatives == ("bn", "as")


def test_a_models_own_languages_are_known_by_code_and_by_name() -> None:
    with pytest.raises(ValueError, match="unknown language 'tulu'"):
        language_code("tulu")
    assert language_code("TCY", {"tcy"}) == language_code("Tulu", {"tcy"}, {"tcy": "tulu"}) == "tcy"
    with pytest.raises(ValueError, match=r"unknown language .tulus.: did you mean tulu"):
        language_code("tulus", {"tcy"}, {"tcy": "tulu"})
    assert language_code("konkani", {"gom"}, {"gom": "konkani"}) == "gom", "the model's own word for it comes first"
    assert language_code("hindi", {"x-y"}, {"x-y": "hindi"}) == "hi", "but Whisper's names stay what they are"


TAGS = """
en-US en, pt-BR pt, zh-CN zh, zh_TW zh, zh-Hant zh, zh-Hant-TW zh, EN en, es-419 es, en_US.UTF-8 en, sr_RS@latin sr, hin_Deva hi,
or-IN or, mni-Mtei mni, eng en, hin hi, ger de, deu de, zho zh, cmn-Hans-CN zh, yue-HK yue, nb-NO no, jv jw, iw he, fil-PH tl,
ory or, lao lo, mai mai
"""


@pytest.mark.parametrize(("given", "meant"), [entry.split() for entry in TAGS.split(",")])
def test_a_tag_with_script_and_region_is_its_language(given: str, meant: str) -> None:
    assert language_code(given) == meant
    assert Tokenizer.language_code(SimpleNamespace(languages={}, language_names={}), given) == meant  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "given", ["en-", "en-US-", "xx-US", "eng lish", "en/US", "e-US", "zh-TWN", "-en", "hindi-IN", "enn"]
)
def test_what_is_no_tag_of_a_known_language_is_unknown(given: str) -> None:
    with pytest.raises(ValueError, match=f"unknown language '{given}': "):
        language_code(given)


def test_a_models_own_tag_comes_before_its_language() -> None:
    assert language_code("en-IN", {"en-in"}) == language_code("en_IN", {"en-in"}) == "en-in"
    assert language_code("en-IN") == language_code("en-GB", {"en-in"}) == "en"
    assert language_code("hin", {"hin"}) == "hin"


def test_every_language_has_its_code_of_three_letters() -> None:
    found = {language_code(other) for other in languages._ISO_CODES}  # pyright: ignore[reportPrivateUsage]
    assert found >= LANGUAGES.keys() - {"haw", "yue"} and not languages._ISO_CODES.keys() & LANGUAGES.keys()  # pyright: ignore[reportPrivateUsage]


@pytest.mark.parametrize(
    ("text", "code", "name", "like"),
    [
        ("or", "or", "odia", ()),
        ("OR = Odia ", "or", "odia", ()),
        ("or:like=bn, Assamese", "or", "odia", ("bn", "Assamese")),
        ("tcy=Tulu", "tcy", "tulu", ()),
        ("tcy", "tcy", "tcy", ()),
        ("en-in=indian english:like=en,hi", "en-in", "indian english", ("en", "hi")),
    ],
)
def test_a_new_language_is_given_by_code_name_and_relatives(
    text: str, code: str, name: str, like: tuple[str, ...]
) -> None:
    assert NewLanguage.parse(text) == NewLanguage(code=code, name=name, like=like)


WRONG = {
    "code is of lower-case letters": ["", "o", "odia lang", "<|or|>"],
    "is given as or, or=odia or or=odia:like=bn,as, got": [
        "or=",
        "or=odia:like=",
        "or=odia:like=bn,,as",
        "or=odia:as=bn",
    ],
    "cannot be the name of the language 'or': it is that of 'hi'": ["or=Hindi", "or=hi"],
}


@pytest.mark.parametrize(("said", "text"), [(said, text) for said, texts in WRONG.items() for text in texts])
def test_what_is_no_new_language_is_said(said: str, text: str) -> None:
    with pytest.raises(ValueError, match=said):
        NewLanguage.parse(text)
