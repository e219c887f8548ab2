"""One system measured: what one clip breaks costs that clip."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datasets", reason="corpora need an extra")

from evaluate.corpora import TEXTS, clips, table, written

from whisper_moe import WhisperMoE, machine
from whisper_moe.evaluate.measure import Adapter, Clip, Heard, Measured, Options, System, apart, measure, take_times


class Echo:
    """A system that says how long a clip is, and breaks on one of a second."""

    def __init__(self, *, batched: bool, breaks_on: int = 16_000) -> None:
        self.batched, self.breaks_on = batched, breaks_on
        self.told: list[dict[str, Any]] = []
        self.calls: list[int] = []

    def hear(self, sources: Iterable[Any], **told: Any) -> Iterator[Heard]:
        self.told.append(told)
        self.calls.append(0)
        for samples in sources:
            self.calls[-1] += 1
            if len(samples) == self.breaks_on:
                raise RuntimeError("a clip of\na second")
            yield Heard(f"{len(samples) / 16_000:g} {told['language']}", tokens=2)


def measured(system: Echo, all_clips: list[Clip], **options: Any) -> Measured:
    load = lambda: Adapter(system.hear, {}, system.batched)  # noqa: E731
    return take_times(load, "nowhere", all_clips, Options(**options))[1]


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("nothing is to be loaded")


@pytest.mark.parametrize("batched", [False, True])
def test_a_clip_that_breaks_a_system_costs_that_clip(tmp_path: Path, batched: bool):
    found = measured(Echo(batched=batched), clips(table(tmp_path)))
    assert [heard.text for heard in found.heard] == ["0.5 en", "", "1.5 hi", "2 en"]
    assert [heard.error for heard in found.heard] == [None, "RuntimeError: a clip of a second", None, None]


@pytest.mark.parametrize("detect", [False, True])
def test_a_batch_is_told_one_language_and_the_order_is_that_of_the_clips(tmp_path: Path, detect: bool):
    """A clip over 30 s does not change how the others are heard."""
    system = Echo(batched=True, breaks_on=-1)
    *others, last = clips(table(tmp_path))
    found = measured(system, [*others, replace(last, seconds=31.0)], latency_clips=0, detect=detect)
    told = [(told["language"], told["long"]) for told in system.told[1:]]  # the first of them warms up
    if detect:
        assert (told, system.calls) == ([(None, False), (None, True)], [1, 3, 1])
    else:
        assert (told, system.calls) == ([("en", False), ("hi", False), ("en", True)], [1, 2, 1, 1])
        assert [heard.text for heard in found.heard] == ["0.5 en", "1 en", "1.5 hi", "2 en"]


def test_what_windows_does_not_know_is_left_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(os, "getloadavg")
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setattr(machine, "_read", lambda _: "")
    found = measured(Echo(batched=False), clips(table(tmp_path)))
    assert found.wall_seconds and found.peak_bytes is None and found.machine_load_before is None


@pytest.mark.parametrize("batched", [False, True])
def test_latency_is_of_single_clips_and_apart_only_where_the_system_batches(tmp_path: Path, batched: bool):
    system = Echo(batched=batched, breaks_on=-1)
    found = measured(system, clips(table(tmp_path)), latency_clips=3)
    assert (len(found.latencies), found.latencies_apart) == (3, batched)
    assert set(system.calls[-3:]) == {1}


def test_this_projects_model_says_what_only_it_can(tmp_path: Path, tiny_model: WhisperMoE):
    all_clips = clips(table(tmp_path))
    found = measure(System("ours", "tiny"), "nowhere", all_clips, Options(margin=0.5), lambda *_, **__: tiny_model)
    assert found.config == tiny_model.config
    assert (found.dtype, found.device) == ("float32", "cpu")
    assert found.wall_seconds and found.peak_bytes and found.load_seconds
    assert all(sum(gate for _, gate in heard.experts) == pytest.approx(1) for heard in found.heard if heard.text)
    assert found.cross_entropies is not None and not any(isinstance(each, str) for each in found.cross_entropies)


def test_what_was_written_elsewhere_is_looked_up_and_not_timed(tmp_path: Path):
    """In a process of its own, as here."""
    all_clips = clips(table(tmp_path))
    system = System.parse(written(tmp_path, "other", {clip.sample.id: clip.sample.text for clip in all_clips[:3]}))
    found = measure(system, system.weights(), all_clips, Options(), never)
    assert [heard.text for heard in found.heard] == [*TEXTS[:3], ""]
    assert found.heard[3].error is not None and "has no row" in found.heard[3].error
    assert found.wall_seconds is None and found.latencies == []
    assert apart(measure, system, system.weights(), all_clips, Options(), never) == found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "row 1: the columns id and text are needed"),
        ("id\twords\na\tb\n", "row 1: the columns id and text are needed"),
        ("id\ttext\na\tb\nc\n", "row 3: not as many columns"),
        ("id\ttext\na\tb\na\tc\n", "row 3: the id 'a' is there twice"),
    ],
)
def test_a_table_of_transcripts_that_cannot_be_used_is_refused(tmp_path: Path, content: str, message: str):
    file = tmp_path / "written.tsv"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        measure(System("transcripts", str(file)), str(file), [], Options(), never)
