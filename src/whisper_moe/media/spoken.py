"""Written text as it is read aloud, in English and Hindi: numbers, dates, times, money, units, abbreviations, addresses, emoji.

Numbers are spelled by Unicode's own rules (CLDR's rule-based number formats, package ``unicode-rbnf``). Text that says nothing
of how it is read is left as it is; a control token of Whisper's is text like any other.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from whisper_moe.media.normalize import INDIC_SCRIPTS, script

SPOKEN = ("en", "hi")
_TELEPHONE, _SAID_WHOLE = 9, 12
"""Digits without a comma, and digits with some, that are said one by one."""
_MONTHS = {
    "en": "January February March April May June July August September October November December".split(),
    "hi": "जनवरी फ़रवरी मार्च अप्रैल मई जून जुलाई अगस्त सितंबर अक्टूबर नवंबर दिसंबर".split(),
}
_SIGNS_TABLE = """
% percent प्रतिशत, & and और, @ at ऐट, + plus प्लस, = equals बराबर, # number नंबर, / slash स्लैश, ° degrees डिग्री,
₹ rupees रुपये, $ dollars डॉलर, € euros यूरो, £ pounds पाउंड, × times गुणा, ÷ divided_by भाग, < less_than से_कम,
> greater_than से_अधिक, ~ about लगभग, _ underscore अंडरस्कोर, \\ backslash बैकस्लैश, * star स्टार, ^ to_the_power_of की_घात,
| bar बार, → to से
"""
_UNITS_TABLE = """
km kilometers किलोमीटर, kg kilograms किलोग्राम, cm centimeters सेंटीमीटर, mm millimeters मिलीमीटर, mg milligrams मिलीग्राम,
ml milliliters मिलीलीटर, kb kilobytes किलोबाइट, mb megabytes मेगाबाइट, gb gigabytes गीगाबाइट, hz hertz हर्ट्ज़,
khz kilohertz किलोहर्ट्ज़, mph miles_per_hour मील_प्रति_घंटा, am A_M बजे, pm P_M बजे, किमी kilometers किलोमीटर, किग्रा kilograms किलोग्राम,
सेमी centimeters सेंटीमीटर
"""
_CASED_TABLE = (
    "m meters मीटर, g grams ग्राम, s seconds सेकंड, °C degrees_celsius डिग्री_सेल्सियस, °F degrees_fahrenheit डिग्री_फ़ारेनहाइट"
)
"""Units that are others in another case: 5 g, 5G."""
_SHORT_TABLE = """
dr doctor डॉक्टर, mr mister मिस्टर, mrs missus मिसेज़, ms miz मिस, prof professor प्रोफ़ेसर, st saint सेंट, jr junior जूनियर,
sr senior सीनियर, vs versus बनाम, etc et_cetera इत्यादि, approx approximately लगभग, dept department विभाग,
govt government सरकार, e.g for_example जैसे, i.e that_is यानी,
डॉ doctor डॉक्टर, प्रो professor प्रोफ़ेसर, पं pandit पंडित, रु rupees रुपये, कि.मी kilometers किलोमीटर
"""


def _table(entries: str) -> dict[str, dict[str, str]]:
    """Language → what is written → what is said."""
    rows = [entry.split() for entry in entries.split(",")]
    return {
        language: {row[0]: row[place].replace("_", " ") for row in rows} for place, language in enumerate(SPOKEN, 1)
    }


_SIGNS, _UNITS, _CASED, _SHORT, _BEFORE, _MANY, _PARTS = map(
    _table,
    (
        _SIGNS_TABLE,
        _UNITS_TABLE,
        _CASED_TABLE,
        _SHORT_TABLE,
        "no number नंबर, nos numbers नंबर, vol volume खंड, fig figure चित्र, p page पृष्ठ, pp pages पृष्ठ",
        "k thousand हज़ार, m million मिलियन, mn million मिलियन, b billion अरब, bn billion अरब",
        "½ half आधा, ¼ quarter चौथाई, ¾ three_quarters पौन",
    ),
)
_ADDRESS = re.compile(
    r"(?:https?://|www\.)\S+|[\w.+-]{1,64}@[\w-]+(?:\.[\w-]+)+|\b[\w-]{1,63}\.(?:com|org|net|in|io|gov|edu)\b(?:/\S*)?",
    re.ASCII,
)
_ISO = re.compile(r"\b(?P<y>\d{4})-(?P<m>0?[1-9]|1[0-2])-(?P<d>0?[1-9]|[12]\d|3[01])\b")
_DAY_FIRST = re.compile(r"\b(?P<d>0?[1-9]|[12]\d|3[01])[/.-](?P<m>0?[1-9]|1[0-2])[/.-](?P<y>\d{4})\b")
_TIME = re.compile(r"\b([01]?\d|2[0-3]):([0-5]\d)(?::([0-5]\d))?(?:\s?([AaPp])\.?[Mm]\b\.?)?")
_MONEY = re.compile(
    r"([₹$€£])\s?(\d[\d,]*)(?:\.(\d+))?(?:\s?(k|K|m|M|mn|b|B|bn)\b|(\s(?:million|billion|thousand|lakh|crore|लाख|करोड़|हज़ार)))?"
)
_WHOLE = r"\d{1,3}(?:,\d{2,3})*,\d{3}(?!\d)|\d+"
_NUMBER = re.compile(rf"(?:(?<![\w.,])([-−]))?({_WHOLE})(?:\.(\d+)(?!\.\d))?(st|nd|rd|th|वाँ|वां|वीं|वें)?")
_DOTTED = re.compile(r"\d+(?:\.\d+){2,}")
_DECADE = re.compile(r"\b(1[1-9]\d0|20\d0)s\b")
_FRACTION = re.compile(r"(\d?)\s?([½¼¾])")
_POINT = {"en": "point", "hi": "दशमलव"}
_ROMAN = {
    "II": 2,
    "III": 3,
    "IV": 4,
    "VI": 6,
    "VII": 7,
    "VIII": 8,
    "IX": 9,
    "XI": 11,
    "XII": 12,
    "XIV": 14,
    "XV": 15,
    "XX": 20,
}
_NUMERAL = re.compile(rf"(?<=[A-Za-z]\s)({'|'.join(_ROMAN)})\b")
_APART = re.compile(r"(?<=[^\W\d_])(?=\d)|(?<=\d)(?=[^\W\d_])(?!(?:st|nd|rd|th|वाँ|वां|वीं|वें)(?!\w))")
_YEAR = re.compile(
    r"(?<=\b(?:in|of|by)\s)(1[1-9]\d\d|20\d\d)(?!\d|[.,]\d)|(?<=\b(?:since|until|after)\s)(1[1-9]\d\d|20\d\d)(?!\d|[.,]\d)",
    re.IGNORECASE,
)
_INITIALS = re.compile(r"(?<![^\W\d_])(?:[A-Z]{2,5}|(?:[A-Za-z]\.){2,})(?![^\W\d_])")
_ALONE = re.compile(r"(?<![^\W_]['.])(?<![^\W_])[b-hj-z](?![^\W_]|['.][^\W_])")
"""A letter that is no word, and no end of one: it is read by its name, as capitals are."""
_MARKS = str.maketrans("।॥…\u2019\u2018–—()[]-", "...'',,,,,, ")
_ACCENTS = re.compile(r"([A-Za-z])[\u0300-\u036f]+")
_W = re.compile(r"(?<!\w)W(?!\w)")
"""Its name has more sounds than any other letter's."""
_OF_INDIA = str.maketrans("ൻർൽൾൺൿৎੰ", "नरलळणकतं", "ੱ")
_CAPITALS = re.compile(r"[^\W\d_]{2}[\w']*")
_VOWELS = re.compile(r"[AEIOUY]")


