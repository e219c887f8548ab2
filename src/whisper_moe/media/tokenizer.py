"""Whisper's tokens: text to ids and back, control tokens by name, words; pieces of text that are tokens of a sense; sentences.

A thin layer over ``tokenizers``: byte-level BPE (GPT-2), Whisper's control tokens (arXiv 2212.04356, section 2.3) and
timestamps every 0.02 s. Ids are looked up by name: the vocabularies of Whisper (51,864 / 51,865 / 51,866) and of its
fine-tunes differ.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from whisper_moe.config_aside import TEXT
from whisper_moe.media.languages import FURTHER_LANGUAGES, LANGUAGES, UNSPACED_LANGUAGES, language_code

TIMESTAMP_SECONDS = 0.02
"""Seconds between one timestamp token and the next."""
TASKS = ("transcribe", "translate")

_TIMESTAMPS = tuple(f"<|{i * TIMESTAMP_SECONDS:.2f}|>" for i in range(1501))
_MULTILINGUAL_VOCABULARY = 51_865
"""Whisper's English-only vocabulary, which ends with the timestamps, is smaller than this; every multilingual one is not."""
_UNENCODABLE = re.compile("[\0\ud800-\udfff]")
_TIMESTAMP = re.compile(r"<\|([0-9]{1,2}\.[0-9][0-9])\|>")
_MARKUP = re.compile(r"<\|[^<>|]*(\|>)?|[^\s<>|]*\|>")
_REPLACEMENT = "\ufffd"
_SENTENCE = re.compile(
    r"(?<=[.!?।])(?<!\b[A-Z]\.)(?<!\b(?:Mr|Ms|Dr|St|vs)\.)(?<!\bMrs\.)(?<!\b(?:e\.g|i\.e)\.)(?<!^\d\.)[\"'”\u2019)]*\s+"
)
_PLACES_TO_CUT = (re.compile(r"(?<=[,;:])\s+"), re.compile(r"\s+"))
_CONTROL = re.compile(r"<\|[^\s<|>]+\|>")

_ANNOTATIONS = (
    *'"#()*+/:;<=>@[\\]^_`{|}~「」『』',
    *("<<", ">>", "<<<", ">>>", "--", "---", "-(", "-[", "('", '("', "((", "))", "(((", ")))", "[[", "]]", "{{", "}}"),
    *("♪♪", "♪♪♪"),
)
_MUSIC = tuple("♩♪♫♬♭♮♯")


def split_timestamps(text: str) -> tuple[list[str], list[int]]:
    """The stretches of words of a text to learn from, and the timestamp (in steps of 0.02 s) after each but the last.

    Raises ``ValueError`` for timestamps that go back, are no token or do not begin the text, and for all other markup, such
    as ``<|0.0|>`` and ``<|en|>``: a model would learn it as letters.
    """
    words, steps = [piece.strip() for piece in _TIMESTAMP.split(text)], [0]  # words, seconds, words, …, words
    for seconds in words[1::2]:
        step = round(float(seconds) / TIMESTAMP_SECONDS)
        if abs(step * TIMESTAMP_SECONDS - float(seconds)) > 1e-6 or not steps[-1] <= step < len(_TIMESTAMPS):
            cause = "is not a multiple of 0.02 up to 30.00, or is before the one before it"
            raise ValueError(f"the timestamp {seconds} {cause}")
        steps.append(step)
    if found := next(filter(None, map(_MARKUP.search, words[::2])), None):
        cause = "is markup, not words; of that only timestamps such as <|1.24|> are read"
        raise ValueError(f"{found[0]!r} {cause}")
    if steps[1:] and words[0]:
        raise ValueError("a text with timestamps must begin with one")
    return words[::2], steps[1:]


