"""Captions while somebody speaks: the growing utterance is decoded again and again, and what two decodings agree on is final
(LocalAgreement-2: Macháček et al. 2023, arXiv 2307.14743, section 3). A pause ends the utterance.

A short window costs only its own length here, which is what makes this cheap. :class:`Live` is a stream of sound,
:class:`Session` a connection to ``WS /v1/realtime`` with OpenAI's events of a transcription session.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from av import AudioFrame, AudioResampler

from whisper_moe.config import SAMPLE_RATE
from whisper_moe.generate.result import Transcription
from whisper_moe.media.windows import speech_spans
from whisper_moe.serve.engine import Engine
from whisper_moe.serve.guard import Refused

if TYPE_CHECKING:
    from fastapi import WebSocket

STEP = 0.6
"""Seconds of new sound that are worth another look."""
PAUSE = 0.7
"""Seconds without speech that end an utterance."""
LONGEST = 14.0
"""Seconds of sound that are decoded at most: then what is final is cut off."""
REPEATED = 5
"""Words that a decoding may say again of what is final, where it was cut in the middle of a word."""
SLOWEST, FASTEST = 8_000, 48_000
"""Sample rates that are taken."""
LARGEST = 1 << 20
"""Bytes of sound in one event: twenty seconds."""
PROMPT = 10_000
"""Characters."""
RATE = 24_000
"""Of a client's samples, 16-bit and mono, unless it says another."""
BEHIND = 120.0
"""Seconds of sound that are kept at most where the machine is too slow for it."""
TRANSCRIPTION = "conversation.item.input_audio_transcription"


class Word(NamedTuple):
    text: str
    start: float
    """Seconds from the start of the stream."""
    end: float

    @property
    def said(self) -> str:
        """What two decodings have to agree on."""
        return re.sub(r"\W", "", self.text).casefold()


@dataclass
class Agreement:
    """What is final, and what one decoding has said beyond that."""

    final: list[Word] = field(default_factory=list)
    open: list[Word] = field(default_factory=list)

    def take(self, words: list[Word]) -> list[Word]:
        """The words that are final now: those that this decoding and the one before say alike."""
        fresh = self._beyond(words)
        agreed = 0
        while agreed < min(len(fresh), len(self.open)) and fresh[agreed].said == self.open[agreed].said:
            agreed += 1
        self.final += fresh[:agreed]
        self.open = fresh[agreed:]
        return fresh[:agreed]

    def close(self, words: list[Word]) -> list[Word]:
        """The rest of an utterance that has ended, as the last decoding has it."""
        fresh = self._beyond(words)
        self.final, self.open = [], []
        return fresh

    def _beyond(self, words: list[Word]) -> list[Word]:
        """Without what is final already."""
        if not self.final:
            return words
        until = self.final[-1].end
        fresh = [word for word in words if word.end > until + 0.1 or word.start > until - 0.1]
        for count in range(min(REPEATED, len(fresh), len(self.final)), 0, -1):
            tail = [word.said for word in self.final[-count:]]
            if tail == [word.said for word in fresh[:count]] and fresh[0].start - until < 1.0:
                return fresh[count:]
        return fresh


class Caption(NamedTuple):
    """What can be said now."""

    utterance: int
    final: str
    """What is new and will not change."""
    open: str
    """What comes after it, as far as one decoding says."""
    ended: bool
    """Whether the utterance ends with it."""


Hear = Callable[[np.ndarray], Awaitable[Transcription]]
"""A transcript with word times of float32 samples at 16 kHz."""


class Live:
    """A stream of sound on its way to captions."""

    def __init__(self, hear: Hear) -> None:
        self._hear, self._agreement = hear, Agreement()
        self._samples, self._begin, self._looked = np.zeros(0, np.float32), 0, 0
        self.utterance = 0

    @property
    def waiting(self) -> bool:
        """Whether there is enough new sound for another look."""
        return len(self._samples) - self._looked >= STEP * SAMPLE_RATE

    @property
    def seconds(self) -> float:
        """Of sound that is kept."""
        return len(self._samples) / SAMPLE_RATE

    def append(self, samples: np.ndarray) -> None:
        self._samples = np.concatenate((self._samples, samples))

    async def look(self, *, end: bool = False) -> AsyncIterator[Caption]:
        """What can be said of the sound so far. ``end``: nothing more comes of this utterance."""
        samples, self._looked = self._samples, len(self._samples)
        spans = speech_spans(samples) if len(samples) else []
        if not spans:
            if self._agreement.final or self._agreement.open or end:
                yield self._ended([])
            self._cut(max(0, len(samples) - round(PAUSE * SAMPLE_RATE)))
            return
        silence = len(samples) - spans[-1][1]
        ends = end or silence >= PAUSE * SAMPLE_RATE
        words = self._words(await self._hear(samples))
        if ends:
            yield self._ended(words)
            self._cut(len(samples) if end else spans[-1][1])
            return
        final = self._agreement.take(words)
        yield Caption(self.utterance, _text(final), _text(self._agreement.open), False)
        if len(samples) > LONGEST * SAMPLE_RATE:
            told = [round(word.end * SAMPLE_RATE) - self._begin for word in self._agreement.final[-1:]]
            if told and told[0] > 0:
                self._cut(told[0])
            else:  # noise, of which nothing is ever final
                yield self._ended(words)
                self._cut(len(samples) - round(PAUSE * SAMPLE_RATE))

    def _ended(self, words: list[Word]) -> Caption:
        caption = Caption(self.utterance, _text(self._agreement.close(words)), "", True)
        self.utterance += 1
        return caption

    def _words(self, heard: Transcription) -> list[Word]:
        offset = self._begin / SAMPLE_RATE
        words = [word for segment in heard.segments for word in segment.words or ()]
        return [Word(word.word, word.start + offset, word.end + offset) for word in words]

    def _cut(self, samples: int) -> None:
        """Forget the first of the sound."""
        self._samples, self._begin = self._samples[samples:], self._begin + samples
        self._looked = max(0, self._looked - samples)


