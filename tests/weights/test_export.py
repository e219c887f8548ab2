"""The way back: what is exported loads in transformers and says the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
from transformers import WhisperForConditionalGeneration, WhisperProcessor
from weights.whispers import CONFIGS, TINY, hub_model, hub_state, random_state, same, tokenizer_json, write_folder

from whisper_moe.weights.checkpoint import Loaded
from whisper_moe.weights.load import load_model
from whisper_moe.weights.whisper import save_whisper


def export(source: Loaded, directory: Path) -> None:
    save_whisper(
        directory, source.config, source.state, generation=source.generation, tokenizer_json=source.tokenizer_json
    )


def test_what_comes_in_goes_out_and_comes_in_again(tmp_path: Path) -> None:
    source = load_model(write_folder(tmp_path / "in", hub_model()))
    export(source, tmp_path / "out")
    again = load_model(tmp_path / "out")
    assert same(again.state, source.state)
    assert (again.config, again.generation, again.tokenizer_json) == (
        source.config,
        source.generation,
        source.tokenizer_json,
    )


def test_transformers_loads_model_and_processor(tmp_path: Path) -> None:
    export(load_model(write_folder(tmp_path / "in", hub_model())), tmp_path / "out")
    model = WhisperForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert same(hub_state(model), hub_state(hub_model()))
    assert model.config.decoder_start_token_id == model.generation_config.decoder_start_token_id == 257
    processor = WhisperProcessor.from_pretrained(tmp_path / "out")
    assert processor.tokenizer.decode(processor.tokenizer("नमस्ते", add_special_tokens=False).input_ids) == "नमस्ते"
    mel = processor.feature_extractor(torch.randn(16_000).numpy(), sampling_rate=16_000, return_tensors="pt")
    assert mel.input_features.shape == (1, 80, 3000)


def test_experts_and_existing_directories_are_refused(tmp_path: Path) -> None:
    state = random_state(CONFIGS["shared"])
    with pytest.raises(ValueError, match="this one has moe and ttt"):
        save_whisper(tmp_path / "out", CONFIGS["shared"], state, generation={}, tokenizer_json=tokenizer_json())
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="exists already"):
        save_whisper(tmp_path, TINY, random_state(TINY), generation={}, tokenizer_json=tokenizer_json())


def test_whisper_base_goes_out_as_it_came_in(whisper_base: Path, tmp_path: Path) -> None:
    from transformers import WhisperTokenizer

    export(load_model(whisper_base), tmp_path / "out")
    model = WhisperForConditionalGeneration.from_pretrained(tmp_path / "out")
    reference = WhisperForConditionalGeneration.from_pretrained(whisper_base, dtype=torch.float32)
    assert same(hub_state(model), hub_state(reference))
    ours, theirs = model.generation_config.to_dict(), reference.generation_config.to_dict()
    assert {key: ours[key] for key in theirs if key != "transformers_version"} == {
        key: theirs[key] for key in theirs if key != "transformers_version"
    }
    ours_tokenizer, their_tokenizer = (WhisperTokenizer.from_pretrained(f) for f in (tmp_path / "out", whisper_base))
    text = "Hello नमस्ते 你好 <|en|>"
    assert ours_tokenizer(text).input_ids == their_tokenizer(text).input_ids
