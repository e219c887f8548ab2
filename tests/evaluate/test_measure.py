"""One system measured: what one clip breaks costs that clip, and what a process breaks costs that system."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("datasets", reason="corpora need an extra")

from evaluate.corpora import TEXTS, clips, refuse, table, vanish, written

from whisper_moe import WhisperMoE
from whisper_moe.evaluate import measure as module
from whisper_moe.evaluate.measure import Measured, SystemFailed, Work, measure, measure_apart
from whisper_moe.evaluate.peers import Heard, Setup, WrittenTranscripts, told
from whisper_moe.evaluate.systems import System, parse
from whisper_moe.machine import peak_bytes


class Echo:
    """A system that says how long a clip is, and breaks on one of a second; ``batched`` as it is made."""

    def __init__(self, batched: bool, breaks_on: int = 16_000) -> None:
        self.batched, self.breaks_on = batched, breaks_on
        self.options: dict[str, Any] = {"beam_size": 1, "temperature": (0.0,)}
        self.weights = Path("nowhere")
        self.asked: list[dict[str, Any]] = []
        self.calls: list[int] = []

    def hear(self, sources: Iterable[np.ndarray], **asked: Any) -> Iterator[Heard]:
        self.asked.append(asked)
        self.calls.append(0)
        for samples in sources:
            self.calls[-1] += 1
            if len(samples) == self.breaks_on:
                raise RuntimeError("a clip of\na second")
            yield Heard(f"{len(samples) / 16_000:g} {asked['language']}", tokens=2)


def work(folder: Path, **settings: Any) -> Work:
    usual: dict[str, Any] = {"margin": 0.5, "setup": Setup(weights="", threads=1), "system": System("openai", "echo")}
    return Work(clips=clips(table(folder)), **usual | settings)


@pytest.fixture
def echo(monkeypatch: pytest.MonkeyPatch) -> Any:
    def use(batched: bool, **settings: Any) -> Echo:
        system = Echo(batched, **settings)
        monkeypatch.setattr(module, "loaded", lambda *_, **__: system)
        return system

    return use


@pytest.mark.parametrize("batched", [False, True])
def test_a_clip_that_breaks_a_system_costs_that_clip(tmp_path: Path, echo: Any, batched: bool):
    echo(batched)
    found = measure(work(tmp_path), refuse)
    assert [heard.text for heard in found.heard] == ["0.5 en", "", "1.5 hi", "2 en"]
    assert [heard.error for heard in found.heard] == [None, "RuntimeError: a clip of a second", None, None]


def test_a_batch_is_of_one_language_and_the_order_is_that_of_the_clips(tmp_path: Path, echo: Any):
    system = echo(True, breaks_on=-1)
    found = measure(work(tmp_path), refuse)
    assert [asked["language"] for asked in system.asked] == ["en", "en", "hi"]  # the first of them warms up
    assert system.calls == [1, 3, 1]
    assert [heard.text for heard in found.heard] == ["0.5 en", "1 en", "1.5 hi", "2 en"]


def test_a_clip_over_30_s_does_not_change_how_the_others_are_heard(tmp_path: Path, echo: Any):
    system = echo(True, breaks_on=-1)
    asked = work(tmp_path)
    first, *others = asked.clips
    measure(replace(asked, clips=(*others, replace(first, seconds=31.0))), refuse)
    told = [(asked["language"], asked["long"]) for asked in system.asked[1:]]
    assert told == [("en", False), ("hi", False), ("en", True)] and system.calls[1:] == [2, 1, 1]


@pytest.mark.parametrize("option", ["timestamps", "without_timestamps"])
def test_a_systems_own_option_says_whether_there_are_timestamps(option: str):
    options = {"language": "en", option: None}
    assert told(options, {"language": "hi", "long": True}, option) == {"language": "hi", option: option == "timestamps"}
    assert told(options, {"long": False}, option)[option] == (option != "timestamps")
    assert told(options, {}, option) == options


def test_a_language_that_is_detected_is_not_told(tmp_path: Path, echo: Any):
    system = echo(True, breaks_on=-1)
    measure(work(tmp_path, detect=True), refuse)
    assert {asked["language"] for asked in system.asked} == {None}
    assert system.calls == [1, 4]


def test_latency_is_of_single_clips_and_apart_only_where_the_system_batches(tmp_path: Path, echo: Any):
    system = echo(True, breaks_on=-1)
    found = measure(work(tmp_path, latency_clips=3), refuse)
    assert (len(found.latencies), found.latencies_apart, system.calls[-3:]) == (3, True, [1, 1, 1])
    echo(False, breaks_on=-1)
    found = measure(work(tmp_path, latency_clips=3), refuse)
    assert (len(found.latencies), found.latencies_apart) == (3, False)


def test_progress_adds_up_to_the_sound(tmp_path: Path, echo: Any):
    echo(True, breaks_on=-1)
    done: list[float] = []
    measure(work(tmp_path), refuse, done.append)
    assert sum(done) == pytest.approx(0.5 + 1 + 1.5 + 2)


def test_this_projects_model_says_what_only_it_can(tmp_path: Path, tiny_model: WhisperMoE):
    found = measure(work(tmp_path, system=System("ours", "tiny")), lambda *_, **__: tiny_model)
    assert found.config == tiny_model.config.model_dump(mode="json")
    assert (found.dtype, found.device) == ("float32", "cpu")
    assert found.wall and found.peak and found.load
    assert all(sum(gate for _, gate in heard.experts) == pytest.approx(1) for heard in found.heard if heard.text)
    assert found.surprise is not None and all(not isinstance(each, str) for each in found.surprise)


def test_what_was_written_elsewhere_is_looked_up_and_not_timed(tmp_path: Path):
    all_clips = clips(table(tmp_path))
    spec = written(tmp_path, "other", {clip.sample.id: clip.sample.text for clip in all_clips[:3]})
    found = measure(work(tmp_path, system=parse(spec)), refuse)
    assert [heard.text for heard in found.heard] == [*TEXTS[:3], ""]
    assert found.heard[3].error is not None and "has no row" in found.heard[3].error
    assert found.wall is None and found.latencies == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "row 1: the columns id and text are needed"),
        ("id\twords\na\tb\n", "row 1: the columns id and text are needed"),
        ("id\ttext\na\tb\nc\n", "row 3: 2 columns are expected, found 1"),
        ("id\ttext\na\tb\na\tc\n", "row 3: the id 'a' is there twice"),
    ],
)
def test_a_table_of_transcripts_that_cannot_be_used_is_refused(tmp_path: Path, content: str, message: str):
    file = tmp_path / "written.tsv"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        WrittenTranscripts(file)


def test_in_a_process_of_its_own_the_result_is_the_same(tmp_path: Path):
    everything = clips(table(tmp_path))
    spec = written(tmp_path, "other", {clip.sample.id: clip.sample.text for clip in everything})
    job = work(tmp_path, system=parse(spec))
    apart, here = measure_apart(job, refuse), measure(job, refuse)
    assert isinstance(apart, Measured) and apart == here


def test_peak_memory_is_that_of_the_process_and_not_of_the_one_that_started_it():
    held = np.ones(75_000_000)
    assert peak_bytes() > 600e6
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert 1e6 < pool.submit(peak_bytes).result() < 400e6
    assert held[0] == 1


@pytest.mark.parametrize(
    ("load", "message"), [(vanish, r"its process ended \(exit status 7\)"), (refuse, "ValueError: no such model")]
)
def test_a_system_that_takes_its_process_down_is_named(tmp_path: Path, load: Any, message: str):
    job = replace(work(tmp_path), system=System("ours", "gone"))
    with pytest.raises(SystemFailed, match=f"gone: {message}"):
        measure_apart(job, load)


ORPHAN = """
import sys
from evaluate.corpora import linger
from whisper_moe.evaluate.measure import Work, measure_apart
from whisper_moe.evaluate.peers import Setup
from whisper_moe.evaluate.systems import System

if __name__ == "__main__":
    measure_apart(Work(system=System("ours", sys.argv[1]), clips=(), setup=Setup(weights="", threads=1), margin=None), linger)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_measuring_process_does_not_outlive_the_one_that_asked(tmp_path: Path) -> None:
    script, note = tmp_path / "orphan.py", tmp_path / "pid"
    script.write_text(ORPHAN)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, str(script), str(note)], env=environment)
    try:
        assert eventually(lambda: note.exists() and note.read_text().endswith("\n"))
    finally:
        parent.kill()
        parent.wait()
    child = Path(f"/proc/{note.read_text().strip()}")
    assert eventually(lambda: not child.exists() or "State:\tZ" in (child / "status").read_text())


def eventually(condition: Callable[[], bool]) -> bool:
    """Whether it comes true within 20 seconds."""
    return any(condition() or time.sleep(0.1) for _ in range(200))
