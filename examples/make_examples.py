"""Rebuild the example files from Debian packages, so that their provenance is code.

    apt-get install pocketsphinx-testdata asterisk-core-sounds-it-g722 asterisk-core-sounds-ru-g722
    python examples/make_examples.py

Writes the six media files and ``references.tsv`` (what is said, where, in which language) beside this script.
Sources and licences are named in ``README.md`` beside it.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.audio.stream import AudioStream
from numpy.typing import NDArray

RATE = 16_000
"""Samples a second of every source; the MOV is resampled."""
PEAK = 0.5
"""Every reading is scaled to this peak, since the sources' levels differ by a factor of five."""

SPHINX = "usr/share/pocketsphinx/test/data"
ASTERISK = "usr/share/asterisk/sounds"

Wave = NDArray[np.float32]


@dataclass(frozen=True)
class Reading:
    """One recording of a person, and what they say."""

    path: str
    language: str
    text: str


def _austen(number: str, text: str) -> Reading:
    return Reading(f"{SPHINX}/librivox/sense_and_sensibility_01_austen_64kb-{number}.wav", "en", text)


AUSTEN = (
    _austen(
        "0870",
        "And Mr. John Dashwood had then leisure to consider how much there might be prudently in his power to do for them.",
    ),
    _austen("0880", "He was not an ill-disposed young man,"),
    _austen("0890", "unless to be rather cold-hearted and rather selfish is to be ill-disposed."),
    _austen("0920", "Had he married a more amiable woman, he might have been made still more respectable than he was."),
    _austen("0930", "He might even have been made amiable himself."),
)
COMMANDS = (
    Reading(f"{SPHINX}/something.raw", "en", "Go somewhere and do something."),
    Reading(f"{SPHINX}/goforward.raw", "en", "Go forward ten meters."),
    Reading(f"{SPHINX}/tidigits/dhd.2934z.raw", "en", "two nine three four zero"),
    Reading(f"{SPHINX}/cards/001.wav", "en", "Ten of clubs."),
    Reading(f"{SPHINX}/cards/002.wav", "en", "Four, queen of clubs."),
    Reading(f"{SPHINX}/cards/003.wav", "en", "Seven of clubs."),
    Reading(f"{SPHINX}/cards/004.wav", "en", "Five, five."),
    Reading(f"{SPHINX}/cards/005.wav", "en", "Eight of spades, four of clubs, seven of hearts."),
)
ITALIAN = (
    Reading(
        f"{ASTERISK}/it_IT_m_Carlo/demo-nogo.g722",
        "it",
        "Sono spiacente ma non sono stato in grado di creare una connessione con il server Asterisk dimostrativo della "
        "Digium. Potrai trovare maggiori informazioni di debug nella console Asterisk.",
    ),
    Reading(
        f"{ASTERISK}/it_IT_m_Carlo/tt-allbusy.g722",
        "it",
        "Tutti gli operatori della ditta sono al momento impegnati con altri clienti. Rimanga in linea e la sua chiamata "
        "verrà risposta secondo l'ordine in cui è stata ricevuta.",
    ),
    Reading(
        f"{ASTERISK}/it_IT_m_Carlo/demo-enterkeywords.g722",
        "it",
        "Prego inserire una o più parole chiave separate da asterisco e premere il tasto cancelletto.",
    ),
)
RUSSIAN = (
    Reading(
        f"{ASTERISK}/ru_RU_f_IvrvoiceRU/vm-newuser.g722",
        "ru",
        "Добро пожаловать в голосовую почту! Для начала прослушайте инструкцию по настройке ящика.",
    ),
    Reading(
        f"{ASTERISK}/ru_RU_f_IvrvoiceRU/vm-instructions.g722",
        "ru",
        "Для прослушивания сообщений нажмите один. Для выхода из голосового ящика в любое время нажмите решётку.",
    ),
    Reading(
        f"{ASTERISK}/ru_RU_f_IvrvoiceRU/tt-allbusy.g722",
        "ru",
        "В данный момент все операторы заняты. Пожалуйста, оставайтесь на линии. Ваш вызов будет принят в порядке очереди.",
    ),
)


@dataclass(frozen=True)
class Spoken:
    """A reading's place in an example file, in seconds."""

    start: float
    end: float
    reading: Reading


def read(path: Path) -> Wave:
    """Decode one mono 16 kHz recording (wav, headerless 16-bit PCM, G.722) and scale it to ``PEAK``."""
    if path.suffix == ".raw":
        wave = np.fromfile(path, "<i2").astype(np.float32)
    else:
        with av.open(path, format=path.suffix[1:]) as container:
            resampler = av.AudioResampler("flt", "mono", RATE)
            frames = (*container.decode(audio=0), None)
            wave = np.concatenate([part.to_ndarray()[0] for frame in frames for part in resampler.resample(frame)])
    return wave * np.float32(PEAK / np.abs(wave).max())


def join(root: Path, parts: Iterable[tuple[float, Reading]]) -> tuple[Wave, list[Spoken]]:
    """Readings one after another, each preceded by its pause in seconds; 0.3 s of silence at the end."""
    waves: list[Wave] = []
    spoken: list[Spoken] = []
    total = 0
    for pause, reading in parts:
        silence = np.zeros(round(pause * RATE), np.float32)
        wave = read(root / reading.path)
        start = total + len(silence)
        total = start + len(wave)
        waves += [silence, wave]
        spoken.append(Spoken(start / RATE, total / RATE, reading))
    return np.concatenate([*waves, np.zeros(round(0.3 * RATE), np.float32)]), spoken