@lru_cache(maxsize=2)
def _engine(language: str) -> Any:
    from unicode_rbnf import RbnfEngine

    return RbnfEngine.for_language(language)


def cardinal(number: float | str, language: str) -> str:
    """``12`` → twelve. What begins with 0, or has more digits than anybody says as one number, digit by digit."""
    whole, _, rest = str(number).partition(".")
    if len(whole) > _SAID_WHOLE or (len(whole) > 1 and whole[0] == "0"):
        return _digits(whole + rest, language)
    said = _engine(language).format_number(int(whole)).text
    if not rest:
        return said
    return f"{said} {_POINT[language]} {_digits(rest, language)}"


def _digits(digits: str, language: str) -> str:
    return " ".join(cardinal(digit, language) for digit in digits)


def _ordinal(number: int, language: str) -> str:
    from unicode_rbnf import FormatPurpose

    if language == "hi":
        return cardinal(number, "hi") + "वाँ"
    return _engine(language).format_number(number, FormatPurpose.ORDINAL).text


def _year(number: int, language: str) -> str:
    from unicode_rbnf import FormatPurpose

    return cardinal(number, "hi") if language == "hi" else _engine("en").format_number(number, FormatPurpose.YEAR).text


def spoken(text: str, language: str) -> str:
    """``text`` with everything that is not read as it is written in words. ``language``: ``en`` or ``hi``."""
    signs = _SIGNS[language]
    text = text.lower() if text.isupper() and " " in text.strip() else text
    text = _FRACTION.sub(
        lambda found: _part(found, language), text.replace("²", " squared" if language == "en" else " वर्ग")
    )
    text = "".join(map(_known, unicodedata.normalize("NFKC", text.replace("₹", " ₹"))))
    text = _ADDRESS.sub(lambda found: _address(found[0], language), text) if re.search(r"[@/]|\w\.\w", text) else text

    def date(found: re.Match[str]) -> str:
        month, day, year = _MONTHS[language][int(found["m"]) - 1], int(found["d"]), _year(int(found["y"]), language)
        return f"{month} {_ordinal(day, 'en')}, {year}" if language == "en" else f"{cardinal(day, 'hi')} {month} {year}"

    for pattern in (_ISO, _DAY_FIRST):
        text = pattern.sub(date, text)
    text = _TIME.sub(lambda found: _time(found, language), text)
    text = _MONEY.sub(lambda found: _money(found, language), text)
    if language == "en":
        text = _DECADE.sub(lambda found: re.sub("y$", "ie", _year(int(found[1]), "en")) + "s", text)
        text = _YEAR.sub(lambda found: _year(int(found[0]), "en"), text)
        text = _NUMERAL.sub(lambda found: cardinal(_ROMAN[found[0]], "en"), text)
    text = _replaced(text, _BEFORE[language], r"(?<!\w){}\.(?=\s?\d)", re.IGNORECASE)
    text = _replaced(text, _SHORT[language], r"(?<!\w){}\.(?=[\s,]|$)", re.IGNORECASE)
    text = _replaced(text, _UNITS[language], r"(?<=\d)\s?{}(?!\w)", re.IGNORECASE)
    text = _replaced(text, _CASED[language], r"(?<=\d)\s?{}(?!\w)")
    text = _DOTTED.sub(lambda found: found[0].replace(".", f" {_POINT[language]} "), text)
    text = _NUMBER.sub(lambda found: _number(found, language), _APART.sub(" ", text))
    text = "".join(f" {signs[char]} " if char in signs else char for char in _INITIALS.sub(_letter_names, text))
    return " ".join(_ALONE.sub(lambda found: found[0].upper(), text).split())


