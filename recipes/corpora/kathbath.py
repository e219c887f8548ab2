"""Kathbath's archives to tables: 1,684 hours of read speech in twelve Indian languages (IndicSUPERB, arXiv 2208.11761).

    python recipes/corpora/kathbath.py ARCHIVES OUT [--splits train,valid] [--languages hi,or]

ARCHIVES is a folder of the original archives, unpacked or as ``.tar``, compressed or not:
``…/<language>/<split>/[audio/]<id>-<speaker>-<f|m>.m4a`` beside ``transcription_n2w.txt`` (file name, tab, text). Transcripts may
lie in another tree than the sound, and what lies below a folder with ``noisy`` in its name is the noisy form of a test.
Recordings may have been converted: only their stem has to agree with the transcript's.

OUT gets a table for each split that is there: train, valid, test-known, test-unknown, and either with -noisy; and in sound/ the
recordings that were in an archive. A table has a row for all that is listed or heard: of a recording or a text that is not
there, its reader says so. What the Hub has (``ai4bharat/Kathbath``, gated) is read as it is: recipes/practical.yaml.
"""

from __future__ import annotations

import argparse
import lzma
import os
import re
import sys
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TypeAlias

from formats import listed, script, write

from whisper_moe.data.corpus import Row
from whisper_moe.data.hub import one_line
from whisper_moe.data.sample import DataError
from whisper_moe.data.table import decoded
from whisper_moe.media.languages import language_code

_TWELVE = "bengali gujarati hindi kannada malayalam marathi odia punjabi sanskrit tamil telugu urdu"
LANGUAGES = {name: language_code(name) for name in _TWELVE.split()}
"""By the names of the archives' folders, each with its code."""
SPLITS = ("train", "valid", "test-known", "test-unknown", "test-known-noisy", "test-unknown-noisy")
SPLIT = re.compile("(train)|(valid|dev)|(test[-_ ]?kn)|(test[-_ ]?unk)")
"""What a folder or archive of one of the first four begins with."""
TRANSCRIPTS, SOUND = "transcription_n2w.txt", "sound"
SOUNDS = frozenset(".m4a .wav .flac .mp3 .ogg .opus".split())
ARCHIVE = re.compile(r"\.(tar(\.(gz|bz2|xz))?|tgz)$")
BROKEN = (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError)
COLUMNS = ("path", "text", "language", "speaker", "domain")
Key: TypeAlias = tuple[str, str, str]
"""Split, language by its name, and stem of the recording."""


@dataclass(frozen=True)
class File:
    """A file of the corpus, or a member of an archive."""

    parts: tuple[str, ...]
    """Of its path, from the name of the corpus's folder on; an archive is a folder, too."""
    path: Path
    member: tuple[tarfile.TarFile, tarfile.TarInfo] | None = None

    def __str__(self) -> str:
        return str(self.path) if self.member is None else f"{self.path}:{self.member[1].name}"

    def read(self) -> bytes:
        try:
            if self.member is None:
                return self.path.read_bytes()
            content = self.member[0].extractfile(self.member[1])
            assert content is not None
            return content.read()
        except BROKEN as error:
            raise DataError(str(self), f"cannot be read: {one_line(error)}") from None

    def beside(self, out: Path, key: Key) -> Path:
        """Where it is, or where it is put if it is in an archive."""
        if self.member is None:
            return self.path
        target = out / place(key, self.parts[-1])
        if not target.is_file() or target.stat().st_size != self.member[1].size:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(self.read())
        return target


@dataclass
class Found:
    """What there is of the splits and languages that are asked for."""

    texts: dict[Key, tuple[str, str]] = field(default_factory=dict)
    """File name as listed, text (empty where the list has none)."""
    sounds: dict[Key, dict[str, Path]] = field(default_factory=dict)
    """Extension: file."""

    def add_transcripts(self, file: File, split: str, language: str) -> None:
        """Lines of file name, tab (or space), text. Raises :class:`DataError` naming file and row."""
        for row, line in enumerate(decoded(file.read().split(b"\n"), str(file)), 1):
            if cells := line.split():
                said, key = (cells[0], " ".join(cells[1:])), (split, language, PurePosixPath(cells[0]).stem)
                if self.texts.setdefault(key, said)[1] != said[1]:
                    cause = f"{cells[0]!r} stands there twice, with two texts"
                    raise DataError(str(file), cause, row=row, column="file")


def place(key: Key, name: str) -> Path:
    """In OUT, of a recording from an archive."""
    return Path(SOUND, key[0], key[1], PurePosixPath(name).name)


def split_of(name: str, *, noisy: bool) -> str | None:
    """``test-known-noisy`` for what begins with ``test_known`` and is noisy; none for what is no split."""
    found = SPLIT.match(name)
    split = SPLITS[(found.lastindex or 0) - 1] + "-noisy" * noisy if found else None
    return split if split in SPLITS else None


def split_and_language(parts: Sequence[str]) -> tuple[str | None, str]:
    """By the folders of a path; the folder of the split is below that of the language, or its archive."""
    folders = [part.lower() for part in parts[:-1]]
    at = next((index for index, part in enumerate(folders) if part in LANGUAGES), None)
    if at is None:
        return None, ""
    below = [part for part in folders[at + 1 : at + 2] if part != "test"]  # so do noisy archives call both tests
    noisy = any("noisy" in part for part in folders)
    near = (split_of(part, noisy=noisy) for part in (*below, *reversed(folders[:at])))
    return next(filter(None, near), None), folders[at]


