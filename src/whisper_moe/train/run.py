"""A run from a recipe to a trained checkpoint, in one directory that holds all there is to know about it.

    RUN/run.json            recipe, versions, git state, seeds, parameters, how it ended
    RUN/start/              configuration and tokenizer that the run began with
    RUN/metrics.jsonl       a line for each step and each evaluation
    RUN/skipped.jsonl       a line for each sample that is left out: id, place, kind (corrupt, missing, too long) and cause
    RUN/checkpoints/        what a run goes on from (:mod:`whisper_moe.train.checkpoint`)
    RUN/model/              what it has learned: the best of its checkpoints as a model that commands load

Exit status: 0 finished or stopped early; 1 an error; 2 a recipe or a path that cannot be used; 130 and 143 stopped by
SIGINT and SIGTERM with a checkpoint written: ``--resume`` goes on from it, bit for bit on a CPU.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import chdir, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whisper_moe.machine import take_threads
from whisper_moe.train.reading import RecipeError
from whisper_moe.train.recipe import Recipe
from whisper_moe.train.record import RECORD, asked, check_same, finish_record, write_record

if TYPE_CHECKING:
    from whisper_moe.train.build import InitialModel
    from whisper_moe.train.loop import Trainer
    from whisper_moe.train.parallel import Parallel

MODEL, LOCK = "model", "trainer.lock"
logger = logging.getLogger(__name__)


def train(path: Path, overrides: Sequence[str], output: Path | None, resume: bool) -> int:
    """What ``whisper-moe train`` does; returns the exit status."""
    try:
        recipe, directory, folder = asked(path, overrides, output, resume)
        with chdir(folder):
            return run(recipe, directory, resume=resume)
    except (ValueError, ImportError, OSError) as error:
        if os.environ.get("RANK", "0") == "0" or not isinstance(error, RecipeError):
            print(f"whisper-moe: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, RecipeError) else 1


def run(recipe: Recipe, directory: Path, *, resume: bool = False) -> int:
    """Train in ``directory``; returns the exit status. Raises ``ValueError``, ``ImportError``, ``OSError`` with one sentence.

    A directory that has a run is only used with ``resume``; one that has none is begun in any case, so that a restarted
    job can always say ``resume``.
    """
    from whisper_moe.train.parallel import processes

    begun = (directory / RECORD).exists()
    if not resume and (begun or (directory / "checkpoints").exists()):
        raise RecipeError(f"{directory}: has a run already; --resume goes on with it, -o names another directory")
    if directory.exists() and not directory.is_dir():
        raise RecipeError(f"{directory}: is a file; a run needs a directory")
    with processes(recipe) as parallel, run_lock(directory) if parallel.rank == 0 else nullcontext():
        parallel.barrier()
        if begun:
            check_same(recipe, directory)
        return _run(recipe, directory, parallel)


def _run(recipe: Recipe, directory: Path, parallel: Parallel) -> int:
    """Resume or begin, build, train, export."""
    from whisper_moe.train.build import InitialModel, build_trainer
    from whisper_moe.train.monitor import Monitor

    first = parallel.rank == 0
    _prepare(recipe)
    checkpoint = _to_go_on_from(directory, parallel)
    start = InitialModel.read(directory) if checkpoint else InitialModel.of(recipe)
    if first and not checkpoint:
        start.write(directory)
    with Monitor(directory, recipe, start.config) if first else nullcontext() as monitor:
        trainer = build_trainer(recipe, start, parallel, monitor, directory)
        if checkpoint:
            _go_on(trainer, checkpoint, directory)
        if first:
            write_record(directory, recipe, trainer, parallel, resumed=checkpoint is not None)
        with _signals(trainer):  # until here a signal ends the process as it ends any
            end = trainer.run()
    if first:
        if end != "interrupted":
            export(directory, start)
        finish_record(directory, end, trainer)
        if end != "finished":
            logger.info("%s: %s after step %d", directory, end, trainer.progress.step)
    parallel.barrier()
    told = trainer.signal or signal.SIGTERM  # it may be another process that was
    return 128 + told if end == "interrupted" else 0


@contextmanager
def run_lock(directory: Path) -> Iterator[None]:
    """Hold a run's directory, which is made if need be. The kernel lets go of it with this process, however that ends.

    Raises ``ValueError`` if another trainer has it. On a network file system the lock is worth what the server's locking is.
    """
    from filelock import FileLock, Timeout

    directory.mkdir(parents=True, exist_ok=True)
    lock = FileLock(directory / LOCK, blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"{directory}: another trainer is at work there; wait for it to end, or name another directory"
        ) from None
    except NotImplementedError as error:
        raise OSError(f"{directory}: its file system cannot lock files, which keeps two trainers apart") from error
    try:
        yield
    finally:
        lock.release()


def _prepare(recipe: Recipe) -> None:
    """Threads, and the global generators, which libraries use."""
    import numpy as np
    import torch

    if recipe.run.threads:
        take_threads(recipe.run.threads)
    random.seed(recipe.run.seed)
    np.random.seed(recipe.run.seed)  # noqa: NPY002
    torch.manual_seed(recipe.run.seed)


def _to_go_on_from(directory: Path, parallel: Parallel) -> Path | None:
    """The newest whole checkpoint, as rank 0 finds it; None where the run begins."""
    from whisper_moe.train import checkpoint

    found = None
    if parallel.rank == 0:
        checkpoint.clean(directory)
        found = checkpoint.latest(directory)
    path = parallel.broadcast(str(found or ""))
    return Path(path) if path else None


def _go_on(trainer: Trainer, checkpoint: Path, directory: Path) -> None:
    """More steps can be asked for than before, not fewer than are done."""
    trainer.load(checkpoint)
    done, before, steps = trainer.progress.step, trainer.steps_before, trainer.steps
    if done > steps:
        raise RecipeError(
            f"{directory}: {done:,} steps are done, and {steps:,} are asked for; there can be more, not fewer"
        )
    if before != steps:
        what = f"{steps:,} steps instead of {before:,}; from here on the rate is that of a run of {steps:,}"
        logger.info("%s: %s", directory, what)
    said = f"goes on after step {done}"
    if ended := trainer.ended():
        more = "evaluation.patience or optimisation.steps" if ended == "stopped early" else "optimisation.steps"
        said = f"is finished, nothing is left to train after step {done}; with more {more} it goes on"
    logger.info("%s: %s", directory, said)


@contextmanager
def _signals(trainer: Trainer) -> Iterator[None]:
    """The trainer stops at SIGTERM or SIGINT, the first of them; a second SIGINT interrupts there and then."""

    def note(number: int, _: Any) -> None:
        if trainer.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        trainer.signal = trainer.signal or number

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def export(directory: Path, start: InitialModel) -> None:
    """Write the run's best checkpoint, or its last where none was judged, as a model."""
    from whisper_moe.train import checkpoint
    from whisper_moe.weights.checkpoint import Loaded, save_checkpoint

    path = checkpoint.best(directory) or checkpoint.latest(directory)
    assert path is not None, "a run that has ended has a checkpoint"
    state = {name.removeprefix("model/"): tensor.float() for name, tensor in checkpoint.read(path, "model/").items()}
    model = Loaded(start.config, state, start.generation, start.tokenizer_json)
    save_checkpoint(directory / MODEL, model, overwrite=True)
    logger.info("%s: the model of step %d", directory / MODEL, checkpoint.step_of(path))
