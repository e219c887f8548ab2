"""From a recipe to a trainer: model, optimizer, loader, losses, evaluation."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TypeAlias

import torch

from whisper_moe.data.corpora import Corpus, CorpusConfig, open_corpus
from whisper_moe.data.examples import ExampleReader
from whisper_moe.data.loader import PackedLoader
from whisper_moe.data.sample import AnyCorpus, DataError, Sample, Skipped, TooLong, left_out
from whisper_moe.data.sampler import NAMED, LoaderConfig
from whisper_moe.evaluate.evaluator import Evaluator
from whisper_moe.media.audio import MediaError
from whisper_moe.model.block import Block
from whisper_moe.model.model import WhisperMoEModel
from whisper_moe.train.adapt_context import ContextObjective, Lessons
from whisper_moe.train.loop import LoopSettings, Objective, Observer, Precision, Trainer
from whisper_moe.train.losses import RouterLosses, SpeechObjective
from whisper_moe.train.monitor import SKIPPED, Silent
from whisper_moe.train.optim import Rates, build_optimizer, freeze, schedule_factor, unmatched
from whisper_moe.train.parallel import Parallel
from whisper_moe.train.recipe import NOTHING_TO_TEACH, Recipe, RecipeError
from whisper_moe.train.recipe import Precision as WantedPrecision
from whisper_moe.train.start import Start
from whisper_moe.train.teacher import teacher_of
from whisper_moe.weights.parts import empty_model
from whisper_moe.weights.sources import to_stderr

Note: TypeAlias = Callable[[Sequence[Skipped]], None]
DEFAULT_STEPS = 5_000
_A_BATCH = "a batch"
"""What rank 0 says before each batch of an evaluation, where its figures come last."""


def build_trainer(
    recipe: Recipe, start: Start, parallel: Parallel, observer: Observer | None, *, save: Callable[[Trainer], None],
    note: Callable[[Trainer, Mapping[str, float]], None], stop_requested: Callable[[], bool], directory: Path = Path(),
) -> Trainer:  # fmt: skip
    """The trainer that a recipe describes. Raises ``ValueError`` for what cannot be had or does not fit together."""
    model = build_model(recipe, start)
    network = parallel.wrap(model.to(parallel.device))
    optimisation = recipe.optimisation
    # A fused update takes a fifth of the time on a CPU; parts of tensors are updated in the plain way.
    alone = parallel.world_size == 1
    for pattern in unmatched(model, (group.pattern for group in optimisation.groups)) if parallel.rank == 0 else ():
        to_stderr(f"optimisation.groups: no parameter is called {pattern!r}")
    optimizer = build_optimizer(
        model,
        _rates(recipe),
        betas=optimisation.betas,
        eps=optimisation.eps,
        fused=alone,
        grokfast=optimisation.grokfast,
    )
    observer = observer or Silent()
    batches, objective = (_speech if recipe.losses.context is None else _context)(
        recipe, start, model, parallel, directory, observer.left_out
    )
    return Trainer(
        model, network, objective, batches, optimizer, _settings(recipe, parallel, batches), parallel, observer,
        evaluate=_evaluation(recipe, start, model, parallel, stop_requested, observer.left_out), save=save, note=note,
        stop_requested=stop_requested,
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


def build_loader(recipe: Recipe, start: Start, parallel: Parallel, note: Note = lambda skipped: None) -> PackedLoader:
    """This process's share of the data; what is left out from the beginning is told."""
    corpora = list(_opened(recipe.data.train, parallel, note))
    if any(corpus.streaming for corpus in corpora):  # else the loader counts them with what its survey finds
        _check_missing(corpora, recipe.data.train, recipe.data.loader.max_corrupt_share)
    loader = PackedLoader(
        corpora, start.tokenizer, start.config, _loader_config(recipe, corpora), rank=parallel.data_rank,
        world=parallel.data_size, note=note,
    )  # fmt: skip
    if parallel.rank == 0 and loader.excluded:
        to_stderr(f"{len(loader.excluded)} samples are left out, the first: {loader.excluded[0]}; {SKIPPED} names all")
    return loader


def _opened(configs: Iterable[CorpusConfig], parallel: Parallel, note: Note = lambda skipped: None) -> Iterator[Corpus]:
    """Corpora, each with what it lists and cannot give; this is told, and forgotten where a limit is reached all the same."""
    for config in configs:
        corpus = open_corpus(config)
        note(corpus.left_out)
        for remark in corpus.remarks if parallel.rank == 0 else ():
            to_stderr(f"{corpus.name}: {remark}")
        if corpus.left_out and parallel.rank == 0:
            named = "; ".join(map(str, corpus.left_out[:NAMED]))
            to_stderr(
                f"{corpus.name}: {len(corpus.left_out):,} samples are listed and cannot be had, the first: {named}"
            )
        limited = config.limit is not None and (corpus.streaming or len(corpus) == config.limit)
        yield replace(corpus, left_out=()) if limited else corpus


