"""Film in: any file that FFmpeg reads becomes RGB frames at an even rate (PyAV; no torch). And how long a header says.

Frames are sampled by their timestamps, so a variable frame rate keeps its time: at k / rate seconds, counted from the
first frame, stands the frame that a player would be showing. The rotation that a phone notes is applied. Sizes and
numbers are limited while decoding, since a kilobyte may hold a gigabyte. Every failure is one :class:`MediaError`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from fractions import Fraction
from math import ceil, prod
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from numpy.typing import NDArray

from whisper_moe.config import SAMPLE_RATE
from whisper_moe.media import containers
from whisper_moe.media.audio import MediaError, load_audio
from whisper_moe.media.containers import Damage
from whisper_moe.media.tracks import open_container

if TYPE_CHECKING:
    from av import Packet, VideoFrame, VideoStream
    from av.container import InputContainer

Frames = NDArray[np.uint8]

CODECS = frozenset((
    "av1", "cinepak", "dnxhd", "dvvideo", "ffv1", "flv", "h263", "h264", "hevc", "huffyuv", "libdav1d", "mjpeg",
    "mpeg1video", "mpeg2video", "mpeg4", "msmpeg4", "msmpeg4v2", "png", "prores", "qtrle", "rawvideo", "theora", "vc1",
    "vp6f", "vp8", "vp9", "wmv1", "wmv2", "wmv3",
))  # fmt: skip
"""Decoders that may be used: film only, so a film's sound is never decoded."""
MAX_PIXELS = 4_096 * 2_304
"""Of one frame: 4K."""
MAX_DECODED = 20_000
"""Frames decoded of one file, whether they are kept or not: eleven minutes at 30 a second."""
MAX_BYTES = 1 << 30
"""RGB kept of one file."""
MAX_RATE = 1_000.0
SLACK = Fraction(1, 1_000)
"""Containers round timestamps (Matroska to milliseconds): a frame that comes this much late, in seconds, is on time."""


def load_frames(
    source: str | Path | BinaryIO,
    *,
    rate: float,
    short_side: int | None = None,
    name: str | None = None,
    max_pixels: int = MAX_PIXELS,
    max_decoded: int = MAX_DECODED,
    max_bytes: int = MAX_BYTES,
) -> Frames:
    """RGB frames at ``rate`` a second, uint8 [frames, height, width, 3]; at least one.

    Of n seconds there are ⌈n · rate⌉ frames. Frame k is the one that stands at k / rate seconds after the first; of
    frames with one timestamp, the last.

    :param source: a path (never a URL), or a seekable binary stream.
    :param short_side: pixels of the shorter side, to which larger frames are reduced with their proportions; ``None``
        keeps the size.
    :param max_pixels: a larger frame raises, before it is decoded where the header tells.
    :param max_decoded: more frames raise, kept or not.
    :param max_bytes: more bytes of RGB raise.
    :raises MediaError: for a file that is missing, unreadable, without a film (sound only, cover art only), without a
        frame, cut off or damaged, whose timestamps run backwards, or whose size changes on the way.
    """
    if not 0 < rate <= MAX_RATE:
        raise ValueError(f"rate must be above 0 and at most {MAX_RATE:g} frames a second, got {rate}")
    if short_side is not None and short_side < 1:
        raise ValueError(f"short_side must be at least one pixel, got {short_side}")
    kept: list[Frames] = []
    size = 0
    with _opened(source, name, CODECS) as (container, file):
        film = _Film(container, file, max_pixels, max_decoded)
        for frame, copies in _sampled(film, rate):
            size += copies * 3 * prod(_size(frame, short_side))
            if size > max_bytes:
                raise Damage(f"more than the limit of {max_bytes:,} bytes of pictures")
            kept += [_picture(frame, short_side)] * copies
        _check_whole(file)
        if not kept:
            raise Damage("it has a film track, and no frame in it")
    return np.stack(kept)


def header_seconds(source: str | Path | BinaryIO, *, name: str | None = None) -> float:
    """How long a recording is, sound if there is any, else film: as its header states, which costs no decoding.

    A format that states nothing is decoded. Raises ``MediaError`` for a file that cannot be opened or is cut off.
    """
    with _opened(source, name, containers.CODECS | CODECS) as (container, file):
        tracks = [*container.streams.audio, *containers.film_tracks(container)]
        if not tracks:
            raise Damage("it has neither sound nor film")
        _check_whole(file)
        first = tracks[0]
        if first.duration and first.time_base:
            late = (first.start_time or 0) * first.time_base - Fraction(container.start_time or 0, 1_000_000)
            return float(first.duration * first.time_base + max(late, 0))
        if container.duration:
            return container.duration / 1_000_000
    return len(load_audio(source, name=name)) / SAMPLE_RATE


@contextmanager
def _opened(
    source: str | Path | BinaryIO, name: str | None, codecs: frozenset[str]
) -> Iterator[tuple[InputContainer, BinaryIO]]:
    """The container and its bytes; whatever goes wrong while they are open becomes a :class:`MediaError`."""
    is_path = isinstance(source, str | os.PathLike)
    name = name or (str(source) if is_path else str(getattr(source, "name", "<stream>")))
    try:
        with open(source, "rb") if is_path else nullcontext(source) as file, open_container(file, codecs) as container:
            yield container, file
    except containers.causes() as error:
        raise MediaError(name, _cause(error)) from error


