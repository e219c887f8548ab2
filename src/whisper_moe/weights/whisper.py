"""Whispers as others publish them: names of weights, configurations, LoRA adapters, and a folder to write.

One table of names serves both directions. Query, key and value are one matrix here, and three there; Whisper has
no bias on keys, so that part of the fused bias is zero.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import save
from torch import Tensor

from whisper_moe.config import FRAMES_PER_SECOND, FULL_WINDOW, HOP, SAMPLE_RATE, ModelConfig, problems
from whisper_moe.weights import parts
from whisper_moe.weights.checkpoint import CONFIG, Loaded
from whisper_moe.weights.files import CheckpointError, atomic_folder, json_bytes, listed, read_json
from whisper_moe.weights.tokens import GENERATION, TOKENIZER

TRANSFORMERS, OPENAI = 1, 2
"""Columns of the table: ``WhisperForConditionalGeneration`` of transformers, the format of the Hub; and ``model_state_dict`` of
the ``.pt`` files of openai/whisper."""
_NAMES = """
encoder.positions               model.encoder.embed_positions.weight  encoder.positional_embedding
decoder.positions               model.decoder.embed_positions.weight  decoder.positional_embedding
decoder.token_embedding.weight  model.decoder.embed_tokens.weight     decoder.token_embedding.weight
encoder.stem.conv1.*            model.encoder.conv1.*                 encoder.conv1.*
encoder.stem.conv2.*            model.encoder.conv2.*                 encoder.conv2.*
encoder.norm.*                  model.encoder.layer_norm.*            encoder.ln_post.*
decoder.norm.*                  model.decoder.layer_norm.*            decoder.ln.*

attn_norm.*        self_attn_layer_norm.*                                  attn_ln.*
attn.qkv.*         self_attn.q_proj.*+self_attn.k_proj.*+self_attn.v_proj.*  attn.query.*+attn.key.*+attn.value.*
attn.out.*         self_attn.out_proj.*                                    attn.out.*
ffn_norm.*         final_layer_norm.*                                      mlp_ln.*
ffn.up.*           fc1.*                                                   mlp.0.*
ffn.down.*         fc2.*                                                   mlp.2.*

cross_norm.*       encoder_attn_layer_norm.*                               cross_attn_ln.*
cross_attn.q.*     encoder_attn.q_proj.*                                   cross_attn.query.*
cross_attn.kv.*    encoder_attn.k_proj.*+encoder_attn.v_proj.*             cross_attn.key.*+cross_attn.value.*
cross_attn.out.*   encoder_attn.out_proj.*                                 cross_attn.out.*
"""
"""Ours → theirs, several where ours is fused; ``*`` is weight and bias. Whole names, those in each block, and those that a
block of the decoder has besides."""
_WHOLE, _IN_BLOCK, _CROSS = ([line.split() for line in part.splitlines()] for part in _NAMES.strip().split("\n\n"))
_BLOCKS = ("", "model.{}.layers.{}.", "{}.blocks.{}.")
_WITHOUT_BIAS = re.compile(r".*\.(k_proj|key)\.bias")

FIELDS = {
    "vocab_size": ("vocab_size", "n_vocab"),
    "n_mels": ("num_mel_bins", "n_mels"),
    "d_model": ("d_model", "n_audio_state"),
    "encoder_layers": ("encoder_layers", "n_audio_layer"),
    "encoder_heads": ("encoder_attention_heads", "n_audio_head"),
    "encoder_ffn_dim": ("encoder_ffn_dim", None),
    "decoder_layers": ("decoder_layers", "n_text_layer"),
    "decoder_heads": ("decoder_attention_heads", "n_text_head"),
    "decoder_ffn_dim": ("decoder_ffn_dim", None),
    "max_source_positions": ("max_source_positions", "n_audio_ctx"),
    "max_target_positions": ("max_target_positions", "n_text_ctx"),
}
"""Our field → transformers' and OpenAI's. OpenAI's feed-forward is always four times as wide as the model."""
_FIXED = {"activation_function": "gelu", "scale_embedding": False, "tie_word_embeddings": True}
"""Options of transformers' configuration that would change what the weights compute, and the value they must have."""
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
_END_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
_EMBEDDING, _HEAD = "model.decoder.embed_tokens.weight", "proj_out.weight"
_PREFIX = "base_model.model."
_HARMLESS = """auto_mapping bias ensure_weight_tying eva_config exclude_modules inference_mode layers_pattern
    layers_to_transform loftq_config lora_dropout lora_ga_config megatron_core modules_to_save peft_version
    qalora_group_size r rank_pattern runtime_config target_modules task_type""".split()
