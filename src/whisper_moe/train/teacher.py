"""What a frozen model says of clips that are padded to 30 s: the lessons of context adaptation, kept on disk.

For each clip its own greedy transcripts, with and without timestamps, and every hidden state of the decoder on the way
to them (after github.com/futo-org/whisper-acft, whose lessons are the states alone). The padded pass is most of what a
step of self-distillation would cost, so it is done once. Transcripts of people are not needed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from whisper_moe.config import FULL_WINDOW, SAMPLE_RATE, ModelConfig
from whisper_moe.data.sample import Sample, Skipped
from whisper_moe.data.sample import left_out as skipped
from whisper_moe.generate.decode import WindowDecoder
from whisper_moe.generate.options import TranscribeOptions
from whisper_moe.media.audio import MediaError
from whisper_moe.model.inference import prepare_for_inference
from whisper_moe.packing import Layout
from whisper_moe.weights.default import load_model
from whisper_moe.weights.files import atomic_file
from whisper_moe.weights.parts import empty_model

Mode = Literal["plain", "timestamps"]
MODES: tuple[Mode, ...] = ("plain", "timestamps")
CLIPS_AT_ONCE = 5
"""Padded windows whose keys and values are held at a time."""
NUMBERS = 1_024
"""Of each tensor, by which teachers are told apart."""


@dataclass(frozen=True)
class Lesson:
    """One clip, one mode."""

    tokens: Tensor
    """[n] int64: start, language, task, text, end of text; what the decoder reads is all but the last."""
    states: Tensor
    """[depths + 1, n - 1, D] float16: behind each decoder block, then behind the last norm."""


class Teacher:
    """A model that is not changed any more, and a folder of what it has said."""

    def __init__(self, decoder: WindowDecoder, folder: Path, *, limit_mb: int = 4_096, digest: str = "") -> None:
        """``limit_mb``: the folder's size, over which :meth:`prepare` refuses to go on. ``digest`` tells teachers apart that
        share a folder."""
        self._decoder: WindowDecoder | None = decoder
        self._folder, self._limit, self._digest = folder, limit_mb << 20, digest

    def dismiss(self) -> None:
        """Give the model's memory back: from now on there is only what it has said."""
        self._decoder = None

    def knows(self, sample: Sample) -> bool:
        """Whether there are lessons for it."""
        return self._path(sample).is_file()

    def prepare(self, samples: Iterable[Sample], left_out: list[Skipped] | None = None) -> Iterator[Sample]:
        """Make the lessons that are missing; yields each sample when its lessons are there, in their order.

        ``left_out`` is told of clips that cannot be read, and of those of over 30 s. Raises ``ValueError`` when the folder
        is full.
        """
        left_out = [] if left_out is None else left_out
        self._folder.mkdir(parents=True, exist_ok=True)
        used = sum(path.stat().st_size for path in self._folder.glob("*.safetensors"))
        waiting: list[tuple[Sample, np.ndarray]] = []
        behind: list[Sample] = []
        """Those that wait, and those that wait for them: the order does not depend on what is known already."""
        for sample in samples:
            if self.knows(sample):
                if behind:
                    behind.append(sample)
                else:
                    yield sample
                continue
            assert sample.audio is not None and self._decoder is not None, sample.id
            try:
                clip = sample.audio.read()
            except MediaError as error:
                left_out.append(skipped(sample, error))
                continue
            if not 0 < len(clip) <= round(self._decoder.window_seconds * SAMPLE_RATE):
                cause, kind = f"its sound has {len(clip) / SAMPLE_RATE:.2f} s", "too long" if len(clip) else "corrupt"
                left_out.append(Skipped(id=sample.id, place=sample.place, kind=kind, cause=cause))
                continue
            waiting.append((sample, clip))
            behind.append(sample)
            if len(waiting) == CLIPS_AT_ONCE:
                used += self._teach(waiting)
                yield from behind
                waiting, behind = [], []
                if used > self._limit:
                    raise ValueError(
                        f"{self._folder}: over its limit of {self._limit >> 20} MB; give it more, empty it, or take fewer clips"
                    )
        if waiting:
            self._teach(waiting)
            yield from behind

    def lesson(self, sample: Sample, mode: Mode) -> Lesson:
        """Raises ``ValueError`` naming the file, if it is not what was written."""
        path = self._path(sample)
        try:
            with safe_open(path, "pt") as file:
                return Lesson(file.get_tensor(f"{mode}.tokens"), file.get_tensor(f"{mode}.states"))
        except FileNotFoundError as error:
            cause = f"no lesson of {sample.id}: it is gone, or the sound has changed since it was made"
            raise ValueError(f"{path}: {cause}") from error
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path}: not a lesson ({error}); delete it") from error

    def _path(self, sample: Sample) -> Path:
        assert sample.audio is not None
        key = f"{self._digest} {sample.id} {sample.audio.fingerprint()}"
        return self._folder / f"{sha256(key.encode()).hexdigest()[:32]}.safetensors"

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
            layout, read = Layout(len(text) - 1 for text in texts), torch.cat([text[:-1] for text in texts])
            decoded = decoder.model.decoder(read.to(encoded.states_TD.device), layout, encoded)
            states = torch.stack([*decoded.depths, decoded.states_TD]).half().cpu()
            for tensors, text, rows in zip(kept, texts, layout.slices(), strict=True):
                tensors |= {f"{mode}.tokens": text, f"{mode}.states": states[:, rows].contiguous()}
        return sum(self._write(clips[i][0], tensors) for i, tensors in zip(order, kept, strict=True))

    def _write(self, sample: Sample, tensors: dict[str, Tensor]) -> int:
        with atomic_file(self._path(sample)) as path:
            return path.write_bytes(save(tensors))


def teacher_of(source: str | None, folder: Path, device: torch.device, *, limit_mb: int) -> Teacher:
    """A model as it is loaded, frozen; in float32, on a CPU laid out for it."""
    loaded = load_model(source)
    digest = teacher_digest(loaded.config, loaded.state, loaded.generation)
    model = empty_model(loaded.config)
    model.load_state_dict(loaded.state, assign=True)
    model.eval().requires_grad_(False)
    network = prepare_for_inference(model) if device.type == "cpu" else model.to(device)
    return Teacher(
        WindowDecoder(network, loaded.tokenizer, loaded.generation), folder, limit_mb=limit_mb, digest=digest
    )


def teacher_digest(config: ModelConfig, state: Mapping[str, Tensor], generation: Mapping[str, Any]) -> str:
    """What a teacher is known by: its settings, and numbers from all over each of its tensors."""
    digest = sha256(config.model_dump_json().encode())
    digest.update(json.dumps(generation, sort_keys=True, default=str).encode())
    for name, tensor in sorted(state.items()):
        flat = tensor.detach().flatten()
        some = flat[:: max(1, len(flat) // NUMBERS)].contiguous().cpu()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
