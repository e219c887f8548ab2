"""Low-rank fine-tuning (LoRA, arXiv 2106.09685): W stays as it is, and B A beside it learns.

A matrix is never made of the three: ``x W^T`` gives its input a gradient and itself none, a third less work than training it.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whisper_moe.train.recipe import LoRARecipe
from whisper_moe.weights.files import listed
from whisper_moe.weights.parts import SPEECH

TRAINED = ("*.lora_a", "*.lora_b")


class LoRALinear(nn.Linear):
    """``x W^T + b + alpha/rank (x A^T) B^T``."""

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

    TTT layers are no targets: they are new, and small enough to be trained whole; what speaks is none either. Raises
    ``ValueError`` for a pattern that matches nothing.
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
            layer.lora_a = nn.Parameter(torch.empty(given.rank, module.in_features))
            layer.lora_b = nn.Parameter(torch.zeros(module.out_features, given.rank))
            nn.init.normal_(layer.lora_a, std=module.in_features**-0.5)


def folded(state: Mapping[str, Tensor], given: LoRARecipe) -> dict[str, Tensor]:
    """A state without A and B, which are added to W."""
    plain = dict(state)
    for name in [name for name in state if name.endswith(".lora_a")]:
        layer = name.removesuffix("lora_a")
        a, b = plain.pop(name), plain.pop(f"{layer}lora_b")
        plain[f"{layer}weight"] = plain[f"{layer}weight"] + given.scaling * (b @ a)
    return plain
