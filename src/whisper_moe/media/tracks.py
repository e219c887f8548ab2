"""A file of sound or film, opened: within the allow-lists, whatever it is called; which of its sound tracks is read, and
by what clock."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, BinaryIO

from whisper_moe.media import containers
from whisper_moe.media.containers import Damage
from whisper_moe.media.languages import spoken_code

if TYPE_CHECKING:
    from av import AudioStream
    from av.container import InputContainer

MIN_RATE, MAX_RATE = 1_000, 768_000
"""Sample rates (Hz) that are believed. One sample a second would turn a kilobyte into sixteen megasamples."""
MAX_CHANNELS = 64
PROBE_BYTES, PROBE_MICROSECONDS = 64 << 20, 3_600_000_000
"""How far into an MPEG program stream without sound so far FFmpeg looks for it: that has no list of its tracks."""


GAP_SECONDS = 0.1
"""Timestamps that run further ahead of the samples leave something out; as FFmpeg's ``aresample`` (``min_hard_comp``) has it.
In Ogg that is a missing page (the shortest common one holds 0.2 s)."""
RESET_SECONDS = 10.0
"""Timestamps that fall back by more begin anew (joined files; FFmpeg's ``dts_delta_threshold``); by less, they overlap."""
MAX_SILENCE_SECONDS = 4 * 3_600.0
"""Silence that timestamps are believed, in all: damaged ones may ask for days."""
MICROSECONDS = 1_000_000
"""FFmpeg's units of a container's times in a second."""


class _NamelessFile:
    """What FFmpeg sees of a file: bytes. A name would let it guess the format by the extension."""

    def __init__(self, file: BinaryIO) -> None:
        self.read, self.seek, self.tell = file.read, file.seek, file.tell


def open_container(file: BinaryIO, codecs: Collection[str]) -> InputContainer:
    """Let FFmpeg sniff the format and read the header, within :data:`containers.CONTAINERS` and these codecs."""
    import av
    from av.error import ArgumentError, EOFError, InvalidDataError

    if file.seek(0, os.SEEK_END) == 0:
        raise Damage("the file is empty")
    file.seek(0)
    options = {
        "format_whitelist": containers.CONTAINERS,
        "codec_whitelist": ",".join(sorted(codecs)),
        "protocol_whitelist": "file",
    }
    try:
        container = av.open(_NamelessFile(file), "r", options=options, metadata_errors="ignore")
        if container.format.name == "mpeg" and not container.streams.audio:
            container.close()
            file.seek(0)
            options |= {"probesize": str(PROBE_BYTES), "analyzeduration": str(PROBE_MICROSECONDS)}
            container = av.open(_NamelessFile(file), "r", options=options, metadata_errors="ignore")
        return container
    except ArgumentError:
        raise Damage("a playlist, or another format that is not opened as sound or film") from None
    except (InvalidDataError, EOFError):
        if containers.lacks_index(file):
            raise Damage("its index (moov) is missing: the recording was cut off before it was finished") from None
        raise Damage("not sound or film in a format that can be read, or its header is damaged") from None


def sound_track(container: InputContainer, wanted: int | str | None = None) -> AudioStream:
    """The track of that number or language; by default FFmpeg's best, or the first whose codec is allowed."""
    tracks = container.streams.audio
    if not tracks:
        raise Damage("it has no sound track")
    named = list(tracks) if wanted is None else _wanted(tracks, wanted)
    readable = [track for track in named if _codec(track) in containers.CODECS]
    if not readable:
        others = "" if len(tracks) == len(named) else f"; its sound tracks are {_list(tracks)}"
        raise Damage(f"its sound is in a codec that is not read ({', '.join(sorted(set(map(_codec, named))))}){others}")
    best = container.streams.best("audio") if wanted is None else None
    track = next((track for track in readable if track is best), readable[0])
    if container.format.name not in containers.STREAMS:  # their frames say it, each for itself
        check_shape(track.codec_context.sample_rate, track.codec_context.layout.nb_channels)
    return track


def other_tracks(container: InputContainer, silent: AudioStream) -> str:
    """What to say where the track that was read is silent; nothing where there is no other."""
    tracks = container.streams.audio
    others = [track for track in tracks if track is not silent]
    if not others:
        return ""
    return f"its sound track {_list(tracks, silent)} is silent, and was chosen by default; there is also {_list(tracks, *others)}"


def _wanted(tracks: Sequence[AudioStream], wanted: int | str) -> list[AudioStream]:
    if str(wanted).isdecimal():
        found = list(tracks[int(wanted) : int(wanted) + 1])
    else:
        found = [
            track for track in tracks if track.language and spoken_code(track.language) == spoken_code(str(wanted))
        ]
    if not found:
        raise Damage(f"it has no sound track {wanted!r}; its sound tracks are {_list(tracks)}")
    return found


def _codec(track: AudioStream) -> str:
    return track.codec_context.name if track.codec_context else "unknown"


def _list(tracks: Sequence[AudioStream], *only: AudioStream) -> str:
    """``0 (hin, aac), 1 (eng, ac3, Commentary)``."""
    said = [(track.language or "und", _codec(track), track.metadata.get("title")) for track in tracks]
    numbered = [f"{n} ({', '.join(filter(None, facts))})" for n, facts in enumerate(said)]
    return ", ".join(text for text, track in zip(numbered, tracks, strict=True) if not only or track in only)


def check_shape(rate: int, channels: int) -> None:
    if not MIN_RATE <= rate <= MAX_RATE:
        raise Damage(f"a sample rate of {rate} Hz is not believed; {MIN_RATE} to {MAX_RATE} Hz are read")
    if not 1 <= channels <= MAX_CHANNELS:
        raise Damage(f"{channels} channels, or a count that FFmpeg refuses; 1 to {MAX_CHANNELS} are read")


class Clock:
    """Keeps the samples on the container's time, which players count from its start: what of it has no sound is silence."""

    def __init__(self, container: InputContainer, stream: AudioStream, note: Callable[[str], object] = str) -> None:
        self.format, self.note = container.format.name, note
        self.zero = (container.start_time or 0) / MICROSECONDS
        # A track's own duration is a guess by the bit rate where the format, as Matroska, states only that of the whole.
        guessed = self.format in ("flv", "matroska,webm") and stream.duration
        self.end = self.zero + container.duration / MICROSECONDS if container.duration and not guessed else math.inf
        self.sound = self.silence = 0.0
        self.expected: float | None = None
        """Where the next frame is to start, by the file's timestamps."""

    @property
    def now(self) -> float:
        """Seconds handed out."""
        return self.sound + self.silence

    def missing(self, start: float | None, seconds: float) -> float:
        """The silence before a frame that lasts ``seconds`` and whose timestamp is ``start``; both are then counted."""
        silence = 0.0 if start is None else self._silence_until(start)
        start = self.expected if start is None else start
        self.expected = None if start is None else start + seconds
        self.silence += silence
        self.sound += seconds
        return silence

    def _silence_until(self, start: float) -> float:
        late = start - self.zero - self.now
        if self.expected is not None:
            if self.format == "ogg" and start > self.expected + GAP_SECONDS:
                raise Damage(f"the sound is damaged: {start - self.expected:.2f} s of it are missing")
            if self.format not in containers.CLOCKED:
                return 0.0
            if start < self.expected - RESET_SECONDS:
                self.zero += late
                return 0.0
        elif self.format in containers.STREAMS - containers.CLOCKED:
            return 0.0
        if late <= GAP_SECONDS:
            return 0.0
        if start > self.end + GAP_SECONDS or self.silence + late > MAX_SILENCE_SECONDS:
            self.note(f"its timestamps jump by {late:.1f} s at {self.now:.1f} s, which is not believed")
            self.zero += late
            return 0.0
        return late
