"""What is in a corpus: samples, hours, languages, speakers and tasks, a histogram of durations, and what cannot be used.

Every sample is looked at as training does before its first step: its row, its text in a model's tokens, and the header of
its sound or film; with ``decode`` all of it. What training would leave out is counted and named, and costs nothing else.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from json import dumps
from pathlib import Path
from typing import Any, TypeAlias

from pydantic import ValidationError

from whisper_moe.config import EMBEDDED, SAMPLE_RATE, ModelConfig, problems
from whisper_moe.data.corpora import PROBES, Corpus, CorpusConfig, open_corpus
from whisper_moe.data.examples import ExampleConfig, ExampleReader
from whisper_moe.data.kathbath import LANGUAGES, TRANSCRIPTS
from whisper_moe.data.sample import DataError, Sample, Skipped, TooLong, left_out
from whisper_moe.data.sampler import CorruptShare, LoaderConfig
from whisper_moe.media.audio import MediaError
from whisper_moe.media.tokenizer import Tokenizer
from whisper_moe.media.video import load_frames

KINDS = ("corrupt", "missing", "too long")
"""Why a sample is left out."""
EDGES = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30)
"""Seconds at which the histogram's bars begin; what is longer than the last does not fit Whisper's window."""
NAMED = 20
"""Unusable samples that the table names; JSON has all of them."""
_BAR = 40
_CHUNK = 64 * PROBES
"""Samples that are looked at together: of a stream, no more are held."""

_Read: TypeAlias = Callable[[], Sample]


_Model: TypeAlias = "tuple[Tokenizer, ModelConfig]"


@dataclass(frozen=True, slots=True)
class _Seen:
    """What was found out about a row."""

    sample: Sample | None = None
    """None where there is none that can be read."""
    seconds: float = 0.0
    skipped: Skipped | None = None
    """Why training leaves it out."""
    refused: str = ""
    """What training stops for: something that the model lacks."""


@dataclass(slots=True)
class Group:
    """The samples of one corpus, task and pair of languages."""

    corpus: str
    split: str
    task: str
    language: str
    """Code, or two with ``>`` between them where the text is in another one."""
    samples: int = 0
    seconds: float = 0.0
    longest: float = 0.0
    speakers: set[str] = field(default_factory=set)


@dataclass(slots=True)
class Inspection:
    """What :func:`inspect` has seen."""

    groups: dict[tuple[str, str, str, str], Group] = field(default_factory=dict)
    histogram: Counter[int] = field(default_factory=Counter)
    """Edge in seconds: samples of sound or film from there to the next one."""
    left_out: list[Skipped] = field(default_factory=list)
    remarks: Counter[str] = field(default_factory=Counter)
    """What else is to be known, and of how many samples."""

    @property
    def refused(self) -> int:
        """Samples that training stops for."""
        return self.remarks.total()

    @property
    def samples(self) -> int:
        return sum(group.samples for group in self.groups.values())

    @property
    def seconds(self) -> float:
        return sum(group.seconds for group in self.groups.values())

    def of_kind(self, kind: str) -> list[Skipped]:
        """Of what is left out: ``corrupt``, ``missing`` or ``too long``."""
        return [each for each in self.left_out if each.kind == kind]

    def add(self, split: str, corpus: str, sample: Sample, seconds: float) -> None:
        same = sample.language == sample.target_language
        language = sample.language if same else f"{sample.language}>{sample.target_language}"
        key = (corpus, split, sample.task, language)
        group = self.groups.setdefault(key, Group(*key))
        group.samples += 1
        group.seconds += seconds
        group.longest = max(group.longest, seconds)
        if sample.speaker is not None:
            group.speakers.add(sample.speaker)
        if sample.audio is not None or sample.video is not None:
            self.histogram[max(edge for edge in EDGES if edge <= seconds)] += 1

    def as_json(self) -> dict[str, Any]:
        """Plain data: everything, with each unusable sample's name."""
        groups = [{**asdict(group), "speakers": len(group.speakers)} for group in self.groups.values()]
        return {
            "samples": self.samples,
            "seconds": round(self.seconds, 3),
            "groups": [{**group, "seconds": round(group["seconds"], 3)} for group in groups],
            "histogram": [{"from_seconds": edge, "samples": self.histogram[edge]} for edge in EDGES],
            **{kind.replace(" ", "_"): [asdict(each) for each in self.of_kind(kind)] for kind in KINDS},
            "remarks": list(map(_remark, self.remarks.items())),
        }

    def __str__(self) -> str:
        parts = [_table(self), _bars(self.histogram)]
        named = [(kind, list(map(str, self.of_kind(kind)))) for kind in KINDS]
        for title, lines in (*named, ("remarks", list(map(_remark, self.remarks.items())))):
            if lines:
                more = [f"  … and {len(lines) - NAMED:,} more; --json names all"] if len(lines) > NAMED else []
                parts.append("\n".join([f"{title}: {len(lines):,}", *(f"  {line}" for line in lines[:NAMED]), *more]))
        return "\n\n".join(part for part in parts if part)


