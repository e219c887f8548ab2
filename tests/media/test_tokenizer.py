from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from whisper_moe.media.languages import LANGUAGE_CODES, LANGUAGES
from whisper_moe.media.tokenizer import Tokenizer, read_backend

pytest.importorskip("whisper")
pytest.importorskip("transformers")
from parity.openai_whisper import hub_backend
from whisper.tokenizer import LANGUAGES as OPENAI_LANGUAGES
from whisper.tokenizer import TO_LANGUAGE_CODE, get_tokenizer

MULTILINGUAL = Tokenizer(hub_backend())
ENGLISH = Tokenizer(hub_backend("gpt2"), {"is_multilingual": False})
CONTROL = ["<|endoftext|>", "<|startoftranscript|>", "<|hi|>", "<|translate|>", "<|nospeech|>", "<|0.00|>", "<|29.98|>"]

# Characters that Unicode had assigned before the oldest table in play: there the regular expressions agree.
characters = st.characters(exclude_categories=("Cs", "Cn", "Co"), exclude_characters="\0")
texts = st.lists(st.one_of(st.text(characters, max_size=20), st.sampled_from(CONTROL)), max_size=6).map("".join)
SPOKEN = """
Hello world don't stop 3.5 % — naïve नमस्ते दुनिया 你好世界 こんにちは สวัสดี ສະບາຍດີ မင်္ဂလာပါ مرحبا שלום 🙂👍🏽 (x) -- … é ♪
"""
words = st.lists(st.sampled_from([*SPOKEN.split(), "e\u0301", "\u200d", ""]), max_size=12).map(" ".join)


@pytest.mark.parametrize("tokenizer", [MULTILINGUAL, ENGLISH], ids=["multilingual", "english"])
@pytest.mark.parametrize("name", CONTROL)
def test_a_control_token_in_text_is_text(tokenizer: Tokenizer, name: str) -> None:
    text = f"say {name}{name} twice"
    ids = tokenizer.encode(text)
    assert max(ids) < tokenizer.eot
    assert tokenizer.decode(ids) == text


@settings(deadline=None, max_examples=200)
@given(texts)
def test_encoding_equals_openai_and_decodes_to_the_same_text(text: str) -> None:
    for tokenizer, multilingual in ((MULTILINGUAL, True), (ENGLISH, False)):
        ids = tokenizer.encode(text)
        assert ids == get_tokenizer(multilingual).encode(text, disallowed_special=())
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    ("text", "cause"), [("a\0b", "U[+]0000 at position 1"), ("ab\ud800", "U[+]D800 at position 2")]
)
def test_what_is_no_text_is_refused(text: str, cause: str) -> None:
    with pytest.raises(ValueError, match=cause):
        MULTILINGUAL.encode(text)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.one_of(st.integers(0, 255), st.integers(0, 50_256), st.integers(50_257, 51_864)), max_size=30))
@example([172, 238, 50_400, 235, 230])  # the four bytes of one character, with a timestamp between them
def test_decoding_equals_transformers(hub_tokenizer, ids: list[int]) -> None:
    assume(MULTILINGUAL.sot_prev not in ids[:1])  # transformers then drops the prompt, which only the caller can know
    assert MULTILINGUAL.decode(ids) == hub_tokenizer.decode(ids, skip_special_tokens=True)


@pytest.fixture(scope="module")
def hub_tokenizer(tmp_path_factory: pytest.TempPathFactory):
    from transformers import WhisperTokenizer

    folder = tmp_path_factory.mktemp("hub")
    hub_backend().save(str(folder / "tokenizer.json"))
    return WhisperTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("languages", [99, 100])
@pytest.mark.parametrize("no_speech", ["<|nospeech|>", "<|nocaptions|>"])
def test_ids_are_found_by_name(languages: int, no_speech: str) -> None:
    ours = Tokenizer(hub_backend("multilingual", languages, no_speech))
    theirs = get_tokenizer(True, num_languages=languages)
    for name in ("sot", "eot", "transcribe", "translate", "sot_lm", "sot_prev", "no_speech", "no_timestamps"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert (ours.timestamp_begin, ours.timestamp_end) == (theirs.timestamp_begin, theirs.timestamp_begin + 1500)
    assert ours.languages == dict(zip(theirs.all_language_codes, theirs.all_language_tokens, strict=True))
    assert ("yue" in ours.languages) == (languages == 100)


def test_an_english_model_has_neither_languages_nor_tasks() -> None:
    guessed = Tokenizer(hub_backend("gpt2"))
    for tokenizer in (ENGLISH, guessed):
        assert not tokenizer.is_multilingual
        assert not tokenizer.languages and not tokenizer.tasks
        assert tokenizer.sot_sequence("English") == list(get_tokenizer(False).sot_sequence)
    for language, task in (("hi", "transcribe"), ("en", "translate")):
        with pytest.raises(ValueError, match="only transcribes English"):
            ENGLISH.sot_sequence(language, task)


@pytest.mark.parametrize("task", ["transcribe", "translate"])
def test_opening_tokens_equal_openai(task: str) -> None:
    for code, name in OPENAI_LANGUAGES.items():
        if code in MULTILINGUAL.languages:
            opening = get_tokenizer(True, language=code, task=task).sot_sequence
            assert MULTILINGUAL.sot_sequence(code, task) == MULTILINGUAL.sot_sequence(name.title(), task) == [*opening]


def test_opening_tokens_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="does not know the language 'Cantonese'"):
        MULTILINGUAL.sot_sequence("Cantonese")
    with pytest.raises(ValueError, match="unknown task 'sing'"):
        MULTILINGUAL.sot_sequence("en", "sing")
    with pytest.raises(ValueError, match="needs the language"):
        MULTILINGUAL.sot_sequence(None)


