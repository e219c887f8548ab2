"""Context adaptation: a model learns to hear short clips without padding, from itself (self-distillation).

    python recipes/context/adapt.py RECIPE.yaml [KEY=VALUE ...] -o RUN [--resume]    as whisper-moe train

Whisper always saw 30 s. Cut to the clip with little silence behind it, it repeats itself without end. Here it is trained,
on any margin of silence, to have the states and the next-token probabilities that the frozen model has with 30 s
(after github.com/futo-org/whisper-acft: mean square error of all decoder states; the divergence of the probabilities is
added). What learns is the always-on part beside the core: differences of norms, adapters, TTT layers with their gates.
The core and the routed experts stay as they are.

What the frozen model says, its *lessons*, is kept on disk: for each clip its own greedy transcripts, with and without
timestamps, and every hidden state of the decoder on the way to them. The padded pass is most of what a step would cost, so
it is done once. Transcripts of people are not needed.

N clips, T decoder tokens, D width, depths: behind each decoder block, then behind the last norm.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from whisper_moe.config import FULL_WINDOW, SAMPLE_RATE, ModelConfig, Strict
from whisper_moe.data.examples import ExampleConfig, ExampleReader, Pack
from whisper_moe.data.loader import NAMED, PackedLoader
from whisper_moe.data.sample import Sample, Skipped, TooLong, items, left_out
from whisper_moe.generate.decode import WindowDecoder
from whisper_moe.generate.options import TranscribeOptions
from whisper_moe.media.audio import MediaError
from whisper_moe.media.tokenizer import Tokenizer
from whisper_moe.model.inference import prepare_for_inference
from whisper_moe.model.model import Output, WhisperMoEModel
from whisper_moe.packing import Layout
from whisper_moe.train.build import Task
from whisper_moe.train.losses import Terms, Totals, divergence, run_packs
from whisper_moe.train.parallel import Parallel
from whisper_moe.train.reading import RecipeError
from whisper_moe.train.recipe import Recipe
from whisper_moe.train.run import script
from whisper_moe.weights.files import atomic_file
from whisper_moe.weights.load import load_model
from whisper_moe.weights.parts import frozen_model

MODES = ("plain", "timestamps")
CLIPS_AT_ONCE = 5
"""Padded windows whose keys and values are held at a time."""
NUMBERS = 1_024
"""Of each tensor, by which teachers are told apart."""
NOTHING_TO_TEACH = "context.padded: full windows teach nothing where model.adapt.full_windows is false"


class ContextSettings(Strict):
    """How the model learns from itself, padded to 30 s."""

    margins: tuple[float, float] = (0.0, 4.0)
    """The least and the most silence behind a clip, in seconds; small ones are drawn more often."""
    padded: float = Field(default=0.0, ge=0, le=1)
    """The share of clips that are padded to the whole window instead, where that is adapted too (``model.adapt.full_windows``):
    what was right there has to stay."""
    states: float = Field(default=1.0, ge=0)
    """Factor of the relative mean square error of the decoder's states."""
    divergence: float = Field(default=1.0, ge=0)
    """Factor of the divergence of the next token's probabilities."""
    lessons: str | None = None
    """The folder of what the padded model has said; default: ``lessons`` in the run's directory."""
    limit_mb: int = Field(default=4_096, ge=1)
    """What that folder may hold; about 0.4 MB a second of speech for whisper-base."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not 0 <= self.margins[0] <= self.margins[1] <= 30:
            raise ValueError(f"margins must be 0 to 30 seconds, the lesser first, got {list(self.margins)}")
        return self


class ContextRecipe(Recipe):
    """Transcripts are not needed, and only what ``model.freeze`` and ``model.train`` leave learns."""

    context: ContextSettings = ContextSettings()
    """Instead of all in ``losses``."""
    free: ClassVar[tuple[str, ...]] = ("context.lessons", "context.limit_mb")

    @model_validator(mode="after")
    def _check_context(self) -> Self:
        adapt = self.model.adapt
        if self.context.padded and adapt and not adapt.full_windows:
            raise ValueError(NOTHING_TO_TEACH)
        return self

    def task(self) -> type[Task]:
        return Adapting

    @property
    def least_margin(self) -> float | None:
        asked = self.model.context_margin
        return self.context.margins[0] if asked is None else asked


@dataclass(frozen=True)
class Lesson:
    """One clip, one mode."""

    tokens: Tensor
    """[n] int64: start, language, task, text, end of text; what the decoder reads is all but the last."""
    states: Tensor
    """[depths + 1, n - 1, D] float16: behind each decoder block, then behind the last norm."""


class Lessons:
    """A folder of what a frozen model has said; and a corpus, of its clips, each with and without timestamps."""

    name, streaming = "lessons", False

    def __init__(self, folder: Path, digest: str = "") -> None:
        """``digest`` tells teachers apart that share a folder."""
        self.folder, self.digest = folder, digest
        self.samples, self.left_out = list[Sample](), list[Skipped]()

    def path(self, sample: Sample) -> Path:
        """Where the lessons of this very sound are, if they have been made."""
        assert sample.audio is not None, f"{sample.id} has no sound"
        key = f"{self.digest} {sample.id} {sample.audio.fingerprint()}"
        return self.folder / f"{sha256(key.encode()).hexdigest()[:32]}.safetensors"

    def lesson(self, id: str) -> Lesson:
        """By the id of one of this corpus's samples. Raises ``ValueError`` naming the file, if it is not what was written."""
        return Lesson(*self._read(id, "tokens", "states"))

    def tokens(self, id: str) -> Tensor:
        """Of a lesson; its states, hundreds of times as many bytes, are not read."""
        return self._read(id, "tokens")[0]

    def _read(self, id: str, *parts: str) -> list[Tensor]:
        name, key, mode = id.rsplit("\n", 2)
        path = self.folder / key
        try:
            with safe_open(path, "pt") as file:
                return [file.get_tensor(f"{mode}.{part}") for part in parts]
        except FileNotFoundError as error:
            cause = f"no lesson of {name}: it is gone, or the sound has changed since it was made"
            raise ValueError(f"{path}: {cause}") from error
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path}: not a lesson ({error}); delete it") from error

    def __len__(self) -> int:
        return len(MODES) * len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        number, mode = divmod(index, len(MODES))
        sample = self.samples[number]
        return replace(sample, id=f"{sample.id}\n{self.path(sample).name}\n{MODES[mode]}")

    def __iter__(self) -> Iterator[Sample]:
        return map(self.__getitem__, range(len(self)))


