"""Rows that ``datasets`` reads, from the Hub, a local copy or its own files; their sound as it is encoded."""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from whisper_moe.data.corpus import OTHER_NAMES, Corpus, CorpusConfig, Row, sample_of
from whisper_moe.data.sample import AudioRef, DataError, Sample

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from whisper_moe.data.table import RowReader

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SAVED = ("dataset_dict.json", "state.json")
"""What ``save_to_disk`` writes beside its files."""
_SPELLINGS = (("train", "training"), ("valid", "validation", "val", "dev"), ("test", "testing"), ("eval", "evaluation"))
"""What one split is called by different people; ``eval`` is ``valid`` to some and ``test`` to others, so it is neither."""
_BUILDERS = {".arrow": "arrow", ".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv"}


def one_line(error: BaseException) -> str:
    """The first sentence or so of what a library says."""
    return " ".join(str(error).split())[:300] or type(error).__name__


# Splits.


def spellings_of(split: str) -> tuple[str, ...]:
    """A split's name, and what others may call it."""
    same = next((names for names in _SPELLINGS if split in names), ())
    return (split, *(name for name in same if name != split))


def is_usual_split(name: str) -> bool:
    """Whether a split is called as splits are: ``train``, ``dev``, ``test-clean``."""
    return any(re.split("[-_.]", name.lower())[0] in names for names in _SPELLINGS)


# Datasets.


def load_rows(config: CorpusConfig, files: Sequence[Path] | None = None) -> Dataset | IterableDataset:
    """Rows of the split from the Hub, or of local ``files``; every cause for which there are none is a :class:`DataError`."""
    try:
        dataset = _load(config) if files is None else _load_files(config, files)
        if dataset.features is None:
            dataset = dataset._resolve_features()  # pyright: ignore[reportAttributeAccessIssue] (of a stream: looks into the first rows)
    except Exception as error:  # the Hub, its gate, the network, parquet: each has errors of its own
        place = config.source if not files else files[0] if len(files) == 1 else files[0].parent
        raise DataError(place, f"cannot be read: {one_line(error)}") from error
    return _encoded(dataset)


def _load_files(config: CorpusConfig, files: Sequence[Path]) -> Dataset | IterableDataset:
    from datasets import load_dataset

    kind, paths = files[0].suffix.lower(), {config.split: [str(file) for file in files]}
    options: dict[str, Any] = {"sep": "\t"} if kind == ".tsv" else {}
    return load_dataset(_BUILDERS[kind], data_files=paths, split=config.split, streaming=config.streaming, **options)


def _load(config: CorpusConfig) -> Dataset | IterableDataset:
    from datasets import load_dataset

    options: dict[str, Any] = {"revision": config.revision, "streaming": config.streaming}
    unknown: list[ValueError] = []
    for name in spellings_of(config.split):
        try:
            return load_dataset(config.source, config.configuration, split=name, **options)
        except ValueError as error:
            if "split" not in str(error).lower():
                raise
            unknown.append(error)
    raise unknown[0]


def load_stored(config: CorpusConfig, file: Path | None) -> Dataset | IterableDataset | None:
    """What ``datasets`` reads of a table's source: a Hub id, a folder laid out as there, what ``save_to_disk`` wrote, or
    ``file``, if it is parquet or arrow. None for all else. Raises :class:`DataError`.
    """
    source = Path(config.source)
    if file is not None and file.is_file():
        stored = file.suffix.lower() in (".parquet", ".arrow")
        return load_rows(config, [file]) if stored else None
    if source.is_dir():
        if any((source / name).is_file() for name in _SAVED):
            return _saved(config, source)
        if not any(file.suffix in (".parquet", ".arrow") for file in source.rglob("*")):
            return None
    elif not _HUB_ID.fullmatch(config.source) or source.suffix.lower() in _BUILDERS:
        return None
    return load_rows(config)


def _saved(config: CorpusConfig, folder: Path) -> Dataset | IterableDataset:
    """The split of what ``save_to_disk`` wrote, or all of it where it has none."""
    from datasets import DatasetDict, load_from_disk

    try:
        found = load_from_disk(str(folder))
    except Exception as error:  # of files, of Arrow, of features that this version does not know
        raise DataError(folder, f"cannot be read: {one_line(error)}") from error
    if isinstance(found, DatasetDict):
        split = next((name for name in spellings_of(config.split) if name in found), None)
        if split is None:
            raise DataError(folder, f"no split {config.split!r}; there are {', '.join(map(str, found))}")
        found = found[split]
    return _encoded(found.to_iterable_dataset() if config.streaming else found)


