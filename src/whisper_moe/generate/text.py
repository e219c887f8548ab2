"""Transcripts as text: txt, vtt, srt, tsv and json, equal to openai/whisper's own files for the same segments.

The first four are equal byte for byte; the JSON has that program's keys and values and further keys of ours (see
:mod:`whisper_moe.generate.result`). As there, ``-->`` becomes ``->`` in the text of a segment but not in a cue that is
built from timed words.
"""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from whisper_moe.generate.result import Segment, Transcription, Word
from whisper_moe.weights.files import atomic_file

_LONG_PAUSE = 3.0
"""Seconds of silence that end a subtitle, where subtitles do not follow the segments."""
_LONGEST_NAME = 230
"""Bytes of a file name without what is put behind it; file systems take 255 in all."""
_UNLIMITED = 1000
"""Characters in a line, and words in a subtitle, where no limit was given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SubtitleOptions:
    """How timed words are laid out in vtt and srt; without word timestamps nothing here has an effect."""

    highlight_words: bool = False
    """A cue for every word, in which it is underlined."""
    max_line_width: int | None = None
    """Characters in a line."""
    max_line_count: int | None = None
    """Lines in a subtitle; with ``max_line_width``, subtitles no longer break where segments do."""
    max_words_per_line: int | None = None
    """Words in a subtitle; no effect where subtitles do not break with the segments."""

    def __post_init__(self) -> None:
        for name in ("max_line_width", "max_line_count", "max_words_per_line"):
            value: int | None = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: it must be at least 1")


@dataclass(frozen=True, slots=True)
class _Cue:
    """What a subtitle shows, and when, in milliseconds."""

    start: int
    end: int
    text: str


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000.0)


def format_timestamp(seconds: float, *, hours: bool = False, decimal_mark: str = ".") -> str:
    """``[hh:]mm:ss.mmm``; hours are written from the first one on, or always with ``hours=True``."""
    return _format_milliseconds(_milliseconds(seconds), hours=hours, decimal_mark=decimal_mark)


def _format_milliseconds(time: int, *, hours: bool, decimal_mark: str) -> str:
    if time < 0:
        raise ValueError(f"a subtitle cannot begin or end {-time} ms before the recording")
    minutes, rest = divmod(time, 60_000)
    whole_hours, minutes = divmod(minutes, 60)
    prefix = f"{whole_hours:02d}:" if hours or whole_hours else ""
    return f"{prefix}{minutes:02d}:{rest // 1000:02d}{decimal_mark}{rest % 1000:03d}"


def _segment_cues(segments: Sequence[Segment]) -> Iterator[_Cue]:
    for segment in segments:
        text = segment.text.strip().replace("-->", "->")
        yield _Cue(_milliseconds(segment.start), _milliseconds(segment.end), text)


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


def _underlined(words: Sequence[Word], chosen: int) -> str:
    """The subtitle with one word between ``<u>`` and ``</u>``, the white space before it left outside."""
    underline = re.sub(r"^(\s*)(.*)$", r"\1<u>\2</u>", words[chosen].word)
    return "".join(underline if i == chosen else word.word for i, word in enumerate(words))


def _highlighted(words: Sequence[Word]) -> Iterator[_Cue]:
    """A cue for each word, and one without underline for each gap between words."""
    text = "".join(word.word for word in words)
    shown = _milliseconds(words[0].start)
    for i, word in enumerate(words):
        start, end = _milliseconds(word.start), _milliseconds(word.end)
        if shown != start:
            yield _Cue(shown, start, text)
        yield _Cue(start, end, _underlined(words, i))
        shown = end


def _cues(segments: Sequence[Segment], options: SubtitleOptions) -> Iterator[_Cue]:
    if not segments or any(segment.words is None for segment in segments):
        yield from _segment_cues(segments)
        return
    for words in _subtitles(segments, options):
        if options.highlight_words:
            yield from _highlighted(words)
        else:
            text = "".join(word.word for word in words)
            yield _Cue(_milliseconds(words[0].start), _milliseconds(words[-1].end), text)


def _write_txt(result: Transcription, stream: TextIO, options: SubtitleOptions) -> None:
    for segment in result.segments:
        stream.write(f"{segment.text.strip()}\n")


def _write_vtt(result: Transcription, stream: TextIO, options: SubtitleOptions) -> None:
    stream.write("WEBVTT\n\n")
    for cue in _cues(result.segments, options):
        start, end = (_format_milliseconds(time, hours=False, decimal_mark=".") for time in (cue.start, cue.end))
        stream.write(f"{start} --> {end}\n{cue.text}\n\n")


def _write_srt(result: Transcription, stream: TextIO, options: SubtitleOptions) -> None:
    for number, cue in enumerate(_cues(result.segments, options), start=1):
        start, end = (_format_milliseconds(time, hours=True, decimal_mark=",") for time in (cue.start, cue.end))
        stream.write(f"{number}\n{start} --> {end}\n{cue.text}\n\n")


def _write_tsv(result: Transcription, stream: TextIO, options: SubtitleOptions) -> None:
    stream.write("start\tend\ttext\n")
    for segment in result.segments:
        text = segment.text.strip().replace("\t", " ")
        stream.write(f"{_milliseconds(segment.start)}\t{_milliseconds(segment.end)}\t{text}\n")


def _write_json(result: Transcription, stream: TextIO, options: SubtitleOptions) -> None:
    json.dump(result.to_dict(), stream, allow_nan=False)


_WRITERS: dict[str, Callable[[Transcription, TextIO, SubtitleOptions], None]] = {
    "txt": _write_txt,
    "vtt": _write_vtt,
    "srt": _write_srt,
    "tsv": _write_tsv,
    "json": _write_json,
}
FORMATS: tuple[str, ...] = tuple(_WRITERS)
"""Formats, each also the extension of its files; ``all`` stands for every one of them."""


def expand_formats(formats: Iterable[str]) -> tuple[str, ...]:
    """Every format once, in the order given, with ``all`` spelt out; ``ValueError`` for an unknown one."""
    wanted = [name for given in formats for name in (FORMATS if given == "all" else (given,))]
    for name in wanted:
        if name not in _WRITERS:
            raise ValueError(f"unknown output format {name!r}: one of {', '.join(FORMATS)}, all")
    return tuple(dict.fromkeys(wanted))


def write(result: Transcription, format: str, stream: TextIO, options: SubtitleOptions = SubtitleOptions()) -> None:
    """Write one format (not ``all``) to a stream of text. Raises ``ValueError`` for an unknown format."""
    if format not in _WRITERS:
        raise ValueError(f"unknown output format {format!r}: one of {', '.join(FORMATS)}")
    _WRITERS[format](result, stream, options)


def save(
    result: Transcription,
    directory: Path,
    stem: str,
    formats: Iterable[str],
    options: SubtitleOptions = SubtitleOptions(),
) -> list[Path]:
    """Write ``directory/stem.format`` for each format and return the paths; the directory is made if there is none.

    A file appears whole or not at all, and replaces an older one. Raises ``ValueError`` for an unknown format and for
    a stem that is no plain file name, ``OSError`` where the disk refuses.
    """
    wanted = expand_formats(formats)
    if not stem or stem in {".", ".."} or re.search(r"[/\\\0]", stem):
        raise ValueError(f"{stem!r} is not a file name to write a transcript to")
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"{stem}.{name}" for name in wanted]
    for name, path in zip(wanted, paths, strict=True):
        with atomic_file(path) as scratch, scratch.open("x", encoding="utf-8") as stream:
            write(result, name, stream, options)
    return paths


def output_names(paths: Sequence[Path | str]) -> list[str]:
    """A file name without extension for each input, none given twice: the input's own, then ``name-2``, ``name-3`` …

    Names that differ only in case or Unicode form count as equal, as some file systems take them. Standard input,
    ``-``, is called ``stdin``. The same list always gives the same names, and so does one that has grown at its end, unless
    it now holds ``name-2`` itself.
    """
    stems = ["stdin" if str(path) == "-" else _stem(Path(path)) for path in paths]
    reserved = {_file_key(stem) for stem in stems}
    given: set[str] = set()
    names: list[str] = []
    for stem in stems:
        name, number = stem, 2
        while _file_key(name) in given or (name != stem and _file_key(name) in reserved):
            name, number = f"{stem}-{number}", number + 1
        given.add(_file_key(name))
        names.append(name)
    return names


def _stem(path: Path) -> str:
    """A file name without extension, short enough to put something behind it, and a file name on every system."""
    stem = path.stem.replace("\\", "_")
    name = os.fsencode(stem)
    return stem if len(name) <= _LONGEST_NAME else name[:_LONGEST_NAME].decode(errors="ignore")


def _file_key(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
