"""Everybody's own data: a TSV, CSV, JSONL or parquet file with a row for each sample, or a folder of recordings.

Columns, of which only the text and where it is said are needed:

==================  ==================================================================================================
``path``            a sound (or, for the task ``sign``, a film); relative paths start at the table's folder
``text``            what the model is to say
``start``, ``end``  seconds, where the sample is a piece of the file; ``duration`` spares a look into its header
``language``        code or name; default: the corpus's ``languages``
``task``            ``transcribe`` (default), ``translate``, ``translate-text`` or ``sign``
``source_text``     instead of ``path``, for ``translate-text``
``target_language`` of the text, where it is another one; ``en`` for ``translate`` and ``sign``
``speaker, domain`` free words
``split``           only rows with the corpus's split are read; ``dev``, ``val`` and so on are ``valid``
==================  ==================================================================================================

The names that ``datasets``, NeMo's manifests and Common Voice use are understood (:data:`whisper_moe.data.corpus.OTHER_NAMES`);
``columns: {path: clip, text: said}`` names others; the rest are left alone. ``languages`` leaves out rows that say another one.

A folder is read by its table (``train.tsv``, ``train_manifest.json``, ``metadata.jsonl`` …), in the folder of the split if there
is one; with ``text: file-name``, by the names of the recordings in it; with ``text: none``, their text is unknown and empty.
What ``datasets`` reads is a table, too: a Hub id, a folder as the Hub has them, what ``save_to_disk`` wrote, parquet and
arrow files. ``path`` may hold the sound itself there: ``{bytes, path}``, ``{array, sampling_rate}``, or bytes.
A row that is no sample (no text, an unknown language, a time that is none) costs itself, and is named.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whisper_moe.data.corpus import OTHER_NAMES, Corpus, CorpusConfig, Row, listed, sample_of
from whisper_moe.data.hub import audio_ref, is_sound, load_stored, plain_features, spellings_of
from whisper_moe.data.rows import Cells, RowError, RowReader, Rows
from whisper_moe.data.sample import AudioRef, DataError, Sample

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

SUFFIXES = (".tsv", ".csv", ".jsonl", ".ndjson", ".json", ".parquet", ".arrow")
TABLES = ("metadata", "transcripts", "manifest")
"""What a folder's table may be called."""
RECORDINGS = frozenset(
    ".aac .aif .aiff .amr .avi .caf .flac .m4a .m4v .mka .mkv .mov .mp2 .mp3 .mp4 .mpg .oga .ogg .opus .ts .wav .webm .wma "
    ".wv".split()
)
"""Extensions of sound and film, where a folder has to be searched for them."""


def open_table(config: CorpusConfig) -> Corpus:
    """Read the table and check every row. Raises :class:`DataError` naming file, row and column, for what is no table.

    Rows that are no samples and files that are not there are in ``Corpus.left_out``, unless all are: that is a mistake in
    columns, settings or paths.
    """
    source = Path(config.source)
    bare = config.text == "file-name"
    untold = config.text == "none" and source.is_dir()
    file = source if bare or not source.is_dir() else None if untold else _table_of(source, config.split)
    stored = None if bare else load_stored(config, file)
    if stored is not None:
        return _open_stored(config, stored, source, file or source)
    if not source.exists():
        raise DataError(source, "no such file or folder")
    if file is None and not untold:
        raise DataError(
            source,
            f"no table in it: {' or '.join(TABLES)} with {', '.join(SUFFIXES)}; "
            "if its files are named after what is said, say text: file-name",
        )
    bare, file = bare or file is None, file or source
    reader = RowReader(file, file if file.is_dir() else file.parent, _name(config, file), config)
    names = config.columns if isinstance(config.columns, tuple) else ()
    return _corpus(reader, list(reader.rows(_recordings(file) if bare else _read(file, names))))


def _name(config: CorpusConfig, file: Path) -> str:
    """A file's own name, unless that says nothing; then its folder's."""
    if Path(config.source).is_file() and file.stem not in TABLES:
        return config.name or file.stem
    return config.name or (file.parent if file.is_file() else file).resolve().name


