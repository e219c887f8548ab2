"""``WS /v1/realtime``: OpenAI's events of a transcription session."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import time
import uuid
from typing import Any

import numpy as np
from av import AudioFrame, AudioResampler
from fastapi import WebSocket, WebSocketDisconnect

from whisper_moe.config import SAMPLE_RATE
from whisper_moe.generate.result import Transcription
from whisper_moe.serve.engine import Engine
from whisper_moe.serve.limits import Refused
from whisper_moe.serve.live import STEP, Caption, Live

RATE = 24_000
"""Of a client's samples, 16-bit and mono, unless it says another."""
BEHIND = 120.0
"""Seconds of sound that are kept at most where the machine is too slow for it."""
TRANSCRIPTION = "conversation.item.input_audio_transcription"


class Session:
    """One connection."""

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
            while True:
                await self._take(await self._socket.receive_text())
        except WebSocketDisconnect:
            pass
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
                if self._live.seconds > BEHIND:
                    raise ValueError(f"more than {BEHIND:g} s of sound wait")
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
        except (ValueError, KeyError, TypeError, AttributeError, binascii.Error) as error:
            await self._fail(400, f"not understood: {error}")

    def _update(self, session: dict[str, Any]) -> None:
        """As OpenAI has it now, and as it had it first."""
        given = session.get("audio", {}).get("input", {})
        kind = given.get("format") or {}
        if isinstance(kind, dict) and kind.get("rate"):
            self._rate, self._resampler = int(kind["rate"]), AudioResampler("flt", "mono", SAMPLE_RATE)
        how = given.get("transcription") or session.get("input_audio_transcription") or {}
        self._options = {"language": how.get("language"), "initial_prompt": how.get("prompt")}

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
