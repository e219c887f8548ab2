"""New tokens: nobody else's logits, files or transcripts notice them, and they can be asked for by name."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import tokenizers
import torch
from torch import Tensor

pytest.importorskip("transformers")
from generate.test_sign import SEES
from generate.tiny import CONFIG as SPEAKING
from generate.tiny import tiny_whisper_moe
from weights.whispers import (
    CONFIGS,
    GENERATION,
    TINY,
    VOCABULARY,
    hub_model,
    random_state,
    same,
    tokenizer_json,
    write_folder,
)

from whisper_moe import WhisperMoE
from whisper_moe.config import ModelConfig
from whisper_moe.generate.decode import DecodingResult
from whisper_moe.generate.options import TranscribeOptions
from whisper_moe.media.languages import LANGUAGES, NewLanguage
from whisper_moe.media.tokenizer import Tokenizer
from whisper_moe.model.inference import prepare_for_inference
from whisper_moe.model.int8 import Int8Embedding, Int8Rows
from whisper_moe.model.model import WhisperMoEModel
from whisper_moe.packing import Layout
from whisper_moe.weights.checkpoint import Loaded, describe, load_checkpoint, load_senses, save_checkpoint
from whisper_moe.weights.files import CheckpointError
from whisper_moe.weights.load import load_model
from whisper_moe.weights.parts import EMBEDDING, NEW_TOKENS, quantizable
from whisper_moe.weights.tokens import complete, read_tokenizer, stated_language
from whisper_moe.weights.upcycle import add_languages
from whisper_moe.weights.whisper import save_whisper

ODIA, KONKANI = NewLanguage(code="or"), NewLanguage(code="kok", like=("hi",))
OR, KOK = VOCABULARY, VOCABULARY + 1
"""Their ids: those that follow."""


def extended(config: ModelConfig = TINY, *languages: NewLanguage, state: dict[str, Tensor] | None = None) -> Loaded:
    model = Loaded(config, random_state(config) if state is None else state, GENERATION, tokenizer_json())
    return add_languages(model, languages or (ODIA, KONKANI))


def built(config: ModelConfig, state: dict[str, Tensor]) -> WhisperMoEModel:
    model = WhisperMoEModel(config)
    model.load_state_dict(state)
    return model.eval()


def save(folder: Path, model: Loaded, **options: Any) -> Path:
    save_checkpoint(folder, model, **options)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def weights_of(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in content(folder).items() if name.endswith((".safetensors", "tokenizer.json"))}


# The model.


def arranged(model: WhisperMoEModel, form: str) -> WhisperMoEModel:
    """In one of the ways that a model is computed: as it is trained, arranged, or on weights that are int8 already."""
    model = copy.deepcopy(model)
    if form == "training":
        return model
    state = model.state_dict()
    rows = {key: Int8Rows.of(state[key]) for key in state if quantizable(key)} if "from int8" in form else None
    prepare_for_inference(model, "int8" if form.startswith("int8") else "float32", rows)
    assert rows is None or isinstance(model.decoder.token_embedding, Int8Embedding)
    return model


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("dense", "training"),
        ("token", "float32"),
        ("shared", "int8"),
        ("shared", "float32 from int8"),
        ("per expert", "int8 from int8"),
    ],
)
def test_the_logits_of_all_other_tokens_stay_as_they_were(name: str, form: str) -> None:
    """But for rounding: one product has more rows where there are new tokens."""
    config, state = CONFIGS[name], random_state(CONFIGS[name])
    new = extended(config, state=state)
    before, after = (arranged(built(*pair), form) for pair in ((config, state), (new.config, new.state)))
    generator = torch.Generator().manual_seed(1)
    mels = [torch.randn(80, n, generator=generator) for n in (40, 13)]
    texts = [torch.randint(VOCABULARY, (n,), generator=generator) for n in (9, 4)]
    layout = Layout(map(len, texts))
    expected = before.decoder.head(before.decoder(torch.cat(texts), layout, before.encoder(mels)).states_TD)
    states = after.decoder(torch.cat(texts), layout, after.encoder(mels)).states_TD
    found = after.decoder.head(states)
    assert found.shape == (13, VOCABULARY + 2) and found.isfinite().all()
    assert (found[:, :VOCABULARY] - expected).abs().max() <= 1e-6 * expected.abs().max()
    tied = states @ new.state[NEW_TOKENS].T
    tolerance = 0.03 if form.startswith("int8") or "from int8" in form else 1e-5
    assert (found[:, VOCABULARY:] - tied).abs().max() <= tolerance * tied.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("form", ["training", "float32", "int8 from int8"])
def test_a_new_token_is_read_as_its_own_row(form: str) -> None:
    new = extended()
    model = arranged(built(new.config, new.state), form)
    encoded = model.encoder([torch.randn(80, 40)])
    read = [model.decoder(torch.tensor([3, id, 5]), Layout([3]), encoded).states_TD for id in (OR, KOK, OR - 1)]
    assert torch.equal(read[0][0], read[1][0]) and not torch.equal(read[0][1], read[1][1])
    embedded = model.decoder._embed(torch.tensor([OR, 7, KOK]), torch.tensor([0, 1, 2])) - model.decoder.positions[:3]
    expected = torch.stack([new.state[NEW_TOKENS][0], new.state[EMBEDDING][7], new.state[NEW_TOKENS][1]])
    assert torch.allclose(embedded, expected, atol=0.02 if "int8" in form else 1e-6)
    with pytest.raises(IndexError):
        model.decoder(torch.tensor([KOK + 1]), Layout([1]), encoded)


# Where a row starts, and what its id is.


@pytest.mark.parametrize(
    ("language", "relatives"),
    [
        (NewLanguage(code="kok", like=("hi",)), ["hi"]),
        (NewLanguage(code="kok", like=("English", "Hindi")), ["en", "hi"]),
        (NewLanguage(code="mai"), ["hi"]),
        (NewLanguage(code="or"), ["en", "hi"]),
        (NewLanguage(code="tlh", name="klingon"), ["en", "hi"]),
    ],
    ids=lambda value: value.code if isinstance(value, NewLanguage) else "",
)
def test_a_row_starts_as_the_mean_of_its_relatives(language: NewLanguage, relatives: list[str]) -> None:
    """Those that are named; else those that are known as such, as far as the model has them; else all."""
    new = extended(TINY, language)
    ids = {"en": 258, "hi": 259}
    expected = torch.stack([new.state[EMBEDDING][ids[code]] for code in relatives]).mean(0)
    assert torch.allclose(new.state[NEW_TOKENS], expected[None], atol=1e-7)


def test_languages_can_be_added_to_what_has_new_ones_and_be_like_them() -> None:
    first = extended(TINY, ODIA)
    assert first.tokenizer.language_id("or") == OR
    second = add_languages(first, [NewLanguage(code="sat", like=("oriya",)), NewLanguage(code="mai")])
    assert second.config.new_tokens == ("<|or|>", "<|sat|>", "<|mai|>")
    assert second.config.vocab_size == VOCABULARY + 3 and second.config.source_vocab_size == VOCABULARY
    assert torch.equal(second.state[NEW_TOKENS][:1], first.state[NEW_TOKENS])
    assert torch.equal(second.state[NEW_TOKENS][1], first.state[NEW_TOKENS][0])
    assert torch.equal(second.state[NEW_TOKENS][2], first.state[EMBEDDING][259])
    listed, source = (json.loads(each)["added_tokens"] for each in (second.tokenizer_json, tokenizer_json()))
    assert listed[: len(source)] == source, "the source's own tokens are what they were, timestamps text"
    assert second.generation["undetected_languages"] == ["mai", "or", "sat"]
    assert second.generation["language_names"] == {"or": "odia", "sat": "santali", "mai": "maithili"}
    assert {code: second.tokenizer.language_id(code) for code in ("or", "sat", "mai")} == {
        "or": OR,
        "sat": OR + 1,
        "mai": OR + 2,
    }


@pytest.mark.parametrize(("languages", "first"), [(99, 51_865), (100, 51_866)])
def test_the_id_follows_the_sources_own_vocabulary(languages: int, first: int) -> None:
    pytest.importorskip("whisper")
    from parity.openai_whisper import hub_backend

    config = ModelConfig(vocab_size=first, d_model=4, encoder_heads=2, decoder_heads=2)
    state = {EMBEDDING: torch.randn(first, 4)}
    backend = hub_backend("multilingual", languages)
    new = add_languages(Loaded(config, state, {}, backend.to_str().encode()), [NewLanguage(code="or")])
    before, after = Tokenizer(backend), new.tokenizer
    assert after.language_id("odia") == after.language_id("Oriya") == first
    assert {key: id for key, id in after.languages.items() if key != "or"} == before.languages == after.detected
    for name in ("sot", "eot", "timestamp_begin", "timestamp_end", "no_timestamps", "is_multilingual"):
        assert getattr(after, name) == getattr(before, name), name
    relatives = torch.stack([state[EMBEDDING][before.languages[code]] for code in ("bn", "as")])
    assert torch.equal(new.state[NEW_TOKENS], relatives.mean(0)[None])
    text = "ଓଡ଼ିଆ <|or|> ok"
    assert after.encode(text) == before.encode(text) and after.decode([first, *after.encode(text)]) == text
    assert after.suppressed() == tuple(sorted({*before.suppressed(), first}))


def test_an_english_only_model_stays_english_only() -> None:
    pytest.importorskip("whisper")
    from parity.openai_whisper import hub_backend

    backend = hub_backend("gpt2")
    config = ModelConfig(vocab_size=51_864, d_model=4, encoder_heads=2, decoder_heads=2)
    with pytest.raises(ValueError, match="an English-only model has no tokens of languages"):
        add_languages(Loaded(config, {EMBEDDING: torch.randn(51_864, 4)}, {}, backend.to_str().encode()), [ODIA])
    backend.add_special_tokens(["<|isl|>"])
    assert not Tokenizer(backend).is_multilingual, "51,865 tokens are not yet a multilingual vocabulary"


def test_rows_of_padding_keep_their_ids_and_get_names() -> None:
    padded = TINY.model_copy(update={"vocab_size": VOCABULARY + 3})
    new = extended(padded, ODIA)
    tokenizer = new.tokenizer
    assert tokenizer.language_id("or") == VOCABULARY + 3 == new.config.source_vocab_size
    assert new.state[EMBEDDING].shape[0] == VOCABULARY + 3
    assert {VOCABULARY, VOCABULARY + 2, VOCABULARY + 3} <= set(tokenizer.suppressed())


@pytest.mark.parametrize(
    ("languages", "said"),
    [
        ([NewLanguage(code="hi")], "has the language 'hi' already"),
        ([ODIA, ODIA], "has the language 'or' already"),
        ([NewLanguage(code="nospeech")], r"the tokenizer has <[|]nospeech[|]> already"),
        ([NewLanguage(code="or", like=("bengali",))], "does not know the language 'bengali'; it knows en, hi"),
        ([NewLanguage(code="or", like=("bengal",))], "unknown language 'bengal': did you mean bengali"),
    ],
)
def test_what_cannot_be_added_is_said(languages: list[NewLanguage], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        extended(TINY, *languages)


def test_a_tokenizer_with_more_names_than_the_embedding_has_rows_is_refused() -> None:
    backend = tokenizers.Tokenizer.from_buffer(tokenizer_json())
    backend.add_special_tokens(["<|mine|>"])
    with pytest.raises(ValueError, match=f"names {VOCABULARY + 1} tokens, the embedding has {VOCABULARY} rows"):
        add_languages(Loaded(TINY, random_state(TINY), GENERATION, backend.to_str().encode()), [ODIA])


# Files.


@pytest.mark.parametrize("quantize", [False, True])
def test_only_small_files_know_of_new_tokens(quantize: bool, tmp_path: Path) -> None:
    """Every file of weights that was there is there byte for byte, and the new rows have one of their own."""
    config = CONFIGS["shared"]
    old = Loaded(config, random_state(config), GENERATION, tokenizer_json())
    save(tmp_path / "old", old, quantize=quantize, shard_bytes=9000)
    save(tmp_path / "new", extended(config), quantize=quantize, shard_bytes=9000)
    before, after = content(tmp_path / "old"), content(tmp_path / "new")
    assert sum(name.startswith("core-") for name in before) > 1
    assert after.keys() - before.keys() == {"tokens.safetensors"}
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "model.safetensors.index.json",
        "MANIFEST.json",
    }
    assert describe(tmp_path / "new")[1]["tokens"] == len(after["tokens.safetensors"]) < 300


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_saved_is_loaded(name: str, tmp_path: Path) -> None:
    new = extended(CONFIGS[name])
    loaded = load_checkpoint(save(tmp_path / "m", new))
    assert loaded.config == new.config and loaded.generation.items() >= new.generation.items()
    assert same(loaded.state, {key: new.state[key] for key in loaded.state}) and loaded.state.keys() == new.state.keys()
    assert weights_of(save(tmp_path / "again", loaded)) == weights_of(tmp_path / "m")
    assert loaded.tokenizer.language_id("konkani") == KOK
    assert loaded.tokenizer.detected.keys() == {"en", "hi"}


def test_a_tokenizer_in_another_order_than_the_rows_is_named(tmp_path: Path) -> None:
    other = extended(TINY, KONKANI, ODIA)
    save(tmp_path / "m", replace(extended(), tokenizer_json=other.tokenizer_json, generation=other.generation))
    with pytest.raises(CheckpointError, match=f"the new token <.or.> has the row {OR}, in the tokenizer the id {KOK}"):
        load_model(tmp_path / "m")


# Generation.

RATE = 16_000
CLIPS = [
    np.random.default_rng(seed).normal(0, 0.1, round(seconds * RATE)).astype(np.float32)
    for seed, seconds in enumerate((0.2, 6.0, 2.5))
]


def speaking(louder: float = 1.0, **generation: Any) -> WhisperMoE:
    """The tiny transcriber with two languages more; with ``louder``, their tokens are likelier than all others together."""
    old = tiny_whisper_moe()
    new = extended(SPEAKING, state=old.model.state_dict())
    new.state[NEW_TOKENS] *= louder
    new = replace(new, generation=new.generation | generation)
    model = built(new.config, new.state)
    if louder != 1.0:
        with torch.no_grad():  # whatever the states are: one of the two rows is then far above zero
            model.get_parameter(NEW_TOKENS)[1] = -model.get_parameter(NEW_TOKENS)[0]
    return WhisperMoE(model, new.tokenizer, new.generation, name="tiny", tokenizer_json=new.tokenizer_json)


def decode(model: WhisperMoE, temperature: float = 0.0, **options: Any) -> list[DecodingResult]:
    return model._decoder.decode(CLIPS, TranscribeOptions(**options), temperature=temperature, margin=0.5)


@pytest.mark.parametrize("louder", [1.0, 1e6], ids=["as they start", "shouting"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beam_size": 3},
        {"temperature": 0.7, "best_of": 3},
        {"timestamps": False},
        {"word_timestamps": True},
        {"initial_prompt": "Pune"},
        {"language": "hi"},
        {"allowed_languages": ("en", "hi")},
        {"suppress_tokens": (OR,)},
    ],
    ids=str,
)
def test_nothing_that_is_said_changes(options: dict[str, Any], louder: float) -> None:
    """Texts, languages and times, and probabilities but for rounding; also where new tokens would drown out all others."""
    plain = options | ({"suppress_tokens": ()} if "suppress_tokens" in options else {})
    before, after = decode(tiny_whisper_moe(), **plain), decode(speaking(louder), **options)
    assert len({take.hypothesis.tokens for take in before}) > 1
    for old, new in zip(before, after, strict=True):
        assert new.no_speech_prob == pytest.approx(old.no_speech_prob, rel=1e-5)
        assert new.hypothesis.sum_logprob == pytest.approx(old.hypothesis.sum_logprob, rel=1e-5)
        assert (new.language, new.hypothesis.tokens, new.experts) == (old.language, old.hypothesis.tokens, old.experts)
        assert [(w.word, w.start, w.end) for w in new.timings or ()] == [
            (w.word, w.start, w.end) for w in old.timings or ()
        ]
        for word, plain in zip(new.timings or (), old.timings or (), strict=True):
            assert word.probability == pytest.approx(plain.probability, rel=1e-5)


def test_a_language_that_was_not_trained_is_detected_only_if_it_is_asked_for() -> None:
    silent, trained = speaking(1e6), speaking(1e6, undetected_languages=["kok"])
    plain = tiny_whisper_moe()._decoder.detect_language(CLIPS[1], TranscribeOptions(), margin=0.5)
    assert silent._decoder.detect_language(CLIPS[1], TranscribeOptions(), margin=0.5) == plain
    asked = silent.detect_language(CLIPS[1], languages=["odia", "konkani", "en"])
    assert asked.keys() == {"or", "kok", "en"} and next(iter(asked)) in ("or", "kok")
    assert silent.transcribe(CLIPS[1], allowed_languages=("or", "kok", "en"), temperatures=(0.0,)).language in (
        "or",
        "kok",
    )
    for found in (trained._decoder.detect_language(clip, TranscribeOptions(), margin=0.5) for clip in CLIPS):
        assert found.keys() == {"en", "hi", "or"}


def test_a_language_is_detected_once_its_row_was_trained(tmp_path: Path) -> None:
    """The file says so, whoever writes it; a row that is what it began as is left out, also after other weights have moved."""
    new = extended(SPEAKING, state=tiny_whisper_moe().model.state_dict())
    rows, others = new.state[NEW_TOKENS], {**new.state, EMBEDDING: new.state[EMBEDDING] + 0.01}
    for quantize in (False, True):
        folder = save(tmp_path / f"as-it-began-{quantize}", replace(new, state=others), quantize=quantize)
        assert load_model(folder).tokenizer.detected.keys() == {"en", "hi"}
    moved = replace(new, state={**new.state, NEW_TOKENS: torch.stack([1e6 * rows[0], rows[1]])})
    one = WhisperMoE.from_pretrained(save(tmp_path / "one", moved), dtype="float32")
    assert one.generation["undetected_languages"] == ["kok"] and one.tokenizer.detected.keys() == {"en", "hi", "or"}
    assert "or" in {take.language for take in decode(one)}
    both = replace(moved, state={**new.state, NEW_TOKENS: 2 * rows}, generation=one.generation)
    said = load_checkpoint(save(tmp_path / "both", both)).generation
    assert not {"undetected_languages", "untrained_rows"} & said.keys()


def test_a_language_whose_beginning_is_not_known_is_left_out(tmp_path: Path) -> None:
    new = extended()
    old = {key: value for key, value in new.generation.items() if key != "untrained_rows"}
    moved = {**new.state, NEW_TOKENS: new.state[NEW_TOKENS] + 1}
    said = load_checkpoint(save(tmp_path / "m", replace(new, state=moved, generation=old))).generation
    assert said.items() >= old.items() and "untrained_rows" not in said


def test_a_new_language_is_spoken_when_it_is_asked_for() -> None:
    model = speaking(1e3)
    takes = {code: decode(model, language=code) for code in ("or", "kok", "en")}
    assert takes["or"] != takes["kok"] and takes["or"][1].hypothesis != takes["en"][1].hypothesis
    for code in ("or", "kok"):
        assert {take.language for take in takes[code]} == {code}
        assert all(max(take.hypothesis.tokens, default=0) < VOCABULARY for take in takes[code])
    result = model.transcribe(CLIPS[1], language="Oriya", temperatures=(0.0,))
    assert result.language == "or"


def test_rows_of_padding_are_never_said() -> None:
    """They have no name and no meaning, whatever numbers somebody left in them."""
    old = tiny_whisper_moe()
    padded = SPEAKING.model_copy(update={"vocab_size": VOCABULARY + 5})
    state = old.model.state_dict()
    state[EMBEDDING] = torch.cat([state[EMBEDDING], 1e3 * torch.randn(5, SPEAKING.d_model)])
    model = WhisperMoE(built(padded, state), old.tokenizer, GENERATION, name="padded")
    assert all(max(take.hypothesis.tokens, default=0) < VOCABULARY for take in decode(model, timestamps=False))


def test_a_model_with_new_tokens_can_be_saved_and_spoken_with_in_both_arithmetics(tmp_path: Path) -> None:
    speaking().save_pretrained(tmp_path / "m", quantize=True)
    for dtype in ("float32", "int8"):
        model = WhisperMoE.from_pretrained(tmp_path / "m", dtype=dtype)
        assert model.transcribe(CLIPS[1], language="odia", temperatures=(0.0,)).language == "or"
        assert isinstance(model.model.decoder.token_embedding, Int8Embedding)
    WhisperMoE.from_pretrained(tmp_path / "m", for_inference=False).save_pretrained(tmp_path / "again", quantize=True)
    before, after = content(tmp_path / "m"), content(tmp_path / "again")
    completed = {"generation_config.json", "MANIFEST.json"}
    assert {name: after[name] for name in after.keys() - completed} == {
        name: before[name] for name in before.keys() - completed
    }


# The way back to other programs.


def test_transformers_loads_the_grown_vocabulary(tmp_path: Path) -> None:
    from transformers import GenerationConfig, WhisperForConditionalGeneration, WhisperTokenizer

    source = load_model(write_folder(tmp_path / "w", hub_model()))
    new = add_languages(source, [ODIA, KONKANI])
    save_whisper(tmp_path / "hub", new)
    theirs = WhisperForConditionalGeneration.from_pretrained(tmp_path / "hub").eval()
    assert theirs.config.vocab_size == VOCABULARY + 2
    assert theirs.get_output_embeddings().weight.shape[0] == VOCABULARY + 2
    tokenizer = WhisperTokenizer.from_pretrained(tmp_path / "hub")
    assert tokenizer.convert_tokens_to_ids(["<|or|>", "<|kok|>"]) == [OR, KOK] and len(tokenizer) == VOCABULARY + 2
    assert tokenizer.decode([OR, 70, 71], skip_special_tokens=True) == tokenizer.decode([70, 71])
    assert GenerationConfig.from_pretrained(tmp_path / "hub").lang_to_id["<|or|>"] == OR
    mel, text = torch.randn(80, 40), torch.tensor([257, OR, 261, KOK])
    with torch.no_grad():
        ours = built(new.config, new.state)([mel], [text]).logits
        expected = theirs(mel[None], decoder_input_ids=text[None]).logits[0]
    assert (ours - expected).abs().max() < 1e-4 * expected.abs().max()
    back = load_model(tmp_path / "hub")
    assert back.config == TINY.model_copy(update={"vocab_size": VOCABULARY + 2})
    assert torch.equal(back.state[EMBEDDING], torch.cat([new.state[EMBEDDING], new.state[NEW_TOKENS]]))
    assert load_model(tmp_path / "hub").tokenizer.language_id("odia") == OR


def test_a_fine_tune_that_brings_its_own_language_is_spoken_with(tmp_path: Path) -> None:
    """As somebody else resized it: one embedding, the token in tokenizer and generation config."""
    grown = TINY.model_copy(update={"vocab_size": VOCABULARY + 1})
    folder = write_folder(tmp_path / "w", hub_model(grown))
    backend = tokenizers.Tokenizer.from_buffer(tokenizer_json())
    backend.add_special_tokens(["<|or|>"])
    (folder / "tokenizer.json").write_text(backend.to_str())
    stale = load_model(folder)
    assert stale.tokenizer.language_id("oriya") == OR, "found by name"
    assert stale.tokenizer.detected.keys() == {"en", "hi", "or"}, "a config that lists none is completed by name"
    said = json.dumps(GENERATION | {"lang_to_id": {"<|en|>": 258, "<|hi|>": 259}})
    (folder / "generation_config.json").write_text(said)
    assert load_model(folder).tokenizer.detected.keys() == {"en", "hi"}, "it lists its languages, and not this one"
    assert OR in load_model(folder).tokenizer.suppressed(())


@pytest.mark.parametrize("quantize", [False, True])
def test_rows_of_languages_and_of_senses_share_a_file_and_are_read_apart(tmp_path: Path, quantize: bool) -> None:
    tiny_whisper_moe(config=SEES).save_pretrained(tmp_path / "sees")
    sees = load_model(tmp_path / "sees", aside=True)
    folder = save(tmp_path / "both", add_languages(sees, [ODIA]), quantize=quantize)
    whole, heard = load_checkpoint(folder), load_checkpoint(folder, aside=False)
    seen = {f"senses.{key}": tensor for key, tensor in load_senses(folder).state_dict().items()}
    assert NEW_TOKENS in heard.state and "senses.tokens.weight" in seen
    assert heard.state.keys() | seen.keys() == whole.state.keys() and not heard.state.keys() & seen.keys()
    assert all(torch.equal(tensor, whole.state[key]) for key, tensor in (heard.state | seen).items())


# Real weights.


@pytest.mark.slow
def test_odia_leaves_whisper_base_as_it_is(whisper_base: Path, shared_data: Path, tmp_path: Path) -> None:
    """The embedded default's core stays byte for byte, and real speech is transcribed the same in both arithmetics."""
    from whisper_moe.config import EMBEDDED

    if not EMBEDDED.is_dir():
        pytest.skip("the default model is not in this checkout")
    save(tmp_path / "m", add_languages(load_model(EMBEDDED, aside=True), [ODIA]), quantize=True)
    before, after = content(EMBEDDED), content(tmp_path / "m")
    weights, shared = {name for name in before if name.endswith(".safetensors")}, "tokens.safetensors"
    assert {name for name in after if name.endswith(".safetensors")} == weights | {shared}
    assert all(after[name] == before[name] for name in weights - {shared})
    rows, more = (safetensors.torch.load(each[shared]) for each in (before, after))
    assert more.keys() == rows.keys() | {NEW_TOKENS}
    assert all(torch.equal(more[key], rows[key]) for key in rows)
    sounds = sorted((shared_data / "english-read" / "audio").iterdir())[:6]
    for dtype in ("float32", "int8"):
        plain, odia = (WhisperMoE.from_pretrained(path, dtype=dtype) for path in (EMBEDDED, tmp_path / "m"))
        assert odia.transcribe(sounds) == plain.transcribe(sounds)
        assert odia.transcribe(sounds[0], language="odia").language == "or"


