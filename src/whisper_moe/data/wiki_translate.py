"""wiki-translate: Wikipedia in English and fourteen languages of India, a wide row for each text, as sentence pairs.

A row (``doc_id, url, title, eng_Latn, hin_Deva, …``) becomes a pair for every direction that is asked for and whose two
cells are filled. A cell is a text, or a list of sentences: two lists of one length are paired sentence by sentence.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from whisper_moe.data.corpus import Corpus, CorpusConfig, Row, sample_of
from whisper_moe.data.hub import files_of_split, load_rows
from whisper_moe.data.sample import DataError, Sample
from whisper_moe.media.languages import language_code

COLUMNS = {
    "eng_Latn": "en",
    "asm_Beng": "as",
    "hin_Deva": "hi",
    "mal_Mlym": "ml",
    "ben_Beng": "bn",
    "guj_Gujr": "gu",
    "san_Deva": "sa",
    "kan_Knda": "kn",
    "tel_Telu": "te",
    "mar_Deva": "mr",
    "tam_Taml": "ta",
    "ory_Orya": "or",
    "npi_Deva": "ne",
    "pan_Guru": "pa",
    "urd_Arab": "ur",
}
"""The corpus's columns (FLORES-200 names), each with our code."""
_FILES = (".parquet", ".jsonl", ".json")
_PAIR = dict.fromkeys(("id", "source_text", "text", "language", "target_language", "problem"), "string")


def open_wiki_translate(config: CorpusConfig) -> Corpus:
    """Pairs in the directions of ``config``. Raises :class:`DataError`.

    A pair that cannot be made (lists of different lengths, cells that are no text) is a sample that raises when it is
    read, so that it is counted and named like any other.
    """
    from datasets import Features, Value

    rows = load_rows(config, split=config.split, files=_files(config))
    names: list[str] = list(rows.features or ())
    there = {code: column for column, code in COLUMNS.items() if column in names}
    directions = _directions(config, there)
    used = {there[code] for direction in directions for code in direction}
    about = [column for column in ("doc_id", "url") if column in names]
    rows = rows.select_columns([*about, *sorted(used)])
    name = config.name or "wiki-translate"
    pairs = rows.map(
        _pairs,
        batched=True,
        batch_size=64,
        remove_columns=[*about, *sorted(used)],
        features=Features({column: Value(kind) for column, kind in _PAIR.items()} | {"seconds": Value("float32")}),
        fn_kwargs={"directions": directions, "columns": there, "prefix": f"{name}/{config.split}"},
    )
    return Corpus(name, pairs, _sample)


def _files(config: CorpusConfig) -> list[Path] | None:
    """Local files of the split; those of a folder without any division are its ``train``; none for the Hub."""
    source = Path(config.source)
    if source.is_file():
        if source.suffix.lower() not in _FILES:
            raise DataError(source, f"not a file of rows: one of {', '.join(_FILES)} is")
        return [source]
    if not source.is_dir():
        return None
    found = files_of_split(source, config.split, *_FILES)
    if not found and config.split == "train":
        found = sorted(file for file in source.rglob("*") if file.suffix.lower() in _FILES)
    if not found:
        raise DataError(source, f"no files ({', '.join(_FILES)}) of the split {config.split!r}")
    return [file for file in found if file.suffix == found[0].suffix]


def _directions(config: CorpusConfig, there: dict[str, str]) -> list[tuple[str, str]]:
    """``any>en`` spelled out: pairs of codes, each once, in the order of the columns."""
    chosen: dict[tuple[str, str], None] = {}
    for direction in config.directions:
        ends = [end.strip() for end in direction.split(">")]
        if len(ends) != 2:
            raise DataError(config.source, f"{direction!r} is no direction such as en>hi, any>en", column="directions")
        sources, targets = (_end(config, there, end) for end in ends)
        chosen |= dict.fromkeys((a, b) for a in sources for b in targets if a != b)
    if not chosen:
        cause = f"no two languages in {', '.join(config.directions)}; there are {', '.join(there) or 'none'}"
        raise DataError(config.source, cause, column="directions")
    return list(chosen)


def _end(config: CorpusConfig, there: dict[str, str], name: str) -> list[str]:
    """The languages at one end of a direction: ``any``, a code, a name, or the corpus's own name of the column."""
    if name == "any":
        return [code for code in there if not config.languages or code in config.languages]
    try:
        code = COLUMNS.get(name) or language_code(name)
    except ValueError as error:
        raise DataError(config.source, str(error), column="directions") from None
    if code not in there:
        raise DataError(config.source, f"no column for {name!r}; there are {', '.join(there)}", column="directions")
    return [code]


def _pairs(
    batch: dict[str, list[Any]], directions: Sequence[tuple[str, str]], columns: dict[str, str], prefix: str
) -> dict[str, list[Any]]:
    """Wide rows to pairs. The id is made of the document and of what is said, never of the row's number, which differs
    from rank to rank in a stream."""
    pairs: list[Row] = []
    for number in range(len(next(iter(batch.values())))):
        row = {column: cells[number] for column, cells in batch.items()}
        document = next((str(row[name]) for name in ("doc_id", "url") if row.get(name) not in (None, "")), "row")
        for source, target in directions:
            name = f"{prefix}/{document}/{source}-{target}"
            pairs += [
                {**pair, "language": source, "target_language": target, "seconds": 0.0}
                for pair in _row_pairs(name, row[columns[source]], row[columns[target]])
            ]
    return {column: [pair[column] for pair in pairs] for column in (*_PAIR, "seconds")}


def _row_pairs(name: str, source: object, target: object) -> list[Row]:
    """The pairs of two cells; one with a problem where they cannot be paired; none where one is empty."""
    try:
        sources, targets = _sentences(source), _sentences(target)
    except TypeError as error:
        return [_broken(name, str(error))]
    if not any(sources) or not any(targets):
        return []
    if len(sources) != len(targets):
        return [_broken(name, f"{len(sources)} sentences against {len(targets)}: they cannot be paired")]
    return [
        {"id": f"{name}/{_digest(said, meant)}", "source_text": said, "text": meant, "problem": None}
        for said, meant in zip(sources, targets, strict=True)
        if said and meant
    ]


def _broken(name: str, problem: str) -> Row:
    return {"id": name, "source_text": None, "text": None, "problem": problem}


def _digest(*texts: str) -> str:
    return hashlib.blake2b("\0".join(texts).encode(errors="surrogatepass"), digest_size=6).hexdigest()


def _sentences(cell: object) -> list[str]:
    """A cell's sentences, with single spaces; empty ones stay, since they have their places."""
    if cell is None:
        return []
    if isinstance(cell, str):
        return [" ".join(cell.split())]
    if isinstance(cell, list) and all(sentence is None or isinstance(sentence, str) for sentence in cell):
        return [" ".join((sentence or "").split()) for sentence in cell]
    raise TypeError(f"a {type(cell).__name__} where a text or a list of texts is expected")


def _sample(row: Row) -> Sample:
    if row["problem"] is not None:
        raise DataError(row["id"], row["problem"])
    return sample_of(row | {"task": "translate-text"})
