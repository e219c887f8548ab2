"""A recipe: everything that a training run depends on, as a frozen and checked object.

Nothing here imports torch: a recipe can be wrong in a second rather than after a minute.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from whisper_moe.config import FULL_WINDOW, AdaptConfig, ConformerConfig, MoEConfig, Strict, TTTConfig
from whisper_moe.config_aside import SpeechConfig
from whisper_moe.data.corpus import CorpusConfig
from whisper_moe.data.sampler import LoaderConfig
from whisper_moe.train.reading import checked, read_tree

if TYPE_CHECKING:
    from whisper_moe.train.build import Task
    from whisper_moe.train.parallel import Parallel

Sense = Literal["sound", "text", "film"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]

Decay = Annotated[float, Field(ge=0, lt=1)]
"""Of a moving average: the weight of what was before."""


class LoRARecipe(Strict):
    """Low-rank differences that are trained in place of matrices: W + alpha/rank · B A (arXiv 2106.09685)."""

    rank: int = Field(default=32, ge=1)
    """Of each; queries, keys and values are one matrix."""
    alpha: float = Field(default=64.0, gt=0)
    """The differences are scaled by alpha/rank."""
    targets: tuple[str, ...] = Field(default=("*.attn.*", "*.cross_attn.*", "*.ffn.*"), min_length=1)
    """Shell-style patterns of linear layers: ``encoder.*``, ``*.attn.qkv``. TTT layers are none."""

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank


class ModelRecipe(Strict):
    """What is trained."""

    source: str | None = None
    """A whisper-moe folder or any Whisper: Hub id, folder, ``.pt`` file, LoRA adapter; None for the default model."""
    moe: MoEConfig | None = None
    """Experts to add to a dense Whisper; None leaves it as it is."""
    ttt: TTTConfig | None = None
    """TTT layers to add to a dense Whisper."""
    adapt: AdaptConfig | None = None
    """Norms with differences and adapters to put beside the core, if it has none."""
    conformer: ConformerConfig | None = None
    """Convolution modules to put into encoder blocks, if there are none."""
    speech: SpeechConfig | None = None
    """What speaks, to put beside the rest, if there is none."""
    expert: str | None = None
    """Of a model with routed experts, the one that this run trains: it answers alone, and all else is frozen."""
    context_margin: float | None = Field(default=None, ge=0, le=FULL_WINDOW)
    """Seconds of silence after a clip that the model will be used with; None: the least that it is trained with."""
    new_languages: tuple[str, ...] = ()
    """Languages that get a token if the model lacks it: ``or``, ``or=odia``, ``or=odia:like=bn,as``."""
    freeze: tuple[str, ...] = ()
    """Shell-style patterns of parameters that stay as they are: ``encoder.*``, ``*.ffn.*``."""
    train: tuple[str, ...] = ()
    """Patterns of parameters that are trained though ``freeze`` matches them: ``freeze: ['*']``, ``train: ['*.ttt.*']``."""
    lora: LoRARecipe | None = None
    """Low-rank fine-tuning: all else stays as it is, but for what ``train`` matches. The run's model is a plain one again."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.expert and (self.lora or self.freeze):
            raise ValueError(
                "expert trains that expert alone and freezes all else: neither lora nor freeze goes with it"
            )
        if self.lora and self.freeze:
            raise ValueError(
                f"freeze ({', '.join(self.freeze)}) has nothing to freeze beside lora: lora.targets says where it learns"
            )
        return self


class DataRecipe(Strict):
    """What it is trained on."""

    train: tuple[CorpusConfig, ...] = Field(min_length=1)
    """Corpora to learn from; their ``weight`` counts in the mixture."""
    evaluation: tuple[CorpusConfig, ...] = ()
    """Corpora to be judged by."""
    loader: LoaderConfig = LoaderConfig()
    """Batches, packing, reading."""


class GroupRecipe(Strict):
    """A group of parameters with a rate of their own."""

    pattern: str
    """Shell-style, on the parameters' names: ``*.experts.*``."""
    lr: float = Field(gt=0)
    """Peak rate."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled decay, as AdamW's."""


