"""Which corpora there are: each is opened by a function that reads its layout into rows.

*Kathbath*: 1,684 hours of read speech in twelve Indian languages (IndicSUPERB, arXiv 2208.11761). In the Hub's layout
(``ai4bharat/Kathbath``, gated), parquet with a configuration for each language; or in that of the original archives, unpacked
or as ``.tar``, where transcripts may lie in another tree than the sound, and what lies below a folder with ``noisy`` in its name
is the noisy form of a test: ``…/<language>/<split>/[audio/]<id>-<speaker>-<f|m>.m4a`` beside ``transcription_n2w.txt`` (file
name, tab, text). Ids are the same in both.

*INCLUDE*: 4,292 videos of 263 words in Indian Sign Language (Sridhar et al., ACM MM 2020; Zenodo 4010759), a tree
``<category>/<number>. <word>/[more/]<name>.MOV``. Splits are said by the lists of its repository (``include_train.txt``,
``include50_val.txt`` …, a path a line) or by the Hub's metadata (``ai4bharat/INCLUDE``).

*wiki-translate*: Wikipedia in English and fourteen languages of India. A wide row (``doc_id, url, title, eng_Latn, hin_Deva, …``)
becomes pairs, one for every direction that is asked for; cells that are lists of sentences are paired sentence by sentence.
"""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, get_args

from whisper_moe.data.corpus import FILE, Corpus, CorpusConfig, Kind, Row, listed
from whisper_moe.data.hub import files_of_split, load_rows, local_files, one_line, stored_corpus
from whisper_moe.data.sample import DataError, Skipped
from whisper_moe.data.table import RowError, RowReader, decoded, open_table
from whisper_moe.media.languages import language_code

_TWELVE = "bengali gujarati hindi kannada malayalam marathi odia punjabi sanskrit tamil telugu urdu"
LANGUAGES = {name: language_code(name) for name in _TWELVE.split()}
"""Kathbath's, by the Hub's names, which the archives' folders have too, each with its code."""
_FLORES = (
    "eng_Latn asm_Beng hin_Deva mal_Mlym ben_Beng guj_Gujr san_Deva kan_Knda tel_Telu mar_Deva tam_Taml ory_Orya npi_Deva "
    "pan_Guru urd_Arab"
)
COLUMNS: dict[str, str] = dict(
    zip(_FLORES.split(), "en as hi ml bn gu sa kn te mr ta or ne pa ur".split(), strict=True)
)
"""wiki-translate's (FLORES-200 names), each with our code."""
_KATHBATH_SPLITS = ("train", "valid", "test-known", "test-unknown", "test-known-noisy", "test-unknown-noisy")
_KATHBATH_SPLIT = re.compile("(train)|(valid|dev)|(test[-_ ]?kn)|(test[-_ ]?unk)")
"""What a folder or archive of one of the first four begins with."""
_TRANSCRIPTS, _SOUND = "transcription_n2w.txt", "audio_filepath"
_SOUNDS = frozenset(".m4a .wav .flac .mp3 .ogg .opus".split())
"""Extensions of recordings, converted ones included: only the stem has to agree with the transcript's."""
_INCLUDE_SPLITS = {"train": "train", "test": "test", **dict.fromkeys(("val", "valid", "validation", "dev"), "val")}
_VIDEOS = frozenset(".mov .mp4 .mkv .webm .avi .m4v".split())
_PAIR = dict.fromkeys(("id", "task", "source_text", "text", "language", "target_language", "problem"), "string")


def open_corpus(config: CorpusConfig) -> Corpus:
    """Open what a recipe names. Raises :class:`DataError` for a corpus that cannot be read as it says."""
    openers = {
        "kathbath": _open_kathbath,
        "include": _open_include,
        "wiki-translate": _open_wiki_translate,
        "table": open_table,
    }
    corpus = openers[config.kind](config)
    return corpus if config.limit is None else replace(corpus, dataset=corpus.dataset.take(config.limit))


