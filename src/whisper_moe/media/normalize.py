"""Text made comparable before errors are counted: per script, because what does not matter differs by script.

English goes through Whisper's English rules (arXiv 2212.04356, appendix C; package ``whisper_normalizer``). Whisper's rule for
all other languages replaces every combining mark by a space: नमस्ते becomes नमस त, and a word error rate counts pieces of
words. Here marks stay. What is taken away is what nobody hears:

- canonical equivalents (NFC; NFKC outside the Indian scripts): क़ is one character or क with a nukta. The nukta itself is a
  letter's difference (ड ड़) and stays; it is put before the vowel sign where it was typed after it;
- zero-width joiners and other invisible characters, after the letters that were once written with them (Malayalam chillus,
  Bengali khanda ta, Marathi eyelash ra) became the letters they are;
- vowel letters typed as another letter and a sign, which look the same (Unicode 16.0, chapters 12 and 13, "do not use");
- digits of any script, which become 0 to 9; commas that group them, in thousands or in lakhs. Numbers are not spelled out;
- punctuation, dandas included, and symbols; text in brackets, which Whisper's rules take for annotations; upper case;
- Arabic letters for which Urdu and Persian have their own; vowel points where writing leaves them out.

What stays an error: anusvara against a nasal letter (हिंदी हिन्दी), and other spellings that are both in use.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping
from functools import lru_cache

from whisper_moe.media.languages import UNSPACED_LANGUAGES

_SCRIPT_TABLE = """
DEVANAGARI brx doi hi kok ks mai mr ne sa sat, BENGALI as bn mni, MEETEI mni, OL sat,
GURMUKHI pa, GUJARATI gu, ORIYA or, TAMIL ta, TELUGU te, KANNADA kn kok, MALAYALAM ml,
SINHALA si, ARABIC ar fa ks ps sd ur, HEBREW he yi, CYRILLIC ba be bg kk mk mn ru sr tg tt uk uz, GREEK el, ARMENIAN hy,
GEORGIAN ka, ETHIOPIC am, THAI th, LAO lo, KHMER km, MYANMAR my, TIBETAN bo, CJK zh yue ja ko, HIRAGANA ja, KATAKANA ja,
HANGUL ko, LATIN sr uz
"""
INDIC_SCRIPTS = frozenset("DEVANAGARI BENGALI GURMUKHI GUJARATI ORIYA TAMIL TELUGU KANNADA MALAYALAM SINHALA".split())
_ROWS = [entry.split() for entry in _SCRIPT_TABLE.split(",")]
SCRIPTS: Mapping[str, frozenset[str]] = {
    language: frozenset(script for script, *others in _ROWS if language in others)
    for _, *languages in _ROWS
    for language in languages
}
"""The scripts a language is written in, as Unicode's character names begin; a language that is not listed: LATIN."""

_ANNOTATION = re.compile(r"\[[^\]]*\]|\([^)]*\)|<[^>]*>")
_TOKEN = re.compile(r"<\|[^<>|]*\|>")
_GROUPED = re.compile(r"(?<!\d)\d{1,3}(?:,\d{2,3})*,\d{3}(?!\d)")
"""A number with commas in it: 10,000 or 1,00,000; the last group has three digits."""
_FRACTION = re.compile(r"(?<=\d)[.\u066b](?=\d)")
_KEPT_POINT = "\ue000"
"""Stands for a decimal point while punctuation is taken away; of the private use area, so no text has it."""
_INVISIBLE = re.compile(
    "[\u00ad\u034f\u180e\u200c-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufe00-\ufe0f\ufeff\ue000]"
)
_ZERO_WIDTH_SPACE = "\u200b"
_VOWEL_POINTS = re.compile(
    "[\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7\u0610-\u061a\u0640\u064b-\u0652\u0670\u06d6-\u06ed]"
)
_POINTED = frozenset("ar fa he ps sd ur yi".split())
_PERSIAN_LETTERS = str.maketrans("يىك", "ییک")
_URDU_LETTERS = str.maketrans("يىكهة", "ییکہۃ")

