from __future__ import annotations

import io
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whisper_moe.generate.options import SubtitleOptions
from whisper_moe.generate.result import Segment, Transcription, Word, as_text, compression_ratio

OPENAI_KEYS = "id seek start end text tokens temperature avg_logprob compression_ratio no_speech_prob words".split()

adversarial = st.one_of(
    st.text(st.characters(exclude_categories=("Cs",)), max_size=40),
    st.sampled_from(
        ["", " ", "-->", " a --> b", "\n", " x\ny", "\ttab\t", " مرحبا بالعالم", " שלום", " नमस्ते", "<u>", "\r\n"]
    ),
    st.text("ab ", min_size=150, max_size=300),
)
seconds = st.one_of(st.floats(0, 30), st.floats(3590, 3610), st.floats(0, 1e6), st.integers(0, 400_000).map(float))
options = st.builds(
    SubtitleOptions,
    highlight_words=st.booleans(),
    max_line_width=st.none() | st.integers(1, 50),
    max_line_count=st.none() | st.integers(1, 4),
    max_words_per_line=st.none() | st.integers(1, 6),
)


@st.composite
def timed_words(draw: st.DrawFn) -> tuple[Word, ...]:
    """Words as speech has them: mostly in order, some pauses, some of no length, some with adversarial text."""
    now = draw(seconds)
    words = []
    for _ in range(draw(st.integers(0, 8))):
        start = now + draw(st.sampled_from([0.0, 0.0, 0.1, 2.9, 3.1, 40.0]))
        now = start + draw(st.sampled_from([0.0, 0.02, 0.34, 1.0]))
        text = draw(st.one_of(st.sampled_from([" so", " it", " goes", " extraordinarily", "n't", ","]), adversarial))
        words.append(Word(round(start, 2), round(now, 2), text, draw(st.floats(0, 1))))
    return tuple(words)


def segments(words: st.SearchStrategy) -> st.SearchStrategy[Segment]:
    return st.builds(
        Segment,
        id=st.integers(0, 99),
        seek=st.integers(0, 10**6),
        start=seconds,
        end=seconds,
        text=adversarial,
        tokens=st.lists(st.integers(0, 51_864), max_size=4).map(tuple),
        temperature=st.sampled_from([0.0, 0.2, 1.0]),
        avg_logprob=st.floats(-9, 0),
        compression_ratio=st.floats(0, 9),
        no_speech_prob=st.floats(0, 1),
        experts=st.sampled_from([(), (("hindi", 0.75), ("none", 0.25))]),
        words=words,
        language=st.sampled_from([None, "hi"]),
    )


def transcriptions(words: st.SearchStrategy) -> st.SearchStrategy[Transcription]:
    return st.builds(
        Transcription,
        text=adversarial,
        segments=st.lists(segments(words), max_size=5).map(tuple),
        language=st.sampled_from(["en", "ar"]),
        duration=seconds,
    )


def openai_result(result: Transcription) -> dict[str, Any]:
    """What openai/whisper's ``transcribe`` would have returned, built from the fields and not from ``to_dict``."""
    listed = []
    for segment in result.segments:
        entry = {key: getattr(segment, key) for key in OPENAI_KEYS} | {"tokens": list(segment.tokens)}
        words = entry.pop("words")
        if words is not None:
            entry["words"] = [{key: getattr(w, key) for key in ("word", "start", "end", "probability")} for w in words]
        listed.append(entry)
    return {"text": result.text, "segments": listed, "language": result.language}


DEFAULT = SubtitleOptions()


def openai_text(result: Transcription, format: str, options: SubtitleOptions = DEFAULT) -> str:
    utils = pytest.importorskip("whisper.utils")
    stream = io.StringIO()
    writer = utils.get_writer(format, ".")
    arguments = {name: getattr(options, name) for name in vars(DEFAULT)}
    writer.write_result(openai_result(result), stream, **arguments)
    return stream.getvalue()


def segment(text: str = " Hello.", start: float = 0.0, end: float = 1.0, **values: Any) -> Segment:
    measured = {"temperature": 0.0, "avg_logprob": -0.1, "compression_ratio": 1.0, "no_speech_prob": 0.0}
    return Segment(id=0, seek=0, start=start, end=end, text=text, tokens=(), **(measured | values))


def transcription(*segments: Segment) -> Transcription:
    return Transcription(text="", segments=segments, language="en", duration=1.0)


@pytest.mark.parametrize("format", ["txt", "vtt", "srt", "tsv"])
@settings(deadline=None, max_examples=40)
@given(result=transcriptions(st.none()))
def test_files_equal_openai(format: str, result: Transcription) -> None:
    assert as_text(result, format, DEFAULT) == openai_text(result, format)


@pytest.mark.parametrize("format", ["vtt", "srt"])
@settings(deadline=None, max_examples=100)
@given(result=transcriptions(timed_words()), options=options)
def test_subtitles_of_words_equal_openai(format: str, result: Transcription, options: SubtitleOptions) -> None:
    assert as_text(result, format, options) == openai_text(result, format, options)


def long_talk() -> Transcription:
    """1,100 words in one segment, and a pause: beyond every default limit."""
    words = [Word(i * 0.5, i * 0.5 + 0.4, f" word{i}", 1.0) for i in range(1100)]
    words += [Word(700.0, 700.5, " later", 1.0)]
    return transcription(segment(words=tuple(words), end=701.0), segment(words=(), start=701.0, end=702.0))


@pytest.mark.parametrize(
    "options",
    [
        SubtitleOptions(),
        SubtitleOptions(highlight_words=True, max_words_per_line=7),
        SubtitleOptions(max_line_width=42, max_line_count=2),
        SubtitleOptions(max_line_width=42),
        SubtitleOptions(max_line_count=2),
    ],
)
def test_a_long_talk_equals_openai(options: SubtitleOptions) -> None:
    text = as_text(long_talk(), "srt", options)
    assert text == openai_text(long_talk(), "srt", options)
    assert text.count("-->") > 1


@settings(deadline=None, max_examples=40)
@given(st.one_of(transcriptions(st.none()), transcriptions(timed_words())))
def test_json_has_openais_keys_and_values(result: Transcription) -> None:
    """Without the keys that are ours the file is openai/whisper's, byte for byte."""
    content = json.loads(as_text(result, "json", DEFAULT))
    assert [entry["experts"] for entry in content["segments"]] == [dict(s.experts) for s in result.segments]
    assert content["duration"] == result.duration
    content["segments"] = [{key: entry[key] for key in entry if key in OPENAI_KEYS} for entry in content["segments"]]
    shared = {key: content[key] for key in content if key in {"text", "segments", "language"}}
    assert json.dumps(shared) == openai_text(result, "json")


def test_json_is_never_invalid() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        as_text(transcription(segment(avg_logprob=float("nan"))), "json", DEFAULT)


def test_segments_of_which_only_some_have_words_are_written_as_segments() -> None:
    result = transcription(segment(words=(Word(0.0, 1.0, " no", 1.0),)), segment(" yes"))
    assert "Hello." in as_text(result, "srt", DEFAULT) and "yes" in as_text(result, "srt", DEFAULT)


@given(st.text(st.characters(exclude_categories=("Cs",))))
def test_compression_ratio_equals_openai(text: str) -> None:
    assert compression_ratio(text) == pytest.importorskip("whisper.utils").compression_ratio(text)
