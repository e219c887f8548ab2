"""Tokens that a source lacks: languages first, and whatever else a prompt may name later.

They follow the source's own vocabulary, padding included, and are found by name. Their embedding rows are a part of their own
(``tokens.safetensors``), so that the core stays as it was, byte for byte; and their logits a product of their own, so that those
of the source's tokens stay as they were, bit for bit. A row starts as the mean of the rows of related tokens (J. Hewitt,
*Initializing New Word Embeddings for Pretrained Language Models*, 2021). A language that nobody has trained is not detected
unless it is asked for: the mean of others would take their place. What a row began as is noted, so that a checkpoint can tell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from whisper_moe.config import ModelConfig
from whisper_moe.media.languages import NewLanguage
from whisper_moe.media.tokenizer import Tokenizer
from whisper_moe.weights.files import CheckpointError, listed, read_bytes
from whisper_moe.weights.generation import of_any_language
from whisper_moe.weights.manifest import TOKENIZER
from whisper_moe.weights.parts import EMBEDDING, NEW_TOKENS

if TYPE_CHECKING:
    import tokenizers

Files = Mapping[str, Path | bytes]
UNTRAINED = "untrained_rows"
"""In a generation config: the languages whose rows nobody has trained yet, each with the digest of what its row began as."""


class Extended(NamedTuple):
    """A model with more tokens, as :func:`~whisper_moe.weights.checkpoint.save_checkpoint` takes it."""

    config: ModelConfig
    state: dict[str, Tensor]
    generation: dict[str, Any]
    tokenizer_files: dict[str, Path | bytes]


def add_languages(
    config: ModelConfig,
    state: Mapping[str, Tensor],
    generation: Mapping[str, Any],
    tokenizer_files: Files,
    languages: Sequence[NewLanguage],
) -> Extended:
    """Give a model, dense or a mixture, a token for each of these languages.

    ``state``: float32; its tensors are shared, not changed. ``generation`` then lists the languages, their names, and that
    they are not detected (:func:`detected_when_trained` takes that back). Raises ``ValueError`` for an English-only model, for
    a language that the model has, and for relatives that it has not.
    """
    if not languages:
        return Extended(config, dict(state), dict(generation), dict(tokenizer_files))
    backend = read_tokenizer_json(tokenizer_files)
    tokenizer = Tokenizer(read_tokenizer_json(tokenizer_files), generation)
    if not tokenizer.is_multilingual:
        raise ValueError("an English-only model has no tokens of languages; add languages to a multilingual one")
    rows: dict[str, Tensor] = {}
    for language in languages:
        token = f"<|{language.code}|>"
        if language.code in tokenizer.languages or token in rows:
            raise ValueError(f"the model has the language {language.code!r} already")
        rows[token] = _start(language, tokenizer, config, state)
    config, state, files = _append(config, state, tokenizer_files, backend, rows)
    named = {language.code: language.name for language in languages}
    ids = {f"<|{code}|>": backend.token_to_id(f"<|{code}|>") for code in named}
    listed_ids = generation.get("lang_to_id") or {f"<|{code}|>": id for code, id in tokenizer.languages.items()}
    added = {
        "is_multilingual": True,
        "lang_to_id": {**listed_ids, **ids},
        "language_names": {**(generation.get("language_names") or {}), **named},
        "undetected_languages": sorted({*(generation.get("undetected_languages") or ()), *named}),
        UNTRAINED: {**(generation.get(UNTRAINED) or {}), **{code: _digest(rows[f"<|{code}|>"]) for code in named}},
    }
    return Extended(config, state, {**of_any_language(generation), **added}, files)


def detected_when_trained(
    generation: Mapping[str, Any], config: ModelConfig, state: Mapping[str, Tensor]
) -> dict[str, Any]:
    """The generation config of this state: languages whose rows are no longer what they began as are detected from now on.

    Training moves a row together with those of all other languages, for every sample's language is among the labels of such a
    model: a row that was never the right answer loses against the others. A row that was frozen, or whose beginning is not
    known, stays left out.
    """
    began: dict[str, str] = dict(generation.get(UNTRAINED) or {})
    places = {name: place for place, name in enumerate(config.new_tokens)}
    moved = {
        code
        for code, digest in began.items()
        if (place := places.get(f"<|{code}|>")) is not None and _digest(state[NEW_TOKENS][place]) != digest
    }
    if not moved:
        return dict(generation)
    left = {
        "undetected_languages": [code for code in generation.get("undetected_languages") or () if code not in moved],
        UNTRAINED: {code: digest for code, digest in began.items() if code not in moved},
    }
    rest = {key: value for key, value in generation.items() if key not in left}
    return rest | {key: value for key, value in left.items() if value}


def _digest(row_D: Tensor) -> str:
    """Of a row's float32 numbers."""
    return sha256(row_D.detach().cpu().contiguous().numpy().tobytes()).hexdigest()


