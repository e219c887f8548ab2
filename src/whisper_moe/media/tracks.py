"""A file of sound or film, opened: within the allow-lists, whatever it is called; and which of its sound tracks is read."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import TYPE_CHECKING, BinaryIO

from whisper_moe.media import containers
from whisper_moe.media.containers import Damage

if TYPE_CHECKING:
    from av import AudioStream
    from av.container import InputContainer

MIN_RATE, MAX_RATE = 1_000, 768_000
"""Sample rates (Hz) that are believed. One sample a second would turn a kilobyte into sixteen megasamples."""
MAX_CHANNELS = 64
PROBE_BYTES, PROBE_MICROSECONDS = 64 << 20, 3_600_000_000
"""How far into an MPEG program stream without sound so far FFmpeg looks for it: that has no list of its tracks."""


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


def sound_track(container: InputContainer) -> AudioStream:
    """FFmpeg's best sound track, or the first whose codec is allowed."""
    tracks = container.streams.audio
    if not tracks:
        raise Damage("it has no sound track")
    readable = [track for track in tracks if track.codec_context and track.codec_context.name in containers.CODECS]
    if not readable:
        codecs = sorted({track.codec_context.name if track.codec_context else "unknown" for track in tracks})
        raise Damage(f"its sound is in a codec that is not read ({', '.join(codecs)})")
    best = container.streams.best("audio")
    track = next((track for track in readable if track is best), readable[0])
    if container.format.name not in containers.STREAMS:  # their frames say it, each for itself
        check_shape(track.codec_context.sample_rate, track.codec_context.layout.nb_channels)
    return track


def check_shape(rate: int, channels: int) -> None:
    if not MIN_RATE <= rate <= MAX_RATE:
        raise Damage(f"a sample rate of {rate} Hz is not believed; {MIN_RATE} to {MAX_RATE} Hz are read")
    if not 1 <= channels <= MAX_CHANNELS:
        raise Damage(f"{channels} channels, or a count that FFmpeg refuses; 1 to {MAX_CHANNELS} are read")