def _encoded(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """With all sound as it is stored."""
    from datasets import Audio

    for name, feature in (dataset.features or {}).items():
        if isinstance(feature, Audio):
            dataset = dataset.cast_column(name, Audio(decode=False))
    return dataset


# Cells.


def is_sound(feature: object) -> bool:
    """Whether a column holds sounds themselves: ``Audio``, {bytes, path}, {array, sampling_rate}, or bytes."""
    if isinstance(feature, dict):
        return not {"bytes", "array"}.isdisjoint(feature)
    return type(feature).__name__ == "Audio" or getattr(feature, "dtype", "") in ("binary", "large_binary")


def sound_column(dataset: Dataset | IterableDataset, given: str | None) -> tuple[str | None, list[str]]:
    """The column that holds sounds, if ``path`` (or the ``given`` one) is not of words; and what is to be said of the choice."""
    sounds = [name for name, feature in (dataset.features or {}).items() if is_sound(feature)]
    if given is not None:
        return given if given in sounds else None, []
    if known := [name for name in ("path", *OTHER_NAMES["path"]) if name in sounds]:
        return known[0], []
    if len(sounds) == 1:
        return sounds[0], [f"path is the column {sounds[0]!r}, the only one that holds sounds"]
    return None, []


def plain_columns(features: Mapping[str, object]) -> list[str]:
    """The columns of words and numbers."""
    plain = ("Value", "ClassLabel")
    return [name for name, feature in features.items() if type(feature).__name__ in plain and not is_sound(feature)]


def plain_cells(raw: Row, features: Mapping[str, Any], sound: str | None) -> Row:
    """A row's words and numbers, and of its sound the path. Of a class that is stored as its number, the name."""
    cells = {} if sound is None else {sound: raw[sound].get("path") if isinstance(raw[sound], dict) else None}
    for name in plain_columns(features):
        value, named = raw[name], hasattr(features[name], "int2str")
        cells[name] = features[name].int2str(value) if named and isinstance(value, int) and value >= 0 else value
    return cells


def numbered_cells(rows: Dataset, sound: str | None) -> Iterator[tuple[int, Row]]:
    """:func:`plain_cells` of every row, with its number from 1. The sounds stay on disk."""
    features, path = rows.features, f"{sound}.path"
    flat: Any = rows.with_format(None).flatten()
    names = [*plain_columns(features), *([path] if path in flat.column_names else [])]
    batches = flat.select_columns(names).iter(batch_size=1_000)
    columns = (zip(*(batch[name] for name in names), strict=True) for batch in batches)
    for number, values in enumerate(chain.from_iterable(columns), 1):
        raw = dict(zip(names, values, strict=True))
        yield number, plain_cells({sound: {"path": raw.get(path)}, **raw} if sound else raw, features, sound)


def audio_ref(cell: object, *, folder: Path, name: str) -> AudioRef:
    """The sound of a cell: {bytes, path} or {path} as ``Audio(decode=False)`` gives it, {array, sampling_rate}, bytes, or a
    path.

    :param folder: where relative paths start.
    :param name: what messages call the sample.
    """
    form = {bytes: "bytes", str: "path"}.get(type(cell), "")
    found: dict[str, Any] = cell if isinstance(cell, dict) else {form: cell}
    if found.get("bytes"):
        return AudioRef(path=name, data=bytes(found["bytes"]))
    if found.get("array") is not None:
        return AudioRef(path=name, data=_wav(found["array"], found.get("sampling_rate"), name))
    if found.get("path"):
        return AudioRef(path=str(folder / found["path"]))
    cause = f"no sound: neither bytes, nor an array, nor a path, but {type(cell).__name__}"
    raise DataError(name, cause, column="audio")


def _wav(array: Any, rate: Any, name: str) -> bytes:
    """Samples as a float WAV: from there on, they are a sound like any other."""
    try:
        samples = np.asarray(array, np.float32)
        if samples.ndim != 1 or not isinstance(rate, int) or not 0 < rate < 1 << 30:
            raise ValueError(f"{samples.ndim} dimensions at {rate!r} Hz")
    except (TypeError, ValueError) as error:
        raise DataError(name, f"not an array of samples: {one_line(error)}", column="audio") from None
    sound = samples.astype("<f4").tobytes()
    form = struct.pack("<4s4sIHHIIHH4sI", b"WAVE", b"fmt ", 16, 3, 1, rate, rate * 4, 4, 32, b"data", len(sound))
    return struct.pack("<4sI", b"RIFF", len(form) + len(sound)) + form + sound


# Corpora.


def stored_corpus(reader: RowReader, dataset: Any) -> Corpus:
    """What a reader makes of the rows of a dataset: all of them now, or of a stream each as it comes."""
    features, sound = dataset.features or {}, reader.sound
    reader.check_columns([*plain_columns(features), *([sound] if sound else [])], None)
    if hasattr(dataset, "__len__"):
        sounds = dataset.select_columns([sound]) if sound else None
        read = partial(_stored_sample, sounds=sounds, sound=sound, folder=reader.folder) if sound else sample_of
        return reader.corpus(numbered_cells(dataset, sound), read)
    if sound is None:
        dataset = dataset.select_columns(plain_columns(features))
    about = {"reader": reader, "features": features}
    wanted = dataset.filter(partial(_wanted, **about))
    return Corpus(reader.name, wanted, partial(_streamed, **about), remarks=reader.told())


def _stored_sample(row: Row, sounds: Any, sound: str, folder: Path) -> Sample:
    """With the sound of a row that is checked; raises :class:`DataError` where there is none."""
    sample = sample_of(row)
    return sample if row["stored"] is None else _with_sound(sample, sounds[row["stored"]][sound], row, folder)


def _with_sound(sample: Sample, cell: object, row: Row, folder: Path) -> Sample:
    whole = audio_ref(cell, folder=folder, name=row["id"])
    return replace(sample, audio=replace(whole, start=row["start"] or 0.0, end=row["end"]))


def _wanted(raw: Row, reader: RowReader, features: dict[str, Any]) -> bool:
    return reader.wanted(plain_cells(raw, features, reader.sound))


def _streamed(raw: Row, reader: RowReader, features: dict[str, Any]) -> Sample:
    """The sample of a row as it comes. Raises :class:`DataError` for one that is none."""
    row = reader.row(plain_cells(raw, features, reader.sound), None)
    sample = sample_of(row)
    if not reader.sound or sample.task == "translate-text":
        return sample
    sample = _with_sound(sample, raw[reader.sound], row, reader.folder)
    assert sample.audio is not None
    if row["path"] is None:  # equal texts are told apart by their sounds
        id = f"{sample.id}~{hashlib.blake2b(sample.audio.data or b'', digest_size=8).hexdigest()}"
        return replace(sample, id=id, audio=replace(sample.audio, path=id))
    return sample
