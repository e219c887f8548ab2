"""Losses that are not finite and samples that cannot be read: skipped, counted, named, and too much of it ends the run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("datasets")
from faults.runs import STEPS, at_step, last, materials, meta, same_tensors, sample_ids, steps, train
from media.recordings import encode

from whisper_moe.train.checkpoint import FOLDER, read, step_of


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return materials(tmp_path_factory.mktemp("materials"))


NAN_LOSS = """
import torch
STEP = 0
before(loop.Trainer, "step", lambda self: globals().update(STEP=self.progress.step + 1))
real = losses.SpeechObjective.__call__
def broken(self, *args):
    terms = real(self, *args)
    factor = float("nan") if STEP in {steps} else 1.0
    return losses.Terms(terms.loss * factor, terms.parts, terms.counts)
losses.SpeechObjective.__call__ = broken
"""
INFINITE_GRADIENT = """
import torch
STEP = 0
before(loop.Trainer, "step", lambda self: globals().update(STEP=self.progress.step + 1))
real = losses.SpeechObjective.__call__
def broken(self, model, *args):
    terms = real(self, model, *args)
    if STEP in {steps}:
        terms.loss.register_hook(lambda gradient: gradient * float("inf"))
    return terms
losses.SpeechObjective.__call__ = broken
"""


@pytest.mark.parametrize(
    ("fault", "cause"),
    [(NAN_LOSS, "the loss is nan"), pytest.param(INFINITE_GRADIENT, "the gradient is", marks=pytest.mark.slow)],
)
def test_a_bad_step_is_left_out_and_its_samples_named(fault: str, cause: str, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["run.checkpoint_every=1", "run.keep=99"]
    done = train(recipe, run, *words, fault=fault.format(steps={4, 5, 9}))
    assert done.status == 0, done.stderr
    records = {record["step"]: record for record in steps(run) if "evaluation" not in record}
    assert sorted(records) == list(range(1, STEPS + 1))
    skipped = {step: record for step, record in records.items() if "skipped" in record}
    assert sorted(skipped) == [4, 5, 9]
    for step, record in skipped.items():
        assert record["skipped"].startswith(cause)
        assert record["ids"] == sample_ids(run)[step]
        assert f"WARNING: step {step} is skipped: {cause}" in done.stderr
    paths = {step_of(path): path for path in (run / FOLDER).iterdir()}
    assert same_tensors(paths[3], paths[5]) and same_tensors(paths[8], paths[9]), "weights and moments"
    assert not same_tensors(paths[5], paths[6])
    assert all(tensor.isfinite().all() for tensor in read(last(run)).values() if tensor.is_floating_point())
    assert json.loads((run / "run.json").read_text())["bad_steps"] == 3


def test_too_many_bad_steps_in_a_row_end_the_run(recipe: Path, tmp_path: Path) -> None:
    """The recipe allows three; two, a good one, and two more are none of its business."""
    run = tmp_path / "run"
    done = train(recipe, run, fault=NAN_LOSS.format(steps={1, 2, 4, 5, 7, 8, 9}))
    assert done.status == 1 and "Traceback" not in done.stderr
    assert "step 9: the loss is nan, as in the 2 steps before" in done.stderr
    assert sample_ids(run)[9][0] in done.stderr.splitlines()[-1]
    assert step_of(last(run)) == 6


@pytest.mark.slow
def test_the_count_of_bad_steps_survives_a_kill(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fault = NAN_LOSS.format(steps={4, 5, 6})
    kill = "before(loop.Trainer, '_skip', lambda self, *a: self.progress.step == 5 and die())\n"
    assert train(recipe, run, "run.checkpoint_every=5", fault=fault + kill).status < 0
    assert meta(last(run))["progress"]["bad_in_a_row"] == 2
    done = train(recipe, run, "run.checkpoint_every=5", "--resume", fault=fault)
    assert done.status == 1 and "step 6: the loss is nan, as in the 2 steps before" in done.stderr


def broken(folder: Path, samples: int, numbers: dict[int, str]) -> Path:
    """Materials, some samples of which are no sound or hold what is none."""
    recipe = materials(folder, samples)
    for number, kind in numbers.items():
        path = next(folder.glob(f"{number:02d}.*"))
        if kind == "text":
            path.write_bytes(b"this is no sound" * 50)
        elif kind == "half":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        else:
            sound = np.full((1, 8_000), np.nan, np.float32)
            encode(folder / "nan.wav", sound, 16_000, "pcm_f32le").replace(path)
    return recipe


@pytest.mark.slow
def test_corrupt_samples_are_skipped_counted_and_named(tmp_path: Path) -> None:
    """Two of sixty, which is allowed. One shows when its header is read, the other when it is decoded."""
    recipe = broken(tmp_path / "materials", 60, {10: "text", 20: "nan"})
    run = tmp_path / "run"
    done = train(recipe, run, "optimisation.steps=40")
    assert done.status == 0, done.stderr
    assert "1 samples are left out" in done.stderr and "10.wav" in done.stderr
    skipped = sum(record.get("skipped_samples", 0) for record in steps(run))
    assert skipped == 2, "once in each epoch"
    assert json.loads((run / "run.json").read_text())["skipped_samples"] == 2
    read = {name for ids in sample_ids(run).values() for name in ids}
    assert len(read) == 58 and not any(name.endswith(("10", "20")) for name in read)


def test_too_many_corrupt_samples_end_the_run_before_it_begins(tmp_path: Path) -> None:
    recipe = broken(tmp_path / "materials", 40, {1: "half", 10: "text", 20: "text", 30: "text"})
    done = train(recipe, tmp_path / "run", fault=at_step(1, "die()"))
    assert done.status == 1 and "Traceback" not in done.stderr
    assert "corrupt, more than 5.0%" in done.stderr and "10" in done.stderr
