"""A recipe: everything that a training run depends on, as data. YAML in, a frozen and checked object out.

Nothing here imports torch: a recipe can be wrong in a second rather than after a minute.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from whisper_moe.config import FULL_WINDOW, AdaptConfig, ConformerConfig, MoEConfig, TTTConfig
from whisper_moe.data.corpora import CorpusConfig
from whisper_moe.data.sampler import LoaderConfig
from whisper_moe.train.layout import ParallelConfig

Precision = Literal["auto", "float32", "bfloat16", "float16"]
NOTHING_TO_TEACH = "losses.context.padded: full windows teach nothing where model.adapt.full_windows is false"
_MOST_BYTES = 1_000_000


class RecipeError(ValueError):
    """A recipe that cannot be used: which file, which key, and why."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)


class ModelRecipe(_Frozen):
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
    context_margin: float | None = Field(default=None, ge=0, le=FULL_WINDOW)
    """Seconds of silence after a clip that the model will be used with; None: the least that it is trained with."""
    new_languages: tuple[str, ...] = ()
    """Languages that get a token if the model lacks it: ``or``, ``or=odia``, ``or=odia:like=bn,as``."""
    freeze: tuple[str, ...] = ()
    """Shell-style patterns of parameters that stay as they are: ``encoder.*``, ``*.ffn.*``."""
    train: tuple[str, ...] = ()
    """Patterns of parameters that are trained though ``freeze`` matches them: ``freeze: ['*']``, ``train: ['*.ttt.*']``."""


class DataRecipe(_Frozen):
    """What it is trained on."""

    train: tuple[CorpusConfig, ...] = Field(min_length=1)
    """Corpora to learn from; their ``weight`` counts in the mixture."""
    evaluation: tuple[CorpusConfig, ...] = ()
    """Corpora to be judged by."""
    loader: LoaderConfig = LoaderConfig()
    """Batches, packing, mixing, reading."""


class GroupRecipe(_Frozen):
    """A group of parameters with a rate of their own."""

    pattern: str
    """Shell-style, on the parameters' names: ``*.experts.*``."""
    lr: float = Field(gt=0)
    """Peak rate."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled decay, as AdamW's."""


def check_grokfast(alpha: float, amplification: float) -> None:
    """Raise ``ValueError`` for an average that is none, or one that is taken away from the gradient."""
    if not 0 <= alpha < 1 or amplification < 0:
        raise ValueError(f"grokfast is (alpha, lambda), 0 <= alpha < 1 and lambda >= 0, got {[alpha, amplification]}")


class OptimisationRecipe(_Frozen):
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
    betas: tuple[float, float] = (0.9, 0.98)
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
    grokfast: tuple[float, float] | None = None
    """(α, λ): the slow part of gradients is amplified (Grokfast-EMA, arXiv 2405.20233); (0.98, 2) are the paper's."""
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
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be at least 0 and less than 1, got {list(self.betas)}")
        if self.steps is not None and self.epochs is not None:
            raise ValueError(
                f"either steps or epochs, got {self.steps} and {self.epochs}; optimisation.steps=null takes the steps away"
            )
        if self.grokfast is not None:
            check_grokfast(*self.grokfast)
        return self


class ContextRecipe(_Frozen):
    """Context adaptation: the model learns from itself, padded to 30 s (:mod:`whisper_moe.train.adapt_context`)."""

    margins: tuple[float, float] = (0.0, 4.0)
    """The least and the most silence behind a clip, in seconds; small ones are drawn more often."""
    padded: float = Field(default=0.0, ge=0, le=1)
    """The share of clips that are padded to the whole window instead, where that is adapted too (``model.adapt.full_windows``):
    what was right there has to stay."""
    states: float = Field(default=1.0, ge=0)
    """Factor of the relative mean square error of the decoder's states."""
    divergence: float = Field(default=1.0, ge=0)
    """Factor of the divergence of the next token's probabilities."""
    lessons: str | None = None
    """The folder of what the padded model has said; default: ``lessons`` in the run's directory."""
    limit_mb: int = Field(default=4_096, ge=1)
    """What that folder may hold; about 0.4 MB a second of speech for whisper-base."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not 0 <= self.margins[0] <= self.margins[1] <= 30:
            raise ValueError(f"margins must be 0 to 30 seconds, the lesser first, got {list(self.margins)}")
        return self


class LossRecipe(_Frozen):
    """What is minimised."""

    context: ContextRecipe | None = None
    """Instead of the cross-entropy: transcripts are not needed, and only what ``freeze`` and ``train`` leave learns."""

    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Weight of a uniform target in the cross-entropy."""
    balancing: Literal["loss", "bias", "none"] = "loss"
    """How experts are kept in balance: a loss for each router, a bias on the choice (arXiv 2408.15664), or not at all."""
    balance: float = Field(default=0.01, ge=0)
    """Factor of the balance loss."""
    z: float = Field(default=0.001, ge=0)
    """Factor of the routers' z-loss."""
    bias_rate: float = Field(default=0.001, gt=0)
    """How far ``balancing: bias`` moves a bias in a step."""


class EvaluationRecipe(_Frozen):
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


class RunRecipe(_Frozen):
    """Where and how the run is kept."""

    directory: str | None = None
    """Default: ``runs/`` and the recipe's name; ``-o`` comes before it."""
    seed: int = Field(default=42, ge=0)
    """Of new parameters and the global random generators; the loader has its own."""
    checkpoint_every: int | None = Field(default=500, ge=1)
    """Steps between checkpoints; there is one before every evaluation and at the end in any case."""
    checkpoint: Literal["whole", "sharded"] = "whole"
    """``whole``: rank 0 gathers and writes all. ``sharded``: each of several processes writes its part, to a disk of all."""
    keep: int = Field(default=2, ge=1)
    """Newest checkpoints that are kept, besides the best."""
    log_every: int = Field(default=1, ge=1)
    """Steps between lines of ``metrics.jsonl``."""
    tensorboard: bool = False
    """Also write TensorBoard's event files (needs the extra ``train``)."""
    device: str = "auto"
    """``cpu``, ``cuda``, ``cuda:1``; ``auto`` takes a GPU if there is one."""
    threads: int | None = Field(default=None, ge=1)
    """Of the CPU; default: PyTorch's own choice."""


