"""A sample becomes an example (what goes into the encoder, what the decoder is to say); examples share packs.

Encoder and decoder tokens of an example count together: a pack of 2,048 tokens holds a full window (1,500) with the
longest transcript (448). torch is imported when the first sound is read, so that a recipe can be checked without it.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from whisper_moe.config import (
    FULL_WINDOW,
    MAX_PACK_TOKENS,
    POSITIONS_PER_SECOND,
    SAMPLE_RATE,
    SAMPLES_PER_POSITION,
    Frozen,
    ModelConfig,
)
from whisper_moe.data.sample import DataError, Sample, TooLong, share_of
from whisper_moe.data.senses import FilmAugmentation, FilmReader, PairReader
from whisper_moe.media.audio import MediaError
from whisper_moe.media.tokenizer import UNSPACED_LANGUAGES, Tokenizer, split_timestamps
from whisper_moe.packing import Layout, first_fit_decreasing

if TYPE_CHECKING:
    import torch
    from torch import Tensor

IGNORED = -100
"""The label of a token after which nothing is to be learned: torch's ``ignore_index``."""


class ExampleConfig(Frozen):
    """How samples are read."""

    margin: float | tuple[float, float] | None = None
    """Seconds of silence kept after each clip, within the 30 s window; 30 pads as Whisper always did. Two numbers: each
    sample gets another margin between them in every epoch, small ones more often. None: from the model's own to 30, so
    that it hears clips as this project gives them and as programs do that pad them all."""
    padded: float = Field(default=0.0, ge=0, le=1)
    """The share of samples that are padded to 30 s instead."""
    leading_space: bool = True
    """Begin the text with a space, as Whisper's own transcripts do in languages that put spaces between words."""
    films: FilmAugmentation | None = None
    """How films are changed in training."""
    empty_text: bool = False
    """Take samples without text (for a teacher to transcribe, or silence); otherwise such a sample counts as corrupt."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        low, high = self.margins(ModelConfig())
        if not 0 <= low <= high <= FULL_WINDOW:
            raise ValueError(f"margin must be within 0 and 30 s, the lower number first; got {self.margin}")
        return self

    def margins(self, model: ModelConfig) -> tuple[float, float]:
        """The least and the most silence for this model."""
        if self.margin is None:
            return model.margin, FULL_WINDOW
        return self.margin if isinstance(self.margin, tuple) else (self.margin, self.margin)


def drawn_margin(margins: tuple[float, float], share: float) -> float:
    """The margin that ``share`` of all draws from this range are below: of the margin with 0.1 s more (a smaller one is no other
    kind of margin), each doubling is as likely as the next."""
    low, high = margins
    scale = low + 0.1
    return low + scale * (((high + 0.1) / scale) ** share - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One segment, ready for the model."""

    id: str
    mel: Tensor
    """[n_mels, frames] float32, two frames a position; of a text int64 [n]; of a film uint8 [t, h, w, P]."""
    valid_length: int
    """Positions of the sound, without the silence kept after it."""
    tokens: tuple[int, ...]
    """[n] what the decoder reads: start, language, task, ``<|notimestamps|>`` unless the text has timestamps, text."""
    labels: tuple[int, ...]
    """[n] what it is to say after each: the next token, at last the end of text; -100 within the prompt, but for a language
    that is to be told (:meth:`ExampleReader.labels`)."""

    @property
    def size(self) -> int:
        """Positions of the encoder and tokens of the decoder together."""
        return encoder_positions(self.mel) + len(self.tokens)


def encoder_positions(part: Tensor) -> int:
    """Of a mel, a text or a film."""
    return part.shape[1] // 2 if part.ndim == 2 else part.shape[:3].numel()


def positions(samples: int, margin: float, limit: int) -> int:
    """Encoder positions of a clip with its margin of silence; the same rule as in transcription."""
    wanted = math.ceil((samples + margin * SAMPLE_RATE) / SAMPLES_PER_POSITION)
    return max(1, min(wanted, limit))


