"""Languages by code and name: Whisper's own, and those that it has no token for.

Nothing here costs an import: the command line checks names before it loads anything.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches


def _pairs(table: str) -> dict[str, str]:
    return dict(entry.strip().split(" ", 1) for entry in table.split(","))


LANGUAGES: dict[str, str] = _pairs("""
af afrikaans, am amharic, ar arabic, as assamese, az azerbaijani, ba bashkir, be belarusian, bg bulgarian, bn bengali,
bo tibetan, br breton, bs bosnian, ca catalan, cs czech, cy welsh, da danish, de german, el greek, en english,
es spanish, et estonian, eu basque, fa persian, fi finnish, fo faroese, fr french, gl galician, gu gujarati, ha hausa,
haw hawaiian, he hebrew, hi hindi, hr croatian, ht haitian creole, hu hungarian, hy armenian, id indonesian,
is icelandic, it italian, ja japanese, jw javanese, ka georgian, kk kazakh, km khmer, kn kannada, ko korean, la latin,
lb luxembourgish, ln lingala, lo lao, lt lithuanian, lv latvian, mg malagasy, mi maori, mk macedonian, ml malayalam,
mn mongolian, mr marathi, ms malay, mt maltese, my myanmar, ne nepali, nl dutch, nn nynorsk, no norwegian, oc occitan,
pa punjabi, pl polish, ps pashto, pt portuguese, ro romanian, ru russian, sa sanskrit, sd sindhi, si sinhala,
sk slovak, sl slovenian, sn shona, so somali, sq albanian, sr serbian, su sundanese, sv swedish, sw swahili, ta tamil,
te telugu, tg tajik, th thai, tk turkmen, tl tagalog, tr turkish, tt tatar, uk ukrainian, ur urdu, uz uzbek,
vi vietnamese, yi yiddish, yo yoruba, yue cantonese, zh chinese
""")
"""Whisper's language codes, each with its English name."""
LANGUAGE_CODES: dict[str, str] = {name: code for code, name in LANGUAGES.items()} | _pairs("""
burmese my, castilian es, flemish nl, haitian ht, letzeburgesch lb, mandarin zh, moldavian ro, moldovan ro, panjabi pa,
pushto ps, sinhalese si, valencian ca
""")
"""Language names and their aliases, each with its code."""
UNSPACED_LANGUAGES = frozenset({"zh", "ja", "th", "lo", "my", "yue"})
"""Languages written without spaces between words: every character may begin a word."""
_ISO_TABLE = """
af afr, am amh, ar ara arb, as asm, az aze azj, ba bak, be bel, bg bul, bn ben, bo bod tib, br bre, bs bos, ca cat,
cs ces cze, cy cym wel, da dan, de deu ger, el ell gre, en eng, es spa, et est ekk, eu eus baq, fa fas per pes, fi fin,
fo fao, fr fra fre, gl glg, gu guj, ha hau, he heb iw, hi hin, hr hrv, ht hat, hu hun, hy hye arm, id ind, is isl ice,
it ita, ja jpn, jw jav jv, ka kat geo, kk kaz, km khm, kn kan, ko kor, la lat, lb ltz, ln lin, lo lao, lt lit,
lv lav lvs, mg mlg plt, mi mri mao, mk mkd mac, ml mal, mn mon khk, mr mar, ms msa may zsm, mt mlt, my mya bur,
ne nep npi, nl nld dut, nn nno, no nor nob nb, oc oci, pa pan, pl pol, ps pus pbt, pt por, ro ron rum, ru rus, sa san,
sd snd, si sin, sk slk slo, sl slv, sn sna, so som, sq sqi alb als, sr srp, su sun, sv swe, sw swa swh, ta tam, te tel,
tg tgk, th tha, tk tuk, tl tgl fil, tr tur, tt tat, uk ukr, ur urd, uz uzb uzn, vi vie, yi yid ydd, yo yor,
zh zho chi cmn, or ori ory, ks kas
"""
_ISO_CODES = {other: code for code, others in _pairs(_ISO_TABLE).items() for other in others.split()}
"""The other codes of ISO 639 (with three letters, or newer or older ones) → ours."""

