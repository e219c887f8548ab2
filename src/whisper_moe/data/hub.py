"""Rows that ``datasets`` reads, from the Hub, a local copy or its own files; their sound as it is encoded."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from whisper_moe.data.corpus import STREAM_SHARDS, CorpusConfig
from whisper_moe.data.sample import AudioRef, DataError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SAVED = ("dataset_dict.json", "state.json")
"""What ``save_to_disk`` writes beside its files."""
_SPELLINGS = (("train", "training"), ("valid", "validation", "val", "dev"), ("test", "testing"), ("eval", "evaluation"))
"""What one split is called by different people; ``eval`` is ``valid`` to some and ``test`` to others, so it is neither."""
_BUILDERS = {".arrow": "arrow", ".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv"}


def one_line(error: BaseException) -> str:
    """The first sentence or so of what a library says."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def files_of_split(root: Path, split: str, *suffixes: str, within: str | None = None) -> list[Path]:
    """The files below a folder (its own name counts) that belong to a split by their own name or by that of a folder.

    :param within: only below a folder of this name.
    """
    forms = "|".join(re.sub("[-_]", "[-_]", name) for name in spellings_of(split))
    wanted = re.compile(rf"({forms})([-_.]?\d.*)?$", re.IGNORECASE)
    found = []
    for file in sorted(file for file in root.rglob("*") if file.suffix.lower() in suffixes):
        folders = [root.resolve().name, *file.relative_to(root).parts[:-1]]
        if within is not None:
            if within not in folders:
                continue
            folders = folders[folders.index(within) + 1 :]
        if any(wanted.match(name) for name in (file.stem, *folders)):
            found.append(file)
    return found


def load_rows(
    config: CorpusConfig,
    *,
    split: str,
    configuration: str | None = None,
    files: Sequence[Path] | None = None,
    spellings: Sequence[str] = (),
    needed: Iterable[str] = (),
) -> Dataset | IterableDataset:
    """Rows of a split from the Hub, or of local ``files``; every cause for which there are none is a :class:`DataError`.

    :param configuration: the Hub's name of the part to read.
    :param spellings: what the Hub may call the split instead.
    :param needed: columns that must be there.
    """
    from datasets import IterableDataset

    place = str(files[0] if len(files) == 1 else files[0].parent) if files else config.source
    try:
        dataset = _load(config, (split, *spellings), configuration, files)
        features = dataset.features
        if features is None and isinstance(dataset, IterableDataset):
            dataset = dataset._resolve_features()  # looks into the first rows
            features = dataset.features
    except Exception as error:  # the Hub, its gate, the network, parquet: each has errors of its own
        raise DataError(place, f"cannot be read: {one_line(error)}") from error
    assert features is not None
    there = list(features)
    for column in needed:
        if column not in there:
            raise DataError(place, f"the column is missing; there are {', '.join(there)}", column=column)
    return _encoded(dataset)


def _encoded(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """With all sound as it is stored."""
    from datasets import Audio

    for name, feature in (dataset.features or {}).items():
        if isinstance(feature, Audio):
            dataset = dataset.cast_column(name, Audio(decode=False))
    return dataset


def load_stored(config: CorpusConfig, file: Path | None) -> Dataset | IterableDataset | None:
    """What ``datasets`` reads of a table's source: a Hub id, a folder laid out as there, what ``save_to_disk`` wrote, or
    ``file``, if it is parquet or arrow. None for all else. Raises :class:`DataError`.
    """
    source, others = Path(config.source), spellings_of(config.split)[1:]
    if file is not None and file.is_file():
        stored = file.suffix.lower() in (".parquet", ".arrow")
        return load_rows(config, split=config.split, files=[file]) if stored else None
    if source.is_dir():
        if any((source / name).is_file() for name in _SAVED):
            return _saved(config, source)
        if not any(next(source.rglob(f"*{suffix}"), None) for suffix in (".parquet", ".arrow")):
            return None
    elif not _HUB_ID.fullmatch(config.source) or source.suffix.lower() in _BUILDERS:
        return None
    return load_rows(config, split=config.split, configuration=config.configuration, spellings=others)


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
    return _encoded(found.to_iterable_dataset(min(STREAM_SHARDS, len(found))) if config.streaming else found)


def spellings_of(split: str) -> tuple[str, ...]:
    """A split's name, and what others may call it."""
    same = next((names for names in _SPELLINGS if split in names), ())
    return (split, *(name for name in same if name != split))


def is_usual_split(name: str) -> bool:
    """Whether a split is called as splits are: ``train``, ``dev``, ``test-clean``."""
    return any(re.split("[-_.]", name.lower())[0] in names for names in _SPELLINGS)


def is_sound(feature: object) -> bool:
    """Whether a column holds sounds themselves: ``Audio``, {bytes, path}, {array, sampling_rate}, or bytes."""
    if isinstance(feature, dict):
        return not {"bytes", "array"}.isdisjoint(feature)
    return type(feature).__name__ == "Audio" or getattr(feature, "dtype", "") in ("binary", "large_binary")


def plain_features(features: Mapping[str, object]) -> list[str]:
    """The columns of words and numbers."""
    plain = ("Value", "ClassLabel")
    return [name for name, feature in features.items() if type(feature).__name__ in plain and not is_sound(feature)]


def _load(
    config: CorpusConfig, splits: Sequence[str], configuration: str | None, files: Sequence[Path] | None
) -> Dataset | IterableDataset:
    from datasets import load_dataset

    options: dict[str, Any] = {"streaming": config.streaming, "cache_dir": config.cache_dir}
    if files is not None:
        kind = files[0].suffix.lower()
        options |= {"sep": "\t"} if kind == ".tsv" else {}
        data_files = {splits[0]: [str(file) for file in files]}
        return load_dataset(_BUILDERS[kind], data_files=data_files, split=splits[0], **options)
    unknown: list[ValueError] = []
    for split in splits:
        try:
            return load_dataset(config.source, configuration, split=split, revision=config.revision, **options)
        except ValueError as error:
            if "split" not in str(error).lower():
                raise
            unknown.append(error)
    raise unknown[0]


def audio_ref(cell: object, *, folder: Path, name: str) -> AudioRef:
    """The sound of a cell: {bytes, path} or {path} as ``Audio(decode=False)`` gives it, {array, sampling_rate}, or a path.

    :param folder: where relative paths start.
    :param name: what messages call the sample.
    """
    if isinstance(cell, str) and cell:
        return AudioRef(path=str(folder / cell))
    if isinstance(cell, bytes) and cell:
        return AudioRef(path=name, data=cell)
    if isinstance(cell, dict):
        if cell.get("bytes"):
            return AudioRef(path=name, data=bytes(cell["bytes"]))
        if cell.get("array") is not None:
            return AudioRef(path=name, data=_wav(cell["array"], cell.get("sampling_rate"), name))
        if cell.get("path"):
            return AudioRef(path=str(folder / cell["path"]))
    raise DataError(
        name, f"no sound: neither bytes, nor an array, nor a path, but {type(cell).__name__}", column="audio"
    )


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