# Generation settings: kept where a source has them, found by name where it has not.


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json())
    return read_tokenizer(tmp_path, {"is_multilingual": True})[1]


def completed(
    tokenizer: Tokenizer, generation: dict[str, Any] | None, config: ModelConfig = TINY, **options: Any
) -> dict[str, Any]:
    return complete(generation, tokenizer, config, origin="generation_config.json", **options)


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
    ids = ("decoder_start_token_id", "no_timestamps_token_id", "prev_sot_token_id")
    assert [result[name] for name in ids] == [257, 265, 263]


def test_an_english_model_has_no_languages_and_no_tasks(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json())
    result = completed(read_tokenizer(tmp_path, {"is_multilingual": False})[1], {})
    assert not {"lang_to_id", "task_to_id"} & result.keys()
    assert result["is_multilingual"] is False


def test_an_old_fine_tunes_config_stands_in_for_a_missing_file(tokenizer: Tokenizer) -> None:
    legacy = {"suppress_tokens": [], "begin_suppress_tokens": [5, 6], "forced_decoder_ids": None, "eos_token_id": 1}
    result = completed(tokenizer, None, legacy=legacy | {"d_model": 8})
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
        ({"suppress_tokens": [True]}, "suppress_tokens.0: Input should be a valid integer"),
        ({"eos_token_id": -2}, "eos_token_id.0: Input should be greater than or equal to -1"),
        ({"decoder_start_token_id": [257, 10**9]}, "decoder_start_token_id.1: 1000000000 is none of"),
        ({"lang_to_id": {"<|en|>": "258"}}, "lang_to_id.<.en.>: Input should be a valid integer"),
        ({"lang_to_id": {"<|en|>": 259}}, "the generation config gives <[|]en[|]> the id 259, the tokenizer 258"),
        ({"lang_to_id": {"<|tlh|>": 259}}, "not a Whisper tokenizer: it has no token <.tlh.>"),
        ({"task_to_id": {"transcribe": 10**9}}, "task_to_id.transcribe: 1000000000 is none of"),
        ({"untrained_rows": ["or"]}, "untrained_rows: Input should be a valid dictionary"),
        ({"undetected_languages": ["en", "hi"]}, "undetected_languages leaves no language that could be detected"),
    ],
)
def test_ids_that_the_embedding_does_not_have_are_refused(
    stated: dict[str, Any], cause: str, tokenizer: Tokenizer
) -> None:
    with pytest.raises(CheckpointError, match=f"generation_config.json: {cause}"):
        completed(tokenizer, stated)


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
        with pytest.raises(
            CheckpointError,
            match=rf"weights have {rows:,} tokens .as openai/whisper-{names[rows]}., "
            rf"the tokenizer {size:,} .as openai/whisper-{name}.; they belong to different models: "
            "upcycle --base MODEL",
        ):
            completed(tokenizer, {}, config)


