"""The feed-forwards of fine-tunes become the experts of one model, all else their average: a beginning to be trained on.

    python recipes/eight-experts/feed_forwards.py hindi=RUN swahili=RUN … -o OUT --probe hindi.tsv --probe swahili.tsv …

Experts, probes and base are those of ``whisper-moe merge``. The router reads what the merged encoder computes of the whole
window at ``--router-layer`` (2, as in ``upcycle``): shallow layers hear the microphone more than the words, a deeper one
leaves fewer layers to the experts. There is no *none*: merge the base as one more expert (``english=openai/whisper-base``,
with general speech as its probe). TTT layers are refused. What is written can be trained: ``model.source: OUT`` in a recipe,
with clips of all.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from whisper_moe.merge.build import ROUTER, fitted, told_of, unfitted
from whisper_moe.merge.doctor import Diagnosis
from whisper_moe.merge.run import accepted, base_of, check_languages, clips_of, language_of, named_experts, one_by_one
from whisper_moe.weights.checkpoint import Loaded, check_place, save_checkpoint
from whisper_moe.weights.parts import expected_shapes
from whisper_moe.weights.upcycle import as_expert


def merged_feed_forwards(
    base: Loaded,
    names: Sequence[str],
    experts: Iterable[Loaded],
    router_layer: int,
    average_scale: float = 1.0,
    *,
    shared: bool = False,
) -> Loaded:
    """Branch-Train-MiX (arXiv 2403.07816): each expert's feed-forwards in the routed layers; all else is one copy for all.

    That copy is W + ``average_scale`` · mean(W_e - W), the feed-forwards of unrouted layers included: 1 is the experts' average.
    ``shared``: a routed layer is ½ FFN + ½ Σ g_e FFN_e, the first the base's own; output weights are halved. There is no
    *none*: it would leave no feed-forward, or half of one. The base itself can be among the ``experts``.

    Raises ``ValueError`` for feed-forwards of two sizes, and for an expert with TTT layers.
    """
    hidden, own, top_k = base.config.encoder_ffn_dim, base.state, min(2, len(names))
    if base.config.decoder_ffn_dim != hidden:
        raise ValueError("feed-forwards of encoder and decoder must have one size")
    kind = {"granularity": "ffn", "expert_dim": hidden, "shared": shared, "none_choice": False}
    merged = unfitted(base, names, router_layer=router_layer, top_k=top_k, **kind)
    shapes = expected_shapes(merged.config)
    mixed = {key: torch.empty(shape) for key, shape in shapes.items() if ".experts." in key}
    routed = {key.partition(".experts.")[0] for key in mixed}
    kept = {key: tensor for key, tensor in own.items() if key.partition(".ffn.")[0] in routed}
    average = {key: own[key].clone() for key in own.keys() - kept.keys()}
    for number, expert in enumerate(experts):
        if expert.config.ttt:
            raise ValueError(
                f"{names[number]}: cannot be merged: experts that are feed-forwards have one norm for all their TTT layers, and "
                "it has one of its own: whisper-moe merge keeps it"
            )
        for key, stack in mixed.items():
            stack[number] = as_expert(key, expert.state)
        for key, tensor in average.items():
            tensor += average_scale / len(names) * (expert.state[key] - own[key])
    if shared:
        mixed = {key: tensor / 2 if "down" in key else tensor for key, tensor in (mixed | kept).items()}
    state = merged.state | average | mixed
    return replace(merged, state={key: state[key] for key in shapes})


def trainable(fit: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same choice by features of their own scale, as routers that are trained read them; *none* and moments left out.

    The rates and losses of training are then what they are for any router: the logit of the expert that a clip is for is
    nearer to 0 than to 1 / temperature, whose square the z-loss would take for large.
    """
    weight, intercept, temperature = fit["weight"][:-1], fit["intercept"][:-1], fit["temperature"]
    own = {"weight": weight / fit["scale"] / temperature, "intercept": (intercept - 1) / temperature}
    own |= {"scale": torch.ones_like(fit["scale"]), "temperature": torch.tensor(1.0), "reach": fit["reach"][:-1]}
    own |= {"moments": fit["moments"][:0, :1], "whitening": fit["whitening"][:0, :0]}
    return {**fit, **own}


def with_trainable_router(model: Loaded) -> Loaded:
    """The model whose router was fitted, as it can be trained on."""
    names = {key: key.removeprefix(ROUTER).removeprefix("fit.") for key in model.state if key.startswith(ROUTER)}
    found = trainable({name: model.state[key] for key, name in names.items()})
    return replace(model, state=model.state | {key: found[name] for key, name in names.items()})


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("experts", nargs="+", help="fine-tunes of one size: folders, Hub ids …; NAME=MODEL names one")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the folder to write")
    parser.add_argument("--probe", action="append", required=True, help="clips for each expert, in their order")
    parser.add_argument("--base", help="what they were made from; default: OpenAI's Whisper of their shape")
    parser.add_argument("--router-layer", type=int, default=2, help="encoder layers before the router's choice")
    parser.add_argument(
        "--average-scale", type=float, default=1.0, help="of the experts' mean difference from the base"
    )
    parser.add_argument("--shared", action="store_true", help="half of each layer is the base's own feed-forward")
    given = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    check_place(given.output, overwrite=False)
    experts = named_experts(given.experts)
    if len(given.probe) != len(experts):
        parser.error(f"{len(experts)} experts need {len(experts)} --probe, in order; got {len(given.probe)}")
    base, clips = base_of(experts, given.base), [list(clips_of(source)) for source in given.probe]
    for source, own in zip(given.probe, clips, strict=True):
        check_languages(source, own, base)
    found: list[Diagnosis] = []

    def models() -> Iterator[Loaded]:
        for diagnosis, expert in accepted(experts, base, [own[0][1] for own in clips]):
            found.append(diagnosis)
            yield expert

    each, scale = one_by_one(models()), given.average_scale
    merged = merged_feed_forwards(base, list(experts), each, given.router_layer, scale, shared=given.shared)
    model = with_trainable_router(fitted(merged, [[samples for _, samples in own] for own in clips]))
    for diagnosis, own in zip(found, clips, strict=True):
        model = told_of(model, diagnosis.name, language_of(diagnosis, own), untimed=diagnosis.untimed)
    save_checkpoint(given.output, model)


if __name__ == "__main__":
    main()