def _text(words: list[Word]) -> str:
    return "".join(word.text for word in words)


# Over a web socket


class Session:
    """One connection. Captions are looked for in a task beside the one that reads."""

    def __init__(self, socket: WebSocket, engine: Engine) -> None:
        self._socket, self._engine = socket, engine
        self._options: dict[str, Any] = {"language": None, "initial_prompt": None}
        self._resampler, self._rate = AudioResampler("flt", "mono", SAMPLE_RATE), RATE
        self._live, self._item, self._said = Live(self._hear), _id("item"), ""
        self._new = asyncio.Event()
        self._commits = 0

    async def run(self) -> None:
        await self._socket.accept()
        await self._send("session.created", session=self._facts())
        looking = asyncio.create_task(self._look())
        try:
            while not looking.done():
                message = await self._socket.receive()
                if message["type"] == "websocket.disconnect":
                    break
                await self._take(message.get("text") or "")
        finally:
            looking.cancel()

    async def _take(self, text: str) -> None:
        try:
            message = json.loads(text)
            kind = message["type"]
            if kind in ("session.update", "transcription_session.update"):
                self._update(message["session"])
                await self._send("session.updated", session=self._facts())
            elif kind == "input_audio_buffer.append":
                if self._live.seconds > BEHIND or len(message["audio"]) > 4 * LARGEST // 3:
                    raise ValueError(f"more than {BEHIND:g} s of sound wait, or {LARGEST:,} bytes come at once")
                self._live.append(self._sound(base64.b64decode(message["audio"], validate=True)))
                self._new.set()
            elif kind == "input_audio_buffer.commit":
                self._commits += 1
                self._new.set()
            elif kind == "input_audio_buffer.clear":
                self._live, self._said = Live(self._hear), ""
                await self._send("input_audio_buffer.cleared")
            else:
                raise ValueError(f"no such event: {kind!r}")
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            await self._fail(400, f"not understood: {error}")

    def _update(self, session: dict[str, Any]) -> None:
        """As OpenAI has it now, and as it had it first."""
        given = session.get("audio", {}).get("input", {})
        kind = given.get("format") or {}
        if isinstance(kind, dict) and kind.get("rate"):
            if not SLOWEST <= kind["rate"] <= FASTEST:
                raise ValueError(f"a rate of {SLOWEST} to {FASTEST} Hz is taken")
            self._rate, self._resampler = int(kind["rate"]), AudioResampler("flt", "mono", SAMPLE_RATE)
        how = given.get("transcription") or session.get("input_audio_transcription") or {}
        language, prompt = how.get("language"), how.get("prompt")
        if not all(each is None or isinstance(each, str) for each in (language, prompt)) or len(prompt or "") > PROMPT:
            raise ValueError(f"language and prompt are texts, of at most {PROMPT:,} characters")
        self._options = {"language": language, "initial_prompt": prompt}

    def _facts(self) -> dict[str, Any]:
        how = {"model": "whisper-moe", "language": self._options["language"], "prompt": self._options["initial_prompt"]}
        sound = {"format": {"type": "audio/pcm", "rate": self._rate}, "transcription": how}
        return {"type": "transcription", "object": "realtime.transcription_session", "audio": {"input": sound}}

    def _sound(self, content: bytes) -> np.ndarray:
        """16 kHz, of 16-bit samples at the client's rate."""
        samples = np.frombuffer(content[: len(content) // 2 * 2], "<i2")
        if not len(samples):
            return np.zeros(0, np.float32)
        frame = AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        frame.sample_rate = self._rate
        return np.concatenate(
            [each.to_ndarray()[0] for each in self._resampler.resample(frame)] or [np.zeros(0, np.float32)]
        )

    async def _look(self) -> None:
        """Again and again, as long as there is new sound."""
        while True:
            await self._new.wait()
            end = self._commits > 0
            if not end and not self._live.waiting:
                self._new.clear()
                continue
            self._commits -= end
            try:
                async for caption in self._live.look(end=end):
                    await self._caption(caption)
            except Refused as refused:
                await self._fail(refused.status, refused.message)
                await asyncio.sleep(STEP)

    async def _hear(self, samples: np.ndarray) -> Transcription:
        expires = time.monotonic() + self._engine.limits.deadline
        known = {name: value for name, value in self._options.items() if value}
        # Another temperature would come too late; the next look is the better second try.
        return await self._engine.ask(
            "transcribe", samples, expires=expires, word_timestamps=True, temperatures=(0.0,), **known
        )

    async def _caption(self, caption: Caption) -> None:
        item = {"item_id": self._item, "content_index": 0}
        self._said += caption.final
        if caption.final:
            await self._send(f"{TRANSCRIPTION}.delta", delta=caption.final, **item)
        if caption.open:  # ours: what the next look may still change
            await self._send(f"{TRANSCRIPTION}.hypothesis", text=caption.open, **item)
        if caption.ended:
            await self._send("input_audio_buffer.committed", item_id=self._item)
            await self._send(f"{TRANSCRIPTION}.completed", transcript=self._said.strip(), **item)
            self._item, self._said = _id("item"), ""

    async def _send(self, kind: str, **facts: Any) -> None:
        await self._socket.send_text(json.dumps({"type": kind, "event_id": _id("event"), **facts}, ensure_ascii=False))

    async def _fail(self, status: int, message: str) -> None:
        await self._send("error", error=Refused(status, message).body["error"])


def _id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex[:20]}"
