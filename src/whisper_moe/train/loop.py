"""The training loop: one step after another, until the last, the best, a signal, or too many bad ones.

A step is: some packs of samples, a forward and a backward pass for each batch, one update. Losses are divided by the label
tokens of the whole step, of all its passes and all processes, so that how it is cut does not change it.

Everything that a run remembers is in :meth:`Trainer.state`; with it, a new trainer goes on bit for bit (on a CPU).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from itertools import count
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from whisper_moe.data.examples import Pack
from whisper_moe.data.loader import Batch
from whisper_moe.data.sample import Skipped
from whisper_moe.heap import give_back_memory
from whisper_moe.model.model import WhisperMoEModel
from whisper_moe.train.losses import Terms, Totals, balance_biases
from whisper_moe.train.optim import LossScale, set_rates
from whisper_moe.train.parallel import Parallel
from whisper_moe.train.state import join, load_optimizer_state, optimizer_state, random_state, set_random_state, split

Precision = Literal["float32", "bfloat16", "float16"]
End = Literal["finished", "stopped early", "interrupted"]
_TRIMMED_EVERY = 10
"""Steps after which what is free goes back to the system: packs of ever other sizes leave holes that the next do not fill."""


class NonFiniteError(ValueError):
    """Too many steps in a row had a loss or a gradient that is not finite."""


class Batches(Protocol):
    """What gives batches, epoch after epoch, and can say where it is."""

    def __iter__(self) -> Iterator[Batch]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Objective(Protocol):
    """The losses of one batch's packs, as shares of the step's."""

    def totals(self, packs: Sequence[Pack]) -> Totals:
        """What they add to the step's totals; asked before any pass."""
        ...

    def __call__(self, model: nn.Module, packs: Sequence[Pack], totals: Totals, parallel: Parallel) -> Terms: ...


class Observer(Protocol):
    """Is told what happens."""

    def stepped(self, report: StepReport) -> None: ...
    def left_out(self, samples: Sequence[Skipped]) -> None: ...
    def skipped(self, report: StepReport, cause: str, ids: Sequence[str]) -> None: ...
    def rescaled(self, report: StepReport, scale: float) -> None: ...
    def evaluated(self, step: int, metrics: Mapping[str, float], best: bool) -> None: ...


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """What the loop itself is told; see the recipe's fields of these names."""

    steps: int
    accumulate: int = 1
    clip: float = 1.0
    precision: Precision = "float32"
    factor: Callable[[int], float]
    """Step, counted from 0 → what peak rates are multiplied with."""
    balance_rate: float = 0.0
    """Above 0: routers' biases are moved by so much a step."""
    most_bad_steps: int = 10
    evaluate_every: int | None = None
    checkpoint_every: int | None = None
    metric: str = "wer"
    patience: int | None = None


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """One step in figures, of all processes."""

    step: int
    """Counted from 1."""
    epoch: int
    """Of its last batch, counted from 1."""
    loss: float
    parts: dict[str, float]
    rate: float
    """What the peak rates were multiplied with."""
    gradient_norm: float
    label_tokens: int
    tokens: int
    """Of encoder and decoder."""
    segments: int
    packs: int
    skipped_samples: int
    load: tuple[float, ...] = ()
    """Each choice's share of all slots, *none* last."""


@dataclass
class Progress:
    """Counters of a run."""

    step: int = 0
    """Steps done, those that were skipped included."""
    tokens: int = 0
    segments: int = 0
    bad_steps: int = 0
    bad_in_a_row: int = 0
    skipped_samples: int = 0
    best: float | None = None
    best_step: int = 0
    worse_in_a_row: int = 0
    """Evaluations since the best, but for those that measured nothing."""
    history: list[dict[str, float]] = field(default_factory=list)
    """Every evaluation, with its ``step``."""


