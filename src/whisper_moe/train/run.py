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

import argparse
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import chdir, contextmanager, nullcontext, suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whisper_moe.machine import take_threads, versions
from whisper_moe.train.reading import RecipeError, apply, checked
from whisper_moe.train.recipe import LoRARecipe, Recipe, load_recipe
from whisper_moe.weights.files import atomic_file, json_bytes, read_json

if TYPE_CHECKING:
    from whisper_moe.train.loop import Trainer
    from whisper_moe.train.parallel import Parallel
    from whisper_moe.weights.checkpoint import Loaded

MODEL, LOCK, RECORD = "model", "trainer.lock", "run.json"
_PACKAGES = ("whisper-moe", "torch", "numpy", "datasets", "tokenizers", "safetensors", "av", "pydantic")
_FREE = (
    *("run", "name", "parallel"),
    *(f"evaluation.{name}" for name in ("every", "batch_size", "padded", "patience")),
    *(f"data.loader.{name}" for name in ("workers", "prefetch")),
    *(f"optimisation.{name}" for name in ("steps", "epochs", "recompute")),
)
"""Parts of a recipe that may differ where a run goes on: they change neither what is learned from nor what the best checkpoint
is. Of steps and epochs there cannot be fewer than are done; :func:`_go_on` sees to that."""
_CORPUS = {"directions": (["en>any", "any>en"],), "include_50": (False,), "videos": (None,)}
_GONE = {
    "data.loader.mixing": ({"temperature": 1.0, "weights": {}},),
    "data.loader.mode": ("packed",),
    **{f"data.{part}.{key}": values for part in ("train", "evaluation") for key, values in _CORPUS.items()},
    "losses.bias_rate": (0.001,),
    "parallel.experts": (1,),
    "parallel.tensor": (1,),
    "run.tensorboard": (False, True),
}
"""Keys that recipes had once, with values that say nothing of what is learned: runs from then have them still."""
logger = logging.getLogger(__name__)