class LessonReader(ExampleReader):
    """Lessons to examples: what is to be said is what the frozen model said."""

    def __init__(self, tokenizer: Tokenizer, model: ModelConfig, given: ContextSettings, lessons: Lessons) -> None:
        super().__init__(tokenizer, model, ExampleConfig(margin=given.margins, padded=given.padded))
        self._lessons = lessons

    def tokens(self, sample: Sample) -> tuple[list[int], list[int]]:
        start, *text, _ = self._lessons.tokens(sample.id).tolist()
        return [start], text

    def labels(self, prompt: Sequence[int], text: Sequence[int]) -> list[int]:
        return [*text, self._tokenizer.eot]


class Teacher:
    """A model that is not changed any more, and whose lessons are to be made."""

    def __init__(self, decoder: WindowDecoder, lessons: Lessons) -> None:
        self.decoder, self.lessons = decoder, lessons

    @classmethod
    def of(cls, source: str | None, folder: Path, device: torch.device) -> Teacher:
        """A model as it is loaded, frozen; in float32, on a CPU laid out for it."""
        loaded = load_model(source)
        digest = teacher_digest(loaded.config, loaded.state, loaded.generation)
        model = frozen_model(loaded.config, loaded.state)
        network = prepare_for_inference(model) if device.type == "cpu" else model.to(device)
        return cls(WindowDecoder(network, loaded.tokenizer, loaded.generation), Lessons(folder, digest))

    def teach(self, rows: Iterable[Sample | Skipped], limit_mb: int = ContextSettings().limit_mb) -> Lessons:
        """The lessons of all these, made where they are missing. Clips that cannot be read or are too long are left out.

        Raises ``ValueError`` when the folder has more than ``limit_mb``.
        """
        lessons = self.lessons
        lessons.folder.mkdir(parents=True, exist_ok=True)
        used = sum(path.stat().st_size for path in lessons.folder.glob("*.safetensors"))
        missing = self._missing(rows)
        while clips := list(islice(missing, CLIPS_AT_ONCE)):
            used += self._teach(clips)
            if used > limit_mb << 20:
                raise ValueError(
                    f"{lessons.folder}: over its limit of {limit_mb} MB; give it more, empty it, or take fewer clips"
                )
        return lessons

    def _missing(self, rows: Iterable[Sample | Skipped]) -> Iterator[tuple[Sample, NDArray[np.float32]]]:
        """The clips whose lessons have not been made, with their sound; all are noted on the way."""
        for row in rows:
            if isinstance(row, Skipped):
                self.lessons.left_out.append(row)
                continue
            try:
                if not self.lessons.path(row).is_file():
                    yield row, self._sound(row)
                self.lessons.samples.append(row)
            except (MediaError, TooLong) as error:
                self.lessons.left_out.append(left_out(row, error))

    def _sound(self, sample: Sample) -> NDArray[np.float32]:
        assert sample.audio is not None
        clip = sample.audio.read()
        if not len(clip):
            raise MediaError(sample.audio.name, "it holds no sound")
        if len(clip) > round(self.decoder.window_seconds * SAMPLE_RATE):
            raise TooLong(sample.id, f"its sound has {len(clip) / SAMPLE_RATE:.2f} s")
        return clip

    @torch.inference_mode()
    def _teach(self, clips: Sequence[tuple[Sample, NDArray[np.float32]]]) -> int:
        """Decode some clips in every mode; returns the bytes written."""
        decoder, tokenizer = self.decoder, self.decoder.tokenizer
        encoded = decoder.encode([clip for _, clip in clips], FULL_WINDOW)
        lengths = [len(clip) for _, clip in clips]
        kept: list[dict[str, Tensor]] = [{} for _ in clips]
        for mode in MODES:
            options = TranscribeOptions(timestamps=mode == "timestamps", context_margin=FULL_WINDOW)
            results = decoder.open_encoded(encoded, lengths, [None] * len(clips), options, 0.0, FULL_WINDOW).run()
            plain = [] if options.timestamps else [tokenizer.no_timestamps]
            texts = [
                torch.tensor([*tokenizer.sot_sequence(each.language), *plain, *each.hypothesis.tokens, tokenizer.eot])
                for each in results
            ]
            layout, read = Layout(len(text) - 1 for text in texts), torch.cat([text[:-1] for text in texts])
            decoded = decoder.model.decoder(read.to(encoded.states_TD.device), layout, encoded)
            states = torch.stack([*decoded.depths, decoded.states_TD]).half().cpu()
            for tensors, text, rows in zip(kept, texts, layout.slices(), strict=True):
                tensors |= {f"{mode}.tokens": text, f"{mode}.states": states[:, rows].contiguous()}
        written = 0
        for (sample, _), tensors in zip(clips, kept, strict=True):
            with atomic_file(self.lessons.path(sample)) as path:
                written += path.write_bytes(save(tensors))
        return written


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


