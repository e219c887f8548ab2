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
_TOKEN = 200
"""Characters without a blank between them that are read as one."""
_MONTHS = {
    "en": "January February March April May June July August September October November December".split(),
    "hi": "जनवरी फ़रवरी मार्च अप्रैल मई जून जुलाई अगस्त सितंबर अक्टूबर नवंबर दिसंबर".split(),
}
_SIGNS_TABLE = """
% percent प्रतिशत, & and और, @ at ऐट, + plus प्लस, = equals बराबर, # number नंबर, / slash स्लैश, ° degrees डिग्री,
₹ rupees रुपये, $ dollars डॉलर, € euros यूरो, £ pounds पाउंड, × times गुणा, ÷ divided_by भाग, < less_than से_कम,
> greater_than से_अधिक, ~ about लगभग, _ underscore अंडरस्कोर, \\ backslash बैकस्लैश, * star स्टार, ^ to_the_power_of की_घात,
| bar बार, → to से, ± plus_or_minus प्लस_या_माइनस, ≠ is_not बराबर_नहीं, ≤ at_most अधिकतम, ≥ at_least कम_से_कम, ¥ yen येन
"""
_UNITS_TABLE = """
km kilometers किलोमीटर, kg kilograms किलोग्राम, cm centimeters सेंटीमीटर, mm millimeters मिलीमीटर, mg milligrams मिलीग्राम,
ml milliliters मिलीलीटर, kb kilobytes किलोबाइट, mb megabytes मेगाबाइट, gb gigabytes गीगाबाइट, hz hertz हर्ट्ज़,
khz kilohertz किलोहर्ट्ज़, mph miles_per_hour मील_प्रति_घंटा, am A_M बजे, pm P_M बजे, किमी kilometers किलोमीटर, किग्रा kilograms किलोग्राम,
ft feet फ़ुट,
lb pounds पाउंड, lbs pounds पाउंड, sec seconds सेकंड, min minutes मिनट, hrs hours घंटे,
सेमी centimeters सेंटीमीटर
"""
_CASED_TABLE = "m meters मीटर, g grams ग्राम, °C degrees_celsius डिग्री_सेल्सियस, °F degrees_fahrenheit डिग्री_फ़ारेनहाइट"
"""Units that are others in another case: 5 g, 5G."""
_SHORT_TABLE = """
dr doctor डॉक्टर, mr mister मिस्टर, mrs missus मिसेज़, ms miz मिस, prof professor प्रोफ़ेसर, st saint सेंट, jr junior जूनियर,
inc incorporated इन्कॉर्पोरेटेड, ltd limited लिमिटेड, corp corporation कॉर्पोरेशन,
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
        "½ half आधा, ¼ quarter चौथाई, ¾ three_quarters पौन, ⅓ third तिहाई, ⅔ two_thirds दो_तिहाई",
    ),
)
_ADDRESS = re.compile(
    r"(?:https?://|www\.)\S+|[\w.+-]{1,64}@[\w-]+(?:\.[\w-]+)+|\b[\w-]{1,63}\.(?:com|org|net|in|io|gov|edu)\b(?:/\S*)?",
    re.ASCII,
)
_ISO = re.compile(r"\b(?P<y>\d{4})-(?P<m>0?[1-9]|1[0-2])-(?P<d>0?[1-9]|[12]\d|3[01])\b")
_DAY_FIRST = re.compile(r"\b(?P<d>0?[1-9]|[12]\d|3[01])[/.-](?P<m>0?[1-9]|1[0-2])[/.-](?P<y>\d{4})\b")
_MONTH_FIRST = re.compile(r"\b(?P<m>0?[1-9]|1[0-2])/(?P<d>1[3-9]|2\d|3[01])/(?P<y>\d{4})\b")
_TIME = re.compile(r"\b([01]?\d|2[0-3]):([0-5]\d)(?::([0-5]\d))?(?:\s?([AaPp])\.?[Mm]\b\.?)?(?:\s?बजे(?!\w))?")
_TAKEN = re.compile(r"(?<=\d)\s+[-−]\s+(?=\d)")
_PRICES = re.compile(r"([₹$€£¥])\s?(\d[\d,.]*)[-–]\1?(?=\d)")
_MONEY = re.compile(
    r"([₹$€£¥])\s?(\d(?:[\d,]*\d)?)(?:\.(\d+))?(?:\s?(k|K|m|M|mn|b|B|bn)\b|(\s(?:million|billion|thousand|lakh|crore|लाख|करोड़|हज़ार)))?"
)
_WHOLE = r"\d{1,3}(?:,\d{2,3})*,\d{3}(?!\d)|\d+"
_NUMBER = re.compile(rf"(?:(?<![\w.,])([-−]))?({_WHOLE})(?:\.(\d+)(?!\.\d))?(st|nd|rd|th|वाँ|वां|वीं|वें)?")
_ONE = re.compile(rf"(?<![\w.,])1 +(?:{'|'.join({unit for unit in _UNITS['en'].values() if unit[-1] == 's'})})\b")
_DOTTED = re.compile(r"(?<![\d.])\d+(?:\.\d+){2,}")
_DECADE = re.compile(r"(?<![\w.,])'?(1[1-9]\d0|20\d0|[2-9]0)'?s\b")
_PARTS_AS_ONE = {"1/2": "½", "1/3": "⅓", "2/3": "⅔", "1/4": "¼", "3/4": "¾"}
_SLASHED = re.compile(rf"(?<![\w/.,])(?:{'|'.join(_PARTS_AS_ONE)})(?![\w/]|[.,]\d)")
_FRACTION, _POWER = re.compile(r"(\d?)\s?([½¼¾⅓⅔])"), re.compile("[²³¹⁰⁴-⁹]+")
_POINT, _TO, _LESS = ({"en": en, "hi": hi} for en, hi in (("point", "दशमलव"), ("to", "से"), ("minus", "ऋण")))
_FIRST, _GENDERS = {1: "पहल", 2: "दूसर", 3: "तीसर", 4: "चौथ", 6: "छठ"}, {"वाँ": "ा", "वां": "ा", "वीं": "ी", "वें": "े"}
_HALVES = {"1½": "डेढ़", "2½": "ढाई"}
_ROMAN: dict[str, int] = dict(
    zip("II III IV VI VII VIII IX XI XII XIV XV XX".split(), (2, 3, 4, 6, 7, 8, 9, 11, 12, 14, 15, 20), strict=True)
)
_NUMERAL = re.compile(rf"(?<=[A-Za-z]\s)({'|'.join(_ROMAN)})\b")
_APART = re.compile(r"(?<=[^\W\d_])(?=\d)|(?<=\d)(?=[^\W\d_])(?!(?:st|nd|rd|th|वाँ|वां|वीं|वें)(?!\w))")
_YEAR_OF = r"(?:1[1-9]\d\d|20\d\d)(?!\w|[.,]\d)"
_YEAR = re.compile(rf"(?<=\b(?:in|of|by)\s){_YEAR_OF}|(?<=\b(?:since|until|after)\s){_YEAR_OF}", re.IGNORECASE)
_YEARS = re.compile(rf"(?<![\w.,])({_YEAR_OF})(\s?[-–]\s?| to | and )({_YEAR_OF})")
_IN_WORDS = re.compile(
    rf"\b({'|'.join(_MONTHS['en'])})(?:\s(0?[1-9]|[12]\d|3[01])(?:st|nd|rd|th)?(?![\w:]|[.,]\d))?(?:,?\s({_YEAR_OF}))?"
)
_INITIALS = re.compile(r"(?<![^\W\d_])(?:[A-Z]{2,5}|(?:[A-Za-z]\.){2,})(?![^\W\d_])")
_ALONE = re.compile(r"(?<![^\W_]['.])(?<![^\W_])[b-hj-z](?![^\W_]|['.][^\W_])")
"""A letter that is no word, and no end of one: it is read by its name, as capitals are."""
_QUOTES = str.maketrans("\u2019\u2018\u02bc", "'''")
_MARKS = str.maketrans("।॥…\u2019\u2018–—()[]-", "...'',,,,,, ")
_ACCENTS = re.compile(r"([A-Za-z])[\u0300-\u036f]+")
_PLAIN = str.maketrans(
    {"ß": "ss", "æ": "ae", "œ": "oe", "ø": "o", "ł": "l", "đ": "d", "Æ": "Ae", "Ø": "O", "Ł": "L", "Đ": "D"}
)
_W = re.compile(r"(?<!\w)W(?!\w)")
"""Its name has more sounds than any other letter's."""
_OF_INDIA = str.maketrans("ൻർൽൾൺൿৎੰ", "नरलळणकतं", "ੱ")
_CAPITALS = re.compile(r"[^\W\d_]{2}[\w']*")
_EMPHASIS = frozenset(
    "ALL ALSO AND ANY ARE BAD BE BEST BIG BUT BY CAN DO END EVER FOR FREE FROM GO GOOD HE HELP HER HIS HOW IF IN IS LOVE MAY ME "
    "MORE MOST MUST MY NEVER NEW NO NOT NOW OF OFF ON ONLY OPEN OR OUR OUT SHE SO SOME STOP THAT THE THEY THIS TO UP VERY WAS WE "
    "WHAT WHY WILL WITH YES YOU YOUR".split()
)
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
    return f"{said} {_POINT[language]} {_digits(rest, language)}" if rest else said