def _check_missing(corpora: Sequence[Corpus], configs: Sequence[CorpusConfig], most: float) -> None:
    """Raise :class:`DataError` where too large a share of one corpus is missing."""
    for corpus, config in zip(corpora, configs, strict=True):
        if not corpus.left_out:
            continue
        # A stream has no length; what lists its samples beforehand can be opened as a whole, too.
        there = len(open_corpus(config.model_copy(update={"streaming": False})) if corpus.streaming else corpus)
        missing, listed = len(corpus.left_out), len(corpus.left_out) + there
        if missing > most * listed:
            cause = f"{missing:,} of {listed:,} samples cannot be had, more than {most:.1%}"
            raise DataError(corpus.name, f"{cause}; the first: {'; '.join(map(str, corpus.left_out[:NAMED]))}")


def _speech(
    recipe: Recipe, start: Start, model: WhisperMoEModel, parallel: Parallel, directory: Path, note: Note
) -> tuple[PackedLoader | Lessons, Objective]:
    losses = recipe.losses
    balance = losses.balance if losses.balancing == "loss" else 0.0
    objective = SpeechObjective(
        smoothing=losses.label_smoothing, routing=RouterLosses(balance=balance, z=losses.z)
    )  # fmt: skip
    return build_loader(recipe, start, parallel, note), objective


def _context(
    recipe: Recipe, start: Start, model: WhisperMoEModel, parallel: Parallel, directory: Path, note: Note
) -> tuple[PackedLoader | Lessons, Objective]:
    """The padded model's lessons are made first; those that are there already are kept."""
    context, data = recipe.losses.context, recipe.data.loader
    assert context is not None
    if parallel.world_size > 1:
        raise RecipeError("losses.context: context adaptation runs in one process")
    if context.padded and start.config.core_alone_on_full_windows:
        raise RecipeError(NOTHING_TO_TEACH)
    folder = Path(context.lessons) if context.lessons else directory / "lessons"
    teacher = teacher_of(recipe.model.source, folder, parallel.device, limit_mb=context.limit_mb)
    skipped: list[Skipped] = []
    samples = list(teacher.prepare(_samples(recipe, parallel, skipped), skipped))
    teacher.dismiss()
    note(skipped)
    corrupt = sum(each.corrupt for each in skipped)
    if skipped:
        to_stderr(f"{len(skipped)} clips are left out, the first: {skipped[0]}")
    if corrupt > data.max_corrupt_share * (len(samples) + len(skipped)):
        raise ValueError(f"{corrupt} of {len(samples) + len(skipped)} clips are corrupt")
    lessons = Lessons(
        samples, teacher, start.config, margins=context.margins, padded=context.padded, batch=data.batch_size,
        seed=data.seed,
    )  # fmt: skip
    head = model.decoder.head
    return lessons, ContextObjective(lessons=lessons, head=head, states=context.states, divergence=context.divergence)


def _samples(recipe: Recipe, parallel: Parallel, skipped: list[Skipped]) -> Iterator[Sample]:
    for corpus in _opened(recipe.data.train, parallel):
        skipped += corpus.left_out
        for index in range(len(corpus)):
            try:
                yield corpus[index]
            except DataError as error:
                skipped.append(left_out(f"{corpus.name}/{index}", error))


def _rates(recipe: Recipe) -> Rates:
    given = recipe.optimisation
    return Rates(
        rest=given.lr, weight_decay=given.weight_decay, ttt=given.ttt_lr, router=given.router_lr or given.lr,
        new_tokens=given.new_token_lr or given.lr,
        named=[(group.pattern, group.lr, group.weight_decay) for group in given.groups],
    )  # fmt: skip


def _steps(recipe: Recipe, batches: PackedLoader | Lessons) -> int:
    """As many as are asked for, or as the epochs have batches for; the last may take some of the epoch behind them."""
    given = recipe.optimisation
    if given.epochs is None:
        return given.steps or DEFAULT_STEPS
    try:
        return math.ceil(batches.count(given.epochs) / given.accumulate)
    except ValueError as error:
        raise RecipeError(f"optimisation.epochs: {error}; give optimisation.steps") from error


