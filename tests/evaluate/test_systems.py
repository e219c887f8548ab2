"""Systems: how they are named, which weights they get, what our own hands on, and that a process of one's own is just that."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from whisper_moe import WhisperMoE
from whisper_moe.evaluate import systems
from whisper_moe.evaluate.systems import (
    System,
    SystemFailed,
    apart,
    converted,
    hub_folder,
    ours,
    to_openai,
)
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
        ("transformers:openai/whisper-base", "transformers", "openai/whisper-base"),
        ("C:model", "ours", "C:model"),
    ],
)
def test_systems_are_named_by_their_kind(spec: str, kind: str, name: str):
    pytest.importorskip("transformers")
    system = System.parse(spec)
    assert (system.kind, system.name, system.label) == (kind, name, spec)


def test_a_training_runs_model_is_called_by_the_run(tmp_path: Path):
    (tmp_path / "a/model").mkdir(parents=True)
    (tmp_path / "a/run.json").touch()
    assert {System.parse(f"{tmp_path}/{name}").label for name in ("a/", "a/model")} == {"a"}


def copy(model: str, target: Path) -> None:
    (file,) = Path(model).iterdir()
    target.write_bytes(file.read_bytes())


def fail(model: str, target: Path) -> None:
    target.mkdir()
    raise ValueError(f"{model} is\nno Whisper")


def test_weights_that_were_written_anew_are_converted_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What lies at a path may change; another path of the same spelling elsewhere is another model."""
    monkeypatch.setattr(systems, "apart", lambda work, *arguments: work(*arguments))
    model, found = tmp_path / "dense" / "model.safetensors", []
    model.parent.mkdir()
    for content in (b"one", b"one", b"another"):
        if not model.exists() or model.read_bytes() != content:
            model.write_bytes(content)
        found.append(converted(str(model.parent), "openai", copy, tmp_path / "cache"))
        assert Path(found[-1]).read_bytes() == content
    assert found[0] == found[1] != found[2]
    monkeypatch.chdir(tmp_path)
    here = converted("dense", "openai", copy, tmp_path / "cache")
    (tmp_path / "elsewhere/dense").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="dense is\nno Whisper"):
        converted("dense", "openai", fail, tmp_path / "cache")
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {Path(path).name for path in (*found, here)}


def test_a_whisper_is_converted_to_what_openais_own_code_loads(tmp_path: Path):
    """And what it hears is what we hear."""
    whisper, transformers = pytest.importorskip("whisper"), pytest.importorskip("transformers")
    import torch
    from weights.whispers import TINY, hub_model, write_folder

    wide = TINY.model_copy(update=dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 4 * TINY.d_model))
    folder = write_folder(tmp_path / "hub", hub_model(wide))
    to_openai(str(folder), tmp_path / "openai.pt")
    with pytest.raises(ValueError, match="four times as wide"):
        to_openai(str(write_folder(tmp_path / "narrow", hub_model())), tmp_path / "narrow.pt")
    theirs = whisper.load_model(str(tmp_path / "openai.pt"), device="cpu")
    source = transformers.WhisperForConditionalGeneration.from_pretrained(folder).eval()
    mel = torch.randn(1, source.config.num_mel_bins, 2 * source.config.max_source_positions)
    with torch.no_grad():
        ours = source(mel, decoder_input_ids=torch.tensor([[1, 2, 3]])).logits
        torch.testing.assert_close(theirs(mel, torch.tensor([[1, 2, 3]])), ours, atol=1e-4, rtol=1e-4)


def test_a_peer_gets_its_own_format_and_anything_else_is_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[tuple[str, str]] = []

    def noted(model: str, form: str, write: Any) -> str:
        asked.append((model, form))
        return form

    sizes = {"available_models": lambda: ["base"], "download_model": lambda name: f"downloaded-{name}"}
    monkeypatch.setattr(systems, "converted", noted)
    for package in ("faster_whisper", "whisper"):
        monkeypatch.setitem(sys.modules, package, SimpleNamespace(**sizes))
    (tmp_path / "ct2").mkdir()
    for file in ("ct2/model.bin", "mine.pt"):
        (tmp_path / file).write_bytes(b"weights")
    for kind, name in (("faster-whisper", "ct2"), ("openai", "mine.pt")):
        assert System(kind, str(tmp_path / name)).weights() == str(tmp_path / name)
    assert System("faster-whisper", "base").weights() == "downloaded-base"
    assert System("openai", "base").weights() == "base" and asked == []
    for kind, form in (("faster-whisper", "ct2-int8"), ("faster-whisper-float32", "ct2-float32"), ("openai", "openai")):
        assert System(kind, "a/model").weights() == form and asked.pop() == ("a/model", form)


def test_a_checkpoint_that_is_not_here_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import huggingface_hub

    def download(model: str, *, local_files_only: bool = False, **options: Any) -> str:
        assert model == "openai/whisper-base" and not local_files_only
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub_folder("openai/whisper-base") == hub_folder("base") == hub_folder(str(tmp_path)) == str(tmp_path)


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
from whisper_moe.evaluate.systems import apart

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
