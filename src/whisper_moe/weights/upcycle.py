"""A dense Whisper becomes a mixture of experts that computes the same function (sparse upcycling, arXiv 2212.05055).

With a shared expert, Whisper's own feed-forward stays and the routed experts start with an output of exactly zero. Without one,
every expert is a copy of the feed-forward, and gates that sum to one add up to it. TTT layers start behind closed gates.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from whisper_moe.config import POSITIONS_PER_SECOND, AdaptConfig, ConformerConfig, ModelConfig, MoEConfig, TTTConfig
from whisper_moe.model.model import WhisperMoEModel
from whisper_moe.weights.checkpoint import load_checkpoint, read_manifest
from whisper_moe.weights.files import CheckpointError, listed
from whisper_moe.weights.parts import ADAPT, empty_model, expected_shapes, part_of

_TOLERANCE = {"float32": 1e-3, "int8": 0.3}
"""Of the largest logit: what a model that was written may differ by."""


def upcycled_config(config: ModelConfig, *, moe: MoEConfig | None, ttt: TTTConfig | None) -> ModelConfig:
    """The configuration with these parts, built anew rather than copied: so they are checked against each other.

    Raises ``ValueError`` where they do not fit.
    """
    return ModelConfig.model_validate(config.model_dump() | {"moe": moe, "ttt": ttt})


def upcycle(
    config: ModelConfig,
    state: Mapping[str, Tensor],
    *,
    moe: MoEConfig | None,
    ttt: TTTConfig | None = None,
    seed: int = 0,
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Add ``moe`` and ``ttt`` to a dense model; returns the new configuration and state.

    ``seed`` is of the parts that are new (experts' first halves, router, TTT). Raises ``ValueError`` if ``config`` is not
    dense, if ``state`` is not what it describes, or if copies are asked for (no shared expert) in a size that is not the
    feed-forward's.
    """
    if config.moe is not None or config.ttt is not None:
        raise ValueError("only a dense Whisper can be upcycled; this model has experts or TTT layers already")
    shapes = expected_shapes(config)
    wrong = sorted(k for k in shapes.keys() | state.keys() if k not in state or tuple(state[k].shape) != shapes.get(k))
    if wrong:  # What is missing would otherwise stay random.
        raise ValueError(f"these weights are not those of the configuration: {listed(wrong)}")
    if moe is not None and not moe.shared:
        for side, hidden in (("encoder", config.encoder_ffn_dim), ("decoder", config.decoder_ffn_dim)):
            if moe.expert_dim != hidden:
                raise ValueError(
                    f"without a shared expert, each expert is a copy of the {side}'s feed-forward of {hidden} hidden units; "
                    f"expert_dim is {moe.expert_dim}"
                )
    upcycled = upcycled_config(config, moe=moe, ttt=ttt)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        new = WhisperMoEModel(upcycled).state_dict()
    new |= {key: tensor for key, tensor in state.items() if key in new}  # the rest are feed-forwards to copy
    if moe is not None and not moe.shared:
        _copy_into_experts(new, state, moe.n_experts)
    return upcycled, new


def answer(config: ModelConfig, state: Mapping[str, Tensor]) -> Tensor:
    """[n, source's vocabulary]: what a model says of a second of noise, to compare it with another form of itself."""
    model = empty_model(config).eval()
    model.load_state_dict(state, assign=True)
    frames = 2 * min(POSITIONS_PER_SECOND, config.max_source_positions)
    mel = torch.randn(config.n_mels, frames, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return model([mel], [torch.arange(4)])[:, : config.source_vocab_size]


def read_back(directory: Path, expected: Tensor) -> float:
    """Load a checkpoint that was just written; how far its :func:`answer` is from the one ``expected``, at most.

    Raises ``CheckpointError`` for a file that is not what was written, and for a model that is not the one it should be: by more
    than rounding, or, where it is stored as int8, by more than that may cost.
    """
    written = load_checkpoint(directory)
    bits = read_manifest(directory).quantization or "float32"
    found = answer(written.config, written.state)
    difference, scale = float((found - expected).abs().max()), float(expected.abs().max())
    if not difference <= _TOLERANCE[bits] * scale:  # NaN is no small number
        raise CheckpointError(
            f"{directory}: do not use it: read back, its logits of a second of noise, up to {scale:.3g}, differ from the "
            f"source's by {difference:.2g}; {bits} may cost {_TOLERANCE[bits] * scale:.2g}"
        )
    return difference


def _copy_into_experts(new: dict[str, Tensor], dense: Mapping[str, Tensor], n_experts: int) -> None:
    """Every expert gets the feed-forward that it replaces: [E, F, D] from up [F, D] and from down [D, F], transposed."""
    for key in [key for key in new if ".experts." in key]:
        block, name = key.split(".experts.")
        half, kind = name.split("_")
        source = dense[f"{block}.ffn.{half}.{kind}"]
        source = source.T if name == "down_weight" else source
        new[key] = source.expand(n_experts, *source.shape).clone()


def add_parts(
    config: ModelConfig,
    state: Mapping[str, Tensor],
    *,
    adapt: AdaptConfig | None = None,
    conformer: ConformerConfig | None = None,
    seed: int = 0,
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Put parts beside a core, with experts or without, that are always on; the function stays the same, exactly.

    ``seed`` is of what starts at random behind a closed gate. Raises ``ValueError`` if the model has such a part already.
    """
    wanted = {name: part for name, part in (("adapt", adapt), ("conformer", conformer)) if part is not None}
    for name in wanted:
        if getattr(config, name) is not None:
            raise ValueError(f"the model has {name} already: what it has can be trained on, not added a second time")
    extended = ModelConfig.model_validate(config.model_dump() | wanted)
    without = {"moe": None, "ttt": None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = WhisperMoEModel(ModelConfig.model_validate(extended.model_dump() | without)).state_dict()
    return extended, dict(state) | {
        key: fresh[key] for key in fresh if part_of(key, extended) == ADAPT and key not in state
    }
