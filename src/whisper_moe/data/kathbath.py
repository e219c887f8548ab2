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
from pathlib import Path, PurePosixPath
from typing import Any

from whisper_moe.data.corpus import FILE, Corpus, CorpusConfig, Row, listed
from whisper_moe.data.hub import files_of_split, load_rows, one_line
from whisper_moe.data.rows import Cells, RowError, RowReader
from whisper_moe.data.sample import DataError, Skipped
from whisper_moe.data.table import stored_corpus

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
_OPTIONAL = ("fname", "duration", "speaker_id")
_SOUNDS = frozenset(".m4a .wav .flac .mp3 .ogg .opus".split())
"""Extensions of recordings, converted ones included: only the stem has to agree with the transcript's."""
_FORMS = {"train": "train", "(valid|dev)": "valid", "test[-_ ]?unk": "test-unknown", "test[-_ ]?kn": "test-known"}
"""What a folder or archive of a split begins with."""


def open_kathbath(config: CorpusConfig) -> Corpus:
    """Hub id or local folder, languages and split of ``config``. Raises :class:`DataError`."""
    split = _split(config.split.lower(), noisy="noisy" in config.split.lower())
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
    return _open_parquet(config, root, split, names)


def _split(name: str, *, noisy: bool) -> str | None:
    """``test-known-noisy`` for what begins with ``test_known`` and is noisy; none for what is no split."""
    split = next((ours for form, ours in _FORMS.items() if re.match(form, name)), None)
    split = f"{split}-noisy" if noisy else split
    return split if split in SPLITS else None


def _row(name: str, language: str, split: str, key: str) -> Row:
    """What the name of a recording says."""
    speaker = re.search(r"-(\w+)-[fm]$", key)
    domain = split.removeprefix("test-") if split.startswith("test-") else None
    return {"id": f"{name}/{language}/{split}/{key}", "speaker": speaker and speaker[1], "domain": domain}


# The Hub's layout.


def _open_parquet(config: CorpusConfig, root: Path, split: str, names: Sequence[str]) -> Corpus:
    from datasets import concatenate_datasets

    parts, absent = [], []
    for name in names:
        files = files_of_split(root, split, ".parquet", within=name) if root.is_dir() else None
        if files == []:
            absent.append(name)
            continue
        part = load_rows(config, split=split, configuration=name, files=files, needed=(SOUND, "text"))
        kept = part.select_columns([SOUND, "text", *(name for name in _OPTIONAL if name in (part.features or ()))])
        parts.append(_with_language(kept, LANGUAGES[name]))
    if not parts or (absent and config.languages):
        raise DataError(root, f"no parquet files of the split {split!r} for {', '.join(absent)}")
    common = set.intersection(*(set(part.features) for part in parts))
    dataset = concatenate_datasets([part.select_columns(sorted(common)) for part in parts])
    reader = _HubRows(config.source, root, config.name or "kathbath", config, SOUND)
    reader.split_name = split
    return stored_corpus(reader, dataset)


def _with_language(part: Any, code: str) -> Any:
    from datasets import Dataset, Features, Value

    if isinstance(part, Dataset):
        return part.add_column("language", [code] * len(part))
    return part.map(_say, fn_kwargs={"code": code}, features=Features({**part.features, "language": Value("string")}))


def _say(row: Row, code: str) -> Row:
    return {**row, "language": code}


class _HubRows(RowReader):
    """Named after their recordings, as those of the archives are."""

    split_name = ""

    def row(self, raw: Cells, number: int | None) -> Row:
        row = super().row(raw, number)
        key = PurePosixPath(str(raw.get("fname") or row["path"] or "")).stem
        if not key:
            raise self._wrong("fname", "a row with neither a file name nor a path")
        language = next(name for name, code in LANGUAGES.items() if code == row["language"])
        named = _row(self.name, language, self.split_name, key)
        speaker, text = row["speaker"] or named["speaker"], " ".join(row["text"].split())  # no-break spaces, too
        return row | named | {"path": key, "speaker": speaker, "text": text, "row": None}

    def _wrong(self, column: str, cause: str) -> RowError:
        return RowError(f"{self.file}: {self._at[1]}", cause, column=column)


# The archives' layout.


