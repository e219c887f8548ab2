"""Which tensors of a checkpoint may be int8 on disk; the number format is :mod:`whisper_moe.model.int8`'s."""

from __future__ import annotations

import re

SCALE = ".scale"
"""Suffix of the tensor that holds a quantised tensor's scales, [rows, 1]."""
_KEYS = re.compile(
    r"decoder\.token_embedding\.weight"
    r"|(encoder|decoder)\.blocks\.\d+\.((cross_)?attn\.(qkv|q|kv|out)|ffn\.(up|down))\.weight"
    r"|(encoder|decoder)\.blocks\.\d+\.experts\.(\d+\.)?(up|down)_weight"
)


def quantizable(key: str) -> bool:
    """Whether a tensor may be stored as int8: the matrices of linear layers and experts, and the token embedding.

    Norms, biases, positions, convolutions, routers and fast weights stay as they are: they are small, and sensitive.
    """
    return _KEYS.fullmatch(key) is not None
