"""From a recipe to a trainer: the model that a run begins with, whole or with low-rank differences, its data, its losses, its
evaluation.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whisper_moe.config_aside import ASIDE
from whisper_moe.data.corpus import Corpus, CorpusConfig
from whisper_moe.data.examples import ExampleReader
from whisper_moe.data.loader import NAMED, PackedLoader
from whisper_moe.data.sample import DataError, Sample, Skipped, items, tried
from whisper_moe.data.sampler import Weights
from whisper_moe.data.table import open_corpus
from whisper_moe.evaluate.metrics import Evaluator
from whisper_moe.media.languages import NewLanguage
from whisper_moe.model.block import Block
from whisper_moe.model.model import WhisperMoEModel
from whisper_moe.train.loop import Batches, Figures, Objective, Trainer
from whisper_moe.train.losses import SpeechObjective, freeze, unmatched
from whisper_moe.train.monitor import SKIPPED, Monitor
from whisper_moe.train.parallel import Parallel
from whisper_moe.train.reading import RecipeError
from whisper_moe.train.recipe import LoRARecipe, Recipe
from whisper_moe.weights.checkpoint import CONFIG, Loaded, read_config
from whisper_moe.weights.files import atomic_folder, json_bytes, listed, read_bytes, read_json
from whisper_moe.weights.load import load_model
from whisper_moe.weights.parts import SPEECH, empty_model
from whisper_moe.weights.tokens import GENERATION, TOKENIZER, of_any_language
from whisper_moe.weights.upcycle import add_languages, add_parts, upcycle

Note: TypeAlias = Callable[[Sequence[Skipped]], None]
TRAINED = ("*.lora_a", "*.lora_b")
"""What low-rank fine-tuning trains."""
START = "start"
"""The folder, within a run's, of all but the weights: so that it can go on and be exported when the source is gone."""
logger = logging.getLogger(__name__)


def initial_model(recipe: Recipe) -> Loaded:
    """The source, with the parts and tokens that the recipe adds.

    Raises ``ValueError`` for a source that cannot be had or cannot take the parts.
    """
    given, seed, margin = recipe.model, recipe.run.seed, recipe.least_margin
    loaded = load_model(given.source, aside=True)
    config, state = loaded.config, dict(loaded.state)
    if loaded.experts:
        raise RecipeError(f"{given.source}: its experts are whole models: train them one by one, and merge again")
    if given.moe is not None or given.ttt is not None:
        config, state = upcycle(config, state, moe=given.moe, ttt=given.ttt, seed=seed)
    named = ("adapt", "conformer", "speech")
    parts = {name: part for name in named if (part := getattr(given, name)) != getattr(config, name)}
    if any(parts.values()):
        config, state = add_parts(config, state, **parts, seed=seed)
    config = config.model_copy(update={"context_margin": config.margin if margin is None else margin})
    initial = replace(loaded, config=config, state=state, generation=of_any_language(loaded.generation))
    wanted = map(NewLanguage.parse, given.new_languages)
    return add_languages(initial, [each for each in wanted if each.code not in initial.tokenizer.languages])


def write_start(run: Path, model: Loaded) -> None:
    """Keep all but the weights in the run's folder."""
    with atomic_folder((run / START).resolve(), overwrite=True) as folder:
        (folder / CONFIG).write_bytes(json_bytes(model.config.model_dump(mode="json")))
        (folder / GENERATION).write_bytes(json_bytes(model.generation))
        (folder / TOKENIZER).write_bytes(model.tokenizer_json)


def read_start(run: Path) -> Loaded:
    """What :func:`write_start` kept; a checkpoint has the weights."""
    folder = run / START
    return Loaded(read_config(folder / CONFIG), {}, read_json(folder / GENERATION), read_bytes(folder / TOKENIZER))