def _open_archives(config: CorpusConfig, root: Path, split: str, names: Sequence[str]) -> Corpus:
    texts: dict[tuple[str, str], tuple[str, str]] = {}
    """Language and stem: file name as listed, text (empty where the list has none)."""
    sounds: dict[tuple[str, str], dict[str, Row]] = defaultdict(dict)
    """Language and stem: extension: where the file is."""
    for parts, place in _members(root):
        language, its_split = _place(parts)
        file = PurePosixPath(parts[-1])
        if language not in names or its_split != split:
            continue
        if file.name == TRANSCRIPTS:
            _read_transcripts(language, place, texts)
        elif file.suffix.lower() in _SOUNDS and not file.name.startswith("."):
            sounds[language, file.stem].setdefault(file.suffix, place)
    for name in names:
        heard = sum(language == name for language, _ in sounds)
        if (heard or config.languages) and not any(language == name for language, _ in texts):
            what = f"{heard:,} recordings and no" if heard else "no recordings and no"
            raise DataError(root, f"{what} {TRANSCRIPTS} of {name}, {split}")
    rows: list[Row] = []
    missing: list[Skipped] = []
    for language, stem in sorted({*texts, *sounds}, key=lambda key: (names.index(key[0]), key[1])):
        file, text = texts.get((language, stem), ("", None))
        kinds, row = sounds.get((language, stem)), _row(config.name or "kathbath", language, split, stem)
        if kinds is None or not text:
            cause = "no recording" if kinds is None else "no transcript" if text is None else "no text"
            missing.append(Skipped(id=row["id"], place=str(root), kind="missing", cause=cause))
            continue
        code, place = LANGUAGES[language], kinds.get(PurePosixPath(file).suffix) or kinds[min(kinds)]
        rows.append({**row, "text": text, "language": code, "target_language": code, "task": "transcribe", **place})
    if not rows:
        what = f"none of its {len(missing):,} recordings is there" if missing else "no recordings and no transcripts"
        raise DataError(root, f"{what}, of the split {split}")
    return listed(config, config.name or "kathbath", root, rows, missing)


def _members(root: Path) -> Iterator[tuple[tuple[str, ...], Row]]:
    """Every file below the root and in the archives there: the parts of its path, from the root's name on, and its place."""
    for folder, folders, files in os.walk(root):
        folders.sort()
        for file in sorted(files):
            path = Path(folder, file)
            parts = (root.resolve().name, *path.relative_to(root).parts)
            if file.endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")):
                raise DataError(path, "a compressed archive cannot be read in any order: decompress it to .tar")
            if path.suffix != ".tar":
                yield parts, {FILE: str(path)}
                continue
            try:
                with tarfile.open(path, "r:") as archive:
                    for member in filter(tarfile.TarInfo.isfile, archive):
                        place = {"member": member.name, "offset": member.offset_data, "size": member.size}
                        yield (*parts[:-1], path.stem, *PurePosixPath(member.name).parts), {FILE: str(path), **place}
            except tarfile.TarError as error:
                raise DataError(path, f"not a tar archive that can be read: {one_line(error)}") from None


def _place(parts: Sequence[str]) -> tuple[str, str | None]:
    """Language and split by the folders of a path; the folder of the split is below that of the language, or its archive."""
    folders = [part.lower() for part in parts[:-1]]
    at = next((index for index, part in enumerate(folders) if part in LANGUAGES), None)
    if at is None:
        return "", None
    below = folders[at + 1 : at + 2]
    if below == ["test"]:  # the noisy archives' name for both: which of them, their own name says
        below = []
    noisy = any("noisy" in part for part in folders)
    near = (_split(part, noisy=noisy) for part in (*below, *reversed(folders[:at])))
    return folders[at], next(filter(None, near), None)


def _read_transcripts(language: str, place: Row, texts: dict[tuple[str, str], tuple[str, str]]) -> None:
    """Lines of file name, tab (or space), text. Raises :class:`DataError` naming file and row."""
    with open(place[FILE], "rb") as file:
        file.seek(place.get("offset", 0))
        data = file.read(place.get("size", -1))
    named = ":".join(filter(None, (place[FILE], place.get("member"))))
    for row, line in enumerate(data.split(b"\n"), 1):
        try:
            cells = line.decode("utf-8-sig" if row == 1 else "utf-8").split()
        except UnicodeDecodeError as error:
            raise DataError(named, f"not UTF-8 text: {error.reason}", row=row) from None
        if cells:
            said, key = (cells[0], " ".join(cells[1:])), (language, PurePosixPath(cells[0]).stem)
            if texts.setdefault(key, said)[1] != said[1]:
                raise DataError(named, f"{cells[0]!r} stands there twice, with two texts", row=row, column="file")
