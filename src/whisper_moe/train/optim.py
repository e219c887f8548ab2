"""From gradients to an update: AdamW with a group of its own for everything that needs another rate; Grokfast; float16's
loss scale; and of a model that lies on many ranks, gradients exchanged where no engine does it, measured as a whole, clipped.

A rate is a function of the step (:meth:`whisper_moe.train.recipe.OptimisationRecipe.factor`), so that a run goes on
exactly where it stopped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import filter as matching
from fnmatch import fnmatchcase
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from whisper_moe.model.model import Output, WhisperMoEModel
from whisper_moe.model.moe import Experts
from whisper_moe.model.router import NONE, Routing
from whisper_moe.model.ttt import ExpertTTT
from whisper_moe.train.model_parallel import ExpertsOverRanks, local
from whisper_moe.train.reading import RecipeError
from whisper_moe.train.recipe import OptimisationRecipe
from whisper_moe.weights.files import listed
from whisper_moe.weights.parts import EMBEDDING, NEW_TOKENS

FAST = ("w1", "b1", "w2", "b2", "gamma", "beta", "tau", "gate_forward", "gate_backward")
"""Of a TTT layer: the start of the fast weights with their norm, and the gates."""


def names_of(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def unmatched(model: nn.Module, patterns: Iterable[str]) -> list[str]:
    """Patterns (shell style, ``decoder.*``) that no parameter's name matches."""
    return [pattern for pattern in patterns if not matching(names_of(model), pattern)]


def freeze(model: nn.Module, frozen: Sequence[str], trained: Sequence[str] = ()) -> None:
    """Parameters that a pattern of ``frozen`` matches, and none of ``trained``, stay as they are.

    Raises ``ValueError`` for a pattern that matches nothing, and if nothing is left to train.
    """
    names = names_of(model)
    for pattern in unmatched(model, (*frozen, *trained)):
        raise ValueError(f"no parameter is called {pattern!r}; there are {listed(names, 3)}")
    still = {name for pattern in frozen for name in matching(names, pattern)}
    still -= {name for pattern in trained for name in matching(names, pattern)}
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name not in still
    if len(still) == len(names):
        raise ValueError(f"nothing is left to train: every parameter matches {listed(frozen)}")


def build_optimizer(model: nn.Module, given: OptimisationRecipe, *, fused: bool = False) -> torch.optim.AdamW:
    """AdamW over what is not frozen. Every group carries its ``name`` and its ``peak`` rate, for :func:`set_rates`."""
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind, rate, decay = _group(name, parameter, given)
            group = {"params": [], "name": kind, "lr": rate, "peak": rate, "weight_decay": decay}
            groups.setdefault(kind, group)["params"].append(parameter)
    return adamw([*groups.values()], given.grokfast, betas=given.betas, eps=given.eps, fused=fused)


def _group(name: str, parameter: Tensor, given: OptimisationRecipe) -> tuple[str, float, float]:
    """What a parameter's group is called, its peak rate and its decay."""
    for own in given.groups:
        if fnmatchcase(name, own.pattern):
            return own.pattern, own.lr, own.weight_decay
    module, _, last = name.rpartition(".")
    if last in FAST or module.endswith(".rate"):
        return "ttt", given.ttt_lr, 0.0
    if ".router." in name:
        return "router", given.router_lr or given.lr, 0.0
    if name == NEW_TOKENS:
        return "new_tokens", given.new_token_lr or given.lr, 0.0
    # Biases and norms; of stacked experts the biases have two dimensions. Positions are embeddings.
    if parameter.ndim < 2 or last.endswith("bias") or last == "positions" or name == EMBEDDING:
        return "no_decay", given.lr, 0.0
    return "decay", given.lr, given.weight_decay


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


def precision_on(wanted: str, device: torch.device) -> str:
    """What ``auto`` is on this device. Raises :class:`RecipeError` for what the device has not."""
    if wanted == "auto":
        if device.type != "cuda":
            return "float32"
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    if wanted == "float16" and device.type == "cpu":
        raise RecipeError("optimisation.precision is float16, which needs a GPU; take bfloat16 or float32 on a CPU")
    return wanted


