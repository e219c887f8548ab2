"""Kathbath: 1,684 hours of read speech in twelve Indian languages (IndicSUPERB, arXiv 2208.11761).

Two layouts. The Hub's (``ai4bharat/Kathbath``, gated): parquet, a configuration for each language, the splits ``train`` and
``valid``, sound in ``audio_filepath``. And that of the original archives, unpacked or as ``.tar``:

    …/<language>/<split>/[audio/]<id>-<speaker>-<f|m>.m4a
    …/<language>/<split>/transcription_n2w.txt              file name, tab, text

where transcripts may lie in another tree than the sound, and test splits are called ``test_known`` or ``testkn``;
what lies below a folder whose name has ``noisy`` in it is the noisy form of a test. Ids are the same in both layouts.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from whisper_moe.data.corpora import FILE, Corpus, CorpusConfig, Row, as_dataset
from whisper_moe.data.hub import audio_ref, files_of_split, load_rows, one_line
from whisper_moe.data.sample import AudioRef, DataError, Sample, Skipped

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

LANGUAGES = {
    "bengali": "bn",
    "gujarati": "gu",
    "hindi": "hi",
    "kannada": "kn",
    "malayalam": "ml",
    "marathi": "mr",
    "odia": "or",
    "punjabi": "pa",
    "sanskrit": "sa",
    "tamil": "ta",
    "telugu": "te",
    "urdu": "ur",
}
"""The Hub's names of the twelve, which the archives' folders have too, each with its code."""
SPLITS = ("train", "valid", "test-known", "test-unknown", "test-known-noisy", "test-unknown-noisy")
TRANSCRIPTS = "transcription_n2w.txt"
SOUND = "audio_filepath"
LANGUAGE = "kathbath_language"
"""The column that is added to the Hub's rows, with the language's code."""
_OPTIONAL = ("fname", "duration", "speaker_id")
_SOUNDS = frozenset(".m4a .wav .flac .mp3 .ogg .opus".split())
"""Extensions of recordings, converted ones included: only the stem has to agree with the transcript's."""
_SPEAKER = re.compile(r"-(\w+)-[fm]$")
_FORMS = (
    (re.compile(r"train"), "train"),
    (re.compile(r"(valid|dev)"), "valid"),
    (re.compile(r"test[-_ ]?unk"), "test-unknown"),
    (re.compile(r"test[-_ ]?kn"), "test-known"),
)
"""What a folder or archive of a split begins with."""


def open_kathbath(config: CorpusConfig) -> Corpus:
    """Hub id or local folder, languages and split of ``config``. Raises :class:`DataError`."""
    split = _split(config.split)
    if split is None:
        raise DataError(config.source, f"Kathbath has no split {config.split!r}: one of {', '.join(SPLITS)}")
    names = [name for name, code in LANGUAGES.items() if not config.languages or code in config.languages]
    if unknown := set(config.languages) - set(LANGUAGES.values()):
        there = ", ".join(LANGUAGES.values())
        raise DataError(config.source, f"Kathbath has no language {', '.join(sorted(unknown))}; it has {there}")
    root = Path(config.source)
    if root.is_file():
        raise DataError(root, "a file, where the corpus's folder or Hub id is expected")
    if root.is_dir() and not any(root.rglob("*.parquet")):
        return _open_archives(config, root, split, names)
    return _open_parquet(config, split, names)


def _split(name: str) -> str | None:
    """``valid`` for ``validation``, ``test-known-noisy`` for ``test_known_noisy``; none for what is no split."""
    plain = name.lower().removesuffix("noisy").rstrip("-_ ")
    noisy = "noisy" in name.lower()
    split = next((ours for form, ours in _FORMS if form.match(plain)), None)
    ours = f"{split}-noisy" if noisy else split
    return ours if ours in SPLITS else None


def _domain(split: str) -> str | None:
    return split.removeprefix("test-") if split.startswith("test-") else None


# The Hub's layout.


def _open_parquet(config: CorpusConfig, split: str, names: Sequence[str]) -> Corpus:
    from datasets import concatenate_datasets

    root = Path(config.source)
    parts, absent = [], []
    for name in names:
        files = files_of_split(root, split, ".parquet", within=name) if root.is_dir() else None
        if files == []:
            absent.append(name)
        else:
            parts.append(_language_part(config, split, name, files))
    if not parts or (absent and config.languages):
        raise DataError(root, f"no parquet files of the split {split!r} for {', '.join(absent)}")
    common = set.intersection(*(set(part.column_names or ()) for part in parts))
    columns = [SOUND, "text", LANGUAGE, *(name for name in _OPTIONAL if name in common)]
    dataset = concatenate_datasets([part.select_columns(columns) for part in parts])
    name = config.name or "kathbath"
    sample = partial(_hub_sample, folder=config.source, name=name, split=split)
    return Corpus(name, dataset, sample, "duration" if "duration" in common else None)


