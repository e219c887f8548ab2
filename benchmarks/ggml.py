"""A Whisper in whisper.cpp's format: float16 matrices, float32 vectors."""

# whisper (openai's) is optional: type checking must pass without it.
# pyright: reportMissingImports=false

from __future__ import annotations

import base64
import re
import struct
from pathlib import Path

import numpy as np

from whisper_moe.config import ModelConfig
from whisper_moe.weights.load import load_model
from whisper_moe.weights.whisper import FIELDS, OPENAI, state_to_whisper


def dims_of(config: ModelConfig) -> dict[str, int]:
    """The ``dims`` of an openai/whisper file of a dense model."""
    if {config.encoder_ffn_dim, config.decoder_ffn_dim} != {4 * config.d_model}:
        raise ValueError("openai/whisper's feed-forward is always four times as wide as the model; this one's is not")
    dims = {theirs: getattr(config, ours) for ours, (_, theirs) in FIELDS.items() if theirs}
    return dims | {"n_text_state": config.d_model}


def to_ggml(model: str, target: Path) -> None:
    """whisper.cpp's file: header, mel filters, byte tokens, then every tensor with its name and reversed shape."""
    import whisper

    source = load_model(model)
    sizes = dims_of(source.config)
    assets = Path(whisper.__file__).parent / "assets"
    vocabulary = "multilingual" if sizes["n_vocab"] >= 51_865 else "gpt2"
    lines = (assets / f"{vocabulary}.tiktoken").read_bytes().splitlines()
    tokens = [base64.b64decode(line.split()[0]) for line in lines if line]
    with np.load(assets / "mel_filters.npz") as filters:
        mel = filters[f"mel_{sizes['n_mels']}"].astype(np.float32)
    order = ("n_vocab", "n_audio_ctx", "n_audio_state", "n_audio_head", "n_audio_layer")
    order += ("n_text_ctx", "n_text_state", "n_text_head", "n_text_layer", "n_mels")
    float16 = 1
    with target.open("wb") as file:
        file.write(struct.pack("<12i", 0x67676D6C, *(sizes[key] for key in order), float16))
        file.write(struct.pack("<2i", *mel.shape) + mel.tobytes())
        file.write(struct.pack("<i", len(tokens)))
        file.writelines(struct.pack("<i", len(token)) + token for token in tokens)
        for name, value in state_to_whisper(source.state, source.config, OPENAI).items():
            file.write(tensor(name, value.numpy()))


def tensor(name: str, array: np.ndarray) -> bytes:
    """One tensor record. whisper.cpp wants matrices in half precision; vectors and positions stay float32."""
    if re.fullmatch(r"encoder\.conv\d\.bias", name):
        array = array[:, None]  # added to [channels, frames]
    half = array.ndim > 1 and not name.endswith((".bias", "positional_embedding"))
    array = array.astype("float16" if half else "float32")
    label = name.encode()
    header = struct.pack("<3i", array.ndim, len(label), int(half))
    return header + struct.pack(f"<{array.ndim}i", *reversed(array.shape)) + label + array.tobytes()
