"""Losses of one pass, each a sum that is divided by a whole step's totals: passes and processes simply add up. And from their
gradients to an update: AdamW with a group of its own for everything that needs another rate, and float16's loss scale.

- Cross-entropy over the label tokens (-100 is ignored), divided by all label tokens of the step.
- Router: balance loss (Switch, arXiv 2101.03961, section 2.2, for top-k) and z-loss (ST-MoE, arXiv 2202.08906, section 4)
  per layer.

*None* is a choice like an expert here. A router whose rows all take *none* therefore still gets a gradient, although
gates that are all *none*'s give it none: no other loss would ever bring it back.

A rate is a function of the step (:meth:`whisper_moe.train.recipe.OptimisationRecipe.factor`), so that a run goes on exactly
where it stopped.

N rows (segments, or one layer's tokens), C choices (experts, and *none* last), K slots, T tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import filter as matching
from fnmatch import fnmatchcase
from hashlib import blake2b
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whisper_moe.config import ModelConfig
from whisper_moe.data.examples import IGNORED, Pack
from whisper_moe.model.model import Output, WhisperMoEModel
from whisper_moe.model.router import NONE, Routing, at_least_float32
from whisper_moe.packing import Layout
from whisper_moe.train.parallel import Parallel
from whisper_moe.train.reading import RecipeError
from whisper_moe.train.recipe import LossRecipe, OptimisationRecipe, Sense
from whisper_moe.weights.files import listed
from whisper_moe.weights.parts import EMBEDDING, NEW_TOKENS

FAST = ("w1", "b1", "w2", "b2", "gamma", "beta", "tau", "gate_forward", "gate_backward")
"""Of a TTT layer: the start of the fast weights with their norm, and the gates."""


@dataclass(frozen=True)
class Totals:
    """What a step's losses are divided by: its label tokens and segments, of all passes and processes."""

    tokens: float
    segments: float


@dataclass(frozen=True)
class Terms:
    """The losses of one pass, shares of the step's."""

    loss: Tensor
    """What gradients are taken of."""
    parts: dict[str, Tensor]
    """Its parts before their factors, detached; ``balance`` and ``z`` are means over the routers."""
    counts: Tensor
    """[routers, C]: slots that went to each choice, in all processes; [0, 0] without experts."""

    def __add__(self, other: Terms) -> Terms:
        parts = {name: self.parts.get(name, 0) + other.parts.get(name, 0) for name in self.parts | other.parts}
        return Terms(self.loss + other.loss, parts, self.counts + other.counts)  # pyright: ignore[reportArgumentType]


def weighed(parts: dict[str, Tensor], factors: Mapping[str, float], model: nn.Module) -> Terms:
    """The parts with their factors; without any, a loss that moves nothing."""
    idle = [0.0 * parameter.sum() for parameter in model.parameters() if parameter.requires_grad] if not parts else []
    loss = torch.stack([*idle, *(factors[name] * part for name, part in parts.items())]).sum()
    return Terms(loss, {name: part.detach() for name, part in parts.items()}, torch.zeros(0, 0))


def cross_entropy(
    logits_TV: Tensor, labels_T: Tensor, *, smoothing: float = 0.0, weights_T: Tensor | None = None
) -> Tensor:
    """The sum over all tokens that have a label, in at least float32. ``smoothing``: weight of a uniform target."""
    given = {"ignore_index": IGNORED, "label_smoothing": smoothing}
    if weights_T is None:
        return F.cross_entropy(at_least_float32(logits_TV), labels_T, reduction="sum", **given)
    return (F.cross_entropy(at_least_float32(logits_TV), labels_T, reduction="none", **given) * weights_T).sum()


