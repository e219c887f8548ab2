"""Tiny Whispers with random weights, and the files that Whispers are published as."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import WhisperConfig, WhisperForConditionalGeneration

from whisper_moe.config import ModelConfig, MoEConfig, TTTConfig
from whisper_moe.model.model import WhisperMoEModel

CONTROL = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|hi|>", "<|translate|>", "<|transcribe|>"]
CONTROL += ["<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]
TIMESTAMPS = [f"<|{i * 0.02:.2f}|>" for i in range(1501)]
VOCABULARY = 256 + len(CONTROL) + len(TIMESTAMPS)
GENERATION: dict[str, Any] = {"is_multilingual": True, "suppress_tokens": [1, 2], "alignment_heads": [[0, 0], [0, 1]]}

TINY = ModelConfig(
    vocab_size=VOCABULARY,
    d_model=8,
    n_mels=80,
    encoder_layers=3,
    encoder_heads=2,
    encoder_ffn_dim=16,
    decoder_layers=1,
    decoder_heads=2,
    decoder_ffn_dim=12,
    max_source_positions=20,
    max_target_positions=9,
)
"""Depth and width of the feed-forwards differ between the sides, as in distilled models."""
SHARED = MoEConfig(n_experts=3, expert_dim=5, router_layer=1, expert_names=("hindi", "Ελλ./..", "en US"))
CONFIGS = {
    "dense": TINY,
    "shared": TINY.model_copy(update={"moe": SHARED, "ttt": TTTConfig(encoder_layers=(0, 2), decoder_layers=(0,))}),
    "token": TINY.model_copy(update={"moe": MoEConfig(n_experts=2, expert_dim=4, scope="token")}),
    "per expert": TINY.model_copy(
        update={
            "moe": MoEConfig(n_experts=2, expert_dim=12, shared=False, none_choice=False, router_layer=1),
            "ttt": TTTConfig(encoder_layers=(1, 2), per_expert=True),
        }
    ),
}
"""Every way in which a configuration changes which tensors there are."""


@cache
def tokenizer_json() -> bytes:
    """Bytes, Whisper's control tokens with two languages, and its timestamps."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(name, normalized=False, special=True) for name in CONTROL])
    backend.add_tokens([AddedToken(name, normalized=False, special=False) for name in TIMESTAMPS])
    return backend.to_str().encode()


def random_state(config: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    """Our state with random numbers everywhere, also where a fresh model has zeros or ones; none fits float16."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {key: tensor.shape for key, tensor in WhisperMoEModel(config).state_dict().items()}
    return {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def hub_config(config: ModelConfig = TINY, **changes: Any) -> WhisperConfig:
    return WhisperConfig(
        vocab_size=config.vocab_size,
        num_mel_bins=config.n_mels,
        d_model=config.d_model,
        encoder_layers=config.encoder_layers,
        encoder_attention_heads=config.encoder_heads,
        encoder_ffn_dim=config.encoder_ffn_dim,
        decoder_layers=config.decoder_layers,
        decoder_attention_heads=config.decoder_heads,
        decoder_ffn_dim=config.decoder_ffn_dim,
        max_source_positions=config.max_source_positions,
        max_target_positions=config.max_target_positions,
        pad_token_id=256,
        bos_token_id=256,
        eos_token_id=256,
        decoder_start_token_id=257,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        **changes,
    )


def hub_model(config: ModelConfig = TINY, seed: int = 0) -> WhisperForConditionalGeneration:
    """transformers' model of that shape, random everywhere (a fresh one has biases of zero)."""
    torch.manual_seed(seed)
    model = WhisperForConditionalGeneration(hub_config(config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.normal_(0.5, 0.2)
    return model


def hub_state(model: WhisperForConditionalGeneration) -> dict[str, Tensor]:
    """What transformers saves: every tensor but the output projection, which is the embedding."""
    return {key: tensor.detach() for key, tensor in model.state_dict().items() if key != "proj_out.weight"}


def write_folder(folder: Path, model: WhisperForConditionalGeneration, **options: Any) -> Path:
    """A folder as transformers writes it, with a tokenizer; ``options`` are of ``save_pretrained``."""
    model.save_pretrained(folder, **options)
    (folder / "tokenizer.json").write_bytes(tokenizer_json())
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    return folder


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two states are equal bit for bit, types included."""
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def published(d_model: int, heads: int, layers: tuple[int, int], vocab_size: int, n_mels: int = 80) -> ModelConfig:
    """The shape of a published Whisper: all of it but the depth follows from these."""
    return ModelConfig(
        d_model=d_model,
        encoder_heads=heads,
        decoder_heads=heads,
        encoder_ffn_dim=4 * d_model,
        decoder_ffn_dim=4 * d_model,
        encoder_layers=layers[0],
        decoder_layers=layers[1],
        vocab_size=vocab_size,
        n_mels=n_mels,
    )