_JOINED_TABLE = """
0930+094d+200d=0931+094d 09a4+09cd+200d=09ce 0d23+0d4d+200d=0d7a 0d28+0d4d+200d=0d7b 0d30+0d4d+200d=0d7c 0d31+0d4d+200d=0d7c
0d32+0d4d+200d=0d7d 0d33+0d4d+200d=0d7e 0d15+0d4d+200d=0d7f
"""
"""Letters that were written as another with a virama and a zero-width joiner: eyelash ra, khanda ta, chillus (Unicode 5.1)."""
_LOOK_ALIKES_TABLE = """
0905+093e=0906 0905+0945=0972 0905+0946=0904 0905+0949=0911 0905+094a=0912 0905+094b=0913 0905+094c=0914 0905+093a=0973
0905+093b=0974 0905+0956=0976 0905+0957=0977 0909+0941=090a 090f+0945=090d 090f+0946=090e 090f+0947=0910 0906+0945=0911
0906+0946=0912 0906+0947=0913 0906+0948=0914 0906+093a=0974
0985+09be=0986 098b+09c3=09e0 098c+09e2=09e1
0a05+0a3e=0a06 0a72+0a3f=0a07 0a72+0a40=0a08 0a73+0a41=0a09 0a73+0a42=0a0a 0a72+0a47=0a0f 0a05+0a48=0a10 0a73+0a4b=0a13
0a05+0a4c=0a14
0a85+0abe=0a86 0a85+0ac5=0a8d 0a85+0ac7=0a8f 0a85+0ac8=0a90 0a85+0ac9=0a91 0a85+0acb=0a93 0a85+0acc=0a94 0ac5+0abe=0ac9
0b05+0b3e=0b06 0b0f+0b57=0b10 0b13+0b57=0b14
0b85+0bc2=0b86
0c12+0c55=0c13 0c12+0c4c=0c14 0c3f+0c55=0c40 0c46+0c55=0c47 0c4a+0c55=0c4b
0c89+0cbe=0c8a 0c92+0ccc=0c94 0c8b+0cbe=0ce0
0d07+0d57=0d08 0d09+0d57=0d0a 0d0e+0d46=0d10 0d12+0d3e=0d13 0d12+0d57=0d14 0d7b+0d31=0d28+0d4d+0d31 0d7b+0d4d+0d31=0d28+0d4d+0d31
"""
"""The last two: the three ways to write the Malayalam cluster nta."""


def _spelled(codes: str) -> str:
    return "".join(chr(int(code, 16)) for code in codes.split("+"))


def _letters(table: str) -> dict[str, str]:
    """What is typed → what is meant."""
    return {_spelled(typed): _spelled(meant) for typed, meant in (pair.split("=") for pair in table.split())}


_MALAYALAM_AU = re.compile("(?<=[\u0d15-\u0d3a])\u0d57")
"""The reformed spelling of the vowel sign au."""
_LATE_NUKTA = re.compile(
    "([\u093e-\u094c\u09be-\u09cc\u0a3e-\u0a4c\u0abe-\u0acc\u0b3e-\u0b4c]+)([\u093c\u09bc\u0a3c\u0abc\u0b3c])"
)


def _replacing(table: Mapping[str, str]) -> Callable[[str], str]:
    pattern = re.compile("|".join(map(re.escape, sorted(table, key=len, reverse=True))))
    return lambda text: pattern.sub(lambda match: table[match[0]], text)


_with_joined_letters = _replacing(_letters(_JOINED_TABLE))
_with_vowel_letters = _replacing(_letters(_LOOK_ALIKES_TABLE))


