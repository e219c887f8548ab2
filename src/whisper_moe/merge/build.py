"""Eight fine-tunes and their base become one model that chooses among them, which can gain an expert or lose one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from whisper_moe.config import ModelConfig, MoEConfig, TTTConfig
from whisper_moe.generate.decode import WindowDecoder
from whisper_moe.merge.router import columns, fit, heard, lifted, moments_of, reach_of
from whisper_moe.model.router import Router
from whisper_moe.model.ttt import TTTMLP
from whisper_moe.weights.checkpoint import Loaded
from whisper_moe.weights.files import listed
from whisper_moe.weights.parts import SENSES, expected_shapes, frozen_model, quantizable
from whisper_moe.weights.tokens import EXPERT_LANGUAGES, EXPERT_SOURCES, UNTIMED_EXPERTS
from whisper_moe.weights.upcycle import upcycled_config

ROUTER = "encoder.router."
_BY_CHOICE = ("weight", "fit.intercept", "fit.moments", "fit.reach")
"""The router's tensors that have a row for each choice."""
Clips = Sequence[np.ndarray]


def merged_delta(base: Loaded, names: Sequence[str], experts: Iterable[Loaded], rank: int) -> Loaded:
    """Each expert, one after the other, as low-rank differences from the base and its own TTT layers; no router is fitted yet."""
    merged = unfitted(base, names, granularity="delta", delta_rank=rank, top_k=1)
    parts: list[dict[str, Tensor]] = []
    for number, expert in enumerate(experts):
        merged = with_ttt(merged, number, expert)
        parts.append(difference_of(base.state, expert.state, merged.config))
    return replace(merged, state=merged.state | {key: torch.stack([part[key] for part in parts]) for key in parts[0]})


def merged_models(base: Loaded, names: Sequence[str], threshold: float) -> Loaded:
    """The base with a router that is still to be fitted; the experts stay whole."""
    return unfitted(base, names, granularity="model", gate_threshold=threshold, top_k=min(2, len(names)))


def unfitted(base: Loaded, names: Sequence[str], **settings: Any) -> Loaded:
    """The base, configured for these experts, and a new router; by default it reads the last layer."""
    settings = {"router_layer": base.config.encoder_layers} | settings
    moe = MoEConfig(n_experts=len(names), fitted_router=True, expert_names=tuple(names), **settings)
    config = upcycled_config(base.config, moe=moe)
    router = {f"{ROUTER}{key}": tensor for key, tensor in Router(config.d_model, moe).state_dict().items()}
    return replace(base, config=config, state=dict(base.state) | router)


def told_of(model: Loaded, name: str, language: str | None = None, *, untimed: bool = False) -> Loaded:
    """The model in which an expert answers in one language (None: in what is heard), and has lost timestamps or not."""
    languages = {key: code for key, code in model.generation.get(EXPERT_LANGUAGES, {}).items() if key != name}
    experts = [key for key in model.generation.get(UNTIMED_EXPERTS, ()) if key != name]
    known = {EXPERT_LANGUAGES: languages | ({name: language} if language else {})}
    if sources := model.generation.get(EXPERT_SOURCES):
        known |= {EXPERT_SOURCES: {key: said for key, said in sources.items() if key != name}}
    known |= {UNTIMED_EXPERTS: [*experts, name] if untimed else experts}
    return replace(model, generation=model.generation | known)


def decoder_of(model: Loaded) -> WindowDecoder:
    """A model in float32, to listen with."""
    return WindowDecoder(frozen_model(model.config, model.state), model.tokenizer, model.generation)


def fitted(
    model: Loaded, probes: Sequence[Clips], none: Clips = (), margins: Sequence[float | None] = (None,)
) -> Loaded:
    """The model with its router fitted to some clips of each expert, and of what none of them is for; see :func:`heard`."""
    decoder = decoder_of(model)
    features = [heard(decoder, clips, margins) for clips in (*probes, none) if len(clips)]
    if not len(none):
        features.append(features[0][:0])
    tensors: dict[str, Tensor] = fit(features)
    moe = model.config.moe
    if moe and moe.granularity == "ffn":  # no further expert is fitted beside feed-forwards
        tensors = tensors | {"moments": tensors["moments"][:, :1]}
    names = {"weight": f"{ROUTER}weight"} | {name: f"{ROUTER}fit.{name}" for name in tensors if name != "weight"}
    return replace(model, state=model.state | {names[name]: tensor for name, tensor in tensors.items()})


# One expert more, or one less: what the others answer stays, as far as the router's choice stays. Old columns of the router, its
# temperature and the others' reach are not touched; the moments of the old experts' clips stand for the clips, which nobody needs
# again. A new expert is one more file; the base and the others are written as they were.


def _separable(model: Loaded) -> MoEConfig:
    """Raises ``ValueError`` for what was not made by merging, and where no further expert can be fitted beside the others."""
    moe = model.config.moe
    if moe is None or not moe.fitted_router:
        raise ValueError(
            f"{model.name}: no merged model: its experts are not chosen by a router that was fitted to clips"
        )
    if moe.granularity == "ffn":
        raise ValueError(
            f"{model.name}: its experts ({', '.join(moe.names)}) are feed-forwards: make it again from all"
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
        state[key] = tensor[keep] if ".experts." in key and not key.startswith(SENSES) else tensor
    choices = [*keep, moe.n_experts]
    state |= {f"{ROUTER}{key}": state[f"{ROUTER}{key}"][choices] for key in _BY_CHOICE}
    experts = tuple(path for index, path in enumerate(model.experts) if index != place)
    return replace(told_of(model, name), config=config, state=state, experts=experts)


def _with_names(config: ModelConfig, moe: MoEConfig, names: tuple[str, ...]) -> ModelConfig:
    top_k = min(2, len(names)) if moe.granularity == "model" else 1
    changed = moe.model_dump() | {"n_experts": len(names), "expert_names": names, "top_k": top_k}
    return upcycled_config(config, moe=changed)


def _inserted(rows: Tensor, place: int, row: Tensor) -> Tensor:
    return torch.cat([rows[:place], row[None], rows[place:]])


# A fine-tune as a difference from its base: low-rank factors of every matrix, norms and biases in full, TTT layers whole.
# Names are those of :class:`~whisper_moe.model.delta.LowRank` and its neighbours, without the dimension of experts.


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


def difference_of(base: Mapping[str, Tensor], expert: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
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