@pytest.mark.parametrize(("size", "appended", "rows"), [(51_865, 1, 51_866), (51_864, 2, 51_866), (51_865, 0, 51_968)])
def test_tokens_that_were_appended_and_padding_are_no_other_kind(size: int, appended: int, rows: int) -> None:
    tokenizer = whispers_tokenizer(size, appended)
    assert completed(tokenizer, {}, TINY.model_copy(update={"vocab_size": rows}))["eos_token_id"] == tokenizer.eot


@pytest.mark.parametrize(
    ("stated", "code"),
    [
        ({"language": "hindi"}, "hi"),
        ({"language": "<|hi|>"}, "hi"),
        ({"language": "hi", "task": "transcribe"}, "hi"),
        ({"language": "Hindi", "forced_decoder_ids": [[1, 258]]}, "hi"),
        ({"forced_decoder_ids": [[1, 259], [2, 261]]}, "hi"),
        ({"forced_decoder_ids": [[1, 258], [2, 261]]}, "en"),
        ({"forced_decoder_ids": [[1, None], [2, 261]]}, None),
        ({"language": None}, None),
        ({"language": "klingon"}, None),
        ({"language": "tamil"}, None),
        ({}, None),
        ({"forced_decoder_ids": "none"}, None),
        ({"forced_decoder_ids": [[1], 2, {"1": 259}, [1, [259]]]}, None),
    ],
)
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
    "Hello world, don't stop: 3.5 % — naïve",
    "नमस्ते दुनिया, ओड़िआ ଓଡ଼ିଆ தமிழ் తెలుగు",
    "你好世界。こんにちは",
    "สวัสดี ສະບາຍດີ မင်္ဂလာပါ",
    "مرحبا שלום",
    "🙂👍🏽 x\n\t  y",
    " <|endoftext|> ",
    "",
    "é é ♪ …",
]


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