class OptimisationRecipe(Strict):
    """How it is trained. The defaults are the published hyperparameters, but for a warm-up that fits the run."""

    steps: int | None = Field(default=None, ge=1)
    """Updates; default 5,000. A run that goes on may be asked for more."""
    epochs: int | None = Field(default=None, ge=1)
    """Instead of ``steps``: how often the data is gone through."""
    lr: float = Field(default=1.7e-5, gt=0)
    """Peak rate of all that no other rate is for."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the rate falls to 0 after the warm-up; ``constant`` does not fall."""
    warmup: int = Field(default=500, ge=0)
    """Steps in which the rate rises from 0. More than ``steps`` are allowed, with a warning."""
    betas: tuple[Decay, Decay] = (0.9, 0.98)
    """Of AdamW."""
    eps: float = Field(default=1e-6, gt=0)
    """Of AdamW."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Of matrices; biases, norms, embeddings, gates, fast weights and routers are never decayed."""
    ttt_lr: float = Field(default=1e-3, gt=0)
    """Of TTT's gates and the start of its fast weights, never less than 1e-3 in practice: a gate starts at 0 and moves by
    about its rate a step."""
    router_lr: float | None = Field(default=None, gt=0)
    """Of routers; default ``lr``."""
    new_token_lr: float | None = Field(default=None, gt=0)
    """Of new tokens' embeddings; default ``lr``."""
    groups: tuple[GroupRecipe, ...] = ()
    """Parameters with rates of their own; the first pattern that matches, before all other groups."""
    accumulate: int = Field(default=1, ge=1)
    """Batches for one update."""
    clip: float | None = Field(default=1.0, gt=0)
    """Gradients of a larger norm are scaled down to it; None clips nothing."""
    precision: Precision = "auto"
    """``auto``: on a GPU bfloat16, or float16 where it has none; float32 on a CPU. Parameters, routers and fast weights are
    float32 always."""
    recompute: bool = False
    """Activation checkpointing: less memory, about a third more time."""
    most_bad_steps: int = Field(default=10, ge=1)
    """Steps in a row whose loss or gradient is not finite, after which the run ends with an error."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.steps is not None and self.epochs is not None:
            raise ValueError(
                f"either steps or epochs, got {self.steps} and {self.epochs}; optimisation.steps=null takes the steps away"
            )
        return self

    def factor(self, step: int, steps: int) -> float:
        """What peak rates are multiplied with in the ``step``-th of ``steps`` steps, counted from 0.

        Rises from 0 in the warm-up, then falls to 0 at ``steps``: as transformers' schedules of these names. A run whose
        warm-up is longer than itself ends while the rate still rises.
        """
        if step < self.warmup:
            return step / self.warmup
        done = min(1.0, (step - self.warmup) / max(1, steps - self.warmup))
        return {"linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "constant": 1.0}[self.schedule]


class LossRecipe(Strict):
    """What is minimised."""

    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Weight of a uniform target in the cross-entropy."""
    weights: dict[Sense, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    """Factors of the cross-entropy, by what a sample's input is; 1 where nothing is said."""
    sampled: int = Field(default=0, ge=0)
    """Tokens that a label is told from, besides those of the step (sampled softmax, arXiv 1412.2007); 0: all. Most of a step
    of short texts is the head."""
    balancing: Literal["loss", "none"] = "loss"
    """How experts are kept in balance: by a loss for each router, or not at all."""
    balance: float = Field(default=0.01, ge=0)
    """Factor of the balance loss."""
    z: float = Field(default=0.001, ge=0)
    """Factor of the routers' z-loss."""


class EvaluationRecipe(Strict):
    """How it is judged on the way."""

    every: int | None = Field(default=500, ge=1)
    """Steps between evaluations; there is one at the end in any case. None: only there."""
    batch_size: int = Field(default=32, ge=1)
    """Clips that are decoded together."""
    metric: Literal["wer", "cer", "loss"] = "wer"
    """What makes a checkpoint the best; lower is better."""
    limit: int | None = Field(default=None, ge=1)
    """The first so many samples of each corpus."""
    padded: bool = True
    """Also decode each clip padded to 30 s, as programs do that know no other margin: ``wer_padded``, ``cer_padded``."""
    patience: int | None = Field(default=None, ge=1)
    """Evaluations in a row without a better figure, after which the run ends early."""


class RunRecipe(Strict):
    """Where and how the run is kept."""

    directory: str | None = None
    """Default: ``runs/`` and the recipe's name; ``-o`` comes before it."""
    seed: int = Field(default=42, ge=0)
    """Of new parameters and the global random generators; the loader has its own."""
    checkpoint_every: int | None = Field(default=500, ge=1)
    """Steps between checkpoints; there is one before every evaluation and at the end in any case."""
    checkpoint: Literal["whole", "sharded"] = "whole"
    """Without a meaning now: each of several processes writes its part in any case, to a disk of all."""
    keep: int = Field(default=2, ge=1)
    """Newest checkpoints that are kept, besides the best."""
    log_every: int = Field(default=1, ge=1)
    """Steps between lines of ``metrics.jsonl``."""
    device: str = "auto"
    """``cpu``, ``cuda``, ``cuda:1``; ``auto`` takes a GPU if there is one."""
    threads: int | None = Field(default=None, ge=1)
    """Of the CPU; default: PyTorch's own choice."""


class ParallelRecipe(Strict):
    """Who holds what. A process alone needs none of it."""

    data: Literal["ddp", "fsdp2"] = "ddp"
    """``ddp``: every rank holds all parameters. ``fsdp2``: each holds a share of every parameter, gradient and moment, and
    gathers a block when it is computed."""
    gathered: Literal["float32", "bfloat16"] = "float32"
    """What ``fsdp2`` gathers blocks as; routers and fast weights stay float32, and so do shares, gradients and moments."""
    reshard: bool = True
    """``fsdp2``: let go of a block after its forward pass and gather it again for the backward pass (ZeRO-3)."""
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """``auto``: NCCL on GPUs, gloo on CPUs."""
    timeout_seconds: int = Field(default=1_800, ge=1)
    """How long a rank waits for another. Longer than the longest evaluation, which rank 0 makes while the others wait."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.gathered != "float32" and self.data != "fsdp2":
            raise ValueError(f"gathered ({self.gathered}) is for data fsdp2; with data {self.data} nothing is gathered")
        return self


class Recipe(Strict):
    """A training run."""

    name: str | None = None
    """Default: the file's."""
    model: ModelRecipe = ModelRecipe()
    """What is trained."""
    data: DataRecipe
    """What it is trained on."""
    optimisation: OptimisationRecipe = OptimisationRecipe()
    """How it is trained."""
    losses: LossRecipe = LossRecipe()
    """What is minimised."""
    evaluation: EvaluationRecipe = EvaluationRecipe()
    """How it is judged on the way."""
    run: RunRecipe = RunRecipe()
    """Where and how the run is kept."""
    parallel: ParallelRecipe = ParallelRecipe()
    """How the processes that torchrun starts share the work; one alone needs none of it."""
    free: ClassVar[tuple[str, ...]] = ()
    """Keys that may differ where a run goes on, of those that recipes of another task have besides."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.evaluation.patience is not None and not self.data.evaluation:
            raise ValueError("evaluation.patience needs corpora in data.evaluation")
        decays = [self.optimisation.weight_decay, *(group.weight_decay for group in self.optimisation.groups)]
        if self.model.expert is not None and any(decays):
            raise ValueError(
                "model.expert: optimisation.weight_decay would wear away the other experts too; it has to be 0"
            )
        if self.model.lora and self.parallel.data == "fsdp2":
            raise ValueError("model.lora is for parallel.data ddp: every process has all of it")
        return self

    def task(self) -> type[Task]:
        """What is made of it. A script that trains something else overrides this in recipes of its own, with keys of its own."""
        from whisper_moe.train.build import Task

        return Task

    def processes(self, world: int) -> type[Parallel]:
        """How so many share the work. A script that knows another way overrides this, too; raises ``ValueError`` for a number
        that does not fit."""
        from whisper_moe.train.parallel import Parallel

        return Parallel

    @property
    def least_margin(self) -> float | None:
        """Seconds of silence that the model will be used with; None: its own from before."""
        if self.model.context_margin is not None:
            return self.model.context_margin
        margin = self.data.loader.examples.margin
        return margin[0] if isinstance(margin, tuple) else margin


def load_recipe(path: Path, overrides: Sequence[str] = (), kind: type[Recipe] = Recipe) -> Recipe:
    """Read a recipe and apply ``key=value`` overrides (``optimisation.lr=1e-4``, ``data.train.0.split=valid``).

    Raises :class:`RecipeError` that names the file or the override, the key, and for an unknown key the closest known.
    """
    tree = read_tree(path, overrides)
    if tree.get("name") is None:
        tree["name"] = path.stem
    return checked(kind, tree, str(path))