FURTHER_LANGUAGES: dict[str, str] = _pairs("""
ase american sign language, brx bodo, doi dogri, ins indian sign language, kok konkani, ks kashmiri, mai maithili,
mni manipuri, or odia, sat santali, sgn sign language
""")
"""Languages that Whisper has no token for (ISO 639-1, else 639-3), each with its English name."""
_FURTHER_CODES = {name: code for code, name in FURTHER_LANGUAGES.items()} | _pairs("meitei mni, oriya or")
_RELATIVES = _pairs("brx as, doi pa hi, kok mr, ks ur pa, mai hi bn ne, mni bn as, or bn as, sat bn hi")
"""Of the same family, or else written by the same people: what a new token starts from."""

_TAG = re.compile(r"[a-z]{2,3}(-[a-z]{4})?(-([a-z]{2}|\d{3}))?")
"""A language, perhaps its script, perhaps a region (BCP 47)."""
_CODE = re.compile(r"[a-z]{2,8}(-[a-z0-9]{1,8})*")


@dataclass(frozen=True, kw_only=True)
class NewLanguage:
    """A language that a model is to have a token for. Raises ``ValueError`` for what cannot be one."""

    code: str
    """As in ``<|or|>``: lower-case letters, ISO 639."""
    name: str = ""
    """In English; default: the known one, else the code."""
    like: tuple[str, ...] = ()
    """Languages of the model, by code or name, whose mean the token starts as; default: relatives, else all."""

    def __post_init__(self) -> None:
        code, name = self.code.strip().lower(), " ".join(self.name.lower().split())
        name = name or FURTHER_LANGUAGES.get(code) or LANGUAGES.get(code) or code
        if not _CODE.fullmatch(code):
            raise ValueError(f"a language's code is of lower-case letters, as or or ase, got {self.code!r}")
        owner = name if name in LANGUAGES else LANGUAGE_CODES.get(name, code)
        if owner != code:
            raise ValueError(f"{name!r} cannot be the name of the language {code!r}: it is that of {owner!r}")
        object.__setattr__(self, "code", code)
        object.__setattr__(self, "name", name)

    @classmethod
    def parse(cls, text: str) -> NewLanguage:
        """From ``or``, ``or=odia`` or ``or=odia:like=bn,as``."""
        language, marked, like = text.partition(":like=")
        code, named, name = language.partition("=")
        relatives = tuple(part.strip() for part in like.split(","))
        if ":" in language or (named and not name.strip()) or (marked and not all(relatives)):
            raise ValueError(f"a new language is given as or, or=odia or or=odia:like=bn,as, got {text!r}")
        return cls(code=code, name=name, like=relatives if marked else ())

    @property
    def relatives(self) -> tuple[str, ...]:
        """``like``, or the codes that are known to be related; empty where neither says anything."""
        return self.like or tuple(_RELATIVES.get(self.code, "").split())


def language_code(name: str, extra: Collection[str] = (), names: Mapping[str, str] | None = None) -> str:
    """The code of a language given by code, tag, name or alias, in any case: ``Hindi``, ``hin`` or ``hi_IN`` → ``hi``.

    ``extra``: further codes that a model knows; ``names``: of these, by code. Raises ``ValueError`` with the closest names
    for an unknown one. That a model has the language is not said by this.
    """
    wanted = " ".join(name.lower().split())
    codes = _FURTHER_CODES | {own: code for code, own in (names or {}).items()} | LANGUAGE_CODES
    for tag in _tags(wanted):
        if tag in LANGUAGES or tag in FURTHER_LANGUAGES or tag in extra:
            return tag
        if tag in codes or tag in _ISO_CODES:
            return codes.get(tag) or _ISO_CODES[tag]
    close = get_close_matches(wanted, dict.fromkeys([*codes, *LANGUAGES, *FURTHER_LANGUAGES, *extra]))
    hint = f"did you mean {' or '.join(close)}?" if close else "give a code such as en or a name such as english"
    raise ValueError(f"unknown language {name!r}: {hint}")


def _tags(wanted: str) -> Iterator[str]:
    """What to look for: what was given, then as a tag, then without its region, without its script (RFC 4647, lookup)."""
    yield wanted
    tag = re.split("[.@]", wanted)[0].replace("_", "-")
    while _TAG.fullmatch(tag):
        yield tag
        tag = tag.rpartition("-")[0]


def spoken_code(name: str) -> str:
    """The code of a language as :func:`language_code` has it; of an unknown one, as a file may state it, the name itself."""
    try:
        return language_code(name)
    except ValueError:
        return name.strip().lower()
