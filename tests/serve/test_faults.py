"""One request gives one answer, right or a clear error, and the next good request succeeds."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from generate.tiny import tiny_whisper_moe
from media.recordings import wav
from serve.serving import KEY, free_port, serving, wait_until_ready

from whisper_moe import WhisperMoE
from whisper_moe.serve.app import Server

RATE = 16_000
TRANSCRIBE = "/v1/audio/transcriptions"


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(0, 3_000, (round(seconds * RATE), 1))).astype(np.int16)


GOOD = wav(noise(1.0))
NAN = np.full((RATE, 1), np.nan)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "tiny"
    tiny_whisper_moe().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def served(model: Path) -> Iterator[tuple[httpx.Client, Server]]:
    limits = {"seconds": 60.0, "body": 4_000_000, "text": 1_000}
    with serving(model, **limits) as running:
        yield running


@pytest.fixture
def client(served: tuple[httpx.Client, Server]) -> Iterator[httpx.Client]:
    """Whatever a test sent, a good request is answered after it."""
    yield served[0]
    assert sent(served[0], GOOD).status_code == 200


def sent(client: httpx.Client, content: bytes, name: str = "a.wav", **fields: Any) -> httpx.Response:
    return client.post(TRANSCRIBE, files={"file": (name, content)}, data={"model": "whisper-1", **fields})


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 400),
        (b"R", 400),
        (b"This is no sound at all.\n" * 100, 400),
        (GOOD[:30], 400),
        (wav(noise(0.5), rate=1), 400),
        (wav(np.zeros((800, 65), np.int16)), 400),
        (wav(NAN), 400),
        (b"#EXTM3U\n#EXTINF:9,\ngood.ts\n", 400),
        (b"ffconcat version 1.0\nfile 'good.wav'\n", 415),
        (wav(np.zeros((61 * RATE, 1), np.int16)), 413),
    ],
    ids="empty,one byte,text,header,rate,channels,nan,m3u8,ffconcat,long".split(","),
)
def test_what_is_no_sound_is_an_error_that_names_the_file(client: httpx.Client, content: bytes, status: int) -> None:
    answer = sent(client, content, "my talk.wav")
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["message"].startswith("my talk.wav") and error["param"] == "file"
    assert "Traceback" not in answer.text and "/" not in error["message"]


def test_silence_and_nothing_are_empty_texts(client: httpx.Client) -> None:
    for samples in (np.zeros((RATE, 1), np.int16), np.zeros((0, 1), np.int16), np.zeros((1, 1), np.int16)):
        answer = sent(client, wav(samples))
        assert (answer.status_code, answer.json().get("text")) == (200, ""), answer.text


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"model": "gpt-7"}, 404, "model"),
        ({"temperature": "nan"}, 400, "temperature"),
        ({"temperature": "9"}, 400, "temperature"),
        ({"response_format": "docx"}, 400, "response_format"),
        ({"language": "klingon"}, 400, None),
        ({"timestamp_granularities[]": "hour"}, 400, "timestamp_granularities[]"),
    ],
    ids=lambda value: next(iter(value.items()))[0] if isinstance(value, dict) else None,
)
def test_a_field_that_is_wrong_is_named(client: httpx.Client, fields: dict[str, str], status: int, param: Any) -> None:
    answer = sent(client, GOOD, **fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text


def test_fields_that_nobody_knows_are_left_alone(client: httpx.Client) -> None:
    assert sent(client, GOOD, chunking_strategy="auto", url="http://169.254.169.254/").status_code == 200


def test_forms_that_are_none(client: httpx.Client) -> None:
    assert client.post(TRANSCRIBE, data={"model": "whisper-1"}).status_code == 400
    two = [("file", ("a.wav", GOOD)), ("file", ("b.wav", GOOD))]
    assert client.post(TRANSCRIBE, files=two).status_code == 400
    many = client.post(TRANSCRIBE, files={"file": GOOD}, data={f"f{i}": "x" for i in range(1_000)})
    assert many.status_code == 413
    wrong = {"content-type": "multipart/form-data; boundary=other"}
    assert client.post(TRANSCRIBE, content=b"--one\r\n\r\n--one--", headers=wrong).status_code == 400
    assert client.post("/v1/audio/speech", content=b"{").status_code == 400
    assert client.get(TRANSCRIBE).status_code == 405
    assert client.get("/v1/nothing").status_code == 404
    hostile = sent(client, GOOD, "../../etc/passwd\r\nX: y")
    assert hostile.status_code in (200, 400)


def test_what_is_too_large_is_refused_by_what_comes_not_by_what_is_said(client: httpx.Client) -> None:
    def endless() -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        for _ in range(100):
            yield b"\0" * 100_000

    kind = {"content-type": "multipart/form-data; boundary=b"}
    assert sent(client, b"\0" * 5_000_000).status_code == 413
    with suppress(httpx.WriteError):  # the server may have hung up while we were sending
        assert client.post(TRANSCRIBE, content=endless(), headers=kind).status_code == 413
    assert client.post("/v1/audio/speech", json={"input": "a" * 1_001, "voice": "x"}).status_code == 413
    zipped = {"content-encoding": "gzip", **kind}
    assert client.post(TRANSCRIBE, content=b"\x1f\x8b", headers=zipped).status_code == 415


def test_every_route_but_two_needs_a_key(served: tuple[httpx.Client, Server]) -> None:
    client, server = served
    routes = [(path, method) for path, methods in server.app.openapi()["paths"].items() for method in methods]
    routes += [("/docs", "get"), ("/openapi.json", "get"), ("/nothing", "get")]
    assert len(routes) > 10
    for path, method in routes:
        for header in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {KEY}"}):
            with httpx.Client(base_url=client.base_url) as stranger:
                answer = stranger.request(method, path.replace("{model}", "x"), headers=header)
            assert (answer.status_code == 401) == (path not in ("/healthz", "/readyz")), (path, header)
    assert client.get("/docs").status_code == 200


def test_many_at_once_each_get_their_own_and_none_is_lost(served: tuple[httpx.Client, Server], model: Path) -> None:
    """Windows of all clients share batches, come and go; every answer is what ``transcribe`` says of its clip."""
    client, _ = served
    sounds = [noise(0.5 + i / 20, seed=i) for i in range(60)]  # no two are equally long
    own = WhisperMoE.from_pretrained(model, dtype="float32", threads=1)
    wanted = own.transcribe([sound[:, 0] / np.float32(32_768) for sound in sounds])
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda sound: sent(client, wav(sound), response_format="verbose_json"), sounds))
    assert [answer.status_code for answer in found] == [200] * 60
    assert [(each["duration"], each["text"]) for each in (answer.json() for answer in found)] == [
        (each.duration, each.text) for each in wanted
    ]
    assert len({each.text for each in wanted}) > 5


def test_a_stream_says_in_parts_what_the_whole_says(served: tuple[httpx.Client, Server]) -> None:
    import json

    content = wav(noise(45.0))
    whole = sent(served[0], content).json()["text"]
    lines = [line for line in sent(served[0], content, stream="true").text.splitlines() if line]
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert [each["type"] for each in events[:-1]] == ["transcript.text.delta"] * (len(events) - 1) and len(events) > 2
    assert "".join(each["delta"] for each in events[:-1]) == events[-1]["text"] == whole


def workers(server: Server) -> int:
    return server.engine._process.pid or 0


def test_a_killed_process_costs_its_requests_an_error_and_comes_back(model: Path) -> None:
    with serving(model) as (client, server), ThreadPoolExecutor(4) as pool:
        before = workers(server)
        os.kill(before, signal.SIGSTOP)  # so that the requests are under way
        asked = [pool.submit(sent, client, GOOD) for _ in range(4)]
        while len(server.engine) < 4:
            time.sleep(0.05)
        os.kill(before, signal.SIGKILL)
        lost = [each.result() for each in asked]
        assert {answer.status_code for answer in lost} == {503}
        assert {answer.headers["retry-after"] for answer in lost} == {"2"}
        wait_until_ready(client)
        assert workers(server) != before and sent(client, GOOD).status_code == 200


def test_one_that_stands_still_is_replaced(model: Path) -> None:
    with serving(model, frozen=2.0) as (client, server):
        os.kill(workers(server), signal.SIGSTOP)
        assert sent(client, GOOD).status_code == 503
        wait_until_ready(client)
        assert sent(client, GOOD).status_code == 200 and server.engine.restarts >= 1


def test_a_full_queue_and_a_deadline(model: Path) -> None:
    with serving(model, queue=2, deadline=3.0) as (client, server), ThreadPoolExecutor(2) as pool:
        os.kill(workers(server), signal.SIGSTOP)
        asked = [pool.submit(sent, client, GOOD) for _ in range(2)]
        while len(server.engine) < 2:
            time.sleep(0.05)
        full = sent(client, GOOD)
        assert (full.status_code, full.json()["error"]["code"]) == (429, "queue_full") and full.headers["retry-after"]
        assert {each.result().status_code for each in asked} == {504}
        os.kill(workers(server), signal.SIGCONT)
        assert len(server.engine) == 0 and sent(client, GOOD).status_code == 200


def test_a_client_that_goes_frees_its_place(served: tuple[httpx.Client, Server]) -> None:
    client, server = served
    os.kill(workers(server), signal.SIGSTOP)
    try:
        body = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + GOOD + b"\r\n--b--\r\n"
        head = (
            f"POST {TRANSCRIBE} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: {len(body)}\r\n"
        )
        with socket.create_connection((client.base_url.host, client.base_url.port or 80)) as line:
            line.sendall(f"{head}Content-Type: multipart/form-data; boundary=b\r\n\r\n".encode() + body)
            while not len(server.engine):
                time.sleep(0.02)
        gone = time.monotonic()
        while len(server.engine):
            assert time.monotonic() - gone < 2
            time.sleep(0.02)
    finally:
        os.kill(workers(server), signal.SIGCONT)
    assert sent(client, GOOD).status_code == 200


def by_command(model: Path, **how: Any) -> tuple[subprocess.Popen[bytes], int]:
    """``whisper-moe serve`` in a process of its own, and its port."""
    port = free_port()
    flags = ["--model", str(model), "--port", str(port), "--threads", "1"]
    return subprocess.Popen([sys.executable, "-m", "whisper_moe", "serve", *flags], **how), port


def test_the_process_ends_with_its_parent(model: Path, tmp_path: Path) -> None:
    """Killed, so that it cannot tell anybody."""
    parent, port = by_command(model, stderr=subprocess.DEVNULL)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        wait_until_ready(client)
        assert sent(client, GOOD).status_code == 200
    children = children_of(parent.pid)
    assert len(children) >= 2
    parent.kill()
    parent.wait()
    end = time.monotonic() + 5
    while any(Path(f"/proc/{child}").exists() and "zombie" not in state_of(child) for child in children):
        assert time.monotonic() < end, children
        time.sleep(0.1)


def test_a_signal_lets_what_was_taken_be_answered(model: Path) -> None:
    server, port = by_command(model, stderr=subprocess.PIPE)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client, ThreadPoolExecutor(4) as pool:
        wait_until_ready(client)
        long = wav(noise(50.0))
        asked = [pool.submit(sent, client, long) for _ in range(4)]
        time.sleep(0.5)
        server.send_signal(signal.SIGTERM)
        assert [each.result().status_code for each in asked] == [200] * 4
    assert server.wait(20) == 0
    assert server.stderr is not None and b"Traceback" not in server.stderr.read()


def children_of(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return found + [each for child in found for each in children_of(child)]


def state_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return "zombie"


def test_threads_are_not_left_behind(served: tuple[httpx.Client, Server]) -> None:
    for _ in range(5):
        assert sent(served[0], GOOD).status_code == 200
    assert threading.active_count() < 40
