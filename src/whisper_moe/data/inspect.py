"""What is in a corpus: samples, hours, languages, speakers and tasks, a histogram of durations, and what cannot be used.

Every sample is looked at as training does before its first step: its row, its text in a model's tokens, and the header of
its sound or film; with ``decode`` all of it. What training would leave out is counted and named, and costs nothing else.
"""

from __future__ import annotations

import io
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from json import dumps
from pathlib import Path
from typing import Any, TypeAlias

from pydantic import ValidationError

from whisper_moe.config import EMBEDDED, SAMPLE_RATE, ModelConfig, problems
from whisper_moe.config_aside import FilmConfig
from whisper_moe.data.corpus import CorpusConfig
from whisper_moe.data.examples import ExampleConfig, ExampleReader
from whisper_moe.data.sample import DataError, Sample, Skipped, items, left_out, looked_at
from whisper_moe.data.sampler import LoaderConfig
from whisper_moe.data.table import open_corpus
from whisper_moe.media.audio import MediaError
from whisper_moe.media.tokenizer import Tokenizer
from whisper_moe.media.video import load_film

KINDS = ("corrupt", "missing", "too long")
"""Why a sample is left out."""
EDGES = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30)
"""Seconds at which the histogram's bars begin; what is longer than the last does not fit Whisper's window."""
NAMED = 20
"""Unusable samples that the table names; JSON has all of them."""
_BAR = 40
_Model: TypeAlias = "tuple[Tokenizer, ModelConfig]"


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
    """What there is in the corpora that were looked at."""

    groups: dict[tuple[str, str, str, str], Group] = field(default_factory=dict)
    histogram: Counter[int] = field(default_factory=Counter)
    """Edge in seconds: samples of sound or film from there to the next one."""
    left_out: list[Skipped] = field(default_factory=list)
    remarks: Counter[str] = field(default_factory=Counter)
    """What else is to be known, and how many samples training stops for because of it."""

    @property
    def samples(self) -> int:
        return sum(group.samples for group in self.groups.values())

    @property
    def seconds(self) -> float:
        return sum(group.seconds for group in self.groups.values())

    def of_kind(self, kind: str) -> list[Skipped]:
        """Of what is left out: ``corrupt``, ``missing`` or ``too long``."""
        return [each for each in self.left_out if each.kind == kind]

    def look(self, config: CorpusConfig, *, decode: bool = False, model: _Model | None = None) -> None:
        """Add every sample of a corpus. Raises :class:`DataError` for one that cannot be opened.

        :param decode: decode sound and films to their ends, instead of reading their headers.
        :param model: tokenizer and configuration of the model that is to learn; without, no text is looked at.
        """
        corpus = open_corpus(config)
        self.left_out += corpus.left_out
        self.remarks.update(dict.fromkeys((f"{corpus.name}: {remark}" for remark in corpus.remarks), 0))
        reader = ExampleReader(*model, ExampleConfig(empty_text=config.text == "none")) if model else None
        look_at = partial(_look_at, decode=decode, reader=reader)
        for item, (seconds, fault) in looked_at(items(corpus), look_at):
            if isinstance(fault, str):
                self.remarks[f"{corpus.name}: training stops: {fault}"] += 1
            elif fault is not None:
                self.left_out.append(fault)
            if isinstance(item, Sample) and not (isinstance(fault, Skipped) and fault.corrupt):
                self._add(corpus.name, config.split, item, seconds)

    def _add(self, corpus: str, split: str, sample: Sample, seconds: float) -> None:
        languages = ">".join(dict.fromkeys((sample.language, sample.target_language)))
        key = (corpus, split, sample.task, languages)
        group = self.groups.setdefault(key, Group(*key))
        group.samples += 1
        group.seconds += seconds
        group.longest = max(group.longest, seconds)
        if sample.speaker is not None:
            group.speakers.add(sample.speaker)
        if sample.audio is not None or sample.video is not None:
            self.histogram[max(edge for edge in EDGES if edge <= seconds)] += 1

    def _remarks(self) -> list[str]:
        return [f"{words} ({count:,} samples)" if count else words for words, count in self.remarks.items()]

    def as_json(self) -> dict[str, Any]:
        """Plain data: everything, with each unusable sample's name."""
        groups = [asdict(group) for group in self.groups.values()]
        rounded = [{"seconds": round(each["seconds"], 3), "speakers": len(each["speakers"])} for each in groups]
        return {
            "samples": self.samples,
            "seconds": round(self.seconds, 3),
            "groups": [each | counted for each, counted in zip(groups, rounded, strict=True)],
            "histogram": [{"from_seconds": edge, "samples": self.histogram[edge]} for edge in EDGES],
            **{kind.replace(" ", "_"): [asdict(each) for each in self.of_kind(kind)] for kind in KINDS},
            "remarks": self._remarks(),
        }

    def __str__(self) -> str:
        parts = [self._table(), self._bars()]
        named = [(kind, list(map(str, self.of_kind(kind)))) for kind in KINDS]
        for title, lines in (*named, ("remarks", self._remarks())):
            if lines:
                more = [f"  … and {len(lines) - NAMED:,} more; --json names all"] if len(lines) > NAMED else []
                parts.append("\n".join([f"{title}: {len(lines):,}", *(f"  {line}" for line in lines[:NAMED]), *more]))
        return "\n\n".join(filter(None, parts))

    def _table(self) -> str:
        from rich import box
        from rich.console import Console
        from rich.table import Table

        bare: dict[str, Any] = {"box": box.SIMPLE_HEAD, "show_edge": False, "pad_edge": False, "padding": (0, 1, 0, 0)}
        table = Table("corpus", "split", "task", "language", **bare)
        for name in ("samples", "hours", "mean s", "longest s", "speakers"):
            table.add_column(name, justify="right")
        for key in sorted(self.groups, key=lambda key: (key[0], key[1], key[3])):
            group = self.groups[key]
            sizes = f"{group.samples:,}", f"{group.seconds / 3600:.2f}", f"{group.seconds / group.samples:.2f}"
            table.add_row(*key, *sizes, f"{group.longest:.2f}", f"{len(group.speakers):,}")
        table.add_row("total", "", "", "", f"{self.samples:,}", f"{self.seconds / 3600:.2f}")
        page = Console(file=io.StringIO(), width=1_000, markup=False, highlight=False, color_system=None)
        with page.capture() as printed:
            page.print(table)
        return "\n".join(line.rstrip() for line in printed.get().splitlines())

    def _bars(self) -> str:
        """The histogram of durations, from the first bar that is not empty to the last."""
        used = [place for place, edge in enumerate(EDGES) if self.histogram[edge]]
        lines = ["seconds   samples"] if used else []
        for place in range(used[0], used[-1] + 1) if used else ():
            name = f"{EDGES[place]}–{EDGES[place + 1]}" if place + 1 < len(EDGES) else f"over {EDGES[place]}"
            count = self.histogram[EDGES[place]]
            bar = "█" * round(_BAR * count / max(self.histogram.values())) or "▏" * min(count, 1)
            lines.append(f"{name:<8} {count:>8,} {bar}".rstrip())
        return "\n".join(lines)


