"""Miniatures of the corpora, in exactly their layouts: speech by espeak-ng where it is installed, drawn films."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from media.recordings import Sound, encode, tone
from numpy.typing import NDArray

from whisper_moe.config_aside import FilmConfig
from whisper_moe.media.video import load_film

VOICES = {"hindi": "hi", "odia": "or", "tamil": "ta", "urdu": "ur"}
TEXTS = {
    "hindi": ["नमस्ते दुनिया", "आज मौसम अच्छा है", "भारत एक देश है"],
    "odia": ["ନମସ୍କାର ବିଶ୍ୱ", "ଓଡ଼ିଶା ଏକ ରାଜ୍ୟ", "ଏହା ଏକ ବହି"],
    "tamil": ["வணக்கம் உலகம்", "இது ஒரு புத்தகம்", "நன்றி"],
    "urdu": ["سلام دنیا", "یہ ایک کتاب ہے", "شکریہ"],
}
"""Read by as many speakers of the miniature."""


@cache
def speech(text: str, voice: str) -> Sound:
    """[1, samples] at 22,050 Hz; a tone as long as the text where there is no espeak-ng."""
    if shutil.which("espeak-ng") is None:
        return tone(0.5 + 0.05 * len(text), 22_050)
    said = subprocess.run(["espeak-ng", "-v", voice, "--stdout", text], capture_output=True, check=True, timeout=60)
    return np.frombuffer(said.stdout[44:], np.int16)[None].astype(np.float32) / 32_768


def recording(path: Path, language: str, number: int) -> Path:
    """An m4a (or whatever the extension says) of one of the texts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    codec = {".m4a": "aac", ".wav": "pcm_s16le", ".opus": "libopus", ".flac": "flac"}[path.suffix]
    sound = speech(TEXTS[language][number], VOICES[language])
    if codec != "libopus":
        return encode(path, sound, 22_050, codec)
    return encode(path.with_suffix(".ogg"), tone(1.0, 48_000), 48_000, codec).rename(path)


def name(language: str, number: int) -> str:
    """As Kathbath's: id, speaker, f or m."""
    return f"84442493{sorted(TEXTS).index(language)}{number}-{100 + number}-{'fm'[number % 2]}"


def archives(
    root: Path,
    languages: Sequence[str] = ("hindi", "odia"),
    split: str = "train",
    *,
    audio: str = "audio",
    top: str = "data",
) -> Path:
    """Kathbath's archives, unpacked: ``data/<language>/<split>/[audio/]*.m4a`` and the transcripts."""
    for language in languages:
        folder = root / top / language / split
        for number in range(3):
            recording(folder / audio / f"{name(language, number)}.m4a", language, number)
        lines = [f"{name(language, number)}.m4a\t{text}\n" for number, text in enumerate(TEXTS[language])]
        (folder / "transcription_n2w.txt").write_text("".join(lines), encoding="utf-8")
    return root


def tarred(folder: Path, into: Path, how: str = "") -> Path:
    """Every folder's recordings in one archive, the transcripts in another, and nothing beside them; ``how``: compressed."""
    into.mkdir(parents=True)
    ending, mode = f".tar.{how}".rstrip("."), f"w:{how}"
    with (
        tarfile.open(into / f"train_audio{ending}", mode) as sounds,
        tarfile.open(into / f"transcripts_n2w{ending}", mode) as texts,
    ):
        for file in sorted(file for file in folder.rglob("*") if file.is_file()):
            (texts if file.suffix == ".txt" else sounds).add(file, file.relative_to(folder).as_posix())
    return into


def hub_rows(language: str, form: str = "bytes") -> dict[str, list[Any]]:
    """Rows as the Hub's parquet has them; ``form``: what ``audio_filepath`` holds."""
    rows: dict[str, list[Any]] = {column: [] for column in ("fname", "text", "audio_filepath", "lang", "duration")}
    for number, text in enumerate(TEXTS[language]):
        sound, file = speech(text, VOICES[language]), f"{name(language, number)}.m4a"
        cell: dict[str, Any] = {"array": sound[0].tolist(), "sampling_rate": 22_050, "path": file}
        if form == "bytes":
            with tempfile.TemporaryDirectory() as folder:
                cell = {"bytes": recording(Path(folder) / file, language, number).read_bytes(), "path": file}
        values = (file, text, cell, language, round(sound.shape[1] / 22_050, 3))
        for column, value in zip(rows.values(), values, strict=True):
            column.append(value)
    return rows


