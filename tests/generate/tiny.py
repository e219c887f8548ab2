"""A complete transcriber with random weights: it talks nonsense, quickly and always the same."""

from __future__ import annotations

import tokenizers
import torch
from weights.whispers import GENERATION, VOCABULARY, tokenizer_json

from whisper_moe import WhisperMoE
from whisper_moe.config import ModelConfig, MoEConfig, TTTConfig
from whisper_moe.media.tokenizer import Tokenizer
from whisper_moe.model.model import WhisperMoEModel

CONFIG = ModelConfig(
    vocab_size=VOCABULARY,
    d_model=16,
    encoder_layers=2,
    encoder_heads=2,
    encoder_ffn_dim=32,
    decoder_layers=1,
    decoder_heads=2,
    decoder_ffn_dim=32,
    max_target_positions=64,
    moe=MoEConfig(n_experts=3, expert_dim=8, router_layer=1, expert_names=("hindi", "tamil", "english")),
    ttt=TTTConfig(encoder_layers=(1,), mini_batch=25),
)


TEXT = 256
"""Tokens of text come first."""


def tiny_tokenizer() -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer.from_buffer(tokenizer_json()), GENERATION)


def tiny_whisper_moe(seed: int = 0, config: ModelConfig = CONFIG) -> WhisperMoE:
    """Every parameter is random, as if trained: experts contribute, TTT gates are open, the tokens to come vary."""
    torch.manual_seed(seed)
    model = WhisperMoEModel(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.normal_(1 if key.endswith("norm.weight") else 0, 0.3)
        model.decoder.token_embedding.weight[:TEXT] *= 5  # otherwise the many timestamps are likelier than all text
        model.decoder.positions *= 8  # … and the last token its own best successor
    return WhisperMoE(model, tiny_tokenizer(), GENERATION, name="tiny", tokenizer_json=tokenizer_json())