def _cause(error: Exception) -> str:
    from av.error import FFmpegError

    if isinstance(error, OSError) and error.strerror and not isinstance(error, FFmpegError):
        return error.strerror[0].lower() + error.strerror[1:]
    if isinstance(error, FFmpegError):
        return f"FFmpeg cannot read it: {error.strerror}"
    if isinstance(error, IndexError):
        return containers.LATE_TRACK
    return str(error) or type(error).__name__


def _check_whole(file: BinaryIO) -> None:
    if missing := containers.missing_bytes(file):
        raise Damage(f"the file is cut off: at least {missing:,} bytes that it announces are missing")


class _Film:
    """One pass over one film track."""

    def __init__(self, container: InputContainer, file: BinaryIO, max_pixels: int, max_decoded: int) -> None:
        self.container, self.file, self.max_pixels, self.max_decoded = container, file, max_pixels, max_decoded
        self.stream = _film_track(container)
        context = self.stream.codec_context
        self._check_size(context.width, context.height)
        # FFmpeg counts what it allocates: rows that are rounded up. What is exact is checked on every frame.
        context.options = {"max_pixels": str(2 * max_pixels + 65_536)}
        rate = self.stream.average_rate or self.stream.guessed_rate
        self.usual = 1 / rate if rate else Fraction(0)
        self.shape: tuple[int, int, int] | None = None
        self.end: Fraction | None = None
        """When the latest frame ends."""

    def frames(self) -> Iterator[tuple[VideoFrame, Fraction]]:
        """Decoded frames in the order in which they are shown, each with its time in seconds."""
        latest, count = None, 0
        for packet in self.container.demux(self.stream):
            for frame in self._decoded(packet):
                count += 1
                if count > self.max_decoded:
                    raise Damage(f"more than the limit of {self.max_decoded:,} frames")
                time = self._time(frame)
                if latest is not None and time < latest:
                    raise Damage(f"its timestamps run backwards, from {float(latest):.3f} s to {float(time):.3f} s")
                self._check_shape(frame, time)
                lasts = frame.duration * frame.time_base if frame.duration and frame.time_base else self.usual
                self.end = time + lasts
                latest = time
                yield frame, time

    def _decoded(self, packet: Packet[VideoStream]) -> list[VideoFrame]:
        from av.error import FFmpegError

        try:
            frames = packet.decode()
        except FFmpegError:
            frames = None
        if frames is None or any(frame.is_corrupt for frame in frames):
            _check_whole(self.file)
            raise Damage(f"the film is damaged{'' if self.end is None else f' at {float(self.end):.2f} s'}")
        return frames

    def _time(self, frame: VideoFrame) -> Fraction:
        """By the frame's own timestamp; where it has none, the end of the one before."""
        if frame.pts is not None and frame.time_base:
            return frame.pts * frame.time_base
        if self.end is not None and not self.usual:
            raise Damage("its frames have no timestamps, and it states no frame rate")
        return Fraction(0) if self.end is None else self.end

    def _check_shape(self, frame: VideoFrame, time: Fraction) -> None:
        self._check_size(frame.width, frame.height)
        shape = (frame.width, frame.height, frame.rotation % 360)
        if self.shape is not None and shape != self.shape:
            was, now = (f"{width}×{height} turned by {turn}°" for width, height, turn in (self.shape, shape))
            raise Damage(f"its pictures change from {was} to {now} at {float(time):.2f} s")
        self.shape = shape

    def _check_size(self, width: int, height: int) -> None:
        if width * height > self.max_pixels:
            raise Damage(f"frames of {width}×{height} are over the limit of {self.max_pixels:,} pixels")


def _film_track(container: InputContainer) -> VideoStream:
    """FFmpeg's best film track, or the first whose codec is allowed; cover art is none."""
    from av.stream import Discard

    tracks = containers.film_tracks(container)
    if not tracks:
        raise Damage("it has no film track" + (", only a cover picture" if container.streams.video else ""))
    readable = [track for track in tracks if track.codec_context and track.codec_context.name in CODECS]
    if not readable:
        codecs = sorted({track.codec_context.name if track.codec_context else "unknown" for track in tracks})
        raise Damage(f"its film is in a codec that is not read ({', '.join(codecs)})")
    best = container.streams.best("video")
    film = next((track for track in readable if track is best), readable[0])
    for other in container.streams:
        other.discard = Discard.default if other is film else Discard.all
    return film


def _sampled(film: _Film, rate: float) -> Iterator[tuple[VideoFrame, int]]:
    """Each frame with the number of sample times k / rate at which it stands, if there is one."""
    step, taken = Fraction(rate), 0
    standing: VideoFrame | None = None
    first = Fraction(0)
    for frame, time in film.frames():
        if standing is None:
            first = time
        elif (until := ceil((time - first - SLACK) * step)) > taken:
            yield standing, until - taken
            taken = until
        standing = frame
    if standing is not None and film.end is not None:
        until = max(1, ceil((film.end - first - SLACK) * step))
        if until > taken:
            yield standing, until - taken


def _size(frame: VideoFrame, short_side: int | None) -> tuple[int, int]:
    """Width and height that a frame is reduced to, before it is turned."""
    scale = min(1.0, short_side / min(frame.width, frame.height)) if short_side else 1.0
    return max(1, round(frame.width * scale)), max(1, round(frame.height * scale))


def _picture(frame: VideoFrame, short_side: int | None) -> Frames:
    """RGB [height, width, 3], the way up that the file says."""
    if frame.rotation % 90:
        raise Damage(f"its pictures are turned by {frame.rotation}°, which is no quarter turn")
    width, height = _size(frame, short_side)
    upright = frame.reformat(width, height, format="rgb24").to_ndarray().astype(np.uint8, copy=False)
    return np.rot90(upright, frame.rotation // 90)