def _known(char: str) -> str:
    """Digits of any script as 0 to 9; emoji and other symbols by their names; nothing for what is invisible."""
    kind = unicodedata.category(char)
    if kind == "Nd":
        return str(unicodedata.digit(char))
    if kind in ("So", "Sk") and char not in "°^":
        return f" {unicodedata.name(char, '').lower()} "
    return " " if kind in ("Cc", "Cf", "Cs", "Co", "Cn", "Zs", "Zl", "Zp") and char not in "\u200c\u200d" else char


def _part(found: re.Match[str], language: str) -> str:
    """3½ → 3 and a half."""
    said = _PARTS[language][found[2]]
    if language == "hi" or not found[1]:
        return f"{found[1]} {said} "
    article = "" if said.startswith("three") else "a "
    return f"{found[1]} and {article}{said} "


def _address(text: str, language: str) -> str:
    """A URL or an e-mail address, part by part."""
    dot, signs = {"en": "dot", "hi": "डॉट"}[language], _SIGNS[language]
    said = re.sub(r"^https?://", "", text, flags=re.IGNORECASE).rstrip(".,;:!?)/")
    said = re.sub(r"^www(?=\.)", "W W W", said, flags=re.IGNORECASE)
    return re.sub(r"[^\w\s]|_", lambda found: f" {dot if found[0] == '.' else signs.get(found[0], '')} ", said)


