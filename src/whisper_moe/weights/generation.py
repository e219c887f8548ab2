"""Which tokens steer generation: ``generation_config.json``, completed by name where a source says less or nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whisper_moe.config import ModelConfig
from whisper_moe.media.tokenizer import Tokenizer, read_backend
from whisper_moe.weights.files import CheckpointError, read_bytes, regular_size
from whisper_moe.weights.manifest import GENERATION, TOKENIZER

if TYPE_CHECKING:
    import tokenizers

_LEGACY = ("suppress_tokens", "begin_suppress_tokens", "forced_decoder_ids", "max_length")
"""What ``config.json`` said before ``generation_config.json`` existed. Ids are looked up by name instead."""
_LISTS = ("suppress_tokens", "begin_suppress_tokens")
_STATES_LANGUAGE = ("language", "forced_decoder_ids")
PUBLISHED = {
    51_864: ("tiny.en", "base.en", "small.en", "medium.en"),
    51_865: ("base", "tiny", "small", "medium", "large-v2", "large"),
    51_866: ("large-v3", "large-v3-turbo"),
}
"""Vocabulary size → OpenAI's models on the Hub that share its tokenizer."""


def read_tokenizer(path: Path, generation: Mapping[str, Any] | None = None) -> tuple[bytes, Tokenizer]:
    """``tokenizer.json`` for a checkpoint, and the tokenizer it describes, from a folder or a file.

    ``generation``: the source's generation config, which may say whether the model is multilingual.

    The file's own bytes where it is complete; otherwise built from ``vocab.json``, ``merges.txt`` and
    ``added_tokens.json``, with the timestamp tokens that early checkpoints leave out.
    """
    for name in ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json") if path.is_dir() else ("",):
        if (path / name).exists():
            regular_size(path / name)
    try:
        backend = read_backend(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        content = read_bytes(file) if file.exists() else b""
        if b"<|0.00|>" not in content:
            content = backend.to_str().encode()
        stated = (generation or {}).get("is_multilingual")
        return content, Tokenizer(backend, {} if stated is None else {"is_multilingual": stated})
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def checked(
    backend: tokenizers.Tokenizer,
    generation: Mapping[str, Any],
    config: ModelConfig,
    *,
    directory: Path,
    announce: Callable[[str], None],
) -> tuple[dict[str, Any], Tokenizer]:
    """What a checkpoint in ``directory`` says of its tokens, checked and completed like a foreign Whisper's."""
    file, stated = directory / GENERATION, generation.get("is_multilingual")
    tokenizer = speaking(backend, {} if stated is None else {"is_multilingual": stated}, directory / TOKENIZER)
    complete = complete_generation(generation, tokenizer, config, origin=file, announce=announce)
    return complete, speaking(backend, complete, file)


def speaking(backend: tokenizers.Tokenizer, generation: Mapping[str, Any], origin: str | Path) -> Tokenizer:
    """The tokenizer, with the languages that the generation config adds. ``origin``: the file that errors name."""
    try:
        return Tokenizer(backend, generation)
    except ValueError as error:
        raise CheckpointError(f"{origin}: {error}") from error


def complete_generation(
    generation: Mapping[str, Any] | None,
    tokenizer: Tokenizer,
    config: ModelConfig,
    *,
    legacy: Mapping[str, Any] | None = None,
    origin: str | Path,
    announce: Callable[[str], None],
) -> dict[str, Any]:
    """A generation config with every token id that decoding needs.

    ``generation``: the source's own file, whose entries are kept; without one (None), openai/whisper's standard and
    what ``legacy`` (``config.json``) says. Raises ``CheckpointError`` for ids that the embedding does not have.
    Alignment heads of other layers than the model's (distilled models copied them) are left out, and ``announce``
    hears of it.
    """
    if generation is None:
        said = {key: value for key, value in (legacy or {}).items() if key in _LEGACY and value is not None}
        if stated_language(said, tokenizer) == "en":  # OpenAI's own files said so, of models that speak 99 languages
            del said["forced_decoder_ids"]
        generation = _standard(tokenizer, config) | said
    stated = {key: value for key, value in generation.items() if value is not None}
    complete = _by_name(tokenizer) | stated
    _check_vocabulary(tokenizer, config, origin)
    _check_ids(complete, tokenizer, config, origin)
    heads = complete.get("alignment_heads")
    if heads is not None and not _are_heads(heads, config):
        announce(f"{origin}: alignment_heads are not this model's; words are timed by the upper half of its decoder")
        del complete["alignment_heads"]
    return complete


def stated_language(generation: Mapping[str, Any], tokenizer: Tokenizer) -> str | None:
    """The code of the one language that a fine-tune says it is for: ``language``, or one among its ``forced_decoder_ids``."""
    name, forced = (generation.get(key) for key in _STATES_LANGUAGE)
    if not tokenizer.is_multilingual:
        return None
    if isinstance(name, str):
        try:
            code = tokenizer.language_code(name.strip("<|>"))
        except ValueError:
            return None
        return code if code in tokenizer.languages else None
    codes = {id: code for code, id in tokenizer.languages.items()}
    pairs = forced if isinstance(forced, list) else []
    ids = (pair[1] for pair in pairs if isinstance(pair, list) and len(pair) == 2 and type(pair[1]) is int)
    return next((codes[id] for id in ids if id in codes), None)


def of_any_language(generation: Mapping[str, Any]) -> dict[str, Any]:
    """The same, stating no language: that of a model which is about to learn others."""
    return {key: value for key, value in generation.items() if key not in _STATES_LANGUAGE}


def _by_name(tokenizer: Tokenizer) -> dict[str, Any]:
    ids: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eot)
    ids |= {
        "decoder_start_token_id": tokenizer.sot,
        "no_timestamps_token_id": tokenizer.no_timestamps,
        "prev_sot_token_id": tokenizer.sot_prev,
        "is_multilingual": tokenizer.is_multilingual,
    }
    if tokenizer.is_multilingual:
        ids["lang_to_id"] = {f"<|{code}|>": id for code, id in tokenizer.languages.items()}
        ids["task_to_id"] = dict(tokenizer.tasks)
    return ids


