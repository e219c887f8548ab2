"""What is evaluated on: the clips of the corpora that were named, and those that cannot be read, each with the cause."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from whisper_moe.config import SAMPLE_RATE
from whisper_moe.data.corpora import kind_of, open_corpus
from whisper_moe.data.corpus import Corpus, CorpusConfig
from whisper_moe.data.inspect import listed
from whisper_moe.data.sample import DataError, Sample, Task
from whisper_moe.media.audio import MediaError

_SPLITS: dict[str, str] = {"kathbath": "valid", "include": "test", "wiki-translate": "train", "table": "test"}
"""What is evaluated on where no split is asked for."""


@dataclass(frozen=True)
class Clip:
    """A sample that can be read, with the seconds that it really has."""

    corpus: str
    sample: Sample
    seconds: float


@dataclass
class Material:
    """Clips in the order of their corpora."""

    clips: list[Clip] = field(default_factory=list)
    broken: list[tuple[str, str]] = field(default_factory=list)
    """Name and cause of every file or row that is left out."""
    sources: list[dict[str, str]] = field(default_factory=list)
    """Kind, source and split of each corpus."""


def corpus_config(
    source: str,
    *,
    split: str | None,
    languages: Sequence[str],
    task: Task | None,
    limit: int | None,
    columns: str | None = None,
) -> CorpusConfig:
    """``kathbath:FOLDER``, ``include:…``, ``wiki-translate:…``, ``table:…``; without a kind, the Hub id or what lies in
    the folder decides.

    Raises ``ValueError`` for what the corpus has not, such as a task.
    """
    prefix, _, rest = source.partition(":")
    kind: Any = prefix if rest and prefix in _SPLITS else kind_of(source)
    source = rest if rest and prefix in _SPLITS else source
    streaming = not Path(source).exists()
    return CorpusConfig(
        kind=kind, source=source, split=split or _SPLITS[kind], languages=tuple(languages), task=task,
        streaming=streaming, limit=limit, columns=listed(columns) if columns else (),
    )  # fmt: skip


def gather(configs: Sequence[CorpusConfig]) -> Material:
    """Open the corpora and decode every sound once: what is broken shows here, and nowhere later.

    Raises :class:`DataError` for a corpus that cannot be read at all, and ``ValueError`` where nothing is left.
    """
    material = Material()
    for config in configs:
        corpus = open_corpus(config)
        material.sources.append({"kind": config.kind, "source": _shown(config.source), "split": config.split})
        material.broken += [(each.id, each.cause) for each in corpus.left_out]
        for sample in _samples(corpus, material.broken, config.limit):
            _add(material, corpus.name, sample)
    if not material.clips:
        causes = "; ".join(f"{name}: {cause}" for name, cause in material.broken[:3]) or "the corpora are empty"
        raise ValueError(f"there is nothing to evaluate on: {causes}")
    return material


def _shown(source: str) -> str:
    """A local path by its last two names: the report may be published, and the rest is one machine's business."""
    return "/".join(Path(source).resolve().parts[-2:]) if Path(source).exists() else source


def _samples(corpus: Corpus, broken: list[tuple[str, str]], limit: int | None) -> Iterator[Sample]:
    rows = iter(corpus)
    for _ in islice(iter(int, 1), limit):  # rows that are no samples count: a limit is one of work
        try:
            yield next(rows)
        except StopIteration:
            return
        except DataError as error:
            broken.append((corpus.name, str(error)))


def _add(material: Material, corpus: str, sample: Sample) -> None:
    if sample.audio is None:
        material.clips.append(Clip(corpus, sample, sample.duration or 0.0))
        return
    try:
        samples = len(sample.audio.read())
    except MediaError as error:
        material.broken.append((sample.id, str(error)))
        return
    if not samples:
        material.broken.append((sample.id, f"{sample.audio.name}: no sound in it"))
        return
    material.clips.append(Clip(corpus, sample, samples / SAMPLE_RATE))