def parquet(path: Path, rows: Mapping[str, list[Any]], audio: bool = False) -> Path:
    """A parquet file; ``audio``: with the note by which ``datasets`` knows the column of sounds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not audio:
        pq.write_table(pa.table(dict(rows)), path)
        return path
    import datasets

    table = datasets.Dataset.from_dict(dict(rows))
    table.cast_column("audio_filepath", datasets.Audio(decode=False)).to_parquet(path)
    return path


def hub_copy(
    root: Path, languages: Sequence[str] = ("hindi", "odia"), form: str = "bytes", valid: str | None = None
) -> Path:
    """A local copy of the Hub's Kathbath, in two files for each language; ``valid``: one with a clip to be judged by, too."""
    card = ["---", "configs:"]
    for language in languages:
        rows = hub_rows(language, form)
        splits = ("train", "valid") if language == valid else ("train",)
        card += [f"- config_name: {language}", "  data_files:"]
        card += [f"  - {{split: {split}, path: {language}/{split}-*}}" for split in splits]
        if language == valid:
            some = {name: column[:1] for name, column in rows.items()}
            parquet(root / language / "valid-00000-of-00001.parquet", some, audio=form == "bytes")
        for part, cells in enumerate((slice(0, 2), slice(2, 3))):
            some = {name: column[cells] for name, column in rows.items()}
            parquet(root / language / f"train-0000{part}-of-00002.parquet", some, audio=form == "bytes")
    (root / "README.md").write_text("\n".join([*card, "---", ""]))
    return root


# Films.


def picture(number: int, width: int = 96, height: int = 64) -> NDArray[np.uint8]:
    """A grey picture whose brightness says its number (up to 20), with a white mark in its upper left corner."""
    drawn = np.full((height, width, 3), 10 * number, np.uint8)
    drawn[: height // 4, : width // 4] = 255
    return drawn


def film(path: Path, times: Sequence[float], *, width: int = 96, height: int = 64, codec: str = "mpeg4") -> Path:
    """Pictures 0, 1, 2 … shown from these seconds on; the container follows the extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        track = container.add_stream(codec, rate=25)
        assert isinstance(track, av.VideoStream)
        track.width, track.height, track.pix_fmt = width, height, "yuvj420p" if codec == "mjpeg" else "yuv420p"
        track.codec_context.time_base = track.time_base = Fraction(1, 1_000)
        track.bit_rate = 2_000_000
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(picture(number, width, height), format="rgb24")
            frame.pts, frame.time_base = round(1_000 * time), Fraction(1, 1_000)
            container.mux(track.encode(frame))
        container.mux(track.encode(None))
    return path


def frames_of(source: Any, rate: float = 25, **options: Any) -> NDArray[np.uint8]:
    """What is read of a film; without ``fit``, at its own size."""
    return load_film(source, FilmConfig(rate=rate), **{"fit": lambda width, height: (width, height)} | options)


def number_of(frame: NDArray[np.uint8]) -> int:
    """Which picture a decoded frame is."""
    return round(float(np.median(frame)) / 10)


SIGNS = {
    "train": [
        "Greetings/48. Hello/MVI_0089.MOV",
        "Places/19. House/Extra/MVI_3439.MOV",
        "Adjectives/94. good/MVI_9269.MOV",
    ],
    "val": ["Greetings/51. Good Morning/MVI_0099.MOV"],
    "test": ["Animals/4. Bird/MVI_2988.MOV", "Electronics/54. Cell phone/MVI_9100.MOV"],
}
"""Paths of INCLUDE's own."""


def signs(root: Path) -> Path:
    """INCLUDE's tree of videos."""
    for paths in SIGNS.values():
        for path in paths:
            film(root / path, [0, 0.04, 0.08, 0.12, 0.16])
    return root


def sign_lists(root: Path) -> Path:
    """INCLUDE's split lists; of INCLUDE-50, the first of each."""
    folder = root / "train_test_paths"
    folder.mkdir(parents=True, exist_ok=True)
    for split, paths in SIGNS.items():
        (folder / f"include_{split}.txt").write_text("\n".join(paths) + "\n")
        (folder / f"include50_{split}.txt").write_text(paths[0] + "\n")
    return root


WIKI = {
    "doc_id": [11, 12, 13],
    "url": ["https://en.wikipedia.org/a", "https://en.wikipedia.org/b", "https://en.wikipedia.org/c"],
    "title": ["A", "B", "C"],
    "eng_Latn": ["A river.", "A mountain.", "A town."],
    "hin_Deva": ["एक नदी।", "एक पहाड़।", None],
    "ory_Orya": ["ଏକ ନଦୀ।", "", "ଏକ ସହର।"],
    "tam_Taml": ["ஒரு ஆறு.", "ஒரு மலை.", "ஒரு நகரம்."],
}
"""Wide rows, with two empty cells."""
