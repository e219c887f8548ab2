"""A fine-tune as a difference from its base: low-rank factors of every matrix, norms and biases in full.

Names are those of :class:`~whisper_moe.model.delta.LowRank` and its neighbours, without the dimension of experts.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from whisper_moe.config import ModelConfig
from whisper_moe.weights.parts import expected_shapes

State = Mapping[str, Tensor]


def low_rank(difference_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors down [r, I] and up [r, O] whose product upᵀ down is nearest to the difference (Eckart and Young, 1936).

    The eigenvectors U of the smaller Gram matrix, in float64, are one factor; what the difference is in their terms is the other,
    so an error in U does not add to the product's. Rows beyond the matrix's own rank are 0.
    """
    d = difference_OI.double()
    outputs, inputs = d.shape
    kept = min(rank, outputs, inputs)
    down, up = d.new_zeros(rank, inputs), d.new_zeros(rank, outputs)
    if outputs <= inputs:
        up[:kept] = torch.linalg.eigh(d @ d.T)[1].flip(1).T[:kept]
        down[:kept] = up[:kept] @ d
    else:
        down[:kept] = torch.linalg.eigh(d.T @ d)[1].flip(1).T[:kept]
        up[:kept] = (d @ down[:kept].T).T
    return down.float(), up.float()


def spectrum(difference_OI: Tensor) -> Tensor:
    """Squared singular values, largest first, float64."""
    d = difference_OI.double()
    gram = d @ d.T if d.shape[0] <= d.shape[1] else d.T @ d
    return torch.linalg.eigvalsh(gram).flip(0).clamp_min(0)


def difference_of(base: State, expert: State, config: ModelConfig) -> dict[str, Tensor]:
    """One expert's tensors for a model of granularity ``delta``; ``config`` is that model's.

    They are rounded to float16, in which they are stored: an error of 0.05 % of the difference. What that cannot hold stays.
    """
    assert config.moe is not None
    found: dict[str, Tensor] = {}
    for key, shape in expected_shapes(config).items():
        layer, experts, name = key.rpartition(".experts.")
        if not experts or name == "up":
            continue
        change = {kind: expert[k] - base[k] for kind in ("weight", "bias") if (k := f"{layer}.{kind}") in base}
        if name != "down":
            found[key] = change[name]
            continue
        down, up = low_rank(change["weight"].flatten(1), shape[1])
        bias = change.get("bias", torch.zeros(up.shape[1]))
        found[key], found[f"{layer}.experts.up"] = down, torch.cat([up, bias[None]])
    return {key: half if (half := tensor.half().float()).isfinite().all() else tensor for key, tensor in found.items()}
