"""Fixtures: models to transcribe with, and real weights and recordings that lie beside a checkout.

Tests that need what lies beside a checkout skip where it does not.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # a core each: threads of several workers would only wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")
_PREPARED = tempfile.TemporaryDirectory()  # what datasets prepares goes when the tests end
os.environ["HF_DATASETS_CACHE"] = _PREPARED.name  # which is read when that is imported

if TYPE_CHECKING:
    from commandline import Run

    from whisper_moe import WhisperMoE

ROOT = Path(__file__).parent.parent
SHARED = Path(os.environ.get("WHISPER_MOE_TEST_DATA", ROOT.parent / "shared"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """A folder of real recordings beside the checkout."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip("the recordings are not beside this checkout")
    return folder


@pytest.fixture(scope="session")
def whisper_base() -> Path:
    """The folder of a local snapshot of ``openai/whisper-base``: beside the checkout, or in the Hub's own cache."""
    usual = Path(os.environ.get("HF_HOME", Path.home() / ".cache/huggingface"))
    for home in (SHARED / "huggingface", usual):
        snapshots = sorted((home / "hub/models--openai--whisper-base/snapshots").glob("*"))
        if snapshots:
            return snapshots[0]
    pytest.skip("openai/whisper-base is neither beside this checkout nor in the Hub's cache")


@pytest.fixture(scope="session")
def default_model() -> WhisperMoE:
    """The embedded default, or the checkpoint that ``WHISPER_MOE_TEST_MODEL`` names in its place."""
    from whisper_moe import WhisperMoE

    folder = os.environ.get("WHISPER_MOE_TEST_MODEL", str(ROOT / "checkpoints"))
    if not Path(folder).is_dir():
        pytest.skip("the default model is not in this checkout")
    return WhisperMoE.from_pretrained(folder, dtype="float32")


@pytest.fixture(scope="session")
def tiny_model() -> WhisperMoE:
    """Three experts and a TTT layer in a tiny model with random weights, whose vocabulary is bytes: it talks nonsense."""
    from generate.tiny import tiny_whisper_moe

    return tiny_whisper_moe()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Calls the command line in this process."""
    from commandline import runner

    return runner(monkeypatch, capsys)


@pytest.fixture
def tiny(tiny_model: WhisperMoE, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Flags for the tiny model, which is in place of the default and need not be loaded: whatever it says is believed."""
    from commandline import TRUSTING

    from whisper_moe import WhisperMoE

    load = WhisperMoE.from_pretrained

    def loaded(model: str | None, **options: Any) -> WhisperMoE:
        return tiny_model if model is None else load(model, **options)

    monkeypatch.setattr(WhisperMoE, "from_pretrained", loaded)
    return TRUSTING
