"""Routes: OpenAI's for sound, and in their manner texts and films."""

from __future__ import annotations

import asyncio
import io
import logging
import re
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterable
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
from fastapi import FastAPI, Request, Response, WebSocket
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from whisper_moe.config import SAMPLE_RATE, problems
from whisper_moe.generate.result import Transcription
from whisper_moe.media.audio import write_audio
from whisper_moe.serve.answers import (
    MEDIA_TYPES,
    SOUND,
    Asked,
    SpeechRequest,
    TextRequest,
    TranscriptionForm,
    TranslationForm,
    event,
    transcript,
    usage_of,
)
from whisper_moe.serve.engine import Engine
from whisper_moe.serve.guard import Guard, Refused
from whisper_moe.serve.live import Session
from whisper_moe.serve.media import Readers, film_of, sound_of

logger = logging.getLogger(__name__)
T = TypeVar("T")
A = TypeVar("A", bound=Asked)

MODEL = "whisper-moe"
ALIASES = frozenset({MODEL, "whisper-1", "tts-1"})
"""Names that clients have by default stand for the one model there is."""
VOICES = frozenset("alloy ash ballad coral echo fable marin cedar nova onyx sage shimmer verse".split())
"""OpenAI's: clients must name one, and this model has its own."""
FIELDS = 64
"""Of a form, at most."""
GONE = 499
"""The status of an answer that nobody waits for."""


