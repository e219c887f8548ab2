"""From a recipe to a trainer: model, optimizer, loader, losses, evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

from whisper_moe.data.corpora import open_corpus
from whisper_moe.data.draws import AnyCorpus
from whisper_moe.data.examples import ExampleReader, Skipped, TooLong
from whisper_moe.data.loader import PackedLoader
from whisper_moe.data.planner import LoaderConfig
from whisper_moe.data.sample import DataError, Sample
from whisper_moe.model.block import Block
from whisper_moe.model.model import WhisperMoEModel
from whisper_moe.train.adapt_context import ContextObjective, Lessons
from whisper_moe.train.evaluation import Judge
from whisper_moe.train.loop import Batches, LoopSettings, Objective, Observer, Precision, Trainer
from whisper_moe.train.losses import RouterLosses, SpeechObjective
from whisper_moe.train.monitor import Silent
from whisper_moe.train.optim import Rates, build_optimizer, freeze, schedule_factor
from whisper_moe.train.recipe import Precision as WantedPrecision
from whisper_moe.train.recipe import Recipe, RecipeError
from whisper_moe.train.single import Parallel
from whisper_moe.train.start import Start
from whisper_moe.train.teacher import teacher_of
from whisper_moe.weights.parts import empty_model
from whisper_moe.weights.sources import to_stderr


def build_trainer(
    recipe: Recipe, start: Start, parallel: Parallel, observer: Observer | None, *, save: Callable[[Trainer], None],
    stop_requested: Callable[[], bool], directory: Path = Path(),
) -> Trainer:  # fmt: skip
    """The trainer that a recipe describes. Raises ``ValueError`` for what cannot be had or does not fit together."""
    model = build_model(recipe, start)
    network = parallel.wrap(model.to(parallel.device))
    optimisation = recipe.optimisation
    # A fused update takes a fifth of the time on a CPU; parts of tensors are updated in the plain way.
    alone = parallel.world_size == 1
    optimizer = build_optimizer(
        model,
        _rates(recipe),
        betas=optimisation.betas,
        eps=optimisation.eps,
        fused=alone,
        grokfast=optimisation.grokfast,
    )
    batches, objective = (_speech if recipe.losses.context is None else _context)(
        recipe, start, model, parallel, directory
    )
    return Trainer(
        model, network, objective, batches, optimizer, _settings(recipe, parallel), parallel, observer or Silent(),
        evaluate=_evaluation(recipe, start, model, parallel), save=save, stop_requested=stop_requested,
    )  # fmt: skip


def build_model(recipe: Recipe, start: Start) -> WhisperMoEModel:
    """With what the recipe freezes frozen. ``start`` gives its weights away."""
    model = empty_model(start.config)
    if start.state:
        model.load_state_dict(start.state, assign=True)
        start.state.clear()
    else:
        model.to_empty(device="cpu")
    for module in model.modules():
        if isinstance(module, Block):
            module.recompute = recipe.optimisation.recompute
    try:
        freeze(model, recipe.model.freeze, recipe.model.train)
    except ValueError as error:
        raise RecipeError(f"model.freeze: {error}") from error
    return model


def build_loader(recipe: Recipe, start: Start, parallel: Parallel) -> PackedLoader:
    """This process's share of the data; what is left out from the beginning is told."""
    corpora = [open_corpus(config) for config in recipe.data.train]
    loader = PackedLoader(
        corpora, start.tokenizer, start.config, _loader_config(recipe, corpora), rank=parallel.data_rank,
        world=parallel.data_size,
    )  # fmt: skip
    if parallel.rank == 0 and loader.excluded:
        first = loader.excluded[0]
        to_stderr(f"{len(loader.excluded)} samples are left out, the first: {first.id}: {first.cause}")
    return loader


def _speech(
    recipe: Recipe, start: Start, model: WhisperMoEModel, parallel: Parallel, directory: Path
) -> tuple[Batches, Objective]:
    losses = recipe.losses
    balance = losses.balance if losses.balancing == "loss" else 0.0
    objective = SpeechObjective(
        smoothing=losses.label_smoothing, routing=RouterLosses(balance=balance, z=losses.z)
    )  # fmt: skip
    return build_loader(recipe, start, parallel), objective


def _context(
    recipe: Recipe, start: Start, model: WhisperMoEModel, parallel: Parallel, directory: Path
) -> tuple[Batches, Objective]:
    """The padded model's lessons are made first; those that are there already are kept."""
    context, data = recipe.losses.context, recipe.data.loader
    assert context is not None
    if parallel.world_size > 1:
        raise RecipeError("losses.context: context adaptation runs in one process")
    folder = Path(context.lessons) if context.lessons else directory / "lessons"
    teacher = teacher_of(recipe.model.source, folder, parallel.device, limit_mb=context.limit_mb)
    left_out: list[Skipped] = []
    samples = list(teacher.prepare(_samples(recipe, left_out), left_out))
    teacher.dismiss()
    corrupt = sum(skipped.corrupt for skipped in left_out)
    if left_out:
        to_stderr(f"{len(left_out)} clips are left out, the first: {left_out[0].id}: {left_out[0].cause}")
    if corrupt > data.max_corrupt_share * (len(samples) + len(left_out)):
        raise ValueError(f"{corrupt} of {len(samples) + len(left_out)} clips are corrupt")
    lessons = Lessons(
        samples, teacher, start.config, margins=context.margins, padded=context.padded, batch=data.batch_size,
        seed=data.seed,
    )  # fmt: skip
    head = model.decoder.head
    return lessons, ContextObjective(lessons=lessons, head=head, states=context.states, divergence=context.divergence)