def read_backend(path: Path) -> Backend:
    """Read ``tokenizer.json``, or a folder with it or with the older ``vocab.json``, ``merges.txt`` and so on.

    Early Whisper checkpoints list no timestamp tokens although their models have them, behind the last listed token;
    they are added here. Raises ``ValueError`` naming the file that is missing or cannot be read.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    older = path.is_dir() and not file.exists()
    try:
        backend = _read_parts(path) if older else Backend.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception for every cause
        what = f"{path} has no tokenizer.json, and its older files" if older else f"the tokenizer {file}"
        raise ValueError(f"{what} cannot be read: {error}") from error
    if backend.token_to_id(_TIMESTAMPS[0]) is None:
        if backend.token_to_id("<|notimestamps|>") != backend.get_vocab_size() - 1:
            cause = "no timestamp tokens, and <|notimestamps|>, which they follow, is not the last token"
            raise ValueError(f"{path}: {cause}")
        backend.add_tokens([AddedToken(name, normalized=False, special=False) for name in _TIMESTAMPS])
    return backend


def _read_parts(folder: Path) -> Backend:
    backend = Backend(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    added: dict[str, int] = json.loads((folder / "added_tokens.json").read_text(encoding="utf-8"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    names = ["<|endoftext|>", *sorted(added, key=added.__getitem__)]
    backend.add_tokens([AddedToken(name, normalized=False, special=not _TIMESTAMP.match(name)) for name in names])
    for name, id in added.items():
        if backend.token_to_id(name) != id:
            raise ValueError(f"{folder / 'added_tokens.json'} gives {name} the id {id}, where another token belongs")
    return backend


class Tokenizer:
    """Whisper's tokenizer.

    ``languages`` and ``tasks`` map codes to ids and are empty for an English-only model, whose vocabulary lists such
    tokens although the model was never trained on them. ``language_names`` are those that the model's own list gives.
    ``detected``: the languages that detection chooses among unless it is told otherwise. Of those that somebody appended they
    are the ones that the model lists, and never one of its ``undetected_languages``, which nobody has trained yet.
    Timestamp tokens are ``timestamp_begin`` to ``timestamp_end``, both included; ids beyond belong to whoever appended them.
    """

    def __init__(self, backend: Backend, generation_config: Mapping[str, Any] | None = None) -> None:
        """Take over ``backend`` (it is changed). Raises ``ValueError`` if it lacks one of Whisper's control tokens."""
        config = generation_config or {}
        self._backend = backend
        # Timestamps join the special tokens, and those are never matched in text: what a user writes is only text.
        backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in _TIMESTAMPS])
        backend.encode_special_tokens = True
        self._special = {id for id, token in backend.get_added_tokens_decoder().items() if token.special}

        self.eot = self._id("<|endoftext|>")
        self.sot = self._id("<|startoftranscript|>")
        self.transcribe = self._id("<|transcribe|>")
        self.translate = self._id("<|translate|>")
        self.sot_lm = self._id("<|startoflm|>")
        self.sot_prev = self._id("<|startofprev|>")
        self.no_speech = self._id("<|nospeech|>", "<|nocaptions|>")
        self.no_timestamps = self._id("<|notimestamps|>")
        self.timestamp_begin = self._id(_TIMESTAMPS[0])
        self.timestamp_end = self._id(_TIMESTAMPS[-1])
        if self.timestamp_end - self.timestamp_begin != len(_TIMESTAMPS) - 1:
            raise ValueError("the tokenizer's timestamp tokens are not consecutive")

        self.is_multilingual = bool(config.get("is_multilingual", self.timestamp_end + 1 >= _MULTILINGUAL_VOCABULARY))
        self.language_names: dict[str, str] = dict(config.get("language_names") or {})
        listed, left_out = (config.get(key) or {} for key in ("lang_to_id", "undetected_languages"))
        self.languages = self._read_languages(listed) if self.is_multilingual else {}
        self.detected = {
            code: id
            for code, id in self.languages.items()
            if code not in left_out and (id <= self.timestamp_end or f"<|{code}|>" in listed)
        }
        if self.languages and not self.detected:
            raise ValueError("undetected_languages leaves no language that could be detected")
        self.tasks = {task: self._id(f"<|{task}|>") for task in TASKS} if self.is_multilingual else {}

    @classmethod
    def from_file(cls, path: Path | str, generation_config: Mapping[str, Any] | None = None) -> Tokenizer:
        """Read what :func:`read_backend` reads; ``generation_config`` is the content of ``generation_config.json``."""
        return cls(read_backend(Path(path)), generation_config)

    @property
    def vocabulary(self) -> dict[str, int]:
        """Every token's id."""
        return self._backend.get_vocab()

    def configured(self, generation_config: Mapping[str, Any]) -> Tokenizer:
        """The same with another generation config."""
        return Tokenizer(self._backend, generation_config)

    def _id(self, *names: str) -> int:
        """The id of the first of these names that there is."""
        for name in names:
            if (id := self._backend.token_to_id(name)) is not None:
                return id
        raise ValueError(f"not a Whisper tokenizer: it has no token {' or '.join(names)}")

    def _read_languages(self, lang_to_id: Mapping[str, int]) -> dict[str, int]:
        for name, id in lang_to_id.items():
            if self._id(name) != id:
                raise ValueError(f"the generation config gives {name} the id {id}, the tokenizer {self._id(name)}")
        known = [*LANGUAGES, *FURTHER_LANGUAGES]
        names = {code: f"<|{code}|>" for code in known} | {name.strip("<|>"): name for name in lang_to_id}
        ids = {code: self._backend.token_to_id(name) for code, name in names.items()}
        return {code: id for code, id in ids.items() if id is not None}

    def token_id(self, name: str) -> int | None:
        """The id of a token such as ``<|or|>``."""
        return self._backend.token_to_id(name)

    @property
    def vocab_size(self) -> int:
        """Tokens that have a name; a model's embedding may be padded beyond."""
        return self._backend.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Text to ids. Control tokens are never read from text: a literal ``<|endoftext|>`` is encoded as its letters.

        Raises ``ValueError`` for NUL and lone surrogates, which no tokenizer was trained on.
        """
        if bad := _UNENCODABLE.search(text):
            raise ValueError(f"text has U+{ord(bad[0]):04X} at position {bad.start()}, which is not text")
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text without control and timestamp tokens; bytes that are not UTF-8 become U+FFFD.

        A timestamp ends a character: bytes before and after it are not joined. Nothing else is cleaned up.
        """
        runs = groupby(ids, key=self.is_timestamp)
        return "".join(self._backend.decode(list(run)) for is_timestamp, run in runs if not is_timestamp)

    def is_timestamp(self, id: int) -> bool:
        return self.timestamp_begin <= id <= self.timestamp_end

    def timestamp(self, seconds: float) -> int:
        """The token nearest to so many seconds from the start of a window."""
        steps = round(seconds / TIMESTAMP_SECONDS)
        return min(self.timestamp_begin + max(0, steps), self.timestamp_end)

    def seconds(self, timestamp: int) -> float:
        """What a timestamp token says: seconds from the start of its window."""
        assert self.is_timestamp(timestamp), timestamp
        return (timestamp - self.timestamp_begin) * TIMESTAMP_SECONDS

    def text_ids(self, ids: Iterable[int]) -> list[int]:
        """The ids that stand for text: no control and no timestamp tokens."""
        return [id for id in ids if id not in self._special]

    def language_code(self, language: str) -> str:
        """The code of a language given by code or name, of those that only this model knows too; else ``ValueError``."""
        return language_code(language, self.languages, self.language_names)

    def language_id(self, language: str) -> int:
        """The token of a language given by code or name; ``ValueError`` if this model has none."""
        code = self.language_code(language)
        if code not in self.languages:
            known = ", ".join(sorted(self.languages)) or "only English, without a language token"
            raise ValueError(f"this model does not know the language {language!r}; it knows {known}")
        return self.languages[code]

    def sot_sequence(self, language: str | None = None, task: str = "transcribe") -> list[int]:
        """The tokens that open a transcript, without ``<|notimestamps|>``: start, language, task.

        An English-only model has just the first; it takes no other language and no translation.
        """
        if task not in TASKS:
            raise ValueError(f"unknown task {task!r}: one of {', '.join(TASKS)}")
        if self.is_multilingual:
            if language is None:
                raise ValueError("a multilingual model needs the language")
            return [self.sot, self.language_id(language), self.tasks[task]]
        if task != "transcribe" or language_code(language or "en") != "en":
            raise ValueError(f"this model only transcribes English; it cannot {task} {language or 'english'!r}")
        return [self.sot]

    @cached_property
    def non_speech_tokens(self) -> tuple[int, ...]:
        """Tokens of annotations that nobody speaks: ♪♪♪, (speaker names), [brackets]; sorted.

        Single hyphens and quotes are among them only where they begin a word. A musical sign may be several tokens: its
        first one is enough, for it begins no other character than such signs.
        """
        ids = {self.encode(" -")[0], self.encode(" '")[0]}
        for symbol in (*_ANNOTATIONS, *_MUSIC):
            for encoded in (self.encode(symbol), self.encode(" " + symbol)):
                if len(encoded) == 1 or symbol in _MUSIC:
                    ids.add(encoded[0])
        return tuple(sorted(ids))

    def suppressed(self, requested: Iterable[int] = (-1,)) -> tuple[int, ...]:
        """Tokens that may never be sampled: ``requested``, with -1 for all non-speech ones, and the control tokens.

        Among these are all that was appended to Whisper's vocabulary but text: languages, tasks, padding with a name.
        """
        wanted = {*requested, self.sot, self.sot_lm, self.sot_prev, self.transcribe, self.translate, self.no_speech}
        wanted |= {id for id in self._special if id > self.timestamp_end}
        return tuple(sorted(wanted - {-1} | set(self.non_speech_tokens if -1 in wanted else ())))

    def split_to_words(self, ids: Sequence[int], language: str | None = None) -> tuple[list[str], list[list[int]]]:
        """Group tokens into words: (texts, ids of each). Together they hold every id, in order.

        A word begins at a space, a punctuation mark or a control token; where words are not spaced, at every character.
        """
        words: list[str] = []
        groups: list[list[int]] = []
        for text, group in self._characters(ids):
            begins = group[0] in self._special or text.startswith(" ") or text.strip() in string.punctuation
            if begins or not words or language in UNSPACED_LANGUAGES:
                words.append(text)
                groups.append(group)
            else:
                words[-1] += text
                groups[-1] = groups[-1] + group
        return words, groups

    def _characters(self, ids: Sequence[int]) -> Iterator[tuple[str, list[int]]]:
        """The smallest groups of tokens that decode to whole characters, or to U+FFFD where all of ``ids`` do too."""
        whole = self._backend.decode(list(ids), skip_special_tokens=False)
        pending, text, done = list[int](), "", 0
        for id in ids:
            pending.append(id)
            text = self._backend.decode(pending, skip_special_tokens=False)
            broken = text.find(_REPLACEMENT)
            if broken < 0 or whole[done + broken : done + broken + 1] == _REPLACEMENT:
                yield text, pending
                done += len(text)
                pending = []
        if pending:
            yield text, pending