def build_model(initial: Loaded, recipe: Recipe, own: Sequence[str] = ()) -> WhisperMoEModel:
    """The model, with what the recipe freezes frozen. Gives the weights away.

    ``own``: patterns of what a task trains, and nothing else, unless ``model.train`` says it more closely.
    """
    model = empty_model(initial.config)
    if initial.state:
        model.load_state_dict(initial.state, assign=True)
        initial.state.clear()
    else:
        model.to_empty(device="cpu")
    for module in model.modules():
        if isinstance(module, Block):
            module.recompute = recipe.optimisation.recompute
    given, moe = recipe.model, initial.config.moe
    frozen, trained = given.freeze, given.train
    if given.lora is not None:
        if moe is not None and moe.granularity != "ffn":
            raise RecipeError(
                "model.lora: the experts of this model are low-rank differences already; train it without"
            )
        try:
            add_lora(model, given.lora)
        except ValueError as error:
            raise RecipeError(f"model.lora.targets: {error}") from error
        frozen, trained = ("*",), (*TRAINED, *trained)
    elif given.expert is not None:
        frozen, trained = ("*",), (*only_expert(model, given.expert), *trained)
    elif own:
        frozen, trained = ("*",), trained or own
    else:
        frozen = (*frozen, *(f"{name}.*" for name in ASIDE if getattr(model, name) is not None))
    try:
        freeze(model, frozen, trained)
    except ValueError as error:
        raise RecipeError(f"model.freeze: {error}") from error
    return model


def only_expert(model: WhisperMoEModel, name: str) -> tuple[str, ...]:
    """Let one expert answer alone in every pass; which parameters are its. Raises :class:`RecipeError` where there is none of
    that name."""
    moe, router, senses = model.config.moe, model.encoder.router, model.config.senses
    if senses is not None and name in senses.experts:
        if len(senses.experts) > 1:
            beside = "train it in a model that has it alone, and join these: recipes/senses"
            raise RecipeError(f"model.expert: {name} shares its tokens with {', '.join(senses.experts)}; {beside}")
        return ("senses.*",)
    names = moe.names if moe is not None and router is not None else ()
    if router is None or name not in names:
        known = f"there are {', '.join(names)}" if names else "the model has none that are chosen for a whole segment"
        raise RecipeError(f"model.expert: no expert is called {name!r}; {known}")
    router.only = (names.index(name),)
    patterns = ("encoder.*.experts.*", "decoder.*.experts.*")
    return tuple(each for each in patterns if not list(unmatched(model, [each])))


# Low-rank differences


class LoRALinear(nn.Linear):
    """``x W^T + b + alpha/rank (x A^T) B^T`` (LoRA, arXiv 2106.09685): W stays as it is, and B A beside it learns.

    A matrix is never made of the three: ``x W^T`` gives its input a gradient and itself none, a third less work than training it.
    """

    lora_a: nn.Parameter
    """[rank, inputs]"""
    lora_b: nn.Parameter
    """[outputs, rank]"""
    scaling: float

    def forward(self, input: Tensor) -> Tensor:
        """[tokens, inputs] → [tokens, outputs]"""
        return torch.addmm(super().forward(input), F.linear(input, self.lora_a), self.lora_b.T, alpha=self.scaling)


def add_lora(model: nn.Module, given: LoRARecipe) -> None:
    """Give the targets among the linear layers A, at random, and B, of zeros, in place: the model computes what it did.

    TTT layers are no targets: they are new, and small enough to be trained whole; what speaks is none either. The
    differences of other senses stay beside them. Raises ``ValueError`` for a pattern that matches nothing.
    """
    layers = {path: each for path, each in model.named_modules() if type(each) is nn.Linear}
    layers = {path: each for path, each in layers.items() if ".ttt." not in path and not path.startswith(SPEECH)}
    for pattern in given.targets:
        if not any(fnmatchcase(path, pattern) for path in layers):
            raise ValueError(f"no linear layer is called {pattern!r}; there are {listed(layers, 3)}")
    for path, module in layers.items():
        if any(fnmatchcase(path, pattern) for pattern in given.targets):
            layer: Any = module
            layer.__class__ = LoRALinear  # the same layer, with its parameters, under the same name
            layer.scaling = given.scaling
            layer.lora_a = nn.Parameter(torch.empty(given.rank, layer.in_features))
            layer.lora_b = nn.Parameter(torch.zeros(layer.out_features, given.rank))
            nn.init.normal_(layer.lora_a, std=layer.in_features**-0.5)


def folded(state: Mapping[str, Tensor], given: LoRARecipe) -> dict[str, Tensor]:
    """A state without A and B, which are added to W."""
    plain = dict(state)
    for name in [name for name in state if name.endswith(".lora_a")]:
        layer = name.removesuffix("lora_a")
        a, b = plain.pop(name), plain.pop(f"{layer}lora_b")
        plain[f"{layer}weight"] = plain[f"{layer}weight"] + given.scaling * (b @ a)
    return plain