class LossScale:
    """float16's gradients are computed of a loss that is scaled up (arXiv 1710.03740, section 3.2); in other types, by 1.

    Halved where they overflow, which costs that step, doubled after 2,000 steps without. Decided on the norm of all
    gradients, so that all processes decide alike (torch's ``GradScaler`` asks each process for its own).
    """

    growth_steps = 2_000

    def __init__(self, *, enabled: bool) -> None:
        self.enabled, self.value, self.good = enabled, 65_536.0 if enabled else 1.0, 0

    def remove(self, parameters: Sequence[nn.Parameter]) -> None:
        """Undo the scale in the gradients."""
        for parameter in parameters if self.enabled else ():
            if parameter.grad is not None:
                parameter.grad /= self.value

    def grow(self) -> None:
        self.good += 1
        if self.enabled and self.good % self.growth_steps == 0:
            self.value *= 2

    def halve(self) -> bool:
        """Whether a smaller scale may help."""
        self.good = 0
        if self.value <= 1:
            return False
        self.value /= 2
        return True


# Gradients of a model that lies on many ranks


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, device: torch.device) -> Tensor:
    """Their norm over all ranks, each element counted once, however many ranks hold it; scaled down to ``max_norm``."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    squares = [local(g).detach().double().square().sum() / _holders(g) for g in gradients]
    total = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64, device=device)
    dist.all_reduce(total)
    norm = total.sqrt().float()
    if max_norm != float("inf"):
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            local(gradient).mul_(factor.to(gradient.dtype))
    return norm


def _holders(tensor: Tensor) -> int:
    """How many ranks have the same elements as this one."""
    world = dist.get_world_size()
    if not isinstance(tensor, DTensor):
        return world
    mesh = tensor.device_mesh
    parts = [mesh.size(i) for i, placement in enumerate(tensor.placements) if not isinstance(placement, Replicate)]
    return world // prod(parts)


class Rest:
    """Gradients that neither DDP nor FSDP2 exchanges, averaged over each one's group at the end of a backward pass.

    All at once and in one order: ranks need not agree in which order, or whether at all, theirs become ready. What starts
    it is the first gradient of anything that the model gave out.
    """

    def __init__(self, model: WhisperMoEModel, groups: Sequence[tuple[nn.Parameter, dist.ProcessGroup]]) -> None:
        self.exchanging, self._queued = True, False
        self._groups = [(p, group) for p, group in groups if p.requires_grad and group.size() > 1]
        if self._groups:
            model.register_forward_hook(self._watch)

    def _watch(self, _module: nn.Module, _inputs: object, output: Tensor | Output) -> None:
        outputs = (output,) if isinstance(output, Tensor) else (output.logits, output.states_TD, *output.depths)
        for tensor in outputs:
            if tensor.requires_grad:
                tensor.register_hook(self._queue)

    def _queue(self, _gradient: Tensor) -> None:
        if self.exchanging and not self._queued:
            self._queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self._exchange)  # pyright: ignore[reportAttributeAccessIssue]

    @torch.no_grad()
    def _exchange(self) -> None:
        self._queued = False
        for group in dict.fromkeys(group for _, group in self._groups):
            members = [parameter for parameter, own in self._groups if own is group]
            for parameter in members:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            parts = [local(parameter.grad) for parameter in members]  # pyright: ignore[reportArgumentType]
            flat = torch.cat([part.flatten() for part in parts])
            dist.all_reduce(flat, group=group)
            flat /= group.size()
            for part, mean in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
                part.copy_(mean.view_as(part))


class Use:
    """Which experts' parameters any rank used in a step.

    One process leaves what no segment chose without a gradient, and AdamW then leaves it alone. FSDP2 gives it zeros, with
    which AdamW would move it on, so that they are taken away again.
    """

    def __init__(self, model: WhisperMoEModel, device: torch.device) -> None:
        self._members: list[list[nn.Parameter]] = []
        for module in model.modules():
            if isinstance(module, ExpertTTT):
                for layer in module:
                    self._follow(layer, list(layer.parameters()))
            elif isinstance(module, (Experts, ExpertsOverRanks)):  # their last bias takes part for *none* too
                self._follow(module, [p for name, p in module.named_parameters() if name != "down_bias"])
        self._used = torch.zeros(len(self._members), device=device)

    def _follow(self, module: nn.Module, parameters: list[nn.Parameter]) -> None:
        place = len(self._members)
        self._members.append(parameters)

        def note(_module: nn.Module, inputs: tuple[object, ...]) -> None:
            chosen = inputs[1].experts != NONE if isinstance(inputs[1], Routing) else self._used.new_ones(1)
            self._used[place] += chosen.any()

        module.register_forward_pre_hook(note)

    def forget_unused(self) -> None:
        """To be called once a step, between the passes and the update."""
        if self._members:
            dist.all_reduce(self._used)
            for used, parameters in zip(self._used.tolist(), self._members, strict=True):
                for parameter in () if used else parameters:
                    parameter.grad = None
            self._used.zero_()