class Recipe(_Frozen):
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
    parallel: ParallelConfig = ParallelConfig()
    """How the processes that torchrun starts share the work; one alone needs none of it."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.evaluation.patience is not None and not self.data.evaluation:
            raise ValueError("evaluation.patience needs corpora in data.evaluation")
        adapt, context = self.model.adapt, self.losses.context
        if context and self.losses.balancing == "bias":
            raise ValueError(
                "losses.context: nothing is balanced on the way, so losses.balancing cannot be bias; take none"
            )
        if context and self.data.loader.batch_unit == "packs":
            raise ValueError("losses.context: batches are counted in clips, so data.loader.batch_unit must be examples")
        if context and context.padded and adapt and not adapt.full_windows:
            raise ValueError(NOTHING_TO_TEACH)
        return self

    @property
    def least_margin(self) -> float | None:
        """Seconds of silence that the model will be used with; None: its own from before."""
        if self.model.context_margin is not None:
            return self.model.context_margin
        margin = self.losses.context.margins if self.losses.context else self.data.loader.reading.margin
        return margin[0] if isinstance(margin, tuple) else margin


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply ``key=value`` overrides (``optimisation.lr=1e-4``, ``data.train.0.split=valid``).

    Raises :class:`RecipeError` that names the file or the override, the key, and for an unknown key the closest known.
    """
    tree = read_tree(path, overrides)
    if tree.get("name") is None:
        tree["name"] = path.stem
    return recipe_of(tree, str(path))


def read_tree(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A file's plain values with its overrides, not checked against anything."""
    tree = _read(path)
    for override in overrides:
        apply(tree, override)
    return tree


def recipe_of(tree: Mapping[str, Any], origin: str) -> Recipe:
    """Check a tree of plain values; ``origin`` is what messages begin with."""
    try:
        text = json.dumps(tree)
    except ValueError:
        raise RecipeError(f"{origin}: not plain values: something in it contains itself") from None
    try:
        return Recipe.model_validate_json(text)
    except ValidationError as error:
        causes = [_cause(e["loc"], e["type"], e["msg"], e["input"]) for e in error.errors()]
        raise RecipeError(f"{origin}: {'; '.join(causes)}") from None


def _cause(location: tuple[int | str, ...], kind: str, message: str, given: Any) -> str:
    where = ".".join(map(str, location))
    if kind == "extra_forbidden":
        return f"{where} is not a key of a recipe{_suggestion(location)}"
    if kind == "missing":
        return f"{where} is missing"
    said = message.removeprefix("Value error, ")
    shown = "" if isinstance(given, (dict, list)) or kind == "value_error" else f", got {given!r}"
    return f"{where}: {said}{shown}" if where else said


def _suggestion(location: tuple[int | str, ...]) -> str:
    """The closest key beside it, or anywhere by its last part."""
    *_, last = map(str, location)
    known = {".".join(path) for path in _keys(Recipe)}
    beside = ".".join(str(part) for part in location[:-1] if not isinstance(part, int))
    siblings = [key for key in known if key.rpartition(".")[0] == beside]
    close = difflib.get_close_matches(last, [key.rpartition(".")[2] for key in siblings], n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]}?"
    elsewhere = sorted((key for key in known if key.rpartition(".")[2] == last), key=len)
    if elsewhere:
        return f"; did you mean {elsewhere[0]}?"
    return f"; there are {', '.join(sorted(key.rpartition('.')[2] for key in siblings))}" if siblings else ""


def _keys(model: type[BaseModel]) -> Iterator[tuple[str, ...]]:
    """Every key of a configuration and of those within it; lists add no part."""
    for name, field in model.model_fields.items():
        yield (name,)
        for inner in _models(field.annotation):
            yield from ((name, *path) for path in _keys(inner))


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)


def apply(tree: dict[str, Any], override: str) -> None:
    """Put one ``key=value`` into the tree; numbers in a key are places in a list."""
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise RecipeError(f"{override!r}: an override is written key=value, as in optimisation.lr=1e-4")
    place: Any = tree
    for depth, name in enumerate(parts):
        last = depth == len(parts) - 1
        part: Any = name
        if isinstance(place, list):
            if not name.isdigit() or int(name) >= len(place):
                raise RecipeError(f"{override!r}: {'.'.join(parts[:depth])} has the places 0 to {len(place) - 1}")
            part = int(name)
        elif not isinstance(place, dict):
            raise RecipeError(f"{override!r}: {'.'.join(parts[:depth])} is {place!r}, which has no keys")
        elif not last and place.get(name) is None:
            place[name] = {}
        holder: Any = place
        if last:
            holder[part] = _yaml(text, override)
        else:
            place = holder[part]


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise RecipeError(f"{path}: larger than a recipe can be ({_MOST_BYTES:,} bytes)")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text ({error.reason})") from error
    tree = _yaml(text, str(path))
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: must hold keys and values, holds {type(tree).__name__}")
    return tree


def _yaml(text: str, origin: str) -> Any:
    """Plain values only. Raises :class:`RecipeError` for a tag that would make an object, and for anything unreadable."""
    from whisper_moe.train.yaml import YamlError, parse

    try:
        return parse(text)
    except YamlError as error:
        raise RecipeError(f"{origin}: {error}") from None
