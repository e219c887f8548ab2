"""A fine-tune as a difference from its base: low-rank factors of every matrix, norms and biases in full, TTT layers whole.

Names are those of :class:`~whisper_moe.model.delta.LowRank` and its neighbours, without the dimension of experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from whisper_moe.config import ModelConfig, TTTConfig
from whisper_moe.model.ttt import TTTMLP
from whisper_moe.weights.checkpoint import Loaded
from whisper_moe.weights.parts import expected_shapes
from whisper_moe.weights.upcycle import upcycled_config

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
        if not experts or name == "up" or f"{layer}.weight" not in base:  # the norm of TTT layers: see with_ttt
            continue
        change = {kind: expert[k] - base[k] for kind in ("weight", "bias") if (k := f"{layer}.{kind}") in base}
        if name != "down":
            found[key] = change[name]
            continue
        down, up = low_rank(change["weight"].flatten(1), shape[1])
        bias = change.get("bias", torch.zeros(up.shape[1]))
        found[key], found[f"{layer}.experts.up"] = down, torch.cat([up, bias[None]])
    return {key: half if (half := tensor.half().float()).isfinite().all() else tensor for key, tensor in found.items()}


def with_ttt(model: Loaded, number: int, expert: Loaded) -> Loaded:
    """The model with the TTT layers of its expert ``number``, as they are.

    Who has none in a layer, the expert or another, gets one whose gates are 0. Raises ``ValueError`` for layers that the model
    cannot have beside the others'.
    """
    ttt, moe = _joined(model, number, expert.config.ttt), model.config.moe
    if ttt is None or moe is None:
        return model
    config, state = upcycled_config(model.config, ttt=ttt), dict(model.state)
    closed, brought = _closed(config, ttt), expert.config.ttt.encoder_layers if expert.config.ttt else ()
    ones = torch.ones(config.d_model)
    for layer in ttt.encoder_layers:
        own, norm = f"encoder.blocks.{layer}.ttt", f"encoder.blocks.{layer}.ttt_norm"
        for key, tensor in closed.items():
            for each in range(moe.n_experts):
                state.setdefault(f"{own}.{each}.{key}", tensor)
            if layer in brought:
                state[f"{own}.{number}.{key}"] = expert.state[f"{own}.{key}"]
        for key, start in (("weight", ones), ("bias", 0 * ones)):
            state.setdefault(f"{norm}.{key}", start)
            rows = state.get(f"{norm}.experts.{key}", start[:0].view(0, config.d_model))
            rows = torch.cat([rows, rows.new_zeros(moe.n_experts - len(rows), config.d_model)])
            if layer in brought:
                rows[number] = expert.state[f"{norm}.{key}"] - state[f"{norm}.{key}"]
            state[f"{norm}.experts.{key}"] = rows
    return replace(model, config=config, state=state)


def open_ttt(model: Loaded, experts: Sequence[int]) -> dict[int, list[int]]:
    """Encoder layer → which of these experts have a TTT layer there whose gates are not 0."""

    def is_open(layer: int, expert: int) -> bool:
        gate = f"encoder.blocks.{layer}.ttt.{expert}.gate_"
        return bool(model.state[f"{gate}forward"].any() or model.state[f"{gate}backward"].any())

    layers = model.config.ttt.encoder_layers if model.config.ttt else ()
    return {layer: [expert for expert in experts if is_open(layer, expert)] for layer in layers}


def _joined(model: Loaded, number: int, brought: TTTConfig | None) -> TTTConfig | None:
    """The layers of both, one for each expert."""
    before = model.config.ttt
    if brought is None or model.config.moe is None:
        return before
    names = model.config.moe.names
    if brought.decoder_layers:
        raise ValueError(
            f"{names[number]}: cannot be merged: it has TTT layers in its decoder {list(brought.decoder_layers)}, which "
            "differences have one of for all: --granularity model keeps it whole"
        )
    if before is None:
        return brought.model_copy(update={"per_expert": True})
    (own, others) = (f"mini_batch {ttt.mini_batch} and base_lr {ttt.base_lr}" for ttt in (brought, before))
    if own != others:
        whose = {expert for opened in open_ttt(model, range(number)).values() for expert in opened} or {0}
        raise ValueError(
            f"{names[number]}: cannot be merged: its TTT layers have {own}, those of {names[min(whose)]} {others}: "
            "--granularity model keeps each as it is"
        )
    layers = sorted({*before.encoder_layers, *brought.encoder_layers})
    return before.model_copy(update={"encoder_layers": tuple(layers)})


def _closed(config: ModelConfig, ttt: TTTConfig) -> dict[str, Tensor]:
    """A layer as it starts, which training can open; the same each time, and rounded, as it says nothing yet."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        heads = config.encoder_heads
        layer = TTTMLP(config.d_model, heads, mini_batch=ttt.mini_batch, base_lr=ttt.base_lr, causal=False)
    return {key: tensor.half().float() for key, tensor in layer.state_dict().items()}