def _settings(recipe: Recipe, parallel: Parallel, batches: PackedLoader | Lessons) -> LoopSettings:
    given, steps = recipe.optimisation, _steps(recipe, batches)
    return LoopSettings(
        steps=steps, accumulate=given.accumulate, clip=given.clip or float("inf"),
        precision=precision_on(given.precision, parallel.device), most_bad_steps=given.most_bad_steps,
        factor=partial(schedule_factor, steps=steps, warmup=given.warmup, schedule=given.schedule),
        balance_rate=recipe.losses.bias_rate if recipe.losses.balancing == "bias" else 0.0,
        evaluate_every=recipe.evaluation.every, checkpoint_every=recipe.run.checkpoint_every,
        metric=recipe.evaluation.metric, patience=recipe.evaluation.patience,
    )  # fmt: skip


def precision_on(wanted: WantedPrecision, device: torch.device) -> Precision:
    """What ``auto`` is on this device. Raises :class:`RecipeError` for what the device has not."""
    if wanted == "auto":
        if device.type != "cuda":
            return "float32"
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
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


def _check_evaluation(corpora: Sequence[AnyCorpus], reader: ExampleReader, *, limit: int | None, decode: bool) -> None:
    """What would end the run at its first evaluation ends it now. Raises :class:`RecipeError`."""
    missing = [name for name in ("jiwer", "whisper_normalizer") if decode and find_spec(name) is None]
    if missing:
        raise RecipeError(f"evaluation.metric needs {' and '.join(missing)}: pip install 'whisper-moe[train]'")
    names = [corpus.name for corpus in corpora]
    if doubled := [name for name in names if names.count(name) > 1]:
        raise RecipeError(
            f"data.evaluation: several corpora are called {doubled[0]!r}; give each a `name` in the recipe"
        )
    for corpus in corpora:
        try:
            _check_rows(corpus, reader, limit, decode=decode)
        except ValueError as error:
            raise RecipeError(f"data.evaluation: {error}") from error


def _check_rows(corpus: AnyCorpus, reader: ExampleReader, limit: int | None, *, decode: bool) -> None:
    """Raise ``ValueError`` where no row can be judged by, or the first that has nothing wrong with it is not for this model."""
    from whisper_moe.media.normalize import normalize

    causes: list[str] = []
    samples = iter(corpus)
    while limit is None or len(causes) < limit:
        try:
            sample = next(samples)
            reader.read(sample, 0.0)
        except StopIteration:
            break
        except (DataError, MediaError, TooLong) as error:
            causes.append(str(error))
            continue
        if not decode or normalize(sample.text, sample.target_language):
            return
        causes.append(f"{sample.id}: its text has no word that could be counted")
    raise ValueError(
        f"{corpus.name}: none of the {len(causes):,} rows can be judged by; the first: {'; '.join(causes[:NAMED])}"
    )


def _evaluation(
    recipe: Recipe, start: Start, model: WhisperMoEModel, parallel: Parallel, stop_requested: Callable[[], bool], note: Note
) -> Callable[[], Mapping[str, float] | None] | None:  # fmt: skip
    """Rank 0 judges, and tells the others. Before each of its batches all say whether they are to stop, so that all do."""
    if not recipe.data.evaluation:
        return None
    figures = _figures(recipe, start, parallel, note) if parallel.rank == 0 else None

    def stop() -> bool:
        parallel.broadcast(_A_BATCH)
        return parallel.any(stop_requested())

    def evaluate() -> Mapping[str, float] | None:
        with parallel.whole(model) as whole:
            if figures is not None and whole is not None:
                return json.loads(parallel.broadcast(json.dumps(figures(whole, stop_requested=stop))))
            while (said := parallel.broadcast("")) == _A_BATCH:
                parallel.any(stop_requested())
            return json.loads(said)

    return evaluate


def _figures(recipe: Recipe, start: Start, parallel: Parallel, note: Note) -> Callable[..., Mapping[str, float] | None]:
    """What gives the figures of a model. Raises ``ValueError`` for corpora that it cannot be judged by."""
    settings, decode = recipe.evaluation, recipe.evaluation.metric != "loss"
    corpora = list(_opened(recipe.data.evaluation, parallel, note))
    _check_missing(corpora, recipe.data.evaluation, recipe.data.loader.max_corrupt_share)
    reader = ExampleReader(start.tokenizer, start.config, recipe.data.loader.reading)
    _check_evaluation(corpora, reader, limit=settings.limit, decode=decode)
    evaluator = Evaluator(
        reader, start.tokenizer, start.generation, margin=start.config.margin, decode=decode, padded=settings.padded
    )
    asked = {"batch_size": settings.batch_size, "limit": settings.limit, "note": note}
    return partial(evaluator.figures, corpora=corpora, **asked)
