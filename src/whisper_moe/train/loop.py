"""The training loop: one step after another, until the last, the best, a signal, or too many bad ones.

A step is: some packs of samples, a forward and a backward pass for each batch, one update. Losses are divided by the label
tokens of the whole step, of all its passes and all processes, so that how it is cut does not change it.

What :meth:`Trainer.save` writes is all that a run remembers: a new trainer that loads it goes on bit for bit (on a CPU).
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, astuple, dataclass, replace
from functools import reduce
from itertools import count
from operator import add
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import nn

from whisper_moe.config import MAX_PACK_TOKENS
from whisper_moe.data.examples import Pack
from whisper_moe.data.loader import Batch
from whisper_moe.machine import give_back_memory
from whisper_moe.model.model import WhisperMoEModel
from whisper_moe.train import checkpoint
from whisper_moe.train.losses import LossScale, Terms, Totals, build_optimizer, precision_on, set_rates
from whisper_moe.train.monitor import Monitor
from whisper_moe.train.parallel import Parallel
from whisper_moe.train.reading import RecipeError
from whisper_moe.train.recipe import Recipe

End = Literal["finished", "stopped early", "interrupted"]
Figures = Callable[[WhisperMoEModel, Callable[[], bool]], Mapping[str, float] | None]
"""A model, and what says before each batch whether to stop → figures; None if it was stopped."""
DEFAULT_STEPS = 5_000
_TRIMMED_EVERY = 10
"""Steps after which what is free goes back to the system: packs of ever other sizes leave holes that the next do not fill."""
_A_BATCH = "a batch"
"""What rank 0 says before each batch of an evaluation, where its figures come last."""


def seed_all(seed: int) -> None:
    """The global generators, which libraries use."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)


class NonFiniteError(ValueError):
    """Too many steps in a row had a loss or a gradient that is not finite."""


class Batches(Protocol):
    """What gives batches, epoch after epoch, and can say where it is; ``count``: so many epochs' batches."""

    def __iter__(self) -> Iterator[Batch]: ...
    def count(self, epochs: int) -> int: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Objective(Protocol):
    """What is minimised: what a step's sums are divided by, and the losses of a pass."""

    def totals(self, packs: Sequence[Pack]) -> Totals: ...
    def __call__(self, model: nn.Module, packs: Sequence[Pack], totals: Totals, parallel: Parallel) -> Terms: ...


@dataclass
class Progress:
    """Counters of a run."""

    step: int = 0
    """Steps done, those that were skipped included."""
    bad_steps: int = 0
    bad_in_a_row: int = 0
    skipped_samples: int = 0
    best: float | None = None
    best_step: int = 0
    worse_in_a_row: int = 0
    """Evaluations since the best, but for those that measured nothing."""
    judged: int = 0
    """The last step that was evaluated."""