def _language_part(config: CorpusConfig, split: str, name: str, files: list[Path] | None) -> Dataset | IterableDataset:
    """The rows of one language, with its code in a column of their own."""
    from datasets import Dataset, Features, Value

    part = load_rows(config, split=split, configuration=name, files=files, needed=(SOUND, "text"))
    code = LANGUAGES[name]
    if isinstance(part, Dataset):
        return part.add_column(LANGUAGE, [code] * len(part))
    features = Features({**(part.features or {}), LANGUAGE: Value("string")})
    return part.map(_with_language, fn_kwargs={"code": code}, features=features)


def _with_language(row: Row, code: str) -> Row:
    return {**row, LANGUAGE: code}


def _hub_sample(row: Row, folder: str, name: str, split: str) -> Sample:
    sound: Any = row[SOUND]
    path = sound.get("path") if isinstance(sound, dict) else sound
    key = PurePosixPath(str(row.get("fname") or path or "")).stem
    if not key:
        raise DataError(folder, "a row with neither a file name nor a path", column="fname")
    language = row[LANGUAGE]
    id = _id(name, language, split, key)
    audio = audio_ref(sound, folder=Path(folder), name=id)
    duration = row.get("duration")
    speaker = row.get("speaker_id")
    return Sample(
        id=id,
        task="transcribe",
        text=_text(row["text"], id),
        language=language,
        target_language=language,
        audio=audio,
        duration=None if duration is None else float(duration),
        speaker=str(speaker) if speaker is not None else _speaker(key),
        domain=_domain(split),
    )


def _id(name: str, code: str, split: str, key: str) -> str:
    language = next(name for name, its in LANGUAGES.items() if its == code)
    return f"{name}/{language}/{split}/{key}"


def _speaker(key: str) -> str | None:
    found = _SPEAKER.search(key)
    return found[1] if found else None


def _text(text: object, id: str) -> str:
    """With single spaces: the transcripts have no-break spaces in them."""
    words = " ".join(text.split()) if isinstance(text, str) else ""
    if not words:
        raise DataError(id, "no text", column="text")
    return words


# The archives' layout.


@dataclass(slots=True)
class _Language:
    """What was found of one language of one split."""

    texts: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Stem: file name as listed, text (empty where the list has none)."""
    sounds: dict[str, dict[str, Row]] = field(default_factory=lambda: defaultdict(dict))
    """Stem: extension: where the file is."""


def _open_archives(config: CorpusConfig, root: Path, split: str, names: Sequence[str]) -> Corpus:
    found = {name: _Language() for name in names}
    for parts, place in _members(root):
        language, its_split = _place(parts)
        if language in found and its_split == split:
            _note(found[language], parts, place)
    corpus = config.name or "kathbath"
    rows: list[Row] = []
    missing: list[Skipped] = []
    for name, language in found.items():
        if not language.texts and (language.sounds or config.languages):
            what = f"{len(language.sounds):,} recordings and no" if language.sounds else "no recordings and no"
            raise DataError(root, f"{what} {TRANSCRIPTS} of {name}, {split}")
        its_rows, its_missing = _rows(language, LANGUAGES[name], f"{corpus}/{name}/{split}", str(root))
        rows += its_rows
        missing += its_missing
    if not rows:
        what = f"none of its {len(missing):,} recordings is there" if missing else "no recordings and no transcripts"
        raise DataError(root, f"{what}, of the split {split}")
    dataset = as_dataset(rows, _FEATURES, config)
    return Corpus(corpus, dataset, partial(_archive_sample, split=split), left_out=tuple(missing))


def _rows(language: _Language, code: str, prefix: str, root: str) -> tuple[list[Row], list[Skipped]]:
    """A row for each recording with a text, in the order of their names; and what is missing."""
    rows: list[Row] = []
    missing: list[Skipped] = []
    for stem, (file, text) in sorted(language.texts.items()):
        id, kinds = f"{prefix}/{stem}", language.sounds.get(stem)
        if kinds is None or not text:
            cause = "no text" if kinds else "no recording"
            missing.append(Skipped(id=id, place=root, kind="missing", cause=cause))
            continue
        place = kinds.get(PurePosixPath(file).suffix) or kinds[min(kinds)]
        rows.append({"id": id, "text": text, "language": code, "speaker": _speaker(stem), **place})
    silent = sorted(language.sounds.keys() - language.texts.keys())
    untold = (Skipped(id=f"{prefix}/{stem}", place=root, kind="missing", cause="no transcript") for stem in silent)
    return rows, [*missing, *untold]


_FEATURES = {
    **dict.fromkeys(("id", "text", "language", "speaker", FILE, "member"), "string"),
    **dict.fromkeys(("offset", "size"), "int64"),
}


def _members(root: Path) -> Iterator[tuple[tuple[str, ...], Row]]:
    """Every file below the root and in the archives there: the parts of its path, from the root's name on, and its place."""
    for folder, folders, files in os.walk(root):
        folders.sort()
        for file in sorted(files):
            path = Path(folder, file)
            parts = (root.resolve().name, *path.relative_to(root).parts)
            if file.endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")):
                raise DataError(path, "a compressed archive cannot be read in any order: decompress it to .tar")
            if path.suffix == ".tar":
                yield from _archived(path, parts)
            else:
                yield parts, {FILE: str(path), "member": None, "offset": None, "size": None}


