"""What configurations and recipes are built of; and those of what is read when it is first needed: speaking, and the senses
beside hearing."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails


def problems(error: ValidationError) -> str:
    """Pydantic's findings in one line: ``moe.top_k: Input should be a valid integer, got 'two'``."""
    return "; ".join(": ".join([*filter(None, [".".join(map(str, e["loc"]))]), _problem(e)]) for e in error.errors())


def _problem(found: ErrorDetails) -> str:
    given = found["input"]
    value = f", got {given!r}" if found["type"] != "value_error" and isinstance(given, (str, int, float)) else ""
    return found["msg"].removeprefix("Value error, ") + value


class Frozen(BaseModel):
    """Keyword-only, immutable, and strict about unknown keys: a typing mistake in a file is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Strict(Frozen):
    """Values are of the very type that is asked for."""

    model_config = ConfigDict(strict=True)


class VoiceConfig(Frozen):
    """A voice that can be asked for."""

    name: str
    language: str
    """Code of what it reads where nothing is said of the language."""


class SpeechConfig(Frozen):
    """Text in, speech out: letters → phonemes → mel frames → samples (:mod:`whisper_moe.model.speech`)."""

    letters: str
    """What text is read by, a character each; others are passed over."""
    phonemes: str
    """A character each; the first stands for the pauses at both ends."""
    languages: tuple[Literal["en", "hi"], ...]
    voices: tuple[VoiceConfig, ...]
    d_model: int = Field(default=256, ge=4, multiple_of=2)
    heads: int = Field(default=4, ge=1)
    ffn_dim: int = Field(default=768, ge=1)
    reader_layers: int = Field(default=3, ge=1)
    """Blocks from letters to phonemes."""
    encoder_layers: int = Field(default=4, ge=1)
    """Blocks that read the phonemes."""
    decoder_layers: int = Field(default=4, ge=1)
    """Blocks that make mel frames of them."""
    decoder: Literal["parallel"] = "parallel"
    """Files say which; there was another, which did not learn to speak."""
    reduction: Literal[2] = 2
    """Of that other one."""
    kernel_size: int = Field(default=9, ge=1, le=255)
    """Of convolutions: symbols, or positions of 20 ms."""
    vocoder_dim: int = Field(default=256, ge=1)
    vocoder_hidden: int = Field(default=768, ge=1)
    vocoder_layers: int = Field(default=8, ge=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.d_model % self.heads or self.d_model % 2:
            raise ValueError(f"d_model ({self.d_model}) must be even and a multiple of heads ({self.heads})")
        for name in ("letters", "phonemes", "languages"):
            values: tuple[str, ...] = tuple(getattr(self, name))
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must be different ones, got {values}")
        if " " not in self.phonemes[1:]:
            raise ValueError("phonemes need a space, after the one for the pauses at both ends")
        names = [voice.name for voice in self.voices]
        strangers = [voice.name for voice in self.voices if voice.language not in self.languages]
        if not names or len(set(names)) < len(names) or strangers:
            raise ValueError(
                f"voices must be different ones, each of a language that is spoken, got {strangers or names}"
            )
        return self


TEXT = "<|text|>"
"""The task of writing what a text says in another language."""
SIGNS = {"sgn": "<|sign|>", "ins": "<|isl|>", "ase": "<|asl|>"}
"""… and what signs say: of a language that nobody has stated, of Indian and of American Sign Language (ISO 639-3)."""


class FilmConfig(Frozen):
    """How a film becomes tokens: tubelets (ViViT, arXiv 2103.15691) of pictures in their own proportions (NaViT, 2307.06304)."""

    rate: float = Field(default=8.0, gt=0, le=60)
    """Pictures a second; fewer of a film that has more than ``tokens``."""
    frames: int = Field(default=4, ge=1, le=16)
    """Pictures in a tubelet."""
    patch: int = Field(default=32, ge=4, le=256, multiple_of=4)
    """Pixels of its side, of which four cells are looked at."""
    patches: int = Field(default=24, ge=1, le=1_024)
    """The most that a picture is cut into."""
    tokens: int = Field(default=960, ge=1, le=1_500)
    """The most of a film, whatever it lasts."""

    @property
    def slots(self) -> int:
        """The most tubelets one after another."""
        return max(1, self.tokens // self.patches)


class SensesConfig(Frozen):
    """Senses beside hearing, by the shared encoder and decoder (:mod:`whisper_moe.model.senses`)."""

    tokens: tuple[str, ...]
    """Behind the model's own: control tokens such as ``<|text|>``, and pieces of text (:mod:`whisper_moe.media.tokenizer`)."""
    directions: tuple[tuple[str, str], ...] = ()
    """Languages that texts are translated from and to."""
    signs: tuple[str, ...] = ()
    """Sign languages that films were learned in, by code (``ins``, ``ase``); ``sgn`` where the data does not say which."""
    film: FilmConfig | None = None
    rank: int = Field(default=48, ge=1)
    """Of the differences of each sense's expert from the core."""
    experts: tuple[Literal["translate", "sign"], ...] = ("translate",)
    """The senses' experts, behind those of sound."""
    routed: bool = False
    """A joint model: the router also chooses for texts and films, among the experts of sound, which then learn from them all."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("tokens", "experts"):
            values: tuple[str, ...] = getattr(self, name)
            if not values or len(set(values)) < len(values) or "" in values:
                raise ValueError(f"{name} must be different ones, got {len(values)}")
        if strangers := [code for code in self.signs if code not in SIGNS]:
            raise ValueError(f"signs are {', '.join(SIGNS)}, got {', '.join(strangers)}")
        needed = {"translate": [TEXT] * bool(self.directions), "sign": [SIGNS[code] for code in self.signs]}
        for expert, tokens in needed.items():
            if (expert in self.experts) != bool(tokens) or not {*tokens} <= {*self.tokens}:
                raise ValueError(
                    f"the expert {expert!r} needs directions or signs, and their tokens {' '.join(tokens)}"
                )
        if (self.film is None) != (not self.signs):
            raise ValueError("signs need film, and film signs")
        return self


ASIDE = ("speech", "senses")
"""Parts of a model that are read when they are first needed."""
