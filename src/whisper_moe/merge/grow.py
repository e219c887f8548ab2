"""A merged model gains an expert, or loses one; what the others answer stays, as far as the router's choice stays.

Old columns of the router, its temperature and the others' reach are not touched; the moments of the old experts' clips stand
for the clips, which nobody needs again. A new expert is one more file; the base and the others are written as they were.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from whisper_moe.config import ModelConfig, MoEConfig
from whisper_moe.merge.build import ROUTER, decoder_of, told_of
from whisper_moe.merge.differences import difference_of, open_ttt, with_ttt
from whisper_moe.merge.router import columns, heard, lifted, moments_of, reach_of
from whisper_moe.weights.checkpoint import Loaded
from whisper_moe.weights.files import listed
from whisper_moe.weights.parts import expected_shapes, quantizable
from whisper_moe.weights.upcycle import upcycled_config

_BY_CHOICE = ("weight", "fit.intercept", "fit.moments", "fit.reach")
"""The router's tensors that have a row for each choice."""


def merged_config(model: Loaded) -> MoEConfig:
    """Raises ``ValueError`` for what was not made by merging."""
    moe = model.config.moe
    if moe is None or not moe.fitted_router:
        raise ValueError(
            f"{model.name}: no merged model: its experts are not chosen by a router that was fitted to clips"
        )
    return moe


def _separable(model: Loaded) -> MoEConfig:
    """Raises ``ValueError`` where experts share what another one would change."""
    moe = merged_config(model)
    if moe.granularity == "ffn":
        raise ValueError(
            f"{model.name}: all but the feed-forwards is the average of its experts ({', '.join(moe.names)}), which another "
            "one would change: merge them all again"
        )
    return moe


def with_expert(model: Loaded, base: Loaded, name: str, expert: Loaded, clips: Sequence[np.ndarray]) -> Loaded:
    """The model with one expert more, before *none*. ``base``: what the expert was made from, not rounded to int8."""
    moe = _separable(model)
    if name in moe.names:
        raise ValueError(f"{model.name}: has an expert {name} already: {', '.join(moe.names)}")
    place, config = moe.n_experts, _with_names(model.config, moe, (*moe.names, name))
    state = dict(model.state)
    if moe.granularity == "delta":
        rest = {key: tensor for key, tensor in base.state.items() if not quantizable(key)}
        if other := [key for key, tensor in rest.items() if not torch.equal(tensor, state.get(key, tensor[:0]))]:
            raise ValueError(
                f"{model.name}: its base is not {base.name}, of other numbers in {listed(other)}: --base names it"
            )
        for key, tensor in difference_of(base.state, expert.state, config).items():
            state[key] = torch.cat([state[key], tensor[None]])
        grown = with_ttt(replace(model, config=config, state=state), place, expert)
        config, state = grown.config, grown.state
    router = {key: state[f"{ROUTER}{key}"] for key in _BY_CHOICE}
    centre, scale = (state[f"{ROUTER}fit.{key}"].double() for key in ("centre", "scale"))
    features = (heard(decoder_of(model), clips) - centre) / scale
    before = router["fit.moments"].double()
    old = torch.cat([router["fit.intercept"][:, None], router["weight"]], 1).double()
    router["fit.moments"] = _inserted(before, place, moments_of(features.flatten(0, 1))).float()
    column = columns(router["fit.moments"].double(), [place])[0]
    solved = lifted(column, old, features.flatten(0, 1), before).float()
    router["weight"] = _inserted(router["weight"], place, solved[1:])
    router["fit.intercept"] = _inserted(router["fit.intercept"], place, solved[0])
    reach = reach_of(features, state[f"{ROUTER}fit.whitening"].double(), router["fit.reach"][:place])
    router["fit.reach"] = _inserted(router["fit.reach"], place, reach)
    return replace(model, config=config, state=state | {f"{ROUTER}{key}": tensor for key, tensor in router.items()})


def without_expert(model: Loaded, name: str) -> Loaded:
    """The model without one of its experts."""
    moe = _separable(model)
    if name not in moe.names or moe.n_experts == 1:
        raise ValueError(f"{model.name}: cannot lose {name}: its experts are {', '.join(moe.names)}")
    place = moe.names.index(name)
    keep = [index for index in range(moe.n_experts) if index != place]
    config = _with_names(model.config, moe, tuple(moe.names[index] for index in keep))
    if config.ttt:  # layers that it alone had go with it
        layers = tuple(layer for layer, experts in open_ttt(model, keep).items() if experts)
        ttt = config.ttt.model_copy(update={"encoder_layers": layers}) if layers else None
        config = upcycled_config(config, ttt=ttt)
    state: dict[str, Tensor] = {}
    for key in expected_shapes(config):
        tensor = model.state[re.sub(r"(?<=\.ttt\.)\d+", lambda number: str(keep[int(number[0])]), key)]
        state[key] = tensor[keep] if ".experts." in key else tensor
    choices = [*keep, moe.n_experts]
    state |= {f"{ROUTER}{key}": state[f"{ROUTER}{key}"][choices] for key in _BY_CHOICE}
    experts = tuple(path for index, path in enumerate(model.experts) if index != place)
    return replace(told_of(model, name), config=config, state=state, experts=experts)


def moved_choices(before: Mapping[str, Tensor], after: Loaded, name: str) -> list[str]:
    """The old experts whose clips, on the mean, now go to the new one."""
    moe, weight = merged_config(after), after.state[f"{ROUTER}weight"]
    moments = before[f"{ROUTER}fit.moments"]
    means = moments[:, 0, 1:] / moments[:, 0, :1].clamp_min(1)
    best = (means @ weight.T + after.state[f"{ROUTER}fit.intercept"]).argmax(1).tolist()
    new = moe.names.index(name)
    return [old for old, choice in zip((*moe.names[:new], "none"), best, strict=True) if choice == new]


def _with_names(config: ModelConfig, moe: MoEConfig, names: tuple[str, ...]) -> ModelConfig:
    top_k = min(2, len(names)) if moe.granularity == "model" else 1
    changed = moe.model_dump() | {"n_experts": len(names), "expert_names": names, "top_k": top_k}
    return ModelConfig.model_validate(config.model_dump() | {"moe": changed})


def _inserted(rows: Tensor, place: int, row: Tensor) -> Tensor:
    return torch.cat([rows[:place], row[None], rows[place:]])
