"""openai/whisper as a reference: its model with a Hub checkpoint's weights, its vocabularies, its log-mel."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend
    from whisper.model import Whisper

_RENAMED = (
    (r"\.layers\.", ".blocks."),
    (r"\.self_attn_layer_norm\.", ".attn_ln."),
    (r"\.self_attn\.", ".attn."),
    (r"\.encoder_attn_layer_norm\.", ".cross_attn_ln."),
    (r"\.encoder_attn\.", ".cross_attn."),
    (r"\.final_layer_norm\.", ".mlp_ln."),
    (r"\.q_proj\.", ".query."),
    (r"\.k_proj\.", ".key."),
    (r"\.v_proj\.", ".value."),
    (r"\.out_proj\.", ".out."),
    (r"\.fc1\.", ".mlp.0."),
    (r"\.fc2\.", ".mlp.2."),
    (r"\.embed_tokens\.", ".token_embedding."),
    (r"\.embed_positions\.weight", ".positional_embedding"),
    (r"^encoder\.layer_norm\.", "encoder.ln_post."),
    (r"^decoder\.layer_norm\.", "decoder.ln."),
)


def openai_name(hub_name: str) -> str:
    """What openai/whisper calls a tensor of a Hub checkpoint."""
    name = hub_name.removeprefix("model.")
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def load_openai(folder: Path) -> Whisper:
    """openai/whisper's own float32 model, in evaluation mode, from a folder with a Hub Whisper checkpoint."""
    from safetensors.torch import load_file
    from whisper.model import ModelDimensions, Whisper

    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    heads: list[list[int]] = json.loads((folder / "generation_config.json").read_text())["alignment_heads"]
    model = Whisper(
        ModelDimensions(
            n_mels=config["num_mel_bins"],
            n_audio_ctx=config["max_source_positions"],
            n_audio_state=config["d_model"],
            n_audio_head=config["encoder_attention_heads"],
            n_audio_layer=config["encoder_layers"],
            n_vocab=config["vocab_size"],
            n_text_ctx=config["max_target_positions"],
            n_text_state=config["d_model"],
            n_text_head=config["decoder_attention_heads"],
            n_text_layer=config["decoder_layers"],
        )
    )
    weights = load_file(folder / "model.safetensors")
    tied = weights.pop("proj_out.weight", None)
    assert tied is None or torch.equal(tied, weights["model.decoder.embed_tokens.weight"])
    model.load_state_dict({openai_name(name): tensor.float() for name, tensor in weights.items()})
    mask = torch.zeros(config["decoder_layers"], config["decoder_attention_heads"], dtype=torch.bool)
    mask[tuple(zip(*heads, strict=True))] = True
    model.register_buffer("alignment_heads", mask.to_sparse(), persistent=False)
    return model.eval()


def openai_mel(path: Path, n_mels: int = 80) -> tuple[Tensor, int]:
    """([n_mels, 3000] log-mel of the first 30 s, padded with silence; mel frames that hold the recording)."""
    from whisper.audio import HOP_LENGTH, N_SAMPLES, log_mel_spectrogram, pad_or_trim

    samples = read_samples(path)
    mel = log_mel_spectrogram(pad_or_trim(samples, N_SAMPLES), n_mels=n_mels)
    return mel, min(len(samples), N_SAMPLES) // HOP_LENGTH


def read_samples(path: Path) -> Tensor:
    """[samples] float32 at 16 kHz, mono."""
    import av
    import numpy as np

    resampler = av.AudioResampler(format="flt", layout="mono", rate=16_000)
    with av.open(str(path)) as container:
        frames = [out for frame in container.decode(audio=0) for out in resampler.resample(frame)]
        frames += resampler.resample(None)
    return torch.from_numpy(np.concatenate([frame.to_ndarray()[0] for frame in frames]))


def hub_backend(name: str = "multilingual", num_languages: int = 99, no_speech: str = "<|nospeech|>") -> Backend:
    """The vocabulary in openai/whisper's wheel (``multilingual`` or ``gpt2``) as the Hub's ``tokenizer.json`` has it.

    Early checkpoints call the token for silence ``<|nocaptions|>``.
    """
    from tokenizers import AddedToken, Tokenizer
    from whisper.tokenizer import get_encoding

    backend = Tokenizer.from_str(_bpe_json(name))
    encoding = get_encoding(name, num_languages)
    names = sorted(encoding.special_tokens_set, key=encoding.encode_single_token)
    contents = [name.replace("<|nospeech|>", no_speech) for name in names]
    backend.add_tokens(
        [AddedToken(content, normalized="." in content, special="." not in content) for content in contents]
    )
    for name, content in zip(names, contents, strict=True):
        assert backend.token_to_id(content) == encoding.encode_single_token(name), name
    return backend


@cache
def _bpe_json(name: str) -> str:
    import whisper
    from tokenizers import decoders, pre_tokenizers
    from transformers.convert_slow_tokenizer import TikTokenConverter

    file = Path(whisper.__file__).parent / "assets" / f"{name}.tiktoken"
    backend = TikTokenConverter(str(file)).converted()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend.to_str()
