"""The systems that can be evaluated and compared: how each is loaded, and how it turns sound into transcripts.

Each adapter decodes as its users would, greedily or with the same beam, with the same fallback temperatures where it has
any; whatever else it was told is in ``options``. A peer's package is imported when it is loaded, and none is needed
otherwise.
"""

# The peers are optional: type checking must pass without them.
# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from whisper_moe.config import SAMPLE_RATE
from whisper_moe.generate.options import TEMPERATURES
from whisper_moe.generate.result import mean_gates
from whisper_moe.media.audio import load_audio

if TYPE_CHECKING:
    import numpy as np

Source: TypeAlias = "str | np.ndarray"
"""A file, or mono float32 samples at 16 kHz."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a system is told when it is loaded. ``language`` None means that it detects it."""

    weights: str
    threads: int
    language: str | None = None
    beam: int = 1
    batch: int = 8
    """Clips or windows in a batch of the batching peers."""
    fallback: bool = True
    long: bool = False
    """Whether clips are over 30 s, where a call does not say so: the sequential peers need timestamps to move their window."""

    @property
    def temperatures(self) -> tuple[float, ...]:
        return TEMPERATURES if self.fallback else (0.0,)


@dataclass(frozen=True)
class Heard:
    """What one clip became."""

    text: str
    tokens: int | None = None
    """Tokens that were decoded, where the system says; those of tries that were given up are not among them."""
    experts: tuple[tuple[str, float], ...] = ()
    """Mean gate of each expert, *none* included; empty where there are none, or they are chosen per token."""
    fallbacks: int = 0
    """Windows that were decoded again."""
    error: str | None = None


class Adapter(Protocol):
    """A loaded system. ``batched``: it is given all clips at once, and one by one only for the latency."""

    batched: bool
    options: dict[str, Any]
    weights: Path

    def hear(self, sources: Iterable[Source], **asked: Any) -> Iterator[Heard]:
        """One result for each clip, in order; ``asked`` (``language``, ``task``, ``long``) goes before ``options``."""
        ...


class Ours:
    """This project: all clips in one call, packed without padding.

    A clip that looks wrong with its margin is decoded again padded to 30 s, within the time; ``fallbacks`` counts them.
    """

    batched = True

    def __init__(self, model: Any, setup: Setup, *, margin: float | None, weights: Path) -> None:
        """``model``: a loaded ``WhisperMoE``; ``margin``: None for its own."""
        self.model, self.weights = model, weights
        self.margin: float = model.context_margin if margin is None else margin
        self.options: dict[str, Any] = {
            "language": setup.language,
            "task": "transcribe",
            "beam_size": setup.beam,
            "temperatures": setup.temperatures,
            "timestamps": setup.long,
            "context_margin": self.margin,
        }

    def hear(self, sources: Iterable[Source], **asked: Any) -> Iterator[Heard]:
        for outcome in self.model.transcribe_each(sources, **told(self.options, asked, "timestamps")):
            result = outcome.transcription
            if result is None:
                yield Heard("", error=str(outcome.error))
                continue
            tokens = sum(len(segment.tokens) for segment in result.segments)
            yield Heard(result.text, tokens, mean_gates(result.segments), result.fallbacks)


def told(options: Mapping[str, Any], asked: Mapping[str, Any], timestamps: str) -> dict[str, Any]:
    """A call's options: what is ``asked`` goes first, and a clip's length decides whether it gets timestamps.

    ``timestamps``: the option's name; one that begins with ``without`` is turned round.
    """
    asked = dict(asked)
    long = asked.pop("long", None)
    return {**options, **asked} | ({} if long is None else {timestamps: long != timestamps.startswith("without")})


