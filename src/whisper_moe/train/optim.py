"""AdamW with a group of its own for everything that needs another rate, and schedules that are functions of the step.

A schedule has no state: the rate of a step is computed from its number, so that a run goes on exactly where it stopped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn

from whisper_moe.model.model import WhisperMoEModel
from whisper_moe.train.recipe import check_grokfast
from whisper_moe.weights.files import listed
from whisper_moe.weights.parts import EMBEDDING, NEW_TOKENS

Schedule = Literal["linear", "cosine", "constant"]
FAST = ("w1", "b1", "w2", "b2", "gamma", "beta", "tau", "gate_forward", "gate_backward")
"""Of a TTT layer: the start of the fast weights with their norm, and the gates."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Peak learning rates. Groups but ``decay`` are not decayed."""

    rest: float
    weight_decay: float
    ttt: float
    """Gates and fast weights: Adam moves a gate by about its rate a step, and it starts at 0."""
    router: float
    new_tokens: float
    """The embeddings of tokens that the source lacked."""
    named: Sequence[tuple[str, float, float]] = ()
    """(pattern, rate, weight decay) of parameters by name, before all others."""


def schedule_factor(step: int, *, steps: int, warmup: int, schedule: Schedule) -> float:
    """What the peak rate is multiplied with in the ``step``-th step, counted from 0; of ``steps``.

    Rises from 0 over ``warmup`` steps, then falls to 0 at ``steps``: as transformers' schedules of these names. A run whose
    warm-up is longer than itself ends while the rate still rises.
    """
    if step < warmup:
        return step / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    falling = {"linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "constant": 1.0}
    return falling[schedule]


def warmup_warning(*, rate: float, steps: int, warmup: int) -> str | None:
    """One line about a warm-up that the run never leaves."""
    if warmup < steps:
        return None
    last = schedule_factor(steps - 1, steps=steps, warmup=warmup, schedule="linear")
    return (
        f"WARNING: the warm-up of {warmup:,} steps is longer than the run of {steps:,}: the rate rises to the end, to "
        f"{rate * last:.4e}, {100 * last:.2f} % of {rate:g}, and never falls"
    )


def freeze(model: nn.Module, frozen: Sequence[str], trained: Sequence[str] = ()) -> None:
    """Parameters whose names match a pattern of ``frozen`` (shell style, ``decoder.*``) and none of ``trained`` stay as they are.

    Raises ``ValueError`` for a pattern that matches nothing, and if nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in unmatched(model, (*frozen, *trained)):
        raise ValueError(f"no parameter is called {pattern!r}; there are {listed(names, 3)}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad = not _matches(name, frozen) or _matches(name, trained)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"nothing is left to train: every parameter matches {listed(frozen)}")


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def unmatched(model: nn.Module, patterns: Iterable[str]) -> list[str]:
    """Those that no parameter's name matches."""
    names = [name for name, _ in model.named_parameters()]
    return [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names)]


def group_of(name: str, parameter: Tensor, named: Sequence[tuple[str, float, float]] = ()) -> str:
    """The pattern that names a parameter, or ``ttt``, ``router``, ``new_tokens``, ``no_decay`` or ``decay``."""
    for pattern, _, _ in named:
        if fnmatchcase(name, pattern):
            return pattern
    module, _, last = name.rpartition(".")
    if last in FAST or module.endswith(".rate"):
        return "ttt"
    if ".router." in name:
        return "router"
    if name == NEW_TOKENS:
        return "new_tokens"
    # Biases and norms; of stacked experts the biases have two dimensions. Positions are embeddings.
    no_decay = parameter.ndim < 2 or last.endswith("bias") or last == "positions" or name == EMBEDDING
    return "no_decay" if no_decay else "decay"


