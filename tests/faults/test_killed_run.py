"""A run that is killed, stopped or started twice: it goes on as if nothing had happened, bit for bit."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from pathlib import Path

import pytest

pytest.importorskip("datasets")
from faults.runs import BATCH, SAMPLES, STEPS, assert_same_run, at_step, last, materials, sample_ids, steps, train

from whisper_moe.train.checkpoint import FOLDER, step_of
from whisper_moe.train.run import run_lock


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return materials(tmp_path_factory.mktemp("materials"))


@pytest.fixture(scope="module")
def undisturbed(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    done = train(recipe, run)
    assert done.status == 0, done.stderr
    return run


def test_the_undisturbed_run_is_worth_comparing_with(undisturbed: Path) -> None:
    """It learns, every step is of other samples, and its checkpoints are in the middle of an epoch."""
    losses = [record["loss"] for record in steps(undisturbed) if "loss" in record]
    assert len(losses) == STEPS and losses[-1] < losses[0]
    ids = sample_ids(undisturbed)
    epoch = -(-SAMPLES // BATCH)
    first, second = ([name for step in range(a + 1, a + epoch + 1) for name in ids[step]] for a in (0, epoch))
    assert sorted(first) == sorted(second) and first != second and len(set(first)) == SAMPLES
    assert step_of(last(undisturbed)) == STEPS and 5 % epoch and 10 % epoch
    record = json.loads((undisturbed / "run.json").read_text())
    assert record["status"] == "finished" and record["bad_steps"] == record["skipped_samples"] == 0


KILLED = "before(checkpoint, '{name}', lambda *a, **k: {condition} and die())"
LAST = f"(FOLDER / 'checkpoints/0004-step-{STEPS:08d}').exists()"
JUDGING = f"before(metrics.Evaluator, 'figures', lambda *a, **k: {LAST} and {{act}})"
"""Of the last evaluation: there is a checkpoint of the last step."""
FAULTS = {
    "in the middle of an epoch": at_step(8, "die()"),
    "before the first checkpoint": at_step(3, "die()"),
    "before a checkpoint's parts": KILLED.format(name="save_parts", condition="AT_10()"),
    "between two files of a checkpoint": "before(checkpoint.FileFacts, 'of', lambda *a: AT_10() and die())",
    "before a checkpoint's commit": KILLED.format(name="_mark", condition="a[1].step == 10"),
    "before old checkpoints go": KILLED.format(name="_prune", condition="len(list(a[0].glob('checkpoints/*'))) == 3"),
    "before anything is written": "before(run, 'write_record', lambda *a, **k: die())",
    "inside an evaluation": "before(metrics, 'pack_examples', lambda *a: die())",
    "inside the last evaluation": JUDGING.format(act="die()"),
    "before an evaluation is noted": "before(checkpoint, 'note', lambda *a, **k: die())",
    "before a checkpoint is judged": KILLED.format(name="_mark", condition="a[1].evaluation"),
    "when all is done but the model": "before(run, 'export', lambda *a, **k: die())",
    "before the end is noted": "before(run, 'finish_record', lambda *a, **k: die())",
}
NOTED = """
def note_pass(name):
    with open(FOLDER / name, "a") as file:
        file.write("1")
