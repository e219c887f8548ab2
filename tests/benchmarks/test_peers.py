"""Peers: which weights they get, what is expected of them, and the evaluation that has them beside a model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

for needed in ("datasets", "rapidfuzz", "matplotlib", "sacrebleu", "whisper_normalizer"):
    pytest.importorskip(needed, reason="what evaluation needs is an extra")

from benchmarks.scripts import script
from commandline import trusting_flags
from evaluate.corpora import table

from whisper_moe import WhisperMoE
from whisper_moe.evaluate.measure import Adapter, Heard
from whisper_moe.machine import SPINS, share_cores

peers, beside = script("peers"), script("beside")


def copy(model: str, target: Path) -> None:
    (file,) = Path(model).iterdir()
    target.write_bytes(file.read_bytes())


def fail(model: str, target: Path) -> None:
    target.mkdir()
    raise ValueError(f"{model} is\nno Whisper")


def test_weights_that_were_written_anew_are_converted_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What lies at a path may change; another path of the same spelling elsewhere is another model."""
    monkeypatch.setattr(peers, "apart", lambda work, *arguments: work(*arguments))
    model, found = tmp_path / "dense" / "model.safetensors", []
    model.parent.mkdir()
    for content in (b"one", b"one", b"another"):
        if not model.exists() or model.read_bytes() != content:
            model.write_bytes(content)
        found.append(peers.converted(str(model.parent), "openai", copy, tmp_path / "cache"))
        assert Path(found[-1]).read_bytes() == content
    assert found[0] == found[1] != found[2]
    monkeypatch.chdir(tmp_path)
    here = peers.converted("dense", "openai", copy, tmp_path / "cache")
    (tmp_path / "elsewhere/dense").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="dense is\nno Whisper"):
        peers.converted("dense", "openai", fail, tmp_path / "cache")
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {Path(path).name for path in (*found, here)}


def test_a_whisper_is_converted_to_what_openais_own_code_loads(tmp_path: Path):
    """And what it hears is what we hear."""
    whisper, transformers = pytest.importorskip("whisper"), pytest.importorskip("transformers")
    import torch
    from weights.whispers import TINY, hub_model, write_folder

    wide = TINY.model_copy(update=dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 4 * TINY.d_model))
    folder = write_folder(tmp_path / "hub", hub_model(wide))
    peers.to_openai(str(folder), tmp_path / "openai.pt")
    with pytest.raises(ValueError, match="four times as wide"):
        peers.to_openai(str(write_folder(tmp_path / "narrow", hub_model())), tmp_path / "narrow.pt")
    theirs = whisper.load_model(str(tmp_path / "openai.pt"), device="cpu")
    source = transformers.WhisperForConditionalGeneration.from_pretrained(folder).eval()
    mel = torch.randn(1, source.config.num_mel_bins, 2 * source.config.max_source_positions)
    with torch.no_grad():
        ours = source(mel, decoder_input_ids=torch.tensor([[1, 2, 3]])).logits
        torch.testing.assert_close(theirs(mel, torch.tensor([[1, 2, 3]])), ours, atol=1e-4, rtol=1e-4)


def test_a_checkpoint_that_is_not_here_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import huggingface_hub

    def download(model: str, *, local_files_only: bool = False, **options: Any) -> str:
        assert model == "openai/whisper-base" and not local_files_only
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert (
        peers.hub_folder("openai/whisper-base")
        == peers.hub_folder("base")
        == peers.hub_folder(str(tmp_path))
        == str(tmp_path)
    )


def test_peers_are_measured_as_they_are() -> None:
    ours: dict[str, str] = {}
    share_cores(ours)
    assert ours["GOMP_SPINCOUNT"] == str(SPINS)
    peers.unshare_cores(ours)
    assert "GOMP_SPINCOUNT" not in ours
    own = {"GOMP_SPINCOUNT": "77"}
    peers.unshare_cores(own)
    assert own == {"GOMP_SPINCOUNT": "77"}


def test_clips_that_a_pipeline_mixes_up_are_an_error_and_not_a_wrong_transcript() -> None:
    class Pipeline:
        def transcribe(self, *_: Any, **__: Any) -> tuple[list[Any], None]:
            return [], None

    clips = [np.zeros(16_000, np.float32)] * 2
    with pytest.raises(RuntimeError, match="2 clips gave 0 segments"):
        list(peers.hear_in_batches(Pipeline(), {}, clips, language="en", task="transcribe", long=False))


def test_a_model_is_evaluated_with_a_peer_beside_it(
    tmp_path: Path, tiny_model: WhisperMoE, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hear(sources: Iterable[Any], **told: Any) -> Iterator[Heard]:
        yield from (Heard(f"{told['language']} {len(each)}", tokens=2) for each in sources)

    echo = peers.System(lambda job: Adapter(hear, {"beam_size": job.beam}), "ct2-int8", (), ("numpy",))
    monkeypatch.setattr(beside, "systems", lambda _: {"echo-int8": echo, "gone": peers.System(hear, "", ("gone",), ())})
    monkeypatch.setattr(beside, "weights_of", lambda form, model, cache: f"{cache}/{form}")
    monkeypatch.setattr(beside.evaluated, "apart", lambda work, *given, threads: work(*given))
    trusting_flags(tiny_model, tmp_path / "m")
    given = [str(tmp_path / "m"), str(table(tmp_path)), "--weights", "a/whisper", "-o", str(tmp_path / "out")]
    settings = ["--no-fallback", "--latency-clips", "2", "--margin", "0.5", "--dtype", "float32", "--beam", "2"]
    assert beside.main([*given, *settings, "--peers", "echo-int8"]) == 0
    report = json.loads((tmp_path / "out/report.json").read_text(encoding="utf-8"))
    assert list(report["systems"]) == ["m", "echo-int8:a/whisper"]
    found = report["systems"]["echo-int8:a/whisper"]
    assert (found["kind"], found["dtype"], found["options"]) == ("echo-int8", "int8", {"beam_size": 2})
    assert found["cost"]["latency"]["clips"] == 2 and "numpy" in report["versions"]
    assert [each["baseline"] for each in report["comparisons"]] == ["echo-int8:a/whisper"]
    assert beside.main([*given, "--peers", "gone"]) == beside.main([*given, "--peers", "ours"]) == 2