def _corpus(reader: RowReader, rows: list[Row], stored: Stored | None = None) -> Corpus:
    if not rows:
        raise reader.nothing()
    sample, version = (sample_of, "") if stored is None else (partial(_stored_sample, stored=stored), stored.version)
    left_out, remarks = tuple(reader.left_out()), reader.told()
    return listed(reader.config, reader.name, reader.file, rows, left_out, sample, remarks=remarks, version=version)


def _stored_sample(row: Row, stored: Stored) -> Sample:
    sample = sample_of(row)
    if row["stored"] is None:
        return sample
    return replace(sample, audio=stored.audio(stored.rows[row["stored"]], row))  # pyright: ignore[reportArgumentType, reportIndexIssue]


# What datasets reads.


@dataclass(frozen=True, eq=False)
class Stored:
    """Rows that ``datasets`` keeps, and the column of them that holds sounds, if one does."""

    rows: Dataset | IterableDataset
    sound: str | None
    folder: Path
    """Where paths in it start."""

    @property
    def version(self) -> str:
        return str(getattr(self.rows, "_fingerprint", ""))

    def audio(self, cells: Cells, row: Row) -> AudioRef:
        """The sound of a row, or its piece. Raises :class:`DataError` where there is none."""
        assert self.sound is not None
        whole = audio_ref(cells[self.sound], folder=self.folder, name=row["id"])
        return replace(whole, start=row["start"] or 0.0, end=row["end"])

    def cells(self) -> Rows:
        """Every row's words and numbers, and of its sound the path."""
        features = self.rows.features or {}
        plain = plain_features(features)
        flat: Any = self.rows.with_format(None).flatten()  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue] (they have an index)
        path = f"{self.sound}.path"
        names = [*plain, *([path] if path in flat.column_names else [])]
        number = 0
        for batch in flat.select_columns(names).iter(batch_size=1_000):
            for values in zip(*(batch[name] for name in names), strict=True):
                cells = {name: _label(features.get(name), value) for name, value in zip(names, values, strict=True)}
                yield (number := number + 1), ({self.sound: cells.pop(path, None), **cells} if self.sound else cells)

    def plain_cells(self, raw: Row) -> Cells:
        """:meth:`cells` of one row that is at hand."""
        features, sound = self.rows.features or {}, raw.get(self.sound or "")
        cells = {name: _label(features[name], raw[name]) for name in plain_features(features)}
        return {self.sound: sound.get("path") if isinstance(sound, dict) else None, **cells} if self.sound else cells


def _label(feature: Any, value: Any) -> Any:
    """The name of a class that is stored as its number."""
    return feature.int2str(value) if hasattr(feature, "int2str") and isinstance(value, int) and value >= 0 else value


def _open_stored(config: CorpusConfig, dataset: Dataset | IterableDataset, source: Path, file: Path) -> Corpus:
    features, given = dataset.features or {}, config.renamed().get("path")
    sounds = [name for name, feature in features.items() if is_sound(feature)]
    known = [name for name in (given or "path", *OTHER_NAMES["path"]) if name in sounds]
    chosen = [given] if given else known or (sounds if len(sounds) == 1 else [])
    sound = next((name for name in chosen if name in sounds), None)
    local = source.exists()
    folder = file.parent if file.is_file() else source if local else Path()
    reader = RowReader(str(file) if local else config.source, folder, _name(config, file), config, sound)
    if sound and not given and sound not in known:
        reader.remarks[f"path is the column {sound!r}, the only one that holds sounds"] = None
    return stored_corpus(reader, dataset)


def stored_corpus(reader: RowReader, dataset: Dataset | IterableDataset) -> Corpus:
    """What a reader makes of the rows of a dataset: all of them now, or of a stream each as it comes."""
    features, sound = dataset.features or {}, reader.sound
    reader.check_columns([*plain_features(features), *([sound] if sound else [])], None)
    if hasattr(dataset, "__len__"):
        part = Stored(dataset.select_columns([sound]), sound, reader.folder) if sound else None
        return _corpus(reader, list(reader.rows(Stored(dataset, sound, reader.folder).cells())), part)
    if sound is None:
        dataset = dataset.select_columns(plain_features(features))
    empty = Stored(dataset.take(0), sound, reader.folder)
    wanted = dataset.filter(partial(_wanted, reader=reader, stored=empty))
    return Corpus(reader.name, wanted, partial(_streamed, reader=reader, stored=empty), remarks=reader.told())