class ExampleReader:
    """Samples to examples, for one model and tokenizer. Loader workers have a copy each."""

    def __init__(self, tokenizer: Tokenizer, model: ModelConfig, config: ExampleConfig) -> None:
        self._tokenizer, self._config = tokenizer, config
        self._n_mels = model.n_mels
        self._senses: dict[str, PairReader | FilmReader] = {}
        if model.senses and model.senses.directions:
            self._senses["translate-text"] = PairReader(tokenizer, model)
        if model.senses and model.senses.film:
            self._senses["sign"] = FilmReader(tokenizer, model, config.films)
        self.margins = config.margins(model)
        """The least and the most silence after a clip."""
        self.padded = config.padded
        self._tells_languages = any(id > tokenizer.timestamp_end for id in tokenizer.languages.values())
        self.max_positions = min(model.max_source_positions, round(FULL_WINDOW * POSITIONS_PER_SECOND))
        self.max_tokens = model.max_target_positions
        if self.max_positions + self.max_tokens > MAX_PACK_TOKENS:
            both = f"the model's longest sound ({self.max_positions}) and text ({self.max_tokens} tokens)"
            raise ValueError(f"{both} do not fit a pack of {MAX_PACK_TOKENS} together")

    def margin_of(self, id: str, seed: int, epoch: int) -> float:
        """Seconds of silence after this sample in this epoch: the same on every machine and in every order."""
        share = (share_of(id, seed, epoch) - self.padded) / (1 - self.padded or 1)
        return FULL_WINDOW if share < 0 else drawn_margin(self.margins, share)

    def tokens(self, sample: Sample) -> tuple[list[int], list[int]]:
        """The prompt and the text's tokens, without the end of text.

        Raises :class:`DataError` for a text that is none, :class:`TooLong` for one over the decoder's positions, and
        ``ValueError`` for what this model has no input or no token for, which is no fault of the sample.
        """
        if sense := self._senses.get(sample.task):
            return sense.tokens(sample)
        if sample.audio is None or sample.task not in ("transcribe", "translate"):
            raise ValueError(f"{sample.id}: the task {sample.task!r} needs an input that this model does not have")
        said = "en" if sample.task == "translate" else sample.language
        if sample.target_language != said:
            task = f"{sample.task} from {sample.language!r}"
            raise ValueError(f"{sample.id}: {task} gives {said!r}, not {sample.target_language!r}")
        prompt = self._tokenizer.sot_sequence(sample.language, sample.task)
        text, timed = self._text(sample)
        if not timed:
            prompt.append(self._tokenizer.no_timestamps)
        if (length := len(prompt) + len(text)) > self.max_tokens:
            raise TooLong(sample.id, f"its text has {length} tokens; the decoder has {self.max_tokens} positions")
        return prompt, text

    def labels(self, prompt: Sequence[int], text: Sequence[int]) -> list[int]:
        """What is to be said after each token of prompt and text; nothing within the prompt.

        A model with languages that Whisper lacks is to say the language, too: it could not be detected otherwise. It is to say
        every language, for one that is never wrong is the answer to all sounds.
        """
        labels = [IGNORED] * (len(prompt) - 1)
        if self._tells_languages:
            labels[0] = prompt[1]
        return [*labels, *text, self._tokenizer.eot]

    def _text(self, sample: Sample) -> tuple[list[int], bool]:
        """Tokens of the text in NFC, and whether timestamps are among them."""
        text = unicodedata.normalize("NFC", sample.text).strip()
        space = " " if self._config.leading_space and sample.target_language not in UNSPACED_LANGUAGES else ""
        ids: list[int] = []
        try:
            stretches, steps = split_timestamps(text)
            for words, step in zip_longest(stretches, steps):
                ids += self._tokenizer.encode(space + words) if words else []
                ids += [] if step is None else [self._tokenizer.timestamp_begin + step]
        except ValueError as error:
            raise DataError(sample.id, str(error), column="text") from error
        if not any(map(str.isalnum, "".join(stretches))):  # dots and dashes are nothing that anybody said
            if not self._config.empty_text:
                raise DataError(sample.id, "it has no text", column="text")
            return [], False
        return ids, bool(steps)

    def measure(self, sample: Sample, seconds: float = math.nan) -> tuple[int, int]:
        """Samples of sound and tokens of text (and those of a film, or a text that is read), without decoding where the corpus or
        the file's header says how long it is.

        ``seconds``: of the sound, where they are known. Raises what :meth:`read` raises.
        """
        prompt, text = self.tokens(sample)
        if sense := self._senses.get(sample.task):
            return 0, sense.size(sample) + len(prompt) + len(text)
        if math.isnan(seconds):
            with suppress(MediaError):  # of some files only decoding tells; what is wrong with others, it says better
                seconds = sample.seconds()
        if not math.isfinite(seconds):
            assert sample.audio is not None
            seconds = len(sample.audio.read()) / SAMPLE_RATE
        samples = round(float(np.float32(seconds)) * SAMPLE_RATE)  # rounded, as runs know them that began long ago
        self._check_length(sample, samples)
        return samples, len(prompt) + len(text)

    def read(self, sample: Sample, margin: float) -> Example:
        """Decode and transform; ``margin``: of what has none, its draw. Raises what :meth:`tokens` raises, and ``MediaError`` or
        :class:`TooLong` for the sound."""
        prompt, text = self.tokens(sample)
        tokens, labels = (*prompt, *text), tuple(self.labels(prompt, text))
        if sense := self._senses.get(sample.task):
            mel = sense.read(sample, margin)
            valid = encoder_positions(mel)
        else:
            from whisper_moe.media.mel import window_mel

            sound = self._sound(sample)
            mel = window_mel(sound, self._n_mels, positions(len(sound), margin, self.max_positions))
            valid = positions(len(sound), 0, self.max_positions)
        return Example(id=sample.id, mel=mel, valid_length=valid, tokens=tokens, labels=labels)

    def _sound(self, sample: Sample) -> NDArray[np.float32]:
        assert sample.audio is not None
        sound = sample.audio.read()
        if not len(sound):
            raise MediaError(sample.audio.name, "it holds no sound")
        self._check_length(sample, len(sound))
        return sound

    def _check_length(self, sample: Sample, samples: int) -> None:
        if samples > self.max_positions * SAMPLES_PER_POSITION:
            window = self.max_positions / POSITIONS_PER_SECOND
            raise TooLong(sample.id, f"its sound has {samples / SAMPLE_RATE:.2f} s; the window has {window:g}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pack:
    """Segments that share a context. All tuples have one entry a segment; flat tensors hold them one after another."""

    ids: tuple[str, ...]
    mels: tuple[Tensor, ...]
    """As :attr:`Example.mel`."""
    valid_lengths: tuple[int, ...]
    """Positions of each sound, without the silence kept after it."""
    tokens_T: Tensor
    """[Σ n] int64, what the decoder reads."""
    labels_T: Tensor
    """[Σ n] int64, the token after each; -100 where nothing is to be learned."""
    texts: Layout
    """Where each segment's tokens lie in ``tokens_T`` and ``labels_T``."""

    @property
    def encoder_tokens(self) -> int:
        return sum(map(encoder_positions, self.mels))

    @property
    def decoder_tokens(self) -> int:
        return self.texts.total

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Pack:
        """The same pack elsewhere; ``dtype`` is that of the mels."""
        return replace(
            self,
            mels=tuple(mel.to(device, dtype if mel.is_floating_point() else None) for mel in self.mels),
            tokens_T=self.tokens_T.to(device),
            labels_T=self.labels_T.to(device),
        )


def pack_examples(examples: Sequence[Example]) -> list[Pack]:
    """The pack that was planned for these examples; more than one if they turned out longer than their corpus said."""
    sizes = [example.size for example in examples]
    fits = sum(sizes) <= MAX_PACK_TOKENS
    groups = first_fit_decreasing(sizes) if not fits else [list(range(len(examples)))] if examples else []
    return [
        Pack(
            ids=tuple(example.id for example in part),
            mels=tuple(example.mel for example in part),
            valid_lengths=tuple(example.valid_length for example in part),
            tokens_T=_flat(example.tokens for example in part),
            labels_T=_flat(example.labels for example in part),
            texts=Layout(len(example.tokens) for example in part),
        )
        for part in ([examples[index] for index in group] for group in groups)
    ]


def _flat(parts: Iterable[Sequence[int]]) -> Tensor:
    import torch

    return torch.tensor([id for part in parts for id in part], dtype=torch.int64)
