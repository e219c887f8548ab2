"""What a run writes down and says, and what is forgotten of it where it goes on from before."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from train.tiny import tiny_recipe

from whisper_moe.data.sample import Skipped
from whisper_moe.train.monitor import METRICS, SKIPPED, Monitor


def monitor_of(run: Path, **settings: Any) -> Monitor:
    return Monitor(run, tiny_recipe(run=settings))


def figures(loss: float) -> dict[str, Any]:
    return {"epoch": 1, "loss": loss, "lr": 1e-3, "tokens": 1, "fill": 0.5}


def test_what_came_after_the_checkpoint_or_is_torn_is_dropped(tmp_path: Path) -> None:
    """A name may hold what Python takes for the end of a line; a line may end in half a letter, or in zeros."""
    monitor = monitor_of(tmp_path)
    monitor.skipped(1, "the loss is nan", ["clip\u2028one"])
    monitor.stepped(2, figures(1.0))
    kept = (tmp_path / METRICS).read_bytes()
    monitor.stepped(3, figures(1.0))
    with (tmp_path / METRICS).open("ab") as file:
        file.write('{"step": 2, "ids": ["ଓ'.encode()[:-1] + b"\0" * 64)
    monitor.begin(9, after=2)
    assert (tmp_path / METRICS).read_bytes() == kept
    assert [json.loads(line)["step"] for line in kept.split(b"\n")[:-1]] == [1, 2]
    assert [path.name for path in tmp_path.iterdir()] == [METRICS]


def test_an_evaluation_that_was_not_noted_is_forgotten(tmp_path: Path) -> None:
    monitor = monitor_of(tmp_path)
    for step in (1, 2):
        monitor.stepped(step, figures(1.0))
        monitor.evaluated(step, {"wer": 0.5}, best=False)

    def left(judged: bool) -> list[tuple[int, bool]]:
        monitor.begin(9, after=2, judged=judged)
        return [(line["step"], "evaluation" in line) for line in map(json.loads, (tmp_path / METRICS).open())]

    assert left(True) == [(1, False), (1, True), (2, False), (2, True)]
    assert left(False) == [(1, False), (1, True), (2, False)]


def test_what_could_not_be_measured_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    monitor_of(tmp_path).evaluated(2, {"loss": 1.0, "wer": math.nan}, best=False)
    assert caplog.messages[0] == "WARNING: step 2: wer could not be measured, and counts as nothing"


def test_the_board_has_what_was_written_down(tmp_path: Path) -> None:
    """Once, however often it is asked for, and without what a run that went on from before has forgotten."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from recipes.board import write

    for step, loss in ((2, 1.0), (4, 5.0)):
        monitor = monitor_of(tmp_path)
        monitor.begin(9, after=step - 2)
        for late in range(step - 1, step + 1):
            monitor.stepped(late, figures(loss) | {"load": {"hindi": 0.25}})
        monitor.skipped(step + 1, "the loss is nan", ["a"])
        monitor.evaluated(step, {"wer": math.nan}, best=False)
        board = EventAccumulator(str(write(tmp_path))).Reload()
    assert [(event.step, event.value) for event in board.Scalars("train/loss")] == [(1, 1), (2, 1), (3, 5), (4, 5)]
    assert [event.value for event in board.Scalars("train/load/hindi")] == [0.25] * 4
    assert [event.step for event in board.Scalars("evaluation/wer")] == [4]


def test_a_step_without_room_in_float16_leaves_a_line(tmp_path: Path) -> None:
    monitor_of(tmp_path).rescaled(3, 32_768.0)
    assert json.loads((tmp_path / METRICS).read_text()) == {"step": 3, "overflow": True, "loss_scale": 32_768.0}


def test_a_sample_that_is_left_out_is_written_down_once(tmp_path: Path) -> None:
    """Whatever its name: with the end of a line in it, or bytes that are no text. A line that a kill cut off is written again."""
    names = ("a", "clip\u2028one", "b\udc80.wav", "ଓଡ଼ିଆ")
    samples = [Skipped(id=name, place="t.tsv, row 2", cause="no text") for name in names]
    first = monitor_of(tmp_path)
    first.left_out(samples[:2])
    first.left_out(samples)
    whole = (tmp_path / SKIPPED).read_bytes()
    assert [json.loads(line)["id"] for line in whole.split(b"\n")[:-1]] == list(names)
    assert json.loads(whole.split(b"\n")[0]) == {
        "id": "a",
        "place": "t.tsv, row 2",
        "kind": "corrupt",
        "cause": "no text",
    }
    (tmp_path / SKIPPED).write_bytes(whole[:-9])
    resumed = monitor_of(tmp_path)
    resumed.left_out(samples)
    resumed.left_out([*samples, Skipped(id="c", kind="too long", cause="31 s")])
    assert (tmp_path / SKIPPED).read_bytes().startswith(whole)
    assert len((tmp_path / SKIPPED).read_bytes().split(b"\n")) == len(names) + 2
