"""Sound in: any file that FFmpeg reads becomes float32 mono at 16 kHz, streamed in blocks (PyAV; no torch).

Nothing is lost in silence. A file that is cut off or damaged (:mod:`whisper_moe.media.containers`; here also NaN and infinite
samples) ends in a :class:`MediaError` that names the second where decoding stopped, after everything before that second has
been handed out.

Time is the container's. Where the sound starts later than the film, or its timestamps jump ahead, silence takes the place
of what is not there. A jump is not believed, and nothing put in its place, where it leads beyond the end that the file
states, or where it would make more than :data:`MAX_SILENCE_SECONDS` of silence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, groupby
from typing import Any, BinaryIO, TypeVar

import av
import numpy as np
from av import AudioFifo, AudioFrame, AudioResampler, AudioStream
from numpy.typing import NDArray

from whisper_moe.config import SAMPLE_RATE
from whisper_moe.media import containers
from whisper_moe.media.containers import SOUND_CODECS, STREAMS, Damage, File, Reader, codec_of, opened
from whisper_moe.media.containers import MediaError as MediaError
from whisper_moe.media.languages import spoken_code
from whisper_moe.media.windows import SILENT_PEAK, is_silent

CANCELLED = 0.1
"""A mix with less of the energy than this has lost the sound (1: channels that have nothing in common). Lossy codecs leave
noise where channels cancel, about 15 dB below."""
GROUP_SECONDS = 1.0
"""Decoded frames (about 20 ms each) are mixed and resampled in groups this long: three times as fast as one by one."""
MIN_RATE, MAX_RATE = 1_000, 768_000
"""Sample rates (Hz) that are believed. One sample a second would turn a kilobyte into sixteen megasamples."""
MAX_CHANNELS = 64
GAP_SECONDS = 0.1
"""Timestamps that run further ahead of the samples leave something out; as FFmpeg's ``aresample`` (``min_hard_comp``) has it.
In Ogg that is a missing page (the shortest common one holds 0.2 s)."""
RESET_SECONDS = 10.0
"""Timestamps that fall back by more begin anew (joined files; FFmpeg's ``dts_delta_threshold``); by less, they overlap."""
MAX_SILENCE_SECONDS = 4 * 3_600.0
"""Silence that timestamps are believed, in all: damaged ones may ask for days."""
CLOCKED = frozenset({"asf", "flv", "matroska,webm", "mov,mp4,m4a,3gp,3g2,mj2", "mpeg", "mpegts"})
"""Containers that give every packet its time. The others say when a track starts, if that, and count from there."""
COUNTED = frozenset({"aiff", "flac", "tta", "wv"})
"""Containers whose header states the exact number of samples, where it states one at all."""


Samples = NDArray[np.float32]
Note = Callable[[str], object]
T = TypeVar("T")


def load_audio(source: File, *, name: str | None = None) -> Samples:
    """The whole of :func:`stream_audio` in one array [samples]; a damaged file gives nothing but its error."""
    return np.concatenate([np.zeros(0, np.float32), *stream_audio(source, name=name)])


def stream_audio(
    source: File, *, name: str | None = None, track: int | str | None = None, note: Note = str
) -> Iterator[Samples]:
    """Decode to float32 mono 16 kHz in [-1, 1], in blocks of about a second.

    Every channel counts the same in the mix; where they would cancel each other, some are turned over. Louder than full
    scale is clipped. Memory does not grow with the length of the sound.

    :param source: a path (never a URL), or a binary stream, read from its start; one that cannot seek is spooled first.
    :param name: what messages call a stream; a path calls itself.
    :param track: which sound track: its number, from 0 as in FFmpeg's ``a:0``, or its language (``hin``, ``hi``, ``Hindi``), as
        the file states it, the first of several. ``None`` reads the one that FFmpeg calls best.
    :param note: is told, in a clause each, what is no error and yet worth knowing.
    :raises MediaError: for a file that is missing, unreadable, of a foreign format, without a sound track, cut off or
        damaged, *after* the blocks before the damage. A valid file without samples yields nothing and raises nothing.
    """
    silent, damage = True, list[Exception]()
    with opened(source, name, SOUND_CODECS) as reader:
        stream = sound_track(reader, track)
        pieces = _until(damage, _timed(reader, Clock(reader, stream, note)))
        mono = _until(damage, _mixed(_grouped(pieces), note))
        for samples in _resampled(mono):
            reader.seconds += len(samples) / SAMPLE_RATE
            silent = silent and is_silent(samples)
            yield samples
        others = [other for other in reader.container.streams.audio if other is not stream]
        if silent and others and track is None:
            which = f"{_listed(reader, [stream])} is silent, and was chosen by default"
            note(f"its sound track {which}; there is also {_listed(reader, others)}")
        if damage:
            raise damage[-1]


def sound_track(reader: Reader, wanted: int | str | None = None) -> AudioStream:
    """The track of that number or language; by default FFmpeg's best, or the first whose codec is allowed."""
    tracks = reader.container.streams.audio
    if not tracks:
        raise Damage("it has no sound track")
    if wanted is None:
        best = reader.container.streams.best("audio")
        found = sorted(tracks, key=lambda track: track is not best)
    elif str(wanted).isdecimal():
        found = list(tracks[int(wanted) : int(wanted) + 1])
    else:
        code = spoken_code(str(wanted))
        found = [track for track in tracks if track.language and spoken_code(track.language) == code]
    if not found:
        raise Damage(f"it has no sound track {wanted!r}; its sound tracks are {_listed(reader, tracks)}")
    track = next((track for track in found if codec_of(track) in SOUND_CODECS), None)
    if track is None:
        raise Damage(f"its sound is in a codec that is not read: its sound tracks are {_listed(reader, tracks)}")
    context = track.codec_context
    if reader.format not in STREAMS:  # their frames say it, each for itself
        _check_shape(context.sample_rate, context.layout.nb_channels)
    if context.name in containers.CHECKSUMMED:
        context.options = {"err_detect": "crccheck+explode"}
    return track


def _listed(reader: Reader, tracks: Sequence[AudioStream]) -> str:
    """``0 (hin, aac), 1 (eng, ac3, Commentary)``."""
    return ", ".join(
        f"{number} ({', '.join(filter(None, (track.language or 'und', codec_of(track), track.metadata.get('title'))))})"
        for number, track in enumerate(reader.container.streams.audio)
        if track in tracks
    )


def _check_shape(rate: int, channels: int) -> None:
    if not MIN_RATE <= rate <= MAX_RATE:
        raise Damage(f"a sample rate of {rate} Hz is not believed; {MIN_RATE} to {MAX_RATE} Hz are read")
    if not 1 <= channels <= MAX_CHANNELS:
        raise Damage(f"{channels} channels, or a count that FFmpeg refuses; 1 to {MAX_CHANNELS} are read")


class Clock:
    """Keeps the samples on the container's time, which players count from its start: what of it has no sound is silence."""

    def __init__(self, reader: Reader, stream: AudioStream, note: Note = str) -> None:
        self.reader, self.stream, self.format, self.note = reader, stream, reader.format, note
        # A track's own duration is a guess by the bit rate where the format, as Matroska, states only that of the whole.
        stated = 0 if self.format in ("flv", "matroska,webm") and stream.duration else reader.container.duration
        self.end = reader.start + stated / containers.MICROSECONDS if stated else math.inf
        self.shift = self.sound = self.silence = 0.0
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
        late = start - self.reader.start - self.shift - self.now
        first, expected = self.expected is None, start if self.expected is None else self.expected
        if self.format == "ogg" and start > expected + GAP_SECONDS:
            raise Damage(f"the sound is damaged: {start - expected:.2f} s of it are missing")
        if self.format not in CLOCKED and (not first or self.format in STREAMS):
            return 0.0
        if start < expected - RESET_SECONDS:
            self.shift += late
        elif late > GAP_SECONDS:
            if start <= self.end + GAP_SECONDS and self.silence + late <= MAX_SILENCE_SECONDS:
                return late
            self.note(f"its timestamps jump by {late:.1f} s at {self.now:.1f} s, which is not believed")
            self.shift += late
        return 0.0

    def check_end(self) -> None:
        """Raises :class:`Damage` where the header counted more samples than there were."""
        if self.format in COUNTED and self.stream.duration and self.stream.time_base:
            stated = float(self.stream.duration * self.stream.time_base)
            if self.sound < stated - GAP_SECONDS:
                raise Damage(f"the file is cut off or damaged: its header states {stated:.2f} s")


def _until(damage: list[Exception], items: Iterator[T]) -> Iterator[T]:
    """The items up to the first error, which is kept for later: what came before it gets out of the later stages first."""
    try:
        yield from items
    except containers.CAUSES as error:
        damage.append(error)


def _timed(reader: Reader, clock: Clock) -> Iterator[tuple[AudioFrame, float]]:
    """Decoded frames, each with the seconds of silence before it."""
    for frame in reader.frames(clock.stream):
        yield frame, clock.missing(frame.time, frame.samples / frame.sample_rate)
    clock.check_end()


def _grouped(frames: Iterable[tuple[AudioFrame, float]]) -> Iterator[tuple[NDArray[Any], int]]:
    """Samples [channels, samples] of the track's own type, and their rate, :data:`GROUP_SECONDS` at a time; with silences."""
    fifo, shape = AudioFifo(), None
    for frame, silence in frames:
        rate, channels = frame.sample_rate, frame.layout.nb_channels
        was, shape = shape, (rate, channels, frame.format.name)
        if shape != was or silence or fifo.samples >= GROUP_SECONDS * rate:
            yield from _drained(fifo)
            fifo = AudioFifo()
            _check_shape(rate, channels)
        left = round(silence * rate)
        for start in range(0, left, rate):
            yield np.zeros((channels, min(rate, left - start)), np.float32), rate
        frame.pts = None
        fifo.write(frame)
    yield from _drained(fifo)


def _drained(fifo: AudioFifo) -> Iterator[tuple[NDArray[Any], int]]:
    if fifo.samples and (frame := fifo.read()):
        raw = frame.to_ndarray()
        yield raw if frame.format.is_planar else raw.reshape(-1, frame.layout.nb_channels).T, frame.sample_rate


def _mixed(groups: Iterable[tuple[NDArray[Any], int]], note: Note) -> Iterator[tuple[Samples, int]]:
    """Mono, and its rate: the mean of all channels, some turned over while they would cancel each other."""
    signs, turned = np.ones(1, np.float32), False
    for raw_CN, rate in groups:
        with np.errstate(over="ignore", invalid="ignore"):  # what is then no number shows
            levels_CN = _levels(raw_CN)
            signs = _signs(levels_CN, signs)
            mono = signs @ levels_CN / np.float32(len(levels_CN))
        if signs.min() < 0 and not turned:
            note("its channels cancel each other out; one is turned over before they are mixed")
            turned = True
        finite = np.isfinite(mono)
        yield mono[: len(mono) if finite.all() else int(finite.argmin())], rate
        if not finite.all():
            raise Damage("NaN or infinite samples")


def _levels(samples: NDArray[Any]) -> Samples:
    """Samples of any type as float32, full scale = 1."""
    levels = samples.astype(np.float32, copy=False)
    if samples.dtype.kind == "f":
        return levels
    return levels / np.float32(2 ** (8 * samples.dtype.itemsize - 1)) - (samples.dtype.kind == "u")


def _signs(levels_CN: Samples, signs: Samples) -> Samples:
    """Which channels (C) are turned over in the mix: as before, until that cancels; then those against a loud one.

    Turned over, each is still heard: two voices on two channels lose nothing, which one channel alone would.
    """
    if len(signs) != len(levels_CN):
        signs = np.ones(len(levels_CN), np.float32)
    if len(signs) == 1:
        return signs
    energies = np.square(levels_CN).mean(1)
    mixed = np.square(signs @ levels_CN).mean() / len(signs)
    if energies.mean() < SILENT_PEAK**2 or not mixed < CANCELLED * energies.mean():
        return signs
    loud = int(np.argmax(energies > energies.max() / 2))
    return np.where(levels_CN @ levels_CN[loud] < 0, np.float32(-1), np.float32(1))


def _resampled(groups: Iterable[tuple[Samples, int]]) -> Iterator[Samples]:
    """To 16 kHz, clipped to full scale; a new filter whenever the rate changes."""
    for rate, pieces in groupby(groups, key=lambda group: group[1]):
        resampler = AudioResampler("flt", "mono", SAMPLE_RATE)
        for mono in chain((mono for mono, _ in pieces if len(mono)), [None]):  # None: what is still inside
            frame = None if mono is None else AudioFrame.from_ndarray(mono[None], format="flt", layout="mono")
            if frame is not None:
                frame.sample_rate = rate
            yield from (np.clip(output.to_ndarray()[0], -1.0, 1.0) for output in resampler.resample(frame))


# Sound out

WRITTEN = {
    ".m4a": ("ipod", "aac"),
    ".mp4": ("mp4", "aac"),
    ".mp3": ("mp3", "mp3"),
    ".wav": ("wav", "pcm_s16le"),
    ".flac": ("flac", "flac"),
    ".ogg": ("ogg", "libopus"),
    ".opus": ("ogg", "libopus"),
}
"""Extension → FFmpeg's container and codec."""


def write_audio(file: BinaryIO, samples: Samples, kind: str) -> None:
    """Mono float32 samples at 16 kHz as a file of this ``kind``, an extension. Raises ``ValueError`` for another one."""
    if kind.lower() not in WRITTEN:
        raise ValueError(f"sound is written as {' '.join(WRITTEN)}, not as {kind!r}")
    container, codec = WRITTEN[kind.lower()]
    with av.open(file, "w", format=container) as output:
        track: Any = output.add_stream(codec, rate=SAMPLE_RATE, layout="mono")
        whole = AudioFrame.from_ndarray(np.clip(samples, -1, 1)[None].astype(np.float32), format="flt", layout="mono")
        whole.sample_rate, whole.pts = SAMPLE_RATE, 0
        fitted = AudioResampler(track.format.name, "mono", track.rate, track.frame_size or None)
        for frame in (*fitted.resample(whole), *fitted.resample(None)):
            output.mux(track.encode(frame))
        output.mux(track.encode(None))
