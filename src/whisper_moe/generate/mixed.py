"""Requests of all kinds in one call: sound, texts and films share the encoder's packs, and each gets its own kind of answer.

Sound is heard by the experts that the router chooses, or by none; a text or a film by the expert of its sense (in a joint model
by the router's choice, too): what may answer goes by the task. So a request's answer is the one that it would have alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeAlias

import numpy as np
from torch import Tensor

from whisper_moe.config import MAX_PACK_TOKENS
from whisper_moe.generate.decode import WindowDecoder
from whisper_moe.generate.options import TranscribeOptions
from whisper_moe.generate.result import Outcome, Transcription
from whisper_moe.generate.senses import (
    TOGETHER,
    Asked,
    Job,
    SensesDecoder,
    Signed,
    Signer,
    Translation,
    Translator,
    Written,
)
from whisper_moe.generate.speech import Speech
from whisper_moe.media.languages import language_code
from whisper_moe.model.block import Encoded

Answer: TypeAlias = Transcription | Translation | Signed | Speech | ValueError
_INPUTS = {"transcribe": ("audio",), "translate": ("audio", "text"), "sign": ("film",), "speak": ("text",)}
_OPTIONS = {
    "transcribe": {each.name for each in fields(TranscribeOptions)} - {"task"},
    "translate": {"source", "target"},
    "sign": {"language"},
    "speak": {"voice", "language", "rate"},
}


@dataclass(frozen=True, kw_only=True)
class Request:
    """One thing to be done with one input."""

    task: Literal["transcribe", "translate", "sign", "speak"]
    """``translate``: of a text into any language that the model translates to, of a recording into English."""
    audio: Any = None
    """As :meth:`WhisperMoE.transcribe` takes it."""
    text: str | None = None
    film: Any = None
    """As :meth:`WhisperMoE.sign` takes it."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the model's method for the task."""

    def __post_init__(self) -> None:
        if self.task not in _INPUTS:
            raise ValueError(f"task must be one of {', '.join(_INPUTS)}, got {self.task!r}")
        given = [name for name in ("audio", "text", "film") if getattr(self, name) is not None]
        if len(given) != 1 or given[0] not in _INPUTS[self.task]:
            wanted = " or ".join(_INPUTS[self.task])
            raise ValueError(f"the task {self.task!r} needs {wanted}, got {' and '.join(given) or 'nothing'}")
        given_as = getattr(self, given[0])
        kinds = {"audio": (str, os.PathLike, np.ndarray), "text": str, "film": (str, os.PathLike)}[given[0]]
        if not isinstance(given_as, kinds) and not (given[0] != "text" and hasattr(given_as, "read")):
            raise ValueError(f"{given[0]} is not to be given as {type(given_as).__name__}")
        known = _OPTIONS["transcribe" if given[0] == "audio" else self.task]
        if strangers := [name for name in self.options if name not in known]:
            raise ValueError(f"the task {self.task!r} has no option {', '.join(strangers)}")
        names = ("language", "source", "target", "voice")
        if odd := [name for name in names if not isinstance(self.options.get(name), str | None)]:
            raise ValueError(f"{', '.join(odd)}: a name is wanted, got {self.options[odd[0]]!r}")


class Accompanied(WindowDecoder):
    """A decoder of sound in whose packs segments of other senses take the room that is left."""

    def __init__(self, like: WindowDecoder, senses: SensesDecoder, asked: Sequence[Asked]) -> None:
        super().__init__(like.model, like.tokenizer, like.generation)
        self._senses, self._asked = senses, asked
        self._written: dict[int, Written] = {}
        """What the segments say that rode along, by their place."""

    def heard(self, mels: Sequence[Tensor], **how: Any) -> Encoded:
        """Encodes sound, and what there is room for beside it, which is then decoded at once."""
        room, riding = MAX_PACK_TOKENS - sum(mel.shape[1] // 2 for mel in mels), list[int]()
        for place in self._waiting:
            if (size := self._asked[place].size) <= room and len(riding) < TOGETHER:
                room, riding = room - size, [*riding, place]
        # What is said of the experts of sound is not said of others.
        if not riding or any(how[name] is not None for name in ("carry", "routing", "allowed")):
            return super().heard(mels, **how)
        asked = [self._asked[place] for place in riding]
        guests = [self._senses.embedded(each) for each in asked]
        how["valid_lengths"] = [*how["valid_lengths"], *(len(guest.x_ND) for guest in guests)]
        encoded = self.model.encoder([*mels, *guests], **how)
        sound, others = (encoded.segments(part) for part in (range(len(mels)), range(len(mels), len(encoded.layout))))
        self._written |= zip(riding, self._senses.decoded(others, asked), strict=True)
        return sound._replace(senses=None)

    def written(self) -> list[Written]:
        """What each segment says; those that found no room go into packs of their own."""
        left = self._waiting
        self._written |= zip(left, self._senses.write([self._asked[place] for place in left]), strict=True)
        return [self._written[place] for place in range(len(self._asked))]

    @property
    def _waiting(self) -> list[int]:
        return [place for place in range(len(self._asked)) if place not in self._written]


def answer(
    requests: Sequence[Request],
    hearing: WindowDecoder,
    transcribe_each: Callable[..., Iterator[Outcome]],
    speak: Callable[..., Speech],
    senses: Callable[[], SensesDecoder],
) -> list[Answer]:
    """See :meth:`WhisperMoE.answer`. ``senses``: raises ``ValueError`` for a model that only hears."""
    found: dict[int, Answer] = {}
    jobs: dict[int, Job] = {}
    sounds: dict[str, list[int]] = {}
    for place, request in enumerate(requests):
        try:
            if request.audio is not None:  # those with the same options are heard together
                sounds.setdefault(repr((request.task, sorted(request.options.items()))), []).append(place)
            elif request.task == "speak":
                found[place] = speak(request.text or "", **request.options)
            else:
                jobs[place] = _job(senses(), request)
        except ValueError as error:
            found[place] = error
    asked = [each for job in jobs.values() for each in job.asked]
    decoder = Accompanied(hearing, senses(), asked) if asked else None
    for places in sounds.values():
        found |= _heard(transcribe_each, {place: requests[place] for place in places}, decoder)
    if decoder is not None:
        written = iter(decoder.written())
        found |= {place: job.finish([next(written) for _ in job.asked]) for place, job in jobs.items()}
    return [found[place] for place in range(len(requests))]


def _job(senses: SensesDecoder, request: Request) -> Job:
    if request.task == "sign":
        signer = Signer(senses)
        return signer.job(request.film, signer.language(request.options.get("language")))
    asked = {name: language_code(said) for name, said in request.options.items() if said}
    return Translator(senses).job(request.text or "", **asked)


def _heard(
    transcribe_each: Callable[..., Iterator[Outcome]], requests: Mapping[int, Request], decoder: WindowDecoder | None
) -> dict[int, Answer]:
    """Recordings with the same options."""
    places, (first, *_) = [*requests], requests.values()
    found: dict[int, Answer] = {}
    try:
        sounds = [request.audio for request in requests.values()]
        for each in transcribe_each(sounds, decoder=decoder, **{**first.options, "task": first.task}):
            found[places[each.index]] = each.transcription or each.error or ValueError(each.name)
    except ValueError as error:
        found |= {place: error for place in places if place not in found}
    return found