def _remark(remark: tuple[str, int]) -> str:
    words, samples = remark
    return f"{words} ({samples:,} samples)" if samples else words


def inspect(configs: Iterable[CorpusConfig], *, decode: bool = False, model: _Model | None = None) -> Inspection:
    """Look at every sample of these corpora.

    :param decode: decode sound and films to their ends, instead of reading their headers.
    :param model: tokenizer and configuration of the model that is to learn; without, no text is looked at.
    :raises DataError: for a corpus that cannot be opened.
    """
    seen = Inspection()
    for config in configs:
        _inspect(seen, config, decode, model)
    return seen


def _inspect(seen: Inspection, config: CorpusConfig, decode: bool, model: _Model | None) -> None:
    corpus = open_corpus(config)
    seen.left_out += corpus.left_out
    seen.remarks.update(dict.fromkeys((f"{corpus.name}: {remark}" for remark in corpus.remarks), 0))
    reader = ExampleReader(*model, ExampleConfig(empty_text=config.text == "none")) if model else None
    for found in _look(corpus, decode, reader):
        if found.sample is not None:
            seen.add(config.split, corpus.name, found.sample, found.seconds)
        if found.skipped is not None:
            seen.left_out.append(found.skipped)
        if found.refused:
            seen.remarks[f"{corpus.name}: training stops: {found.refused}"] += 1


def _look(corpus: Corpus, decode: bool, reader: ExampleReader | None) -> Iterator[_Seen]:
    """Every sample of a corpus, some at a time."""
    reads = _streamed(corpus) if corpus.streaming else _indexed(corpus)
    with ThreadPoolExecutor(PROBES) as pool:
        while chunk := list(islice(reads, _CHUNK)):
            yield from pool.map(lambda read: _look_at(read, decode, reader), chunk)


def _indexed(corpus: Corpus) -> Iterator[_Read]:
    for index in range(len(corpus)):
        yield lambda index=index: corpus[index]


def _streamed(corpus: Corpus) -> Iterator[_Read]:
    samples = iter(corpus)
    while True:
        try:
            sample = next(samples)
        except StopIteration:
            return
        except DataError as error:
            yield lambda error=error: _raise(error)
        else:
            yield lambda sample=sample: sample


def _raise(error: Exception) -> Sample:
    raise error


def _look_at(read: _Read, decode: bool, reader: ExampleReader | None) -> _Seen:
    sample = None
    try:
        sample = read()
        seconds = _seconds(sample, decode)
    except (MediaError, DataError) as error:
        named = sample or (error.file if isinstance(error, DataError) else error.name)
        return _Seen(skipped=left_out(named, error))
    try:
        if reader is not None:
            reader.measure(sample, seconds)
    except DataError as error:
        return _Seen(skipped=left_out(sample, error))
    except TooLong as error:
        return _Seen(sample, seconds, skipped=left_out(sample, error))
    except ValueError as error:
        return _Seen(sample, seconds, refused=str(error).removeprefix(f"{sample.id}: "))
    return _Seen(sample, seconds)


def _seconds(sample: Sample, decode: bool) -> float:
    """By the header, or by all of it."""
    if decode and sample.video is not None:
        load_frames(sample.video, rate=1.0, short_side=32)
    whole = decode and sample.audio is not None
    seconds = len(sample.audio.read()) / SAMPLE_RATE if whole and sample.audio is not None else sample.seconds()
    if sample.audio is not None and seconds == 0.0:
        raise MediaError(sample.audio.name, "it holds no sound")
    return seconds


# Text.


