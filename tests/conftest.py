"""Fixtures for real weights and recordings that lie beside a checkout; tests that need them skip where they do not."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """A folder of real recordings beside the checkout."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip("the recordings are not beside this checkout")
    return folder


@pytest.fixture(scope="session")
def whisper_base() -> Path:
    """The folder of a local snapshot of ``openai/whisper-base``."""
    snapshots = sorted((SHARED / "huggingface/hub/models--openai--whisper-base/snapshots").glob("*"))
    if not snapshots:
        pytest.skip("openai/whisper-base is not beside this checkout")
    return snapshots[0]
