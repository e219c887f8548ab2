"""What a request may cost, and what it is told when it would cost more; and what stands before every route: who asks, and how
much they send. Plain ASGI: it sees a body before anything reads it. No torch, no web framework."""

from __future__ import annotations

import hmac
import json
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeAlias

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

PAGE = Path(__file__).with_name("page.html")
"""For people."""
POLICY = (
    b"default-src 'none'; connect-src 'self'; media-src blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    b"frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
"""Nothing on the page comes from elsewhere, and nothing goes there."""
OPEN = frozenset({"/healthz", "/readyz"})
"""Paths that need no key: what runs the server asks them."""


@dataclass(frozen=True)
class Limits:
    """Each is applied as early as it can be known, and while it is counted, not by what a header states."""

    body: int = 25_000_000
    """Bytes of a request."""
    seconds: float = 600.0
    """Of sound, or of a film."""
    pixels: int = 1920 * 1080
    """Of one picture."""
    frames: int = 900
    """Of a film."""
    text: int = 4_096
    """Characters; nothing else is read aloud or translated meanwhile."""
    deadline: float = 60.0
    """Seconds from the request to its answer; one that is still in the queue then is never computed."""
    queue: int = 256
    """Requests that wait or are computed; the next is told to come again."""
    decoding: float = 30.0
    """Seconds of CPU for reading one file."""
    memory: int = 2 << 30
    """Bytes that a process which reads files may address."""
    frozen: float = 60.0
    """Seconds without a sign of life after which what computes is started again."""


class Refused(Exception):
    """An answer that is an error: an HTTP status, a sentence, and OpenAI's words for what and where."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(status, message, param, code)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict[str, dict[str, str | None]]:
        """As OpenAI's clients read it."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def headers_of(scope: Scope) -> dict[str, str]:
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}


def same_site(headers: dict[str, str]) -> bool:
    """Whether it is no page of another site that asks: a browser says whose it is."""
    origin = headers.get("origin")
    return origin is None or origin.partition("://")[2] == headers.get("host")


class Guard:
    """Authentication before the body is read, then its size, counted as it comes."""

    def __init__(self, app: App, keys: Iterable[str], limits: Limits, told: Callable[[str, int, float], None]) -> None:
        """``keys``: any of them opens; without any, everybody may ask. ``told``: of each answer its route, status, seconds."""
        self._app, self._limits, self._told = app, limits, told
        self._keys = [sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket" and not (self._knows(scope) and same_site(headers_of(scope))):
            await send({"type": "websocket.close", "code": 1008, "reason": "a key is needed"})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        left, status, begun = self._limits.body, 0, time.monotonic()
        large = Refused(413, f"the request is larger than {self._limits.body:,} bytes", code="too_large")

        async def counted() -> MutableMapping[str, Any]:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise large
            return message

        async def watched(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if left < 0 and not status and message.get("status") != large.status:
                raise large  # whatever a reader of the body made of it
            status = message.get("status", status)
            await send(message)

        headers, known = headers_of(scope), self._knows(scope)
        try:
            if scope["path"] == "/" and scope["method"] == "GET":
                head = [(b"content-type", b"text/html; charset=utf-8"), (b"content-security-policy", POLICY)]
                # A browser cannot send a key with it: the page asks for one.
                await answered(watched, 200 if known else 401, PAGE.read_bytes(), head)
                return
            self._check(known, headers)
            await self._app(scope, counted, watched)
        except Refused as refused:
            if status:
                raise
            # The rest of the body is not read.
            head = [(b"content-type", b"application/json"), (b"connection", b"close")]
            await answered(watched, refused.status, json.dumps(refused.body).encode(), head)
        finally:
            self._told(getattr(scope.get("route"), "path", "other"), status or 500, time.monotonic() - begun)

    def _check(self, known: bool, headers: dict[str, str]) -> None:
        if not known:
            raise Refused(401, "a key is needed: Authorization: Bearer KEY", code="invalid_api_key")
        if not same_site(headers):
            raise Refused(403, "pages of other sites may not ask", code="origin")
        if headers.get("content-encoding", "identity") != "identity":
            raise Refused(415, "a compressed request is not read", code="content_encoding")
        stated = headers.get("content-length", "0")
        if stated.isdecimal() and int(stated) > self._limits.body:
            raise Refused(413, f"the request is larger than {self._limits.body:,} bytes", code="too_large")

    def _knows(self, scope: Scope) -> bool:
        """Whether this path is open to who asks."""
        if not self._keys or scope["path"] in OPEN:
            return True
        kind, _, key = headers_of(scope).get("authorization", "").partition(" ")
        given = sha256(key.strip().encode()).digest()
        fits = [hmac.compare_digest(given, own) for own in self._keys]  # all of them, whichever fits
        return kind.lower() == "bearer" and any(fits)


async def answered(send: Send, status: int, body: bytes, head: list[tuple[bytes, bytes]]) -> None:
    """An answer that no route gives."""
    head = [*head, (b"content-length", str(len(body)).encode())]
    if status == 401:
        head.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": body})
