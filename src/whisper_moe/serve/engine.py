"""The parent's side of the process that computes: requests in, answers out; a process that dies or stands still is replaced."""

from __future__ import annotations

import asyncio
import itertools
import logging
import queue
import threading
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from whisper_moe.serve.guard import Limits, Refused

logger = logging.getLogger(__name__)

CRASHES, LIVED = 3, 60.0
"""So many ends of the process, each before it had lived for so many seconds, are a loop: the server gives up."""
LOADING = 600.0
"""Seconds in which a model must be loaded."""
HELD = 1 << 30
"""Bytes of sound that wait or are computed."""
WATCH = 0.2
"""Seconds between two looks at whether the process is alive."""


@dataclass(frozen=True)
class Ask:
    """A request on its way to the model."""

    id: int
    task: str
    given: Any
    """Samples, a text, or a film's tubelets."""
    options: dict[str, Any] = field(default_factory=dict)
    expires: float = float("inf")
    """On the machine's monotonic clock."""
    stream: bool = False
    """Whether parts of the answer are wanted as they come."""


def _work(pipe: Connection, model: dict[str, Any]) -> None:
    """In a process of its own: there, and only there, torch is imported."""
    from whisper_moe.serve.worker import work

    work(pipe, model)


@dataclass(eq=False)
class _Pending:
    """A request that has no answer yet."""

    size: int
    answers: asyncio.Queue[tuple[str, Any]] = field(default_factory=asyncio.Queue)


class Engine:
    """Asks the model, in a process of its own."""

    def __init__(self, model: dict[str, Any], limits: Limits) -> None:
        """``model``: as :meth:`WhisperMoE.from_pretrained` takes it."""
        self.model, self.limits = model, limits
        self.facts: dict[str, Any] | None = None
        """Of the model that is loaded; None while there is none."""
        self.restarts, self.broken = 0, asyncio.Event()
        """``broken``: the process ends again and again, or the model cannot be loaded."""
        self._ids, self._pending = itertools.count(1), dict[int, _Pending]()
        self._crashes, self._ready = 0, 0.0
        self._outgoing: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def __len__(self) -> int:
        """Requests that wait or are computed."""
        return len(self._pending)

    async def start(self) -> None:
        """Returns at once; :attr:`facts` are there when the model is loaded."""
        self._loop = asyncio.get_running_loop()
        self._spawn()
        self._watching = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        self._watching.cancel()
        self._process.kill()

    def _spawn(self) -> None:
        ours, theirs = get_context("spawn").Pipe()
        self._process = get_context("spawn").Process(target=_work, args=(theirs, self.model), daemon=True)
        self._process.start()
        theirs.close()
        self.facts, self._alive, self._outgoing = None, time.monotonic(), queue.SimpleQueue()
        for target, args in (
            (self._listen, (ours, self._process)),
            (self._send, (ours, self._outgoing, self._process)),
        ):
            threading.Thread(target=target, args=args, daemon=True).start()

    @staticmethod
    def _send(pipe: Any, outgoing: queue.SimpleQueue[Any], process: Any) -> None:
        """In a thread, since a process that stands still does not empty its pipe."""
        while (message := outgoing.get()) is not None:
            try:
                pipe.send(message)
            except Exception:  # it has ended, or what it is sent cannot be: it would wait for ever
                process.kill()
                return

    def _listen(self, pipe: Any, process: Any) -> None:
        while True:
            try:
                message = pipe.recv()
            except (EOFError, OSError):
                pipe.close()
                return
            self._loop.call_soon_threadsafe(self._take, process, message)

    def _take(self, process: Any, message: tuple[Any, ...]) -> None:
        if process is not self._process:
            return
        kind, *rest = message
        self._alive = time.monotonic()
        if kind == "ready":
            (self.facts,), self._ready = rest, self._alive
        elif kind == "failed":
            logger.error("the model cannot be loaded: %s", rest[0])
            self.broken.set()
        elif kind in ("part", "done", "error", "fault") and (pending := self._pending.get(rest[0])):
            pending.answers.put_nowait((kind, rest[1]))

    async def _watch(self) -> None:
        try:
            while not self.broken.is_set():
                await asyncio.sleep(WATCH)
                still = time.monotonic() - self._alive > (LOADING if self.facts is None else self.limits.frozen)
                if still or not self._process.is_alive():
                    self._replace("stands still" if still else "has ended")
        except Exception:
            logger.exception("no process can be started")
            self.broken.set()

    def _replace(self, why: str) -> None:
        """Another process; the requests of the old one are lost."""
        logger.error("the model's process %s; it is started again", why)
        self._process.kill()
        self._outgoing.put(None)
        for pending in self._pending.values():
            pending.answers.put_nowait(("lost", None))
        lived = self.facts is not None and time.monotonic() - self._ready > LIVED
        self._crashes, self.facts = 1 if lived else self._crashes + 1, None
        if self._crashes >= CRASHES:
            self.broken.set()
        else:
            self.restarts += 1
            self._spawn()

    def admit(self) -> None:
        """Raises ``Refused`` while there is no model, and where too many wait."""
        if self.facts is None:
            raise Refused(503, "the model is being loaded; try again in a few seconds", code="not_ready")
        if len(self) >= self.limits.queue:
            raise Refused(429, "too many requests wait; try again later", code="queue_full")

    async def stream(
        self, task: str, given: Any, /, *, expires: float, parts: bool = True, **options: Any
    ) -> AsyncGenerator[Any]:
        """Parts of the answer as they come, the whole one last. Raises ``Refused``; whoever stops listening cancels."""
        self.admit()
        id, pending, done = next(self._ids), _Pending(getattr(given, "nbytes", 0)), False
        if pending.size + sum(each.size for each in self._pending.values()) > HELD and self._pending:
            raise Refused(429, "too much sound waits; try again later", code="queue_full")
        self._pending[id] = pending
        self._outgoing.put(("ask", Ask(id, task, given, options, expires, parts)))
        try:
            while not done:
                async with asyncio.timeout(expires - time.monotonic()):
                    kind, answer = await pending.answers.get()
                if kind == "error":
                    raise Refused(400, answer)
                if kind == "fault":
                    raise Refused(500, "something went wrong in the model", code="internal")
                if kind == "lost":
                    raise Refused(503, "what computes this was lost on the way; try again", code="worker_lost")
                done = kind == "done"
                yield answer
        except TimeoutError:
            raise Refused(504, f"not done within {self.limits.deadline:g} s", code="deadline") from None
        finally:
            del self._pending[id]
            if not done:
                self._outgoing.put(("cancel", id))

    async def ask(self, task: str, given: Any, /, *, expires: float, **options: Any) -> Any:
        """The answer. Raises ``Refused``."""
        async with aclosing(self.stream(task, given, expires=expires, parts=False, **options)) as answers:
            return await anext(answers)
