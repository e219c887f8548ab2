"""The process that computes: it owns the model, takes requests off a pipe, and sends answers as soon as they are there.

Recordings of all clients are decoded side by side (:mod:`whisper_moe.generate.schedule`); between two steps whatever else was
asked for has its turn, one request at a time.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from whisper_moe.api import WhisperMoE
from whisper_moe.generate.longform import Recording
from whisper_moe.generate.segments import joined, numbered
from whisper_moe.serve.engine import Ask
from whisper_moe.serve.media import begin

logger = logging.getLogger(__name__)

BEAT = 1.0
"""Seconds between two signs of life."""


def work(pipe: Connection, model: dict[str, Any]) -> None:
    """What the process does. ``model``: as :meth:`WhisperMoE.from_pretrained` takes it."""
    begin()
    logging.getLogger("whisper_moe.generate").setLevel(logging.ERROR)  # its warnings quote what clients sent
    try:
        worker = Worker(pipe, WhisperMoE.from_pretrained(**model))
    except ValueError as error:
        pipe.send(("failed", str(error)))
        return
    try:
        worker.run()
    except (EOFError, BrokenPipeError):  # the parent has gone
        return


class Worker:
    """A model, the requests that it computes, and the pipe to who asks."""

    def __init__(self, pipe: Connection, model: WhisperMoE) -> None:
        self._pipe, self._model = pipe, model
        self._schedule = model.schedule()
        self._heard: dict[Recording, tuple[Ask, int]] = {}
        """Recordings under way, with how much of the text has been sent."""
        self._waiting: deque[Ask] = deque()
        self._beaten = 0.0
        self._pipe.send(("ready", self._facts()))

    def _facts(self) -> dict[str, Any]:
        model, config = self._model, self._model.config
        try:
            film = model.senses.senses.config.film
        except ValueError:
            film = None
        moe = config.moe
        experts = [*moe.names, *(["none"] if moe.none_choice else [])] if moe and moe.scope == "segment" else []
        return {"name": model.name, "experts": experts, "film": film}

    def run(self) -> None:
        """Until the parent goes."""
        while True:
            while self._pipe.poll(0 if self._heard or self._waiting else BEAT / 2):
                self._take(*self._pipe.recv())
            self._beat()
            if self._heard:
                self._tick()
            if self._waiting:
                self._compute(self._waiting.popleft())

    def _beat(self) -> None:
        """A sign of life."""
        if time.monotonic() - self._beaten > BEAT:
            self._beaten = time.monotonic()
            self._pipe.send(("alive", len(self._heard) + len(self._waiting)))

    def _tick(self) -> None:
        try:
            complete = self._schedule.tick()
        except Exception as error:  # whose fault it was cannot be told
            for ask, _ in self._heard.values():
                self._answer(ask, error)
            self._heard, self._schedule = {}, self._model.schedule()
            return
        for recording in complete:
            ask, _ = self._heard.pop(recording)
            self._answer(ask, recording.error or recording.result())
        self._send_parts()

    def _take(self, kind: str, what: Any) -> None:
        if kind == "cancel":
            self._waiting = deque(ask for ask in self._waiting if ask.id != what)
            for recording in [each for each, (ask, _) in self._heard.items() if ask.id == what]:
                self._schedule.cancel(recording)
                del self._heard[recording]
        elif time.monotonic() < what.expires:
            self._begin(what)

    def _begin(self, ask: Ask) -> None:
        if ask.task != "transcribe":
            self._waiting.append(ask)
            return
        try:
            recording = self._model.recording(ask.given, **ask.options)
            self._schedule.submit(recording)
        except Exception as error:
            self._answer(ask, error)
            return
        self._heard[recording] = ask, 0

    def _send_parts(self) -> None:
        """What was settled since the last step, to those who want it."""
        for recording, (ask, sent) in self._heard.items():
            if ask.stream and len(recording.segments) > sent:
                self._heard[recording] = ask, len(recording.segments)
                segments = numbered(recording.segments)
                self._pipe.send(("part", ask.id, (joined(segments), segments[sent:])))

    def _compute(self, ask: Ask) -> None:
        if time.monotonic() >= ask.expires:
            return
        try:
            answer = getattr(self, f"_{ask.task}")(ask.given, **ask.options)
        except Exception as error:  # what one request does to us is no reason to lose the others
            answer = error
        self._answer(ask, answer)

    def _answer(self, ask: Ask, answer: Any) -> None:
        if isinstance(answer, ValueError):
            self._pipe.send(("error", ask.id, str(answer)))
        elif isinstance(answer, Exception):
            logger.error("a request for %s failed", ask.task, exc_info=answer)
            self._pipe.send(("fault", ask.id, None))
        else:
            self._pipe.send(("done", ask.id, answer))

    # What is computed one at a time.

    def _speak(self, text: str, **options: Any) -> tuple[np.ndarray, dict[str, Any]]:
        speech = self._model.speak(text, progress=lambda seconds: self._beat(), **options)
        return speech.samples, speech.facts()

    def _translate(self, text: str, **options: Any) -> dict[str, Any]:
        return self._model.translate(text, **options).facts()

    def _sign(self, film: np.ndarray, name: str, language: str | None) -> dict[str, Any]:
        signer = self._model.signer
        job = signer.job_of(film, name, signer.language(language))
        return self._model.senses.run([job])[0].facts()
