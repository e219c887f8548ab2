"""A corpus in memory, with the protocol of those on disk: short noises, a different one in every sample."""

from __future__ import annotations

import io
import wave
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from generate.tiny import tiny_tokenizer

from whisper_moe.config import SAMPLE_RATE, ModelConfig
from whisper_moe.data.examples import ExampleConfig, ExampleReader
from whisper_moe.data.sample import AudioRef, DataError, Sample, Skipped, Task

MODEL = ModelConfig()
CORRUPT = AudioRef(path="broken.wav", data=b"RIFF nothing of the kind")


def noise(seconds: float, seed: int = 0) -> bytes:
    """A WAV file of 16 kHz mono."""
    samples = np.random.default_rng(seed).integers(-9_000, 9_000, round(seconds * SAMPLE_RATE)).astype("<i2")
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(SAMPLE_RATE)
        writer.writeframes(samples.tobytes())
    return file.getvalue()


def clip(
    key: str, seconds: float, text: str | None = None, *, language: str = "en", task: Task = "transcribe", seed: int = 0
) -> Sample:
    target = "en" if task == "translate" else language
    return Sample(
        id=key,
        task=task,
        text=f"this is {key}" if text is None else text,
        language=language,
        target_language=target,
        audio=AudioRef(path=f"{key}.wav", data=noise(seconds, seed)),
        duration=seconds,
    )


def clips(count: int, prefix: str = "c", *, shortest: float = 0.3, longest: float = 1.5, **kind: str) -> list[Sample]:
    """Of lengths between the two, none alike."""
    lengths = np.random.default_rng(count).uniform(shortest, longest, count)
    return [clip(f"{prefix}{i}", float(s), seed=i, **kind) for i, s in enumerate(lengths)]  # pyright: ignore[reportArgumentType]


def damaged(sample: Sample) -> Sample:
    """The same, but its sound cannot be decoded; what the corpus says of it stays."""
    return replace(sample, audio=CORRUPT)


@dataclass
class MemoryCorpus:
    """Samples in a list; an error in the list is raised where it is read."""

    samples: Sequence[Sample | DataError]
    name: str = "memory"
    streaming: bool = False
    left_out: tuple[Skipped, ...] = ()

    def __len__(self) -> int:
        assert not self.streaming
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        assert not self.streaming
        return self._given(self.samples[index])

    def __iter__(self) -> Iterator[Sample]:
        return map(self._given, self.samples)

    @staticmethod
    def _given(item: Sample | DataError) -> Sample:
        if isinstance(item, DataError):
            raise item
        return item


def tiny_reader(model: ModelConfig = MODEL, **settings: object) -> ExampleReader:
    return ExampleReader(tiny_tokenizer(), model, ExampleConfig.model_validate(settings))
