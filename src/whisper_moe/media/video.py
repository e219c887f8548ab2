"""Film in: any file that FFmpeg reads becomes RGB frames at an even rate (PyAV; no torch). And how long a header says.

Frames are sampled by their timestamps, so a variable frame rate keeps its time: at k / rate seconds, counted from the
first frame, stands the frame that a player would be showing. The rotation that a phone notes is applied. Sizes and
numbers are limited while decoding, since a kilobyte may hold a gigabyte. Every failure is one :class:`MediaError`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from math import ceil, isqrt, prod, sqrt
from typing import TypeAlias

import numpy as np
from av import VideoFrame, VideoStream
from numpy.typing import NDArray

from whisper_moe.config import SAMPLE_RATE
from whisper_moe.config_aside import FilmConfig
from whisper_moe.media.audio import load_audio
from whisper_moe.media.containers import FILM_CODECS, MICROSECONDS, SOUND_CODECS, Damage, File, Reader, codec_of, opened

Frames = NDArray[np.uint8]

MAX_PIXELS = 4_096 * 2_304
"""Of one frame, 4K; refused before it is decoded where the header tells."""
MAX_DECODED = 20_000
"""Frames decoded of one file, whether they are kept or not: eleven minutes at 30 a second."""
MAX_BYTES = 1 << 30
"""RGB kept of one file."""
SLACK = Fraction(1, 1_000)
"""Containers round timestamps (Matroska to milliseconds): a frame that comes this much late, in seconds, is on time."""


Fit: TypeAlias = "Callable[[int, int], tuple[int, int]]"
"""Width and height of an upright picture to those that it is kept with."""


def load_film(source: File, film: FilmConfig, *, name: str | None = None, fit: Fit | None = None) -> Frames:
    """RGB pictures, uint8 [frames, height, width, 3]; at least one.

    Of n seconds there are ⌈n · rate⌉. Picture k is the one that stands at k / rate seconds after the first; of those with one
    timestamp, the last. Of a film that is longer than its tokens reach, fewer a second (at most four times what they need), so
    that memory does not grow with its length.

    :param source: a path (never a URL), or a seekable binary stream.
    :param fit: by default both sides become multiples of the patch, as :func:`tubelets` takes them.
    :raises MediaError: for a file that is missing, unreadable, without a film (sound only, cover art only), without a
        frame, over a limit of this module, cut off or damaged, whose timestamps run backwards, or whose size changes.
    """

    def tiled(width: int, height: int) -> tuple[int, int]:
        rows, columns = grid(width, height, film.patches)
        return columns * film.patch, rows * film.patch

    with opened(source, name, FILM_CODECS) as reader:
        return _kept(_film_track(reader), reader, film.rate, fit or tiled, 4 * film.slots * film.frames)


def grid(width: int, height: int, patches: int) -> tuple[int, int]:
    """Rows and columns of at most so many patches, in about the proportions of a picture; turned, the same ones turned."""
    if width < height:
        columns, rows = grid(height, width, patches)
        return rows, columns
    rows = max(1, min(isqrt(patches), round(sqrt(patches * height / width))))
    return rows, min(patches // rows, round(rows * width / height))


def film_tokens(source: File, film: FilmConfig, *, name: str | None = None) -> int:
    """How many tubelets a film becomes, as its header states; the most, where that does not say how long it is. Raises
    ``MediaError`` for a file that cannot be opened or has no film."""
    with opened(source, name, FILM_CODECS) as reader:
        track, whole = _film_track(reader), reader.container.duration
        stated = track.duration * track.time_base if track.duration and track.time_base else None
        seconds = float(stated if stated is not None else Fraction(whole or 0, MICROSECONDS))
        rows, columns = grid(track.codec_context.width or 1, track.codec_context.height or 1, film.patches)
    slots = ceil(ceil(seconds * film.rate) / film.frames) if seconds > 0 else film.slots
    return rows * columns * min(film.slots, max(1, slots))


def tubelets(frames: Frames, film: FilmConfig) -> Frames:
    """Pictures [frames, height, width, 3] cut into [time, rows, columns, values]; of too many, some at even distances. The last
    tubelet is filled up with the last picture."""
    most, deep, side = film.slots * film.frames, film.frames, film.patch
    if len(frames) > most:
        frames = frames[np.arange(most) * len(frames) // most]
    frames = np.concatenate([frames, frames[-1:].repeat(-len(frames) % deep, 0)])
    count, height, width, _ = frames.shape
    cut = frames.reshape(count // deep, deep, height // side, side, width // side, side, 3)
    return np.ascontiguousarray(cut.transpose(0, 2, 4, 1, 3, 5, 6)).reshape(*cut.shape[::2][:3], -1)


def _kept(film: VideoStream, reader: Reader, rate: float, fit: Fit, most: int) -> Frames:
    """The pictures that stand at the sample times; of more than ``most``, every second, every fourth … of these. Raises
    ``Damage`` where there is none, or too much of them."""
    kept: list[Frames] = []
    every, seen = 1, 0
    for frame, copies in _sampled(film, reader, rate):
        wanted = len(range(-seen % every, copies, every))
        seen += copies
        if (min(wanted, most) + len(kept)) * 3 * prod(_size(frame, fit)) > MAX_BYTES:
            raise Damage(f"more than the limit of {MAX_BYTES:,} bytes of pictures")
        kept += [_picture(frame, fit)] * wanted if wanted else []
        while len(kept) > most:
            kept, every = kept[::2], 2 * every
    if not kept:
        raise Damage("it has a film track, and no frame in it")
    return np.stack(kept)


def header_seconds(source: File, *, name: str | None = None) -> float:
    """How long a recording is, sound if there is any, else film: as its header states, which costs no decoding.

    A format that states nothing is decoded. Raises ``MediaError`` for a file that cannot be opened or is cut off.
    """
    with opened(source, name, SOUND_CODECS | FILM_CODECS) as reader:
        tracks = [*reader.container.streams.audio, *reader.films]
        if not tracks:
            raise Damage("it has neither sound nor film")
        reader.check_whole()
        track = tracks[0]
        if track.duration and track.time_base:
            late = (track.start_time or 0) * track.time_base - Fraction(reader.container.start_time or 0, MICROSECONDS)
            return float(track.duration * track.time_base + max(late, 0))
        if reader.container.duration:
            return reader.container.duration / MICROSECONDS
    return len(load_audio(source, name=name)) / SAMPLE_RATE


def _film_track(reader: Reader) -> VideoStream:
    """FFmpeg's best film track, or the first whose codec is allowed; cover art is none."""
    films, best = reader.films, reader.container.streams.best("video")
    if not films:
        raise Damage("it has no film track" + (", only a cover picture" if reader.container.streams.video else ""))
    readable = [film for film in films if codec_of(film) in FILM_CODECS]
    if not readable:
        raise Damage(f"its film is in a codec that is not read ({', '.join(sorted(set(map(codec_of, films))))})")
    return next((film for film in readable if film is best), readable[0])


