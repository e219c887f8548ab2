"""The inputs of a command, what their transcripts are called, and where these are written. Nothing here imports torch."""

from __future__ import annotations

import errno
import glob
import itertools
import json
import logging
import os
import re
import sys
import time
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from whisper_moe.config import problems
from whisper_moe.generate.options import SubtitleOptions
from whisper_moe.generate.result import FORMATS, Transcription, as_text, mean_gates
from whisper_moe.weights.files import atomic_file, try_folder

if TYPE_CHECKING:
    from rich.progress import Progress

    from whisper_moe.api import WhisperMoE
    from whisper_moe.generate.result import Outcome

logger = logging.getLogger(__name__)

SAMPLE = Path(__file__).parents[2] / "examples" / "sample.m4a"
"""What is transcribed when no file is named; it comes with a checkout."""
_APART = re.compile(rf"(?<=[{re.escape(os.sep + (os.altsep or ''))}])")
"""Behind each separator of a path."""
_LONGEST_NAME = 230
"""Bytes of a file name without what is put behind it; file systems take 255 in all."""


class UsageError(ValueError):
    """Flags or paths that cannot work; exit status 2."""


def sentence(error: Exception) -> str:
    """What an error says, on one line; of pydantic's only what is wrong with which field, of the system's with which file."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    return problems(error) if isinstance(error, ValidationError) else " ".join(str(error).split())


@contextmanager
def usage() -> Iterator[None]:
    """Errors in here are the flags' fault."""
    try:
        yield
    except ValueError as error:
        raise UsageError(sentence(error)) from error


# Files in.


@dataclass(frozen=True)
class Job:
    """An input and the name of its outputs."""

    path: str
    """``-`` is standard input."""
    name: str
    """Of its files, without extension."""
    partial: str
    """What a part of its transcript is called; no name of a whole one."""

    @property
    def source(self) -> Any:
        return sys.stdin.buffer if self.path == "-" else self.path

    def aloud(self, directory: Path) -> Path:
        """Its transcript, read aloud."""
        return directory / f"{self.name}.m4a"


def given_text(given: str) -> str:
    """What is to be read: a file's content, standard input, or the words themselves."""
    path = Path(given) if len(given) < 4_096 and "\0" not in given else None
    try:
        if given == "-":
            return sys.stdin.buffer.read().decode("utf-8-sig")
        with suppress(OSError):  # too long a name is a text
            if path and path.is_file():
                return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{given}: not a text in UTF-8: {error.reason} at byte {error.start}") from error
    if path and path.suffix.lower() in (".txt", ".text", ".md") and len(given.split()) == 1:
        raise UsageError(f"{given}: no such file")
    return given


def named(paths: Sequence[str]) -> list[Job]:
    """A job for each path. No name is given twice: the input's own without extension, then ``name-2``, ``name-3`` …

    Names that differ only in case or Unicode form count as equal, as some file systems take them. Names depend on the whole
    list, whatever of it is done already: the same one always gives the same names, and so does one that has grown at its end,
    unless it now holds ``name-2`` itself.
    """
    stems = ["stdin" if path == "-" else _stem(path) for path in paths]
    reserved, names, taken = set(map(_file_key, stems)), list[str](), set[str]()
    numbers = defaultdict[str, Iterator[int]](lambda: itertools.count(2))
    for stem in stems:
        numbered = (f"{stem}-{number}" for number in numbers[_file_key(stem)])
        free = (name for name in numbered if _file_key(name) not in reserved)
        names.append(stem if _file_key(stem) not in taken else next(free))
        taken.add(_file_key(names[-1]))
    jobs: list[Job] = []
    for path, name in zip(paths, names, strict=True):
        partial = f"{name}.partial"
        while _file_key(partial) in taken:
            partial += ".partial"
        taken.add(_file_key(partial))
        jobs.append(Job(path, name, partial))
    return jobs


def _stem(path: str) -> str:
    """A file name without extension, short enough to put something behind it, and a file name on every system."""
    stem = Path(path).stem.replace("\\", "_")
    name = os.fsencode(stem)
    return stem if len(name) <= _LONGEST_NAME else name[:_LONGEST_NAME].decode(errors="ignore")


