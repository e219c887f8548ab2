"""A tiny model that speaks nonsense, and what it is asked to say."""

from __future__ import annotations

import torch

from whisper_moe.config_aside import SpeechConfig, VoiceConfig
from whisper_moe.model.speech import SpeechModel

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ' ,.?!;:" + "".join(map(chr, range(0x900, 0x964)))
TINY = SpeechConfig(
    letters=LETTERS,
    phonemes="_ ,.abcdefghiklmnoprstuvz",
    languages=("en", "hi"),
    voices=(
        VoiceConfig(name="ann", language="en"),
        VoiceConfig(name="bob", language="en"),
        VoiceConfig(name="uma", language="hi"),
    ),
    d_model=16,
    heads=2,
    ffn_dim=32,
    reader_layers=1,
    encoder_layers=2,
    decoder_layers=2,
    kernel_size=3,
    vocoder_dim=16,
    vocoder_hidden=32,
    vocoder_layers=2,
)


def tiny_speech(seed: int = 0) -> SpeechModel:
    torch.manual_seed(seed)
    return SpeechModel(TINY).eval()
