"""What a Whisper gets: experts and TTT layers, parts that are always on, tokens of further languages.

It becomes a mixture that computes the same function (sparse upcycling, arXiv 2212.05055). With a shared expert, Whisper's own
feed-forward stays and the routed experts start with an output of exactly zero. Without one, every expert is a copy of the
feed-forward, and gates that sum to one add up to it. TTT layers start behind closed gates.

Languages that a source lacks follow its own vocabulary, padding included, and are found by name. Their embedding rows are a
part of their own (``tokens.safetensors``), so that the core stays as it was, byte for byte; and their logits a product of their
own, so that those of the source's tokens stay as they were, bit for bit. A row starts as the mean of the rows of related tokens
(J. Hewitt, *Initializing New Word Embeddings for Pretrained Language Models*, 2021). A language that nobody has trained is not
detected unless it is asked for: the mean of others would take their place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from whisper_moe.config import AdaptConfig, ConformerConfig, ModelConfig, MoEConfig, TTTConfig
from whisper_moe.config_aside import SensesConfig, SpeechConfig
from whisper_moe.media.languages import NewLanguage
from whisper_moe.model.model import WhisperMoEModel
from whisper_moe.weights.checkpoint import Loaded
from whisper_moe.weights.files import listed
from whisper_moe.weights.parts import ADAPT, EMBEDDING, NEW_TOKENS, SENSES, SPEECH, check_state, part_of
from whisper_moe.weights.tokens import TOKENIZER, UNTRAINED, digest, of_any_language, parsed

if TYPE_CHECKING:
    import tokenizers


def upcycled_config(config: ModelConfig, **parts: Any) -> ModelConfig:
    """The configuration with these parts, built anew rather than copied: so they are checked against each other.

    Raises ``ValueError`` where they do not fit.
    """
    return ModelConfig.model_validate(config.model_dump() | parts)


def _fresh_state(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return WhisperMoEModel(config).state_dict()


# Experts and TTT layers


def upcycle(
    config: ModelConfig,
    state: Mapping[str, Tensor],
    *,
    moe: MoEConfig | None,
    ttt: TTTConfig | None = None,
    seed: int = 0,
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Add ``moe`` and ``ttt`` to a dense model; returns the new configuration and state.

    ``seed`` is of the parts that are new (experts' first halves, router, TTT). Raises ``ValueError`` if ``config`` is not
    dense, if ``state`` is not what it describes, or if copies are asked for (no shared expert) in a size that is not the
    feed-forward's.
    """
    if config.moe is not None or config.ttt is not None:
        raise ValueError("only a dense Whisper can be upcycled; this model has experts or TTT layers already")
    check_state(config, state)  # what is missing would otherwise stay random
    copied = moe if moe is not None and not moe.shared else None
    for side, hidden in (("encoder", config.encoder_ffn_dim), ("decoder", config.decoder_ffn_dim)):
        if copied and copied.expert_dim != hidden:
            raise ValueError(
                f"without a shared expert, each expert is a copy of the {side}'s feed-forward of {hidden} hidden units; "
                f"expert_dim is {copied.expert_dim}"
            )
    upcycled = upcycled_config(config, moe=moe, ttt=ttt)
    new = _fresh_state(upcycled, seed)
    new |= {key: tensor for key, tensor in state.items() if key in new}  # the rest are feed-forwards to copy
    if copied:
        new |= {key: torch.stack([as_expert(key, state)] * copied.n_experts) for key in new if ".experts." in key}
    return upcycled, new


def as_expert(key: str, dense: Mapping[str, Tensor]) -> Tensor:
    """A tensor of a routed expert that is this model's feed-forward: up [F, D] as it is, and down [D, F] transposed."""
    block, name = key.split(".experts.")
    half, kind = name.split("_")
    source = dense[f"{block}.ffn.{half}.{kind}"]
    return source.T if name == "down_weight" else source


# Parts that are always on


