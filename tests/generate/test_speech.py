"""Texts to sound: cut at sentences, packed, joined; whatever is given is said or refused by name, never crashed on or silent."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from model.speaking import tiny_speech

from whisper_moe.generate.speech import LONGEST, PARAGRAPH, PAUSE, Speaker, sentences_of
from whisper_moe.media.audio import load_audio


@pytest.fixture(scope="module")
def speaker() -> Speaker:
    """Says nonsense: its reader is taught nothing, but finds some phoneme for every letter."""
    model = tiny_speech()
    with torch.no_grad():
        model.reader.out.bias[:: 1 + len(model.config.phonemes)] = -20.0
        model.plan.bias[0] = -2.5
    return Speaker(model)


def test_a_text_is_cut_at_sentences_and_long_ones_between_words() -> None:
    assert sentences_of("Dr. Who came. He said “no.” Why?\n\nNew, here", "en") == [
        ("doctor Who came.", PAUSE),
        ("He said “no.”", PAUSE),
        ("Why?", PARAGRAPH),
        ("New, here", PARAGRAPH),
    ]
    listed = sentences_of("Buy:\n1. milk\n- two eggs. J. K. Rowling came.", "en")
    assert [said for said, _ in listed] == ["Buy:", "one.", "milk", "- two eggs.", "J. K. Rowling came."]
    pieces = [piece for piece, _ in sentences_of("word " * 200 + "x" * 500, "en")]
    assert max(map(len, pieces)) <= LONGEST and "".join(pieces).replace(" ", "") == "word" * 200 + "x" * 500


def test_a_sentence_sounds_as_it_would_alone(speaker: Speaker) -> None:
    whole = speaker.speak("Good morning. A rather longer sentence, for one. Why?", voice="bob")
    begins = [round(start * 16_000) for *_, start in whole.sentences]
    for (text, phonemes, _), begin in zip(whole.sentences, begins, strict=True):
        alone = speaker.speak(text, voice="bob")
        assert alone.sentences[0][1] == phonemes
        np.testing.assert_allclose(whole.samples[begin : begin + len(alone.samples)], alone.samples, atol=1e-5)


HARD = [
    "a",
    "7",
    "I",
    "?!a",
    "http://x.y/z?q=1&r=2",
    "😀🎉",
    "word " * 1000,
    "मेरा email test@x.in है",
    "<|endoftext|><|hi|>",
    "நன்றி",
    "\x00a\ud800",
    "A" * 300,
    "1234567890123456789012345",
    "12/13/2020 25:99 $,.5 %",
    "\ufeffहैलो",
    "a\r\nb\tc",
    "½ ① ²",
]


@pytest.mark.parametrize("text", HARD, ids=range(len(HARD)))
def test_hard_texts_are_said(speaker: Speaker, text: str) -> None:
    speech = speaker.speak(text)
    assert speech.duration > 0.05 and np.abs(speech.samples).max() > 0 and np.isfinite(speech.samples).all()


@pytest.mark.parametrize("text", ["", "  \n\t", "...", "‌", "你好", "مرحبا"])
def test_what_cannot_be_read_is_refused(speaker: Speaker, text: str) -> None:
    with pytest.raises(ValueError, match="nothing in it can be read aloud"):
        speaker.speak(text)


def test_a_text_of_which_only_spaces_are_known_is_refused(speaker: Speaker, monkeypatch: pytest.MonkeyPatch) -> None:
    space = speaker.config.phonemes.index(" ")
    monkeypatch.setattr(speaker, "phonemes", lambda texts, language: [[0, space, 0] for _ in texts])
    with pytest.raises(ValueError, match="nothing in it can be read aloud"):
        speaker.speak("a text")


def test_voice_language_and_rate(speaker: Speaker) -> None:
    assert speaker.speak("hello").voice == "ann" and speaker.speak("नमस्ते").voice == "uma"
    assert speaker.speak("10:30 बजे").voice == "uma" and speaker.speak("10:30").voice == "ann"
    assert speaker.speak("नमस्ते", voice="bob").language == "en"
    slow, fast = (speaker.speak("a longer text than this", rate=rate).duration for rate in (0.5, 2.0))
    assert slow > 3 * fast
    for wrong, said in (
        ({"voice": "eve"}, "no voice is called 'eve'; there are ann"),
        ({"language": "ta"}, "'ta' cannot be spoken; there are en, hi"),
        ({"rate": 3.0}, "rate must be 0.5 to 2"),
        ({"text": "word " * 200_000}, "has 1,000,000 characters; at most 250,000"),
    ):
        with pytest.raises(ValueError, match=said):
            speaker.speak(**{"text": "hello"} | wrong)


@pytest.mark.parametrize("kind", [".m4a", ".wav", ".mp3", ".flac", ".ogg", ".OPUS"])
def test_it_is_written_as_every_kind_of_file(speaker: Speaker, tmp_path: Path, kind: str) -> None:
    speech = speaker.speak("good morning to you")
    speech.save(path := tmp_path / f"said{kind}")
    found = load_audio(path)
    assert len(found) == pytest.approx(len(speech.samples), abs=2_000) and np.abs(found).max() > 0
    with pytest.raises(ValueError, match=r"not as '\.txt'"):
        speech.save(tmp_path / "said.txt")
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