def _wanted(raw: Row, reader: RowReader, stored: Stored) -> bool:
    return reader.wanted(stored.plain_cells(raw))


def _streamed(raw: Row, reader: RowReader, stored: Stored) -> Sample:
    """The sample of a row as it comes. Raises :class:`DataError` for one that is none."""
    row = reader.row(stored.plain_cells(raw), None)
    sample = sample_of(row)
    if not stored.sound or sample.task == "translate-text":
        return sample
    audio = stored.audio(raw, row)
    if row["path"] is None:  # equal texts are told apart by their sounds
        sample = replace(sample, id=f"{sample.id}~{hashlib.blake2b(audio.data or b'', digest_size=8).hexdigest()}")
        audio = replace(audio, path=sample.id)
    return replace(sample, audio=audio)


# Files.


def _table_of(folder: Path, split: str) -> Path | None:
    """The one table of a folder, or of the folder of the split in it; one that is called like the split comes first."""
    named = [stem for its in spellings_of(split) for stem in (its, f"{its}_manifest")]
    for place, stems in ((folder / split, TABLES), (folder, named), (folder, TABLES)):
        names = [place / f"{stem}{suffix}" for stem in stems for suffix in SUFFIXES]
        if found := [name for name in names if name.is_file()]:
            if len(found) > 1:
                raise DataError(place, f"several tables: {', '.join(file.name for file in found)}; name one of them")
            return found[0]
    return None


def _read(file: Path, columns: Sequence[str]) -> Rows:
    suffix = file.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(file, f"not a table: one of {', '.join(SUFFIXES)} is")
    return _separated(file, columns) if suffix in (".tsv", ".csv") else _json_rows(file)


def _lines(file: Path) -> Iterator[str]:
    """Its lines; one that is no UTF-8 is named."""
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(file, f"not UTF-8 text: {error.reason}", row=number) from None


def _separated(file: Path, columns: Sequence[str]) -> Rows:
    """TSV, in which a quotation mark is a character, or CSV, in which it quotes."""
    tabs = file.suffix.lower() == ".tsv"
    options: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {}
    reader = csv.reader(_lines(file), strict=True, **options)
    try:
        names = list(columns) or next(reader, [])
        if doubled := [name for name, times in Counter(names).items() if times > 1]:
            raise DataError(file, "the column stands there twice", row=1, column=doubled[0])
        for cells in reader:
            if len(cells) > len(names):
                cause = f"{len(cells)} cells, for {len(names)} columns"
                yield reader.line_num, RowError(file, cause, row=reader.line_num)
            elif cells:
                yield reader.line_num, dict(zip(names, cells, strict=False))
    except csv.Error as error:
        raise DataError(file, f"not a table: {error}", row=reader.line_num) from None


def _json_rows(file: Path) -> Rows:
    """An object a line, as NeMo's manifests are, too; or a list of objects."""
    lines = _lines(file)
    if file.suffix.lower() == ".json":
        content = "".join(lines)
        lines = iter([content] if content.lstrip().startswith("[") else content.split("\n"))
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(file, f"not JSON: {error}", row=number) from None
        several = isinstance(row, list) and file.suffix.lower() == ".json"
        for place, each in enumerate(row, 1) if several else [(number, row)]:
            if not isinstance(each, dict):
                cause = f"a {type(each).__name__} where an object with columns is expected"
                raise DataError(file, cause, row=place)
            yield place, each


def _recordings(folder: Path) -> Rows:
    """Every recording below the folder, named after what is said in it."""
    if not folder.is_dir():
        raise DataError(folder, "text: file-name reads a folder of recordings, and this is a file")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in RECORDINGS)
    for number, file in enumerate(files, 1):
        inside = file.relative_to(folder)
        said = " ".join(file.stem.replace("_", " ").replace("-", " ").split())
        yield number, {"path": inside.as_posix(), "text": said, "domain": inside.parent.as_posix().removeprefix(".")}
