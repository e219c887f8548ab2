"""wiki-translate to a table: Wikipedia in English and fourteen languages of India, a row for each pair.

    python recipes/corpora/wiki_translate.py SOURCE OUT [--directions en>hi,hi>en] [--languages hi,or] [--split train] [--limit N]
        [--revision REVISION] [--parquet]

SOURCE is a Hub id, or a file or folder of parquet or JSON lines, in wide rows (``doc_id, url, title, eng_Latn, hin_Deva, …``). A
direction is ``en>hi``, ``any>en``, ``any>any``; the default is from and to English. Cells that are lists of sentences are paired
sentence by sentence, and empty ones make no pair. The first N pairs are written, by default all.

OUT gets <split>.tsv; with --parquet, for more pairs than memory holds, <split>.parquet, to be read with ``streaming: true``. What
cannot be paired has a row without a text, of which ``problem`` says why: the table's reader counts and names it. ``document`` is
where a pair is from.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

from formats import files_of, listed, rows_of, script, stream, write

from whisper_moe.data.corpus import Row
from whisper_moe.data.sample import DataError
from whisper_moe.media.languages import language_code

_FLORES = (
    "eng_Latn asm_Beng hin_Deva mal_Mlym ben_Beng guj_Gujr san_Deva kan_Knda tel_Telu mar_Deva tam_Taml ory_Orya npi_Deva "
    "pan_Guru urd_Arab"
)
LANGUAGES: dict[str, str] = dict(
    zip(_FLORES.split(), "en as hi ml bn gu sa kn te mr ta or ne pa ur".split(), strict=True)
)
"""By the columns' names (FLORES-200), each with its code."""
COLUMNS = ("source_text", "text", "language", "target_language", "task", "document", "problem")
DIRECTIONS = ("en>any", "any>en")
Direction: TypeAlias = tuple[str, str, str, str]
"""Code and column of the source, code and column of the target."""


def directions_of(
    source: Path | str, asked: Iterable[str], there: dict[str, str], languages: Sequence[str]
) -> list[Direction]:
    """``any>en`` spelled out, each pair once, in the order of the columns. ``there``: code and column."""
    wrong = partial(DataError, source, column="directions")

    def end(name: str) -> list[str]:
        """``any``, a code, a name, or the corpus's own name of the column."""
        if name == "any":
            return [code for code in there if not languages or code in languages]
        try:
            code = LANGUAGES.get(name) or language_code(name)
        except ValueError as error:
            raise wrong(str(error)) from None
        if code not in there:
            raise wrong(f"no column for {name!r}; there are {', '.join(there)}")
        return [code]

    chosen: dict[tuple[str, str], None] = {}
    for direction in asked:
        ends = [name.strip() for name in direction.split(">")]
        if len(ends) != 2:
            raise wrong(f"{direction!r} is no direction such as en>hi, any>en")
        sources, targets = map(end, ends)
        chosen |= dict.fromkeys((a, b) for a in sources for b in targets if a != b)
    if not chosen:
        raise wrong(f"no two languages in {', '.join(asked)}; there are {', '.join(there) or 'none'}")
    return [(a, there[a], b, there[b]) for a, b in chosen]


def pairs(rows: Iterable[Row], directions: Sequence[Direction]) -> Iterator[Row]:
    """Wide rows to pairs; of what cannot be paired, a row with a problem."""
    for row in rows:
        document = next((str(row[name]) for name in ("doc_id", "url") if row.get(name) not in (None, "")), "")
        for source, source_column, target, target_column in directions:
            about = {"task": "translate-text", "language": source, "target_language": target, "document": document}
            try:
                for said, meant in paired(row[source_column], row[target_column]):
                    yield {**about, "source_text": said, "text": meant}
            except ValueError as error:
                yield {**about, "problem": str(error)}


def paired(source: object, target: object) -> list[tuple[str, str]]:
    """The pairs of two cells; none where one is empty. Raises ``ValueError`` where they cannot be paired."""
    sources, targets = sentences(source), sentences(target)
    if not any(sources) or not any(targets):
        return []
    if len(sources) != len(targets):
        raise ValueError(f"{len(sources)} sentences against {len(targets)}: they cannot be paired")
    if (longest := max(map(len, (*sources, *targets)))) > csv.field_size_limit():
        raise ValueError(f"a text of {longest:,} characters, more than a table's cell holds")
    return [(said, meant) for said, meant in zip(sources, targets, strict=True) if said and meant]


def sentences(cell: Any) -> list[str]:
    """A cell's sentences, with single spaces; empty ones stay, since they have their places."""
    parts = cell if isinstance(cell, list) else [cell]
    if not all(isinstance(part, str | None) for part in parts):
        raise ValueError(f"a {type(cell).__name__} where a text or a list of texts is expected")
    return [" ".join((part or "").split()) for part in parts]


def convert(
    source: str,
    out: Path,
    directions: Sequence[str] = DIRECTIONS,
    languages: Sequence[str] = (),
    *,
    split: str = "train",
    limit: int | None = None,
    revision: str | None = None,
    parquet: bool = False,
) -> None:
    """Write the table. Raises :class:`DataError`."""
    whole = split == "train"  # of files without any division
    files = files_of(Path(source), split, ".parquet", ".jsonl", ".json", undivided=whole)
    dataset = stream(source, split, files, revision)
    names: list[str] = list(dataset.features or ())
    there = {code: column for column, code in LANGUAGES.items() if column in names}
    try:
        codes = list(map(language_code, languages))
    except ValueError as error:
        raise DataError(source, str(error), column="languages") from None
    chosen = directions_of(source, directions, there, codes)
    columns = [name for name in ("doc_id", "url") if name in names]
    columns += sorted({column for _, a, _, b in chosen for column in (a, b)})
    counts, problems = Counter[str](), Counter[str]()

    def counted() -> Iterator[Row]:
        for row in islice(pairs(rows_of(dataset.select_columns(columns), source), chosen), limit):
            direction = f"{row['language']}>{row['target_language']}"
            (problems if row.get("problem") else counts)[direction] += 1
            yield row
        if not counts:
            raise DataError(
                source, f"no pairs of {', '.join(directions)}, and {problems.total():,} that cannot be made"
            )

    write(out / f"{split}.{'parquet' if parquet else 'tsv'}", counted(), COLUMNS)
    for direction in sorted(counts | problems):
        print(f"{direction}: {counts[direction]:,} pairs, and {problems[direction]:,} that cannot be made")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("source")
    parser.add_argument("out", type=Path)
    parser.add_argument("--directions", type=listed, default=DIRECTIONS)
    parser.add_argument("--languages", type=listed, default=())
    parser.add_argument("--split", default="train")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--revision")
    parser.add_argument("--parquet", action="store_true")
    given = vars(parser.parse_args())
    sys.exit(script(lambda: convert(**given)))
