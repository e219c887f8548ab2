"""Normalisation: what nobody hears is no error, what somebody hears stays one, and no letter is torn from its marks."""

# ruff: noqa: RUF001 (letters that look like others are what this is about)

from __future__ import annotations

import builtins
import sys
import unicodedata
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whisper_moe.media import normalize as module
from whisper_moe.media.languages import FURTHER_LANGUAGES, LANGUAGES
from whisper_moe.media.normalize import INDIC_SCRIPTS, SCRIPTS, letters_in_script, normalize, scripts_of

BLOCKS = {code: 0x80 * place for place, code in enumerate("hi bn pa gu or ta te kn ml si".split(), start=0x900 // 0x80)}
"""Where the Unicode block of each Indian script begins, by one of its languages."""
OTHERS = [*" .,-()[]0१9aZ।॥", "\u200b", "\u200c", "\u200d", "\ufeff", "\u00a0"]


def of_block(language: str) -> st.SearchStrategy[str]:
    first = BLOCKS[language]
    return st.text(st.sampled_from([chr(code) for code in range(first, first + 0x80)] + OTHERS), max_size=12)


any_indic = st.sampled_from(sorted(BLOCKS)).flatmap(lambda code: st.tuples(st.just(code), of_block(code)))

SAME = [
    ("hi", "\u0958लम", "क\u093cलम", "a nukta letter, as one character and as two"),
    ("hi", "लड़कि\u093c", "लड़क\u093cि", "a nukta typed after the vowel sign"),
    ("hi", "अाम", "आम", "a vowel letter typed as another and a sign"),
    ("hi", "अाॅफिस", "ऑफिस", "in two steps"),
    ("hi", "नमस्ते।", "नमस्ते", "danda"),
    ("hi", "राम॥", "राम", "double danda"),
    ("hi", "१२३", "123", "digits"),
    ("hi", "१,००,०००", "100000", "lakhs"),
    ("hi", "क्\u200dष", "क्ष", "zero-width joiner"),
    ("hi", "क्\u200cष", "क्ष", "zero-width non-joiner"),
    ("hi", "यह\u00a0है", "यह है", "no-break space"),
    ("hi", "\ufeffयह", "यह", "byte order mark"),
    ("hi", "OK है", "ok है", "upper case in mixed speech"),
    ("hi", "[संगीत] नमस्ते", "नमस्ते", "annotation"),
    ("mr", "र्\u200dय", "ऱ्य", "eyelash ra"),
    ("bn", "কো", "ক\u09c7\u09be", "a vowel sign in two parts"),
    ("bn", "উত্\u200dসব", "উৎসব", "khanda ta"),
    ("bn", "অামি", "আমি", "vowel letter"),
    ("bn", "ব\u09dc", "বড\u09bc", "nukta"),
    ("pa", "ੳੁ", "ਉ", "vowel letter"),
    ("gu", "અા", "આ", "vowel letter"),
    ("or", "ଅା", "ଆ", "vowel letter"),
    ("or", "\u0b5c", "ଡ\u0b3c", "nukta"),
    ("ta", "கொ", "க\u0bc6\u0bbe", "a vowel sign in two parts"),
    ("te", "౧౨", "12", "digits"),
    ("te", "ఒౌ", "ఔ", "vowel letter"),
    ("kn", "ಕೋ", "ಕ\u0cc6\u0cc2\u0cd5", "a vowel sign in three parts"),
    ("ml", "അവന്\u200d", "അവൻ", "chillu"),
    ("ml", "എൻറെ", "എന്റെ", "nta"),
    ("ml", "എന്\u200dറെ", "എന്റെ", "nta with a legacy chillu"),
    ("ml", "കൗ", "കൌ", "au, reformed and old"),
    ("ur", "علي", "علی", "Arabic yeh"),
    ("ur", "كتاب", "کتاب", "Arabic kaf"),
    ("ur", "ہے۔", "ہے", "Urdu full stop"),
    ("ur", "اُردُو", "اردو", "short vowels"),
    ("ur", "۱۲", "12", "digits"),
    ("fa", "می\u200cخواهم", "میخواهم", "zero-width non-joiner"),
    ("de", "Straße, bitte!", "straße bitte", "punctuation"),
    ("fr", "e\u0301te\u0301", "été", "accents in two characters"),
    ("en", "Mr. Brown's colour", "mister brown is color", "Whisper's English rules"),
]


@pytest.mark.parametrize(("language", "one", "other", "why"), SAME, ids=[f"{row[0]} {row[3]}" for row in SAME])
def test_what_nobody_hears_is_no_error(language: str, one: str, other: str, why: str):
    assert one != other
    assert normalize(one, language) == normalize(other, language), why


@pytest.mark.parametrize(
    ("language", "one", "other"),
    [
        ("hi", "सड", "सड़"),
        ("hi", "खाना", "ख़ाना"),
        ("hi", "कि", "की"),
        ("hi", "हिंदी", "हिन्दी"),
        ("mr", "दर्या", "दऱ्या"),
        ("ml", "അവൻ", "അവന"),
        ("bn", "বড়", "বড"),
        ("ur", "بہ", "بھ"),
        ("hi", "3.5", "35"),
        ("hi", "1,2", "12"),
    ],
)
def test_what_is_heard_stays_an_error(language: str, one: str, other: str):
    assert normalize(one, language) != normalize(other, language)


def test_marks_stay_with_their_letters_where_whispers_rule_for_other_languages_tears_them_off():
    basic = pytest.importorskip("whisper_normalizer.basic").BasicTextNormalizer()
    assert basic("नमस्ते").split() == ["नमस", "त"]
    assert normalize("नमस्ते", "hi") == "नमस्ते"
    for text, language in (("വണക്കം", "ml"), ("தமிழ்", "ta"), ("বাংলা", "bn"), ("ਪੰਜਾਬੀ", "pa")):
        assert len(basic(text).split()) > 1
        assert normalize(text, language) == text


@given(any_indic)
def test_normal_text_is_normal_and_canonical_equivalents_are_the_same(case: tuple[str, str]):
    language, text = case
    once = normalize(text, language)
    assert normalize(once, language) == once
    assert normalize(unicodedata.normalize("NFD", text), language) == once
    assert unicodedata.is_normalized("NFC", once)


@given(any_indic)
def test_nothing_is_left_that_is_neither_letter_mark_nor_number(case: tuple[str, str]):
    language, text = case
    left = {unicodedata.category(char)[0] for word in normalize(text, language).split() for char in word if char != "."}
    assert left <= set("LMN")


@given(st.text("abcxyzÄÖÜßéèñçøåŁŚ ,.;:!?-'\"0123456789", max_size=20))
def test_latin_text_without_fractions_comes_out_as_by_whispers_rule(text: str):
    basic = pytest.importorskip("whisper_normalizer.basic").BasicTextNormalizer()
    text = module._FRACTION.sub(" ", module._GROUPED.sub("", text))
    assert normalize(text, "de") == basic(text).strip()


@pytest.mark.parametrize(
    ("language", "text", "expected"),
    [
        ("zh", "你好，world 3.5", "你 好 world 3.5"),
        ("ja", "がぎ", "が ぎ"),
        ("ja", "か\u3099", "が"),
        ("th", "เก่ง", "เ ก่ ง"),
        ("my", "မြန်မာ", "မြ န် မာ"),
    ],
)
def test_where_words_are_not_spaced_characters_are_the_words(language: str, text: str, expected: str):
    assert normalize(text, language) == expected


def test_every_language_has_a_script_that_unicode_knows():
    known = {unicodedata.name(chr(code), "").split(" ")[0].split("-")[0] for code in range(0x30000)}
    assert {script for code in LANGUAGES for script in scripts_of(code)} <= known
    assert {script for scripts in SCRIPTS.values() for script in scripts} >= INDIC_SCRIPTS
    assert set(SCRIPTS) <= {*LANGUAGES, *FURTHER_LANGUAGES}


@pytest.mark.parametrize(
    ("language", "text", "expected"),
    [
        ("hi", "नमस्ते", (4, 4)),
        ("hi", "namaste", (0, 7)),
        ("hi", "نمستے", (0, 5)),
        ("ur", "نمستے", (5, 5)),
        ("hi", "OK है", (1, 3)),
        ("hi", "१२ 12 …", (0, 0)),
        ("ta", "தமிழ்", (3, 3)),
        ("ja", "東京タワーへ", (6, 6)),
        ("ko", "한국", (2, 2)),
        ("en", "ＡＢ", (2, 2)),
        ("xx", "abc", (3, 3)),
    ],
)
def test_letters_are_counted_by_their_script(language: str, text: str, expected: tuple[int, int]):
    assert letters_in_script(text, language) == expected


def test_english_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("whisper_normalizer"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    module._english.cache_clear()
    monkeypatch.delitem(sys.modules, "whisper_normalizer.english", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="install whisper-normalizer"):
        normalize("a word", "en")
    assert normalize("ein Wort", "de") == "ein wort"
    module._english.cache_clear()


@pytest.mark.parametrize(
    "language", sorted(set(FURTHER_LANGUAGES) - {"ase", "ins", "sgn"})
)  # signed: written in English
def test_a_further_language_has_its_script(language: str) -> None:
    texts = {"mni": "মৈতৈলোন্", "or": "ଓଡ଼ିଆ", "sat": "ᱥᱟᱱᱛᱟᱲᱤ", "ks": "کٲشُر"}
    text = texts.get(language, "हिन्दी में")
    found, letters = letters_in_script(text, language)
    assert found == letters > 0
    assert letters_in_script("latin", language) == (0, 5)
