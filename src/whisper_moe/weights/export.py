"""The way back: a dense model as a folder that transformers, and all that builds on it, can load."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from whisper_moe.config import FRAMES_PER_SECOND, FULL_WINDOW, SAMPLE_RATE, ModelConfig
from whisper_moe.weights.files import atomic_folder, json_bytes, read_bytes
from whisper_moe.weights.tokens import one_vocabulary
from whisper_moe.weights.whisper import config_to_whisper, state_to_whisper

_WINDOW_SECONDS = int(FULL_WINDOW)
_HOP = SAMPLE_RATE // FRAMES_PER_SECOND
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def save_whisper(
    directory: str | Path,
    config: ModelConfig,
    state: Mapping[str, Tensor],
    *,
    generation: Mapping[str, Any],
    tokenizer_files: Mapping[str, Path | bytes],
) -> None:
    """Write a ``WhisperForConditionalGeneration`` with its processor, in the precision of ``state``.

    New tokens become the last rows of its one embedding.
    Raises ``ValueError`` for a model with experts or TTT layers, and for a directory that exists.
    """
    directory = Path(directory).resolve()
    config, state = one_vocabulary(config, state)
    ids = {key: generation[key] for key in _TOKEN_IDS if key in generation}
    documents = {
        "config.json": config_to_whisper(config) | ids,
        "generation_config.json": dict(generation),
        "preprocessor_config.json": _preprocessor(config),
        "tokenizer_config.json": {"tokenizer_class": "WhisperTokenizer"} | _NAMED,
    }
    weights = save(state_to_whisper(state, config), {"format": "pt"})
    with atomic_folder(directory) as folder:
        (folder / "model.safetensors").write_bytes(weights)
        for name, document in documents.items():
            (folder / name).write_bytes(json_bytes(document))
        for name, value in tokenizer_files.items():
            (folder / name).write_bytes(value if isinstance(value, bytes) else read_bytes(value))


_NAMED = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "<|endoftext|>")


def _preprocessor(config: ModelConfig) -> dict[str, Any]:
    """The settings of transformers' ``WhisperFeatureExtractor``."""
    return {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "processor_class": "WhisperProcessor",
        "feature_size": config.n_mels,
        "sampling_rate": SAMPLE_RATE,
        "hop_length": _HOP,
        "n_fft": 400,
        "chunk_length": _WINDOW_SECONDS,
        "n_samples": _WINDOW_SECONDS * SAMPLE_RATE,
        "nb_max_frames": _WINDOW_SECONDS * SAMPLE_RATE // _HOP,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": False,
    }
