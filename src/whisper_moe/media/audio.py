"""Sound in: any file that FFmpeg reads becomes float32 mono at 16 kHz, streamed in blocks (PyAV; no torch).

Nothing is lost in silence. A file that is cut off or damaged ends in a :class:`MediaError` that names the second where
decoding stopped, after everything before that second has been handed out. What counts as damage:

- a packet that does not decode, or fails its checksum (FLAC, WavPack, TTA; the pages of Ogg);
- a file that is shorter than its own framing says (:func:`whisper_moe.media.containers.missing_bytes`);
- NaN or infinite samples.

Bare streams (MP3, ADTS, MPEG-TS …) are made to be cut and joined anywhere: up to :data:`SEAM_SECONDS` of tags and seams
between their frames are passed over. Damage that leaves no trace cannot be seen: a changed bit in raw PCM, or in the
framing of a Matroska block.

Time is the container's. Where the sound starts later than the film, or its timestamps jump ahead, silence takes the place
of what is not there. A jump is not believed, and nothing put in its place, where it leads beyond the end that the file
states, or where it would make more than :data:`whisper_moe.media.tracks.MAX_SILENCE_SECONDS` of silence.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from whisper_moe.config import SAMPLE_RATE
from whisper_moe.media import containers
from whisper_moe.media.containers import Damage
from whisper_moe.media.tracks import GAP_SECONDS, Clock, check_shape, open_container, other_tracks, sound_track
from whisper_moe.media.windows import SILENT_PEAK, is_silent

if TYPE_CHECKING:
    from av import AudioFifo, AudioFrame, AudioResampler, AudioStream, Packet
    from av.container import InputContainer

SEAM_SECONDS = 0.25
"""Undecodable packets of a bare stream that are passed over, in seconds altogether: about ten MP3 frames."""
CANCELLED = 0.1
"""A mix with less of the energy than this has lost the sound (1: channels that have nothing in common). Lossy codecs leave
noise where channels cancel, about 15 dB below."""
GROUP_SECONDS = 1.0
"""Decoded frames (about 20 ms each) are mixed and resampled in groups this long: three times as fast as one by one."""
SPOOL_BYTES = 16 << 20
"""What is kept of a pipe in memory; the rest of it goes to a temporary file."""

Samples = NDArray[np.float32]


class MediaError(ValueError):
    """A file that cannot be read, or not to its end: ``name``, ``cause``, and the ``seconds`` decoded before."""

    def __init__(self, name: str, cause: str, seconds: float = 0.0) -> None:
        super().__init__(name, cause, seconds)
        self.name, self.cause, self.seconds = name, cause, seconds

    def __str__(self) -> str:
        stopped = f" (decoding stopped after {self.seconds:.2f} s)" if self.seconds else ""
        return f"{self.name}: {self.cause}{stopped}"


def load_audio(source: str | Path | BinaryIO, *, name: str | None = None, max_seconds: float | None = None) -> Samples:
    """The whole of :func:`stream_audio` in one array [samples]; a damaged file gives nothing but its error."""
    blocks = list(stream_audio(source, name=name, max_seconds=max_seconds))
    return blocks[0] if len(blocks) == 1 else np.concatenate([np.zeros(0, np.float32), *blocks])


def stream_audio(
    source: str | Path | BinaryIO,
    *,
    name: str | None = None,
    block_seconds: float = 30.0,
    max_seconds: float | None = None,
    track: int | str | None = None,
    note: Callable[[str], object] = str,
) -> Iterator[Samples]:
    """Decode to float32 mono 16 kHz in [-1, 1], in blocks of ``block_seconds`` (the last one shorter, none empty).

    Every channel counts the same in the mix; where they would cancel each other, some are turned over. Louder than full
    scale is clipped. Memory does not grow with the length of the sound.

    :param source: a path (never a URL), or a binary stream, read from its start; one that cannot seek is spooled first.
    :param name: what messages call a stream; a path calls itself.
    :param max_seconds: a longer sound raises, as soon as that much has been decoded.
    :param track: which sound track: its number, from 0 as in FFmpeg's ``a:0``, or its language (``hin``, ``hi``, ``Hindi``), as
        the file states it, the first of several. ``None`` reads the one that FFmpeg calls best.
    :param note: is told, in a clause each, what is no error and yet worth knowing.
    :raises MediaError: for a file that is missing, unreadable, of a foreign format, without a sound track, cut off or
        damaged, *after* the blocks before the damage. A valid file without samples yields nothing and raises nothing.
    """
    block = round(block_seconds * SAMPLE_RATE)
    if block < 1:
        raise ValueError(f"block_seconds must hold at least one sample, got {block_seconds}")
    name = name or (str(source) if isinstance(source, str | os.PathLike) else str(getattr(source, "name", "<stream>")))
    decoded, silent = 0.0, True
    try:
        with _seekable(source) as file, open_container(file, containers.CODECS) as container:
            pass_ = _Track(container, file, max_seconds, track, note)
            for samples in _blocks(_resample(pass_.groups()), block):
                decoded += len(samples) / SAMPLE_RATE
                silent = silent and is_silent(samples)
                yield samples
            if silent and track is None and (others := other_tracks(container, pass_.stream)):
                note(others)
            if pass_.damage:
                raise pass_.damage
    except containers.causes() as error:
        raise MediaError(name, _cause(error), decoded) from error


def _cause(error: Exception) -> str:
    """One clause of English; the operating system's own words where the fault is its."""
    from av.error import FFmpegError, InvalidDataError

    if isinstance(error, OSError) and error.strerror:
        return error.strerror[0].lower() + error.strerror[1:]
    if isinstance(error, InvalidDataError):
        return "the sound is damaged"
    if isinstance(error, IndexError):
        return containers.LATE_TRACK
    if isinstance(error, FFmpegError):
        return f"FFmpeg cannot read it: {error.strerror}"
    return str(error) or type(error).__name__


