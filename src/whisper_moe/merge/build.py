"""Eight fine-tunes and their base become one model that chooses among them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from whisper_moe.config import ModelConfig, MoEConfig
from whisper_moe.generate.decode import WindowDecoder
from whisper_moe.merge.differences import difference_of
from whisper_moe.merge.router import fit, heard
from whisper_moe.weights.checkpoint import Loaded
from whisper_moe.weights.parts import empty_model, expected_shapes

ROUTER = "encoder.router."
Clips = Sequence[np.ndarray]


def merged_delta(base: Loaded, names: Sequence[str], experts: Iterable[Loaded], rank: int) -> Loaded:
    """Each expert as low-rank differences from the base, one after the other; the router is still to be fitted."""
    merged = _unfitted(base, names, granularity="delta", delta_rank=rank, top_k=1)
    parts = [difference_of(base.state, expert.state, merged.config) for expert in experts]
    return replace(merged, state=merged.state | {key: torch.stack([part[key] for part in parts]) for key in parts[0]})


def merged_models(base: Loaded, names: Sequence[str], threshold: float) -> Loaded:
    """The base with a router that is still to be fitted; the experts stay whole."""
    return _unfitted(base, names, granularity="model", gate_threshold=threshold, top_k=min(2, len(names)))


def _unfitted(base: Loaded, names: Sequence[str], **settings: Any) -> Loaded:
    """The base, configured for these experts, and a router of zeros that reads its last layer."""
    layer = base.config.encoder_layers
    moe = MoEConfig(n_experts=len(names), router_layer=layer, fitted_router=True, expert_names=tuple(names), **settings)
    config = ModelConfig.model_validate(base.config.model_dump() | {"moe": moe})
    router = {key: torch.zeros(shape) for key, shape in expected_shapes(config).items() if key.startswith(ROUTER)}
    return replace(base, config=config, state=dict(base.state) | router)


def decoder_of(model: Loaded) -> WindowDecoder:
    """A model in float32, to listen with."""
    network = empty_model(model.config)
    network.load_state_dict(model.state, assign=True)
    return WindowDecoder(network.eval(), model.tokenizer, model.generation)


def fitted(model: Loaded, probes: Sequence[Clips], none: Clips = ()) -> Loaded:
    """The model with its router fitted to some clips of each expert, and of what none of them is for."""
    decoder = decoder_of(model)
    features = [heard(decoder, clips) for clips in (*probes, none) if len(clips)]
    if not len(none):
        features.append(features[0][:0])
    tensors: dict[str, Tensor] = fit(features)
    names = {"weight": f"{ROUTER}weight"} | {name: f"{ROUTER}fit.{name}" for name in tensors if name != "weight"}
    return replace(model, state=model.state | {names[name]: tensor for name, tensor in tensors.items()})