def one_vocabulary(config: ModelConfig, state: Mapping[str, Tensor]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The same model with all its tokens in one embedding, as other programs have it."""
    if not config.new_tokens:
        return config, dict(state)
    joined = {key: tensor for key, tensor in state.items() if key != NEW_TOKENS}
    joined[EMBEDDING] = torch.cat((state[EMBEDDING], state[NEW_TOKENS]))
    return config.model_copy(update={"new_tokens": ()}), joined


def read_tokenizer_json(files: Files) -> tokenizers.Tokenizer:
    """A new copy of the tokenizer that these files hold."""
    from tokenizers import Tokenizer as Backend

    source = files[TOKENIZER]
    try:
        return Backend.from_buffer(source if isinstance(source, bytes) else read_bytes(source))
    except CheckpointError:
        raise
    except Exception as error:  # the Rust side raises bare Exceptions
        raise CheckpointError(f"{TOKENIZER}: not a tokenizer ({error})") from error


def _start(language: NewLanguage, tokenizer: Tokenizer, config: ModelConfig, state: Mapping[str, Tensor]) -> Tensor:
    """[D]: the mean over the languages that this one is said to be like, over its relatives, or over all that are known."""
    if language.like:
        ids = [tokenizer.language_id(name) for name in language.like]
    else:
        known = tokenizer.detected
        ids = [known[code] for code in language.relatives if code in known] or list(known.values())
    own = config.source_vocab_size
    return torch.stack([state[EMBEDDING][i] if i < own else state[NEW_TOKENS][i - own] for i in ids]).mean(0)


def _append(
    config: ModelConfig,
    state: Mapping[str, Tensor],
    files: Files,
    backend: tokenizers.Tokenizer,
    rows: Mapping[str, Tensor],
) -> tuple[ModelConfig, dict[str, Tensor], dict[str, Path | bytes]]:
    """The model with these tokens, name → row [D], and ``backend`` with their names at the ids that follow."""
    from tokenizers import AddedToken

    present = [name for name in rows if backend.token_to_id(name) is not None]
    if present:
        raise ValueError(f"the tokenizer has {listed(present)} already")
    # Rows of padding have no name yet, and a tokenizer gives out its ids without a gap.
    padding = [f"<|padding-{id}|>" for id in range(backend.get_vocab_size(), config.vocab_size)]
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in (*padding, *rows)])
    places = [backend.token_to_id(name) for name in rows]
    if places != list(range(config.vocab_size, config.vocab_size + len(rows))):
        raise ValueError(
            f"{TOKENIZER}: names {backend.get_vocab_size() - len(rows)} tokens, the embedding has {config.vocab_size} rows: "
            "no token can follow both"
        )
    grown = config.model_dump() | {
        "vocab_size": config.vocab_size + len(rows),
        "new_tokens": (*config.new_tokens, *rows),
    }
    before = [state[NEW_TOKENS]] if config.new_tokens else []
    new = {key: tensor for key, tensor in state.items() if key != NEW_TOKENS}
    new[NEW_TOKENS] = torch.cat((*before, torch.stack(list(rows.values()))))
    content = backend.to_str(pretty=True).encode()
    return ModelConfig.model_validate(grown), new, {**files, TOKENIZER: content}