def _samples(recipe: Recipe, left_out: list[Skipped]) -> Iterator[Sample]:
    for config in recipe.data.train:
        corpus = open_corpus(config)
        for index in range(len(corpus)):
            try:
                yield corpus[index]
            except DataError as error:
                left_out.append(Skipped(id=f"{corpus.name}/{index}", cause=str(error), corrupt=True))


def _rates(recipe: Recipe) -> Rates:
    given = recipe.optimisation
    return Rates(
        rest=given.lr, weight_decay=given.weight_decay, ttt=given.ttt_lr, router=given.router_lr or given.lr,
        new_tokens=given.new_token_lr or given.lr,
        named=[(group.pattern, group.lr, group.weight_decay) for group in given.groups],
    )  # fmt: skip


def _settings(recipe: Recipe, parallel: Parallel) -> LoopSettings:
    given = recipe.optimisation
    return LoopSettings(
        steps=given.steps, accumulate=given.accumulate, clip=given.clip or float("inf"),
        precision=precision_on(given.precision, parallel.device), most_bad_steps=given.most_bad_steps,
        factor=partial(schedule_factor, steps=given.steps, warmup=given.warmup, schedule=given.schedule),
        balance_rate=recipe.losses.bias_rate if recipe.losses.balancing == "bias" else 0.0,
        evaluate_every=recipe.evaluation.every, checkpoint_every=recipe.run.checkpoint_every,
        metric=recipe.evaluation.metric, patience=recipe.evaluation.patience,
    )  # fmt: skip


def precision_on(wanted: WantedPrecision, device: torch.device) -> Precision:
    """What ``auto`` is on this device. Raises :class:`RecipeError` for what the device has not."""
    if wanted == "auto":
        if device.type != "cuda":
            return "float32"
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    if wanted == "float16" and device.type == "cpu":
        raise RecipeError("optimisation.precision is float16, which needs a GPU; take bfloat16 or float32 on a CPU")
    return wanted


def _loader_config(recipe: Recipe, corpora: Sequence[AnyCorpus]) -> LoaderConfig:
    """Weights of the corpora are those of the mixture, unless it has its own."""
    mixing = recipe.data.loader.mixing
    weights = {corpus.name: config.weight for corpus, config in zip(corpora, recipe.data.train, strict=True)}
    changed = {name: weight for name, weight in weights.items() if weight != 1.0}
    return recipe.data.loader.model_copy(
        update={"mixing": mixing.model_copy(update={"weights": changed | dict(mixing.weights)})}
    )


def _check_evaluation(corpora: Sequence[AnyCorpus], reader: ExampleReader, *, decode: bool) -> None:
    """What would end the run at its first evaluation ends it now. Raises :class:`RecipeError`."""
    missing = [name for name in ("jiwer", "whisper_normalizer") if decode and find_spec(name) is None]
    if missing:
        raise RecipeError(f"evaluation.metric needs {' and '.join(missing)}: pip install 'whisper-moe[train]'")
    for corpus in corpora:
        sample = next(iter(corpus), None)
        try:
            if sample is not None:
                reader.tokens(sample)
        except TooLong:
            continue
        except ValueError as error:
            raise RecipeError(f"data.evaluation: {error}") from error


def _evaluation(
    recipe: Recipe, start: Start, model: WhisperMoEModel, parallel: Parallel
) -> Callable[[], Mapping[str, float]] | None:
    """Rank 0 judges, and tells the others."""
    if not recipe.data.evaluation:
        return None
    reading, settings = recipe.data.loader.reading, recipe.evaluation
    judge = None
    if parallel.rank == 0:
        tokenizer = start.tokenizer
        corpora = [open_corpus(config) for config in recipe.data.evaluation]
        reader = ExampleReader(tokenizer, start.config, reading)
        _check_evaluation(corpora, reader, decode=settings.metric != "loss")
        judge = Judge(
            corpora, reader, tokenizer, start.generation, margin=reading.margins[1], batch_size=settings.batch_size,
            limit=settings.limit, decode=settings.metric != "loss",
        )  # fmt: skip

    def evaluate() -> Mapping[str, float]:
        with parallel.whole(model) as whole:
            said = json.dumps(judge(whole)) if judge is not None and whole is not None else ""
        return json.loads(parallel.broadcast(said))

    return evaluate