def _file_key(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def expand(files: Sequence[str] | None) -> list[str]:
    """Files and globs as paths; what is missing stays as it was given, for :func:`readable` to tell of."""
    if not files:
        if not SAMPLE.is_file():
            raise UsageError("name a file to transcribe: the bundled sample is only in a checkout of the project")
        return [str(SAMPLE)]
    if list(files).count("-") > 1:
        raise UsageError("standard input (-) can be read only once")
    return [path for file in files for path in (["-"] if file == "-" else _matches(file) or [file])]


def _matches(file: str) -> list[str]:
    """What a name or pattern stands for, in order. Each part of it that is there by that very name is no pattern.

    Unicode's composed and decomposed forms are tried too: some systems change a name into the other.
    """
    if os.path.lexists(file):
        return [file]
    found = {""}
    for part in _APART.split(os.path.expanduser(file)):
        found = {path for folder in found for path in _within(folder, part)}
    return sorted(path for path in found if not (glob.has_magic(file) and os.path.isdir(path)))


def _within(folder: str, part: str) -> list[str]:
    """The paths in a folder that are called so, or else that match."""
    forms = list(dict.fromkeys((part, *(unicodedata.normalize(form, part) for form in ("NFC", "NFD")))))
    called = next((folder + form for form in forms if os.path.lexists(folder + form)), None)
    if called is not None:
        return [called]
    matches = [path for form in forms for path in glob.glob(glob.escape(folder) + form, recursive=True)]
    return [*matches, ""] if part == f"**{os.sep}" and not folder else matches  # glob leaves this folder out


def readable(jobs: Sequence[Job]) -> list[Job]:
    """The jobs whose input is there, said of every other before a model is loaded."""
    there = list[Job]()
    for job in jobs:
        if job.path != "-" and (fault := _fault(job.path)):
            logger.error("whisper-moe: %s: %s", job.path, os.strerror(fault).lower())
        else:
            there.append(job)
    return there


def _fault(path: str) -> int:
    """Why a path cannot be read, as the system numbers it. It is not opened: that would take a pipe's first reader away."""
    try:
        os.stat(path)
    except OSError as error:
        return error.errno or errno.EIO
    except ValueError:  # a NUL in it
        return errno.ENOENT
    return errno.EISDIR if os.path.isdir(path) else 0 if os.access(path, os.R_OK) else errno.EACCES


# Transcripts out.


def put(text: str) -> None:
    """Onto standard output, at once. Where it cannot be written to it is given up, and the error says that it was this."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        give_up_output()
        error.filename = "standard output"
        raise


def give_up_output() -> None:
    """What is still to be written goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Outputs:
    """Where transcripts go: to files in a folder, or to standard output, and in which formats."""

    def __init__(
        self,
        formats: str | None,
        directory: Path | None,
        subtitles: SubtitleOptions,
        inputs: int,
        show_routing: bool = False,
    ) -> None:
        """``show_routing``: say which experts answered each segment. Raises ``UsageError`` where outputs of so many inputs could
        not be written so."""
        self._show_routing = show_routing
        given = (formats or ("txt" if directory is None else "all")).split(",")
        self.formats = list(dict.fromkeys(f for name in given for f in (FORMATS if name == "all" else (name,))))
        self.directory, self.subtitles, self._several = directory, subtitles, inputs > 1
        if unknown := [name for name in self.formats if name not in FORMATS]:
            raise UsageError(f"unknown output format {unknown[0]!r}: one of {', '.join(FORMATS)}, all")
        if directory is not None:
            with usage():
                try_folder(directory)
        elif len(self.formats) > 1:
            raise UsageError("several formats need a folder to be written to: add -o DIR")
        elif self._several and self.formats[0] not in ("txt", "json"):
            raise UsageError(f"{inputs} files would be one broken {self.formats[0]} on standard output: add -o DIR")

    def files(self, name: str) -> list[Path]:
        return [self.directory / f"{name}.{format}" for format in self.formats] if self.directory else []

    def has(self, job: Job) -> bool:
        """Whether all files of a job are there: files appear whole. A JSON that names another input is not its own."""
        files = self.files(job.name)
        if job.path == "-" or not all(file.is_file() for file in files):
            return False
        said = next((_facts_in(file).get("source") for file in files if file.suffix == ".json"), None)
        ends = zip(reversed(Path(said or job.path).parts[-2:]), reversed(Path(job.path).parts[-2:]), strict=False)
        return all(one == other for one, other in ends)

    def deliver(self, outcome: Outcome, job: Job) -> bool:
        """Write one result; whether it is whole and could be written: what ails one file costs that file alone.

        Of a damaged file, what was said before the damage is written, to a file whose name says so.
        """
        if outcome.error is not None:
            logger.error("whisper-moe: %s", outcome.error)
        if (result := outcome.transcription or outcome.partial) is None:
            return False
        name = job.name if outcome.partial is None else job.partial
        try:
            self._write(result, job.path, name)
            if outcome.error is None:
                self._forget_partial(job)
        except (OSError, ValueError) as error:
            if self.directory is None and isinstance(error, OSError):  # nobody can be told anything any more
                raise
            logger.error("whisper-moe: %s%s", "" if isinstance(error, OSError) else f"{job.path}: ", sentence(error))
            return False
        each = ",".join(self.formats)
        each = each if len(self.formats) == 1 else f"{{{each}}}"  # as a shell spells several files: out/ep.{srt,json}
        place = f"in {self.directory / name}.{each}" if self.directory else "on standard output"
        if outcome.partial is not None:
            logger.warning("%s: what was said before, up to %.1f s, is %s", job.path, result.duration, place)
            return False
        logger.info("%s%s", _facts(outcome.name, result), f"; {place}" if self.directory else "")
        notes = [f"{outcome.name}: {note}" for note in result.notes]
        for line in [*notes, *(_routing(result) if self._show_routing else ())]:
            logger.info("%s", line)
        return True

    def _forget_partial(self, job: Job) -> None:
        """Remove what was written of this input while it was damaged; not what another one, of that name, has said."""
        inputs = Path(job.path).parent.glob(glob.escape(f"{Path(job.path).stem}.partial") + ".*")
        files = self.files(job.partial)
        known = [_facts_in(file) for file in files if file.suffix == ".json" and file.is_file()]
        if all("damage" in said for said in known) and all(path.suffix[1:] in FORMATS for path in inputs):
            for file in files:
                file.unlink(missing_ok=True)

    def _write(self, result: Transcription, path: str, name: str) -> None:
        for format, file in zip(self.formats, self.files(name), strict=False):
            with atomic_file(file) as scratch:
                scratch.write_text(as_text(result, format, self.subtitles), encoding="utf-8")
        if self.directory is None:
            if self._several and self.formats == ["txt"]:
                print(f"{path}:", file=sys.stderr, flush=True)
            # The file of json has no end of line; on a terminal, and between two results, one is wanted.
            put(as_text(result, self.formats[0], self.subtitles) + ("\n" if self.formats[0] == "json" else ""))


def _facts_in(file: Path) -> dict[str, Any]:
    """What a JSON says; nothing, if it is no transcript's."""
    try:
        said = json.loads(file.read_bytes())
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def try_aloud(directory: Path, jobs: Sequence[Job]) -> None:
    """:func:`try_folder` of what is read aloud. Raises ``UsageError`` where that would overwrite what is to be heard."""
    inputs = {Path(job.path).resolve() for job in jobs}
    if lost := [path for job in jobs if (path := job.aloud(directory)).resolve() in inputs]:
        raise UsageError(f"{lost[0]}: an input, which reading aloud would overwrite: give --speak another folder")
    try_folder(directory)


def _routing(result: Transcription) -> Iterator[str]:
    """Stretches of one language and one choice: from, to, and who answered them."""
    alike = itertools.groupby(result.segments, lambda segment: (segment.language or result.language, segment.experts))
    for (language, experts), run in alike:
        segments = list(run)
        chosen = ", ".join(f"{expert} {gate:.2f}" for expert, gate in experts)
        yield f"  {segments[0].start:.1f} to {segments[-1].end:.1f} s, {language}: {chosen or 'no experts'}"


def _facts(name: str, result: Transcription) -> str:
    """What the model decided about one file: language, experts with their mean gates, and how often it tried again."""
    spoken = ", ".join(dict.fromkeys(segment.language or "?" for segment in result.segments)) or "no speech"
    facts = [f"{name}: {result.duration:.1f} s, {spoken}"]
    if experts := sorted(mean_gates(result.segments), key=lambda item: -item[1]):
        facts.append("experts " + ", ".join(f"{expert} {gate:.2f}" for expert, gate in experts))
    if result.fallbacks:
        facts.append(f"{result.fallbacks} of its windows decoded again")
    return "; ".join(facts)


def progress_bar() -> Progress:
    """A bar of the seconds finished, where standard error is a terminal; how many there will be is not known before.

    Rich would redirect standard output to the terminal of the bar, even where it is a file: that is turned off.
    """
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console, text = Console(stderr=True), TextColumn("{task.completed:.0f} s of audio done")
    console.quiet = not (console.is_interactive and logger.isEnabledFor(logging.INFO))  # older ones write an empty line
    how: dict[str, Any] = {"redirect_stdout": False, "redirect_stderr": False, "transient": True}
    how["disable"] = console.quiet
    return Progress(SpinnerColumn(), text, TimeElapsedColumn(), console=console, **how)


def load(
    flags: SimpleNamespace, languages: Iterable[str], task: str = "transcribe", *, lazy: bool = False
) -> WhisperMoE:
    """The model that the flags name, which has these languages for this task."""
    started = time.perf_counter()
    from whisper_moe.api import WhisperMoE

    how = {"device": flags.device, "dtype": flags.dtype, "threads": flags.threads or None}
    loaded = WhisperMoE.from_pretrained(flags.model, model_dir=flags.model_dir, lazy=lazy, **how)
    seconds = time.perf_counter() - started
    logger.info("%s on %s (%s), loaded in %.1f s", loaded.name, loaded.device, loaded.dtype, seconds)
    with usage():
        for name in languages:
            loaded.tokenizer.sot_sequence(name, task)
    return loaded
