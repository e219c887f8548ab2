"""Peers: which weights they get, and that our own adapter hands on what a transcription says."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from whisper_moe import WhisperMoE
from whisper_moe.evaluate import convert, systems
from whisper_moe.evaluate.peers import FasterWhisperBatched, Ours, Setup
from whisper_moe.evaluate.systems import System, parse, prepared

SETUP = Setup(weights="", threads=1, language="en", fallback=False)


def noise(seconds: float) -> np.ndarray:
    return np.random.default_rng(round(10 * seconds)).normal(0, 0.1, round(16_000 * seconds)).astype(np.float32)


def test_our_adapter_hands_on_text_tokens_experts_and_errors(tiny_model: WhisperMoE):
    adapter = Ours(tiny_model, SETUP, margin=0.5, weights=Path())
    sounds = [noise(1), np.full(16_000, np.nan, np.float32), noise(0.5)]
    options = adapter.options | {"logprob_threshold": None, "no_speech_threshold": None}
    adapter.options = options | {"compression_ratio_threshold": None}
    first, broken, last = adapter.hear(sounds, language="hi")
    alone = tiny_model.transcribe(sounds[0], **adapter.options | {"language": "hi"})
    assert first.text == alone.text != ""
    assert first.tokens == sum(len(segment.tokens) for segment in alone.segments)
    assert dict(first.experts) == pytest.approx(dict(alone.segments[0].experts))
    assert broken.text == "" and broken.error is not None and "NaN" in broken.error
    assert last.error is None


def test_clips_that_a_pipeline_mixes_up_are_an_error_and_not_a_wrong_transcript():
    class Pipeline:
        def transcribe(self, *_: Any, **__: Any) -> tuple[list[Any], None]:
            return [], None

    adapter = FasterWhisperBatched.__new__(FasterWhisperBatched)
    adapter.pipeline, adapter.options = Pipeline(), {"language": "en", "vad_filter": True}  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(RuntimeError, match="2 clips gave 0 segments"):
        list(adapter.hear([noise(1), noise(1)], long=False))


@pytest.mark.parametrize(
    ("spec", "kind", "name", "label"),
    [
        ("openai/whisper-base", "ours", "openai/whisper-base", "openai/whisper-base"),
        ("default", "ours", "default", "default"),
        ("transformers:openai/whisper-base", "transformers", "openai/whisper-base", "transformers:openai/whisper-base"),
        ("C:model", "ours", "C:model", "C:model"),
    ],
)
def test_systems_are_named_by_their_kind(spec: str, kind: str, name: str, label: str):
    system = parse(spec)
    assert (system.kind, system.name, system.label) == (kind, name, label)


def test_a_folder_is_called_by_its_last_name(tmp_path: Path):
    (tmp_path / "mine").mkdir()
    assert parse(f"{tmp_path}/mine/").label == "mine"


def test_a_training_runs_model_is_called_by_the_run(tmp_path: Path):
    for run in ("a", "b"):
        (tmp_path / run / "model").mkdir(parents=True)
    assert [parse(str(tmp_path / run / "model")).label for run in "ab"] == ["a", "b"]


def test_weights_that_were_written_anew_are_converted_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What lies at a path may change; another path of the same spelling elsewhere is another model."""
    model = tmp_path / "dense" / "model.safetensors"
    model.parent.mkdir()
    made: list[str] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        made.append(command[-1])
        Path(command[-1]).mkdir(parents=True)
        return subprocess.CompletedProcess(command, 0, stdout=command[-1] + "\n", stderr="")

    monkeypatch.setattr(convert.subprocess, "run", run)
    for content in (b"one", b"one", b"another"):
        if not model.exists() or model.read_bytes() != content:
            model.write_bytes(content)
        convert.weights("openai", str(model.parent), tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    convert.weights("openai", "dense", tmp_path / "cache")
    (tmp_path / "elsewhere/dense").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    convert.weights("openai", "dense", tmp_path / "cache")
    assert len(made) == len(set(made)) == 4


def test_a_peer_gets_its_own_format_and_anything_else_is_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("faster_whisper")
    pytest.importorskip("whisper")
    asked: list[tuple[str, str, Path]] = []

    def converted(form: str, model: str, cache: Path) -> Path:
        asked.append((form, model, cache))
        return cache / form

    monkeypatch.setattr(systems, "weights", converted)
    monkeypatch.setattr("faster_whisper.download_model", lambda name: f"downloaded-{name}")
    (tmp_path / "ct2").mkdir()
    (tmp_path / "ct2/model.bin").write_bytes(b"weights")
    (tmp_path / "mine.pt").write_bytes(b"weights")
    own = {"faster-whisper": str(tmp_path / "ct2"), "openai": str(tmp_path / "mine.pt")}
    for kind, name in own.items():
        assert prepared(System(kind, name), tmp_path).weights == name  # pyright: ignore[reportArgumentType]
    assert prepared(System("faster-whisper", "base"), tmp_path).weights == "downloaded-base"
    assert prepared(System("openai", "base"), tmp_path).weights == "base"
    assert asked == []
    for kind, form in (("faster-whisper", "ct2-int8"), ("faster-whisper-float32", "ct2-float32"), ("openai", "openai")):
        found = prepared(System(kind, "openai/whisper-base"), tmp_path)  # pyright: ignore[reportArgumentType]
        assert found.weights == str(tmp_path / form)
        assert asked.pop() == (form, "openai/whisper-base", tmp_path)


def test_a_checkpoint_that_is_not_here_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import huggingface_hub

    def download(model: str, *, local_files_only: bool = False, **options: Any) -> str:
        assert model == "openai/whisper-base" and not local_files_only
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert convert.to_hub("openai/whisper-base") == convert.to_hub(str(tmp_path)) == tmp_path