class FasterWhisper:
    """faster-whisper, one clip at a time, or ``workers`` clips at a time with the threads divided among them."""

    def __init__(self, setup: Setup, *, compute_type: str, workers: int = 1) -> None:
        from faster_whisper import WhisperModel

        self.weights, self.batched, self.workers = Path(setup.weights), workers > 1, workers
        threads = max(1, setup.threads // workers)
        self.model = WhisperModel(
            setup.weights, device="cpu", compute_type=compute_type, cpu_threads=threads, num_workers=workers
        )
        self.options: dict[str, Any] = {
            "language": setup.language,
            "beam_size": setup.beam,
            "temperature": list(setup.temperatures),
            "condition_on_previous_text": False,
            "without_timestamps": not setup.long,
        }

    def hear(self, sources: Iterable[Source], **asked: Any) -> Iterator[Heard]:
        options = told(self.options, asked, "without_timestamps")

        def one(source: Source) -> Heard:
            segments = list(self.model.transcribe(source, **options)[0])
            text = "".join(segment.text for segment in segments)
            return Heard(text, sum(len(segment.tokens) for segment in segments))

        if self.workers == 1:
            yield from map(one, sources)
            return
        with ThreadPoolExecutor(self.workers) as pool:
            yield from pool.map(one, sources)


class FasterWhisperBatched:
    """faster-whisper's BatchedInferencePipeline, which takes one recording and batches its windows.

    Short clips are laid end to end and named as its ``clip_timestamps``, so that they share batches too.
    Recordings over 30 s are cut by its own voice activity detection.
    """

    batched = True

    def __init__(self, setup: Setup, *, compute_type: str) -> None:
        from faster_whisper import BatchedInferencePipeline, WhisperModel

        self.weights = Path(setup.weights)
        model = WhisperModel(setup.weights, device="cpu", compute_type=compute_type, cpu_threads=setup.threads)
        self.pipeline = BatchedInferencePipeline(model)
        self.options: dict[str, Any] = {
            "language": setup.language,
            "multilingual": setup.language is None,
            "beam_size": setup.beam,
            "temperature": 0.0,  # it has no fallback
            "batch_size": setup.batch,
            "without_timestamps": True,
            "vad_filter": setup.long,
        }

    def hear(self, sources: Iterable[Source], **asked: Any) -> Iterator[Heard]:
        options = told(self.options, asked, "vad_filter")
        options["multilingual"] = options["language"] is None
        if not options["vad_filter"]:
            yield from self._end_to_end([samples_of(source) for source in sources], options)
            return
        for source in sources:
            segments = list(self.pipeline.transcribe(source, **options)[0])
            text = "".join(segment.text for segment in segments)
            yield Heard(text, sum(len(segment.tokens) for segment in segments))

    def _end_to_end(self, clips: Sequence[np.ndarray], options: dict[str, Any]) -> list[Heard]:
        import numpy as np

        bounds = np.cumsum([0, *(len(clip) for clip in clips)]) / SAMPLE_RATE
        spans = [{"start": start, "end": end} for start, end in pairwise(bounds)]
        found, _ = self.pipeline.transcribe(np.concatenate(clips), clip_timestamps=spans, **options)
        segments = list(found)
        if len(segments) != len(clips):
            raise RuntimeError(f"{len(clips)} clips gave {len(segments)} segments: they cannot be told apart")
        return [Heard(segment.text, len(segment.tokens)) for segment in segments]


class OpenAIWhisper:
    """openai-whisper, one clip at a time; files it decodes with the ``ffmpeg`` program."""

    batched = False

    def __init__(self, setup: Setup) -> None:
        import torch
        import whisper

        torch.set_num_threads(setup.threads)
        self.weights = Path(setup.weights)
        self.model = whisper.load_model(setup.weights, device="cpu")
        self.options: dict[str, Any] = {
            "language": setup.language,
            "beam_size": setup.beam if setup.beam > 1 else None,
            "temperature": setup.temperatures,
            "condition_on_previous_text": False,
            "without_timestamps": not setup.long,
            "fp16": False,
        }

    def hear(self, sources: Iterable[Source], **asked: Any) -> Iterator[Heard]:
        options = told(self.options, asked, "without_timestamps")
        for source in sources:
            result: dict[str, Any] = self.model.transcribe(source, **options)
            yield Heard(str(result["text"]), sum(len(segment["tokens"]) for segment in result["segments"]))


class Transformers:
    """transformers' ``generate`` in float32 on batches of clips, as its pipeline calls it."""

    batched = True

    def __init__(self, setup: Setup) -> None:
        import torch
        from transformers import AutoProcessor, WhisperForConditionalGeneration

        torch.set_num_threads(setup.threads)
        self.weights, self.batch = Path(setup.weights), setup.batch
        self.processor: Any = AutoProcessor.from_pretrained(setup.weights)
        self.model = WhisperForConditionalGeneration.from_pretrained(setup.weights, dtype=torch.float32).eval()
        self.options: dict[str, Any] = {
            "language": setup.language,
            "task": "transcribe",
            "num_beams": setup.beam,
            "temperature": setup.temperatures if setup.fallback else 0.0,
            "return_timestamps": setup.long,
            "condition_on_prev_tokens": False,
        }
        if setup.fallback:
            self.options |= {"compression_ratio_threshold": 1.35, "logprob_threshold": -1.0}

    def hear(self, sources: Iterable[Source], **asked: Any) -> Iterator[Heard]:
        options = told(self.options, asked, "return_timestamps")
        batch: list[np.ndarray] = []
        for source in sources:
            batch.append(samples_of(source))
            if len(batch) == self.batch:
                yield from self._one_batch(batch, options)
                batch = []
        if batch:
            yield from self._one_batch(batch, options)

    def _one_batch(self, clips: Sequence[np.ndarray], options: dict[str, Any]) -> list[Heard]:
        import torch

        padding = {"truncation": False, "padding": "longest"} if options["return_timestamps"] else {}
        inputs = self.processor(
            list(clips), sampling_rate=SAMPLE_RATE, return_tensors="pt", return_attention_mask=True, **padding
        )
        with torch.inference_mode():
            rows: Any = self.model.generate(**inputs, **options)
        special = set(self.processor.tokenizer.all_special_ids)
        counts = [sum(token not in special for token in row) for row in rows.tolist()]
        texts = self.processor.batch_decode(rows, skip_special_tokens=True)
        return [Heard(text, count) for text, count in zip(texts, counts, strict=True)]


class WrittenTranscripts:
    """What another system wrote: a TSV with the columns ``id`` and ``text``; nothing is heard, and nothing timed."""

    def __init__(self, file: Path) -> None:
        self.file = file
        lines = file.read_text(encoding="utf-8-sig").splitlines()
        head = lines[0].split("\t") if lines else []
        if not {"id", "text"} <= set(head):
            raise ValueError(f"{file}: row 1: the columns id and text are needed, found {head}")
        place, said = head.index("id"), head.index("text")
        self.texts: dict[str, str] = {}
        for number, line in enumerate(lines[1:], start=2):
            cells = line.split("\t")
            if len(cells) != len(head):
                raise ValueError(f"{file}: row {number}: {len(head)} columns are expected, found {len(cells)}")
            if cells[place] in self.texts:
                raise ValueError(f"{file}: row {number}: the id {cells[place]!r} is there twice")
            self.texts[cells[place]] = cells[said]

    def of(self, clip: str) -> Heard:
        """The text of one clip; a clip that the file lacks is an error of that clip."""
        text = self.texts.get(clip)
        return Heard("", error=f"{self.file} has no row {clip!r}") if text is None else Heard(text)


def samples_of(source: Source) -> np.ndarray:
    """Mono float32 samples at 16 kHz, for peers that bring no decoder."""
    return load_audio(Path(source), max_seconds=None) if isinstance(source, str) else source