@dataclass(frozen=True)
class ContextObjective:
    """``states`` × mean square error of all depths, each relative to the teacher's own power there, + ``divergence`` × KL
    of the next token's probabilities; means over decoder tokens."""

    given: ContextSettings
    lessons: Lessons
    head: nn.Module
    """Teacher's states → its logits: the head is not trained, so it is the student's too."""

    def totals(self, packs: Sequence[Pack]) -> Totals:
        return Totals(sum(pack.texts.total for pack in packs), sum(len(pack.ids) for pack in packs))

    def __call__(self, model: nn.Module, packs: Sequence[Pack], totals: Totals, parallel: Parallel) -> Terms:
        packs = [pack.to(parallel.device) for pack in packs]
        output: Output = run_packs(model, packs)
        lessons = [self.lessons.lesson(id).states for pack in packs for id in pack.ids]
        wanted = torch.cat(lessons, dim=1).to(parallel.device).float()
        found = torch.stack([*output.depths, output.states_TD]).float()
        error = relative_error(found, wanted) / totals.tokens
        with torch.no_grad():
            target = self.head(wanted[-1]).float()
        kl = divergence(output.logits, target) / totals.tokens
        loss = self.given.states * error + self.given.divergence * kl
        return Terms(loss, {"states": error.detach(), "divergence": kl.detach()}, torch.zeros(0, 0))


def relative_error(found: Tensor, wanted: Tensor) -> Tensor:
    """[depths, T, D] twice → the sum over tokens of the mean over depths of |found − wanted|² / mean |wanted|²."""
    power = wanted.square().mean(dim=(1, 2), keepdim=True)
    return ((found - wanted).square() / power).mean(dim=(0, 2)).sum()


@dataclass(frozen=True)
class Adapting(Task):
    """Lessons are made first; what is there already is kept."""

    recipe: ContextRecipe

    def learned(self, model: WhisperMoEModel) -> tuple[PackedLoader, ContextObjective]:
        given, config = self.recipe.context, self.initial.config
        if self.parallel.world_size > 1:
            raise RecipeError("context adaptation runs in one process")
        if given.padded and config.core_alone_on_full_windows:
            raise RecipeError(NOTHING_TO_TEACH)
        folder = Path(given.lessons) if given.lessons else self.directory / "lessons"
        teacher = Teacher.of(self.recipe.model.source, folder, self.parallel.device)
        corpora = replace(self, note=lambda skipped: None).opened(self.recipe.data.train)
        rows = (row for corpus in corpora for row in (*corpus.left_out, *items(corpus)))
        lessons = teacher.teach(rows, given.limit_mb)
        corrupt, of = [each for each in lessons.left_out if each.corrupt], len(lessons.samples) + len(lessons.left_out)
        if len(corrupt) > self.recipe.data.loader.max_corrupt_share * of:
            self.note(lessons.left_out)
            first = "; ".join(map(str, corrupt[:NAMED]))
            raise ValueError(f"{len(corrupt)} of {of} clips are corrupt; the first: {first}")
        reader = LessonReader(self.initial.tokenizer, config, given, lessons)
        batches = self.loader([lessons], reader)
        return batches, ContextObjective(given, lessons, model.decoder.head)


if __name__ == "__main__":
    sys.exit(script(ContextRecipe, "Teach a model to hear short clips without padding, from itself."))