"""Further options that mean nothing after training. Any other that is set is refused."""
_A, _B = ".lora_A.weight", ".lora_B.weight"
_PREPROCESSOR: dict[str, Any] = {
    "feature_extractor_type": "WhisperFeatureExtractor",
    "processor_class": "WhisperProcessor",
    "sampling_rate": SAMPLE_RATE,
    "hop_length": HOP,
    "n_fft": 400,
    "chunk_length": int(FULL_WINDOW),
    "n_samples": int(FULL_WINDOW) * SAMPLE_RATE,
    "nb_max_frames": int(FULL_WINDOW) * FRAMES_PER_SECOND,
    "padding_side": "right",
    "padding_value": 0.0,
    "return_attention_mask": False,
}
"""The settings of transformers' ``WhisperFeatureExtractor``, but for the number of mels."""


def key_map(config: ModelConfig, format: int) -> dict[str, tuple[str | None, ...]]:
    """Our key → the keys that are stacked into it, in order; None stands for zeros (the bias that keys lack)."""
    rows = [(row[0], row[format].split("+")) for row in _WHOLE]
    for side, layers, names in (
        ("encoder", config.encoder_layers, _IN_BLOCK),
        ("decoder", config.decoder_layers, [*_IN_BLOCK, *_CROSS]),
    ):
        for layer in range(layers):
            block = _BLOCKS[format].format(side, layer)
            rows += [
                (f"{side}.blocks.{layer}.{row[0]}", [block + name for name in row[format].split("+")]) for row in names
            ]
    keys: dict[str, tuple[str | None, ...]] = {}
    for ours, theirs in rows:
        for kind in ("weight", "bias") if ours.endswith("*") else ("",):
            named = (name.replace("*", kind) for name in theirs)
            keys[ours.replace("*", kind)] = tuple(None if _WITHOUT_BIAS.fullmatch(name) else name for name in named)
    return keys


def config_from_whisper(hf_config: Mapping[str, Any], *, origin: str | Path = "config.json") -> ModelConfig:
    """The dense configuration of a transformers Whisper. Raises ``CheckpointError`` for what is not one."""
    kind = hf_config.get("model_type")
    if kind != "whisper":
        raise CheckpointError(f"{origin}: model_type is {kind!r}; only 'whisper' can be read")
    for option, needed in _FIXED.items():
        if hf_config.get(option, needed) != needed:
            raise CheckpointError(f"{origin}: {option} is {hf_config[option]!r}; only {needed!r} is supported")
    return _config({ours: hf_config.get(theirs) for ours, (theirs, _) in FIELDS.items()}, origin)


def config_from_openai(dims: Mapping[str, Any], *, origin: str | Path = "dims") -> ModelConfig:
    """The dense configuration behind the ``dims`` of an openai/whisper file."""
    width, text_width = dims.get("n_audio_state"), dims.get("n_text_state")
    if width != text_width or not isinstance(width, int):
        raise CheckpointError(f"{origin}: encoder and decoder must be equally wide; dims say {width} and {text_width}")
    fields = {ours: dims.get(theirs) for ours, (_, theirs) in FIELDS.items() if theirs}
    return _config(fields | {"encoder_ffn_dim": 4 * width, "decoder_ffn_dim": 4 * width}, origin)


def _config(fields: Mapping[str, Any], origin: str | Path) -> ModelConfig:
    try:
        return ModelConfig.model_validate(fields, strict=True)
    except ValidationError as error:
        raise CheckpointError(f"{origin}: {problems(error)}") from error


def config_to_whisper(config: ModelConfig) -> dict[str, Any]:
    """transformers' ``config.json`` of a dense model. Token ids belong to ``generation_config.json``."""
    _require_dense(config)
    fixed = {"architectures": ["WhisperForConditionalGeneration"], "model_type": "whisper", "is_encoder_decoder": True}
    return fixed | {theirs: getattr(config, ours) for ours, (theirs, _) in FIELDS.items()} | _FIXED


