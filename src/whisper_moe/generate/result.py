"""What a transcription is: words, segments and the whole, as plain frozen values and as txt, vtt, srt, tsv and json.

The files equal openai/whisper's for the same segments: the first four byte for byte; the JSON has that program's keys, in its
order, and further ones of ours behind them. As there, ``-->`` becomes ``->`` in the text of a segment but not in a cue that is
built from timed words. Times are seconds from the start of the recording.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

from whisper_moe.generate.options import SubtitleOptions
from whisper_moe.media.audio import MediaError

FORMATS = ("txt", "vtt", "srt", "tsv", "json")
_LONG_PAUSE = 3.0
"""Seconds of silence that end a subtitle, where subtitles do not follow the segments."""
_UNLIMITED = 1000
"""Characters in a line, and words in a subtitle, where no limit was given."""
_Cue: TypeAlias = tuple[float, float, str]
"""When a subtitle is shown, and what."""


def compression_ratio(text: str) -> float:
    """UTF-8 bytes over zlib's bytes: above about 2.4 a transcript repeats itself (arXiv 2212.04356, section 4.5)."""
    data = text.encode()
    return len(data) / len(zlib.compress(data))


@dataclass(frozen=True, slots=True)
class Word:
    """A word with the punctuation and the leading space that belong to it."""

    start: float
    end: float
    word: str
    probability: float
    """Mean probability of its tokens."""

    def to_dict(self) -> dict[str, Any]:
        return {"word": self.word, "start": self.start, "end": self.end, "probability": self.probability}


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A stretch of speech between two timestamps."""

    id: int
    """Its place in the transcription, counted from 0."""
    seek: int
    """Mel frame (1/100 s) at which the window that it was decoded in begins."""
    start: float
    end: float
    text: str
    tokens: tuple[int, ...]
    """Its tokens, timestamps included."""
    temperature: float
    avg_logprob: float
    """Mean log-probability of the window's tokens."""
    compression_ratio: float
    no_speech_prob: float
    words: tuple[Word, ...] | None = None
    """``None`` unless word timestamps were asked for."""
    language: str | None = None
    """The language of its window, where each has its own."""
    experts: tuple[tuple[str, float], ...] = ()
    """Names and gates of the experts that computed it, *none* included; empty for a dense model."""
    expert_probabilities: tuple[tuple[str, float], ...] | None = None
    """Of every expert and *none*, how probable the router of a merged model finds that its window is theirs."""

    def to_dict(self) -> dict[str, Any]:
        """Keys of openai/whisper first; ``words``, ``language`` and ``expert_probabilities`` where there are any."""
        values = _values(self) | {"tokens": list(self.tokens), "experts": dict(self.experts)}
        if self.words is not None:
            values["words"] = [word.to_dict() for word in self.words]
        if self.expert_probabilities is not None:
            values["expert_probabilities"] = dict(self.expert_probabilities)
        return {key: value for key, value in values.items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Transcription:
    """The transcript of one recording."""

    text: str
    segments: tuple[Segment, ...]
    language: str | None
    """Code of its (first) language; None where nothing was said and none was given."""
    language_probability: float | None = None
    """``None`` where the language was given and not detected."""
    duration: float
    """Seconds of the recording."""
    fallbacks: int = 0
    """Windows that were decoded again because their first transcript looked wrong: with full padding, at another
    temperature, in the recording's main language, or in two halves."""
    source: str | None = None
    """The recording's path or name."""
    damage: str | None = None
    """Why there is no more of it, where a damaged file was read in part; ``duration`` is then that of what was read."""
    notes: tuple[str, ...] = ()
    """What is no damage and yet worth knowing about the file: channels that cancelled out, a silent track beside others."""

    def to_dict(self) -> dict[str, Any]:
        """Keys of openai/whisper first; ``source``, ``damage`` and ``notes`` where there are any."""
        values = _values(self) | {"segments": [segment.to_dict() for segment in self.segments], "notes": [*self.notes]}
        return {key: value for key, value in values.items() if value or key not in ("source", "damage", "notes")}


def _values(record: Segment | Transcription) -> dict[str, Any]:
    return {field.name: getattr(record, field.name) for field in fields(record)}


def mean_gates(segments: Sequence[Segment]) -> tuple[tuple[str, float], ...]:
    """Each expert's gate, averaged over the segments of a transcription."""
    sums: dict[str, float] = {}
    for segment in segments:
        for name, gate in segment.experts:
            sums[name] = sums.get(name, 0.0) + gate / len(segments)
    return tuple(sums.items())


def as_text(result: Transcription, format: str, options: SubtitleOptions) -> str:
    """The file of one of :data:`FORMATS`."""
    if format == "json":
        return json.dumps(result.to_dict(), allow_nan=False)
    if format == "txt":
        return "".join(f"{segment.text.strip()}\n" for segment in result.segments)
    if format == "tsv":
        rows = [(_ms(s.start), _ms(s.end), s.text.strip().replace("\t", " ")) for s in result.segments]
        return "".join(f"{start}\t{end}\t{text}\n" for start, end, text in [("start", "end", "text"), *rows])
    if format not in ("srt", "vtt"):
        raise ValueError(f"no such format: {format!r}; there are {', '.join(FORMATS)}")
    srt = format == "srt"
    blocks = [f"{_clock(a, srt)} --> {_clock(b, srt)}\n{text}\n\n" for a, b, text in _cues(result.segments, options)]
    return "".join(f"{i}\n{block}" for i, block in enumerate(blocks, 1)) if srt else "".join(["WEBVTT\n\n", *blocks])


def _ms(seconds: float) -> int:
    return round(seconds * 1000.0)


def _clock(seconds: float, srt: bool) -> str:
    """``hh:mm:ss,mmm`` in srt; in vtt ``mm:ss.mmm``, with hours from the first one on."""
    minutes, rest = divmod(_ms(seconds), 60_000)
    hours, minutes = divmod(minutes, 60)
    prefix = f"{hours:02d}:" if srt or hours else ""
    return f"{prefix}{minutes:02d}:{rest // 1000:02d}{',' if srt else '.'}{rest % 1000:03d}"


def _cues(segments: Sequence[Segment], options: SubtitleOptions) -> Iterator[_Cue]:
    if any(segment.words is None for segment in segments):
        for segment in segments:
            yield segment.start, segment.end, segment.text.strip().replace("-->", "->")
        return
    for words in _subtitles(segments, options):
        if options.highlight_words:
            yield from _highlighted(words)
        else:
            yield words[0].start, words[-1].end, "".join(word.word for word in words)


def _subtitles(segments: Sequence[Segment], options: SubtitleOptions) -> Iterator[list[Word]]:
    """Group words into subtitles: each word's text holds the line break or the space that goes before it."""
    width = options.max_line_width or _UNLIMITED
    per_subtitle = options.max_words_per_line or _UNLIMITED
    by_segment = options.max_line_count is None or options.max_line_width is None
    subtitle: list[Word] = []
    line, lines, previous = 0, 1, 0.0
    for place, word in ((i, word) for segment in segments for i, word in enumerate(segment.words or ())):
        pause = not by_segment and word.start - previous > _LONG_PAUSE
        segment_break = by_segment and bool(subtitle) and place % per_subtitle == 0
        text = word.word
        if line > 0 and line + len(text) <= width and not pause and not segment_break:
            line += len(text)
        else:
            full = options.max_line_count is not None and lines >= options.max_line_count
            text = text.strip()
            if segment_break or (subtitle and (pause or full)):
                yield subtitle
                subtitle, lines = [], 1
            elif line > 0:
                lines += 1
                text = "\n" + text
            line = len(text.strip())
        subtitle.append(Word(word.start, word.end, text, word.probability))
        previous = word.start
    if subtitle:
        yield subtitle


def _highlighted(words: Sequence[Word]) -> Iterator[_Cue]:
    """A cue for each word, underlined, and one without underline for each gap between words."""
    texts = [word.word for word in words]
    shown = words[0].start
    for i, word in enumerate(words):
        if _ms(shown) != _ms(word.start):
            yield shown, word.start, "".join(texts)
        underlined = re.sub(r"^(\s*)(.*)$", r"\1<u>\2</u>", word.word)  # the white space before it is left outside
        yield word.start, word.end, "".join([*texts[:i], underlined, *texts[i + 1 :]])
        shown = word.end


@dataclass(frozen=True)
class Outcome:
    """What became of one recording: a transcription, or the error that its file made."""

    name: str
    transcription: Transcription | None
    error: MediaError | None
    partial: Transcription | None = None
    """Beside an error: what was said before the damage."""
    index: int = 0
    """The recording's place among those given."""


def by_index(outcomes: Iterable[Outcome]) -> Iterator[Outcome]:
    """Each outcome behind all those of the recordings before it."""
    early: dict[int, Outcome] = {}
    due = 0
    for outcome in outcomes:
        early[outcome.index] = outcome
        while due in early:
            yield early.pop(due)
            due += 1
