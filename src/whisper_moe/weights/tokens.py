"""Which tokens a model has, and which of them steer generation.

``generation_config.json`` is completed by name where a source says less or nothing. Tokens of further languages are added by
:func:`~whisper_moe.weights.upcycle.add_languages`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo
from torch import Tensor

from whisper_moe.config import ModelConfig, problems
from whisper_moe.media.tokenizer import Tokenizer, read_backend
from whisper_moe.weights.files import CheckpointError, read_bytes, regular_size
from whisper_moe.weights.parts import NEW_TOKENS

if TYPE_CHECKING:
    import tokenizers

GENERATION, TOKENIZER = "generation_config.json", "tokenizer.json"
OLD_TOKENIZER = ("vocab.json", "merges.txt", "added_tokens.json")
UNTRAINED = "untrained_rows"
"""In a generation config: the languages whose rows nobody has trained yet, each with the digest of what its row began as."""
PUBLISHED = {
    51_864: ("tiny.en", "base.en", "small.en", "medium.en"),
    51_865: ("base", "tiny", "small", "medium", "large-v2", "large"),
    51_866: ("large-v3", "large-v3-turbo"),
}
"""Vocabulary size → OpenAI's models on the Hub that share its tokenizer."""
_LEGACY = ("suppress_tokens", "begin_suppress_tokens", "forced_decoder_ids", "max_length")
"""What ``config.json`` said before ``generation_config.json`` existed. Ids are looked up by name instead."""
EXPERT_LANGUAGES = "expert_languages"
"""In a merged model's generation config: expert → code of the one language that it was made for."""
UNTIMED_EXPERTS = "untimed_experts"
"""… and the experts that have lost timestamps."""
EXPERT_SOURCES = "expert_sources"
"""… and expert → what it was trained on, with the licences of that; the manifest says it too."""
_STATES_LANGUAGE = ("language", "forced_decoder_ids")

logger = logging.getLogger(__name__)


def _in_vocabulary(id: int, info: ValidationInfo) -> int:
    if id >= (info.context or 0):
        raise ValueError(f"{id} is none of {info.context} tokens")
    return id


Id = Annotated[int, Field(ge=-1), AfterValidator(_in_vocabulary)]
"""A token, or the -1 that stands for all annotations."""
Ids = Annotated[list[Id], BeforeValidator(lambda value: value if isinstance(value, list) else [value])]


class _Generation(BaseModel):
    """What decoding relies on in a generation config; validated with the size of the vocabulary as context."""

    model_config = ConfigDict(strict=True)

    suppress_tokens: list[Id] = []
    begin_suppress_tokens: list[Id] = []
    bos_token_id: Ids = []
    eos_token_id: Ids = []
    pad_token_id: Ids = []
    decoder_start_token_id: Ids = []
    no_timestamps_token_id: Ids = []
    prev_sot_token_id: Ids = []
    lang_to_id: dict[str, Id] = {}
    task_to_id: dict[str, Id] = {}
    max_initial_timestamp_index: int = Field(default=0, ge=0)
    language_names: dict[str, str] = {}
    undetected_languages: list[str] = []
    untrained_rows: dict[str, str] = {}
    expert_languages: dict[str, str] = {}
    untimed_experts: list[str] = []


# What a source says


def read_tokenizer(path: Path, generation: Mapping[str, Any] | None = None) -> tuple[bytes, Tokenizer]:
    """``tokenizer.json`` for a checkpoint, and the tokenizer it describes, from a folder or a file.

    The file's own bytes where it is complete; otherwise built from ``vocab.json``, ``merges.txt`` and
    ``added_tokens.json``, with the timestamp tokens that early checkpoints leave out. ``generation``: the source's
    generation config, which may say whether the model is multilingual.
    """
    file, content = path / TOKENIZER if path.is_dir() else path, b""
    try:
        if file.exists():
            content = read_bytes(file)
        else:
            for old in filter(Path.exists, (path / name for name in OLD_TOKENIZER)):
                regular_size(old)
        if b"<|0.00|>" not in content:
            content = read_backend(path).to_str().encode()
        stated = (generation or {}).get("is_multilingual")
        return content, Tokenizer(shared_backend(content), {} if stated is None else {"is_multilingual": stated})
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{file if file.exists() else path}: not a tokenizer ({error})") from error


def parsed(tokenizer_json: bytes) -> tokenizers.Tokenizer:
    """Raises ``ValueError`` for what is none."""
    from tokenizers import Tokenizer as Backend

    try:
        return Backend.from_buffer(tokenizer_json)
    except Exception as error:  # the Rust side raises bare Exceptions
        raise ValueError(str(error)) from error