def state_from_whisper(
    hf_state: Mapping[str, Tensor], config: ModelConfig, *, origin: str | Path = "Whisper's weights"
) -> dict[str, Tensor]:
    """Our float32 state of a dense model from transformers' tensors, of any floating type.

    A ``WhisperModel`` saved without its head is taken too.
    Raises ``CheckpointError`` that names ``origin`` and the keys for a missing, superfluous, wrongly shaped or
    non-finite tensor, and for an output projection that is not the token embedding.
    """
    prefix = "model." if "encoder.conv1.weight" in hf_state else ""
    tied = {_HEAD, _EMBEDDING} <= hf_state.keys()
    if tied and not torch.equal(hf_state[_HEAD].float(), hf_state[_EMBEDDING].float()):
        raise CheckpointError(f"{origin}: {_HEAD} differs from {_EMBEDDING}; only tied embeddings are supported")
    return _fused(hf_state, config, TRANSFORMERS, {_HEAD}, origin, prefix)


def state_from_openai(
    model_state: Mapping[str, Tensor], config: ModelConfig, *, origin: str | Path = "OpenAI's weights"
) -> dict[str, Tensor]:
    """Our float32 state from the ``model_state_dict`` of a ``.pt`` file; errors as :func:`state_from_whisper`."""
    return _fused(model_state, config, OPENAI, set(), origin)


def state_to_whisper(state: Mapping[str, Tensor], config: ModelConfig, format: int = TRANSFORMERS) -> dict[str, Tensor]:
    """transformers' tensors of a dense model, or openai/whisper's; the reverse of :func:`state_from_whisper`, exactly.

    A bias on keys, should training have moved it, is dropped: it adds the same number to every logit of a query, which
    the softmax takes away again.
    """
    _require_dense(config)
    keys = key_map(config, format)
    parts.check_names(state.keys(), keys.keys(), "the model's state")
    return {
        theirs: part.contiguous()
        for ours, sources in keys.items()
        for theirs, part in zip(sources, state[ours].chunk(len(sources)), strict=True)
        if theirs is not None
    }


def save_whisper(directory: str | Path, model: Loaded) -> None:
    """Write a ``WhisperForConditionalGeneration`` with its processor, in the precision of the state.

    New tokens become the last rows of its one embedding.
    Raises ``ValueError`` for a model with experts or TTT layers, and for a directory that exists.
    """
    directory, config, state = Path(directory).resolve(), model.config, model.state
    if config.new_tokens:
        state = {key: tensor for key, tensor in state.items() if key != parts.NEW_TOKENS}
        state[parts.EMBEDDING] = torch.cat((model.state[parts.EMBEDDING], model.state[parts.NEW_TOKENS]))
        config = config.model_copy(update={"new_tokens": ()})
    ids = {key: model.generation[key] for key in _TOKEN_IDS if key in model.generation}
    documents = {
        CONFIG: config_to_whisper(config) | ids,
        GENERATION: model.generation,
        "preprocessor_config.json": _PREPROCESSOR | {"feature_size": config.n_mels},
        "tokenizer_config.json": {"tokenizer_class": "WhisperTokenizer"} | dict.fromkeys(_END_TOKENS, "<|endoftext|>"),
    }
    weights = save(state_to_whisper(state, config), {"format": "pt"})
    with atomic_folder(directory) as folder:
        (folder / "model.safetensors").write_bytes(weights)
        for name, document in documents.items():
            (folder / name).write_bytes(json_bytes(document))
        (folder / TOKENIZER).write_bytes(model.tokenizer_json)


def _require_dense(config: ModelConfig) -> None:
    extras = [name for name in ("moe", "ttt") if getattr(config, name) is not None]
    if extras:
        raise ValueError(f"only a dense model is a Whisper; this one has {' and '.join(extras)}")


def _fused(
    foreign: Mapping[str, Tensor],
    config: ModelConfig,
    format: int,
    ignored: set[str],
    origin: str | Path,
    prefix: str = "",
) -> dict[str, Tensor]:
    """``prefix``: what the names in ``foreign`` lack."""
    keys = key_map(config, format)
    needed = {name for names in keys.values() for name in names if name is not None}
    parts.check_names({prefix + name for name in foreign} - ignored, needed, origin)
    shapes = parts.expected_shapes(config)
    assert shapes.keys() == keys.keys(), shapes.keys() ^ keys.keys()
    fused: dict[str, Tensor] = {}
    for ours, (rows, *rest) in shapes.items():
        fused[ours] = torch.empty(rows, *rest, dtype=torch.float32)
        for name, part in zip(keys[ours], fused[ours].chunk(len(keys[ours])), strict=True):
            if name is None:
                part.zero_()
            else:
                tensor = foreign[name.removeprefix(prefix)]
                parts.check_shape(tensor, part.shape, _FLOATS, f"{origin}: {name}")
                parts.check_finite(part.copy_(tensor), f"{origin}: {name}")
    return fused


