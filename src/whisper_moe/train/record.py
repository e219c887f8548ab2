"""What a run says of itself in ``run.json``, and what it goes on with: its own recipe, of which some parts may change."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whisper_moe.train.reading import RecipeError, apply
from whisper_moe.train.recipe import Recipe, load_recipe, recipe_of

if TYPE_CHECKING:
    from whisper_moe.train.loop import Trainer
    from whisper_moe.train.parallel import Parallel

RECORD = "run.json"
_PACKAGES = ("whisper-moe", "torch", "numpy", "datasets", "tokenizers", "safetensors", "av", "pydantic")
_FREE = (
    "run",
    "evaluation.every",
    "evaluation.batch_size",
    "evaluation.padded",
    "evaluation.patience",
    "name",
    "parallel",
    "data.loader.workers",
    "data.loader.prefetch",
    "data.loader.cache_dir",
    "data.loader.cache_limit_mb",
    "optimisation.steps",
    "optimisation.epochs",
    "optimisation.recompute",
    "losses.context.lessons",
    "losses.context.limit_mb",
)
"""Parts of a recipe that may differ where a run goes on: they change neither what is learned from nor what the best checkpoint
is. Of steps and epochs there cannot be fewer than are done; the loop sees to that."""


def asked(path: Path, overrides: Sequence[str], output: Path | None, resume: bool) -> tuple[Recipe, Path, Path]:
    """A recipe, the run's directory, and the folder that paths in the recipe are relative to.

    ``path``: a recipe; or, to go on, a run's directory, whose record has the recipe. Raises :class:`RecipeError`.
    """
    run = path.parent if path.name == RECORD and path.exists() else path
    if not run.is_dir():
        if resume and output and (output / RECORD).exists() and not path.exists():
            raise RecipeError(
                f"{path}: is not there; --resume {output} goes on with the recipe that the run itself keeps"
            )
        recipe = load_recipe(path, overrides)
        return recipe, output or Path(recipe.run.directory or f"runs/{recipe.name}"), Path()
    if not (run / RECORD).exists():
        whole = next((parent for parent in run.resolve().parents if (parent / RECORD).exists()), None)
        hint = f"; it is a part of the run {whole}" if whole else ""
        raise RecipeError(f"{run}: has no {RECORD}, so no run can go on there{hint}")
    if not resume:
        raise RecipeError(f"{run}: is a run; --resume goes on with it")
    if output is not None and output.resolve() != run.resolve():
        raise RecipeError(f"{output}: --resume {run} goes on in {run} and nowhere else; leave -o out")
    record = read_record(run)
    tree = record["recipe"]
    for override in overrides:
        apply(tree, override)
    recipe = recipe_of(tree, str(run / RECORD))
    return recipe, run.resolve(), _folder(record, run.resolve(), recipe)


def read_record(run: Path) -> dict[str, Any]:
    from whisper_moe.weights.files import read_json

    record = read_json(run / RECORD)
    if not isinstance(record.get("recipe"), dict):
        raise RecipeError(f"{run / RECORD}: has no recipe, so it is not what a run writes")
    return record


def _folder(record: Mapping[str, Any], run: Path, recipe: Recipe) -> Path:
    """The one in which most of the data is: where the run was begun, also if that was moved with the run in it; or this."""
    folders = [Path.cwd()]
    if (begun := record.get("folder")) and (there := record.get("directory")):
        folders = [(run / os.path.relpath(begun, there)).resolve(), Path(begun), *folders]
    paths = [recipe.model.source or "", *(corpus.source for corpus in (*recipe.data.train, *recipe.data.evaluation))]
    there_is = [folder for folder in folders if folder.is_dir()]
    return max(there_is, key=lambda folder: sum((folder / path).exists() for path in paths))


def write_record(run: Path, recipe: Recipe, trainer: Trainer, parallel: Parallel, *, resumed: bool) -> None:
    """At the beginning of a session."""
    before = read_record(run) if (run / RECORD).exists() else {}
    groups = {group["name"]: sum(p.numel() for p in group["params"]) for group in trainer.optimizer.param_groups}
    sessions = [*before.get("sessions", []), {"begun": _now(), "resumed": resumed, "command": sys.argv[1:]}]
    record = {
        "recipe": recipe.model_dump(mode="json"),
        "folder": str(Path.cwd()),
        "directory": str(run.resolve()),
        "steps": trainer.steps,
        "seeds": {"run": recipe.run.seed, "loader": recipe.data.loader.seed},
        "versions": {"python": sys.version.split()[0]} | {name: _version(name) for name in _PACKAGES},
        "git": git_state(),
        "device": str(parallel.device),
        "precision": trainer.precision,
        "processes": parallel.world_size,
        "trained_parameters": groups,
        "sessions": sessions,
        "status": "running",
    }
    _replace(run / RECORD, record)


def finish_record(run: Path, end: str, trainer: Trainer) -> None:
    """At its end."""
    progress = trainer.progress
    record = read_record(run) | {
        "status": end,
        "step": progress.step,
        "best": progress.best,
        "best_step": progress.best_step,
        "bad_steps": progress.bad_steps,
        "skipped_samples": progress.skipped_samples,
        "ended": _now(),
    }
    _replace(run / RECORD, record)


def _replace(path: Path, record: Mapping[str, Any]) -> None:
    from whisper_moe.weights.files import atomic_file, json_bytes

    with atomic_file(path) as scratch:
        scratch.write_bytes(json_bytes(record))


def check_same(recipe: Recipe, run: Path) -> None:
    """Raise :class:`RecipeError` where a run would go on with another recipe than it began with."""
    then = read_record(run)["recipe"]
    with suppress(RecipeError):  # what was there then and is refused now is said as it was
        then = recipe_of(then, RECORD).model_dump(mode="json")  # with the defaults of keys that are newer than the run
    now = recipe.model_dump(mode="json")
    changed = [
        (key, before, after)
        for key, before, after in _differences(then, now, "")
        if not any(key == free or key.startswith(f"{free}.") for free in _FREE) and not _moved(key, before, after)
    ]
    if changed:
        what = "; ".join(f"{key} was {before!r}, is {after!r}" for key, before, after in changed)
        more = shlex.join(f"{key}={json.dumps(before)}" for key, before, _ in changed)
        raise RecipeError(
            f"{run}: a run goes on only with its own recipe; {what}. --resume {run} alone takes that; this one needs {more}"
        )


def _differences(then: Any, now: Any, where: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(then, dict) and isinstance(now, dict):
        for key in sorted(then.keys() | now.keys()):
            yield from _differences(then.get(key), now.get(key), f"{where}.{key}" if where else key)
    elif isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        for index, (before, after) in enumerate(zip(then, now, strict=True)):
            yield from _differences(before, after, f"{where}.{index}")
    elif then != now:
        yield where, then, now


def _moved(key: str, before: Any, after: Any) -> bool:
    """Whether a file or folder that was read is gone, and one of its name is named in its place."""
    if not key.endswith((".source", ".videos")) or not before or not after:
        return False
    return Path(before).name == Path(after).name and not Path(before).exists() and Path(after).exists()


def git_state() -> dict[str, Any] | None:
    """Commit and whether anything was changed since, of the checkout that this code is in; None outside of one."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
