"""What is made rather than recorded, after ``split.py``: tables for ``whisper-moe train`` beside the others.

    python recipes/eight-experts/synthetic.py noisy TABLES AUDIO              learners' clips in rooms and noise
    python recipes/eight-experts/synthetic.py hindi DATA TABLES AUDIO VOICE   the parallel texts, read by a synthesiser
    python recipes/eight-experts/synthetic.py second TABLES AUDIO VOICE       a second source of five sets: synthesisers read them

All is synthetic, and called so wherever a figure of it stands. *noisy* keeps the split of the recordings that it is made
of; the babble behind a clip is of clips of the same split. *hindi*: a sentence is in one split, a voice of the test in no other.
*second* is for routers, which would know a set by its microphone; texts keep their split, voices of the test are in no other.
VOICE is a Python file with a class ``Teacher(folder)``, called with text, language, voice and speed, that gives samples at its
``rate``; its weights are in the folder that the environment's ``TEACHER`` names. What is there already is not made again.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import wave
from collections.abc import Iterator, Mapping
from hashlib import sha256
from importlib.util import module_from_spec, spec_from_file_location
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from split import place, rows, write_table

from whisper_moe.config import SAMPLE_RATE
from whisper_moe.media.audio import load_audio
from whisper_moe.merge.router import below, in_room, noise

SENTENCES, TEST, DEV = 840, 0.15, 0.07
TEST_VOICE, VOICES = "hf_beta", ("hf_alpha", "hm_omega", "hm_psi")
DEVANAGARI = re.compile(r"[\u0900-\u0963\s,।?!.\-\u2019]+")
DECIBELS = (0.0, 12.0)
BABBLE = 3
"""Voices behind every other clip; steady noise behind the rest."""
SECOND = {"malayalam": "ml", "swahili": "sw", "spelled": "en", "telephone": "en", "digits": "en"}
SECOND_CLIPS = 24
ESPEAK = {"train": ("m1", "f1", "m3", "f4"), "test": ("m2", "f2")}
"""Variants of espeak-ng's voice, for languages that the synthesiser does not speak."""
ENGLISH = {
    "train": ("af_heart", "af_bella", "am_adam", "am_michael", "bf_emma", "bm_george", "am_puck", "af_sarah"),
    "test": ("bf_isabella", "bm_lewis", "af_sky", "am_onyx"),
}
Row = Mapping[str, str]


def random_of(key: str) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(sha256(key.encode()).digest()[:8]))


def write_sound(path: Path, samples: np.ndarray, rate: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".part")
    with wave.open(str(scratch), "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
    scratch.rename(path)


def in_noise(row: Row, others: list[Row]) -> np.ndarray:
    """A clip in a room of its own, with voices or noise 0 to 12 dB below it."""
    rng = random_of(row["path"])
    sound = in_room(load_audio(row["path"]).astype(np.float64), rng.uniform(0.2, 0.7), rng)
    decibels = rng.uniform(*DECIBELS)
    if rng.random() < 0.5:
        behind = noise(sound, decibels, rng)
    else:
        voices = [load_audio(others[index]["path"]) for index in rng.integers(len(others), size=BABBLE)]
        babble = sum(np.resize(voice / max(float(voice.std()), 1e-9), len(sound)) for voice in voices)
        behind = below(sound, in_room(np.asarray(babble), 0.6, rng), decibels)
    mixed = sound + behind
    return 0.7 * mixed / max(float(np.abs(mixed).max()), 1e-9)


def noisy(tables: Path, audio: Path) -> None:
    for split in ("train", "dev", "test"):
        clips, made = list(rows(tables / f"learners-{split}.tsv")), []
        for row in clips:
            path = audio / f"{sha256(row['path'].encode()).hexdigest()[:16]}.wav"
            if not path.exists():
                write_sound(path, in_noise(row, clips), SAMPLE_RATE)
            made.append((path.resolve(), row["text"], "en"))
        write_table(tables / f"noisy-{split}.tsv", made)


def sentences(data: Path) -> Iterator[tuple[str, str]]:
    """Split and text."""
    parallel = [data / "parallel/tatoeba-en-hi/hin.txt", data / "parallel/tico19/en-hi.tsv"]
    found = {line.split("\t")[1].strip() for path in parallel for line in path.read_text("utf-8").splitlines()}
    fit = [text for text in found if DEVANAGARI.fullmatch(text) and 3 <= len(text.split()) <= 14]
    fit = sorted(fit, key=place)[:SENTENCES]
    for text in fit:
        share = place(text) / place(fit[-1])
        yield "test" if share < TEST else "dev" if share < TEST + DEV else "train", text


def teacher_of(voice: Path) -> Any:
    spec = spec_from_file_location("voice", voice)
    assert spec is not None and spec.loader is not None
    module: Any = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Teacher(os.environ["TEACHER"])


def hindi(data: Path, tables: Path, audio: Path, voice: Path) -> None:
    teacher = teacher_of(voice)
    made: dict[str, list[tuple[Path, str, str]]] = {}
    for split, text in sentences(data):
        digest = sha256(text.encode()).digest()
        path = audio / f"{digest.hex()[:16]}.wav"
        if not path.exists():
            own = TEST_VOICE if split == "test" else VOICES[digest[9] % len(VOICES)]
            write_sound(path, teacher(text, "hi", own, speed=0.85 + digest[10] / 255 * 0.35), teacher.rate)
        made.setdefault(split, []).append((path.resolve(), text, "hi"))
    for split, clips in made.items():
        write_table(tables / f"hindi-{split}.tsv", clips)


def second(tables: Path, audio: Path, voice: Path) -> None:
    teacher = teacher_of(voice)
    audio.mkdir(parents=True, exist_ok=True)  # espeak-ng says nothing in its exit status
    for (name, language), split in product(SECOND.items(), ENGLISH):
        made: list[tuple[Path, str, str]] = []
        for row in sorted(rows(tables / f"{name}-{split}.tsv"), key=lambda row: place(row["path"]))[:SECOND_CLIPS]:
            key, text = f"{split} {row['path']}", row["text"]
            path, rng = audio / f"{sha256(key.encode()).hexdigest()[:16]}.wav", random_of(key)
            speed = rng.uniform(0.85, 1.2)
            made.append((path.resolve(), text, language))
            if path.exists():
                continue
            if language == "en":
                sound = teacher(text, language, str(rng.choice(ENGLISH[split])), speed=speed)
                loud = np.flatnonzero(np.abs(sound) > 0.02 * np.abs(sound).max())
                write_sound(
                    path, sound[loud[0] : loud[-1]], teacher.rate
                )  # digits are cut out in the first source, too
            else:
                speaker = f"{language}+{rng.choice(ESPEAK[split])}"
                command = ["espeak-ng", "-v", speaker, "-s", str(round(160 * speed)), "-w", str(path), "--", text]
                subprocess.run(command, check=True)
        write_table(tables / f"{name}-second-{split}.tsv", made)


if __name__ == "__main__":
    {"noisy": noisy, "hindi": hindi, "second": second}[sys.argv[1]](*map(Path, sys.argv[2:]))