shared_backend = lru_cache(maxsize=1)(parsed)
"""The same, parsed once for every :class:`Tokenizer` of these bytes, all of which change it alike. What is written is
:func:`parsed` anew."""


def complete(
    generation: Mapping[str, Any] | None,
    tokenizer: Tokenizer,
    config: ModelConfig,
    *,
    legacy: Mapping[str, Any] | None = None,
    origin: str | Path,
) -> dict[str, Any]:
    """A generation config with every token id that decoding needs.

    ``generation``: the source's own file, whose entries are kept; without one (None), openai/whisper's standard and
    what ``legacy`` (``config.json``) says. ``origin``: the file that errors name. Raises ``CheckpointError`` for ids that the
    embedding does not have. Alignment heads of other layers than the model's (distilled models copied them) are left out.
    """
    try:
        _check_vocabulary(tokenizer, config)
        if generation is None:
            said = {key: value for key, value in (legacy or {}).items() if key in _LEGACY and value is not None}
            if (
                stated_language(said, tokenizer) == "en"
            ):  # OpenAI's own files said so, of models that speak 99 languages
                del said["forced_decoder_ids"]
            generation = _standard(tokenizer, config) | said
        result = _by_name(tokenizer) | {key: value for key, value in generation.items() if value is not None}
        _Generation.model_validate(result, context=config.vocab_size)
        tokenizer.configured(result)
    except ValidationError as error:
        raise CheckpointError(f"{origin}: {problems(error)}") from error
    except ValueError as error:
        raise CheckpointError(f"{origin}: {error}") from error
    if not _are_heads(result.get("alignment_heads", []), config):
        said = "alignment_heads are not this model's; words are timed by the upper half of its decoder"
        logger.warning("%s: %s", origin, said)
        del result["alignment_heads"]
    return result


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


def _check_vocabulary(tokenizer: Tokenizer, config: ModelConfig) -> None:
    """Refuse the tokenizer of another kind of Whisper: where it is too small, each control token would be read as its neighbour.

    One with tokens that a fine-tune has appended, and rows that are padding, are as they should be.
    """
    rows, listed = config.source_vocab_size, tokenizer.timestamp_end + 1
    mixed = rows in PUBLISHED and listed in PUBLISHED and listed != rows
    if listed > config.vocab_size or (mixed and tokenizer.vocab_size != config.vocab_size):
        kinds = [f" (as openai/whisper-{PUBLISHED[size][0]})" if size in PUBLISHED else "" for size in (rows, listed)]
        raise ValueError(
            f"the weights have {rows:,} tokens{kinds[0]}, the tokenizer {listed:,}{kinds[1]}; they belong to different "
            "models: upcycle --base MODEL takes the tokenizer of another"
        )
    for row, name in enumerate(config.new_tokens, rows):
        if (id := tokenizer.token_id(name)) != row:
            raise ValueError(f"the new token {name} has the row {row}, in the tokenizer the id {id}")


def _are_heads(heads: Any, config: ModelConfig) -> bool:
    try:
        ids = all(type(part) is int for pair in heads for part in pair)
        return ids and all(0 <= i < config.decoder_layers and 0 <= head < config.decoder_heads for i, head in heads)
    except (TypeError, ValueError):
        return False


# Languages that were added


def detected_when_trained(
    generation: Mapping[str, Any], config: ModelConfig, state: Mapping[str, Tensor]
) -> dict[str, Any]:
    """The generation config of this state: languages whose rows are no longer what they began as are detected from now on.

    Training moves a row together with those of all other languages, for every sample's language is among the labels of such a
    model: a row that was never the right answer loses against the others. A row that was frozen, or whose beginning is not
    known, stays left out.
    """
    began, names = dict[str, str](generation.get(UNTRAINED) or {}), config.new_tokens
    rows = {code: names.index(token) for code in began if (token := f"<|{code}|>") in names}
    moved = {code for code, row in rows.items() if digest(state[NEW_TOKENS][row]) != began[code]}
    if not moved:
        return dict(generation)
    undetected = [code for code in generation.get("undetected_languages") or () if code not in moved]
    left = {"undetected_languages": undetected, UNTRAINED: {code: began[code] for code in began if code not in moved}}
    return {key: value for key, value in {**generation, **left}.items() if value or key not in left}


def digest(row_D: Tensor) -> str:
    """Of a row's float32 numbers."""
    return sha256(row_D.detach().cpu().contiguous().numpy().tobytes()).hexdigest()
