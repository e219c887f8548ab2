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
from whisper_moe.media.languages import LANGUAGES
from whisper_moe.media.tokenizer import Tokenizer
from whisper_moe.weights.files import CheckpointError
from whisper_moe.weights.tokens import complete, read_tokenizer, stated_language


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json())
    return read_tokenizer(tmp_path, {"is_multilingual": True})[1]


def completed(
    tokenizer: Tokenizer, generation: dict[str, Any] | None, config: ModelConfig = TINY, **options: Any
) -> dict[str, Any]:
    return complete(generation, tokenizer, config, origin="generation_config.json", **options)[0]


def test_what_a_source_says_is_kept_and_what_it_leaves_out_is_found_by_name(tokenizer: Tokenizer) -> None:
    stated = {
        "is_multilingual": True,
        "suppress_tokens": [],
        "eos_token_id": 3,
        "alignment_heads": [[0, 1]],
        "custom": "x",
    }
    result = completed(tokenizer, stated | {"begin_suppress_tokens": None})
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
    result = completed(read_tokenizer(tmp_path, {"is_multilingual": False})[1], {})
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
    result = completed(tokenizer, None, legacy=legacy)
    assert result["suppress_tokens"] == []
    assert result["begin_suppress_tokens"] == [5, 6]
    assert result["eos_token_id"] == 256
    assert not {"forced_decoder_ids", "d_model"} & result.keys()


