"""What a run starts from: a model with the parts and tokens that the recipe adds, and what it needs to speak.

All but the weights is kept in the run's own folder, so that the run can go on and be exported when the source is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whisper_moe.config import ModelConfig
from whisper_moe.media.languages import NewLanguage
from whisper_moe.media.tokenizer import Tokenizer, read_backend
from whisper_moe.train.recipe import ModelRecipe, RecipeError
from whisper_moe.weights.default import load_model
from whisper_moe.weights.files import atomic_folder, json_bytes, read_bytes, read_json
from whisper_moe.weights.generation import of_any_language, speaking
from whisper_moe.weights.manifest import CONFIG, GENERATION, TOKENIZER, read_config
from whisper_moe.weights.parts import expected_shapes
from whisper_moe.weights.tokens import add_languages
from whisper_moe.weights.upcycle import add_parts, upcycle

START = "start"
"""The folder, within a run's."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """A model before its first step; ``state`` is empty where a checkpoint will give it."""

    config: ModelConfig
    state: dict[str, Tensor]
    generation: dict[str, Any]
    tokenizer_json: bytes

    @property
    def tokenizer(self) -> Tokenizer:
        from tokenizers import Tokenizer as Backend

        return speaking(Backend.from_buffer(self.tokenizer_json), self.generation, TOKENIZER)


def from_source(
    recipe: ModelRecipe, *, margin: float | None, biased: bool, seed: int, announce: Callable[[str], None]
) -> Start:
    """Load the source and add what the recipe asks for. ``margin``: that the model will be used with; None: the source's.
    ``biased``: routers get a bias on their choice.

    Raises ``ValueError`` for a source that cannot be had or cannot take the parts.
    """
    loaded = load_model(recipe.source, announce=announce)
    config, state = loaded.config, dict(loaded.state)
    if recipe.moe is not None or recipe.ttt is not None:
        config, state = upcycle(config, state, moe=recipe.moe, ttt=recipe.ttt, seed=seed)
    parts = {name: part for name in ("adapt", "conformer") if (part := getattr(recipe, name)) != getattr(config, name)}
    if any(parts.values()):
        config, state = add_parts(config, state, **parts, seed=seed)
    config = config.model_copy(update={"context_margin": config.margin if margin is None else margin})
    file = loaded.tokenizer_files[TOKENIZER]
    start = Start(
        config=config, state=state, generation=of_any_language(loaded.generation),
        tokenizer_json=file if isinstance(file, bytes) else read_backend(file).to_str().encode(),
    )  # fmt: skip
    if biased:
        start = _with_biases(start)
    return _with_languages(start, recipe.new_languages) if recipe.new_languages else start


def _with_biases(start: Start) -> Start:
    """Zeros, with which the choice is what it was."""
    if start.config.moe is None:
        raise RecipeError("losses.balancing is bias, and the model has no experts")
    moe = start.config.moe.model_copy(update={"balance_bias": True})
    config = start.config.model_copy(update={"moe": moe})
    shapes = expected_shapes(config)
    added = {key: torch.zeros(shape) for key, shape in shapes.items() if key not in start.state}
    return replace(start, config=config, state=start.state | added)


def _with_languages(start: Start, languages: Sequence[str]) -> Start:
    """A token for each language that the model lacks."""
    known = start.tokenizer.languages
    wanted = [language for language in map(NewLanguage.parse, languages) if language.code not in known]
    if not wanted:
        return start
    files = {TOKENIZER: start.tokenizer_json}
    config, state, generation, files = add_languages(start.config, start.state, start.generation, files, wanted)
    content = files[TOKENIZER]
    assert isinstance(content, bytes)
    return Start(config=config, state=state, generation=generation, tokenizer_json=content)


def write_start(run: Path, start: Start) -> None:
    """Keep all but the weights in the run's folder."""
    with atomic_folder((run / START).resolve(), overwrite=True) as folder:
        (folder / CONFIG).write_bytes(json_bytes(start.config.model_dump(mode="json")))
        (folder / GENERATION).write_bytes(json_bytes(start.generation))
        (folder / TOKENIZER).write_bytes(start.tokenizer_json)


def read_start(run: Path) -> Start:
    """What :func:`write_start` kept."""
    folder = run / START
    return Start(
        config=read_config(folder / CONFIG), state={}, generation=read_json(folder / GENERATION),
        tokenizer_json=read_bytes(folder / TOKENIZER),
    )  # fmt: skip