def kind_of(source: str) -> Kind:
    """By the Hub id, or by what lies in the folder."""
    path, plain = Path(source), source.lower()
    if path.is_file():
        return "table"
    if not path.is_dir():
        return next((kind for kind in get_args(Kind) if plain.endswith(f"/{kind}")), "table")
    if any(path.rglob("include*_train.txt")) or any(path.rglob("include*_test.txt")):
        return "include"
    if any(path.rglob(_TRANSCRIPTS)) or any((path / name).is_dir() for name in LANGUAGES):
        return "kathbath"
    return "table"


# Kathbath.


def _open_kathbath(config: CorpusConfig) -> Corpus:
    split = _kathbath_split(config.split.lower(), noisy="noisy" in config.split.lower())
    if split is None:
        raise DataError(config.source, f"Kathbath has no split {config.split!r}: one of {', '.join(_KATHBATH_SPLITS)}")
    if unknown := sorted(set(config.languages) - {*LANGUAGES.values()}):
        cause = f"Kathbath has no language {', '.join(unknown)}; it has {', '.join(LANGUAGES.values())}"
        raise DataError(config.source, cause)
    names = [name for name, code in LANGUAGES.items() if not config.languages or code in config.languages]
    if (root := Path(config.source)).is_file():
        raise DataError(root, "a file, where the corpus's folder or Hub id is expected")
    archives = root.is_dir() and not any(root.rglob("*.parquet"))
    return (_kathbath_archives if archives else _kathbath_parquet)(config, root, split, names)


def _kathbath_split(name: str, *, noisy: bool) -> str | None:
    """``test-known-noisy`` for what begins with ``test_known`` and is noisy; none for what is no split."""
    found = _KATHBATH_SPLIT.match(name)
    split = _KATHBATH_SPLITS[(found.lastindex or 0) - 1] + "-noisy" * noisy if found else None
    return split if split in _KATHBATH_SPLITS else None


def _spoken(name: str, language: str, split: str, key: str) -> Row:
    """What the name of a recording says."""
    speaker = re.search(r"-(\w+)-[fm]$", key)
    domain = split.removeprefix("test-") if split.startswith("test-") else None
    return {"id": f"{name}/{language}/{split}/{key}", "speaker": speaker and speaker[1], "domain": domain}


def _kathbath_parquet(config: CorpusConfig, root: Path, split: str, names: Sequence[str]) -> Corpus:
    from datasets import Dataset, Features, Value, concatenate_datasets

    parts, absent = list[Any](), list[str]()
    for name in names:
        files = files_of_split(root, split, ".parquet", within=name) if root.is_dir() else None
        if files == []:
            absent.append(name)
            continue
        whole = load_rows(config, split, configuration=name, files=files, needed=(_SOUND, "text"))
        columns = (_SOUND, "text", "fname", "duration", "speaker_id")
        part: Any = whole.select_columns([column for column in columns if column in (whole.features or ())])
        if isinstance(part, Dataset):
            parts.append(part.add_column("language", [LANGUAGES[name]] * len(part)))
        else:
            features = Features({**part.features, "language": Value("string")})
            parts.append(part.map(_spoken_in, fn_kwargs={"code": LANGUAGES[name]}, features=features))
    if not parts or (absent and config.languages):
        raise DataError(root, f"no parquet files of the split {split!r} for {', '.join(absent)}")
    common = set.intersection(*(set(part.features) for part in parts))
    dataset = concatenate_datasets([part.select_columns(sorted(common)) for part in parts])
    reader = _KathbathReader(config.source, root, config.name or "kathbath", config, _SOUND)
    reader.split = split
    return stored_corpus(reader, dataset)


def _spoken_in(_: Row, code: str) -> Row:
    return {"language": code}