@pytest.mark.parametrize(
    "heads", [[[1, 0]], [[0, 2]], [[-1, 0]], [3], [[0.0, 1]], [[0, True]], [[0, 1, 0]], "all", [["a", "b"]]], ids=str
)
def test_alignment_heads_of_another_model_are_left_out_aloud(
    heads: object, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    assert "alignment_heads" not in completed(tokenizer, {"alignment_heads": heads})
    (said,) = caplog.messages
    assert said.startswith("generation_config.json: alignment_heads are not this model's")


@pytest.mark.parametrize(
    ("stated", "cause"),
    [
        ({"suppress_tokens": [1, 99999]}, "suppress_tokens.1: 99999 is none of 1767 tokens"),
        ({"suppress_tokens": "none"}, "suppress_tokens: Input should be a valid list"),
        ({"suppress_tokens": [True]}, "suppress_tokens.0: Input should be a valid integer"),
        ({"begin_suppress_tokens": [1.5]}, "begin_suppress_tokens.0: Input should be a valid integer"),
        ({"eos_token_id": -2}, "eos_token_id.0: Input should be greater than or equal to -1"),
        ({"decoder_start_token_id": [257, 10**9]}, "decoder_start_token_id.1: 1000000000 is none of"),
        ({"lang_to_id": {"<|en|>": "258"}}, "lang_to_id.<.en.>: Input should be a valid integer"),
        ({"lang_to_id": {"<|en|>": 259}}, "the generation config gives <[|]en[|]> the id 259, the tokenizer 258"),
        ({"lang_to_id": {"<|tlh|>": 259}}, "not a Whisper tokenizer: it has no token <.tlh.>"),
        ({"lang_to_id": [258]}, "lang_to_id: Input should be a valid dictionary"),
        ({"max_initial_timestamp_index": "50"}, "max_initial_timestamp_index: Input should be a valid integer"),
        (
            {"max_initial_timestamp_index": -1},
            "max_initial_timestamp_index: Input should be greater than or equal to 0",
        ),
        ({"task_to_id": {"transcribe": 10**9}}, "task_to_id.transcribe: 1000000000 is none of"),
        ({"language_names": {"or": 7}}, "language_names.or: Input should be a valid string"),
        ({"untrained_rows": ["or"]}, "untrained_rows: Input should be a valid dictionary"),
        ({"undetected_languages": "or"}, "undetected_languages: Input should be a valid list"),
        ({"undetected_languages": ["en", "hi"]}, "undetected_languages leaves no language that could be detected"),
    ],
)
def test_ids_that_the_embedding_does_not_have_are_refused(
    stated: dict[str, Any], cause: str, tokenizer: Tokenizer
) -> None:
    with pytest.raises(CheckpointError, match=f"generation_config.json: {cause}"):
        completed(tokenizer, stated)


def test_a_tokenizer_of_a_larger_vocabulary_than_the_embedding_is_refused(tokenizer: Tokenizer) -> None:
    """As when an English-only model gets a multilingual model's tokenizer."""
    with pytest.raises(CheckpointError, match="they belong to different models"):
        completed(tokenizer, {}, TINY.model_copy(update={"vocab_size": TINY.vocab_size - 1}))


def whispers_tokenizer(size: int, appended: int = 0) -> Tokenizer:
    """One of a published size, its words made up; ``appended`` tokens follow the timestamps."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    codes = list(LANGUAGES)[: 100 if size == 51_866 else 99]
    control = ["<|startoftranscript|>", *(f"<|{code}|>" for code in codes), "<|translate|>", "<|transcribe|>"]
    control = ["<|endoftext|>", *control, "<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]
    times = [f"<|{i * 0.02:.2f}|>" for i in range(1501)]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(f"w{i}" for i in range(size - len(letters) - len(control) - len(times)))]
    backend = Backend(models.BPE({word: i for i, word in enumerate(words)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    names = [*control, *times, *(f"<|new-{i}|>" for i in range(appended))]
    backend.add_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    assert backend.get_vocab_size() == size + appended
    return Tokenizer(backend)


@pytest.mark.parametrize("rows", [51_864, 51_865, 51_866])
def test_the_tokenizer_of_another_kind_of_whisper_is_refused_by_both_names(rows: int) -> None:
    names = {51_864: "tiny.en", 51_865: "base", 51_866: "large-v3"}
    for size, name in names.items():
        tokenizer, config = whispers_tokenizer(size), TINY.model_copy(update={"vocab_size": rows})
        if size == rows:
            assert completed(tokenizer, {}, config)["no_timestamps_token_id"] == tokenizer.no_timestamps
            continue
        with pytest.raises(CheckpointError, match=rf"weights have {rows:,} tokens .as openai/whisper-{names[rows]}., "
                           rf"the tokenizer {size:,} .as openai/whisper-{name}.; they belong to different models: "
                           "upcycle --base MODEL"):  # fmt: skip
            completed(tokenizer, {}, config)


@pytest.mark.parametrize(("size", "appended", "rows"), [(51_865, 1, 51_866), (51_864, 2, 51_866), (51_865, 0, 51_968)])
def test_tokens_that_were_appended_and_padding_are_no_other_kind(size: int, appended: int, rows: int) -> None:
    tokenizer = whispers_tokenizer(size, appended)
    assert completed(tokenizer, {}, TINY.model_copy(update={"vocab_size": rows}))["eos_token_id"] == tokenizer.eot


@pytest.mark.parametrize(
    ("stated", "code"),
    [
        ({"language": "hindi"}, "hi"), ({"language": "<|hi|>"}, "hi"), ({"language": "hi", "task": "transcribe"}, "hi"),
        ({"language": "Hindi", "forced_decoder_ids": [[1, 258]]}, "hi"), ({"forced_decoder_ids": [[1, 259], [2, 261]]}, "hi"),
        ({"forced_decoder_ids": [[1, 258], [2, 261]]}, "en"), ({"forced_decoder_ids": [[1, None], [2, 261]]}, None),
        ({"language": None}, None), ({"language": "klingon"}, None), ({"language": "tamil"}, None), ({}, None),
        ({"forced_decoder_ids": "none"}, None), ({"forced_decoder_ids": [[1], 2, {"1": 259}, [1, [259]]]}, None),
    ],
)  # fmt: skip
def test_the_language_that_a_fine_tune_states(stated: dict[str, Any], code: str | None, tokenizer: Tokenizer) -> None:
    assert stated_language(completed(tokenizer, stated), tokenizer) == code


@pytest.mark.parametrize(("id", "code"), [(258, None), (259, "hi")])
def test_english_in_an_old_config_is_openais_default_and_states_nothing(
    id: int, code: str | None, tokenizer: Tokenizer
) -> None:
    result = completed(tokenizer, None, legacy={"forced_decoder_ids": [[1, id], [2, 261], [3, 265]]})
    assert stated_language(result, tokenizer) == code and ("forced_decoder_ids" in result) == (code is not None)


def test_the_standard_by_name_is_whisper_bases_own_file(whisper_base: Path) -> None:
    _, tokenizer = read_tokenizer(whisper_base)
    published = json.loads((whisper_base / "generation_config.json").read_text())
    result = completed(tokenizer, None, ModelConfig(), legacy={})
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
