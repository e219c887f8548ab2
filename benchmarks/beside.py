"""``whisper-moe evaluate`` with peers beside the model: the same report, on any corpus and in any language it can be on.

``python benchmarks/beside.py MODEL DATA… --peers faster-whisper-int8,transformers -o report``. The peers are those of
:mod:`peers` but whisper.cpp, which is told a language before it hears a clip; all read the weights of ``--weights``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from peers import Job, System, systems, unshare_cores, weights_of

from whisper_moe.evaluate import measure as evaluated
from whisper_moe.evaluate.measure import Clip, Measured, Options, measure, take_times
from whisper_moe.machine import usable_cores


class Peer(evaluated.System):
    """A system of the benchmark, as the evaluation knows them: its kind is what it is called there, its name its weights."""

    @property
    def system(self) -> System:
        return systems(self.name)[self.kind]

    @property
    def packages(self) -> tuple[str, ...]:
        return self.system.packages


def measure_peer(peer: Peer, weights: str, clips: Sequence[Clip], asked: Options) -> Measured:
    """Everything about one peer, in this process."""
    unshare_cores()
    job = Job(
        system=peer.kind,
        clips=(),
        long=False,
        model=peer.name,
        weights=weights,
        threads=asked.threads,
        beam=asked.beam,
        fallback=asked.fallback,
    )
    measured = take_times(lambda: peer.system.make(job), weights, clips, asked)[1]
    return replace(measured, dtype="int8" if "int8" in peer.kind else "float32")


def measure_apart(
    cache: Path, system: evaluated.System, clips: Sequence[Clip], asked: Options, load: Callable[..., Any]
) -> Measured:
    """One system in a process of its own."""
    if not isinstance(system, Peer):
        return evaluated.apart(measure, system, system.weights(), clips, asked, load, threads=asked.threads)
    weights = weights_of(system.system.form, system.name, cache)
    return evaluated.apart(measure_peer, system, weights, clips, asked, threads=asked.threads)


def load(model: str | None, **options: Any) -> Any:
    """``WhisperMoE.from_pretrained``, imported where it is called: torch is in no peer's process that does not need it."""
    from whisper_moe import WhisperMoE

    return WhisperMoE.from_pretrained(model, **options)


def chosen(names: str, weights: str) -> tuple[Peer, ...]:
    """The peers of these names. Raises ``ValueError`` for one that cannot run here."""
    table = {name: each for name, each in systems(weights).items() if not name.startswith(("ours", "whisper.cpp"))}
    peers = tuple(Peer(name, weights) for name in names.split(","))
    for peer in peers:
        if peer.kind not in table:
            raise ValueError(f"unknown peer {peer.kind}; known are {', '.join(table)}")
        if reason := replace(peer.system, needs_ffmpeg=False).missing():  # it is given samples
            raise ValueError(f"{peer.kind}: {reason}")
    return peers


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Evaluate a model on corpora with peers beside it.")
    add = parser.add_argument
    add("model", help="a whisper-moe folder, any Whisper, or default")
    add("data", nargs="+", help="as those of whisper-moe evaluate")
    add("--peers", default="faster-whisper-int8", help="comma-separated names")
    add("--weights", default="openai/whisper-base", help="Hub id or folder of the Whisper that all peers read")
    add("--compare", action="append", default=[], help="another model, or transcripts:FILE.tsv")
    add("-o", "--output", type=Path, help="folder of the report; without, tables are printed")
    add("--split")
    add("--columns")
    add("--task")
    add("--languages", type=lambda names: tuple(names.split(",")), default=())
    add("--limit", type=int)
    add("--dtype", default="auto", help="of this project's models")
    add("--threads", type=int, default=usable_cores())
    add("--beam", type=int, default=1)
    add("--fallback", action=argparse.BooleanOptionalAction, default=True)
    add("--margin", type=float)
    add("--detect", action="store_true", help="let the systems detect the language")
    add("--latency-clips", type=int, default=40)
    add("--cache", type=Path, default=Path(tempfile.gettempdir()) / "whisper-moe-benchmark")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    from whisper_moe.evaluate import run  # what it scores with is in no process that is measured

    given = vars(parse(argv))
    cache = given.pop("cache")
    try:
        peers = chosen(given.pop("peers"), given.pop("weights"))
        asked = run.plan(**given)
        asked = replace(asked, systems=asked.systems + peers)
        return run.evaluate(asked, load, measure=lambda *each: measure_apart(cache, *each))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
