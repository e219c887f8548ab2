"""Real recordings, the Hub's whisper-base, 30 s of context: our transcripts are transformers' and openai/whisper's."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from parity.openai_whisper import load_openai, read_samples

from whisper_moe import WhisperMoE

AS_EVER: dict[str, Any] = {
    "language": "en",
    "context_margin": 30.0,
    "temperatures": (0.0,),
    "compression_ratio_threshold": None,
    "logprob_threshold": None,
    "no_speech_threshold": None,
}
"""Whisper's full window, greedy, every transcript taken as it comes."""


@pytest.fixture(scope="module")
def dense(whisper_base: Path) -> WhisperMoE:
    return WhisperMoE.from_pretrained(whisper_base, dtype="float32")


@pytest.fixture(scope="module")
def theirs(whisper_base: Path) -> Any:
    """transformers' model and its processor."""
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    model = WhisperForConditionalGeneration.from_pretrained(whisper_base, dtype=torch.float32)
    return model.eval(), WhisperProcessor.from_pretrained(whisper_base)


def clips(shared_data: Path, count: int) -> list[Path]:
    """Recordings of one speaker, evenly taken from the list."""
    folder = shared_data / "english-read"
    with (folder / "transcripts.tsv").open(encoding="utf-8") as lines:
        paths = [folder / row["path"] for row in csv.DictReader(lines, delimiter="\t")]
    return paths[:: len(paths) // count][:count]


@torch.inference_mode()
def by_transformers(theirs: Any, paths: list[Path], timestamps: bool) -> list[str]:
    model, processor = theirs
    sounds = [read_samples(path).numpy() for path in paths]
    features = processor(sounds, sampling_rate=16_000, return_tensors="pt").input_features
    found = model.generate(features, language="en", task="transcribe", return_timestamps=timestamps, num_beams=1)
    return [text.strip() for text in processor.batch_decode(found, skip_special_tokens=True)]


def check(dense: WhisperMoE, theirs: Any, paths: list[Path], timestamps: bool) -> None:
    expected = by_transformers(theirs, paths, timestamps)
    assert min(map(len, expected)) > 10
    results = dense.transcribe(paths, timestamps=timestamps, **AS_EVER)
    assert [result.text for result in results] == expected


@pytest.mark.parametrize("timestamps", [False, True], ids=["without times", "with times"])
def test_three_transcripts_are_those_of_transformers(
    dense: WhisperMoE, theirs: Any, shared_data: Path, timestamps: bool
) -> None:
    check(dense, theirs, clips(shared_data, 3), timestamps)


@pytest.mark.slow
@pytest.mark.parametrize("timestamps", [False, True], ids=["without times", "with times"])
def test_twenty_four_transcripts_are_those_of_transformers(
    dense: WhisperMoE, theirs: Any, shared_data: Path, timestamps: bool
) -> None:
    check(dense, theirs, clips(shared_data, 24), timestamps)


def test_words_are_said_when_openai_says(dense: WhisperMoE, whisper_base: Path, shared_data: Path) -> None:
    from whisper import transcribe

    # openai/whisper's transcribe puts zeros behind the log-mel, which no silence is: times and probabilities differ by a little.
    path = shared_data / "english-read/audio/LJ003-0062.opus"
    openai = load_openai(whisper_base)
    expected = transcribe(
        openai, read_samples(path), language="en", word_timestamps=True, fp16=False, temperature=(0.0,)
    )
    result = dense.transcribe(path, word_timestamps=True, **AS_EVER)
    words = [word for segment in result.segments for word in segment.words or ()]
    segments: Any = expected["segments"]
    others = [word for segment in segments for word in segment["words"]]
    assert len(others) > 8
    assert [word.word for word in words] == [word["word"] for word in others]
    # openai's first word begins with the file, in silence; ours where there is sound.
    assert others[0]["start"] == 0 < words[0].start < others[0]["end"]
    others[0]["start"] = words[0].start
    for word, other in zip(words, others, strict=True):
        assert (word.start, word.end) == pytest.approx((other["start"], other["end"]), abs=0.05)
        assert word.probability == pytest.approx(other["probability"], abs=0.1)