def _timed(film: VideoStream, reader: Reader) -> Iterator[tuple[VideoFrame, Fraction, Fraction]]:
    """Decoded frames in the order in which they are shown, each with its begin and its end in seconds."""
    context, rate = film.codec_context, film.average_rate or film.guessed_rate
    _check_size(context.width, context.height)
    # FFmpeg counts what it allocates: rows that are rounded up. What is exact is checked on every frame.
    context.options = {"max_pixels": str(2 * MAX_PIXELS + 65_536)}
    begin = end = shape = None
    for count, frame in enumerate(reader.frames(film), start=1):
        if count > MAX_DECODED:
            raise Damage(f"more than the limit of {MAX_DECODED:,} frames")
        before, begin = begin, end or Fraction(0)  # the end of the one before, where a frame has no timestamp
        if frame.pts is not None and frame.time_base:
            begin = frame.pts * frame.time_base
        elif count > 1 and not rate:
            raise Damage("its frames have no timestamps, and it states no frame rate")
        if before is not None and begin < before:
            raise Damage(f"its timestamps run backwards, from {float(before):.3f} s to {float(begin):.3f} s")
        _check_size(frame.width, frame.height)
        was, shape = shape, f"{frame.width}×{frame.height} turned by {frame.rotation % 360}°"
        if was not in (None, shape):
            raise Damage(f"its pictures change from {was} to {shape} at {float(begin):.2f} s")
        timed = frame.duration and frame.time_base
        end = begin + (frame.duration * frame.time_base if timed else 1 / rate if rate else Fraction(0))
        reader.seconds = float(end)
        yield frame, begin, end


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise Damage(f"frames of {width}×{height} are over the limit of {MAX_PIXELS:,} pixels")


def _sampled(film: VideoStream, reader: Reader, rate: float) -> Iterator[tuple[VideoFrame, int]]:
    """Each frame with the number of sample times k / rate at which it stands, if there is one."""
    step, taken = Fraction(rate), 0
    standing = first = last = None
    for frame, begin, end in _timed(film, reader):
        first, last = begin if first is None else first, end
        until = ceil((begin - first - SLACK) * step)
        if standing is not None and until > taken:
            yield standing, until - taken
            taken = until
        standing = frame
    if standing is not None and first is not None and last is not None:
        until = max(1, ceil((last - first - SLACK) * step))
        if until > taken:
            yield standing, until - taken


def _size(frame: VideoFrame, fit: Fit) -> tuple[int, int]:
    """Width and height that a frame is brought to, before it is turned."""
    lying = frame.rotation % 180 != 0
    width, height = fit(*(frame.height, frame.width) if lying else (frame.width, frame.height))
    return (height, width) if lying else (width, height)


def _picture(frame: VideoFrame, fit: Fit) -> Frames:
    """RGB [height, width, 3], the way up that the file says."""
    if frame.rotation % 90:
        raise Damage(f"its pictures are turned by {frame.rotation}°, which is no quarter turn")
    width, height = _size(frame, fit)
    upright = frame.reformat(width, height, format="rgb24").to_ndarray().astype(np.uint8, copy=False)
    return np.rot90(upright, frame.rotation // 90)
