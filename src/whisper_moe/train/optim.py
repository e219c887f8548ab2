"""What of a model is trained (freezing, low-rank differences), and from gradients to an update: AdamW with a group of its own for
everything that needs another rate; float16's loss scale.

A rate is a function of the step (:meth:`whisper_moe.train.recipe.OptimisationRecipe.factor`), so that a run goes on
exactly where it stopped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import filter as matching
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whisper_moe.train.reading import RecipeError
from whisper_moe.train.recipe import LoRARecipe, OptimisationRecipe
from whisper_moe.weights.files import listed
from whisper_moe.weights.parts import EMBEDDING, NEW_TOKENS, SPEECH

TRAINED = ("*.lora_a", "*.lora_b")
"""What low-rank fine-tuning trains."""
FAST = ("w1", "b1", "w2", "b2", "gamma", "beta", "tau", "gate_forward", "gate_backward")
"""Of a TTT layer: the start of the fast weights with their norm, and the gates."""


def unmatched(model: nn.Module, patterns: Iterable[str]) -> list[str]:
    """Patterns (shell style, ``decoder.*``) that no parameter's name matches."""
    names = [name for name, _ in model.named_parameters()]
    return [pattern for pattern in patterns if not matching(names, pattern)]


def freeze(model: nn.Module, frozen: Sequence[str], trained: Sequence[str] = ()) -> None:
    """Parameters that a pattern of ``frozen`` matches, and none of ``trained``, stay as they are.

    Raises ``ValueError`` for a pattern that matches nothing, and if nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in unmatched(model, (*frozen, *trained)):
        raise ValueError(f"no parameter is called {pattern!r}; there are {listed(names, 3)}")
    still = {name for pattern in frozen for name in matching(names, pattern)}
    still -= {name for pattern in trained for name in matching(names, pattern)}
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name not in still
    if len(still) == len(names):
        raise ValueError(f"nothing is left to train: every parameter matches {listed(frozen)}")


class LoRALinear(nn.Linear):
    """``x W^T + b + alpha/rank (x A^T) B^T`` (LoRA, arXiv 2106.09685): W stays as it is, and B A beside it learns.

    A matrix is never made of the three: ``x W^T`` gives its input a gradient and itself none, a third less work than training it.
    """

    lora_a: nn.Parameter
    """[rank, inputs]"""
    lora_b: nn.Parameter
    """[outputs, rank]"""
    scaling: float

    def forward(self, input: Tensor) -> Tensor:
        """[tokens, inputs] → [tokens, outputs]"""
        return torch.addmm(super().forward(input), F.linear(input, self.lora_a), self.lora_b.T, alpha=self.scaling)


def add_lora(model: nn.Module, given: LoRARecipe) -> None:
    """Give the targets among the linear layers A, at random, and B, of zeros, in place: the model computes what it did.

    TTT layers are no targets: they are new, and small enough to be trained whole; what speaks is none either. The
    differences of other senses stay beside them. Raises ``ValueError`` for a pattern that matches nothing.
    """
    layers = {path: each for path, each in model.named_modules() if type(each) is nn.Linear}
    layers = {path: each for path, each in layers.items() if ".ttt." not in path and not path.startswith(SPEECH)}
    for pattern in given.targets:
        if not any(fnmatchcase(path, pattern) for path in layers):
            raise ValueError(f"no linear layer is called {pattern!r}; there are {listed(layers, 3)}")
    for path, module in layers.items():
        if any(fnmatchcase(path, pattern) for pattern in given.targets):
            layer: Any = module
            layer.__class__ = LoRALinear  # the same layer, with its parameters, under the same name
            layer.scaling = given.scaling
            layer.lora_a = nn.Parameter(torch.empty(given.rank, layer.in_features))
            layer.lora_b = nn.Parameter(torch.zeros(layer.out_features, given.rank))
            nn.init.normal_(layer.lora_a, std=layer.in_features**-0.5)


def folded(state: Mapping[str, Tensor], given: LoRARecipe) -> dict[str, Tensor]:
    """A state without A and B, which are added to W."""
    plain = dict(state)
    for name in [name for name in state if name.endswith(".lora_a")]:
        layer = name.removesuffix("lora_a")
        a, b = plain.pop(name), plain.pop(f"{layer}lora_b")
        plain[f"{layer}weight"] = plain[f"{layer}weight"] + given.scaling * (b @ a)
    return plain


def build_optimizer(model: nn.Module, given: OptimisationRecipe, *, fused: bool = False) -> torch.optim.AdamW:
    """AdamW over what is not frozen. Every group carries its ``name`` and its ``peak`` rate, for :func:`set_rates`."""
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind, rate, decay = _group(name, parameter, given)
            group = {"params": [], "name": kind, "lr": rate, "peak": rate, "weight_decay": decay}
            groups.setdefault(kind, group)["params"].append(parameter)
    return torch.optim.AdamW([*groups.values()], betas=given.betas, eps=given.eps, fused=fused)


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


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Each group's rate is its peak times ``factor``."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor


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