class Trainer:
    """A model on its way. Every process calls all of it; only files and lines are rank 0's business."""

    def __init__(
        self,
        recipe: Recipe,
        model: WhisperMoEModel,
        objective: Objective,
        batches: Batches,
        parallel: Parallel,
        *,
        figures: Figures | None = None,
        monitor: Monitor | None = None,
        directory: Path | None = None,
    ) -> None:
        """``model``: is changed in place. ``figures`` of ``recipe.data.evaluation``, ``monitor``: of rank 0 alone.
        ``directory``: the run's, where checkpoints are kept; None keeps none."""
        self.recipe, self.model, self.objective, self.batches = recipe, model, objective, batches
        self.parallel, self.figures, self.monitor, self.directory = parallel, figures, monitor, directory
        self.network = parallel.wrap(model.to(parallel.device))
        # A fused update takes a fifth of the time on a CPU; parts of tensors are updated in the plain way.
        self.optimizer = build_optimizer(model, recipe.optimisation, fused=parallel.world_size == 1)
        self.steps = self.steps_before = _steps(recipe, batches)
        """What is asked for; and what was when the run was last saved."""
        self.precision = precision_on(recipe.optimisation.precision, parallel.device)
        self.scale = LossScale(enabled=self.precision == "float16")
        self.progress = Progress()
        self.signal: int | None = None
        """The number of a signal to stop at."""
        self._stream = self._endless()

    def run(self) -> End:
        """Go on to the end. Raises :class:`NonFiniteError`.

        What a step has learned is saved before it is evaluated, so that nothing of it is lost with a long evaluation.
        """
        if self.monitor:
            self.monitor.begin(self.steps, after=self.progress.step, judged=self.progress.judged == self.progress.step)
        while (end := self.ended()) is None:
            stepping = not self._owes_evaluation()
            self.step() if stepping else self._evaluate()
            over = self.ended() is not None
            stop = self._stopped() and not over
            if stepping and (over or stop or self._owes_evaluation() or self._due(self.recipe.run.checkpoint_every)):
                self.save()
            if stop:
                return "interrupted"
        return end

    def ended(self) -> End | None:
        """How the run has ended, if nothing is left to do: asked before a step, so that none is made after the end."""
        patience = self.recipe.evaluation.patience
        if self._owes_evaluation():
            return None
        if patience is not None and self.progress.worse_in_a_row >= patience:
            return "stopped early"
        return "finished" if self.progress.step >= self.steps else None

    def step(self) -> dict[str, Any]:
        """One update, or one that is left out because its loss or gradient is not finite; gives its figures."""
        seed_all(self.recipe.run.seed + self.progress.step)  # what draws of them draws the same in a run that goes on
        batches = [next(self._stream) for _ in range(self.recipe.optimisation.accumulate)]
        counted = self._counted(batches)
        totals = Totals(*counted[:2])
        self.network.train()
        passes = [self._pass(batch, totals, last=batch is batches[-1]) for batch in batches]
        self.parallel.exchange()
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.scale.remove(parameters)
        norm = float(self.parallel.clip(parameters, self.recipe.optimisation.clip or math.inf))
        report = self._report(batches, reduce(add, passes), counted, norm)
        if math.isfinite(report["loss"]) and math.isfinite(norm):
            self._update(report)
        elif math.isfinite(report["loss"]) and self.scale.halve():
            if self.monitor:
                self.monitor.rescaled(self.progress.step + 1, self.scale.value)
        else:
            self._skip(report, batches, passes)
        self.progress.step += 1
        self.optimizer.zero_grad(set_to_none=True)
        if self.progress.step % _TRIMMED_EVERY == 0:
            give_back_memory()
        return report

    def _counted(self, batches: Sequence[Batch]) -> list[float]:
        """Label tokens and segments (at least one), tokens, packs and samples left out, of all passes and processes."""
        own = [[*astuple(self.objective.totals(b.packs)), b.tokens, len(b.packs), len(b.skipped)] for b in batches]
        counted = self.parallel.sum(torch.tensor(own, dtype=torch.float64, device=self.parallel.device).sum(0)).tolist()
        return [*(max(number, 1.0) for number in counted[:2]), *counted[2:]]

    def _pass(self, batch: Batch, totals: Totals, *, last: bool) -> Terms:
        """Forward and backward over one batch; gradients add up."""
        half = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(self.precision)
        with nullcontext() if last else self.parallel.accumulating(self.network):
            with torch.autocast(self.parallel.device.type, half) if half else nullcontext():
                terms = self.objective(self.network, batch.packs, totals, self.parallel)
            # Processes average their gradients, but each one's loss is already a share of the sum.
            (terms.loss * (self.parallel.data_size * self.scale.value)).backward()
        return replace(terms, loss=terms.loss.detach())

    def _report(self, batches: Sequence[Batch], terms: Terms, counted: Sequence[float], norm: float) -> dict[str, Any]:
        """The step's figures, of all processes, as ``metrics.jsonl`` has them. What is left out is told here."""
        names, counts, moe = sorted(terms.parts), terms.counts.sum(0), self.model.config.moe
        figures = torch.stack([terms.loss, *(terms.parts[name] for name in names)]).double()
        loss, *parts = self.parallel.sum(figures).tolist()
        labels, segments, tokens, packs, skipped = map(int, counted)
        given = self.recipe.optimisation
        report: dict[str, Any] = {
            "epoch": batches[-1].epoch + 1,  # of its last batch, counted from 1
            "loss": loss,
            **dict(zip(names, parts, strict=True)),
            "lr": given.lr * given.factor(self.progress.step, self.steps),
            "gradient_norm": norm,
            "tokens": tokens,  # of encoder and decoder
            "label_tokens": labels,
            "segments": segments,
            "packs": packs,
            "fill": tokens / (packs * MAX_PACK_TOKENS) if packs else 0.0,
        }
        if moe is not None and len(counts):  # each choice's share of all slots
            choices = (*moe.names, *["none"] * moe.none_choice)
            report["load"] = dict(zip(choices, (counts / counts.sum().clamp_min(1)).tolist(), strict=True))
        if skipped:
            report["skipped_samples"] = skipped
            self.progress.skipped_samples += skipped
            left_out = self.parallel.gather([sample for batch in batches for sample in batch.skipped])
            if self.monitor:
                self.monitor.left_out(left_out)
        return report

    def _update(self, report: Mapping[str, Any]) -> None:
        set_rates(self.optimizer, self.recipe.optimisation.factor(self.progress.step, self.steps))
        self.optimizer.step()
        self.scale.grow()
        self.progress.bad_in_a_row = 0
        if self.monitor:
            self.monitor.stepped(self.progress.step + 1, report)

    def _skip(self, report: Mapping[str, Any], batches: Sequence[Batch], passes: Sequence[Terms]) -> None:
        """Nothing is updated. The batches whose own loss is at fault are named, or all where only the gradient is."""
        progress, own, cause = self.progress, batches, f"the gradient is {report['gradient_norm']}"
        if not math.isfinite(report["loss"]):
            own = [batch for batch, terms in zip(batches, passes, strict=True) if not terms.loss.isfinite()]
            cause = f"the loss is {report['loss']}"
        progress.bad_steps += 1
        progress.bad_in_a_row += 1
        ids = self.parallel.gather([name for batch in own for name in batch.ids])
        if self.monitor:
            self.monitor.skipped(progress.step + 1, cause, ids)
        if progress.bad_in_a_row >= self.recipe.optimisation.most_bad_steps:
            raise NonFiniteError(
                f"step {progress.step + 1}: {cause}, as in the {progress.bad_in_a_row - 1} steps before; look at the samples "
                f"({', '.join(ids[:5])} …), or begin a new run with a lower rate or in float32"
            )

    # Evaluation

    def _due(self, every: int | None) -> bool:
        return every is not None and self.progress.step % every == 0

    def _stopped(self) -> bool:
        """Whether any process was told to stop: all then do."""
        return self.parallel.any(self.signal is not None)

    def _owes_evaluation(self) -> bool:
        """Whether the last step is to be evaluated and has not been."""
        step = self.progress.step
        due = self._due(self.recipe.evaluation.every) or step == self.steps
        return bool(self.recipe.data.evaluation) and due and self.progress.judged != step

    def _evaluate(self) -> None:
        """Rank 0 evaluates, and tells the others. Before each of its batches all say whether they are to stop."""

        def stop() -> bool:
            self.parallel.broadcast(_A_BATCH)
            return self._stopped()

        self.network.eval()
        with self.parallel.whole(self.model) as whole:
            if whole is not None:
                assert self.figures is not None
                said = self.parallel.broadcast(json.dumps(self.figures(whole, stop)))
            else:
                while (said := self.parallel.broadcast("")) == _A_BATCH:
                    self._stopped()
        if (metrics := json.loads(said)) is None:  # stopped: it stays owed
            return
        best = self.judged(metrics)
        if self.monitor:
            self.monitor.evaluated(self.progress.step, metrics, best)
        self.save(metrics)

    def judged(self, metrics: Mapping[str, float]) -> bool:
        """Remember what the last step's evaluation gave; whether it is the best so far.

        What could not be measured is neither better nor worse.
        """
        progress, score = self.progress, metrics.get(self.recipe.evaluation.metric, math.nan)
        best = math.isfinite(score) and (progress.best is None or score < progress.best)
        if best:
            progress.best, progress.best_step, progress.worse_in_a_row = score, progress.step, 0
        elif math.isfinite(score):
            progress.worse_in_a_row += 1
        progress.judged = progress.step
        return best

    # Batches and state

    def _endless(self) -> Iterator[Batch]:
        for number in count():
            empty = True
            for batch in self.batches:
                empty = False
                yield batch
            if empty and number:  # of the epoch that a run goes on in, nothing may be left
                raise ValueError("the training data gives no batch: it is empty, or every sample was skipped")

    def save(self, metrics: Mapping[str, float] | None = None) -> None:
        """Commit a checkpoint of what has been learned; ``metrics`` are added to the one that there is of this step."""
        if self.directory is None:
            return
        if self.monitor:
            self.monitor.secure()
        where, keep = (self.directory, self.progress.step), self.recipe.run.keep
        if metrics is None:
            checkpoint.save(*where, self.model, self.optimizer, self._meta(), keep=keep)
        elif self.parallel.rank == 0:
            checkpoint.note(*where, metrics, self.recipe.evaluation.metric, keep=keep)
        self.parallel.barrier()

    def _meta(self) -> dict[str, Any]:
        """All that a run remembers but its model and its optimizer, as plain JSON."""
        return {
            "steps": self.steps,
            "scale": {"value": self.scale.value, "good": self.scale.good},
            "progress": asdict(self.progress),
            "batches": self.batches.state_dict(),
        }

    def load(self, path: Path) -> None:
        """Go on where a checkpoint was saved, bit for bit on a CPU. Who asks for more steps than before has patience anew."""
        meta = checkpoint.load(path, self.model, self.optimizer)
        self.scale.good = meta["scale"]["good"]
        if self.scale.enabled:
            self.scale.value = meta["scale"]["value"]
        self.progress = Progress(**meta["progress"])
        if (measured := checkpoint.read_commit(path).evaluation) is not None:
            self.judged(measured)
        self.steps_before = meta["steps"]
        if self.steps_before < self.steps:
            self.progress.worse_in_a_row = 0
        self.batches.load_state_dict(meta["batches"])
        self._stream = self._endless()


def _steps(recipe: Recipe, batches: Batches) -> int:
    """As many as are asked for, or as the epochs have batches for; the last may take some of the epoch behind them."""
    given = recipe.optimisation
    if given.epochs is None:
        return given.steps or DEFAULT_STEPS
    try:
        return math.ceil(batches.count(given.epochs) / given.accumulate)
    except ValueError as error:
        raise RecipeError(f"optimisation.epochs: {error}; give optimisation.steps") from error