def _time(found: re.Match[str], language: str) -> str:
    hour, minute, second = (cardinal(int(found[place] or 0), language) for place in (1, 2, 3))
    if language == "hi":
        more = f" {second} सेकंड" if found[3] else ""
        return f"{hour} बजकर {minute} मिनट{more}" if int(found[2]) or found[3] else f"{hour} बजे"
    half = f" {found[4].upper()} M" if found[4] else ""
    if not int(found[2]) and not found[3]:
        return hour + (half or (" o'clock" if int(found[1]) <= 12 else " hundred hours"))
    more = f" and {second} seconds" if found[3] else ""
    return f"{hour} {'oh ' if int(found[2]) < 10 else ''}{minute}{more}{half}"


def _money(found: re.Match[str], language: str) -> str:
    """$5.50 → 5 dollars 50; $5M → 5 million dollars."""
    sign, whole, cents, many, word = found.groups()
    unit = _SIGNS[language][sign]
    if cents and len(cents) == 2 and not (many or word):
        return f"{whole} {unit} {cents}" if int(cents) else f"{whole} {unit}"
    many = f" {_MANY[language][many.lower()]}" if many else word or ""
    unit = unit.removesuffix("s") if whole == "1" and not (cents or many) else unit
    return f"{whole}{'.' + cents if cents else ''}{many} {unit}"


def _number(found: re.Match[str], language: str) -> str:
    sign, whole, rest, ordinal = found.groups()
    minus, digits = {"en": "minus ", "hi": "ऋण "}[language] if sign else "", whole.replace(",", "")
    if len(digits) > _SAID_WHOLE or (whole == digits and len(whole) >= _TELEPHONE):
        said = _digits(digits, language)
    elif ordinal:
        said = _ordinal(int(digits), language)
    else:
        said = cardinal(digits + (f".{rest}" if rest else ""), language)
    return minus + said


def _letter_names(found: re.Match[str]) -> str:
    """UK → U K; what can be said as a word, and is as long as one, stays: NASA, UNESCO."""
    letters = found[0].replace(".", "").upper()
    if "." not in found[0] and len(letters) > 3 and len(_VOWELS.findall(letters)) >= 2:
        return found[0]
    return " ".join(letters)


def _replaced(text: str, table: Mapping[str, str], pattern: str, flags: re.RegexFlag = re.NOFLAG) -> str:
    for short, whole in table.items():
        if short.lower() in text.lower():
            text = re.sub(pattern.format(re.escape(short)), f" {whole}", text, flags=flags)
    return text


# Letters


def number(symbols: str, text: str, first: int = 0) -> list[int]:
    """Places of the characters of ``text`` that are among the symbols."""
    return [place + first for each in text if (place := symbols.find(each)) >= 0]


def letters_of(text: str) -> str:
    """Text as a reader of letters takes it: NFC, few marks, no accents, and capitals only where a letter stands for its name."""
    apart = _ACCENTS.sub(r"\1", unicodedata.normalize("NFD", text))
    text = unicodedata.normalize("NFC", apart).translate(_MARKS)
    return _W.sub("double U", " ".join(_CAPITALS.sub(lambda match: match[0].lower(), text).split()))


def runs(text: str, language: str) -> Iterator[tuple[str, str]]:
    """Language and text of each stretch in one script: Latin is read as English, Devanagari as Hindi, and other scripts of India
    by the letters of Devanagari, at the same places in their blocks. What is of no script goes with what it follows."""
    current, stretch = language, ""
    for char in text.translate(_OF_INDIA):
        found = script(char)
        own = "en" if found == "LATIN" else "hi" if found in INDIC_SCRIPTS else current
        if own != current and stretch.strip():
            yield current, stretch
            stretch = ""
        current, stretch = own, stretch + _in_devanagari(char)
    if stretch.strip():
        yield current, stretch


def _in_devanagari(char: str) -> str:
    place = ord(char)
    return chr(0x900 + place % 0x80) if 0x980 <= place < 0xD80 else char
