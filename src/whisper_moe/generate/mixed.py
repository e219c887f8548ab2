"""Requests of all kinds in one call: sound, texts and films share the encoder's packs, and each gets its own kind of answer.

Sound is heard by the experts that the router chooses, or by none; a text or a film by the expert of its sense: what may answer
goes by the task. So a request's answer is the one that it would have alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from whisper_moe.config import MAX_PACK_TOKENS
from whisper_moe.generate.decode import WindowDecoder
from whisper_moe.generate.result import Outcome, Transcription
from whisper_moe.generate.senses import Asked, Job, SensesDecoder, Written
from whisper_moe.generate.sign import Signed, Signer
from whisper_moe.generate.speech import Speech
from whisper_moe.generate.translate import Translation, Translator
from whisper_moe.media.languages import language_code
from whisper_moe.model.model import Encoded
from whisper_moe.packing import Layout

Answer: TypeAlias = Transcription | Translation | Signed | Speech | ValueError
_INPUTS = {"transcribe": ("audio",), "translate": ("audio", "text"), "sign": ("film",), "speak": ("text",)}


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


class Model(Protocol):
    """What of :class:`whisper_moe.WhisperMoE` answers."""

    @property
    def senses(self) -> SensesDecoder: ...
    @property
    def signer(self) -> Signer: ...
    @property
    def translator(self) -> Translator: ...
    def speak(self, text: str, **options: Any) -> Speech: ...
    def transcribe_each(self, audio: Iterable[Any], **options: Any) -> Iterator[Outcome]: ...


class Accompanied(WindowDecoder):
    """A decoder of sound in whose packs segments of other senses take the room that is left."""

    def __init__(self, like: WindowDecoder, senses: SensesDecoder, asked: Sequence[Asked]) -> None:
        super().__init__(like.model, like.tokenizer, like.generation)
        self._senses, self._asked = senses, asked
        self._waiting = [*range(len(asked))]
        self.written: dict[int, Written] = {}
        """What the segments say that rode along, by their place."""

    def heard(self, mels: Sequence[Tensor], **how: Any) -> Encoded:
        """Encodes sound, and what there is room for beside it, which is then decoded at once."""
        room, riding = MAX_PACK_TOKENS - sum(mel.shape[1] // 2 for mel in mels), list[int]()
        for place in self._waiting:
            if (size := self._asked[place].size) <= room:
                room, riding = room - size, [*riding, place]
        if not riding or any(how[name] is not None for name in ("carry", "routing")):
            return super().heard(mels, **how)
        return self._together(mels, riding, **how)

    def _together(self, mels: Sequence[Tensor], riding: list[int], **how: Any) -> Encoded:
        guests = [self._senses.embedded(self._asked[place]) for place in riding]
        how["valid_lengths"] = [*how["valid_lengths"], *(len(guest.x_ND) for guest in guests)]
        encoded = self.model.encoder([*mels, *guests], **how)
        sound, others = _part(encoded, 0, len(mels)), _part(encoded, len(mels), len(encoded.layout))
        asked = [self._asked[place] for place in riding]
        self.written |= zip(riding, self._senses.decoded(others, asked), strict=True)
        self._waiting = [place for place in self._waiting if place not in riding]
        return sound._replace(senses=None)

    def rest(self) -> None:
        """What found no room, in packs of its own."""
        left, self._waiting = self._waiting, []
        self.written |= zip(left, self._senses.write([self._asked[place] for place in left]), strict=True)


def _part(encoded: Encoded, begin: int, end: int) -> Encoded:
    """Some neighbouring segments of a pack."""
    rows = torch.arange(begin, end, device=encoded.states_TD.device)
    pieces = encoded.states_TD.split(encoded.layout.lengths)[begin:end]
    routing, senses = (choice and choice.rows(rows) for choice in (encoded.routing, encoded.senses))
    return Encoded(torch.cat(pieces), Layout(map(len, pieces)), routing, senses=senses)


def answer(model: Model, hearing: WindowDecoder, requests: Sequence[Request]) -> list[Answer]:
    """See :meth:`WhisperMoE.answer`; ``hearing``: the model's own decoder of sound."""
    found: dict[int, Answer] = {}
    jobs: dict[int, Job] = {}
    sounds: dict[str, list[int]] = {}
    for place, request in enumerate(requests):
        try:
            if request.audio is not None:  # those with the same options are heard together
                sounds.setdefault(repr((request.task, sorted(request.options.items()))), []).append(place)
            elif request.task == "speak":
                found[place] = model.speak(request.text or "", **request.options)
            else:
                jobs[place] = _job(model, request)
        except ValueError as error:
            found[place] = error
    asked = [each for job in jobs.values() for each in job.asked]
    decoder = Accompanied(hearing, model.senses, asked) if asked else None
    for places in sounds.values():
        found |= _heard(model, {place: requests[place] for place in places}, decoder)
    if decoder is not None:
        decoder.rest()
        written = (decoder.written[place] for place in range(len(asked)))
        found |= {place: job.finish([next(written) for _ in job.asked]) for place, job in jobs.items()}
    return [found[place] for place in range(len(requests))]


def _job(model: Model, request: Request) -> Job:
    given = dict(request.options)
    if request.task == "sign":
        code = model.signer.language(given.pop("language", None))
        _none_left(request, given)
        return model.signer.job(request.film, code)
    source, target = (name and language_code(name) for name in (given.pop("source", None), given.pop("target", None)))
    _none_left(request, given)
    return model.translator.job(request.text or "", source=source, target=target)


def _none_left(request: Request, options: Mapping[str, Any]) -> None:
    if options:
        raise ValueError(f"the task {request.task!r} has no option {', '.join(options)}")


def _heard(model: Model, requests: Mapping[int, Request], decoder: WindowDecoder | None) -> dict[int, Answer]:
    """Recordings with the same options."""
    places, (first, *_) = [*requests], requests.values()
    try:
        sounds = [request.audio for request in requests.values()]
        outcomes = model.transcribe_each(sounds, decoder=decoder, **{**first.options, "task": first.task})
        return {places[each.index]: each.transcription or each.error or ValueError(each.name) for each in outcomes}
    except ValueError as error:
        return dict.fromkeys(places, error)
