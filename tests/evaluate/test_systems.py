"""Systems: how they are named, what our own hands on, and that a process of one's own is just that."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from whisper_moe import WhisperMoE
from whisper_moe.evaluate.measure import System, SystemFailed, apart, ours
from whisper_moe.machine import THREAD_VARIABLES, peak_bytes


def noise(seconds: float) -> np.ndarray:
    return np.random.default_rng(round(10 * seconds)).normal(0, 0.1, round(16_000 * seconds)).astype(np.float32)


def test_our_adapter_hands_on_text_tokens_experts_and_errors(tiny_model: WhisperMoE):
    adapter = ours(tiny_model, beam=1, temperatures=(0.0,), margin=0.5)
    adapter.options |= {f"{name}_threshold": None for name in ("logprob", "no_speech", "compression_ratio")}
    sounds = [noise(1), np.full(16_000, np.nan, np.float32), noise(0.5)]
    asked: dict[str, Any] = {"language": "hi", "task": "transcribe"}
    first, broken, last = adapter.hear(sounds, long=False, **asked)
    alone = tiny_model.transcribe(sounds[0], timestamps=False, **adapter.options, **asked)
    assert first.text == alone.text != ""
    assert first.tokens == sum(len(segment.tokens) for segment in alone.segments)
    assert dict(first.experts) == pytest.approx(dict(alone.segments[0].experts))
    assert broken.text == "" and broken.error is not None and "NaN" in broken.error
    assert last.error is None


@pytest.mark.parametrize(
    ("spec", "kind", "name"),
    [
        ("openai/whisper-base", "ours", "openai/whisper-base"),
        ("default", "ours", "default"),
        ("C:model", "ours", "C:model"),
    ],
)
def test_systems_are_named_by_their_kind(spec: str, kind: str, name: str):
    system = System.parse(spec)
    assert (system.kind, system.name, system.label) == (kind, name, spec)


def test_a_training_runs_model_is_called_by_the_run(tmp_path: Path):
    (tmp_path / "a/model").mkdir(parents=True)
    (tmp_path / "a/run.json").touch()
    assert {System.parse(f"{tmp_path}/{name}").label for name in ("a/", "a/model")} == {"a"}


# A process of its own.


def facts(word: str) -> tuple[str, int, str | None]:
    print("not part of anything")
    return word, peak_bytes(), os.environ.get(THREAD_VARIABLES[0])


def test_a_process_has_threads_and_a_peak_of_its_own(capfd: pytest.CaptureFixture[str]):
    held, before = np.ones(75_000_000), os.environ.get(THREAD_VARIABLES[0])
    assert peak_bytes() > 600e6
    word, peak, threads = apart(facts, "said", threads=3)
    assert (word, threads) == ("said", "3") and 1e6 < peak < 550e6
    assert capfd.readouterr().out == "" and os.environ.get(THREAD_VARIABLES[0]) == before
    assert held[0] == 1


def vanish() -> None:
    os._exit(7)


def refuse() -> None:
    raise ValueError("no such\nmodel")


@pytest.mark.parametrize(
    ("work", "message"), [(vanish, r"its process ended \(exit status 7\)"), (refuse, "ValueError: no such model")]
)
def test_what_takes_a_process_down_is_said(work: Callable[[], None], message: str):
    with pytest.raises(SystemFailed, match=message):
        apart(work)


def linger(note: str) -> None:
    """Takes a minute, and notes which process does it."""
    Path(note).write_text(f"{os.getpid()}\n")
    time.sleep(60)


ORPHAN = """
import sys
from evaluate.test_systems import linger
from whisper_moe.evaluate.measure import apart

if __name__ == "__main__":
    apart(linger, sys.argv[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_process_does_not_outlive_the_one_that_asked(tmp_path: Path) -> None:
    script, note = tmp_path / "orphan.py", tmp_path / "pid"
    script.write_text(ORPHAN)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, str(script), str(note)], env=environment)
    try:
        assert eventually(lambda: note.exists() and note.read_text().endswith("\n"))
    finally:
        parent.kill()
        parent.wait()
    child = Path(f"/proc/{note.read_text().strip()}")
    assert eventually(lambda: not child.exists() or "State:\tZ" in (child / "status").read_text())


def eventually(condition: Callable[[], bool]) -> bool:
    """Whether it comes true within 30 seconds."""
    return any(condition() or time.sleep(0.1) for _ in range(300))