class _KathbathReader(RowReader):
    """Rows are named after their recordings, as those of the archives are: their numbers are of no file."""

    split = ""

    def checked(self, raw: Row, cells: Row, number: int | None) -> Row:
        row = super().checked(raw, cells, number)
        key = PurePosixPath(str(raw.get("fname") or row["path"] or "")).stem
        if not key:
            raise self.error("", None, "fname", "a row with neither a file name nor a path")
        language = next(name for name, code in LANGUAGES.items() if code == row["language"])
        named = _spoken(self.name, language, self.split, key)
        speaker, text = row["speaker"] or named["speaker"], " ".join(row["text"].split())  # no-break spaces, too
        return row | named | {"path": key, "speaker": speaker, "text": text, "row": None}

    def error(self, path: str, number: int | None, column: str, cause: str) -> RowError:
        return super().error(path, None, column, cause)


def _kathbath_archives(config: CorpusConfig, root: Path, split: str, names: Sequence[str]) -> Corpus:
    texts: dict[tuple[str, str], tuple[str, str]] = {}
    """Language and stem: file name as listed, text (empty where the list has none)."""
    sounds: dict[tuple[str, str], dict[str, Row]] = defaultdict(dict)
    """Language and stem: extension: where the file is."""
    for parts, place in _members(root):
        language, its_split = _place(parts)
        file = PurePosixPath(parts[-1])
        if language not in names or its_split != split:
            continue
        if file.name == _TRANSCRIPTS:
            _read_transcripts(language, place, texts)
        elif file.suffix.lower() in _SOUNDS and not file.name.startswith("."):
            sounds[language, file.stem].setdefault(file.suffix, place)
    for name in names:
        heard = sum(language == name for language, _ in sounds)
        if (heard or config.languages) and not any(language == name for language, _ in texts):
            raise DataError(root, f"{heard or 'no'} recordings and no {_TRANSCRIPTS} of {name}, {split}")
    name, rows, missing = config.name or "kathbath", list[Row](), list[Skipped]()
    for language, stem in sorted({*texts, *sounds}, key=lambda key: (names.index(key[0]), key[1])):
        file, text = texts.get((language, stem), ("", None))
        kinds, row = sounds.get((language, stem)), _spoken(name, language, split, stem)
        if kinds is None or not text:
            cause = "no recording" if kinds is None else "no transcript" if text is None else "no text"
            missing.append(Skipped(id=row["id"], place=str(root), kind="missing", cause=cause))
            continue
        code, place = LANGUAGES[language], kinds.get(PurePosixPath(file).suffix) or kinds[min(kinds)]
        rows.append({**row, "text": text, "language": code, "target_language": code, "task": "transcribe", **place})
    return listed(config, name, root, rows, missing)


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
    below = [part for part in folders[at + 1 : at + 2] if part != "test"]  # so do noisy archives call both tests
    noisy = any("noisy" in part for part in folders)
    near = (_kathbath_split(part, noisy=noisy) for part in (*below, *reversed(folders[:at])))
    return folders[at], next(filter(None, near), None)


def _read_transcripts(language: str, place: Row, texts: dict[tuple[str, str], tuple[str, str]]) -> None:
    """Lines of file name, tab (or space), text. Raises :class:`DataError` naming file and row."""
    with open(place[FILE], "rb") as file:
        file.seek(place.get("offset", 0))
        data = file.read(place.get("size", -1))
    named = ":".join(filter(None, (place[FILE], place.get("member"))))
    for row, line in enumerate(decoded(data.split(b"\n"), named), 1):
        if cells := line.split():
            said, key = (cells[0], " ".join(cells[1:])), (language, PurePosixPath(cells[0]).stem)
            if texts.setdefault(key, said)[1] != said[1]:
                raise DataError(named, f"{cells[0]!r} stands there twice, with two texts", row=row, column="file")


# INCLUDE.


