"""Examples: prompt, text and labels line up; the spectrogram is the clip's own; faults name their sample."""

from __future__ import annotations

import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from data.memory import MODEL, clip, damaged, tiny_reader
from generate.tiny import tiny_tokenizer
from weights.whispers import GENERATION, VOCABULARY, tokenizer_json

from whisper_moe.config import MAX_PACK_TOKENS, ModelConfig
from whisper_moe.data.examples import (
    IGNORED,
    Example,
    ExampleConfig,
    ExampleReader,
    TooLong,
    drawn_margin,
    pack_examples,
    positions,
)
from whisper_moe.data.sample import AudioRef, DataError, Sample
from whisper_moe.media.audio import MediaError
from whisper_moe.media.languages import NewLanguage
from whisper_moe.media.mel import log_mel
from whisper_moe.packing import Layout
from whisper_moe.weights.checkpoint import Loaded
from whisper_moe.weights.parts import EMBEDDING
from whisper_moe.weights.upcycle import add_languages

TOKENIZER = tiny_tokenizer()


def mel_of(sample: Sample, margin: float) -> torch.Tensor:
    assert sample.audio is not None
    sound = torch.from_numpy(sample.audio.read())
    return log_mel(sound, samples=320 * positions(len(sound), margin, 1_500))


def test_labels_are_the_next_tokens_after_the_prompt() -> None:
    example = tiny_reader().read(clip("a", 1.0, "Good morning", language="hi"), 2.5)
    prompt = [*TOKENIZER.sot_sequence("hi", "transcribe"), TOKENIZER.no_timestamps]
    text = TOKENIZER.encode(" Good morning")
    assert list(example.tokens) == [*prompt, *text]
    assert list(example.labels) == [IGNORED] * 3 + [*text, TOKENIZER.eot]
    translated = tiny_reader().read(clip("a", 1.0, "Good morning", language="hi", task="translate"), 2.5)
    assert list(translated.tokens[:3]) == TOKENIZER.sot_sequence("hi", "translate")


def test_a_model_with_a_new_language_learns_to_tell_all_languages() -> None:
    tiny = {EMBEDDING: torch.zeros(VOCABULARY, MODEL.d_model)}
    config = MODEL.model_copy(update={"vocab_size": VOCABULARY})
    new = add_languages(Loaded(config, tiny, GENERATION, tokenizer_json()), [NewLanguage(code="or")])
    tokenizer = new.tokenizer
    reader = ExampleReader(tokenizer, new.config, ExampleConfig())
    for code in ("or", "hi"):
        for text, prompted in (("Good", 3), ("<|0.00|> Good<|0.40|>", 2)):
            example = reader.read(clip("a", 0.1, text, language=code), 0.1)
            assert example.labels[:prompted] == (tokenizer.languages[code], *[IGNORED] * (prompted - 1))
            assert example.labels[prompted:] == (*example.tokens[prompted + 1 :], tokenizer.eot)


def test_timestamps_in_the_text_become_tokens() -> None:
    example = tiny_reader().read(clip("a", 1.0, "<|0.00|> One.<|0.48|><|0.50|> Two.<|1.00|>"), 2.5)
    begin = TOKENIZER.timestamp_begin
    said = [begin, *TOKENIZER.encode(" One."), begin + 24, begin + 25, *TOKENIZER.encode(" Two."), begin + 50]
    assert list(example.tokens) == [*TOKENIZER.sot_sequence("en"), *said]
    assert list(example.labels) == [IGNORED, IGNORED, *said, TOKENIZER.eot]


NONE = {
    **dict.fromkeys(
        ("<|0.01|> a", "<|0.00|> a<|31.00|>", "<|2.00|> a<|1.00|>", "a<|1.00|>", "", "  ", "nul\0", "\ud800"), ""
    ),
    "say <|endoftext|> and <|en|>": "<|endoftext|>",
    "<|nospeech|>": "<|nospeech|>",
    "<|0.0|> Good<|1|>": "<|0.0|>",
    "<|0.00|> Good<|1.000|>": "<|1.000|>",
    "<|0.00|> Good<|1.00": "<|1.00",
    "Good 1.00|> morning": "1.00|>",
    "<|१.२४|> नमस्ते<|१.५४|>": "<|१.२४|>",
}
"""Texts that are none, and the markup in them, which would be learned as letters."""


