"""Clips of a TSV, read by the project's own loader of tables."""

from __future__ import annotations

from pathlib import Path

from whisper_moe.data.corpus import CorpusConfig
from whisper_moe.evaluate.measure import Clip
from whisper_moe.evaluate.run import gather


def read_clips(path: Path, limit: int | None = None) -> list[Clip]:
    """The first clips of ``path<TAB>text[<TAB>language]``; without a language they are English.

    Raises ``ValueError`` that names what is not there or cannot be read.
    """
    table = CorpusConfig(kind="table", source=str(path), languages=("en",), name=path.parent.name, limit=limit)
    clips, broken = gather([table])
    if broken:
        raise ValueError(f"{path}: " + "; ".join(f"{name}: {cause}" for name, cause in broken[:3]))
    return clips