def _open_include(config: CorpusConfig) -> Corpus:
    source, name, split = Path(config.source), config.name or "include", _INCLUDE_SPLITS.get(config.split.lower())
    if split is None:
        raise DataError(config.source, f"INCLUDE has no split {config.split!r}: one of train, val, test")
    if config.videos is None and not source.exists():
        raise DataError(source, "not here, or a Hub id, which has no videos: say in which folder they are (videos)")
    paths = dict.fromkeys(_signs(config, source, split))
    find = _finder(Path(config.videos or (source if source.is_dir() else source.parent)))
    rows: list[Row] = []
    for path in map(PurePosixPath, paths):
        category, word, *_ = path.parts
        said = " ".join(re.sub(r"^\s*\d+\s*\.?\s*", "", word).lower().split())  # some are written large
        about = {"id": f"{name}/{split}/{path.with_suffix('')}", "text": said, "domain": category}
        rows.append({**about, FILE: str(find(path)), "task": "sign", "language": "ins", "target_language": "en"})
    return listed(config, name, config.source, rows)


def _signs(config: CorpusConfig, source: Path, split: str) -> Iterator[str]:
    """Paths of the videos of a split, as the lists or the metadata have them."""
    pattern = f"include{'50' if config.include_50 else ''}_{split}.txt"
    lists = [source] if source.suffix == ".txt" else sorted(source.rglob(pattern)) if source.is_dir() else []
    if lists and source.exists():
        with lists[0].open("rb") as file:
            for number, line in enumerate(decoded(file, lists[0]), 1):
                if line.strip():
                    yield _sign(line.strip(), lists[0], number)
        return
    files = local_files(config, split, pattern, ".csv", ".tsv", ".parquet")
    whole = config.model_copy(update={"streaming": False})
    needed = ("video_path", "include_50")[: 1 + config.include_50]
    for number, row in enumerate(load_rows(whole, split, files=files, needed=needed), 1):
        its, fifty = str(row.get("split") or split).lower(), str(row.get("include_50")).strip().lower()
        if _INCLUDE_SPLITS.get(its) == split and (not config.include_50 or fifty in ("true", "1", "1.0", "yes")):
            yield _sign(row["video_path"], files[0] if files else config.source, number)


def _sign(path: object, place: Path | str, row: int) -> str:
    """A path from the tree's top: category, word and file, and nothing that leads out of it."""
    parts = PurePosixPath(path.replace("\\", "/")).parts if isinstance(path, str) else ()
    if len(parts) < 3 or ".." in parts or parts[0] == "/" or not re.search("[a-zA-Z]", parts[1]):
        cause = f"{path!r} is not <category>/<number>. <word>/<name>.MOV"
        raise DataError(place, cause, row=row, column="video_path")
    return "/".join(parts)


def _finder(root: Path) -> Callable[[PurePosixPath], Path]:
    """Finds a video by its path in the lists, else by the path's end, whatever the case, the extension and the folders above."""
    by_end: dict[tuple[str, ...], Path] = {}

    def folded(path: PurePath) -> tuple[str, ...]:
        return tuple(part.lower() for part in path.with_suffix("").parts)

    def find(path: PurePosixPath) -> Path:
        if (root / path).is_file():
            return root / path
        if not by_end:
            for file in sorted(root.rglob("*"), reverse=True):  # of several copies, the first by name stays
                if file.suffix.lower() in _VIDEOS and file.is_file():
                    parts = folded(file.relative_to(root))
                    by_end.update((parts[at:], file) for at in range(len(parts) - 2))
        return by_end.get(folded(path), root / path)

    return find


# wiki-translate.


