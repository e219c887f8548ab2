"""What ``compare.py`` has the systems do: write down every clip once, and be timed side by side."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from figures import Sets

from whisper_moe import WhisperMoE
from whisper_moe.data.inspect import named_corpus
from whisper_moe.evaluate.measure import Adapter, Clip, Heard, System, hear_all, ours
from whisper_moe.evaluate.run import gather, shown
from whisper_moe.generate.decode import WindowDecoder
from whisper_moe.generate.options import TEMPERATURES, TranscribeOptions
from whisper_moe.machine import peak_bytes
from whisper_moe.weights.checkpoint import MANIFEST
from whisper_moe.weights.files import atomic_file

logger = logging.getLogger("compare")
THE_CLIPS = "the clip's"
KEY_LETTERS = 12
COLUMNS = ("clip", "language", "experts", "fallbacks", "error", "reference", "text")


class Model(NamedTuple):
    """What decodes, and what it is told."""

    name: str
    source: str
    language: str | None
    fallback: bool = True
    margin: float | None = None

    @property
    def path(self) -> Path:
        return Path(System("ours", self.source).weights())

    def key(self, clips: Sequence[Clip] = ()) -> str:
        """Of all that its transcripts follow from."""
        files = sorted(self.path.iterdir()) if self.path.is_dir() else [self.path]
        state: Any = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        if (manifest := self.path / MANIFEST).exists():
            state = manifest.read_bytes()
        sounds = [(clip.sample.id, clip.sample.audio and clip.sample.audio.fingerprint()) for clip in clips]
        told = [[clip.sample.language for clip in clips]] if self.language == THE_CLIPS else []
        return digest((state, sounds, *self[2:], *told))

    def load(self) -> Adapter:
        model = WhisperMoE.from_pretrained(System("ours", self.source).source, threads=1)
        return ours(model, beam=1, temperatures=TEMPERATURES if self.fallback else (0.0,), margin=self.margin)

    def hear(self, adapter: Adapter, clips: Sequence[Clip]) -> list[Heard]:
        if self.language not in (None, THE_CLIPS):
            clips = [replace(clip, sample=replace(clip.sample, language=self.language)) for clip in clips]
        return hear_all(adapter, clips, self.language is None)[0]


def digest(facts: Any) -> str:
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:KEY_LETTERS]


def sample(table: str, limit: int | None) -> list[Clip]:
    """The first clips of a table in the order of the hashes of what is said and of the file's name: an even sample."""

    def place(clip: Clip) -> str:
        return digest((clip.sample.text, Path(clip.sample.audio.name).name if clip.sample.audio else clip.sample.id))

    clips, broken = gather([named_corpus(table)])
    for name, cause in broken:
        logger.warning("%s: %s is left out: %s", table, name, cause)
    return sorted(clips, key=place)[:limit]


def stem(place: str) -> str:
    """What the files of a set are called."""
    return place.replace(":", "-")


def heard_by(model: Model, sets: Sets, out: Path, apart: Callable[..., Any]) -> dict[str, list[Heard]]:
    """What it wrote of every set; one process decodes those that are not there yet."""
    folder = out / "transcripts" / model.name
    files = {name: folder / f"{stem(name)}.{model.key(clips)}.tsv" for name, clips in sets.items()}
    if missing := {file: sets[name] for name, file in files.items() if not file.exists()}:
        logger.info("%s: decoding %d clips", model.name, sum(map(len, missing.values())))
        apart(decode, model, missing, threads=1)
    return {name: read(file) for name, file in files.items()}


def decode(model: Model, jobs: Mapping[Path, list[Clip]]) -> None:
    """Write each file as soon as its clips are heard, in the place of older ones of that set."""
    adapter = model.load()
    for file, clips in jobs.items():
        rows: list[tuple[str, ...]] = [COLUMNS]
        for clip, heard in zip(clips, model.hear(adapter, clips), strict=True):
            gates = " ".join(f"{name}={gate:.4f}" for name, gate in heard.experts)
            said = (heard.language or "", gates, str(heard.fallbacks), heard.error or "", clip.sample.text, heard.text)
            rows.append((shown(clip.sample.audio.name) if clip.sample.audio else clip.sample.id, *said))
        file.parent.mkdir(parents=True, exist_ok=True)
        for old in file.parent.glob(f"{file.name.rsplit('.', 2)[0]}.{'?' * KEY_LETTERS}.tsv"):
            old.unlink()
        with atomic_file(file) as fresh:
            lines = ("\t".join(" ".join(cell.split()) for cell in row) + "\n" for row in rows)
            fresh.write_text("".join(lines), encoding="utf-8")


def read(file: Path) -> list[Heard]:
    heard = []
    with open(file, encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE):
            gates = [each.rpartition("=") for each in row["experts"].split()]
            experts = tuple((name, float(gate)) for name, _, gate in gates)
            more = {"error": row["error"] or None, "language": row["language"] or None}
            heard.append(Heard(row["text"], None, experts, int(row["fallbacks"]), **more))
    return heard


class Job(NamedTuple):
    """What is timed: models that are in memory together, and which of them answers each clip."""

    crew: Mapping[str, Model]
    chosen: Sequence[str]
    clips: Sequence[Clip]
    detect: bool = False
    """Whether the base first tells the language of what another answers; of its own clips it hears it anyway."""


def timed(job: Job) -> dict[str, Any]:
    loaded = {name: model.load() for name, model in job.crew.items()}
    for name in dict.fromkeys(job.chosen):  # each warm, as the only model of another system is
        job.crew[name].hear(loaded[name], job.clips[:1])
    wall, cpu = time.perf_counter(), time.process_time()
    if job.detect:
        base = loaded["base"].model
        decoder = WindowDecoder(base.model, base.tokenizer, base.generation)
        for clip in (clip for clip, name in zip(job.clips, job.chosen, strict=True) if name != "base"):
            decoder.detect_language(clip.sound, TranscribeOptions(), base.context_margin)
    for name in dict.fromkeys(job.chosen):
        own = [clip for clip, other in zip(job.clips, job.chosen, strict=True) if other == name]
        job.crew[name].hear(loaded[name], own)
    return {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall, "peak_bytes": peak_bytes()}


def costs(jobs: Mapping[str, Job], rounds: int, file: Path, apart: Callable[..., Any]) -> dict[str, Any]:
    """The least of some rounds, in which the systems take turns: all measured anew where one has changed."""
    key = digest(
        [(name, [x.key(job.clips) for x in job.crew.values()], job.chosen, rounds) for name, job in jobs.items()]
    )
    if not file.exists() or json.loads(file.read_text())["key"] != key:
        logger.info("speed and memory of %d systems", len(jobs))
        runs = [{name: apart(timed, job, threads=1) for name, job in jobs.items()} for _ in range(rounds)]
        file.write_text(json.dumps({"key": key, "rounds": runs}, indent=1) + "\n")
    runs = json.loads(file.read_text())["rounds"]
    return {name: {what: min(run[name][what] for run in runs) for what in runs[0][name]} for name in jobs}