def _standard(tokenizer: Tokenizer, config: ModelConfig) -> dict[str, Any]:
    """What openai/whisper does by default: no annotations, and neither a space nor the end as the first token."""
    return {
        "suppress_tokens": list(tokenizer.suppressed()),
        "begin_suppress_tokens": [*tokenizer.encode(" "), tokenizer.eot],
        "max_initial_timestamp_index": 50,
        "max_length": config.max_target_positions,
        "return_timestamps": False,
    }


def _check_vocabulary(tokenizer: Tokenizer, config: ModelConfig, origin: str | Path) -> None:
    """Refuse the tokenizer of another kind of Whisper: where it is too small, each control token would be read as its neighbour.

    One with tokens that a fine-tune has appended, and rows that are padding, are as they should be.
    """
    rows, listed = config.source_vocab_size, tokenizer.timestamp_end + 1
    mixed = rows in PUBLISHED and listed in PUBLISHED and listed != rows
    if listed <= config.vocab_size and not (mixed and tokenizer.vocab_size != config.vocab_size):
        return
    kinds = [f" (as openai/whisper-{PUBLISHED[size][0]})" if size in PUBLISHED else "" for size in (rows, listed)]
    raise CheckpointError(
        f"{origin}: the weights have {rows:,} tokens{kinds[0]}, the tokenizer {listed:,}{kinds[1]}; they belong to different "
        "models: upcycle --base MODEL takes the tokenizer of another"
    )


def _check_ids(generation: Mapping[str, Any], tokenizer: Tokenizer, config: ModelConfig, origin: str | Path) -> None:
    for place, name in enumerate(config.new_tokens, config.source_vocab_size):
        if tokenizer.token_id(name) != place:
            raise CheckpointError(
                f"{origin}: the new token {name} has the row {place}, in the tokenizer the id {tokenizer.token_id(name)}"
            )
    for key, value in generation.items():
        ids = _ids(key, value, origin)
        wrong = [id for id in ids if not _is_id(id, config.vocab_size)]
        if wrong:
            raise CheckpointError(f"{origin}: {key} has {wrong[0]!r}, which is none of {config.vocab_size} tokens")
    first = generation.get("max_initial_timestamp_index", 0)
    if type(first) is not int or first < 0:
        raise CheckpointError(f"{origin}: max_initial_timestamp_index is {str(first)[:80]!r}, must be a number")
    for name, id in generation.get("lang_to_id", {}).items():
        known = tokenizer.languages.get(name.strip("<|>"), id)
        if known != id:
            raise CheckpointError(f"{origin}: lang_to_id gives {name} the id {id}, the tokenizer {known}")
    _check_languages(generation, tokenizer, origin)


def _check_languages(generation: Mapping[str, Any], tokenizer: Tokenizer, origin: str | Path) -> None:
    names, left_out = generation.get("language_names", {}), generation.get("undetected_languages", [])
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"{origin}: language_names is {str(names)[:80]!r}, must be a table of names")
    rows = generation.get("untrained_rows", {})
    if not isinstance(rows, dict) or not all(isinstance(digest, str) for digest in rows.values()):
        raise CheckpointError(f"{origin}: untrained_rows is {str(rows)[:80]!r}, must be a table of digests")
    known = {*tokenizer.languages, *(name.strip("<|>") for name in generation.get("lang_to_id", {}))}
    if not isinstance(left_out, list) or not all(isinstance(code, str) and code in known for code in left_out):
        raise CheckpointError(
            f"{origin}: undetected_languages is {str(left_out)[:80]!r}, must be a list of its languages"
        )
    if known and known <= set(left_out):
        raise CheckpointError(f"{origin}: undetected_languages leaves no language that could be detected")


def _ids(key: str, value: Any, origin: str | Path) -> list[Any]:
    """What must be ids in one entry of a generation config."""
    if key in _LISTS or key.endswith("_to_id"):
        needed = list if key in _LISTS else dict
        if not isinstance(value, needed):
            raise CheckpointError(f"{origin}: {key} has {str(value)[:80]!r}, which is no {needed.__name__} of tokens")
        return list(value.values() if isinstance(value, dict) else value)
    return (value if isinstance(value, list) else [value]) if key.endswith("_token_id") else []


def _is_id(value: object, vocab_size: int) -> bool:
    """Whether this is a token, or the -1 that stands for all annotations."""
    return type(value) is int and -1 <= value < vocab_size


def _are_heads(heads: Any, config: ModelConfig) -> bool:
    try:
        ids = all(type(part) is int for pair in heads for part in pair)
        return ids and all(0 <= i < config.decoder_layers and 0 <= head < config.decoder_heads for i, head in heads)
    except (TypeError, ValueError):
        return False
