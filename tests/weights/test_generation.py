"""Generation settings: kept where a source has them, found by name where it has not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
from weights.whispers import TINY, tokenizer_json

from whisper_moe.config import ModelConfig
from whisper_moe.media.text import Tokenizer
from whisper_moe.weights.files import CheckpointError
from whisper_moe.weights.generation import complete_generation, read_tokenizer


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json())
    return read_tokenizer(tmp_path, {"is_multilingual": True})[1]


def complete(
    tokenizer: Tokenizer, generation: dict[str, Any] | None, config: ModelConfig = TINY, **options: Any
) -> dict[str, Any]:
    options = {"announce": pytest.fail} | options
    return complete_generation(generation, tokenizer, config, origin="generation_config.json", **options)


def test_what_a_source_says_is_kept_and_what_it_leaves_out_is_found_by_name(tokenizer: Tokenizer) -> None:
    stated = {
        "is_multilingual": True,
        "suppress_tokens": [],
        "eos_token_id": 3,
        "alignment_heads": [[0, 1]],
        "custom": "x",
    }
    result = complete(tokenizer, stated | {"begin_suppress_tokens": None})
    assert stated.items() <= result.items()
    assert "begin_suppress_tokens" not in result
    assert result["lang_to_id"] == {"<|en|>": 258, "<|hi|>": 259}
    assert result["task_to_id"] == {"transcribe": 261, "translate": 260}
    assert (result["decoder_start_token_id"], result["no_timestamps_token_id"], result["prev_sot_token_id"]) == (
        257,
        265,
        263,
    )


def test_an_english_model_has_no_languages_and_no_tasks(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json())
    result = complete(read_tokenizer(tmp_path, {"is_multilingual": False})[1], {})
    assert not {"lang_to_id", "task_to_id"} & result.keys()
    assert result["is_multilingual"] is False


def test_an_old_fine_tunes_config_stands_in_for_a_missing_file(tokenizer: Tokenizer) -> None:
    legacy = {
        "suppress_tokens": [],
        "begin_suppress_tokens": [5, 6],
        "forced_decoder_ids": None,
        "eos_token_id": 1,
        "d_model": 8,
    }
    result = complete(tokenizer, None, legacy=legacy)
    assert result["suppress_tokens"] == []
    assert result["begin_suppress_tokens"] == [5, 6]
    assert result["eos_token_id"] == 256
    assert not {"forced_decoder_ids", "d_model"} & result.keys()


def test_alignment_heads_of_another_model_are_left_out_aloud(tokenizer: Tokenizer) -> None:
    for heads in ([[1, 0]], [[0, 2]], [[-1, 0]], [3], [[0.0, 1]], [[0, True]], [[0, 1, 0]], "all", [["a", "b"]]):
        said: list[str] = []
        result = complete(tokenizer, {"alignment_heads": heads}, announce=said.append)
        assert "alignment_heads" not in result
        assert len(said) == 1
        assert said[0].startswith("generation_config.json: alignment_heads are not this model's")


@pytest.mark.parametrize(
    ("stated", "cause"),
    [
        ({"suppress_tokens": [1, 99999]}, "suppress_tokens has 99999"),
        ({"suppress_tokens": "none"}, "suppress_tokens has 'none'"),
        ({"begin_suppress_tokens": [1.5]}, "begin_suppress_tokens has 1.5"),
        ({"eos_token_id": -2}, "eos_token_id has -2"),
        ({"lang_to_id": {"<|en|>": "258"}}, "lang_to_id has '258'"),
        ({"lang_to_id": {"<|en|>": 259}}, "lang_to_id gives <[|]en[|]> the id 259, the tokenizer 258"),
        ({"suppress_tokens": 5}, "suppress_tokens has '5', which is no list"),
        ({"suppress_tokens": [True]}, "suppress_tokens has True"),
        ({"lang_to_id": 7_000}, "lang_to_id has '7000', which is no dict"),
        ({"lang_to_id": 5}, "lang_to_id has '5', which is no dict"),
        ({"lang_to_id": [258]}, "lang_to_id has '.258.', which is no dict"),
        ({"lang_to_id": []}, "lang_to_id has '..', which is no dict"),
        ({"max_initial_timestamp_index": "50"}, "max_initial_timestamp_index is '50', must be a number"),
        ({"max_initial_timestamp_index": -1}, "max_initial_timestamp_index is '-1', must be a number"),
        ({"task_to_id": {"transcribe": 10**9}}, "task_to_id has 1000000000"),
    ],
)
def test_ids_that_the_embedding_does_not_have_are_refused(
    stated: dict[str, Any], cause: str, tokenizer: Tokenizer
) -> None:
    with pytest.raises(CheckpointError, match=f"generation_config.json: {cause}"):
        complete(tokenizer, stated)


def test_a_tokenizer_of_a_larger_vocabulary_than_the_embedding_is_refused(tokenizer: Tokenizer) -> None:
    """As when an English-only model gets a multilingual model's tokenizer."""
    with pytest.raises(CheckpointError, match="they belong to different models"):
        complete(tokenizer, {}, TINY.model_copy(update={"vocab_size": TINY.vocab_size - 1}))


def test_the_standard_by_name_is_whisper_bases_own_file(whisper_base: Path) -> None:
    _, tokenizer = read_tokenizer(whisper_base)
    published = json.loads((whisper_base / "generation_config.json").read_text())
    result = complete(tokenizer, None, ModelConfig(), legacy={})
    published.pop("alignment_heads")
    assert result == {key: value for key, value in published.items() if key in result}
    assert published.keys() <= result.keys()


OLD = ["vocab.json", "merges.txt", "added_tokens.json"]
SPOKEN = [
    "Hello world, don't stop: 3.5 % — naïve", "नमस्ते दुनिया, ओड़िआ ଓଡ଼ିଆ தமிழ் తెలుగు", "你好世界。こんにちは", "สวัสดี ສະບາຍດີ မင်္ဂလာပါ",
    "مرحبا שלום", "🙂👍🏽 x\n\t  y", " <|endoftext|> ", "", "é é ♪ …",
]  # fmt: skip


@pytest.mark.parametrize("timestamps", [True, False])
def test_a_tokenizer_built_from_the_old_files_is_the_new_one(
    timestamps: bool, whisper_base: Path, tmp_path: Path
) -> None:
    from tokenizers import Tokenizer as Backend

    for name in OLD:
        (tmp_path / name).write_bytes((whisper_base / name).read_bytes())
    if not timestamps:
        added = json.loads((tmp_path / "added_tokens.json").read_text())
        (tmp_path / "added_tokens.json").write_text(json.dumps({k: v for k, v in added.items() if "." not in k}))
    content, tokenizer = read_tokenizer(tmp_path)
    published, reference = read_tokenizer(whisper_base)
    assert published == (whisper_base / "tokenizer.json").read_bytes()
    ours, theirs = (Backend.from_str(text.decode()) for text in (content, published))
    assert ours.get_vocab() == theirs.get_vocab()
    for text in SPOKEN:
        assert tokenizer.encode(text) == reference.encode(text)
        assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.languages) == 99


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer.json"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer.json"),
        (lambda folder: (folder / "tokenizer.json").write_bytes(tokenizer_json().replace(b"<|startofprev|>", b"<|other|>")),
         "no token <|startofprev|>"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_is_none_is_refused(damage: Callable[[Path], object], cause: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json())
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=f"{tmp_path}.*{cause.replace('|', '[|]')}"):
        read_tokenizer(tmp_path)
