"""A small corpus to evaluate on, and ways for a system to fail in a process of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from media.recordings import encode

from whisper_moe.evaluate.measure import Clip
from whisper_moe.evaluate.run import gather, plan

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


def clips(file: Path) -> list[Clip]:
    return gather(plan("default", [str(file)]).corpora)[0]