def build_trainer(
    recipe: Recipe, initial: Loaded, parallel: Parallel, monitor: Monitor | None, directory: Path
) -> Trainer:
    """The trainer that a recipe describes. Raises ``ValueError`` for what cannot be had or does not fit together."""
    note = monitor.left_out if monitor else lambda skipped: None
    given, task = recipe.optimisation, recipe.task()(recipe, initial, parallel, note, directory)
    model = task.model().to(parallel.device)
    batches, objective = task.learned(model)
    figures = task.figures() if recipe.data.evaluation and parallel.rank == 0 else None
    trainer = Trainer(
        recipe, model, objective, batches, parallel, figures=figures, monitor=monitor, directory=directory
    )
    for pattern in unmatched(model, (group.pattern for group in given.groups)):
        logger.warning("optimisation.groups: no parameter is called %r", pattern)
    if given.warmup >= trainer.steps:
        last = given.factor(trainer.steps - 1, trainer.steps)
        logger.warning(
            f"WARNING: the warm-up of {given.warmup:,} steps is longer than the run of {trainer.steps:,}: the rate rises to "
            f"the end, to {given.lr * last:.4e}, {100 * last:.2f} % of {given.lr:g}, and never falls"
        )
    return trainer


@dataclass(frozen=True)
class Task:
    """What is trained, what it learns from, and what it is judged by: a model that writes what it hears, sees or reads.

    A script that trains something else overrides :meth:`model`, :meth:`learned` or :meth:`figures` of these, and names its class
    in recipes of its own (:meth:`whisper_moe.train.recipe.Recipe.task`). They raise ``ValueError`` where they cannot.
    """

    recipe: Recipe
    initial: Loaded
    parallel: Parallel
    note: Note
    """Is told of every sample that is left out."""
    directory: Path
    """The run's."""

    def model(self) -> WhisperMoEModel:
        """The model, with what stays as it is frozen. A module that is added to it learns beside it, and stays in the run."""
        return build_model(self.initial, self.recipe)

    def learned(self, model: WhisperMoEModel) -> tuple[Batches, Objective]:
        """Batches of this process's share of the data, and the losses."""
        return self.mixed(), SpeechObjective(self.recipe.losses)

    def figures(self) -> Figures:
        """What it is judged by. What would end the run at its first evaluation ends it now."""
        settings, initial = self.recipe.evaluation, self.initial
        decode = settings.metric != "loss"
        missing = [name for name in ("rapidfuzz", "whisper_normalizer") if decode and find_spec(name) is None]
        if missing:
            raise RecipeError(f"evaluation.metric needs {' and '.join(missing)}: pip install 'whisper-moe[train]'")
        corpora = self._judges()
        names = [corpus.name for corpus in corpora]
        if doubled := [name for name in names if names.count(name) > 1]:
            raise RecipeError(
                f"data.evaluation: several corpora are called {doubled[0]!r}; give each a `name` in the recipe"
            )
        reader = self.unchanged()
        for corpus in corpora:
            check_rows(corpus, reader, decode=decode)
        texts, margin = (initial.tokenizer, initial.generation), initial.config.margin
        evaluator = Evaluator(reader, *texts, margin=margin, decode=decode, padded=settings.padded)
        asked = {"batch_size": settings.batch_size, "note": self.note}
        return lambda model, stop: evaluator.figures(model, corpora, stop_requested=stop, **asked)

    def unchanged(self) -> ExampleReader:
        """Of samples as they are: films that are judged by are not changed as those that are learned from."""
        reading = self.recipe.data.loader.examples.model_copy(update={"films": None})
        return ExampleReader(self.initial.tokenizer, self.initial.config, reading)

    def held_out(self, reader: ExampleReader, objective: Objective) -> Figures:
        """For tasks that nothing is decoded in: the losses of the data to be judged by, with the same draws every time."""
        if (metric := self.recipe.evaluation.metric) != "loss":
            raise RecipeError(f"evaluation.metric is {metric}, and the loss is all there is here")
        loader = self.loader(self._judges(), reader)
        start = loader.state_dict()

        @torch.inference_mode()
        def figures(model: WhisperMoEModel, stop: Callable[[], bool]) -> dict[str, float] | None:
            loader.load_state_dict(start)
            found, whole = Counter[str](), 0.0
            for batch in loader:
                if stop():
                    return None
                totals = objective.totals(batch.packs)
                terms = objective(model, batch.packs, totals, self.parallel)
                for name, value in {"loss": terms.loss, **terms.parts}.items():
                    found[name] += totals.tokens * float(value)  # pyright: ignore[reportArgumentType]
                whole += totals.tokens
            return {name: value / whole for name, value in found.items()}

        return figures

    def _judges(self) -> list[Corpus]:
        """What there is to be judged by."""
        data, limit = self.recipe.data, self.recipe.evaluation.limit
        configs = data.evaluation
        if limit is not None:
            configs = [each.model_copy(update={"limit": min(each.limit or limit, limit)}) for each in configs]
        return list(self.opened(configs, most_missing=data.loader.max_corrupt_share))

    def mixed(self, reader: ExampleReader | None = None) -> PackedLoader:
        """The corpora to learn from, as the recipe mixes them; ``reader``: of samples, where it is not the usual one."""
        data = self.recipe.data
        # Without a stream among them the loader counts what is missing, with what else its survey finds.
        streaming = any(config.streaming for config in data.train)
        most = data.loader.max_corrupt_share if streaming else 1.0
        corpora = list(self.opened(data.train, most_missing=most))
        pairs = zip(corpora, data.train, strict=True)
        weights = {each.name: given.weight for each, given in pairs if given.weight != 1}
        return self.loader(corpora, reader, weights)

    def loader(
        self, corpora: Sequence[Corpus], reader: ExampleReader | None = None, weights: Weights | None = None
    ) -> PackedLoader:
        """Batches of these corpora."""
        loader = PackedLoader(
            corpora,
            self.initial.tokenizer,
            self.initial.config,
            self.recipe.data.loader,
            rank=self.parallel.data_rank,
            world=self.parallel.data_size,
            reader=reader,
            weights=weights,
            note=self.note,
        )
        if left := loader.excluded:
            logger.warning("%d samples are left out, the first: %s; %s names all", len(left), left[0], SKIPPED)
        return loader

    def opened(self, configs: Iterable[CorpusConfig], *, most_missing: float = 1.0) -> Iterator[Corpus]:
        """Corpora; what each lists and cannot give is told, and forgotten where a limit is reached all the same.

        Raises :class:`DataError` where a share above ``most_missing`` of one is missing.
        """
        for config in configs:
            corpus = open_corpus(config)
            self.note(corpus.left_out)
            for remark in corpus.remarks:
                logger.info("%s: %s", corpus.name, remark)
            if left := corpus.left_out:
                logger.warning(
                    f"{corpus.name}: {len(left):,} samples are listed and cannot be had, the first: {_first(left)}"
                )
            if config.limit is not None and (corpus.streaming or len(corpus) == config.limit):
                corpus = replace(corpus, left_out=())
            elif left and most_missing < 1:
                # A stream has no length; what lists its samples beforehand can be opened as a whole, too.
                whole = config.model_copy(update={"streaming": False})
                known = len(left) + len(open_corpus(whole) if corpus.streaming else corpus)
                if len(left) > most_missing * known:
                    cause = f"{len(left):,} of {known:,} samples cannot be had, more than {most_missing:.1%}"
                    raise DataError(corpus.name, f"{cause}; the first: {_first(left)}")
            yield corpus


def check_rows(corpus: Corpus, reader: ExampleReader, *, decode: bool) -> None:
    """Raise :class:`RecipeError` where no row can be judged by, or the first that has nothing wrong with it is not for this
    model."""
    from whisper_moe.media.normalize import normalize

    causes: list[str] = []
    for sample in items(corpus):
        if decode and isinstance(sample, Sample) and sample.audio is None:
            raise RecipeError(f"data.evaluation: {corpus.name}: texts and films are judged by evaluation.metric: loss")
        try:
            found = tried(sample, partial(reader.read, margin=0.0))
        except ValueError as error:
            raise RecipeError(f"data.evaluation: {error}") from error
        if isinstance(sample, Skipped) or isinstance(found, Skipped):
            causes.append(str(found))
            continue
        if not decode or normalize(sample.text, sample.target_language):
            return
        causes.append(f"{sample.id}: its text has no word that could be counted")
    cause = f"none of the {len(causes):,} rows can be judged by; the first: {_first(causes)}"
    raise RecipeError(f"data.evaluation: {corpus.name}: {cause}")


def _first(named: Iterable[object]) -> str:
    return "; ".join([str(each) for each in named][:NAMED])