def _archived(path: Path, parts: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Row]]:
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if member.isfile():
                    place = {FILE: str(path), "member": member.name, "offset": member.offset_data, "size": member.size}
                    yield (*parts[:-1], path.stem, *PurePosixPath(member.name).parts), place
    except tarfile.TarError as error:
        raise DataError(path, f"not a tar archive that can be read: {one_line(error)}") from None


def _place(parts: Sequence[str]) -> tuple[str | None, str | None]:
    """Language and split by the folders of a path; the folder of the split is below that of the language, or its archive."""
    folders = [part.lower() for part in parts[:-1]]
    at = next((index for index, part in enumerate(folders) if part in LANGUAGES), None)
    if at is None:
        return None, None
    below = folders[at + 1 : at + 2]
    if below == ["test"]:  # the noisy archives' name for both: which of them, their own name says
        below = []
    near = [*below, *reversed(folders[:at])]
    split = next((ours for part in near for form, ours in _FORMS if form.match(part)), None)
    if split and any("noisy" in part for part in folders):
        split = f"{split}-noisy"
    return folders[at], split if split in SPLITS else None


def _note(language: _Language, parts: Sequence[str], place: Row) -> None:
    file = PurePosixPath(parts[-1])
    if file.name == TRANSCRIPTS:
        _read_transcripts(_bytes(place), _named(place), language.texts)
    elif file.suffix.lower() in _SOUNDS and not file.name.startswith("."):
        language.sounds[file.stem].setdefault(file.suffix, place)


def _read_transcripts(data: bytes, named: str, texts: dict[str, tuple[str, str]]) -> None:
    """Lines of file name, tab (or space), text. Raises :class:`DataError` naming file and row."""
    for row, line in enumerate(data.split(b"\n"), 1):
        try:
            cells = line.decode("utf-8-sig" if row == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            raise DataError(named, f"not UTF-8 text: {error.reason}", row=row) from None
        if not cells:
            continue
        file, *text = re.split(r"\t|\s+", cells, maxsplit=1)
        words = " ".join(" ".join(text).split())
        stem = PurePosixPath(file).stem
        if texts.get(stem, (file, words))[1] != words:
            raise DataError(named, f"{file!r} stands there twice, with two texts", row=row, column="file")
        texts[stem] = (file, words)


def _named(place: Row) -> str:
    return place[FILE] if place["member"] is None else f"{place[FILE]}:{place['member']}"


def _bytes(place: Row) -> bytes:
    """What is in a file, or in a member of an archive."""
    if place["offset"] is None:
        return Path(place[FILE]).read_bytes()
    with open(place[FILE], "rb") as archive:
        archive.seek(place["offset"])
        return archive.read(place["size"])


def _archive_sample(row: Row, split: str) -> Sample:
    if row["offset"] is None:
        audio = AudioRef(path=row[FILE])
    else:
        try:
            audio = AudioRef(path=_named(row), data=_bytes(row))
        except OSError as error:
            raise DataError(row[FILE], f"{row['member']} cannot be read: {error.strerror}") from error
    return Sample(
        id=row["id"],
        task="transcribe",
        text=row["text"],
        language=row["language"],
        target_language=row["language"],
        audio=audio,
        speaker=row["speaker"],
        domain=_domain(split),
    )