class Trainer:
    """A model on its way. What it is given to call is called by every process; only files are rank 0's business."""

    def __init__(
        self, model: WhisperMoEModel, network: nn.Module, objective: Objective, batches: Batches,
        optimizer: torch.optim.Optimizer, settings: LoopSettings, parallel: Parallel, observer: Observer, *,
        evaluate: Callable[[], Mapping[str, float] | None] | None = None,
        save: Callable[[Trainer], None] = lambda trainer: None,
        note: Callable[[Trainer, Mapping[str, float]], None] = lambda trainer, metrics: None,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        """``network`` is what ``parallel`` made of ``model`` before the ``optimizer`` was made of its parameters.
        ``evaluate``: None of one that was stopped. ``note``: adds what it gave to what ``save`` had saved before it.
        """
        self.model, self.network, self.objective, self.batches = model, network, objective, batches
        self.optimizer, self.settings, self.parallel, self.observer = optimizer, settings, parallel, observer
        self._evaluation, self._save, self._note, self._stop_requested = evaluate, save, note, stop_requested
        self.scale = LossScale(enabled=settings.precision == "float16")
        self.progress = Progress()
        self.steps_before = settings.steps
        """What was asked for when the run was last saved."""
        self._stream = self._endless()

    def run(self) -> End:
        """Go on to the end. Raises :class:`NonFiniteError`.

        What a step has learned is saved before it is evaluated, so that nothing of it is lost with a long evaluation.
        """
        while (end := self.ended()) is None:
            stepping = not self._owes_evaluation()
            self.step() if stepping else self._evaluate()
            over = self.ended() is not None
            stop = self.parallel.any(self._stop_requested()) and not over
            if stepping and (over or stop or self._owes_evaluation() or self._due(self.settings.checkpoint_every)):
                self._save(self)
            if stop:
                return "interrupted"
        return end

    def ended(self) -> End | None:
        """How the run has ended, if nothing is left to do: asked before a step, so that none is made after the end."""
        patience = self.settings.patience
        if self._owes_evaluation():
            return None
        if patience is not None and self.progress.worse_in_a_row >= patience:
            return "stopped early"
        return "finished" if self.progress.step >= self.settings.steps else None

    def step(self) -> StepReport:
        """One update, or one that is left out because its loss or gradient is not finite."""
        batches = [next(self._stream) for _ in range(self.settings.accumulate)]
        totals = self._totals(batches)
        self.network.train()
        passes = [self._pass(batch, totals, last=batch is batches[-1]) for batch in batches]
        self.scale.remove(self._trained())
        norm = float(self.parallel.clip(self._trained(), self.settings.clip))
        report = self._report(batches, passes, totals, norm)
        if math.isfinite(report.loss) and math.isfinite(norm):
            self._update(passes)
            self.progress.bad_in_a_row = 0
            self.observer.stepped(report)
        elif math.isfinite(report.loss) and self.scale.halve():
            self.observer.rescaled(report, self.scale.value)
        else:
            self._skip(report, batches, passes)
        self.progress.step += 1
        self.optimizer.zero_grad(set_to_none=True)
        if self.progress.step % _TRIMMED_EVERY == 0:
            give_back_memory()
        return report

    def _pass(self, batch: Batch, totals: Totals, *, last: bool) -> Terms:
        """Forward and backward over one batch; gradients add up."""
        device = self.parallel.device.type
        half = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(self.settings.precision)
        with nullcontext() if last else self.parallel.accumulating(self.network):
            with torch.autocast(device, half) if half else nullcontext():
                terms = self.objective(self.network, batch.packs, totals, self.parallel)
            # Processes average their gradients, but each one's loss is already a share of the sum.
            (terms.loss * (self.parallel.data_size * self.scale.value)).backward()
        return Terms(terms.loss.detach(), terms.parts, terms.counts)

    def _update(self, passes: Sequence[Terms]) -> None:
        set_rates(self.optimizer, self.settings.factor(self.progress.step))
        self.optimizer.step()
        if self.settings.balance_rate:
            balance_biases(self.model, _sum([terms.counts for terms in passes]), self.settings.balance_rate)
        self.scale.grow()

    def _skip(self, report: StepReport, batches: Sequence[Batch], passes: Sequence[Terms]) -> None:
        """Nothing is updated. The batches whose own loss is at fault are named, or all where only the gradient is."""
        progress = self.progress
        progress.bad_steps += 1
        progress.bad_in_a_row += 1
        bad = [batch for batch, terms in zip(batches, passes, strict=True) if not terms.loss.isfinite()]
        own = batches if math.isfinite(report.loss) else bad
        ids = self.parallel.gather([name for batch in own for pack in batch.packs for name in pack.ids])
        cause = (
            f"the loss is {report.loss}"
            if not math.isfinite(report.loss)
            else f"the gradient is {report.gradient_norm}"
        )
        self.observer.skipped(report, cause, ids)
        if progress.bad_in_a_row >= self.settings.most_bad_steps:
            raise NonFiniteError(
                f"step {report.step}: {cause}, as in the {progress.bad_in_a_row - 1} steps before; look at the samples "
                f"({', '.join(ids[:5])} …), or begin a new run with a lower rate or in float32"
            )

    def _totals(self, batches: Sequence[Batch]) -> Totals:
        own = [self.objective.totals(batch.packs) for batch in batches]
        numbers = [[t.tokens, t.segments] for t in own]
        sums = self.parallel.sum(torch.tensor(numbers, dtype=torch.float64, device=self.parallel.device).sum(0))
        tokens, segments = sums.tolist()
        return Totals(max(tokens, 1.0), max(segments, 1.0))

    def _report(self, batches: Sequence[Batch], passes: Sequence[Terms], totals: Totals, norm: float) -> StepReport:
        """The step's figures, of all processes, and the progress that they make."""
        names = sorted({name for terms in passes for name in terms.parts})
        figures = [_sum([terms.loss for terms in passes])]
        figures += [_sum([terms.parts[name] for terms in passes if name in terms.parts]) for name in names]
        own = [(batch.tokens, len(batch.packs), len(batch.skipped)) for batch in batches]
        counted = torch.tensor(own, dtype=torch.float64).sum(0)
        sums = self.parallel.sum(torch.cat([torch.stack(figures).double().cpu(), counted]).to(self.parallel.device))
        loss, *parts, tokens, packs, skipped = sums.tolist()
        counts, progress = _sum([terms.counts for terms in passes]).sum(0), self.progress
        progress.tokens += int(tokens)
        progress.segments += int(totals.segments)
        progress.skipped_samples += int(skipped)
        if skipped:
            self.observer.left_out(self.parallel.gather([sample for batch in batches for sample in batch.skipped]))
        return StepReport(
            step=progress.step + 1, epoch=batches[-1].epoch + 1, loss=loss, parts=dict(zip(names, parts, strict=True)),
            rate=self.settings.factor(progress.step), gradient_norm=norm, label_tokens=int(totals.tokens),
            tokens=int(tokens), segments=int(totals.segments), packs=int(packs), skipped_samples=int(skipped),
            load=tuple((counts / counts.sum().clamp_min(1)).tolist()) if counts.numel() else (),
        )  # fmt: skip

    def _owes_evaluation(self) -> bool:
        """Whether the last step is to be evaluated and has not been."""
        step = self.progress.step
        due = step > 0 and (self._due(self.settings.evaluate_every) or step == self.settings.steps)
        return self._evaluation is not None and due and not self.is_judged()

    def is_judged(self) -> bool:
        """Whether the last step has been evaluated."""
        return any(judged["step"] == self.progress.step for judged in self.progress.history[-1:])

    def _evaluate(self) -> None:
        assert self._evaluation is not None
        self.network.eval()
        metrics = self._evaluation()
        if metrics is None:  # stopped: it stays owed
            return
        best = self.judged(metrics)
        self.observer.evaluated(self.progress.step, metrics, best)
        self._note(self, metrics)

    def judged(self, metrics: Mapping[str, float]) -> bool:
        """Remember what the last step's evaluation gave; whether it is the best so far.

        What could not be measured is neither better nor worse.
        """
        progress, score = self.progress, metrics.get(self.settings.metric, math.nan)
        best = math.isfinite(score) and (progress.best is None or score < progress.best)
        if best:
            progress.best, progress.best_step, progress.worse_in_a_row = score, progress.step, 0
        elif math.isfinite(score):
            progress.worse_in_a_row += 1
        progress.history.append({"step": progress.step, **metrics})
        return best

    def _due(self, every: int | None) -> bool:
        return every is not None and self.progress.step % every == 0

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _endless(self) -> Iterator[Batch]:
        for number in count():
            empty = True
            for batch in self.batches:
                empty = False
                yield batch
            if empty and number:  # of the epoch that a run goes on in, nothing may be left
                raise ValueError("the training data gives no batch: it is empty, or every sample was skipped")

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors by name, whole and on the CPU, and plain JSON. Every process calls it and gets the same."""
        whole = self.parallel.full
        tensors = {f"model/{name}": whole(tensor) for name, tensor in self.model.state_dict().items()}
        own, optimizer = split(optimizer_state(self.optimizer, self.model.named_parameters()), "optimizer")
        tensors |= {name: whole(tensor) for name, tensor in own.items()}
        return tensors, {"optimizer": optimizer, **self.meta()}

    def meta(self) -> dict[str, Any]:
        """All but the model and its optimizer."""
        return {
            "steps": self.settings.steps, "scale": self.scale.state(), "progress": asdict(self.progress),
            "random": random_state(), "batches": self.batches.state_dict(),
        }  # fmt: skip

    def load_state(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Go on where :meth:`state` was taken."""
        with torch.no_grad():
            for name, tensor in self.model.state_dict().items():
                tensor.copy_(self.parallel.share(tensors[f"model/{name}"], tensor))
        parameters = dict(self.model.named_parameters())
        optimizer = join(meta["optimizer"], tensors)
        for name, values in optimizer["state"].items():
            for key, value in values.items():
                if isinstance(value, Tensor) and value.ndim:
                    values[key] = self.parallel.share(value, parameters[name])
        load_optimizer_state(self.optimizer, parameters.items(), optimizer)
        self.load_meta(meta)

    def load_meta(self, meta: Mapping[str, Any]) -> None:
        """Go on where :meth:`meta` was taken, with a model and an optimizer that are there already.

        ``meta["evaluation"]``: what was measured since. Who asks for more steps than before has patience anew.
        """
        self.scale.load_state(meta["scale"])
        progress = {name: value for name, value in meta["progress"].items() if name != "score"}  # which older runs have
        self.progress = Progress(**progress)
        if meta.get("evaluation") is not None:
            self.judged(meta["evaluation"])
        self.steps_before = meta.get("steps", self.settings.steps)
        if self.steps_before < self.settings.steps:
            self.progress.worse_in_a_row = 0
        self.batches.load_state_dict(meta["batches"])
        self._stream = self._endless()
        set_random_state(meta["random"])


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    """In order, so that the result does not depend on how many there are of a kind."""
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total
