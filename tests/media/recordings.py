"""Small recordings for the tests, written with PyAV or, where no writer would agree to it, byte by byte."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

Sound = NDArray[np.float32]

FORMATS = {
    "aac.m4a": ("aac", 44_100, {}),
    "faststart.m4a": ("aac", 44_100, {"movflags": "faststart"}),
    "fragments.mp4": ("aac", 44_100, {"movflags": "frag_keyframe+empty_moov+default_base_moof"}),
    "alac.m4a": ("alac", 44_100, {}),
    "pcm.mov": ("pcm_s16le", 44_100, {}),
    "sound.mp3": ("libmp3lame", 44_100, {}),
    "sound.flac": ("flac", 44_100, {}),
    "opus.ogg": ("libopus", 48_000, {}),
    "flac.ogg": ("flac", 44_100, {}),
    "opus.webm": ("libopus", 48_000, {}),
    "flac.mka": ("flac", 44_100, {}),
    "s16.wav": ("pcm_s16le", 44_100, {}),
    "float.wav": ("pcm_f32le", 16_000, {}),
    "law.wav": ("pcm_mulaw", 8_000, {}),
    "sound.aiff": ("pcm_s16be", 44_100, {}),
    "sound.caf": ("pcm_s16le", 44_100, {}),
    "sound.avi": ("libmp3lame", 44_100, {}),
    "sound.wv": ("wavpack", 44_100, {}),
    "sound.aac": ("aac", 44_100, {}),
    "sound.ts": ("aac", 44_100, {}),
}
"""File name: encoder, sample rate, options of the container."""


def tone(seconds: float, rate: int = 16_000, hz: float = 440.0, channels: int = 1, level: float = 0.4) -> Sound:
    """[channels, samples]; the same tone in every channel."""
    wave = level * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)
    return np.tile(wave.astype(np.float32), (channels, 1))


def hz_of(sound: Sound) -> float:
    """The loudest frequency of 16 kHz mono."""
    return float(np.abs(np.fft.rfft(sound * np.hanning(len(sound)))).argmax() * 16_000 / len(sound))


def frames_of(sound: Sound, rate: int, size: int = 1_024) -> Iterator[av.AudioFrame]:
    """[channels, samples] as FFmpeg takes them."""
    layout = {1: "mono", 2: "stereo"}[len(sound)]
    for start in range(0, sound.shape[1], size):
        piece = np.ascontiguousarray(sound[:, start : start + size])
        frame = av.AudioFrame.from_ndarray(piece, format="fltp", layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
        yield frame


def sound_track(container: av.container.OutputContainer, codec: str, rate: int, channels: int = 1) -> av.AudioStream:
    track = container.add_stream(codec, rate=rate)
    assert isinstance(track, av.AudioStream)
    track.layout = {1: "mono", 2: "stereo"}[channels]
    return track


def encode(path: Path, sound: Sound, rate: int, codec: str, options: dict[str, str] | None = None) -> Path:
    """Write [channels, samples]; the container follows the extension."""
    with av.open(str(path), "w", options=options or {}) as container:
        track = sound_track(container, codec, rate, len(sound))
        convert = av.AudioResampler(format=track.format, layout=track.layout.name, rate=rate)
        for frame in [*frames_of(sound, rate, 4_096), None]:
            for converted in convert.resample(frame):
                container.mux(track.encode(converted))
        container.mux(track.encode(None))
    return path


def sample(folder: Path, name: str, seconds: float = 2.0) -> Path:
    """A stereo tone in one of :data:`FORMATS`."""
    codec, rate, options = FORMATS[name]
    return encode(folder / name, tone(seconds, rate, channels=2), rate, codec, options)


def film(path: Path, sound: Sound | None, rate: int = 44_100, pictures: int = 25, codec: str = "mpeg4") -> Path:
    """Pictures, and sound unless ``None``; with ``codec="png"`` and one picture in an m4a, that is cover art."""
    with av.open(str(path), "w", format="mp4" if codec == "png" else None) as container:
        video = container.add_stream(codec, rate=25)
        assert isinstance(video, av.VideoStream)
        video.width = video.height = 64
        video.pix_fmt = "rgb24" if codec == "png" else "yuv420p"
        if codec == "png":
            video.disposition = av.stream.Disposition.attached_pic
        audio = None if sound is None else sound_track(container, "aac", rate)
        for _ in range(pictures):
            container.mux(video.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")))
        container.mux(video.encode(None))
        if audio is not None and sound is not None:
            for frame in [*frames_of(sound, rate), None]:
                container.mux(audio.encode(frame))
    return path


def wav(
    samples: NDArray, rate: int = 16_000, *, channels: int | None = None, claimed_bytes: int | None = None
) -> bytes:
    """A WAV of [samples, channels] by hand, in the samples' own type; header fields can be made to lie."""
    raw = samples.tobytes()
    size = len(raw) if claimed_bytes is None else claimed_bytes
    width = samples.dtype.itemsize
    kind = 3 if samples.dtype.kind == "f" else 1
    channels = samples.shape[1] if channels is None else channels
    block = channels * width & 0xFFFF
    fmt = struct.pack("<HHIIHH", kind, channels, rate, rate * block & 0xFFFF_FFFF, block, 8 * width)
    riff = min(36 + size, 0xFFFF_FFFF)
    return (
        struct.pack("<4sI4s4sI", b"RIFF", riff, b"WAVE", b"fmt ", 16) + fmt + struct.pack("<4sI", b"data", size) + raw
    )


def retimed(
    source: Path, target: Path, shift: Callable[[float], float], *, film_seconds: float = 0.0, film_starts: float = 0.0
) -> Path:
    """The sound of a file in another container: each packet ``shift(its time)`` seconds later; beside a film, if any."""
    with av.open(str(source)) as given, av.open(str(target), "w") as container:
        codec = {".mpg": "mpeg1video", ".flv": "flv"}.get(target.suffix, "mpeg4")
        video = container.add_stream(codec, rate=25) if film_seconds else None
        sound = container.add_stream_from_template(given.streams.audio[0])
        packets: list[tuple[float, av.Packet]] = []
        for packet in given.demux(audio=0):
            if packet.pts is not None and packet.time_base:
                time = float(packet.pts * packet.time_base)
                packet.pts = packet.dts = packet.pts + round(shift(time) / packet.time_base)
                packet.stream = sound
                packets.append((time + shift(time), packet))
        if video is not None:
            assert isinstance(video, av.VideoStream)
            video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
            picture = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
            pictures = [video.encode(picture) for _ in range(round(25 * film_seconds))] + [video.encode(None)]
            for packet in (packet for few in pictures for packet in few):
                packet.pts = packet.dts = packet.pts + round(film_starts / packet.time_base)
                packets.append((float(packet.pts * packet.time_base), packet))
        for _, packet in sorted(packets, key=lambda timed: timed[0]):
            container.mux(packet)
    return target


def film_in(languages: list[str], tones: list[Sound], path: Path, rate: int = 16_000) -> Path:
    """A file with a sound track for each language, as its metadata state it."""
    with av.open(str(path), "w") as container:
        tracks = [sound_track(container, "aac", rate) for _ in languages]
        for track, language in zip(tracks, languages, strict=True):
            track.metadata["language"] = language
        for frames in zip(*(frames_of(sound, rate) for sound in tones), strict=True):
            for track, frame in zip(tracks, frames, strict=True):
                container.mux(track.encode(frame))
        for track in tracks:
            container.mux(track.encode(None))
    return path