def normalize(text: str, language: str) -> str:
    """``text`` as it is compared with another in the same language (a code: ``hi``): words with one space between them.

    Where words are not spaced (Chinese, Thai …) every character, with its marks, is a word, as in Whisper's evaluation.
    Raises ``ImportError`` with what to install, for English without ``whisper_normalizer``.
    """
    text = spoken(text)
    if language == "en":
        return _english()(text)
    indic = bool(scripts_of(language) & INDIC_SCRIPTS)
    text = unicodedata.normalize("NFC" if indic else "NFKC", text)
    if indic:
        text = _with_joined_letters(text)
    text = _visible_words(_letters_of(text, language))
    if indic:
        text = _settled(text)
    text = unicodedata.normalize("NFC", text)
    return _characters_apart(text) if language in UNSPACED_LANGUAGES else text


def spoken(text: str) -> str:
    """``text`` without Whisper's tokens, such as timestamps, each of which stood between two words."""
    return " ".join(_TOKEN.sub(" ", text).split()) if "<|" in text else text


def scripts_of(language: str) -> frozenset[str]:
    """The scripts that a language is written in."""
    return SCRIPTS.get(language, frozenset({"LATIN"}))


def letters_in_script(text: str, language: str) -> tuple[int, int]:
    """How many letters of ``text`` are of the script that the language is written in, and how many letters there are.

    Digits, marks and punctuation belong to no script here. A transcript in the wrong script has none: the usual failure of
    a multilingual model in a language that it has heard little of.
    """
    found = [name for char in unicodedata.normalize("NFKC", spoken(text)) if (name := script(char))]
    wanted = scripts_of(language)
    return sum(name in wanted for name in found), len(found)


@lru_cache(maxsize=4096)
def script(char: str) -> str | None:
    """The script of a letter; None for what is not one, or is of no script in particular (ʰ)."""
    if not unicodedata.category(char).startswith("L"):
        return None
    first = re.split("[ -]", unicodedata.name(char, ""))[0]
    return None if first in ("", "MODIFIER") else first


@lru_cache(maxsize=1)
def _english() -> Callable[[str], str]:
    try:
        from whisper_normalizer.english import EnglishTextNormalizer
    except ImportError:
        raise ImportError(
            "English is compared by Whisper's rules: install whisper-normalizer (pip install 'whisper-moe[evaluate]')"
        ) from None
    return EnglishTextNormalizer()


def _letters_of(text: str, language: str) -> str:
    """Letters that only the keyboard makes different."""
    if language in _POINTED:
        text = _VOWEL_POINTS.sub("", text)
    if language in ("ur", "fa"):
        text = text.translate(_URDU_LETTERS if language == "ur" else _PERSIAN_LETTERS)
    return text


def _settled(text: str) -> str:
    """Marks in their order and letters that look alike made the same, until nothing changes: one may bring about another."""
    before = None
    while before != text:
        before = text
        text = unicodedata.normalize("NFC", _LATE_NUKTA.sub(r"\2\1", text))
        text = _MALAYALAM_AU.sub("\u0d4c", _with_vowel_letters(text))
    return text


def _visible_words(text: str) -> str:
    """Lower case, digits 0 to 9; no punctuation, symbol, annotation or invisible character."""
    text = _INVISIBLE.sub("", _ANNOTATION.sub("", text.replace(_ZERO_WIDTH_SPACE, " "))).lower()
    text = "".join(map(_plain_digit, text))
    text = _GROUPED.sub(lambda number: number[0].replace(",", ""), text.replace("\u066c", ","))
    text = _FRACTION.sub(_KEPT_POINT, text)
    text = "".join(" " if unicodedata.category(char)[0] in "PSZC" and char != _KEPT_POINT else char for char in text)
    return " ".join(text.replace(_KEPT_POINT, ".").split())


@lru_cache(maxsize=4096)
def _plain_digit(char: str) -> str:
    value = unicodedata.decimal(char, None)
    return char if value is None else str(value)


def _characters_apart(text: str) -> str:
    """Each character with the marks that follow it, spaced; words of Latin letters and numbers stay whole."""
    units: list[str] = []
    for word in text.split():
        joins = False
        for place, char in enumerate(word):
            plain, mark = char.isascii(), unicodedata.category(char).startswith("M")
            if place and (mark or (plain and joins)):
                units[-1] += char
            else:
                units.append(char)
            joins = plain or (mark and joins)
    return " ".join(units)
