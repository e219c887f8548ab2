"""``whisper-moe serve``."""

from __future__ import annotations

import ipaddress
import logging
import os
from pathlib import Path
from signal import SIGINT
from types import FrameType
from typing import Any

from whisper_moe.jobs import UsageError
from whisper_moe.serve.guard import Limits

logger = logging.getLogger(__name__)

KEY = "WHISPER_MOE_API_KEY"
"""The environment variable with a key, or several with commas between."""


def serve(
    *,
    model: str | None,
    model_dir: Path | None,
    host: str,
    port: int,
    api_key_file: Path | None,
    insecure: bool,
    device: str,
    dtype: str,
    threads: int | None,
    **limits: Any,
) -> int:
    """Serve until a signal; returns the exit status. Raises ``ValueError`` for what cannot be started."""
    try:
        import uvicorn

        from whisper_moe.serve.app import Server
        from whisper_moe.serve.engine import Engine
    except ImportError as error:
        raise UsageError(f"serve needs {error.name}: pip install 'whisper-moe[serve]'") from None
    keys = keys_of(api_key_file)
    if not keys and not insecure and not _is_loopback(host):
        raise UsageError(f"{host} is open to others: give keys (--api-key-file, {KEY}), or --insecure")
    how = {"model": model, "model_dir": model_dir, "device": device, "dtype": dtype, "threads": threads or None}
    engine = Engine(how, Limits(**{name.removeprefix("max_"): value for name, value in limits.items()}))
    server = Server(engine, keys)

    class Draining(uvicorn.Server):
        """Says that it is not ready before it stops taking requests; those it has taken are answered."""

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            server.draining, self.force_exit, self.should_exit = True, self.should_exit and sig == SIGINT, True

        async def on_tick(self, counter: int) -> bool:
            return engine.broken.is_set() or await super().on_tick(counter)

    config = uvicorn.Config(
        server.app,
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=round(engine.limits.deadline) + 5,
        http="h11",  # which limits the size of headers
        h11_max_incomplete_event_size=16_384,
        ws_max_size=2 << 20,
        ws_max_queue=4,
        limit_concurrency=2 * engine.limits.queue,
        server_header=False,
    )
    logger.info("http://%s:%d, %s", host, port, "with keys" if keys else "without keys")
    Draining(config).run()
    return int(engine.broken.is_set())


def keys_of(file: Path | None) -> list[str]:
    """Keys from a file, one a line (``#`` begins a comment), and from the environment."""
    lines = file.read_text("utf-8").splitlines() if file else []
    own = [key.strip() for key in lines if key.strip() and not key.lstrip().startswith("#")]
    if file and not own:
        raise UsageError(f"{file}: has no key in it")
    return own + [key.strip() for key in os.environ.get(KEY, "").split(",") if key.strip()]


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
