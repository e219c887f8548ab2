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

import os
import random
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whisper_moe.train.reading import RecipeError
from whisper_moe.train.recipe import Recipe
from whisper_moe.train.record import RECORD, asked, check_same, finish_record, write_record

if TYPE_CHECKING:
    from whisper_moe.train.build import InitialModel
    from whisper_moe.train.loop import Trainer
    from whisper_moe.train.parallel import Parallel

MODEL, LOCK = "model", "trainer.lock"


def train(path: Path, overrides: Sequence[str], output: Path | None, resume: bool) -> int:
    """What ``whisper-moe train`` does; returns the exit status."""
    try:
        recipe, directory, folder = asked(path, overrides, output, resume)
        with chdir(folder):
            return run(recipe, directory, resume=resume)
    except (ValueError, ImportError, OSError) as error:
        if os.environ.get("RANK", "0") == "0" or not isinstance(error, RecipeError):
            say(f"whisper-moe: {' '.join(str(error).split())}")
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
    if recipe.run.checkpoint == "sharded" and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        raise RecipeError("run.checkpoint is sharded, which is for several processes; for one it is whole")
    with processes(recipe) as parallel, run_lock(directory) if parallel.rank == 0 else nullcontext():
        parallel.barrier()
        if begun:
            check_same(recipe, directory)
        return _run(recipe, directory, parallel)


def _run(recipe: Recipe, directory: Path, parallel: Parallel) -> int:
    from whisper_moe.train import checkpoint
    from whisper_moe.train.build import build_trainer
    from whisper_moe.train.monitor import Monitor

    first = parallel.rank == 0
    announce = say if first else _silent
    if first:
        checkpoint.clean(directory)
    _seed(recipe)
    if recipe.run.threads:
        import torch

        torch.set_num_threads(recipe.run.threads)
    found = checkpoint.latest(directory, announce=announce) if first else None
    found_path = parallel.broadcast(str(found or ""))
    start = _start(recipe, directory, parallel, goes_on=found_path != "")
    with Monitor(directory, recipe, start.config) if first else nullcontext() as monitor:
        trainer = build_trainer(recipe, start, parallel, monitor, directory)
        if found_path:
            _go_on(trainer, Path(found_path), directory, announce)
        if first:
            write_record(directory, recipe, trainer, parallel, resumed=bool(found_path))
        with _signals(trainer):  # until here a signal ends the process as it ends any
            end = trainer.run()
    if first:
        if end != "interrupted":
            export(directory, start, announce)
        finish_record(directory, end, trainer)
        if end != "finished":
            announce(f"{directory}: {end} after step {trainer.progress.step}")
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
    try:
        yield
    finally:
        lock.release()


# What a run is made of


def _start(recipe: Recipe, directory: Path, parallel: Parallel, *, goes_on: bool) -> InitialModel:
    """From the run's folder where a checkpoint will give the weights, else from the source."""
    from whisper_moe.train.build import InitialModel

    if goes_on:
        return InitialModel.read(directory)
    start = InitialModel.of(recipe)
    if parallel.rank == 0:
        start.write(directory)
    parallel.barrier()
    return start


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


# What is kept


def _go_on(trainer: Trainer, path: Path, directory: Path, announce: Callable[[str], None]) -> None:
    """From a checkpoint, whichever way it was saved. More steps can be asked for than before, not fewer than are done."""
    from whisper_moe.train import checkpoint

    evaluation = {"evaluation": checkpoint.read_commit(path).evaluation}
    if checkpoint.is_sharded(path):
        from whisper_moe.train.sharded import load_sharded

        trainer.load_meta(load_sharded(path, trainer.model, trainer.optimizer) | evaluation)
    else:
        loaded = checkpoint.load(path)
        trainer.load_state(loaded.tensors, loaded.meta | evaluation)
    done, before, steps = trainer.progress.step, trainer.steps_before, trainer.steps
    if done > steps:
        raise RecipeError(
            f"{directory}: {done:,} steps are done, and {steps:,} are asked for; there can be more, not fewer"
        )
    if before != steps:
        announce(
            f"{directory}: {steps:,} steps instead of {before:,}; from here on the rate is that of a run of {steps:,}"
        )
    said = f"goes on after step {done}"
    if ended := trainer.ended():
        more = "evaluation.patience or optimisation.steps" if ended == "stopped early" else "optimisation.steps"
        said = f"is finished, nothing is left to train after step {done}; with more {more} it goes on"
    announce(f"{directory}: {said}")


def export(directory: Path, start: InitialModel, announce: Callable[[str], None]) -> Path:
    """Write the run's best checkpoint, or its last where none was judged, as a model; returns its folder."""
    from whisper_moe.train import checkpoint
    from whisper_moe.weights.checkpoint import save_checkpoint

    path = checkpoint.best(directory, announce=announce) or checkpoint.latest(directory, announce=announce)
    if path is None:
        raise ValueError(f"{directory}: has no checkpoint to make a model of")
    if checkpoint.is_sharded(path):
        from whisper_moe.train.sharded import whole_model

        state = whole_model(path)
    else:
        loaded = checkpoint.load(path, ["model"])
        state = {name.removeprefix("model/"): tensor for name, tensor in loaded.tensors.items()}
    save_checkpoint(
        directory / MODEL, start.config, {name: tensor.float() for name, tensor in state.items()}, generation=start.generation,
        tokenizer_json=start.tokenizer_json, overwrite=True,
    )  # fmt: skip
    announce(f"{directory / MODEL}: the model of step {checkpoint.step_of(path)}")
    return directory / MODEL


def _seed(recipe: Recipe) -> None:
    import numpy as np
    import torch

    random.seed(recipe.run.seed)
    np.random.seed(recipe.run.seed)  # noqa: NPY002 (the global one, which libraries use)
    torch.manual_seed(recipe.run.seed)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _silent(_: str) -> None:
    pass