"""
QUICK = ("in the middle of an epoch", "inside an evaluation")


@pytest.mark.parametrize("moment", [m if m in QUICK else pytest.param(m, marks=pytest.mark.slow) for m in FAULTS])
def test_a_killed_run_goes_on_bit_for_bit(moment: str, recipe: Path, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(recipe, run, "--resume", fault=FAULTS[moment]).status == -signal.SIGKILL
    done = train(recipe, run, "--resume")
    assert done.status == 0, done.stderr
    assert_same_run(run, undisturbed)
    assert [*(run / FOLDER).glob("[.]*")] == []


def test_an_evaluation_that_is_longer_than_any_session_costs_no_step(
    recipe: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """Killed in it again and again, then stopped in it by a signal; then it has its time."""
    run, words = tmp_path / "run", ["--resume"]
    for _ in range(2):
        assert train(recipe, run, *words, fault=FAULTS["inside an evaluation"]).status == -signal.SIGKILL
        assert step_of(last(run)) == 6 and not any("evaluation" in line for line in steps(run))
    stopped = FAULTS["inside an evaluation"].replace("die()", f"(note_pass('evaluation'), die({int(signal.SIGTERM)}))")
    done = train(recipe, run, *words, fault=NOTED + stopped)
    assert done.status == 128 + signal.SIGTERM and "interrupted after step 6" in done.stderr
    assert (run / "evaluation").read_text() == "1", "a batch, of three"
    assert json.loads((run / "run.json").read_text())["status"] == "interrupted" and not (run / "model").exists()
    assert train(recipe, run, *words).status == 0
    assert_same_run(run, undisturbed)
    assert len((run / "samples-0.jsonl").read_text().splitlines()) == STEPS, "no step was made twice"
    assert [line["step"] for line in steps(run) if "evaluation" in line] == [6, STEPS]


@pytest.mark.slow
def test_a_run_that_is_killed_at_every_third_step(recipe: Path, undisturbed: Path, tmp_path: Path) -> None:
    """With a checkpoint for each step; and with worker processes, which change nothing."""
    run = tmp_path / "run"
    words = ["--resume", "run.checkpoint_every=1", "data.loader.workers=2"]
    for step in range(3, STEPS, 3):
        assert train(recipe, run, *words, fault=at_step(step, "die()")).status == -signal.SIGKILL
        assert step_of(last(run)) == step - 1
    assert train(recipe, run, *words).status == 0
    assert_same_run(run, undisturbed)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_ends_with_a_checkpoint_and_its_own_status(
    number: signal.Signals, recipe: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    done = train(recipe, run, fault=at_step(8, f"die({int(number)})"))
    assert done.status == 128 + number, done.stderr
    assert "interrupted after step 8" in done.stderr and step_of(last(run)) == 8
    assert json.loads((run / "run.json").read_text())["status"] == "interrupted"
    assert not (run / "model").exists()
    done = train(recipe, run, "--resume")
    assert done.status == 0
    assert_same_run(run, undisturbed)


@pytest.mark.slow
def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(
    recipe: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert train(recipe, run, fault=at_step(11, "die()")).status == -signal.SIGKILL
    path = next(last(run).glob("shard-*"))
    path.write_bytes(path.read_bytes()[:-1])
    done = train(recipe, run, "--resume")
    assert done.status == 0
    assert "WARNING: a damaged checkpoint is passed over for 0002-step-00000006" in done.stderr
    assert_same_run(run, undisturbed)


def test_two_trainers_and_one_directory(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with run_lock(run):
        done = train(recipe, run)
    assert done.status == 1
    assert f"{run}: another trainer is at work there; wait" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in run.iterdir()] == ["trainer.lock"]


@pytest.mark.slow
def test_a_full_disk_ends_the_run_with_a_sentence(recipe: Path, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    full = """
import errno
def full(*_):
    if AT_10():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
before(checkpoint.FileFacts, "of", full)
"""
    done = train(recipe, run, fault=full)
    assert done.status == 1 and "Traceback" not in done.stderr
    assert "the checkpoint of step 10 could not be written (No space left on device)" in done.stderr
    assert step_of(last(run)) == 6
    assert train(recipe, run, "--resume").status == 0
    assert_same_run(run, undisturbed)


# Several processes

TORCHRUN = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--nproc-per-node",
    "2",
    "--standalone",
    "--max-restarts",
    "1",
]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_under_torchrun(rank: int, recipe: Path, tmp_path: Path) -> None:
    """The processes are started anew and go on from the last checkpoint to the weights of an undisturbed run."""
    undisturbed, run = tmp_path / "undisturbed", tmp_path / "run"
    assert train(recipe, undisturbed, "--resume", launcher=TORCHRUN).status == 0
    fault = (
        f"before(loop.Trainer, '_update', lambda t, *a: (RANK, ATTEMPT, t.progress.step) == ({rank}, 0, 7) and die())"
    )
    done = train(recipe, run, "--resume", launcher=TORCHRUN, fault=fault)
    assert done.status == 0, done.stderr
    assert "goes on after step 6" in done.stderr
    assert_same_run(run, undisturbed)
    assert sample_ids(run, 1) == sample_ids(undisturbed, 1)
    both = {step: set(ids) & set(sample_ids(run, 1)[step]) for step, ids in sample_ids(run).items()}
    assert not any(both.values()), "each process has samples of its own"
    shutil.rmtree(run)