def _digits(digits: str, language: str) -> str:
    return " ".join(cardinal(digit, language) for digit in digits)


def _ordinal(number: int, language: str, suffix: str = "") -> str:
    from unicode_rbnf import FormatPurpose

    if language == "hi":
        stem, suffix = _FIRST.get(number), suffix if suffix.startswith("व") else "वाँ"
        return stem + _GENDERS[suffix] if stem else cardinal(number, "hi") + suffix
    return _engine(language).format_number(number, FormatPurpose.ORDINAL).text


def _year(number: int, language: str) -> str:
    from unicode_rbnf import FormatPurpose

    return cardinal(number, "hi") if language == "hi" else _engine("en").format_number(number, FormatPurpose.YEAR).text


def spoken(text: str, language: str) -> str:
    """``text`` with everything that is not read as it is written in words. ``language``: ``en`` or ``hi``."""
    signs = _SIGNS[language]
    text = re.sub(rf"\S{{{_TOKEN}}}", r"\g<0> ", text)
    words = re.findall(r"[^\W\d_]+", text)
    text = _SLASHED.sub(lambda found: _PARTS_AS_ONE[found[0]], text.translate(_QUOTES))
    text = text.lower() if len(words) > 2 and all(map(str.isupper, words)) else text
    text = _FRACTION.sub(lambda found: _part(found, language), text)
    text = _POWER.sub(lambda found: _power(found[0], language), text)
    text = "".join(map(_known, unicodedata.normalize("NFKC", text.replace("₹", " ₹"))))
    text = _ADDRESS.sub(lambda found: _address(found[0], language), text) if re.search(r"[@/]|\w\.\w", text) else text

    def date(found: re.Match[str]) -> str:
        month, day, year = _MONTHS[language][int(found["m"]) - 1], int(found["d"]), _year(int(found["y"]), language)
        return f"{month} {_ordinal(day, 'en')}, {year}" if language == "en" else f"{cardinal(day, 'hi')} {month} {year}"

    for pattern in (_ISO, _DAY_FIRST, _MONTH_FIRST):
        text = pattern.sub(date, text)
    text = _TIME.sub(lambda found: _time(found, language), text)
    text = _PRICES.sub(rf"\2 {_TO[language]} \1", _TAKEN.sub(f" {_LESS[language]} ", text))
    text = _MONEY.sub(lambda found: _money(found, language), text)
    if language == "en":
        text = _DECADE.sub(lambda found: re.sub("y$", "ie", _year(int(found[1]), "en")) + "s", text)
        text = _YEAR.sub(lambda found: _year(int(found[0]), "en"), _YEARS.sub(_span, _IN_WORDS.sub(_day, text)))
        text = _NUMERAL.sub(lambda found: cardinal(_ROMAN[found[0]], "en"), text)
    text = _replaced(text, _BEFORE[language], r"(?<!\w){}\.(?=\s?\d)", re.IGNORECASE)
    text = _replaced(text, _SHORT[language], r"(?<!\w){}\.(?!\w)", re.IGNORECASE)
    text = _replaced(text, _UNITS[language], r"(?<=\d)\s?{}(?!\w)", re.IGNORECASE)
    text = _replaced(text, _CASED[language], r"(?<=\d)\s?{}(?!\w)")
    text = _ONE.sub(lambda found: found[0].removesuffix("s"), text) if language == "en" else text
    text = _DOTTED.sub(lambda found: found[0].replace(".", f" {_POINT[language]} "), text)
    text = _NUMBER.sub(lambda found: _number(found, language), _APART.sub(" ", text))
    text = "".join(f" {signs[char]} " if char in signs else char for char in _INITIALS.sub(_letter_names, text))
    return " ".join(_ALONE.sub(lambda found: found[0].upper(), text).split()).replace(" ,", ",")


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
    if language == "hi" and found[1]:
        over = {"½": f"साढ़े {found[1]}", "¼": f"सवा {found[1]}", "¾": f"पौने {int(found[1]) + 1}"}
        return f"{_HALVES.get(found[1] + found[2]) or over.get(found[2]) or f'{found[1]} {said}'} "
    return f"{found[1]} and {'' if ' ' in said else 'a '}{said} " if found[1] else f" {said} "


