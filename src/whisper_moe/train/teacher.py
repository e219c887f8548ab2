"""What a frozen model says of clips that are padded to 30 s: the lessons of context adaptation, kept on disk.

For each clip its own greedy transcripts, with and without timestamps, and every hidden state of the decoder on the way
to them (after github.com/futo-org/whisper-acft, whose lessons are the states alone). The padded pass is most of what a
step of self-distillation would cost, so it is done once. Transcripts of people are not needed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from whisper_moe.config import FULL_WINDOW, SAMPLE_RATE
from whisper_moe.data.examples import Skipped
from whisper_moe.data.sample import AudioRef, Sample
from whisper_moe.generate.decode import WindowDecoder
from whisper_moe.generate.options import TranscribeOptions
from whisper_moe.media.audio import MediaError
from whisper_moe.model.linear import arrange
from whisper_moe.model.model import WhisperMoEModel
from whisper_moe.packing import Layout
from whisper_moe.weights.default import load_model
from whisper_moe.weights.parts import empty_model

Mode = Literal["plain", "timestamps"]
MODES: tuple[Mode, ...] = ("plain", "timestamps")
CLIPS_AT_ONCE = 5
"""Padded windows whose keys and values are held at a time."""


@dataclass(frozen=True)
class Lesson:
    """One clip, one mode."""

    tokens: Tensor
    """[n] int64: start, language, task, text, end of text; what the decoder reads is all but the last."""
    states: Tensor
    """[depths + 1, n - 1, D] float16: behind each decoder block, then behind the last norm."""


class Teacher:
    """A model that is not changed any more, and a folder of what it has said."""

    def __init__(self, decoder: WindowDecoder, folder: Path, *, limit_mb: int = 4_096) -> None:
        """``limit_mb``: the folder's size, over which :meth:`prepare` refuses to go on."""
        self._decoder: WindowDecoder | None = decoder
        self._folder, self._limit = folder, limit_mb << 20

    def dismiss(self) -> None:
        """Give the model's memory back: from now on there is only what it has said."""
        self._decoder = None

    def knows(self, sample: Sample) -> bool:
        """Whether there are lessons for it."""
        return self._path(sample).is_file()

    def prepare(self, samples: Iterable[Sample], left_out: list[Skipped] | None = None) -> Iterator[Sample]:
        """Make the lessons that are missing; yields each sample when its lessons are there.

        ``left_out`` is told of clips that cannot be read, and of those of over 30 s. Raises ``ValueError`` when the folder
        is full.
        """
        left_out = [] if left_out is None else left_out
        self._folder.mkdir(parents=True, exist_ok=True)
        used = sum(path.stat().st_size for path in self._folder.glob("*.safetensors"))
        waiting: list[tuple[Sample, np.ndarray]] = []
        for sample in samples:
            if self.knows(sample):
                yield sample
                continue
            assert sample.audio is not None and self._decoder is not None, sample.id
            try:
                clip = sample.audio.read()
            except MediaError as error:
                left_out.append(Skipped(id=sample.id, cause=str(error), corrupt=True))
                continue
            if not 0 < len(clip) <= round(self._decoder.window_seconds * SAMPLE_RATE):
                seconds = len(clip) / SAMPLE_RATE
                left_out.append(Skipped(id=sample.id, cause=f"its sound has {seconds:.2f} s", corrupt=not len(clip)))
                continue
            waiting.append((sample, clip))
            if len(waiting) == CLIPS_AT_ONCE:
                used += self._teach(waiting)
                yield from (sample for sample, _ in waiting)
                waiting = []
                if used > self._limit:
                    raise ValueError(
                        f"{self._folder}: over its limit of {self._limit >> 20} MB; give it more, or fewer clips"
                    )
        if waiting:
            self._teach(waiting)
            yield from (sample for sample, _ in waiting)

    def lesson(self, sample: Sample, mode: Mode) -> Lesson:
        """Raises ``ValueError`` naming the file, if it is not what was written."""
        path = self._path(sample)
        try:
            with safe_open(path, "pt") as file:
                return Lesson(file.get_tensor(f"{mode}.tokens"), file.get_tensor(f"{mode}.states"))
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path}: not a lesson ({error}); delete it") from error

    def _path(self, sample: Sample) -> Path:
        assert sample.audio is not None
        return (
            self._folder
            / f"{sha256(f'{sample.id} {_fingerprint(sample.audio)}'.encode()).hexdigest()[:32]}.safetensors"
        )

    @torch.inference_mode()
    def _teach(self, clips: Sequence[tuple[Sample, np.ndarray]]) -> int:
        """Decode some clips in every mode; returns the bytes written."""
        decoder = self._decoder
        assert decoder is not None
        order, encoded = decoder.encode([clip for _, clip in clips], FULL_WINDOW)
        samples = [len(clips[i][1]) for i in order]
        kept: list[dict[str, Tensor]] = [{} for _ in order]
        for mode in MODES:
            options = TranscribeOptions(timestamps=mode == "timestamps", context_margin=FULL_WINDOW)
            takes = decoder.decode_encoded(encoded, samples, [None] * len(order), options, 0.0, FULL_WINDOW)
            tokenizer, texts = decoder.tokenizer, []
            for take in takes:
                prefix = tokenizer.sot_sequence(take.language)
                plain = [] if options.timestamps else [tokenizer.no_timestamps]
                texts.append(torch.tensor([*prefix, *plain, *take.hypothesis.tokens, tokenizer.eot]))
            depths: list[Tensor] = []
            layout, read = Layout(len(text) - 1 for text in texts), torch.cat([text[:-1] for text in texts])
            last = decoder.model.decoder(read.to(encoded.states_TD.device), layout, encoded, depths=depths)
            states = torch.stack([*depths, last]).half().cpu()
            for tensors, text, rows in zip(kept, texts, layout.slices(), strict=True):
                tensors |= {f"{mode}.tokens": text, f"{mode}.states": states[:, rows].contiguous()}
        return sum(self._write(clips[i][0], tensors) for i, tensors in zip(order, kept, strict=True))

    def _write(self, sample: Sample, tensors: dict[str, Tensor]) -> int:
        path = self._path(sample)
        partial = path.with_suffix(f".{os.getpid()}.part")
        partial.write_bytes(content := save(tensors))
        partial.replace(path)
        return len(content)


def teacher_of(source: str | None, folder: Path, device: torch.device, *, limit_mb: int) -> Teacher:
    """A model as it is loaded, frozen; in float32, on a CPU arranged for it."""
    loaded = load_model(source)
    model = empty_model(loaded.config)
    model.load_state_dict(loaded.state, assign=True)
    model.eval().requires_grad_(False)
    network = arrange(model) if device.type == "cpu" else model.to(device)
    assert isinstance(network, WhisperMoEModel)
    return Teacher(WindowDecoder(network, loaded.tokenizer, loaded.generation), folder, limit_mb=limit_mb)


def _fingerprint(audio: AudioRef) -> str:
    """What a piece of sound is known by."""
    return repr(replace(audio, data=sha256(audio.data).digest() if audio.data is not None else None))