class Server:
    """The application and what it is made of."""

    def __init__(self, engine: Engine, keys: Iterable[str] = ()) -> None:
        self.engine, self.limits = engine, engine.limits
        self.readers, self.draining = Readers(engine.limits), False
        self.app = FastAPI(title="Whisper MoE", lifespan=self._lifespan)
        self._registry = CollectorRegistry()
        known: dict[str, Any] = {"registry": self._registry}
        self._answers = Counter("whisper_moe_requests", "Answers by route and status.", ["route", "status"], **known)
        self._seconds = Histogram("whisper_moe_request_seconds", "From request to answer.", ["route"], **known)
        self._sound = Counter("whisper_moe_audio_seconds", "Sound that was read.", **known)
        Gauge("whisper_moe_queue", "Requests that wait or are computed.", **known).set_function(lambda: len(engine))
        Gauge("whisper_moe_restarts", "Processes that were replaced.", **known).set_function(lambda: engine.restarts)
        self._add_routes()
        self.app.add_middleware(Guard, keys=keys, limits=self.limits, told=self._measured)
        for error in (Refused, RequestValidationError, HTTPException, OSError, Exception):
            self.app.add_exception_handler(error, self._failed)

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        await self.engine.start()
        yield
        await self.engine.stop()
        self.readers.close()

    def _add_routes(self) -> None:
        def form(model: type[Asked]) -> dict[str, Any]:
            schema = model.model_json_schema()
            schema["properties"]["file"] = {"type": "string", "format": "binary"}
            schema["required"] = [*schema.get("required", ()), "file"]
            return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}

        add = self.app.add_api_route
        add("/healthz", self.health, methods=["GET"])
        add("/readyz", self.ready, methods=["GET"])
        add("/metrics", self.metrics, methods=["GET"])
        add("/v1/models", self.models, methods=["GET"])
        add("/v1/models/{model}", self.model, methods=["GET"])
        add("/v1/audio/transcriptions", self.transcribe, methods=["POST"], openapi_extra=form(TranscriptionForm))
        add("/v1/audio/translations", self.translate_sound, methods=["POST"], openapi_extra=form(TranslationForm))
        add("/v1/audio/speech", self.speak, methods=["POST"])
        self.app.add_api_websocket_route("/v1/realtime", self.realtime)
        add("/v1/text/translations", self.translate_text, methods=["POST"])
        add("/v1/video/sign", self.sign, methods=["POST"], openapi_extra=form(SignForm))

    # What is said of the server itself.

    async def health(self) -> dict[str, str]:
        return {"status": "ok"}

    async def ready(self) -> Response:
        ready = self.engine.facts is not None and not self.draining
        return JSONResponse({"status": "ready" if ready else "not ready"}, 200 if ready else 503)

    async def metrics(self) -> Response:
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)

    async def models(self) -> dict[str, Any]:
        """The model, and each of its experts: naming one forces it."""
        return {"object": "list", "data": [_entry(name) for name in (MODEL, *self._experts)]}

    async def model(self, model: str) -> dict[str, Any]:
        self._forced(model)
        return _entry(model)

    @property
    def _experts(self) -> list[str]:
        return (self.engine.facts or {}).get("experts", [])

    def _forced(self, name: str) -> list[str]:
        """The experts that a model's name leaves. Raises ``Refused`` for an unknown name."""
        if name in ALIASES:
            return []
        if name not in self._experts:
            raise Refused(404, f"there is no model {name!r}", "model", "model_not_found")
        return [name]

    # Sound in.

    async def transcribe(self, request: Request) -> Response:
        """What is said, in its language."""
        return await self._heard(request, TranscriptionForm)

    async def translate_sound(self, request: Request) -> Response:
        """What is said, in English."""
        return await self._heard(request, TranslationForm)

    async def _heard(self, request: Request, kind: type[TranslationForm]) -> Response:
        asked, content, name = await self._uploaded(request, kind)
        streams = isinstance(asked, TranscriptionForm) and asked.stream
        parts = self._parts(content, name, streams, asked.options(self._forced(asked.model)))
        # An error before anything was said has a status of its own.
        first = await self._unless_gone(request, anext(parts))
        if streams:
            return StreamingResponse(_events(first, parts), media_type="text/event-stream")
        await parts.aclose()
        return Response(transcript(first, asked), media_type=MEDIA_TYPES[asked.response_format])

    async def _parts(self, content: bytes, name: str, streams: bool, options: dict[str, Any]) -> AsyncGenerator[Any]:
        """Of a transcript, as it grows; the whole one last."""
        expires = self._expires()
        samples, notes = await self.readers.read(sound_of, content, name, expires=expires)
        self._sound.inc(len(samples) / SAMPLE_RATE)
        stream = self.engine.stream("transcribe", samples, expires=expires, parts=streams, **options)
        async with aclosing(stream) as answers:
            async for answer in answers:
                whole = isinstance(answer, Transcription)
                yield replace(answer, notes=(*answer.notes, *notes)) if whole else answer

    async def realtime(self, socket: WebSocket) -> None:
        """Captions while somebody speaks."""
        await Session(socket, self.engine).run()

    # Sound out.

    async def speak(self, request: Request, asked: SpeechRequest) -> Response:
        """A text read aloud; ``pcm`` is 16-bit, mono, at 16 kHz."""
        self._forced(asked.model)
        self._short(asked.input)
        voice = asked.voice.get("id") if isinstance(asked.voice, dict) else asked.voice
        how = {"voice": None if voice in VOICES else voice, "language": asked.language, "rate": asked.speed}
        samples, facts = await self._ask(request, "speak", asked.input, **how)
        content = await asyncio.to_thread(_written, samples, asked.response_format)
        facts = {"x-voice": facts["voice"], "x-language": facts["language"]}
        return Response(content, media_type=SOUND[asked.response_format], headers=facts)

    # Texts and films.

    async def translate_text(self, request: Request, asked: TextRequest) -> dict[str, Any]:
        """A text in another language."""
        self._forced(asked.model)
        self._short(asked.input)
        how = {"source": asked.source, "target": asked.target}
        return await self._ask(request, "translate", asked.input, **how)

    async def sign(self, request: Request) -> dict[str, Any]:
        """What is signed in a film."""
        asked, content, name = await self._uploaded(request, SignForm)
        self._forced(asked.model)
        film, expires = (self.engine.facts or {}).get("film"), self._expires()
        if film is None:
            raise Refused(400, "this model sees no films", code="no_film")

        async def signed() -> dict[str, Any]:
            tubelets = await self.readers.read(film_of, content, name, film, expires=expires)
            return await self.engine.ask("sign", tubelets, expires=expires, name=name, language=asked.language)

        return await self._unless_gone(request, signed())

    # What all of them need.

    def _expires(self) -> float:
        return time.monotonic() + self.limits.deadline

    def _short(self, text: str) -> None:
        if len(text) > self.limits.text:
            raise Refused(413, f"a text of {len(text):,} characters; at most {self.limits.text:,}", "input", "too_long")

    async def _uploaded(self, request: Request, kind: type[A]) -> tuple[A, bytes, str]:
        """The fields of a form, and its file with what it is called in messages."""
        if self.draining:
            raise Refused(503, "not ready; try again in a few seconds", code="not_ready")
        self.engine.admit()
        if re.search(r"charset\s*=(?!\s*\"?utf-?8\b)", request.headers.get("content-type", ""), re.I):
            raise Refused(400, "a form is read in UTF-8 alone", code="form")
        try:
            async with request.form(max_files=2, max_fields=FIELDS, max_part_size=1 << 20) as form:
                fields, file = _fields(form)
                asked = kind.model_validate(fields)
                return asked, await file.read(), (file.filename or "file")[-80:].rpartition("/")[2]
        except HTTPException as error:  # what is wrong with the form
            raise Refused(413 if "Too many" in error.detail else 400, error.detail, code="form") from None
        except ValidationError as error:
            raise Refused(400, problems(error), str(error.errors()[0]["loc"][0]), "invalid_value") from None

    async def _ask(self, request: Request, task: str, given: Any, /, **how: Any) -> Any:
        """The model's answer."""
        return await self._unless_gone(request, self.engine.ask(task, given, expires=self._expires(), **how))

    async def _unless_gone(self, request: Request, answer: Awaitable[T]) -> T:
        """The answer; where the client hangs up before it, it is cancelled."""

        async def gone() -> None:
            while not await request.is_disconnected():
                await asyncio.sleep(0.2)

        waiting, watching = asyncio.ensure_future(answer), asyncio.create_task(gone())
        try:
            await asyncio.wait({waiting, watching}, return_when=asyncio.FIRST_COMPLETED)
            if waiting.done():
                return waiting.result()
            raise Refused(GONE, "the client has gone")
        finally:
            waiting.cancel()
            watching.cancel()

    def _measured(self, route: str, status: int, seconds: float) -> None:
        self._answers.labels(route, status).inc()
        self._seconds.labels(route).observe(seconds)

    async def _failed(self, request: Request, error: Exception) -> Response:
        """Every error as one JSON object; what is nobody's business is a number in the log."""
        if isinstance(error, Refused):
            refused = error
        elif isinstance(error, RequestValidationError):
            place = [str(part) for part in error.errors()[0]["loc"][1:]]
            refused = Refused(400, f"{'.'.join(place)}: {error.errors()[0]['msg']}", ".".join(place), "invalid_value")
        elif isinstance(error, HTTPException):
            refused = Refused(error.status_code, str(error.detail))
        elif isinstance(error, OSError) and error.errno == 28:
            refused = Refused(507, "no room to keep the request", code="disk_full")
        else:
            number = uuid.uuid4().hex
            logger.error("request %s failed", number, exc_info=error)
            refused = Refused(500, f"something went wrong here; its number is {number}", code="internal")
        more = {"retry-after": "2"} if refused.status in (429, 503) else None
        return JSONResponse(refused.body, refused.status, headers=more)