def add_parts(
    config: ModelConfig,
    state: Mapping[str, Tensor],
    *,
    adapt: AdaptConfig | None = None,
    conformer: ConformerConfig | None = None,
    speech: SpeechConfig | None = None,
    senses: SensesConfig | None = None,
    seed: int = 0,
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Put parts beside a core, with experts or without, that are always on; the function stays the same, exactly.

    ``seed`` is of what starts at random behind a closed gate. Raises ``ValueError`` if the model has such a part already.
    """
    given = (("adapt", adapt), ("conformer", conformer), ("speech", speech), ("senses", senses))
    wanted = {name: part for name, part in given if part is not None}
    for name in wanted:
        if getattr(config, name) is not None:
            raise ValueError(f"the model has {name} already: what it has can be trained on, not added a second time")
    extended = upcycled_config(config, **wanted)
    fresh = _fresh_state(upcycled_config(extended, moe=None, ttt=None), seed)
    own = [key for key in fresh if key.startswith((SPEECH, SENSES)) or part_of(key, extended) == ADAPT]
    added = {key: fresh[key] for key in own if key not in state}
    return extended, dict(state) | added


# Languages


def add_languages(model: Loaded, languages: Sequence[NewLanguage]) -> Loaded:
    """Give a model, dense or a mixture, a token for each of these languages. Its tensors are shared, not changed.

    The generation config then lists the languages, their names, that they are not detected, and what their rows began as
    (:func:`~whisper_moe.weights.tokens.detected_when_trained`). Raises ``ValueError`` for an English-only model, for a language
    that the model has, and for relatives that it has not.
    """
    if not languages:
        return model
    tokenizer, config, generation = model.tokenizer, model.config, model.generation
    if not tokenizer.is_multilingual:
        raise ValueError("an English-only model has no tokens of languages; add languages to a multilingual one")
    rows: dict[str, Tensor] = {}
    for language in languages:
        token = f"<|{language.code}|>"
        if language.code in tokenizer.languages or token in rows:
            raise ValueError(f"the model has the language {language.code!r} already")
        rows[token] = _start(language, model)
    first = config.vocab_size
    backend = parsed(model.tokenizer_json)
    _name(list(rows), first, backend)
    grown = upcycled_config(config, vocab_size=first + len(rows), new_tokens=(*config.new_tokens, *rows))
    before = [model.state[NEW_TOKENS]] if config.new_tokens else []
    state = {key: tensor for key, tensor in model.state.items() if key != NEW_TOKENS}
    state[NEW_TOKENS] = torch.cat((*before, torch.stack(list(rows.values()))))
    named = {language.code: language.name for language in languages}
    known = generation.get("lang_to_id") or {f"<|{code}|>": id for code, id in tokenizer.languages.items()}
    began = dict(zip(named, map(digest, rows.values()), strict=True))
    added = {
        "is_multilingual": True,
        "lang_to_id": {**known, **{token: id for id, token in enumerate(rows, first)}},
        "language_names": {**(generation.get("language_names") or {}), **named},
        "undetected_languages": sorted({*(generation.get("undetected_languages") or ()), *named}),
        UNTRAINED: {**(generation.get(UNTRAINED) or {}), **began},
    }
    content, generation = backend.to_str(pretty=True).encode(), {**of_any_language(generation), **added}
    return replace(model, config=grown, state=state, generation=generation, tokenizer_json=content)


def _start(language: NewLanguage, model: Loaded) -> Tensor:
    """[D]: the mean over the languages that this one is said to be like, over its relatives, or over all that are known."""
    if language.like:
        ids = [model.tokenizer.language_id(name) for name in language.like]
    else:
        known = model.tokenizer.detected
        ids = [known[code] for code in language.relatives if code in known] or list(known.values())
    state, own = model.state, model.config.source_vocab_size
    return torch.stack([state[EMBEDDING][i] if i < own else state[NEW_TOKENS][i - own] for i in ids]).mean(0)


def _name(names: list[str], first: int, backend: tokenizers.Tokenizer) -> None:
    """Give the ids from ``first`` on these names; rows of padding before them have none yet, and get one."""
    from tokenizers import AddedToken

    if present := [name for name in names if backend.token_to_id(name) is not None]:
        raise ValueError(f"the tokenizer has {listed(present)} already")
    size = backend.get_vocab_size()
    padding = [f"<|padding-{id}|>" for id in range(size, first)]
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in (*padding, *names)])
    if [backend.token_to_id(name) for name in names] != list(range(first, first + len(names))):
        said = f"{TOKENIZER}: names {size} tokens, the embedding has {first} rows: no token can follow both"
        raise ValueError(said)