# LoRA adapters


class Adapter(BaseModel):
    """``adapter_config.json`` of a LoRA adapter (arXiv 2106.09685) as PEFT writes it: what merging goes by."""

    model_config = ConfigDict(frozen=True, strict=True, extra="allow", allow_inf_nan=False)

    peft_type: Literal["LORA"]
    base_model_name_or_path: str | None = None
    revision: str | None = None
    lora_alpha: float = 8
    alpha_pattern: dict[re.Pattern[str], float] | None = None
    use_rslora: bool | None = None
    init_lora_weights: Literal["gaussian", "eva", "orthogonal"] | bool | None = None
    """Those that leave the base model's own weights as they were."""

    @classmethod
    def read(cls, path: Path) -> Adapter:
        """Refuses, by name, what would not be merged rightly."""
        try:
            adapter = cls.model_validate(read_json(path))
        except ValidationError as error:
            raise CheckpointError(f"{path}: {problems(error)}; merge the adapter with PEFT first") from error
        if unknown := sorted(
            key for key, value in (adapter.model_extra or {}).items() if value and key not in _HARMLESS
        ):
            raise CheckpointError(f"{path}: {listed(unknown)} cannot be merged here; merge the adapter with PEFT first")
        return adapter

    def scaling(self, module: str, rank: int) -> float:
        """α/r, or α/√r (rank-stabilised, arXiv 2312.03732); the rank is the matrices' own."""
        patterns = (self.alpha_pattern or {}).items()
        fitting = (alpha for pattern, alpha in patterns if re.match(rf"(.*\.)?({pattern.pattern})$", module))
        return next(fitting, self.lora_alpha) / (rank**0.5 if self.use_rslora else rank)


def merge_adapter(
    base: Mapping[str, Tensor], deltas: Mapping[str, Tensor], adapter: Adapter, path: Path
) -> dict[str, Tensor]:
    """transformers' float32 weights with the adapter merged in: W + (α/r)·B·A.

    ``deltas``: the tensors of ``adapter_model.safetensors`` at ``path``: pairs A, B of linear and convolution layers,
    and whole tensors that replace the base's (``modules_to_save``, trained biases). Raises ``CheckpointError`` for a pair that
    does not fit; other tensors that Whisper does not have are refused where the result is read. A trained token embedding
    is refused: merged, it would change the output projection too, which is the same matrix in Whisper.
    """
    merged = {key: tensor.to(torch.float32) for key, tensor in base.items()}
    rest = {_base_key(key): tensor.to(torch.float32) for key, tensor in deltas.items()}
    for key in [key for key in rest if key.endswith(_A)]:
        name = f"{key.removesuffix(_A)}.weight"
        a, b = rest.pop(key), rest.pop(key.replace(_A, _B), None)
        weight = None if name in (_EMBEDDING, _HEAD) else merged.get(name)
        if b is None or weight is None:
            raise CheckpointError(f"{path}: {key} has no {'partner B' if b is None else 'place in the base model'}")
        delta = _delta(a, b)
        if delta is None or delta.shape != weight.shape:
            said = f"A {list(a.shape)}, B {list(b.shape)} do not fit {list(weight.shape)}"
            raise CheckpointError(f"{path}: {name}: {said}")
        merged[name] = weight + delta * adapter.scaling(key.removesuffix(_A), a.shape[0])
    for key in (_EMBEDDING, _HEAD):
        if key in rest and not torch.equal(rest.pop(key), merged[_EMBEDDING]):
            raise CheckpointError(f"{path}: {key} is trained, but Whisper's embedding and output projection are one")
    return merged | rest


def _base_key(key: str) -> str:
    """The name that the base model has for a tensor that the adapter holds whole; pairs keep their A and B."""
    return key.removeprefix(_PREFIX).replace(".base_layer.", ".").replace(".modules_to_save.", ".")


def _delta(a: Tensor, b: Tensor) -> Tensor | None:
    """B·A as a weight; a convolution's A has its kernel, its B a kernel of one. None where they do not multiply."""
    if a.ndim < 2 or not len(a) or b.ndim != a.ndim or b.shape[1:] != (a.shape[0], *[1] * (a.ndim - 2)):
        return None
    return (b.flatten(1) @ a.flatten(1)).view(len(b), *a.shape[1:])