def _table(seen: Inspection) -> str:
    head = ("corpus", "split", "task", "language", "samples", "hours", "mean s", "longest s", "speakers")
    rows = [
        (
            *(
                group.corpus,
                group.split,
                group.task,
                group.language,
                f"{group.samples:,}",
                f"{group.seconds / 3600:.2f}",
            ),
            *(f"{group.seconds / group.samples:.2f}", f"{group.longest:.2f}", f"{len(group.speakers):,}"),
        )
        for group in sorted(seen.groups.values(), key=lambda group: (group.corpus, group.split, group.language))
    ]
    rows.append(("total", "", "", "", f"{seen.samples:,}", f"{seen.seconds / 3600:.2f}", "", "", ""))
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    words = 4  # columns of words stand left, numbers right
    lines = [
        "  ".join(
            cell.ljust(width) if column < words else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [head, *rows]
    ]
    return "\n".join([lines[0], "─" * len(lines[0]), *lines[1:]])


def _bars(histogram: Counter[int]) -> str:
    """The histogram of durations, from the first bar that is not empty to the last."""
    used = [edge for edge in EDGES if histogram[edge]]
    if not used:
        return ""
    lines = ["seconds   samples"]
    ends = (*EDGES[1:], None)
    for edge, end in zip(EDGES, ends, strict=True):
        if used[0] <= edge <= used[-1]:
            count = histogram[edge]
            bar = "█" * round(_BAR * count / max(histogram.values())) or ("▏" if count else "")
            lines.append(f"{f'{edge}–{end}' if end else f'over {edge}':<8} {count:>8,} {bar}".rstrip())
    return "\n".join(lines)


# The command.


_LISTS = ("languages", "directions", "columns")


def run(sources: Sequence[str], *, kind: str, decode: bool, json: bool, model: str | None, **settings: Any) -> int:
    """``whisper-moe data inspect``: prints, and returns the exit status; 1 where something cannot be used, 2 for usage.

    What training stops for is among it where somebody said which model is to learn.

    :param model: that is to learn; default: the one that comes along.
    :param settings: of :class:`CorpusConfig`; None for what was not given, lists with commas.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    for name in given.keys() & set(_LISTS):
        given[name] = listed(given[name])
    try:
        configs = [CorpusConfig(source=source, kind=kind_of(source, kind), **given) for source in sources]
    except ValidationError as error:
        print(f"whisper-moe: {problems(error)}", file=sys.stderr)
        return 2
    seen, failed = Inspection(), 0
    try:
        learner = _learner(model)
    except (ValueError, OSError) as error:
        print(f"whisper-moe: --model: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if learner is None:
        seen.remarks["no model is at hand (--model): texts were not looked at"] = 0
    for config in configs:
        try:
            _inspect(seen, config, decode, learner)
        except (DataError, ImportError, OSError) as error:
            print(f"whisper-moe: {' '.join(str(error).split())}", file=sys.stderr)
            failed += 1
    if failed < len(configs):
        print(dumps(seen.as_json(), ensure_ascii=False, indent=2) if json else seen)
    if not given.get("limit"):  # of what is listed beyond it, training does not speak
        _judge(seen)
    return 1 if failed or seen.left_out or (model and seen.refused) else 0


def _judge(seen: Inspection) -> None:
    """Say what training would stop with, where it is for how much is left out."""
    try:
        CorruptShare(LoaderConfig().max_corrupt_share, seen.samples - len(seen.of_kind("too long")), seen.left_out)
    except DataError as error:
        print(f"whisper-moe: training stops: {error}", file=sys.stderr)


def listed(given: str) -> Any:
    """``path,text`` as a tuple, ``path=clip,text=said`` as a map."""
    parts = [part.strip() for part in given.split(",") if part.strip()]
    return dict(part.split("=", 1) for part in parts) if all("=" in part for part in parts) else tuple(parts)


def _learner(model: str | None) -> _Model | None:
    """Tokenizer and configuration of a model, without its weights if it is one of ours; None where there is no default."""
    from whisper_moe.weights.default import load_model
    from whisper_moe.weights.files import read_json
    from whisper_moe.weights.manifest import CONFIG, GENERATION, TOKENIZER, read_config
    from whisper_moe.weights.sources import resolve

    if model is None and not EMBEDDED.is_dir():
        return None
    located = resolve(model or EMBEDDED)
    if located.kind != "checkpoint":
        loaded = load_model(model)
        return loaded.tokenizer, loaded.config
    tokenizer = Tokenizer.from_file(located.path / TOKENIZER, read_json(located.path / GENERATION))
    return tokenizer, read_config(located.path / CONFIG)


def kind_of(source: str, given: str = "auto") -> Any:
    """The kind that was given; for ``auto``, by the Hub id or by what lies in the folder."""
    if given != "auto":
        return given
    path, plain = Path(source), source.lower()
    if path.is_file():
        return "table"
    if not path.is_dir():
        return next((kind for kind in ("kathbath", "include", "wiki-translate") if plain.endswith(f"/{kind}")), "table")
    if any(path.rglob("include*_train.txt")) or any(path.rglob("include*_test.txt")):
        return "include"
    if any(path.rglob(TRANSCRIPTS)) or any((path / name).is_dir() for name in LANGUAGES):
        return "kathbath"
    return "table"
