"""What a request may cost, and what it is told when it would cost more. No torch, no web framework."""

from __future__ import annotations

from dataclasses import dataclass


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
