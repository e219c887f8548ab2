"""A job for each input of ``transcribe``: its path, what its transcript is called, and where that is written."""

from __future__ import annotations

import errno
import glob
import json
import os
import re
import sys
import tempfile
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from whisper_moe.flags import UsageError, sentence
from whisper_moe.generate.result import Transcription, mean_gates
from whisper_moe.generate.text import FORMATS, SubtitleOptions, output_names, save, write

if TYPE_CHECKING:
    from whisper_moe.api import Outcome

SAMPLE = Path(__file__).parents[2] / "examples" / "sample.m4a"
"""What is transcribed when no file is named; it comes with a checkout."""
_APART = re.compile(rf"(?<=[{re.escape(os.sep + (os.altsep or ''))}])")
"""Behind each separator of a path."""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


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


def named(paths: Sequence[str]) -> list[Job]:
    """A job for each path; names depend on the whole list, whatever of it is done already."""
    names = output_names(paths)
    given = set(names)
    jobs: list[Job] = []
    for path, name in zip(paths, names, strict=True):
        partial = name + ".partial"
        while partial in given:
            partial += ".partial"
        given.add(partial)
        jobs.append(Job(path, name, partial))
    return jobs


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
    faults = [(job, None if job.path == "-" else _fault(job.path)) for job in jobs]
    for job, fault in faults:
        if fault:
            say(f"whisper-moe: {job.path}: {fault}")
    return [job for job, fault in faults if not fault]


def _fault(path: str) -> str | None:
    """Why a path cannot be read. It is not opened: that would take a pipe's first reader away."""
    try:
        os.stat(path)
        number = errno.EISDIR if os.path.isdir(path) else 0 if os.access(path, os.R_OK) else errno.EACCES
    except OSError as error:
        number = error.errno or errno.EIO
    except ValueError:  # a NUL in it
        number = errno.ENOENT
    return os.strerror(number).lower() if number else None


@contextmanager
def standard_output() -> Iterator[TextIO]:
    """Flushed at the end. Once it cannot be written to it is given up, and the error says that it was this."""
    try:
        yield sys.stdout
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


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """Where transcripts go: to files in a folder, or to standard output, and in which formats."""

    formats: Sequence[str]
    directory: Path | None
    subtitles: SubtitleOptions
    header: bool = False
    """Say whose text it is before each on standard output."""

    @classmethod
    def checked(
        cls, formats: Sequence[str], directory: Path | None, subtitles: SubtitleOptions, inputs: int
    ) -> Outputs:
        """Raises ``UsageError`` where outputs of so many inputs could not be written so."""
        if directory is not None:
            _try_folder(directory)
        elif len(formats) > 1:
            raise UsageError("several formats need a folder to be written to: add -o DIR")
        elif inputs > 1 and formats[0] not in ("txt", "json"):
            raise UsageError(f"{inputs} files would be one broken {formats[0]} on standard output: add -o DIR")
        return cls(formats=formats, directory=directory, subtitles=subtitles, header=inputs > 1 and formats[0] == "txt")

    def files(self, name: str) -> list[Path]:
        return [self.directory / f"{name}.{format}" for format in self.formats] if self.directory else []

    def has(self, job: Job) -> bool:
        """Whether all files of a job are there: files appear whole. A JSON that names another input is not its own."""
        if job.path == "-" or not all(file.is_file() for file in self.files(job.name)):
            return False
        said = next((_facts_in(file).get("source") for file in self.files(job.name) if file.suffix == ".json"), None)
        if said is None:
            return True
        ends = zip(reversed(Path(said).parts[-2:]), reversed(Path(job.path).parts[-2:]), strict=False)
        return all(one == other for one, other in ends)

    def deliver(self, outcome: Outcome, job: Job, talkative: bool) -> bool:
        """Write one result; whether it is whole and could be written: what ails one file costs that file alone.

        Of a damaged file, what was said before the damage is written, to a file whose name says so.
        """
        result = outcome.transcription or outcome.partial
        if outcome.error is not None:
            say(f"whisper-moe: {outcome.error}")
        if result is None:
            return False
        name = job.name if outcome.partial is None else job.partial
        try:
            self._write(result, job.path, name)
            if outcome.error is None:
                self._forget_partial(job)
        except OSError as error:
            if self.directory is None:  # nobody can be told anything any more
                raise
            say(f"whisper-moe: {sentence(error)}")
            return False
        except ValueError as error:
            say(f"whisper-moe: {job.path}: {sentence(error)}")
            return False
        if outcome.partial is not None:
            said = f"{job.path}: what was said before, up to {outcome.partial.duration:.1f} s, is"
            say(f"{said} {self._place(name)}")
        elif talkative:
            say(_facts(outcome.name, result) + (f"; {self._place(name)}" if self.directory else ""))
            for note in result.notes:
                say(f"{outcome.name}: {note}")
        return outcome.error is None

    def _forget_partial(self, job: Job) -> None:
        """Remove what was written of this input while it was damaged; not what another one, of that name, has said."""
        inputs = Path(job.path).parent.glob(glob.escape(f"{Path(job.path).stem}.partial") + ".*")
        files = self.files(job.partial)
        known = [_facts_in(file) for file in files if file.suffix == ".json" and file.is_file()]
        if all("damage" in said for said in known) and all(path.suffix[1:] in FORMATS for path in inputs):
            for file in files:
                file.unlink(missing_ok=True)

    def _write(self, result: Transcription, path: str, name: str) -> None:
        if self.directory is not None:
            save(result, self.directory, name, self.formats, self.subtitles)
            return
        if self.header:
            say(f"{path}:")
        with standard_output() as stream:
            write(result, self.formats[0], stream, self.subtitles)
            # The file of json has no end of line; on a terminal, and between two results, one is wanted.
            stream.write("\n" if self.formats[0] == "json" else "")

    def _place(self, name: str) -> str:
        """Where it is written, as a shell spells several files: ``out/ep.{srt,json}``."""
        if self.directory is None:
            return "on standard output"
        each = ",".join(self.formats)
        return f"in {self.directory / name}.{each if len(self.formats) == 1 else f'{{{each}}}'}"


def _facts_in(file: Path) -> dict[str, Any]:
    """What a JSON says; nothing, if it is no transcript's."""
    try:
        said = json.loads(file.read_bytes())
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def _try_folder(directory: Path) -> None:
    """The folder is made, and tried: a disk that refuses is better known before all the work than after it."""
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"{directory}: is a file; -o needs a folder")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise UsageError(f"{directory}: cannot be written to: {error.strerror}") from error


def _facts(name: str, result: Transcription) -> str:
    """What the model decided about one file: language, experts with their mean gates, and how often it tried again."""
    spoken = ", ".join(dict.fromkeys(segment.language or "?" for segment in result.segments)) or "no speech"
    facts = [f"{name}: {result.duration:.1f} s, {spoken}"]
    experts = sorted(mean_gates(result.segments), key=lambda item: -item[1])
    if experts:
        facts.append("experts " + ", ".join(f"{expert} {gate:.2f}" for expert, gate in experts))
    if result.fallbacks:
        facts.append(f"{result.fallbacks} of its windows decoded again")
    return "; ".join(facts)
