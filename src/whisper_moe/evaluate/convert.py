"""One Whisper checkpoint of the Hugging Face Hub in the formats that the peers read, so that all compare the same weights.

``python -m whisper_moe.evaluate.convert FORMAT MODEL FOLDER`` writes one format and prints the path; :func:`weights` does it once
per format and keeps it. Conversions run in a process of their own: they need several times the memory of the weights.

    hub           the checkpoint as it is (transformers, this project)
    ct2-float32   CTranslate2, float32 (faster-whisper)
    ct2-int8      CTranslate2, quantised to int8 on disk (faster-whisper)
    openai        ``{"dims": …, "model_state_dict": …}`` (openai-whisper)
    ggml          float16 matrices, float32 vectors (whisper.cpp)
"""

# The peers are optional: type checking must pass without them.
# pyright: reportMissingImports=false

from __future__ import annotations

import base64
import os
import re
import shutil
import struct
import subprocess
import sys
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from whisper.model import ModelDimensions

FORMATS = ("hub", "ct2-float32", "ct2-int8", "openai", "ggml")
WEIGHT_FILES = (".safetensors", ".bin", ".pt")

# transformers' names on the left, openai-whisper's on the right, applied in this order.
RENAMES = (
    (r"^model\.", ""),
    (r"\.layers\.", ".blocks."),
    (r"embed_positions\.weight", "positional_embedding"),
    (r"embed_tokens", "token_embedding"),
    (r"self_attn_layer_norm", "attn_ln"),
    (r"encoder_attn_layer_norm", "cross_attn_ln"),
    (r"final_layer_norm", "mlp_ln"),
    (r"^encoder\.layer_norm", "encoder.ln_post"),
    (r"^decoder\.layer_norm", "decoder.ln"),
    (r"self_attn\.", "attn."),
    (r"encoder_attn\.", "cross_attn."),
    (r"\.q_proj", ".query"),
    (r"\.k_proj", ".key"),
    (r"\.v_proj", ".value"),
    (r"\.out_proj", ".out"),
    (r"\.fc1", ".mlp.0"),
    (r"\.fc2", ".mlp.2"),
)


def weights(form: str, model: str, cache: Path) -> Path:
    """The checkpoint ``model`` in the format ``form``, converted into ``cache`` unless it already lies there. What is known of
    a local one is its path and its files' sizes and times: one that was written anew is converted anew.

    Raises :class:`RuntimeError` with the converter's own words when it fails.
    """
    target = cache / f"{model.strip('/').replace('/', '--')}{_state(Path(model))}-{form}"
    if form != "hub" and target.exists():
        return target
    command = [sys.executable, "-m", "whisper_moe.evaluate.convert", form, model, str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"cannot convert {model} to {form}:\n{done.stderr.strip()[-2000:]}")
    return Path(done.stdout.splitlines()[-1])


def _state(path: Path) -> str:
    if not path.exists():
        return ""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return "-" + sha256(f"{path.resolve()} {facts}".encode()).hexdigest()[:16]


def disk_bytes(path: Path) -> int:
    """Bytes of the weights at ``path``, a file or a folder (safetensors only, where a folder has some)."""
    if path.is_file():
        return path.stat().st_size
    files = [file for file in path.rglob("*") if file.suffix in WEIGHT_FILES]
    safe = [file for file in files if file.suffix == ".safetensors"]
    return sum(file.stat().st_size for file in safe or files)


def openai_name(name: str) -> str:
    """openai-whisper's name of a transformers parameter."""
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def to_hub(model: str) -> Path:
    from huggingface_hub import snapshot_download

    from whisper_moe.weights.load import hub_id

    if Path(model).is_dir():
        return Path(model)
    return Path(
        snapshot_download(hub_id(model) or model, ignore_patterns=["*.h5", "*.msgpack"])
    )  # other frameworks' weights


def to_ctranslate2(model: str, target: Path, quantization: str) -> None:
    from ctranslate2.converters import TransformersConverter

    copied = ["tokenizer.json", "preprocessor_config.json"]
    TransformersConverter(model, copy_files=copied).convert(str(target), quantization=quantization, force=True)