@contextmanager
def _seekable(source: str | Path | BinaryIO) -> Iterator[BinaryIO]:
    """The source as a seekable stream. What is opened here is closed here; a stream that was given stays open."""
    if isinstance(source, str | os.PathLike):
        with open(source, "rb") as file, _seekable(file) as seekable:
            yield seekable
    elif source.seekable():
        yield source
    else:
        with SpooledTemporaryFile(max_size=SPOOL_BYTES) as spool:
            shutil.copyfileobj(source, spool)
            yield cast(BinaryIO, spool)


# Decoding.


class _Track:
    """One pass over one sound track. ``damage`` says, once :meth:`groups` has ended, why it ended early."""

    def __init__(
        self, container: InputContainer, file: BinaryIO, max_seconds: float | None, wanted: int | str | None,
        note: Callable[[str], object],
    ) -> None:  # fmt: skip
        self.container, self.file, self.max_seconds, self.note = container, file, max_seconds, note
        self.format = container.format.name
        self.stream = sound_track(container, wanted)
        self.clock = Clock(container, self.stream, note)
        self.signs, self.turned = np.ones(1, np.float32), False
        self.damage: Exception | None = None
        self.skipped = 0.0
        if self.stream.codec_context.name in containers.CHECKSUMMED:
            self.stream.codec_context.options = {"err_detect": "crccheck+explode"}

    def groups(self) -> Iterator[tuple[Samples, int]]:
        """Mono at the track's own rate, and that rate, in groups of about :data:`GROUP_SECONDS`; silence where it is due."""
        from av import AudioFifo

        fifo, shape = AudioFifo(), None
        for frame, missing in self._frames():
            changes = shape != (shape := (frame.format.name, frame.layout.nb_channels, frame.sample_rate))
            if changes or missing:
                check_shape(frame.sample_rate, frame.layout.nb_channels)
                yield from self._mixed(fifo)
                if self.damage:
                    return
                yield from _silence(missing, frame.sample_rate)
                fifo = AudioFifo()
            frame.pts = None
            fifo.write(frame)
            if fifo.samples >= GROUP_SECONDS * frame.sample_rate:
                yield from self._mixed(fifo)
        yield from self._mixed(fifo)

    def _mixed(self, fifo: AudioFifo) -> Iterator[tuple[Samples, int]]:
        """What has gathered, up to the first sample that is no number."""
        frame = fifo.read() if fifo.samples else None
        if frame is None:
            return
        mono = self._mix(frame)
        finite = np.isfinite(mono)
        if not finite.all():
            self.damage = Damage("NaN or infinite samples")
            mono = mono[: int(finite.argmin())]
        yield mono, frame.sample_rate

    def _mix(self, frame: AudioFrame) -> Samples:
        """The channels' mean, as it stands where nothing cancels."""
        raw = frame.to_ndarray()
        channels = raw if frame.format.is_planar else raw.reshape(-1, frame.layout.nb_channels).T
        if len(self.signs) != len(channels):
            self.signs = np.ones(len(channels), np.float32)
        if len(channels) > 1:
            levels = _levels(channels)
            self.signs = _signs(levels, self.signs)
            if self.signs.min() < 0:
                if not self.turned:
                    self.note("its channels cancel each other out; one is turned over before they are mixed")
                self.turned = True
                return self.signs @ levels / np.float32(len(levels))
        return _mean(channels)

    def _frames(self) -> Iterator[tuple[AudioFrame, float]]:
        """Decoded frames, each with the seconds of silence before it, up to the end or the first damage, which is kept, not
        raised: what came before it gets out.
        """
        try:
            for packet in self._packets():
                for frame in self._decoded(packet):
                    yield frame, self._missing(frame)
                    if self.damage:
                        return
            self._check_end()
        except containers.causes() as error:
            self.damage = self._cut_off() or error

    def _packets(self) -> Iterator[Packet[AudioStream]]:
        """The track's packets, and the start of the film: FFmpeg, which decodes no film here, does not always know it."""
        from av.stream import Discard

        film, started = containers.film_tracks(self.container), False
        for other in self.container.streams:
            other.discard = Discard.default if other is self.stream or other in film else Discard.all
        for packet in self.container.demux():
            if packet.stream is self.stream:
                if not started:
                    for other in film:
                        other.discard = Discard.all
                started = True
                yield cast("Packet[AudioStream]", packet)
            elif not started and packet.pts is not None and not packet.is_discard:
                self.clock.zero = min(self.clock.zero, float(packet.pts * packet.time_base))

    def _decoded(self, packet: Packet[AudioStream]) -> list[AudioFrame]:
        """The packet's frames; none for what lies between the frames of a bare stream."""
        from av.error import FFmpegError

        try:
            return packet.decode()
        except FFmpegError:
            self.skipped += float((packet.duration or 0) * packet.time_base)
            if self.format not in containers.STREAMS or self.skipped > SEAM_SECONDS:
                raise Damage("the sound is damaged") from None
            return []

    def _missing(self, frame: AudioFrame) -> float:
        """Seconds of silence that belong before a frame."""
        start = None
        if frame.pts is not None and (base := frame.time_base):
            start = frame.pts * base.numerator / base.denominator  # a product of fractions takes ten times as long
        missing = self.clock.missing(start, frame.samples / frame.sample_rate)
        if self.max_seconds is not None and self.clock.now > self.max_seconds + 1e-6:
            raise Damage(f"longer than the limit of {self.max_seconds:g} s")
        return missing

    def _check_end(self) -> None:
        """FFmpeg saw the end of the file: is it the end of the sound?"""
        if cut_off := self._cut_off():
            raise cut_off
        if self.format == "ogg" and containers.ogg_is_damaged(self.file):
            raise Damage("the sound is damaged: an Ogg page fails its checksum")
        if self.format in containers.COUNTED and self.stream.duration and self.stream.time_base:
            stated = float(self.stream.duration * self.stream.time_base)
            if self.clock.sound < stated - GAP_SECONDS:
                raise Damage(f"the file is cut off or damaged: its header states {stated:.2f} s")
        if self.skipped and not self.clock.sound:
            raise Damage("nothing in it decodes as sound")

    def _cut_off(self) -> Damage | None:
        missing = containers.missing_bytes(self.file)
        return (
            Damage(f"the file is cut off: at least {missing:,} bytes that it announces are missing")
            if missing
            else None
        )