def _look_at(item: Sample | Skipped, decode: bool, reader: ExampleReader | None) -> tuple[float, Skipped | str | None]:
    """Seconds of a sample; why training leaves it out, or what it stops for: something that the model lacks."""
    if isinstance(item, Skipped):
        return math.nan, item
    seconds = math.nan
    try:
        if decode and item.video is not None:
            load_film(item.video, FilmConfig())
        seconds = len(item.audio.read()) / SAMPLE_RATE if decode and item.audio is not None else item.seconds()
        if item.audio is not None and seconds == 0.0:
            raise MediaError(item.audio.name, "it holds no sound")
        if reader is not None:
            reader.measure(item, seconds)
    except (DataError, MediaError) as error:
        return seconds, left_out(item, error)
    except ValueError as error:
        return seconds, str(error).removeprefix(f"{item.id}: ")
    return seconds, None


# The command.


def run(sources: Sequence[str], *, decode: bool, json: bool, model: str | None, **settings: Any) -> int:
    """``whisper-moe data inspect``: prints, and returns the exit status; 1 where something cannot be used, 2 for usage.

    What training stops for is among it where somebody said which model is to learn.

    :param model: that is to learn; default: the one that comes along.
    :param settings: of :class:`CorpusConfig`; None for what was not given, lists with commas.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    given |= {name: listed(given[name]) for name in given.keys() & {"languages", "columns"}}
    try:
        configs = [CorpusConfig(source=source, **given) for source in sources]
    except ValidationError as error:
        return _complain(problems(error), 2)
    try:
        learner = _learner(model)
    except (ValueError, OSError) as error:
        return _complain(f"--model: {error}", 2)
    seen, failed = Inspection(), 0
    if learner is None:
        seen.remarks["no model is at hand (--model): texts were not looked at"] = 0
    for config in configs:
        try:
            seen.look(config, decode=decode, model=learner)
        except (DataError, ImportError, OSError) as error:
            failed += _complain(error)
    if failed < len(configs):
        print(dumps(seen.as_json(), ensure_ascii=False, indent=2) if json else seen)
    if not given.get("limit"):  # of what is listed beyond it, training does not speak
        from whisper_moe.data.loader import CorruptShare

        try:
            CorruptShare(LoaderConfig().max_corrupt_share, seen.samples - len(seen.of_kind("too long")), seen.left_out)
        except DataError as error:
            _complain(f"training stops: {error}")
    return 1 if failed or seen.left_out or (model and seen.remarks.total()) else 0


def _complain(cause: object, status: int = 1) -> int:
    print(f"whisper-moe: {' '.join(str(cause).split())}", file=sys.stderr)
    return status


def named_corpus(source: str, split: str | None = None, **settings: Any) -> CorpusConfig:
    """What a command names, to be evaluated on: its test, where no other ``split`` is asked for. What is not here is streamed."""
    return CorpusConfig(source=source, split=split or "test", streaming=not Path(source).exists(), **settings)


def listed(given: str) -> Any:
    """``path,text`` as a tuple, ``path=clip,text=said`` as a map."""
    parts = [part.strip() for part in given.split(",") if part.strip()]
    return dict(part.split("=", 1) for part in parts) if all("=" in part for part in parts) else tuple(parts)


def _learner(model: str | None) -> _Model | None:
    """Tokenizer and configuration of a model, without its weights if it is one of ours; None where there is no default."""
    from whisper_moe.weights.checkpoint import CONFIG, read_config
    from whisper_moe.weights.files import read_json
    from whisper_moe.weights.load import load_model, resolve
    from whisper_moe.weights.tokens import GENERATION, TOKENIZER

    if model is None and not EMBEDDED.is_dir():
        return None
    located = resolve(model or EMBEDDED)
    if located.kind != "checkpoint":
        loaded = load_model(model)
        return loaded.tokenizer, loaded.config
    tokenizer = Tokenizer.from_file(located.path / TOKENIZER, read_json(located.path / GENERATION))
    return tokenizer, read_config(located.path / CONFIG)
