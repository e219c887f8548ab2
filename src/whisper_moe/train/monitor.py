"""What a run says while it goes: a line of ``metrics.jsonl`` for each step, a bar or lines on stderr.

Only the process of rank 0 has a :class:`Monitor`.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whisper_moe.data.sample import Skipped
from whisper_moe.train.recipe import Recipe
from whisper_moe.weights.files import atomic_file, sync

if TYPE_CHECKING:
    from rich.progress import Progress

METRICS, SKIPPED = "metrics.jsonl", "skipped.jsonl"
SECONDS_BETWEEN_LINES = 10.0
"""Where there is no terminal for a bar."""
logger = logging.getLogger(__name__)


class Monitor(ExitStack):
    """Writes down and shows what happens. ``run``: the run's directory. Use as a context: the bar is closed at its end."""

    def __init__(self, run: Path, recipe: Recipe) -> None:
        super().__init__()
        self._run, self._steps, self._recipe = run, 0, recipe
        self._bar: Progress | None = None
        self._clock = self._spoken = time.perf_counter()
        self._left_out = _whole_lines(run / SKIPPED)

    def begin(self, steps: int, *, after: int = 0, judged: bool = False) -> None:
        """``steps`` are to be made, of which ``after`` are. What a run that was killed wrote of later ones is forgotten; and of
        the evaluation of that step, unless it is ``judged``."""
        self._steps, self._clock, path = steps, time.perf_counter(), self._run / METRICS
        if path.exists():
            kept = [line for line in path.read_bytes().split(b"\n") if _place(line) <= (after, judged)]
            with atomic_file(path) as scratch:
                scratch.write_bytes(b"".join(line + b"\n" for line in kept))
        if sys.stderr.isatty():
            self._bar = self.enter_context(_bar(steps))

    def secure(self) -> None:
        """What has been written down is on the disk when this returns: before the checkpoint that it tells of."""
        for path in (self._run / METRICS, self._run / SKIPPED, self._run):
            if path.exists():
                sync(path)

    def left_out(self, samples: Sequence[Skipped]) -> None:
        """A line for each sample that is not learned or judged, once in the whole run, however often it is met."""
        if new := [line for line in dict.fromkeys(map(_line_of, samples)) if line not in self._left_out]:
            self._left_out.update(new)
            with (self._run / SKIPPED).open("a", encoding="utf-8") as file:
                file.write("".join(f"{line}\n" for line in new))

    def stepped(self, step: int, figures: Mapping[str, Any]) -> None:
        """The figures of a step, to which its seconds are added."""
        now = time.perf_counter()
        figures, self._clock = {**figures, "seconds": now - self._clock}, now
        if step % self._recipe.run.log_every == 0 or step in (1, self._steps):
            self._write({"step": step, **figures})
        self._show(step, now, figures)

    def skipped(self, step: int, cause: str, ids: Sequence[str]) -> None:
        self._write({"step": step, "skipped": cause, "ids": list(ids)})
        logger.warning("WARNING: step %d is skipped: %s; samples %s …", step, cause, ", ".join(ids[:5]))

    def rescaled(self, step: int, scale: float) -> None:
        """A step that float16 had no room for: nothing is updated, and the loss is scaled up less from now on."""
        self._write({"step": step, "overflow": True, "loss_scale": scale})

    def evaluated(self, step: int, metrics: Mapping[str, float], best: bool) -> None:
        self._write({"step": step, "evaluation": dict(metrics), "best": best})
        if unmeasured := ", ".join(name for name, value in metrics.items() if not math.isfinite(value)):
            logger.warning("WARNING: step %d: %s could not be measured, and counts as nothing", step, unmeasured)
        figures = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        logger.info("step %d: %s%s", step, figures, " (the best so far)" if best else "")

    def _show(self, step: int, now: float, figures: Mapping[str, Any]) -> None:
        speed = figures["tokens"] / max(figures["seconds"], 1e-9)
        line = "epoch {epoch}  loss {loss:.4f}  lr {lr:.2e}  {speed:,.0f} tokens/s  fill {fill:.0%}".format(
            speed=speed, **figures
        )
        if load := figures.get("load"):
            most = sorted(load, key=load.__getitem__, reverse=True)[:3]
            line += "  load " + " ".join(f"{name} {load[name]:.0%}" for name in most)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, figures=line)
        elif now - self._spoken >= SECONDS_BETWEEN_LINES or step in (1, self._steps):
            self._spoken = now
            logger.info("step %d/%d  %s", step, self._steps, line)

    def _write(self, record: Mapping[str, Any]) -> None:
        self._clock = time.perf_counter()
        with (self._run / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(_plain(record), ensure_ascii=False) + "\n")


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: they are written as text."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _line_of(sample: Skipped) -> str:
    """As JSON; of a file's name that is not UTF-8, its bytes as ``\\udc80`` and so on."""
    return json.dumps(asdict(sample), ensure_ascii=False).encode("utf-8", "backslashreplace").decode("utf-8")


def _whole_lines(path: Path) -> set[str]:
    """The lines of a file to append to; one that a kill cut off is taken out of it."""
    if not path.exists():
        return set()
    whole, _, torn = path.read_bytes().rpartition(b"\n")
    if torn:
        with atomic_file(path) as scratch:
            scratch.write_bytes(whole + b"\n" if whole else b"")
    return set(whole.decode("utf-8").split("\n"))


def _place(line: bytes) -> tuple[float, bool]:
    """Its step, and whether it is of the evaluation behind it; of a line that was cut off, after all others."""
    try:
        record = json.loads(line)
        return record["step"], "evaluation" in record
    except (ValueError, KeyError, TypeError):
        return math.inf, True


def _bar(steps: int) -> Progress:
    """Lines that are said meanwhile go above it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(20), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), redirect_stdout=False)
    bar.add_task("", total=steps, figures="")
    return bar
