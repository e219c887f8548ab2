"""A server in this process, with the process that computes beside it, and a tiny model in there."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from whisper_moe.serve.app import Server
from whisper_moe.serve.engine import Engine
from whisper_moe.serve.guard import Limits

KEY = "a-key"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def serving(model: Path, keys: tuple[str, ...] = (KEY,), **limits: Any) -> Iterator[tuple[httpx.Client, Server]]:
    limits = {"frozen": 600.0, "deadline": 300.0} | limits  # where tests share a core, all is slow
    engine = Engine({"model": str(model), "dtype": "float32", "threads": 1}, Limits(**limits))
    server = Server(engine, keys)
    port = free_port()
    running = uvicorn.Server(uvicorn.Config(server.app, port=port, log_level="warning", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    headers = {"authorization": f"Bearer {keys[0]}"} if keys else {}
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=60) as client:
        wait_until_ready(client)
        yield client, server
    running.should_exit = True
    thread.join(20)


def wait_until_ready(client: httpx.Client, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if client.get("/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise AssertionError("the server is not ready")
