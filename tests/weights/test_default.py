"""A checkpoint of ours is loaded only if its tokenizer and its generation config are this model's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
from weights.test_checkpoint import save
from weights.whispers import GENERATION, TINY, hub_model, random_state, tokenizer_json, write_folder

from whisper_moe.config import ModelConfig
from whisper_moe.weights.checkpoint import save_checkpoint
from whisper_moe.weights.default import load_model
from whisper_moe.weights.files import CheckpointError


def saved(directory: Path, config: ModelConfig = TINY, **generation: Any) -> Path:
    """Sealed with whatever generation config is given."""
    save_checkpoint(
        directory, config, random_state(config), generation=GENERATION | generation,
        tokenizer_files={"tokenizer.json": tokenizer_json()},
    )  # fmt: skip
    return directory


@pytest.mark.parametrize(
    ("generation", "cause"),
    [
        ({"suppress_tokens": [99_999]}, "suppress_tokens has 99999, which is none of"),
        ({"suppress_tokens": 7}, "suppress_tokens has '7', which is no list"),
        ({"begin_suppress_tokens": [-2]}, "begin_suppress_tokens has -2"),
        ({"lang_to_id": ["<|en|>"]}, "lang_to_id has .* which is no dict"),
        ({"lang_to_id": 258}, "lang_to_id has .* which is no dict"),
        ({"lang_to_id": {"<|en|>": 259}}, "lang_to_id gives .* the id 259, the tokenizer 258"),
        ({"lang_to_id": {"<|tlh|>": 259}}, ".*it has no token <.tlh.>"),
    ],
)
def test_a_generation_config_that_is_not_this_models(generation: dict[str, Any], cause: str, tmp_path: Path) -> None:
    saved(tmp_path / "m", **generation)
    with pytest.raises(CheckpointError, match=f"^{tmp_path}/m/generation_config.json: {cause}"):
        load_model(tmp_path / "m")


def test_a_tokenizer_of_a_larger_model(tmp_path: Path) -> None:
    saved(tmp_path / "m", TINY.model_copy(update={"vocab_size": TINY.vocab_size - 1}))
    with pytest.raises(
        CheckpointError, match=f"^{tmp_path}/m/.*json: the weights have 1,766 tokens, the tokenizer 1,767"
    ):
        load_model(tmp_path / "m")


def test_a_tokenizer_that_is_not_whispers(tmp_path: Path) -> None:
    other = tokenizer_json().replace(b"<|startofprev|>", b"<|other|>")
    save_checkpoint(
        tmp_path / "m", TINY, random_state(TINY), generation=GENERATION, tokenizer_files={"tokenizer.json": other}
    )
    with pytest.raises(CheckpointError, match=f"^{tmp_path}/m/tokenizer.json: .*no token <.startofprev.>"):
        load_model(tmp_path / "m")


@pytest.mark.parametrize("heads", [[[7, 0]], [[0, 9]], [[-1, 0]], [[0.0, 1]], "all"])
def test_alignment_heads_of_missing_layers_are_left_out_aloud(heads: object, tmp_path: Path) -> None:
    said: list[str] = []
    loaded = load_model(saved(tmp_path / "m", alignment_heads=heads), announce=said.append)
    assert "alignment_heads" not in loaded.generation
    assert [line.partition(": ")[0] for line in said] == [f"{tmp_path}/m/generation_config.json"]


def test_a_checkpoint_and_the_whisper_that_it_was_made_from_speak_alike(tmp_path: Path) -> None:
    dense = load_model(write_folder(tmp_path / "w", hub_model()), announce=pytest.fail)
    save(tmp_path / "m")
    ours = load_model(tmp_path / "m", announce=pytest.fail)
    assert ours.generation == dense.generation
    assert ours.tokenizer.languages == dense.tokenizer.languages == {"en": 258, "hi": 259}
    assert json.loads((tmp_path / "m/generation_config.json").read_text()) == GENERATION
