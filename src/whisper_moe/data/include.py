"""INCLUDE: 4,292 videos of 263 words in Indian Sign Language (Sridhar et al., ACM MM 2020; Zenodo 4010759).

Which videos are in which split say the lists of its repository (``include_train.txt``, ``include50_val.txt`` …, a path a
line) or the Hub's metadata (``ai4bharat/INCLUDE``: ``video_path, parent_label, label, include_50``). The videos are a tree
``<category>/<number>. <word>/[more/]<name>.MOV``: the word is always the second part. Archives that were unpacked
into folders of their own are searched for what is not there. Videos that are missing are counted and named.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath, PurePosixPath

from whisper_moe.data.corpus import FILE, Corpus, CorpusConfig, Row, listed
from whisper_moe.data.hub import files_of_split, load_rows
from whisper_moe.data.sample import DataError

PATH, FIFTY = "video_path", "include_50"
_SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test"}
_TABLES = (".csv", ".tsv", ".parquet")
_VIDEOS = frozenset(".mov .mp4 .mkv .webm .avi .m4v".split())
"""Extensions of the videos, converted ones included."""


def sign_key(word: str) -> str:
    """A word as the label maps have it: its letters, lower case. ``51. Good Morning`` → ``goodmorning``."""
    return "".join(letter for letter in word.lower() if letter.isascii() and letter.isalpha())


def open_include(config: CorpusConfig) -> Corpus:
    """The videos of a split, each with its word. Raises :class:`DataError`."""
    split = _SPLITS.get(config.split.lower())
    if split is None:
        raise DataError(config.source, f"INCLUDE has no split {config.split!r}: one of train, val, test")
    source, name = Path(config.source), config.name or "include"
    paths = list(dict.fromkeys(_listed(config, source, split)))
    find = _finder(Path(config.videos) if config.videos is not None else _folder(source))
    rows: list[Row] = []
    for path in map(PurePosixPath, paths):
        about = {"id": f"{name}/{split}/{path.with_suffix('')}", "text": _word(path.parts[1]), "domain": path.parts[0]}
        rows.append({**about, FILE: str(find(path)), "task": "sign", "language": "ins", "target_language": "en"})
    return listed(config, name, config.source, rows)


def _word(part: str) -> str:
    """``51. Good Morning`` → ``good morning``: the corpus writes some words large and some small."""
    return " ".join(re.sub(r"^\s*\d+\s*\.?\s*", "", part).lower().split())


def _folder(source: Path) -> Path:
    if not source.exists():
        raise DataError(source, "not here, or a Hub id, which has no videos: say in which folder they are (videos)")
    return source if source.is_dir() else source.parent


# Which videos.


def _listed(config: CorpusConfig, source: Path, split: str) -> Iterator[str]:
    """Paths of the videos of a split, as the lists or the metadata have them."""
    if not source.exists():
        yield from _of_metadata(config, None, split)
        return
    lists = f"include{'50' if config.include_50 else ''}_{split}.txt"
    if source.suffix == ".txt":
        yield from _of_list(source)
    elif source.is_dir() and (found := sorted(source.rglob(lists))):
        yield from _of_list(found[0])
    else:
        files = [source] if source.is_file() else files_of_split(source, split, *_TABLES)
        if not files:
            raise DataError(
                source, f"neither the list {lists} nor metadata ({', '.join(_TABLES)}) of the split {split}"
            )
        yield from _of_metadata(config, files, split)


def _of_list(file: Path) -> Iterator[str]:
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(file, f"not UTF-8 text: {error.reason}") from None
    for row, line in enumerate(lines, 1):
        if line.strip():
            yield _checked(line.strip(), file, row)


def _of_metadata(config: CorpusConfig, files: list[Path] | None, split: str) -> Iterator[str]:
    whole = config.model_copy(update={"streaming": False})
    needed = (PATH, FIFTY) if config.include_50 else (PATH,)
    rows = load_rows(
        whole, split=split, files=files, needed=needed, spellings=("validation",) if split == "val" else ()
    )
    place = files[0] if files else config.source
    for number, row in enumerate(rows, 1):
        if row.get("split") not in (None, "") and _SPLITS.get(str(row["split"]).lower()) != split:
            continue
        if not config.include_50 or _is_true(row[FIFTY]):
            yield _checked(row[PATH], place, number)


def _is_true(cell: object) -> bool:
    return str(cell).strip().lower() in ("true", "1", "1.0", "yes")


def _checked(path: object, place: Path | str, row: int) -> str:
    """A path from the tree's top: at least category, word and file, and nothing that leads out of it."""
    parts = PurePosixPath(path.replace("\\", "/")).parts if isinstance(path, str) else ()
    if len(parts) < 3 or ".." in parts or parts[0] == "/" or not sign_key(parts[1]):
        cause = f"{path!r} is not <category>/<number>. <word>/<name>.MOV"
        raise DataError(place, cause, row=row, column=PATH)
    return "/".join(parts)


def _finder(root: Path) -> Callable[[PurePosixPath], Path]:
    """Finds a video by its path in the lists, else by the path's end, whatever the case and the extension."""
    by_end: dict[tuple[str, ...], Path] = {}

    def find(path: PurePosixPath) -> Path:
        if (root / path).is_file():
            return root / path
        if not by_end:
            for file in sorted(root.rglob("*"), reverse=True):  # of several copies, the first by name stays
                if file.suffix.lower() in _VIDEOS and file.is_file():
                    parts = _folded(file.relative_to(root))
                    by_end.update((parts[at:], file) for at in range(len(parts) - 2))
        return by_end.get(_folded(path), root / path)

    return find


def _folded(path: PurePath) -> tuple[str, ...]:
    return tuple(part.lower() for part in path.with_suffix("").parts)
