"""A hundred texts that are hard to read aloud, with the bundled voices: none crashes, runs away or is silent."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from whisper_moe.generate.speech import Speaker

NOTHING = "", " ", "\n\n\t", "...", "?!", "—", "\u200b\u200d", "\x00", "\ud800", "你好", "مرحبا بالعالم", "«»"
WORDS = "I like green apples. "
HARD = [
    *"aZ7क9é",
    *("I", "ॐ", "ok", "hm", "Shh!", "Zzzz", "brrr", "xyzzy", "pneumonia", "queue", "rhythm", "Mississippi", "क्ष", "ज्ञान"),
    *("0", "1", "007", "10", "101", "1,234", "12,34,567", "1234567890123", "3.14159", "-40", "50%", "1/2", "½", "२०२४", "1e9"),
    *("1st 2nd 3rd 4th", "12/13/2020", "2024-02-29", "25:99", "09:05 pm", "$5M", "₹1,00,000", "€3.50", "5 km", "72°F", "1990s"),
    *("http://x.y/z?q=1&r=2#top", "www.example.com", "me+you@mail.example.org", "C:\\Users\\me", "~/.config", "10.0.0.1"),
    *("😀", "🎉🎉🎉", "I ❤️ you", "👨‍👩‍👧‍👦 family", "( ͡° ͜ʖ ͡°)", "¯\\_(ツ)_/¯", "✓ done", "→ next", "™ © ®"),
    *("<|endoftext|>", "<|hi|><|transcribe|>", "<b>bold</b>", "{{ template }}", "print('hello')", "x = y ** 2", "a&b;c"),
    *("NASA", "U.S.A.", "UNESCO and the UK", "Dr. Smith vs. Mr. Jones", "e.g. this", "iPhone15", "COVID-19", "B2B", "O'Brien's"),
    *("मेरा email test@x.in है", "यह iPhone 15 है।", "hello दुनिया hello", "நன்றி", "ধন্যবাদ friend", "ਧੰਨਵਾਦ", "ధన్యవాదాలు"),
    *("naïve café Zürich", "Ŵ ĝ ş", "ﬁne ﬂow", "\uff26\uff55ll", "Привет and hello", "hello 世界"),
    *("a\u0301\u0302\u0303\u0304", "h\u200be\u200bllo"),
    *("\x00a\ud800b", "\ufeffहैलो", "a\r\nb\tc", "tab\tand\x0bmore", "\u202eright to left"),
    *("a" * 300, "A" * 300, "क" * 300, "a " * 300, "one,,,,two", "wait..... what"),
    *("no stop at all " * 30, "Stop. " * 60, "!" * 200 + "now", "\n".join("line" for _ in range(40))),
    *(WORDS * 240, "जल जीवन है। " * 40, "9" * 400, "x" * 1_000),
]  # fmt: skip


@pytest.fixture(scope="module")
def bundled() -> Speaker:
    return Speaker.from_pretrained(Path(__file__).parents[2] / "checkpoints")


def test_they_are_many() -> None:
    assert len(HARD) + len(NOTHING) >= 100 and max(map(len, HARD)) >= 5_000


@pytest.mark.slow
@pytest.mark.parametrize("text", HARD, ids=range(len(HARD)))
def test_it_is_heard_and_comes_to_an_end(bundled: Speaker, text: str) -> None:
    speech = bundled.speak(text)
    begins = [round(16_000 * start) for *_, start in speech.sentences]
    assert np.isfinite(speech.samples).all() and np.abs(speech.samples).max() <= 1
    for (said, phonemes, _), begin, end in zip(speech.sentences, begins, [*begins[1:], None], strict=True):
        part = speech.samples[begin:end]
        assert part.std() > 3e-3, (said, "silence")
        assert len(part) / 16_000 < 1.0 + 0.2 * len(phonemes), (said, "runs away")


@pytest.mark.parametrize("text", NOTHING, ids=range(len(NOTHING)))
def test_what_has_nothing_to_say_is_refused(bundled: Speaker, text: str) -> None:
    with pytest.raises(ValueError, match="nothing in it can be read aloud"):
        bundled.speak(text)