@pytest.mark.parametrize("text", NONE)
def test_a_text_that_is_none_names_its_sample(text: str) -> None:
    with pytest.raises(DataError) as caught:
        tiny_reader().tokens(clip("clip-7", 0.1, text))
    assert str(caught.value).startswith("clip-7, column 'text': " + (f"{NONE[text]!r} is markup" if NONE[text] else ""))


def test_signs_that_are_no_markup_are_words() -> None:
    _, text = tiny_reader().tokens(clip("a", 0.1, "a < b | c > d, <b>"))
    assert TOKENIZER.decode(text) == " a < b | c > d, <b>"


def test_texts_are_in_nfc_and_begin_with_a_space_where_words_have_spaces() -> None:
    letters = "क़ é"  # decomposed on purpose below; NFC keeps the first apart and joins the second
    decomposed = unicodedata.normalize("NFD", letters)
    assert decomposed != unicodedata.normalize("NFC", letters)
    _, text = tiny_reader().tokens(clip("a", 0.1, f"  {decomposed} ", language="hi"))
    assert TOKENIZER.decode(text) == " " + unicodedata.normalize("NFC", letters)
    _, bare = tiny_reader(leading_space=False).tokens(clip("a", 0.1, letters, language="hi"))
    assert TOKENIZER.decode(bare) == unicodedata.normalize("NFC", letters)


def test_silence_has_no_text_only_where_that_is_meant() -> None:
    example = tiny_reader(empty_text=True).read(clip("a", 0.1, ""), 0.5)
    assert example.labels[-1] == TOKENIZER.eot and set(example.labels[:-1]) == {IGNORED}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        *((text, False) for text in ("...", "…", "-", "?!", "।", "♪♪", "«»", "<|0.00|> ... <|1.20|>")),
        *((text, True) for text in ("a.", "५", "5%", "ฉ", "นี่", "हिन्दी", "ଓ", "ᱚ", "你", "<|0.00|> x <|1.20|>")),
    ],
)
def test_a_text_without_a_letter_or_a_digit_is_none(text: str, said: bool) -> None:
    sample = clip("a", 0.5, text=text)
    if said:
        assert tiny_reader(margin=0).tokens(sample)[1]
        return
    with pytest.raises(DataError, match="a, column 'text': it has no text"):
        tiny_reader(margin=0).tokens(sample)
    assert tiny_reader(margin=0, empty_text=True).tokens(sample)[1] == []