def build_optimizer(
    model: WhisperMoEModel,
    rates: Rates,
    *,
    betas: tuple[float, float],
    eps: float,
    fused: bool = False,
    grokfast: tuple[float, float] | None = None,
) -> torch.optim.AdamW:
    """AdamW over what is not frozen; with ``grokfast`` (α, λ), :class:`GrokfastAdamW`.

    Every group carries its ``name`` and its ``peak`` rate, for :func:`set_rates`.
    """
    settings = {
        "ttt": (rates.ttt, 0.0),
        "router": (rates.router, 0.0),
        "new_tokens": (rates.new_tokens, 0.0),
        "no_decay": (rates.rest, 0.0),
        "decay": (rates.rest, rates.weight_decay),
    }
    for pattern, rate, decay in rates.named:  # of two alike the first; one that is called like a group matches nothing
        settings.setdefault(pattern, (rate, decay))
    members: dict[str, list[nn.Parameter]] = {name: [] for name in settings}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members[group_of(name, parameter, rates.named)].append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": parameters, "name": name, "lr": rate, "peak": rate, "weight_decay": decay}
        for name, parameters in members.items()
        if parameters
        for rate, decay in [settings[name]]
    ]
    return adamw(groups, grokfast, betas=betas, eps=eps, fused=fused)


def adamw(parameters: Any, grokfast: tuple[float, float] | None, **options: Any) -> torch.optim.AdamW:
    """AdamW; with ``grokfast`` (α, λ), :class:`GrokfastAdamW`."""
    if grokfast is None:
        return torch.optim.AdamW(parameters, **options)
    alpha, amplification = grokfast
    return GrokfastAdamW(parameters, alpha=alpha, amplification=amplification, **options)


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Each group's rate is its peak times ``factor``."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor


class GrokfastAdamW(torch.optim.AdamW):
    """AdamW on gradients whose slow part is amplified: g ← g + λ · EMA_α(g) (Grokfast-EMA, arXiv 2405.20233, algorithm 1).

    The average is part of the optimizer's state, so a run goes on with it. Clip before, not after.
    """

    def __init__(self, params: Any, *, alpha: float = 0.98, amplification: float = 2.0, **options: Any) -> None:
        """``alpha`` of the moving average, ``amplification`` λ; ``options`` are AdamW's."""
        check_grokfast(alpha, amplification)
        super().__init__(params, **options)
        self.alpha, self.amplification = alpha, amplification

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert closure is None, "gradients are changed before the step; a closure would make them anew"
        slow: dict[Tensor, Tensor] = {}
        for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            before = self.state[parameter].get("slow_gradient")
            now = parameter.grad.clone() if before is None else before.lerp_(parameter.grad, 1 - self.alpha)
            parameter.grad.add_(now, alpha=self.amplification)
            slow[parameter] = now
        done = super().step()
        for parameter, gradient in slow.items():  # only now: AdamW begins with parameters that have no state at all
            self.state[parameter]["slow_gradient"] = gradient
        return done


class LossScale:
    """float16's gradients are computed of a loss that is scaled up (arXiv 1710.03740, section 3.2); in other types, by 1.

    Halved where they overflow, which costs that step, doubled after 2,000 steps without. Decided on the norm of all
    gradients, so that all processes decide alike.
    """

    growth_steps = 2_000

    def __init__(self, *, enabled: bool) -> None:
        self.enabled, self.value, self._good = enabled, 65_536.0 if enabled else 1.0, 0

    def remove(self, parameters: Sequence[nn.Parameter]) -> None:
        """Undo the scale in the gradients."""
        if self.enabled:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad /= self.value

    def grow(self) -> None:
        self._good += 1
        if self.enabled and self._good % self.growth_steps == 0:
            self.value *= 2

    def halve(self) -> bool:
        """Whether a smaller scale may help."""
        self._good = 0
        if not self.enabled or self.value <= 1:
            return False
        self.value /= 2
        return True

    def state(self) -> dict[str, float]:
        return {"value": self.value, "good": self._good}

    def load_state(self, state: Mapping[str, float]) -> None:
        self._good = int(state["good"])
        if self.enabled:
            self.value = state["value"]
