"""LoRA adapters of a Whisper (arXiv 2106.09685, as PEFT saves them), merged into its weights: W + (α/r)·B·A."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from whisper_moe.config import problems
from whisper_moe.weights.files import CheckpointError, listed, read_json

_PREFIX = "base_model.model."
_HARMLESS = """auto_mapping bias ensure_weight_tying eva_config exclude_modules inference_mode layers_pattern
    layers_to_transform loftq_config lora_dropout lora_ga_config megatron_core modules_to_save peft_version
    qalora_group_size r rank_pattern runtime_config target_modules task_type""".split()
"""Further options that mean nothing after training. Any other that is set is refused."""
_A, _B = ".lora_A.weight", ".lora_B.weight"
_EMBEDDING, _HEAD = "model.decoder.embed_tokens.weight", "proj_out.weight"


class Adapter(BaseModel):
    """``adapter_config.json``: what merging goes by."""

    model_config = ConfigDict(frozen=True, strict=True, extra="allow", allow_inf_nan=False)

    peft_type: Literal["LORA"]
    base_model_name_or_path: str | None = None
    revision: str | None = None
    lora_alpha: float = 8
    alpha_pattern: dict[re.Pattern[str], float] | None = None
    use_rslora: bool = False
    init_lora_weights: Literal["gaussian", "eva", "orthogonal"] | bool | None = None
    """Those that leave the base model's own weights as they were."""

    @classmethod
    def read(cls, path: Path) -> Adapter:
        """Refuses, by name, what would not be merged rightly."""
        try:
            adapter = cls.model_validate(read_json(path))
        except ValidationError as error:
            raise CheckpointError(f"{path}: {problems(error)}; merge the adapter with PEFT first") from error
        if unknown := sorted(
            key for key, value in (adapter.model_extra or {}).items() if value and key not in _HARMLESS
        ):
            raise CheckpointError(f"{path}: {listed(unknown)} cannot be merged here; merge the adapter with PEFT first")
        return adapter

    def scaling(self, module: str, rank: int) -> float:
        """α/r, or α/√r (rank-stabilised, arXiv 2312.03732); the rank is the matrices' own."""
        patterns = (self.alpha_pattern or {}).items()
        fitting = (alpha for pattern, alpha in patterns if re.match(rf"(.*\.)?({pattern.pattern})$", module))
        return next(fitting, self.lora_alpha) / (rank**0.5 if self.use_rslora else rank)


def merge(base: Mapping[str, Tensor], deltas: Mapping[str, Tensor], adapter: Adapter, path: Path) -> dict[str, Tensor]:
    """transformers' float32 weights with the adapter merged in.

    ``deltas``: the tensors of ``adapter_model.safetensors`` at ``path``: pairs A, B of linear and convolution layers,
    and whole tensors that replace the base's (``modules_to_save``, trained biases). Raises ``CheckpointError`` for a pair that
    does not fit; other tensors that Whisper does not have are refused where the result is read. A trained token embedding
    is refused: merged, it would change the output projection too, which is the same matrix in Whisper.
    """
    merged = {key: tensor.to(torch.float32) for key, tensor in base.items()}
    rest = {_base_key(key): tensor.to(torch.float32) for key, tensor in deltas.items()}
    for key in [key for key in rest if key.endswith(_A)]:
        name = f"{key.removesuffix(_A)}.weight"
        a, b = rest.pop(key), rest.pop(key.replace(_A, _B), None)
        weight = None if name in (_EMBEDDING, _HEAD) else merged.get(name)
        if b is None or weight is None:
            raise CheckpointError(f"{path}: {key} has no {'partner B' if b is None else 'place in the base model'}")
        delta = _delta(a, b)
        if delta is None or delta.shape != weight.shape:
            said = f"A {list(a.shape)}, B {list(b.shape)} do not fit {list(weight.shape)}"
            raise CheckpointError(f"{path}: {name}: {said}")
        merged[name] = weight + delta * adapter.scaling(key.removesuffix(_A), a.shape[0])
    for key in (_EMBEDDING, _HEAD):
        if key in rest and not torch.equal(rest.pop(key), merged[_EMBEDDING]):
            raise CheckpointError(f"{path}: {key} is trained, but Whisper's embedding and output projection are one")
    return merged | rest


def _base_key(key: str) -> str:
    """The name that the base model has for a tensor that the adapter holds whole; pairs keep their A and B."""
    return key.removeprefix(_PREFIX).replace(".base_layer.", ".").replace(".modules_to_save.", ".")


def _delta(a: Tensor, b: Tensor) -> Tensor | None:
    """B·A as a weight; a convolution's A has its kernel, its B a kernel of one. None where they do not multiply."""
    if a.ndim < 2 or not len(a) or b.ndim != a.ndim or b.shape[1:] != (a.shape[0], *[1] * (a.ndim - 2)):
        return None
    return (b.flatten(1) @ a.flatten(1)).view(len(b), *a.shape[1:])
