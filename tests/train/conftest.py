"""What runs of tests are made of."""

from __future__ import annotations

from pathlib import Path

import pytest
from train.tiny import tiny_checkpoint, tones


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint ``model`` and a table ``data``."""
    folder = tmp_path_factory.mktemp("material")
    tiny_checkpoint(folder / "model")
    tones(folder / "data")
    return folder
