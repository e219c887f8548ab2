"""Every file of ``examples/`` gives the transcript that lies beside it (float32, the embedded default)."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from whisper_moe.generate.result import Transcription, compression_ratio

if TYPE_CHECKING:
    from whisper_moe import WhisperMoE

EXAMPLES = Path(__file__).parent.parent / "examples"
MEDIA = sorted(p for p in EXAMPLES.iterdir() if p.suffix in {".m4a", ".ogg", ".mp3", ".mov", ".wav", ".flac"})


@pytest.fixture(scope="module")
def transcribed(default_model: WhisperMoE) -> dict[str, Transcription]:
    """Each by itself, as ``make_expected.py`` does it."""
    return {path.name: default_model.transcribe(path) for path in MEDIA}


def test_as_many_threads_as_fit_give_the_same_numbers(default_model: WhisperMoE) -> None:
    torch = pytest.importorskip("torch")
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(default_model.transcribe(EXAMPLES / "sample.m4a", word_timestamps=True))
    finally:
        torch.set_num_threads(before)
    said = [[(word.word, word.start, word.end) for part in each.segments for word in part.words] for each in found]
    sure = [[part.avg_logprob for part in each.segments] for each in found]
    assert said[0] and said[0] == said[1] == said[2]
    assert sure[0] == pytest.approx(sure[1], abs=1e-4) and sure[0] == pytest.approx(sure[2], abs=1e-4)


def test_there_are_seven_examples_each_with_its_transcript() -> None:
    assert len(MEDIA) == 7
    assert {path.name for path in (EXAMPLES / "expected").iterdir()} == {f"{path.name}.txt" for path in MEDIA}


@pytest.mark.parametrize("name", [path.name for path in MEDIA if path.name != "noise.wav"])
def test_the_transcript_is_the_expected_one(name: str, transcribed: dict[str, Transcription]) -> None:
    expected = (EXAMPLES / "expected" / f"{name}.txt").read_text(encoding="utf-8").strip()
    assert transcribed[name].text == expected


def test_the_transcripts_are_near_what_is_said(transcribed: dict[str, Transcription]) -> None:
    """What the default writes is compared with what people read out, so that an expected transcript cannot go bad unseen."""
    with (EXAMPLES / "references.tsv").open(encoding="utf-8") as lines:
        said: dict[str, list[str]] = {}
        for row in csv.DictReader(lines, delimiter="\t"):
            said.setdefault(row["file"], []).append(row["text"])
    errors = words = 0
    for name, texts in said.items():
        reference, found = (re.findall(r"\w+", text.lower()) for text in (" ".join(texts), transcribed[name].text))
        errors += edits(reference, found)
        words += len(reference)
    assert words > 250 and errors / words < 0.15, f"{errors} of {words} words"


def edits(reference: list[str], found: list[str]) -> int:
    """Word edits from one to the other (Levenshtein)."""
    row = list(range(len(found) + 1))
    for i, word in enumerate(reference, 1):
        previous, row[0] = row[0], i
        for j, other in enumerate(found, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (word != other))
    return row[-1]


def test_all_together_say_the_same(default_model: WhisperMoE, transcribed: dict[str, Transcription]) -> None:
    names = ["sample.m4a", "clip.mov", "silence.flac", "long.mp3"]
    together = default_model.transcribe([EXAMPLES / name for name in names])
    assert [result.text for result in together] == [transcribed[name].text for name in names]


@pytest.mark.parametrize("name", ["sample.m4a", "clip.mov", "silence.flac"])
def test_int8_arithmetic_writes_the_same(name: str, default_model: WhisperMoE) -> None:
    """The default where the CPU is fast at it."""
    int8 = type(default_model).from_pretrained(EXAMPLES.parent / "checkpoints", dtype="int8")
    expected = (EXAMPLES / "expected" / f"{name}.txt").read_text(encoding="utf-8").strip()
    assert int8.transcribe(EXAMPLES / name).text == expected


def test_each_window_has_its_own_language(transcribed: dict[str, Transcription]) -> None:
    with (EXAMPLES / "references.tsv").open(encoding="utf-8") as lines:
        rows = [row for row in csv.DictReader(lines, delimiter="\t") if row["file"] == "languages.ogg"]
    result = transcribed["languages.ogg"]
    assert {segment.language for segment in result.segments} == {"en", "it", "ru"}
    for segment in result.segments:
        middle = (segment.start + segment.end) / 2
        nearest = min(rows, key=lambda row: abs(float(row["start"]) + float(row["end"]) - 2 * middle))
        assert segment.language == nearest["language"], segment
    assert result.language == "en"


def test_silence_is_empty_and_noise_is_bounded(transcribed: dict[str, Transcription]) -> None:
    assert transcribed["silence.flac"].text == ""
    noise = transcribed["noise.wav"].text
    assert len(noise) < 200
    assert not noise or compression_ratio(noise) < 2.4