def openai_state(model: str) -> tuple[ModelDimensions, dict[str, Any]]:
    """openai-whisper's dimensions and state dict of a checkpoint, checked by loading them."""
    from transformers import WhisperForConditionalGeneration
    from whisper.model import ModelDimensions, Whisper

    source = WhisperForConditionalGeneration.from_pretrained(model)
    config = source.config
    dims = ModelDimensions(
        n_mels=config.num_mel_bins,
        n_audio_ctx=config.max_source_positions,
        n_audio_state=config.d_model,
        n_audio_head=config.encoder_attention_heads,
        n_audio_layer=config.encoder_layers,
        n_vocab=config.vocab_size,
        n_text_ctx=config.max_target_positions,
        n_text_state=config.d_model,
        n_text_head=config.decoder_attention_heads,
        n_text_layer=config.decoder_layers,
    )
    # The output projection is the token embedding in both: openai-whisper has no name for it.
    state = {openai_name(name): value for name, value in source.state_dict().items() if name != "proj_out.weight"}
    Whisper(dims).load_state_dict(state)
    return dims, state


def to_openai(model: str, target: Path) -> None:
    import torch

    dims, state = openai_state(model)
    torch.save({"dims": asdict(dims), "model_state_dict": state}, target)


def to_ggml(model: str, target: Path) -> None:
    """whisper.cpp's file: header, mel filters, byte tokens, then every tensor with its name and reversed shape."""
    import numpy as np
    import whisper

    dims, state = openai_state(model)
    assets = Path(whisper.__file__).parent / "assets"
    vocabulary = "multilingual" if dims.n_vocab >= 51_865 else "gpt2"
    lines = (assets / f"{vocabulary}.tiktoken").read_bytes().splitlines()
    tokens = [base64.b64decode(line.split()[0]) for line in lines if line]
    with np.load(assets / "mel_filters.npz") as filters:
        mel = filters[f"mel_{dims.n_mels}"].astype(np.float32)
    sizes = asdict(dims)
    order = ("n_vocab", "n_audio_ctx", "n_audio_state", "n_audio_head", "n_audio_layer")
    order += ("n_text_ctx", "n_text_state", "n_text_head", "n_text_layer", "n_mels")
    float16 = 1
    with target.open("wb") as file:
        file.write(struct.pack("<12i", 0x67676D6C, *(sizes[key] for key in order), float16))
        file.write(struct.pack("<2i", *mel.shape) + mel.tobytes())
        file.write(struct.pack("<i", len(tokens)))
        file.writelines(struct.pack("<i", len(token)) + token for token in tokens)
        for name, value in state.items():
            file.write(ggml_tensor(name, value.numpy()))


def ggml_tensor(name: str, array: np.ndarray) -> bytes:
    """One tensor record. whisper.cpp wants matrices in half precision; vectors and positions stay float32."""
    if re.fullmatch(r"encoder\.conv\d\.bias", name):
        array = array[:, None]  # added to [channels, frames]
    half = array.ndim > 1 and not name.endswith((".bias", "positional_embedding"))
    array = array.astype("float16" if half else "float32")
    label = name.encode()
    header = struct.pack("<3i", array.ndim, len(label), int(half))
    return header + struct.pack(f"<{array.ndim}i", *reversed(array.shape)) + label + array.tobytes()


def convert(form: str, model: str, target: Path) -> Path:
    """Write one format; the target appears only when it is complete. Returns the path of the weights."""
    if form == "hub":
        return to_hub(model)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    try:
        match form:
            case "ct2-float32" | "ct2-int8":
                to_ctranslate2(model, partial, form.removeprefix("ct2-"))
            case "openai":
                to_openai(model, partial)
            case "ggml":
                to_ggml(model, partial)
            case _:
                raise ValueError(f"unknown format {form!r}; known are {', '.join(FORMATS)}")
        partial.rename(target)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        else:
            partial.unlink(missing_ok=True)
    return target


if __name__ == "__main__":
    print(convert(sys.argv[1], sys.argv[2], Path(sys.argv[3])))
