"""The bundled model's core, and what adapts it to short windows, never change: everything else was trained beside them."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import pytest

CHECKPOINTS = Path(__file__).parents[2] / "checkpoints"
FROZEN = {
    "core-00001-of-00003.safetensors": "6d05eb65444445d245abffb47e192ef3a2e1caff785fd217cbc14d9d4afa9325",
    "core-00002-of-00003.safetensors": "2937caaaaf630a31099b234ec9cc1897702b4593224e030a8ec639cdd9b4cac4",
    "core-00003-of-00003.safetensors": "b1cc69a0b5a079094a34b25beacc7375c4c8c508d5eec7cab7e2c2e59888fc9d",
    "adapt.safetensors": "4b8aba10510720a501d0ca98af4838ec6899a456b0b073bcf00e9504276f11d6",
}
MOST_BYTES = 110_000_000
ASIDE = {"reader.safetensors": 5_000_000, "speech.safetensors": 10_000_000, "vocoder.safetensors": 10_000_000}
ASIDE |= {"video.safetensors": 8_000_000, "sign.safetensors": 8_000_000, "tokens.safetensors": 2_000_000}
"""At most, besides: what a transcript does not need."""


@pytest.mark.parametrize("name", FROZEN)
def test_experts_are_trained_beside_what_stays(name: str) -> None:
    assert sha256((CHECKPOINTS / name).read_bytes()).hexdigest() == FROZEN[name]


def test_a_clone_stays_small() -> None:
    sizes = {path.name: path.stat().st_size for path in CHECKPOINTS.rglob("*") if path.is_file()}
    assert all(sizes.pop(name) <= most for name, most in ASIDE.items())
    assert sum(sizes.values()) <= MOST_BYTES
