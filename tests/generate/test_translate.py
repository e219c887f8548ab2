"""Texts translated by a tiny model that talks nonsense: alone as together, by line, in known directions only."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from generate.tiny import CONFIG, tiny_tokenizer, tiny_whisper_moe

from whisper_moe import WhisperMoE
from whisper_moe.config_aside import SensesConfig
from whisper_moe.media.tokenizer import Pieces
from whisper_moe.weights.checkpoint import load_checkpoint

PIECES = ("<|text|>", *" कखगचटतपमरलसहािीे", " है", " में")
DIRECTIONS = (("en", "hi"), ("hi", "en"))
SENSES = SensesConfig(tokens=PIECES, directions=DIRECTIONS, rank=2)
TEXTS = ["मेरा काम है।", "A dog, a cat. It sat!", "हम में से", "one two three four five six"]


@pytest.fixture(scope="module")
def model() -> WhisperMoE:
    made = tiny_whisper_moe(config=CONFIG.model_copy(update={"senses": SENSES}))
    with torch.no_grad():
        assert made.model.senses is not None
        made.model.senses.tokens.weight *= 4
    return made


@pytest.fixture(scope="module")
def folder(model: WhisperMoE, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("senses") / "model"
    model.save_pretrained(path)
    return path


def test_a_sentence_is_translated_as_it_would_be_alone(model: WhisperMoE) -> None:
    together = model.translate(" ".join([TEXTS[1]] * 3) + "\nIt sat on A dog, a cat.", source="en")
    alone = {text: model.translate(text).text for text, *_ in together.sentences}
    assert together.text.split("\n")[0] == " ".join([alone["A dog, a cat."], alone["It sat!"]] * 3)
    assert len(set(alone.values())) > 1


def test_lines_stay_lines_and_what_has_no_word_stays_as_it_is(model: WhisperMoE) -> None:
    said = model.translate("A dog.\n\n***\nA cat.", source="en")
    lines = said.text.split("\n")
    assert lines[1:3] == ["", "***"]
    assert len(lines) == 4
    assert [source for source, *_ in said.sentences] == ["A dog.", "A cat."]


def test_the_language_is_that_of_most_letters(model: WhisperMoE) -> None:
    assert (model.translate(TEXTS[0]).source, model.translate(TEXTS[0]).target) == ("hi", "en")
    assert model.translate(TEXTS[1]).facts()["target"] == "hi"
    assert model.translate("कख in English letters", target="hindi").source == "en"


@pytest.mark.parametrize(
    ("text", "asked", "said"),
    [
        ("A dog", {"target": "ta"}, "a text in 'en' into 'ta'; the model translates en to hi, hi to en"),
        ("A dog", {"source": "sw"}, "a text in 'sw'"),
        ("A dog", {"source": "xx"}, "xx"),
        (" \n… ", {}, "nothing in it can be translated"),
        ("", {}, "nothing in it"),
        ("a" * 250_001, {}, "250,001 characters"),
        ("a\0b", {}, r"U\+0000"),
    ],
)
def test_what_cannot_be_translated_is_refused_with_the_cause(
    model: WhisperMoE, text: str, asked: Any, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        model.translate(text, **asked)


def test_long_sentences_are_cut_and_lose_no_word(model: WhisperMoE) -> None:
    text = ", ".join(f"word{i} and more" for i in range(90))
    pieces = [source for source, *_ in model.translate(text).sentences]
    assert len(pieces) > 1
    assert " ".join(pieces) == text
    assert "".join(s for s, *_ in model.translate("x" * 900).sentences) == "x" * 900


def test_titles_and_numbers_end_no_sentence(model: WhisperMoE) -> None:
    said = model.translate("Mr. Smith, e.g. Dr. Who, is here. So are you. No")
    assert [source for source, *_ in said.sentences] == ["Mr. Smith, e.g. Dr. Who, is here.", "So are you.", "No"]


def test_control_tokens_are_text(model: WhisperMoE) -> None:
    said = model.translate("<|hi|> <|endoftext|> a <|text|>")
    assert "<|" not in said.text
    assert said.sentences[0][0] == "<|hi|> <|endoftext|> a <|text|>"


@pytest.mark.parametrize("dtype", ["float32", "int8", "bfloat16"])
def test_what_is_read_aside_translates_as_the_whole_model_and_hears_as_before(
    model: WhisperMoE, folder: Path, dtype: str
) -> None:
    loaded = WhisperMoE.from_pretrained(folder, dtype=dtype, device="cpu")
    assert loaded.model.senses is None
    sound = torch.randn(24_000, generator=torch.Generator().manual_seed(1)).numpy() * 0.1
    before = loaded.transcribe(sound, language="en")
    said = [loaded.translate(text).text for text in TEXTS]
    if dtype == "float32":
        assert said == [model.translate(text).text for text in TEXTS]
    assert loaded.transcribe(sound, language="en") == before
    with pytest.raises(ValueError, match="for_inference=False"):
        loaded.save_pretrained(folder.parent / "no")


def test_a_checkpoint_keeps_senses_in_files_of_their_own(model: WhisperMoE, folder: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    tiny_whisper_moe().save_pretrained(plain)
    more = {path.relative_to(folder) for path in folder.rglob("*.safetensors")}
    assert more - {path.relative_to(plain) for path in plain.rglob("*.safetensors")} == {
        Path("tokens.safetensors"),
        Path("experts/translate.safetensors"),
    }
    whole, heard = load_checkpoint(folder), load_checkpoint(folder, aside=False)
    assert heard.config == replace(heard, config=CONFIG).config
    assert all(torch.equal(tensor, whole.state[key]) for key, tensor in heard.state.items())
    small = tmp_path / "small"
    WhisperMoE.from_pretrained(folder, for_inference=False).save_pretrained(small, quantize=True)
    assert (small / "experts/translate.safetensors").stat().st_size < (
        folder / "experts/translate.safetensors"
    ).stat().st_size
    quantized = load_checkpoint(small).state["senses.tokens.weight"]
    torch.testing.assert_close(quantized, whole.state["senses.tokens.weight"], rtol=0, atol=0.05)


def test_a_model_that_only_hears_says_so(tiny_model: WhisperMoE) -> None:
    with pytest.raises(ValueError, match="tiny: this model only hears"):
        tiny_model.translate("A dog")


def test_only_text_is_ever_written(model: WhisperMoE) -> None:
    pieces = Pieces(tiny_tokenizer(), PIECES, CONFIG.vocab_size)
    rules = model.senses._rules
    assert pieces.tokenizer.eot not in rules.suppress
    assert {pieces.tokenizer.sot, pieces.tokenizer.timestamp_begin, *pieces.control} <= set(rules.suppress)
    assert not set(pieces.ids.values()) - pieces.control & set(rules.suppress)