def script(kind: type[Recipe], about: str) -> int:
    """The command line of a script that trains by recipes of its own kind, which is that of ``whisper-moe train``: returns the
    exit status."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("recipe", type=Path, help="a YAML file; with --resume, also a run's directory")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes to it: optimisation.lr=1e-4")
    parser.add_argument("-o", "--output", type=Path, help="the run's directory; default: runs/ and the recipe's name")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint, if there is one")
    given = parser.parse_intermixed_args()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("whisper_moe").setLevel(logging.INFO)
    return train(given.recipe, given.overrides, given.output, given.resume, kind)


def train(
    recipe: Path, overrides: Sequence[str] | None, output: Path | None, resume: bool, kind: type[Recipe] = Recipe
) -> int:
    """What ``whisper-moe train`` does; returns the exit status. ``kind``: of recipes, those of another task."""
    try:
        wanted, directory, folder = asked(recipe, overrides or (), output, resume, kind)
        with chdir(folder):
            return run(wanted, directory, resume=resume)
    except (ValueError, ImportError, OSError) as error:
        if os.environ.get("RANK", "0") == "0" or not isinstance(error, RecipeError):
            print(f"whisper-moe: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, RecipeError) else 1


def asked(
    path: Path, overrides: Sequence[str], output: Path | None, resume: bool, kind: type[Recipe] = Recipe
) -> tuple[Recipe, Path, Path]:
    """A recipe, the run's directory, and the folder that paths in the recipe are relative to.

    ``path``: a recipe; or, to go on, a run's directory, whose record has the recipe. Raises :class:`RecipeError`.
    """
    run = path.parent if path.name == RECORD and path.exists() else path
    if not run.is_dir():
        if resume and output and (output / RECORD).exists() and not path.exists():
            raise RecipeError(
                f"{path}: is not there; --resume {output} goes on with the recipe that the run itself keeps"
            )
        recipe = load_recipe(path, overrides, kind)
        return recipe, output or Path(recipe.run.directory or f"runs/{recipe.name}"), Path()
    if not (run / RECORD).exists():
        whole = next((parent for parent in run.resolve().parents if (parent / RECORD).exists()), None)
        hint = f"; it is a part of the run {whole}" if whole else ""
        raise RecipeError(f"{run}: has no {RECORD}, so no run can go on there{hint}")
    if not resume:
        raise RecipeError(f"{run}: is a run; --resume goes on with it")
    if output is not None and output.resolve() != run.resolve():
        raise RecipeError(f"{output}: --resume {run} goes on in {run} and nowhere else; leave -o out")
    run, record = run.resolve(), read_record(run)
    tree = record["recipe"]
    for override in overrides:
        apply(tree, override)
    recipe = checked(kind, tree, str(run / RECORD))
    # Where most of the data is: where the run was begun, also if that was moved with the run in it; or here.
    folders = [Path.cwd()]
    if (begun := record.get("folder")) and (there := record.get("directory")):
        folders = [(run / os.path.relpath(begun, there)).resolve(), Path(begun), *folders]
    given = (recipe.model, *recipe.data.train, *recipe.data.evaluation)
    paths = [each.source for each in given if each.source]
    folders = [folder for folder in folders if folder.is_dir()]
    return recipe, run, max(folders, key=lambda folder: sum((folder / path).exists() for path in paths))


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
    from whisper_moe.train import checkpoint
    from whisper_moe.train.build import build_trainer, initial_model, read_start, write_start
    from whisper_moe.train.loop import seed_all
    from whisper_moe.train.monitor import Monitor

    if recipe.run.threads:
        take_threads(recipe.run.threads)
    seed_all(recipe.run.seed)
    first, newest = parallel.rank == 0, None
    if first:
        checkpoint.clean(directory)
        newest = checkpoint.latest(directory)
    newest = parallel.broadcast(str(newest or ""))
    start = read_start(directory) if newest else initial_model(recipe)
    if first and not newest:
        write_start(directory, start)
    with Monitor(directory, recipe) if first else nullcontext() as monitor:
        trainer = build_trainer(recipe, start, parallel, monitor, directory)
        if newest:
            _go_on(trainer, Path(newest), directory)
        if first:
            write_record(directory, recipe, trainer, parallel, resumed=bool(newest))
        with _signals(trainer):  # until here a signal ends the process as it ends any
            end = trainer.run()
    if first:
        if end != "interrupted":
            export(directory, start, recipe.model.lora)
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
    try:
        held = FileLock(directory / LOCK, blocking=False).acquire()
    except Timeout:
        raise ValueError(
            f"{directory}: another trainer is at work there; wait for it to end, or name another directory"
        ) from None
    except NotImplementedError as error:
        raise OSError(f"{directory}: its file system cannot lock files, which keeps two trainers apart") from error
    with held:
        yield


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


def export(directory: Path, start: Loaded, lora: LoRARecipe | None = None) -> None:
    """Write the run's best checkpoint, or its last where none was judged, as a model: a plain one, after ``lora`` too."""
    from whisper_moe.train import checkpoint
    from whisper_moe.train.build import folded
    from whisper_moe.weights.checkpoint import save_checkpoint
    from whisper_moe.weights.parts import expected_shapes

    path = checkpoint.best(directory) or checkpoint.latest(directory)
    assert path is not None, "a run that has ended has a checkpoint"
    state = {name.removeprefix("model/"): tensor.float() for name, tensor in checkpoint.read(path, "model/").items()}
    state, places = folded(state, lora) if lora else state, expected_shapes(start.config)
    state = {name: tensor for name, tensor in state.items() if name in places}  # what a task adds stays in the run
    save_checkpoint(directory / MODEL, replace(start, state=state), overwrite=True)
    logger.info("%s: the model of step %d", directory / MODEL, checkpoint.step_of(path))


# What a run says of itself