def _power(signs: str, language: str) -> str:
    """10⁶ → 10 to the power of 6."""
    digits = unicodedata.normalize("NFKC", signs)
    known = {"2": {"en": " squared", "hi": " वर्ग"}, "3": {"en": " cubed", "hi": " घन"}}.get(digits)
    return known[language] if known else f" {_SIGNS[language]['^']} {digits}"


def _address(text: str, language: str) -> str:
    """A URL or an e-mail address, part by part."""
    dot, signs = {"en": "dot", "hi": "डॉट"}[language], _SIGNS[language]
    said = re.sub(r"^https?://", "", text, flags=re.IGNORECASE).rstrip(".,;:!?)/")
    said = re.sub(r"^www(?=\.)", "W W W", said, flags=re.IGNORECASE)
    return re.sub(r"[^\w\s]|_", lambda found: f" {dot if found[0] == '.' else signs.get(found[0], '')} ", said)


def _day(found: re.Match[str]) -> str:
    """May 5, 2024, or some of it."""
    month, day, year = found.groups()
    said = [month, _ordinal(int(day), "en") + "," * bool(year)] if day else [month]
    return " ".join([*said, *([_year(int(year), "en")] if year else [])])


def _span(found: re.Match[str]) -> str:
    """1914-1918."""
    first, between, last = found.groups()
    return f"{_year(int(first), 'en')}{between if between.strip().isalpha() else ' to '}{_year(int(last), 'en')}"


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
    unit = unit.removesuffix("s") if whole == "1" and not (many or word) else unit
    if cents and len(cents) == 2 and not (many or word):
        return f"{whole} {unit} {cents}" if int(cents) else f"{whole} {unit}"
    many = f" {_MANY[language][many.lower()]}" if many else word or ""
    return f"{whole}{'.' + cents if cents else ''}{many} {unit}"