@pytest.mark.parametrize("margin", [0.0, 0.013, 0.5, 2.5, 30.0])
@pytest.mark.parametrize("seconds", [0.001, 0.5, 1.2345, 29.9])
def test_the_spectrogram_is_that_of_the_clip_with_its_margin(seconds: float, margin: float) -> None:
    sample = clip("a", seconds)
    example = tiny_reader(margin=margin).read(sample, margin)
    assert torch.equal(example.mel, mel_of(sample, margin))
    assert example.mel.shape[1] // 2 == min(1_500, -(-round((seconds + margin) * 16_000) // 320))
    assert example.valid_length == -(-round(seconds * 16_000) // 320)
    assert example.size == example.mel.shape[1] // 2 + len(example.tokens)
    if margin == 30:
        assert example.mel.shape == (80, 3_000)


@pytest.mark.parametrize("seconds", [0.001, 0.7, 29.97])
def test_a_margin_from_a_range_is_silence_of_that_length(seconds: float) -> None:
    sample, reader = clip("a", seconds), tiny_reader(margin=(0, 30))
    for margin in (0.0, 0.004, 0.0161, 0.039, 0.041, 0.3, 1.7, 4.0, 30.0):
        example = reader.read(sample, margin)
        assert torch.equal(example.mel, mel_of(sample, margin))


def test_margins_are_spread_over_the_range_and_fixed_for_seed_epoch_and_id() -> None:
    reader = tiny_reader(margin=(1, 27))
    drawn = [reader.margin_of(f"id{i}", 0, 0) for i in range(2_000)]
    assert 1 <= min(drawn) < 1.05 and 26 < max(drawn) <= 27
    for low, high in ((1, 3), (3, 9), (9, 27)):  # small ones more often: as many within each tripling
        assert abs(sum(low <= margin < high for margin in drawn) / len(drawn) - 1 / 3) < 0.05
    assert reader.margin_of("id0", 0, 0) == drawn[0]
    assert len({drawn[0], reader.margin_of("id0", 1, 0), reader.margin_of("id0", 0, 1)}) == 3
    assert tiny_reader(margin=2).margin_of("id0", 5, 7) == 2


@pytest.mark.parametrize(("own", "least"), [(None, 2.5), (0.5, 0.5), (0.0, 0.0), (30.0, 30.0)])
def test_margins_are_from_the_models_own_to_the_full_window_by_default(own: float | None, least: float) -> None:
    assert tiny_reader(MODEL.model_copy(update={"context_margin": own})).margins == (least, 30)


@pytest.mark.parametrize("margins", [(0.0, 0.0), (0.0, 4.0), (0.05, 0.1), (2.5, 30.0)])
def test_a_range_may_begin_at_nothing(margins: tuple[float, float]) -> None:
    drawn = [drawn_margin(margins, share / 100) for share in range(101)]
    assert drawn == sorted(drawn) and drawn[0] == margins[0] and drawn[-1] == pytest.approx(margins[1])


@pytest.mark.parametrize("margin", [-0.1, 31, (3, 1), (0, 40), float("nan"), "long"])
def test_a_margin_that_cannot_be_is_refused(margin: object) -> None:
    with pytest.raises(ValueError, match="margin"):
        ExampleConfig.model_validate({"margin": margin})


def test_what_is_too_long_is_named_and_says_how_long() -> None:
    with pytest.raises(TooLong, match=r"^long: its sound has 30\.01 s; the window has 30$"):
        tiny_reader().read(clip("long", 30.01), 0)
    assert tiny_reader().read(clip("fits", 30.0), 0).mel.shape[1] == 3_000
    with pytest.raises(TooLong, match=r"^wordy: its text has 449 tokens; the decoder has 448 positions$"):
        tiny_reader().tokens(clip("wordy", 0.1, "x" * 444))
    assert len(tiny_reader().tokens(clip("fits", 0.1, "x" * 443))[1]) == 444


def test_a_sound_that_cannot_be_read_names_its_file(tmp_path: Path) -> None:
    reader = tiny_reader()
    with pytest.raises(MediaError, match=r"broken\.wav"):
        reader.read(damaged(clip("a", 1.0)), 0)
    with pytest.raises(MediaError, match=r"missing\.wav"):
        reader.read(replace(clip("a", 1.0), audio=AudioRef(path=str(tmp_path / "missing.wav"))), 0)
    with pytest.raises(MediaError, match=r"a\.wav: it holds no sound"):
        reader.read(clip("a", 0.0), 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "translate-text", "audio": None, "source_text": "x"}, "task 'translate-text' needs an input"),
        ({"task": "sign", "audio": None, "video": "a.mov", "language": "ins"}, "task 'sign' needs an input"),
        ({"language": "or", "target_language": "or"}, "'or'"),
        ({"target_language": "hi"}, "gives 'en', not 'hi'"),
    ],
)
def test_what_this_model_cannot_learn_is_no_fault_of_a_sample(change: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        tiny_reader().tokens(replace(clip("a", 0.1), **change))  # pyright: ignore[reportArgumentType]
    assert not isinstance(raised.value, DataError | TooLong)


def test_a_model_whose_longest_example_fills_more_than_a_pack_is_refused() -> None:
    with pytest.raises(ValueError, match="do not fit a pack"):
        ExampleReader(TOKENIZER, ModelConfig(max_target_positions=600), ExampleConfig())


def made(key: str, size: int) -> Example:
    tokens = tuple(range(size % 7 + 1))
    return Example(
        id=key,
        mel=torch.full((80, 2 * (size - len(tokens))), float(size)),
        valid_length=1,
        tokens=tokens,
        labels=tuple(token + 1 for token in tokens),
    )


def test_a_pack_holds_its_segments_one_after_another() -> None:
    examples = [made("a", 100), made("b", 900), made("c", 1_048)]
    (pack,) = pack_examples(examples)
    assert pack.ids == ("a", "b", "c")
    assert pack.encoder_tokens + pack.decoder_tokens == MAX_PACK_TOKENS
    assert repr(pack.texts) == repr(Layout(len(example.tokens) for example in examples))
    for example, rows, mel in zip(examples, pack.texts.slices(), pack.mels, strict=True):
        assert pack.tokens_T[rows].tolist() == list(example.tokens)
        assert pack.labels_T[rows].tolist() == list(example.labels)
        assert mel is example.mel
    assert pack.to("cpu", torch.float64).mels[1].dtype == torch.float64
