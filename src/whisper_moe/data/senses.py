"""What is read or seen, and not heard: a text and its translation, or a film and its text, become what the encoder reads and
what the decoder is to say. In training films are changed anew each time.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from math import exp, log
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from whisper_moe.config import Frozen, ModelConfig
from whisper_moe.config_aside import SIGNS
from whisper_moe.data.sample import DataError, Sample, TooLong
from whisper_moe.media.tokenizer import Pieces, Tokenizer
from whisper_moe.media.video import Frames, film_tokens, load_film, tubelets

if TYPE_CHECKING:
    from torch import Tensor


def encoded(sample: Sample, text: str | None, column: str, encode: Callable[[str], list[int]]) -> list[int]:
    """Tokens of a text in NFC, with single spaces. Raises :class:`DataError` for one that is none."""
    said = " ".join(unicodedata.normalize("NFC", text or "").split())
    if not said:
        raise DataError(sample.id, "it has no text", column=column)
    try:
        return encode(said)
    except ValueError as error:
        raise DataError(sample.id, str(error), column=column) from error


class PairReader:
    """Samples of the task ``translate-text``, for a model that reads texts."""

    def __init__(self, tokenizer: Tokenizer, model: ModelConfig) -> None:
        assert model.senses is not None
        self._pieces = Pieces(tokenizer, model.senses.tokens, model.vocab_size)
        self._directions = model.senses.directions
        self._limits = model.max_source_positions, model.max_target_positions

    def tokens(self, sample: Sample) -> tuple[list[int], list[int]]:
        """The prompt, and the tokens of the text, in NFC with single spaces.

        Raises :class:`DataError` for one that is none, :class:`TooLong` for one over the model's positions, and ``ValueError``
        for a direction that the model is not for.
        """
        direction = sample.language, sample.target_language
        if direction not in self._directions:
            known = ", ".join(">".join(each) for each in self._directions)
            raise ValueError(f"{sample.id}: the model translates {known}, not {'>'.join(direction)}")
        source, prompt = self._source(sample), self._pieces.opening(sample.target_language)
        text = encoded(sample, sample.text, "text", lambda said: self._pieces.encode(f" {said}"))
        for name, length, most in zip(
            ("source", "text"), (len(source), len(prompt) + len(text)), self._limits, strict=True
        ):
            if length > most:
                raise TooLong(sample.id, f"its {name} has {length} tokens; there are {most} positions")
        return prompt, text

    def size(self, sample: Sample) -> int:
        """Tokens that the encoder reads."""
        return len(self._source(sample))

    def read(self, sample: Sample, draw: float) -> Tensor:
        """What the encoder reads, int64 [n]."""
        import torch

        return torch.tensor(self._source(sample))

    def _source(self, sample: Sample) -> list[int]:
        return encoded(
            sample, sample.source_text, "source_text", lambda said: self._pieces.source(said, sample.language)
        )


class FilmAugmentation(Frozen):
    """How films differ from epoch to epoch; a film is never mirrored, for many signs are another one then."""

    crop: float = Field(default=0.15, ge=0, le=0.5)
    """How much closer or farther, and, half as much, to each side: a share of the picture."""
    rotation: float = Field(default=6.0, ge=0, le=45)
    """Degrees to each side."""
    speed: float = Field(default=0.25, ge=0, le=1)
    """How much faster or slower."""
    colour: float = Field(default=0.25, ge=0, le=1)
    """How much each colour is stronger or weaker, and all lighter or darker."""
    memory: int = Field(default=1_024, ge=0)
    """MiB of decoded films that each worker keeps for the next epochs: decoding is most of what reading a film costs."""


class FilmReader:
    """Samples of the task ``sign``, for a model that sees films."""

    def __init__(self, tokenizer: Tokenizer, model: ModelConfig, augmentation: FilmAugmentation | None) -> None:
        assert model.senses is not None and model.senses.film is not None
        self._pieces = Pieces(tokenizer, model.senses.tokens, model.vocab_size)
        self._film, self._signs, self._most = model.senses.film, model.senses.signs, model.max_target_positions
        self._augmentation = augmentation
        self._decoded, self._room = dict[str, Frames](), augmentation.memory << 20 if augmentation else 0

    def tokens(self, sample: Sample) -> tuple[list[int], list[int]]:
        """The prompt and the text's tokens.

        Raises :class:`DataError` for a text that is none, :class:`TooLong` for one over the decoder's positions, and
        ``ValueError`` for a sign language that the model is not for.
        """
        if sample.language not in self._signs:
            raise ValueError(f"{sample.id}: the model sees {', '.join(self._signs)}, not {sample.language!r}")
        if sample.target_language != "en":
            raise ValueError(f"{sample.id}: of signs the model writes English, not {sample.target_language!r}")
        prompt = self._pieces.opening("en", SIGNS[sample.language])
        text = encoded(sample, sample.text, "text", lambda said: self._pieces.encode(f" {said}"))
        if len(prompt) + len(text) > self._most:
            raise TooLong(sample.id, f"its text has {len(text)} tokens; the decoder has {self._most} positions")
        return prompt, text

    def size(self, sample: Sample) -> int:
        """Tubelets, as the film's header states, and at its slowest where it is changed. Raises ``MediaError``."""
        slower = 1 + self._augmentation.speed if self._augmentation else 1.0
        return film_tokens(_path(sample), self._film.model_copy(update={"rate": self._film.rate * slower}))

    def read(self, sample: Sample, draw: float) -> Tensor:
        """The film, uint8 [t, h, w, P]; ``draw``, from 0 up to 1, says how it is changed. Raises ``MediaError``."""
        import torch

        frames = self._frames(_path(sample))
        if self._augmentation is not None:
            frames = augmented(frames, self._augmentation, np.random.default_rng(round(draw * 2**53)))
        return torch.from_numpy(tubelets(frames, self._film))

    def _frames(self, path: str) -> Frames:
        if (kept := self._decoded.get(path)) is not None:
            return kept
        frames = load_film(path, self._film)
        if frames.nbytes <= self._room:
            self._room -= frames.nbytes
            self._decoded[path] = frames
        return frames


def _path(sample: Sample) -> str:
    if sample.video is None:
        raise DataError(sample.id, "it has no film", column="video")
    return sample.video


def augmented(frames: Frames, given: FilmAugmentation, random: np.random.Generator) -> Frames:
    """Pictures [frames, height, width, 3] at another speed, from another place, at an angle, in other colours."""
    import torch
    import torch.nn.functional as F

    faster = exp(random.uniform(-1, 1) * log(1 + given.speed))
    count = max(1, round(len(frames) / faster))
    frames = frames[np.minimum((np.arange(count) * faster).astype(int), len(frames) - 1)]
    pictures = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
    height, width = pictures.shape[2:]
    angle = np.deg2rad(random.uniform(-1, 1) * given.rotation)
    zoom = exp(random.uniform(-1, 1) * log(1 + given.crop))
    right, down = random.uniform(-1, 1, 2) * given.crop
    sine, cosine = zoom * np.sin(angle), zoom * np.cos(angle)
    affine = torch.tensor([[cosine, -sine * height / width, right], [sine * width / height, cosine, down]]).float()
    where = F.affine_grid(affine.expand(count, 2, 3), list(pictures.shape), align_corners=False)
    pictures = F.grid_sample(pictures, where, padding_mode="border", align_corners=False)
    gain = torch.from_numpy(np.exp(random.uniform(-1, 1, 3) * log(1 + given.colour))).float()
    light = 128 * random.uniform(-1, 1) * given.colour
    pictures = pictures * gain[:, None, None] + light
    return pictures.round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