class SignForm(Asked):
    """Fields of ``/v1/video/sign``, beside its ``file``."""

    language: str | None = None


def _entry(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": MODEL}


def _fields(form: FormData) -> tuple[dict[str, Any], UploadFile]:
    """Fields by name, of several of one name a list; and the one file."""
    files = [value for value in form.getlist("file") if isinstance(value, UploadFile)]
    if len(files) != 1:
        raise Refused(400, f"one file is wanted, got {len(files)}", "file", "invalid_value")
    names = {name: [each for each in form.getlist(name) if isinstance(each, str)] for name in form if name != "file"}
    return {name: values if len(values) > 1 else values[0] for name, values in names.items() if values}, files[0]


async def _events(first: Any, parts: AsyncIterator[Any]) -> AsyncIterator[str]:
    """The text as it grows, then the whole; beside OpenAI's keys the segments, and who answered them."""
    said, sent, answer = "", 0, first
    while not isinstance(answer, Transcription):
        text, segments = answer
        yield event("transcript.text.delta", delta=text[len(said) :], segments=[each.to_dict() for each in segments])
        said, sent = text, sent + len(segments)
        try:
            answer = await anext(parts)
        except Refused as refused:
            yield event("error", **refused.body)
            return
    if len(answer.segments) > sent:
        segments = [each.to_dict() for each in answer.segments[sent:]]
        yield event("transcript.text.delta", delta=answer.text[len(said) :], segments=segments)
    yield event("transcript.text.done", text=answer.text, language=answer.language, usage=usage_of(answer))


def _written(samples: np.ndarray, kind: str) -> bytes:
    if kind == "pcm":
        return (samples.clip(-1, 1) * 32_767).astype("<i2").tobytes()
    content = io.BytesIO()
    write_audio(content, samples, ".m4a" if kind == "aac" else f".{kind}")
    return content.getvalue()