def _silence(seconds: float, rate: int) -> Iterator[tuple[Samples, int]]:
    """In groups as :meth:`_Track.groups` gives them."""
    left, most = round(seconds * rate), round(GROUP_SECONDS * rate)
    for start in range(0, left, most):
        yield np.zeros(min(most, left - start), np.float32), rate


def _mean(channels: NDArray[Any]) -> Samples:
    """The mean of all channels, [samples], full scale = 1; in float32, so that NaN and overflow show."""
    with np.errstate(over="ignore", invalid="ignore"):
        mix = channels[0].astype(np.float32)
        for channel in channels[1:]:
            mix += channel
    mix /= len(channels)
    return _levels(mix, channels.dtype)


def _levels(samples: NDArray[Any], dtype: np.dtype[Any] | None = None) -> Samples:
    """Samples of any type (``dtype``, if they are no longer in it) as float32, full scale = 1."""
    dtype = samples.dtype if dtype is None else dtype
    with np.errstate(over="ignore"):
        levels = samples.astype(np.float32, copy=False)
    if dtype.kind == "f":
        return levels
    full_scale = np.float32(2 ** (8 * dtype.itemsize - 1))
    return levels / full_scale - (dtype.kind == "u")


def _signs(levels_CN: Samples, signs: Samples) -> Samples:
    """Which channels (C) are turned over in the mix: as before, until that cancels; then those against a loud one.

    Turned over, each is still heard: two voices on two channels lose nothing, which one channel alone would.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        energies = np.square(levels_CN).mean(1)
        mixed = np.square(signs @ levels_CN).mean() / len(signs)
        if energies.mean() < SILENT_PEAK**2 or not mixed < CANCELLED * energies.mean():
            return signs
        loud = int(np.argmax(energies > energies.max() / 2))
        return np.where(levels_CN @ levels_CN[loud] < 0, np.float32(-1), np.float32(1))


def _resample(groups: Iterable[tuple[Samples, int]]) -> Iterator[Samples]:
    """To 16 kHz, clipped to full scale; a new filter whenever the rate changes."""
    resampler, rate = None, 0
    for mono, new_rate in groups:
        if new_rate != rate:
            yield from _filtered(resampler, None, rate)
            resampler, rate = _resampler(new_rate), new_rate
        yield from _filtered(resampler, mono, rate)
    yield from _filtered(resampler, None, rate)


def _resampler(rate: int) -> AudioResampler | None:
    from av import AudioResampler

    return None if rate == SAMPLE_RATE else AudioResampler("flt", "mono", SAMPLE_RATE)


def _filtered(resampler: AudioResampler | None, mono: Samples | None, rate: int) -> Iterator[Samples]:
    """What comes out for this input; for ``None``, what was still inside."""
    from av import AudioFrame

    if resampler is None:
        outputs = [] if mono is None else [mono]
    else:
        frame = None
        if mono is not None:
            frame = AudioFrame.from_ndarray(mono[None], format="flt", layout="mono")
            frame.sample_rate = rate
        outputs = [output.to_ndarray()[0] for output in resampler.resample(frame)]
    yield from (np.clip(output, -1.0, 1.0, out=output) for output in outputs)


def _blocks(pieces: Iterable[Samples], size: int) -> Iterator[Samples]:
    """The same samples in arrays of ``size``, the last one shorter."""
    held: list[Samples] = []
    count = 0
    for piece in pieces:
        while count + len(piece) >= size:
            yield np.concatenate([*held, piece[: size - count]])
            held, count, piece = [], 0, piece[size - count :]
        held.append(piece)
        count += len(piece)
    if count:
        yield np.concatenate(held)