def sampled(labels_T: Tensor, vocabulary: int, many: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Some tokens that stand for all, [C]: those that are labels, and ``many`` of the others; the labels among them, [T]; and
    the logarithm of how many tokens each stands for, [C] (sampled softmax, arXiv 1412.2007).
    """
    device, said = labels_T.device, labels_T[labels_T != IGNORED].unique()
    others = torch.ones(vocabulary, dtype=torch.bool, device=device).index_fill(0, said, False).nonzero()[:, 0]
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))[:many]
    among, shift = torch.cat([said, others[order.to(device)]]), torch.zeros(len(said) + len(order), device=device)
    shift[len(said) :] = math.log(len(others) / max(len(order), 1))
    places = torch.searchsorted(said, labels_T).masked_fill(labels_T == IGNORED, IGNORED)
    return among, places, shift


def sampled_cross_entropy(
    logits_TC: Tensor,
    labels_T: Tensor,
    shift_C: Tensor,
    *,
    smoothing: float = 0.0,
    weights_T: Tensor | None = None,
) -> Tensor:
    """:func:`cross_entropy` of all tokens, by those that :func:`sampled` drew."""
    said = labels_T != IGNORED
    logits_TC, labels_T = at_least_float32(logits_TC[said]), labels_T[said]
    whole_T = (logits_TC + shift_C).logsumexp(-1)
    own_T, counts_C = logits_TC.gather(1, labels_T[:, None])[:, 0], shift_C.exp().to(logits_TC.dtype)
    mean_T = logits_TC @ counts_C / counts_C.sum()
    loss_T = whole_T - (1 - smoothing) * own_T - smoothing * mean_T
    return (loss_T if weights_T is None else loss_T * weights_T[said]).sum()


def divergence(logits_TV: Tensor, wanted_TV: Tensor) -> Tensor:
    """The sum over tokens of KL(wanted ‖ found)."""
    wanted = at_least_float32(wanted_TV).log_softmax(-1)
    return F.kl_div(at_least_float32(logits_TV).log_softmax(-1), wanted, reduction="sum", log_target=True)


def choice_counts(routing: Routing) -> Tensor:
    """[C] float32: how many slots went to each expert and, if it can be chosen, to *none*."""
    assert routing.logits is not None
    choices = routing.logits.shape[1]
    slots = torch.where(routing.experts == NONE, choices - 1, routing.experts)
    return torch.bincount(slots.flatten(), minlength=choices).float()


def balance_loss(routing: Routing, counts: Tensor) -> Tensor:
    """(C / K) Σ_c f_c P_c: 1 where every choice gets its part, C / K where K experts get all, C where *none* does.

    ``counts`` [C]: :func:`choice_counts` summed over all processes. f_c is the mean number of slots of a row that go to c,
    P_c the mean probability; of this process's rows, so that the processes' results add up.
    """
    assert routing.logits is not None
    slots = routing.experts.shape[1]
    rows = (counts.sum() / slots).clamp_min(1)
    probability = routing.logits.softmax(dim=1).sum(dim=0) / rows
    return len(counts) / slots * (counts / rows * probability).sum()


def z_loss(routing: Routing, counts: Tensor) -> Tensor:
    """The mean of logsumexp², which keeps logits small; processes add up as in :func:`balance_loss`."""
    assert routing.logits is not None
    rows = (counts.sum() / routing.experts.shape[1]).clamp_min(1)
    return routing.logits.logsumexp(dim=1).square().sum() / rows


def router_terms(
    routings: Sequence[Routing],
    share: float,
    given: LossRecipe,
    everywhere: Callable[[Tensor], Tensor],
    *,
    real: bool = True,
) -> tuple[Tensor | float, dict[str, Tensor], Tensor]:
    """Loss, parts and counts of one pass's routers. ``share``: the pass's part of the step's segments.

    ``everywhere`` sums over processes; ``real`` is False for a placeholder, which counts for nothing. The losses of
    several layers are added, as in Switch: opposite imbalances of two layers cannot cancel.

    With accumulation a step's balance loss is the mean of its passes' own, weighted by their segments: a mean of products
    f_c P_c, not the product of means that one big batch has. Each pass is asked to be balanced, which is more than that the
    step is. Exact would be a second forward pass, for f_c is known only once all passes have routed.
    """
    if not routings:
        return 0.0, {}, torch.zeros(0, 0)
    counts = everywhere(torch.stack([choice_counts(routing) for routing in routings]) * real)
    share *= real
    balance = torch.stack([balance_loss(*pair) for pair in zip(routings, counts, strict=True)]) * share
    z = torch.stack([z_loss(*pair) for pair in zip(routings, counts, strict=True)]) * share
    loss = (given.balance if given.balancing == "loss" else 0.0) * balance.sum() + given.z * z.sum()
    return loss, {"balance": balance.mean().detach(), "z": z.mean().detach()}, counts


@dataclass(frozen=True)
class SpeechObjective:
    """Cross-entropy of what is said, and the routers' losses."""

    given: LossRecipe

    def totals(self, packs: Sequence[Pack]) -> Totals:
        labelled = sum(int((pack.labels_T != IGNORED).sum()) for pack in packs)
        return Totals(labelled, sum(len(pack.ids) for pack in packs))

    def __call__(self, model: nn.Module, packs: Sequence[Pack], totals: Totals, parallel: Parallel) -> Terms:
        """One pass over all packs: they are one flat tensor, whose segments do not see each other anyway.

        A process that has no pack while others do passes a placeholder, for its peers wait for its gradients.
        """
        own = self.totals(packs).segments
        here = [pack.to(parallel.device) for pack in packs] or [_placeholder(model, parallel.device)]
        labels = torch.cat([pack.labels_T for pack in here])
        how = {"smoothing": self.given.label_smoothing, "weights_T": token_weights(here, self.given.weights)}
        if self.given.sampled:
            config = _config(model)
            tokens = config.vocab_size + len(config.senses.tokens if config.senses else ())
            among, places, shift = sampled(labels, tokens, self.given.sampled, seed_of(packs))
            output = run_packs(model, here, among)
            cross = sampled_cross_entropy(output.logits, places, shift, **how) / totals.tokens
        else:
            output = run_packs(model, here)
            cross = cross_entropy(output.logits, labels, **how) / totals.tokens
        segments = float(parallel.sum(torch.tensor(float(own), device=parallel.device)))
        loss, parts, counts = router_terms(
            output.routings, segments / totals.segments, self.given, parallel.sum, real=own > 0
        )
        more, others = self.beside(output, labels, here, totals)
        return Terms(cross + loss + more, {"cross_entropy": cross.detach(), **parts, **others}, counts)

    def beside(
        self, output: Output, labels_T: Tensor, packs: Sequence[Pack], totals: Totals
    ) -> tuple[Tensor | float, dict[str, Tensor]]:
        """What another task adds to the loss of the same pass, and its parts: here nothing."""
        return 0.0, {}


def token_weights(packs: Sequence[Pack], weights: Mapping[Sense, float]) -> Tensor | None:
    """[T]: each label's factor, by the sense of its segment's input; None where all are 1."""
    if not weights:
        return None
    names: dict[int, Sense] = {1: "text", 2: "sound", 4: "film"}
    factors = [weights.get(names[mel.ndim], 1.0) for pack in packs for mel in pack.mels]
    lengths = [length for pack in packs for length in pack.texts.lengths]
    device = packs[0].labels_T.device
    return torch.tensor(factors, device=device).repeat_interleave(torch.tensor(lengths, device=device))


def seed_of(packs: Sequence[Pack]) -> int:
    """Of what is drawn for these samples: the same wherever they come together."""
    return int.from_bytes(blake2b("".join(id for pack in packs for id in pack.ids).encode(), digest_size=7).digest())


def run_packs(model: nn.Module, packs: Sequence[Pack], among: Tensor | None = None) -> Output:
    """A training pass over packs; ``among``: with logits of these tokens only."""
    texts = [text for pack in packs for text in pack.tokens_T.split(pack.texts.lengths)]
    mels = [mel for pack in packs for mel in pack.mels]
    valid = [n for pack in packs for n in pack.valid_lengths]
    return model(mels, texts, valid_lengths=valid, among=among)


def _config(model: nn.Module) -> ModelConfig:
    return next(module.config for module in model.modules() if isinstance(module, WhisperMoEModel))


def _placeholder(model: nn.Module, device: torch.device) -> Pack:
    """One position of silence and one token without a label."""
    config = _config(model)
    one = torch.zeros(1, dtype=torch.int64, device=device)
    return Pack(
        ids=("",),
        mels=(torch.zeros(config.n_mels, 2, device=device),),
        valid_lengths=(1,),
        tokens_T=one,
        labels_T=torch.full_like(one, IGNORED),
        texts=Layout([1]),
    )


# What learns, and from gradients to an update


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
