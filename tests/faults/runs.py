"""Miniature training runs through the real command, in a process of their own, with faults that strike at a chosen moment.

A fault is a few lines of Python that run in that process before the command does. Whatever the fault, the process also
writes down which samples each step was made of.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from generate.tiny import tiny_whisper_moe
from media.recordings import encode, tone

from whisper_moe.train import checkpoint

ROOT = Path(__file__).parent.parent.parent
SAMPLES, BATCH, STEPS, CHECKPOINT_EVERY = 10, 3, 12, 5
"""Four batches an epoch, so that the checkpoints of steps 5 and 10 are in the middle of one."""

_PRELUDE = """
import json, os, signal, sys
from pathlib import Path
from whisper_moe.evaluate import metrics
from whisper_moe.train import checkpoint, loop, losses, monitor, run

FOLDER = Path(sys.argv[sys.argv.index("-o") + 1])
ATTEMPT = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
RANK = int(os.environ.get("RANK", 0))

def before(owner, name, act):
    # act is called with the arguments of owner.name, and then owner.name
    real = getattr(owner, name)
    def both(*args, **kwargs):
        act(*args, **kwargs)
        return real(*args, **kwargs)
    setattr(owner, name, both)

def die(number=signal.SIGKILL):
    os.kill(os.getpid(), number)

def AT_10():
    # whether the checkpoint of step 10 is being saved
    return any(frame.f_locals.get("step") == 10 for frame in stack() if frame.f_code.co_name == "save")

def stack(frame=None):
    frame = frame or sys._getframe()
    while frame := frame.f_back:
        yield frame

def note(trainer, batch, totals, last):
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / f"samples-{RANK}.jsonl", "a") as file:
        file.write(json.dumps({"step": trainer.progress.step + 1, "ids": list(batch.ids)}) + "\\n")

before(loop.Trainer, "_pass", note)
"""
_COMMAND = """
from whisper_moe.__main__ import run as command
command()
"""


def at_step(step: int, act: str) -> str:
    """A fault: do this once this step has been reported, and before anything is kept of it."""
    return f"before(monitor.Monitor, 'stepped', lambda self, step, figures: step == {step} and {act})"


@dataclass(frozen=True)
class Done:
    status: int
    """Negative: the signal that ended it."""
    stderr: str


def materials(folder: Path, samples: int = SAMPLES) -> Path:
    """A tiny model, tones of 0.3 to 1.2 s as m4a and WAV, and a recipe; returns the recipe."""
    tiny_whisper_moe().save_pretrained(folder / "tiny")
    rows = ["path\ttext"]
    for i in range(samples):
        name, codec = (f"{i:02d}.m4a", "aac") if i % 2 else (f"{i:02d}.wav", "pcm_s16le")
        encode(folder / name, tone(0.3 + 0.9 * i / samples, 16_000, hz=200 + 50 * i), 16_000, codec)
        rows.append(f"{name}\ttone number {i}")
    (folder / "tones.tsv").write_text("\n".join(rows) + "\n", "utf-8")
    corpus = {"kind": "table", "source": str(folder / "tones.tsv"), "languages": ["en"]}
    recipe = {
        "model": {"source": str(folder / "tiny")},
        "data": {
            "train": [corpus],
            "evaluation": [corpus | {"limit": 3}],
            "loader": {"batch_size": BATCH, "planning_buffer": 8, "examples": {"margin": [0.1, 0.5]}},
        },
        "optimisation": {"steps": STEPS, "lr": 0.003, "ttt_lr": 0.003, "warmup": 2, "most_bad_steps": 3},
        "evaluation": {"every": 6, "metric": "loss", "batch_size": 1},
        "run": {"checkpoint_every": CHECKPOINT_EVERY, "keep": 2, "threads": 1, "device": "cpu"},
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe, indent=2), "utf-8")
    return path


def train(
    recipe: Path,
    run: Path,
    *words: str,
    fault: str = "",
    launcher: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Done:
    """``whisper-moe train`` with a fault. ``launcher``: what starts it in place of Python (torchrun and its flags)."""
    script = run.parent / f"{run.name}.py"
    script.write_text(_PRELUDE + fault + _COMMAND, "utf-8")
    known = {
        name: value for name, value in os.environ.items() if not name.startswith(("TORCHELASTIC", "RANK", "WORLD"))
    }
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [*(launcher or [sys.executable]), str(script), "train", str(recipe), *words, "-o", str(run)],
        env=known | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    return Done(done.returncode, done.stderr)


# What a run has left


def steps(run: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``, without how long each took."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


def sample_ids(run: Path, rank: int = 0) -> dict[int, list[str]]:
    """Step → its samples. What was done twice, before a fault and after it, must have been the same."""
    ids: dict[int, list[str]] = {}
    for line in (run / f"samples-{rank}.jsonl").read_text("utf-8").splitlines():
        record = json.loads(line)
        assert ids.setdefault(record["step"], record["ids"]) == record["ids"], record["step"]
    return ids


@contextmanager
def undamaged() -> Iterator[None]:
    """Nothing may be said of a damaged checkpoint."""

    def said(record: logging.LogRecord) -> bool:
        raise AssertionError(record.getMessage())

    checkpoint.logger.addFilter(said)
    try:
        yield
    finally:
        checkpoint.logger.removeFilter(said)


def last(run: Path) -> Path:
    """The newest checkpoint, in which nothing may be damaged."""
    with undamaged():
        path = checkpoint.latest(run)
    assert path is not None
    return path


def meta(path: Path) -> dict[str, Any]:
    """All of a checkpoint but its tensors."""
    return json.loads((path / checkpoint.STATE).read_text())


def same_tensors(a: Path, b: Path) -> bool:
    """Whether two checkpoints are of equal weights and moments."""
    ours, theirs = checkpoint.read(a), checkpoint.read(b)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def assert_same_run(run: Path, undisturbed: Path) -> None:
    """Losses, samples, weights, optimizer and exported model are equal, bit for bit."""
    assert steps(run) == steps(undisturbed)
    assert sample_ids(run) == sample_ids(undisturbed)
    ours, theirs = last(run), last(undisturbed)
    assert same_tensors(ours, theirs)
    found, expected = meta(ours), meta(theirs)
    assert {key: value for key, value in found.items() if value != expected.get(key)} == {}
    names = sorted(path.name for path in (undisturbed / "model").rglob("*.safetensors"))
    assert names and names == sorted(path.name for path in (run / "model").rglob("*.safetensors"))
    for path in (undisturbed / "model").rglob("*.safetensors"):
        assert (run / "model" / path.relative_to(undisturbed / "model")).read_bytes() == path.read_bytes()
