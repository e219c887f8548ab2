"""Requests a second, and how long each takes, of a server under load: this project's, and the plainest around faster-whisper.

    python benchmarks/load.py CLIPS -o OUT [--clients 1 4 16 64] [--requests 200] [--weights openai/whisper-base]

Both take one file a request at OpenAI's route, with the same limits, on the same threads, one server at a time. OUT gets
load.json and table.md. Every transcript is kept, so that what is lost, doubled or crossed shows.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from peers import weights_of

ROUTE = "/v1/audio/transcriptions"
DEADLINE = 300.0
HEAD = """| server | clients | requests a second | × faster-whisper | median, s | 95 %, s | errors |
|---|---:|---:|---:|---:|---:|---:|"""

PEER = """
import io, os, sys, threading
import uvicorn
from fastapi import FastAPI, File, Form, UploadFile
from faster_whisper import WhisperModel

model = WhisperModel(sys.argv[1], device="cpu", compute_type="int8", cpu_threads=int(sys.argv[3]))
turn = threading.Lock()
app = FastAPI()

@app.get("/readyz")
def ready(): return {}

@app.post("/v1/audio/transcriptions")
def transcribe(file: UploadFile = File(), model_name: str = Form("", alias="model")):
    with turn:  # as CTranslate2 has it with one worker
        segments, info = model.transcribe(io.BytesIO(file.file.read()), beam_size=1)
        return {"text": "".join(segment.text for segment in segments).strip()}

uvicorn.run(app, port=int(sys.argv[2]), log_level="warning")
"""


@contextmanager
def running(command: Sequence[str]) -> Iterator[str]:
    """A server's address, once it is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([part.replace("PORT", str(port)) for part in command])
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(600):
            try:
                if httpx.get(f"{address}/readyz").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        else:
            raise SystemExit(f"not ready: {' '.join(command)}")
        yield address
    finally:
        process.terminate()
        process.wait(30)


async def load(address: str, clips: Sequence[Path], clients: int, requests: int) -> dict[str, Any]:
    """So many clients that each send the next clip as soon as they have an answer."""
    contents = [clip.read_bytes() for clip in clips]
    answers: list[tuple[int, int, str, float]] = []
    coming = iter(range(requests))

    async def client(http: httpx.AsyncClient) -> None:
        for index in coming:
            begun = time.perf_counter()
            files, fields = (
                {"file": (clips[index % len(clips)].name, contents[index % len(clips)])},
                {"model": "whisper-1"},
            )
            answer = await http.post(ROUTE, files=files, data=fields)
            text = answer.json().get("text", "") if answer.status_code == 200 else ""
            answers.append((index, answer.status_code, text, time.perf_counter() - begun))

    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=address, timeout=DEADLINE, limits=limits) as http:
        await http.post(ROUTE, files={"file": (clips[0].name, contents[0])}, data={"model": "whisper-1"})
        begun = time.perf_counter()
        await asyncio.gather(*(client(http) for _ in range(clients)))
        seconds = time.perf_counter() - begun
    took = [each for *_, each in answers]
    return {
        "clients": clients,
        "rate": requests / seconds,
        "median": float(np.median(took)),
        "p95": float(np.percentile(took, 95)),
        "errors": sum(status != 200 for _, status, *_ in answers),
        "texts": {str(index): text for index, _, text, _ in sorted(answers)},
    }


def crossed(found: dict[str, Any], wanted: dict[str, Any]) -> int:
    """Answers that are another request's: not what was said of the clip alone, but of another one."""
    own = Counter(wanted.values())
    return sum(text != wanted[index] and own[text] > 0 for index, text in found.items())


def main(asked: argparse.Namespace) -> None:
    clips = sorted(path for path in asked.clips.iterdir() if path.is_file())[: asked.requests]
    threads = str(asked.threads)
    ours = [
        sys.executable,
        "-m",
        "whisper_moe",
        "serve",
        "--port",
        "PORT",
        "--threads",
        threads,
        "--max-deadline",
        "300",
    ]
    peer = [sys.executable, "-c", PEER, weights_of("ct2-int8", asked.weights, asked.cache), "PORT", threads]
    report: dict[str, list[dict[str, Any]]] = {}
    for name, command in (("whisper-moe", ours), ("faster-whisper int8", peer)):
        with running(command) as address:
            for clients in asked.clients:
                found = asyncio.run(load(address, clips, clients, asked.requests))
                report.setdefault(name, []).append(found)
                print(name, {key: value for key, value in found.items() if key != "texts"}, flush=True)
    lines = [HEAD]
    for name, runs in report.items():
        for run, other in zip(runs, report["faster-whisper int8"], strict=True):
            run["crossed"] = crossed(run["texts"], runs[0]["texts"])
            ratio = f"{run['rate'] / other['rate']:.2f}"
            cells = (name, run["clients"], f"{run['rate']:.2f}", ratio, f"{run['median']:.2f}", f"{run['p95']:.2f}")
            lines.append(f"| {' | '.join(map(str, cells))} | {run['errors']} |")
    asked.output.mkdir(parents=True, exist_ok=True)
    (asked.output / "load.json").write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", "utf-8")
    (asked.output / "table.md").write_text("\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("clips", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--weights", default="openai/whisper-base", help="faster-whisper's")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/whisper-moe")
    main(parser.parse_args())
