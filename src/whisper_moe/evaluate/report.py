"""The report: ``report.json``, ``report.md``, ``transcripts.tsv`` and ``report.html``, all of them or none."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from whisper_moe.evaluate.material import Clip
from whisper_moe.evaluate.measure import Measured
from whisper_moe.evaluate.page import page
from whisper_moe.evaluate.tables import circumstances, sections

JSON, MARKDOWN, TABLE, PAGE = "report.json", "report.md", "transcripts.tsv", "report.html"


def check_folder(folder: Path) -> None:
    """Before any work: whether a report can be put there. Raises ``ValueError`` that says why not."""
    present = {path.name for path in folder.iterdir()} if folder.is_dir() else set[str]()
    if present and JSON not in present:
        raise ValueError(f"{folder}: there is something in it, and no earlier report that could be replaced")
    if others := present - {JSON, MARKDOWN, TABLE, PAGE}:
        raise ValueError(f"{folder}: not replaced, for it holds more than a report: {', '.join(sorted(others)[:5])}")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file; -o needs a folder")
    try:
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder.absolute().parent):
            pass
    except OSError as error:
        raise ValueError(f"{folder}: cannot be written: {error.strerror}") from error


def write(folder: Path, report: dict[str, Any], clips: Sequence[Clip], measured: dict[str, Measured]) -> None:
    """All files, in a folder beside it first: it appears when it is complete, in the place of an earlier report."""
    texts = {
        JSON: json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        MARKDOWN: markdown(report),
        TABLE: transcripts(clips, measured),
        PAGE: page(report),
    }
    parent = folder.absolute().parent
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=parent))
    try:
        fresh.chmod(0o755)
        for name, text in texts.items():
            with (fresh / name).open("w", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        _put(fresh, folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _put(fresh: Path, folder: Path) -> None:
    if not folder.exists():
        fresh.rename(folder)
        return
    if not any(folder.iterdir()):
        folder.rmdir()
        fresh.rename(folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.absolute().parent))
    folder.rename(old / folder.name)
    try:
        fresh.rename(folder)
    except OSError:
        (old / folder.name).rename(folder)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def transcripts(clips: Sequence[Clip], measured: dict[str, Measured]) -> str:
    """A TSV with a row for each clip; tabs and line ends within a text become spaces."""
    head = ["id", "corpus", "task", "language", "target_language", "domain", "seconds", "reference", *measured]
    rows = [head]
    for index, clip in enumerate(clips):
        sample = clip.sample
        facts = [sample.id, clip.corpus, sample.task, sample.language, sample.target_language, sample.domain or ""]
        texts = [each.heard[index].text for each in measured.values()]
        rows.append([*facts, f"{clip.seconds:.2f}", sample.text, *texts])
    return "".join("\t".join(re.sub(r"\s+", " ", cell).strip() for cell in row) + "\n" for row in rows)


def markdown(report: dict[str, Any]) -> str:
    """The figures as tables, what they were measured on, and what went wrong."""
    parts = [f"# Evaluation of {_plain(report['model'])}", _plain(circumstances(report))]
    for section in sections(report):
        parts += [f"## {_plain(section.title)}"] if section.title else []
        parts += [_table(section.head, section.rows)] if section.rows else []
        parts += [_plain(note) for note in section.notes]
    return "\n\n".join(parts) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(_plain, line))} |" for line in lines)


def _plain(text: str) -> str:
    """Text that cannot break a table or become markup."""
    escaped = re.sub(r"([\\|*_`\[\]])", r"\\\1", text.replace("&", "&amp;").replace("<", "&lt;"))
    return re.sub(r"\s+", " ", escaped)
