"""The figures of runs for TensorBoard: ``metrics.jsonl`` as event files in ``RUN/tensorboard``, which are written anew each time.

    python recipes/board.py RUN [RUN …] && tensorboard --logdir runs

Of a run that goes on meanwhile too, as far as it is. Needs ``pip install tensorboard``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from whisper_moe.train.monitor import METRICS


def write(run: Path) -> Path:
    """The folder of a run's events."""
    folder = run / "tensorboard"
    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    with SummaryWriter(str(folder)) as board, (run / METRICS).open(encoding="utf-8") as lines:
        for record in map(json.loads, lines):
            for name, value in figures(record):
                board.add_scalar(name, value, record["step"])
    return folder


def figures(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Of a step or an evaluation; a step that was skipped has none."""
    if "evaluation" in record:
        yield from _named("evaluation", record["evaluation"])
    elif "loss" in record:
        yield from _named("train", {name: value for name, value in record.items() if name != "step"})


def _named(group: str, found: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in found.items():
        if isinstance(value, Mapping):
            yield from _named(f"{group}/{name}", value)
        else:
            yield f"{group}/{name}", float(value)  # NaN is written as text


if __name__ == "__main__":
    for run in map(Path, sys.argv[1:]):
        print(write(run))
