"""A small corpus to evaluate on, and ways for a system to fail in a process of its own."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from media.recordings import encode

from whisper_moe.evaluate.material import Clip, Material, corpus_config, gather

RATE = 16_000
TEXTS = ("the cat sat on the mat", "a dog barked", "नमस्ते दुनिया", "birds sing in spring")
LANGUAGES = ("en", "en", "hi", "en")


def table(
    folder: Path, texts: Sequence[str] = TEXTS, languages: Sequence[str] = LANGUAGES, **columns: Sequence[str]
) -> Path:
    """Noise of 0.5 s, 1.0 s … with these texts; ``columns``: further ones."""
    random = np.random.default_rng(0)
    rows = ["\t".join(["path", "text", "language", *columns])]
    for number, (text, language, *more) in enumerate(zip(texts, languages, *columns.values(), strict=True)):
        wave = random.normal(0, 0.1, round((number + 1) * 0.5 * RATE)).astype(np.float32)
        encode(folder / f"clip-{number}.wav", wave[None], RATE, "pcm_f32le")
        rows.append("\t".join([f"clip-{number}.wav", text, language, *more]))
    file = folder / "table.tsv"
    file.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return file


def written(folder: Path, name: str, texts: dict[str, str]) -> str:
    """A system that has written these texts, by id."""
    file = folder / f"{name}.tsv"
    file.write_text("".join(f"{id}\t{text}\n" for id, text in {"id": "text", **texts}.items()), encoding="utf-8")
    return f"transcripts:{file}"


def material(*files: Path, **settings: Any) -> Material:
    usual: dict[str, Any] = {"split": None, "languages": (), "task": None, "limit": None}
    return gather([corpus_config(str(file), **usual | settings) for file in files])


def clips(file: Path) -> tuple[Clip, ...]:
    return tuple(material(file).clips)


def vanish(*_: Any, **__: Any) -> NoReturn:
    """A system that takes its process with it."""
    os._exit(7)


def linger(note: str, **_: Any) -> NoReturn:
    """A system that takes a minute to load, and notes which process does it."""
    Path(note).write_text(f"{os.getpid()}\n")
    time.sleep(60)
    raise AssertionError("nobody ended it")


def refuse(*_: Any, **__: Any) -> NoReturn:
    raise ValueError("no such\nmodel")