def files_below(root: Path) -> Iterator[File]:
    """Every file below the root and in the archives there."""
    for folder, folders, files in os.walk(root):
        folders.sort()
        for name in sorted(files):
            path = Path(folder, name)
            above = (root.name, *path.relative_to(root).parts[:-1])
            if (ending := ARCHIVE.search(name)) is None:
                yield File((*above, name), path)
                continue
            try:
                with tarfile.open(path) as archive:
                    for member in filter(tarfile.TarInfo.isfile, archive):
                        inside = PurePosixPath(member.name).parts
                        yield File((*above, name[: ending.start()], *inside), path, (archive, member))
            except BROKEN as error:
                raise DataError(path, f"not a tar archive that can be read: {one_line(error)}") from None


def gather(root: Path, out: Path, splits: Sequence[str], names: Sequence[str]) -> Found:
    """Read the transcripts, and find the recordings."""
    found = Found()
    for file in files_below(root):
        split, language = split_and_language(file.parts)
        name = PurePosixPath(file.parts[-1])
        if split is None or language not in names or (splits and split not in splits):
            continue
        if name.name == TRANSCRIPTS:
            found.add_transcripts(file, split, language)
        elif name.suffix.lower() in SOUNDS and not name.name.startswith("."):
            key = (split, language, name.stem)
            kinds = found.sounds.setdefault(key, {})
            if name.suffix not in kinds:
                kinds[name.suffix] = file.beside(out, key)
    return found


def rows_of(found: Found, split: str, names: Sequence[str], out: Path) -> Iterator[Row]:
    """Of a split, language after language."""
    keys = (key for key in found.texts.keys() | found.sounds.keys() if key[0] == split)
    for key in sorted(keys, key=lambda key: (names.index(key[1]), key[2])):
        _, language, stem = key
        file, text = found.texts.get(key, ("", ""))
        kinds, speaker = found.sounds.get(key, {}), re.search(r"-(\w+)-[fm]$", stem)
        path = (kinds.get(PurePosixPath(file).suffix) or kinds[min(kinds)]) if kinds else out / place(key, file)
        yield {
            "path": os.path.relpath(path, out),
            "text": text,
            "language": LANGUAGES[language],
            "speaker": speaker and speaker[1],
            "domain": split.removeprefix("test-") if split.startswith("test-") else None,
        }


def check(found: Found, root: Path, splits: Sequence[str], names: Sequence[str], *, asked: bool) -> None:
    """Raise :class:`DataError` where there are recordings without any transcript, or nothing of a language that is asked for."""
    heard = Counter(key[:2] for key in found.sounds)
    said = Counter(key[:2] for key in found.texts)
    for split in splits:
        for name in names:
            if not said[split, name] and (heard[split, name] or asked):
                many = heard[split, name] or "no"
                raise DataError(root, f"{many} recordings and no {TRANSCRIPTS} of {name}, {split}")
        if not any(each == split for each, _ in said):
            raise DataError(root, f"no samples of the split {split!r}")


def convert(root: Path, out: Path, splits: Sequence[str] = (), languages: Sequence[str] = ()) -> None:
    """Write the tables; without ``splits`` or ``languages``, of all that is there. Raises :class:`DataError`."""
    asked = [split_of(name.lower(), noisy="noisy" in name.lower()) for name in splits]
    if None in asked:
        wrong = splits[asked.index(None)]
        raise DataError(root, f"Kathbath has no split {wrong!r}: one of {', '.join(SPLITS)}")
    try:
        codes = set(map(language_code, languages))
    except ValueError as error:
        raise DataError(root, str(error)) from None
    if unknown := sorted(codes - {*LANGUAGES.values()}):
        cause = f"Kathbath has no language {', '.join(unknown)}; it has {', '.join(LANGUAGES.values())}"
        raise DataError(root, cause)
    if not root.is_dir():
        raise DataError(root, "no such folder")
    root, out = root.resolve(), out.resolve()
    names = [name for name, code in LANGUAGES.items() if not codes or code in codes]
    found = gather(root, out, [split for split in asked if split], names)
    there = {key[0] for key in (*found.texts, *found.sounds)}
    wanted = [split for split in SPLITS if split in (asked or there)]
    if not wanted:
        raise DataError(root, f"neither recordings nor a {TRANSCRIPTS}; parquet, as the Hub has it, needs no table")
    check(found, root, wanted, names, asked=bool(codes))
    for split in wanted:
        many = write(out / f"{split}.tsv", rows_of(found, split, names, out), COLUMNS)
        mute = sum(key[0] == split and key not in found.sounds for key in found.texts)
        untold = sum(key[0] == split and not found.texts.get(key, ("", ""))[1] for key in found.sounds)
        print(f"{split}: {many:,} rows, {mute:,} of them without a recording, {untold:,} without a text")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("archives", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--splits", type=listed, default=())
    parser.add_argument("--languages", type=listed, default=())
    given = parser.parse_args()
    sys.exit(script(lambda: convert(given.archives, given.out, given.splits, given.languages)))