def _number(found: re.Match[str], language: str) -> str:
    sign, whole, rest, ordinal = found.groups()
    minus, digits = f"{_LESS[language]} " if sign else "", whole.replace(",", "")
    if len(digits) > _SAID_WHOLE or (whole == digits and len(whole) >= _TELEPHONE):
        said = _digits(digits, language)
    elif ordinal:
        said = _ordinal(int(digits), language, ordinal)
    else:
        said = cardinal(digits + (f".{rest}" if rest else ""), language)
    return minus + said


def _letter_names(found: re.Match[str]) -> str:
    """UK → U K; what can be said as a word, and is as long as one, stays: NASA, UNESCO."""
    if found[0] in _EMPHASIS:
        return found[0].lower()
    letters, rest = found[0].replace(".", "").upper(), found.string[found.end() :]
    over = not rest.strip() or (found[0].islower() and re.match(r"\s+[A-Z]", rest) is not None)
    if "." not in found[0] and len(letters) > 3 and len(_VOWELS.findall(letters)) >= 2:
        return found[0]
    return " ".join(letters) + "." * (found[0].endswith(".") and over)


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
    apart = _ACCENTS.sub(r"\1", unicodedata.normalize("NFD", text.translate(_PLAIN)))
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
        place = ord(char)
        current, stretch = own, stretch + (chr(0x900 + place % 0x80) if 0x980 <= place < 0xD80 else char)
    if stretch.strip():
        yield current, stretch