def test_language_tables_equal_openai() -> None:
    assert LANGUAGES == OPENAI_LANGUAGES
    assert LANGUAGE_CODES == TO_LANGUAGE_CODE


def test_a_language_that_a_model_adds_is_known() -> None:
    backend = hub_backend()
    backend.add_special_tokens(["<|or|>"])
    tokenizer = Tokenizer(backend, {"lang_to_id": {"<|or|>": 51_865}})
    assert tokenizer.sot_sequence("or") == [tokenizer.sot, 51_865, tokenizer.transcribe]
    assert not tokenizer.is_timestamp(51_865)
    assert tokenizer.decode([51_865, *tokenizer.encode("x")]) == "x"
    with pytest.raises(ValueError, match=r"gives <[|]or[|]> the id 7"):
        Tokenizer(backend, {"lang_to_id": {"<|or|>": 7}})


@pytest.mark.parametrize(("tokenizer", "multilingual"), [(MULTILINGUAL, True), (ENGLISH, False)])
def test_non_speech_tokens_equal_openai(tokenizer: Tokenizer, multilingual: bool) -> None:
    assert tokenizer.non_speech_tokens == get_tokenizer(multilingual).non_speech_tokens


def test_suppressed_tokens_equal_the_generation_config(whisper_base: Path) -> None:
    config = json.loads((whisper_base / "generation_config.json").read_text())
    tokenizer = Tokenizer.from_file(whisper_base / "tokenizer.json", config)
    assert list(tokenizer.suppressed()) == config["suppress_tokens"]
    assert tokenizer.suppressed([5]) == tuple(sorted({5, *tokenizer.suppressed()} - {*tokenizer.non_speech_tokens}))


def test_timestamps_are_the_closed_range_of_thirty_seconds() -> None:
    begin, end = MULTILINGUAL.timestamp_begin, MULTILINGUAL.timestamp_end
    assert [MULTILINGUAL.is_timestamp(id) for id in (begin - 1, begin, end, end + 1)] == [False, True, True, False]
    assert MULTILINGUAL.seconds(begin) == 0 and MULTILINGUAL.seconds(end) == 30
    assert MULTILINGUAL.text_ids([begin, 40, MULTILINGUAL.eot, 41, end]) == [40, 41]


@settings(deadline=None, max_examples=150)
@given(words, st.sampled_from(["en", "hi", "zh", "ja", "th", "lo", "my", "yue"]))
def test_words_equal_openai(text: str, language: str) -> None:
    theirs = get_tokenizer(True, num_languages=100, language=language)
    ids = [*MULTILINGUAL.encode(text), MULTILINGUAL.eot]
    assert MULTILINGUAL.split_to_words(ids, language) == theirs.split_to_word_tokens(ids)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.one_of(st.integers(0, 300), st.integers(0, 51_864)), max_size=15), st.sampled_from(["en", "ja"]))
@example([172, 238, 32, 33], "en")  # two of the four bytes of a character, then letters
@example([40, 172, 238], "ja")
def test_no_token_is_lost_between_words(ids: list[int], language: str) -> None:
    """Also where tokens are no UTF-8, which the reference drops or fails on."""
    texts, groups = MULTILINGUAL.split_to_words(ids, language)
    assert [id for group in groups for id in group] == ids
    assert len(texts) == len(groups) and all(groups)
    try:
        expected = get_tokenizer(True, language=language).split_to_word_tokens(ids)
    except IndexError:
        return
    if sum(map(len, expected[1])) == len(ids):
        assert (texts, groups) == expected


def test_a_tokenizer_without_control_tokens_is_refused() -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    with pytest.raises(ValueError, match=r"not a Whisper tokenizer: it has no token <[|]endoftext[|]>"):
        Tokenizer(Backend(models.BPE()))


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff\x00"])
def test_a_broken_file_is_named(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "tokenizer.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        Tokenizer.from_file(file)


def test_older_files_give_the_same_tokenizer(whisper_base: Path, tmp_path: Path) -> None:
    for name in ("vocab.json", "merges.txt", "added_tokens.json"):
        shutil.copyfile(whisper_base / name, tmp_path / name)
    older, newer = read_backend(tmp_path), read_backend(whisper_base)
    assert older.get_vocab() == newer.get_vocab()
    special = {id for id, token in newer.get_added_tokens_decoder().items() if token.special}
    assert {id for id, token in older.get_added_tokens_decoder().items() if token.special} == special
    text = "Don't  नमस्ते 123 <|ok|>"
    assert Tokenizer(older).encode(text) == Tokenizer(newer).encode(text)


def without_timestamps(folder: Path) -> dict:
    content = json.loads(hub_backend().to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["special"]]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return content


def test_missing_timestamps_are_added_where_they_belong(tmp_path: Path) -> None:
    without_timestamps(tmp_path)
    assert read_backend(tmp_path).get_vocab() == hub_backend().get_vocab()


def test_timestamps_are_not_added_behind_somebody_elses_tokens(tmp_path: Path) -> None:
    content = without_timestamps(tmp_path)
    content["added_tokens"].append({**content["added_tokens"][0], "id": 50_364, "content": "<|mine|>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="is not the last token"):
        read_backend(tmp_path)