def read_record(run: Path) -> dict[str, Any]:
    record = read_json(run / RECORD)
    if not isinstance(record.get("recipe"), dict):
        raise RecipeError(f"{run / RECORD}: has no recipe, so it is not what a run writes")
    return record | {"recipe": _known(record["recipe"])}


def _known(tree: Any, above: str = "") -> Any:
    """What of a recorded recipe there still is."""
    if isinstance(tree, list):
        return [_known(each, above) for each in tree]
    if not isinstance(tree, dict):
        return tree
    kept = {key: each for key, each in tree.items() if each not in _GONE.get(above + key, ())}
    return {key: _known(each, f"{above}{key}.") for key, each in kept.items()}


def write_record(run: Path, recipe: Recipe, trainer: Trainer, parallel: Parallel, *, resumed: bool) -> None:
    """At the beginning of a session."""
    before = read_record(run).get("sessions", []) if (run / RECORD).exists() else []
    groups = trainer.optimizer.param_groups
    record = {
        "recipe": recipe.model_dump(mode="json"),
        "folder": str(Path.cwd()),
        "directory": str(run.resolve()),
        "steps": trainer.steps,
        "seeds": {"run": recipe.run.seed, "loader": recipe.data.loader.seed},
        "versions": {"python": sys.version.split()[0]} | versions(_PACKAGES),
        "git": git_state(),
        "device": str(parallel.device),
        "precision": trainer.precision,
        "processes": parallel.world_size,
        "trained_parameters": {group["name"]: sum(p.numel() for p in group["params"]) for group in groups},
        "sessions": [*before, {"begun": _now(), "resumed": resumed, "command": sys.argv[1:]}],
        "status": "running",
    }
    with atomic_file(run / RECORD) as scratch:
        scratch.write_bytes(json_bytes(record))


def finish_record(run: Path, end: str, trainer: Trainer) -> None:
    """At its end."""
    kept = ("step", "best", "best_step", "bad_steps", "skipped_samples")
    figures = {name: getattr(trainer.progress, name) for name in kept}
    with atomic_file(run / RECORD) as scratch:
        scratch.write_bytes(json_bytes(read_record(run) | {"status": end, **figures, "ended": _now()}))


def check_same(recipe: Recipe, run: Path) -> None:
    """Raise :class:`RecipeError` where a run would go on with another recipe than it began with."""
    then = read_record(run)["recipe"]
    with suppress(RecipeError):  # what was there then and is refused now is said as it was
        # With the defaults of keys that are newer than the run.
        then = checked(type(recipe), then, RECORD).model_dump(mode="json")
    changed = [
        (key, before, after)
        for key, before, after in _differences(then, recipe.model_dump(mode="json"), "")
        if not any(f"{key}.".startswith(f"{free}.") for free in (*_FREE, *recipe.free))
        and not _moved(key, before, after)
    ]
    if changed:
        what = "; ".join(f"{key} was {before!r}, is {after!r}" for key, before, after in changed)
        more = shlex.join(f"{key}={json.dumps(before)}" for key, before, _ in changed)
        raise RecipeError(
            f"{run}: a run goes on only with its own recipe; {what}. --resume {run} alone takes that; this one needs {more}"
        )


def _differences(then: Any, now: Any, where: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        then, now = dict(enumerate(then)), dict(enumerate(now))
    if isinstance(then, dict) and isinstance(now, dict):
        for key in sorted(then.keys() | now.keys()):
            yield from _differences(then.get(key), now.get(key), f"{where}.{key}".lstrip("."))
    elif then != now:
        yield where, then, now


def _moved(key: str, before: Any, after: Any) -> bool:
    """Whether a file or folder that was read is gone, and one of its name is named in its place."""
    if not key.endswith(".source") or not before or not after:
        return False
    return Path(before).name == Path(after).name and not Path(before).exists() and Path(after).exists()


def git_state() -> dict[str, Any] | None:
    """Commit and whether anything was changed since, of the checkout that this code is in; None outside of one."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