def paused(readings: Iterable[Reading], first: float, between: float) -> Iterator[tuple[float, Reading]]:
    """Each reading with the pause before it."""
    for index, reading in enumerate(readings):
        yield (between if index else first), reading


def encode(stream: AudioStream, wave: Wave) -> Iterator[av.Packet]:
    """Packets of a mono 16 kHz waveform in the stream's own rate, layout and sample format."""
    resampler = av.AudioResampler(stream.format, stream.layout, stream.rate)
    frame = av.AudioFrame.from_ndarray(wave[None], format="flt", layout="mono")
    frame.rate, frame.pts, frame.time_base = RATE, 0, Fraction(1, RATE)
    for part in (*resampler.resample(frame), *resampler.resample(None)):
        yield from stream.encode(part)
    yield from stream.encode(None)


def write_audio(path: Path, wave: Wave, codec: str, rate: int = RATE, bit_rate: int | None = None) -> None:
    """Write a mono file; ``bitexact`` keeps dates and library versions out of it."""
    with av.open(path, "w", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream(codec, rate=rate)
        assert isinstance(stream, AudioStream), codec
        stream.layout = "mono"
        if bit_rate:
            stream.bit_rate = bit_rate
        container.mux(list(encode(stream, wave)))


def draw(wave: Wave, at: float, width: int = 320, height: int = 180) -> NDArray[np.uint8]:
    """[height, width, 3] uint8: the waveform on a dark ground, with a bar at the fraction ``at`` of its length."""
    picture = np.full((height, width, 3), (24, 28, 36), np.uint8)
    columns = np.array_split(np.abs(wave), width)
    for x, column in enumerate(columns):
        half = math.ceil(float(column.max()) / PEAK * height * 0.4)
        picture[height // 2 - half : height // 2 + half, x] = (120, 200, 160) if x < at * width else (90, 100, 115)
    picture[:, min(int(at * width), width - 2) :][:, :2] = (240, 180, 80)
    return picture


def write_mov(path: Path, wave: Wave, frames_per_second: int = 25) -> None:
    """H.264 pictures of the waveform with a moving bar, and the sound as 44.1 kHz stereo AAC: what a camera writes."""
    with av.open(path, "w", options={"fflags": "+bitexact"}) as container:
        # x264's assembly does not give the same bits every time.
        options = {"crf": "30", "x264-params": "threads=1:asm=0"}
        video = container.add_stream("libx264", rate=frames_per_second, options=options)
        video.width, video.height, video.pix_fmt = 320, 180, "yuv420p"
        audio = container.add_stream("aac", rate=44_100)
        audio.layout, audio.bit_rate = "stereo", 96_000
        count = math.ceil(len(wave) / RATE * frames_per_second)
        for index in range(count):
            frame = av.VideoFrame.from_ndarray(draw(wave, index / count), format="rgb24")
            frame.pts = index
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        container.mux(list(encode(audio, wave)))


def write_references(path: Path, files: dict[str, list[Spoken]]) -> None:
    """One row for each reading; a file in which nobody speaks has one row with an empty text."""
    with path.open("w", encoding="utf-8", newline="") as handle:
        rows = csv.writer(handle, delimiter="\t", lineterminator="\n")
        rows.writerow(["file", "start", "end", "language", "text"])
        for name, spoken in files.items():
            if not spoken:
                rows.writerow([name, "", "", "", ""])
            for part in spoken:
                rows.writerow([name, f"{part.start:.2f}", f"{part.end:.2f}", part.reading.language, part.reading.text])


def make(root: Path, out: Path) -> None:
    """Write all examples from the packages unpacked under ``root``."""
    sample, sample_text = join(root, [(0.3, AUSTEN[0])])
    long, long_text = join(root, paused(AUSTEN + COMMANDS, first=0.3, between=1.8))
    # A language ends before 30 s and is followed by the longest pause, so that a window of 30 s holds one language.
    blocks = ((0.3, AUSTEN), (3.0, ITALIAN), (3.0, RUSSIAN))
    languages, languages_text = join(root, (part for first, block in blocks for part in paused(block, first, 0.4)))
    clip, clip_text = join(root, [(0.3, AUSTEN[3])])
    noise = np.random.default_rng(0).normal(0, 0.1, 10 * RATE).astype(np.float32)

    write_audio(out / "sample.m4a", sample, "aac", bit_rate=48_000)
    write_audio(out / "languages.ogg", languages, "libopus", rate=48_000, bit_rate=24_000)
    write_audio(out / "silence.flac", np.zeros(10 * RATE, np.float32), "flac")
    write_audio(out / "long.mp3", long, "libmp3lame", bit_rate=40_000)
    write_audio(out / "noise.wav", noise, "pcm_s16le")
    write_mov(out / "clip.mov", clip)
    spoken = {"sample.m4a": sample_text, "languages.ogg": languages_text, "long.mp3": long_text, "clip.mov": clip_text}
    write_references(out / "references.tsv", spoken | {"silence.flac": [], "noise.wav": []})


def main() -> None:
    parser = argparse.ArgumentParser(description="Rebuild the example files from Debian packages.")
    parser.add_argument("--root", type=Path, default=Path("/"), help="where the packages are unpacked (default: /)")
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent, help="where to write the files")
    arguments = parser.parse_args()
    make(arguments.root, arguments.output)


if __name__ == "__main__":
    main()