def _open_wiki_translate(config: CorpusConfig) -> Corpus:
    """A pair that cannot be made (lists of different lengths, cells that are no text) is a row with a problem, which raises when
    it is read, so that it is counted and named like any other."""
    from datasets import Features, Value

    whole = config.split == "train"  # of files without any division
    files = local_files(config, config.split, ".parquet", ".jsonl", ".json", undivided=whole)
    rows = load_rows(config, config.split, files=files)
    names: list[str] = list(rows.features or ())
    there = {code: column for column, code in COLUMNS.items() if column in names}
    directions = [(a, there[a], b, there[b]) for a, b in _directions(config, there)]
    columns = [name for name in ("doc_id", "url") if name in names]
    columns += sorted({column for _, a, _, b in directions for column in (a, b)})
    name = config.name or "wiki-translate"
    pairs = rows.select_columns(columns).map(
        _pairs,
        batched=True,
        batch_size=64,
        remove_columns=columns,
        features=Features({column: Value(kind) for column, kind in _PAIR.items()} | {"seconds": Value("float32")}),
        fn_kwargs={"directions": directions, "prefix": f"{name}/{config.split}"},
    )
    return Corpus(name, pairs)


def _directions(config: CorpusConfig, there: dict[str, str]) -> list[tuple[str, str]]:
    """``any>en`` spelled out: pairs of codes, each once, in the order of the columns."""

    wrong = partial(DataError, config.source, column="directions")

    def end(name: str) -> list[str]:
        """``any``, a code, a name, or the corpus's own name of the column."""
        if name == "any":
            return [code for code in there if not config.languages or code in config.languages]
        try:
            code = COLUMNS.get(name) or language_code(name)
        except ValueError as error:
            raise wrong(str(error)) from None
        if code not in there:
            raise wrong(f"no column for {name!r}; there are {', '.join(there)}")
        return [code]

    chosen: dict[tuple[str, str], None] = {}
    for direction in config.directions:
        ends = [name.strip() for name in direction.split(">")]
        if len(ends) != 2:
            raise wrong(f"{direction!r} is no direction such as en>hi, any>en")
        sources, targets = map(end, ends)
        chosen |= dict.fromkeys((a, b) for a in sources for b in targets if a != b)
    if not chosen:
        raise wrong(f"no two languages in {', '.join(config.directions)}; there are {', '.join(there) or 'none'}")
    return list(chosen)


def _pairs(batch: Row, directions: Sequence[tuple[str, str, str, str]], prefix: str) -> Row:
    """Wide rows to pairs. The id is made of the document and of what is said, never of the row's number, which differs
    from rank to rank in a stream."""
    pairs: list[Row] = []
    for cells in zip(*batch.values(), strict=True):
        row = dict(zip(batch, cells, strict=True))
        document = next((str(row[name]) for name in ("doc_id", "url") if row.get(name) not in (None, "")), "row")
        for source, source_column, target, target_column in directions:
            id = f"{prefix}/{document}/{source}-{target}"
            about = {"task": "translate-text", "language": source, "target_language": target}
            try:
                for said, meant in _paired(row[source_column], row[target_column]):
                    key = hashlib.blake2b(f"{said}\0{meant}".encode(errors="surrogatepass"), digest_size=6).hexdigest()
                    pairs.append({**about, "id": f"{id}/{key}", "source_text": said, "text": meant})
            except ValueError as error:
                pairs.append({**about, "id": id, "problem": str(error)})
    return {name: [pair.get(name) for pair in pairs] for name in _PAIR} | {"seconds": [0.0] * len(pairs)}


def _paired(source: object, target: object) -> list[tuple[str, str]]:
    """The pairs of two cells; none where one is empty. Raises ``ValueError`` where they cannot be paired."""
    sources, targets = _sentences(source), _sentences(target)
    if not any(sources) or not any(targets):
        return []
    if len(sources) != len(targets):
        raise ValueError(f"{len(sources)} sentences against {len(targets)}: they cannot be paired")
    return [(said, meant) for said, meant in zip(sources, targets, strict=True) if said and meant]


def _sentences(cell: Any) -> list[str]:
    """A cell's sentences, with single spaces; empty ones stay, since they have their places."""
    parts = cell if isinstance(cell, list) else [cell]
    if not all(isinstance(part, str | None) for part in parts):
        raise ValueError(f"a {type(cell).__name__} where a text or a list of texts is expected")
    return [" ".join((part or "").split()) for part in parts]