# Sentences, and pieces of text


def sentences(text: str) -> list[str]:
    """A text cut behind its sentences, closing quotes with theirs. Initials, titles and the number of a list end none."""
    ends = [found.end() for found in _SENTENCE.finditer(text)]
    return [text[begin:end].strip() for begin, end in pairwise([0, *ends, len(text)])]


def shortened(sentence: str, fits: Callable[[str], bool]) -> list[str]:
    """A sentence in parts that fit: cut where a comma is nearest to its middle, else between words, else in the middle."""
    if fits(sentence):
        return [sentence] if sentence else []
    places = ([found.start() for found in place.finditer(sentence)] for place in _PLACES_TO_CUT)
    cuts = next(filter(None, places), [len(sentence) // 2])
    middle = min(cuts, key=lambda cut: abs(2 * cut - len(sentence)))
    return [*shortened(sentence[:middle].strip(), fits), *shortened(sentence[middle:].strip(), fits)]


class Pieces:
    """A tokenizer with more tokens behind its own: control tokens, such as ``<|text|>``, and pieces of text in scripts
    that Whisper spells in single characters: a Hindi word is five tokens to it, and one or two of these.

    A text is cut from left to right into the longest pieces that are known; what lies between them (Latin, digits) is the
    source's own tokens. So nothing but the pieces themselves has to be kept, and every text comes back as it was.
    """

    def __init__(self, tokenizer: Tokenizer, tokens: Sequence[str], first: int) -> None:
        """``first``: the id of the first of ``tokens``."""
        self.tokenizer, self.tokens, self.first = tokenizer, tokens, first
        self.ids = {token: first + place for place, token in enumerate(tokens)}
        self.control = {id for token, id in self.ids.items() if _CONTROL.fullmatch(token)}
        """Ids that stand for no text."""
        known = sorted((token for token, id in self.ids.items() if id not in self.control), key=len, reverse=True)
        self._known = re.compile(f"({'|'.join(map(re.escape, known))})") if known else re.compile("((?!))")

    def source(self, text: str, language: str) -> list[int]:
        """What the encoder reads: language, text, end."""
        return [self.tokenizer.language_id(language), *self.encode(f" {text.strip()}"), self.tokenizer.eot]

    def opening(self, language: str, task: str = TEXT) -> list[int]:
        """What the decoder begins with, to write in this language. ``task``: the token of what was read, a text or signs."""
        tokenizer = self.tokenizer
        return [tokenizer.sot, tokenizer.language_id(language), self.ids[task], tokenizer.no_timestamps]

    def encode(self, text: str) -> list[int]:
        """Text to ids; control tokens are never read from it. Raises ``ValueError`` as :meth:`Tokenizer.encode` does."""
        ids: list[int] = []
        for place, part in enumerate(self._known.split(text)):
            ids += [self.ids[part]] if place % 2 else self.tokenizer.encode(part)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text, without control tokens."""
        said: list[str] = []
        for further, run in groupby(ids, lambda id: id >= self.first):
            if further:
                said += [self.tokens[id - self.first] for id in run if id not in self.control]
            else:
                said.append(self.tokenizer.decode(list(run)))
        return "".join(said)
