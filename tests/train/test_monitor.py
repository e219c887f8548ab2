"""A run tells when it looks like the plateau before grokking."""

from __future__ import annotations

import json
from pathlib import Path

from whisper_moe.train.loop import StepReport
from whisper_moe.train.monitor import METRICS, RECENT, Monitor


def report(step: int, loss: float) -> StepReport:
    return StepReport(
        step=step, loss=loss, parts={"cross_entropy": loss}, rate=1.0, gradient_norm=1.0, label_tokens=1, tokens=1,
        segments=1, packs=1, skipped_samples=0,
    )  # fmt: skip


def test_the_plateau_is_told_of_the_mean_of_recent_steps(tmp_path: Path) -> None:
    said: list[str] = []
    step = 0
    with Monitor(tmp_path, steps=1_000, rate=1.0, say=said.append) as monitor:
        for loss in (4.0, 0.05, 0.05, 0.05, 0.05):
            for _ in range(RECENT):
                step += 1
                monitor.stepped(report(step, loss))
            monitor.evaluated(step, {"wer": 80.0, "loss": 4.2}, best=False)
    told = [line for line in said if "grokking" in line]
    assert len(told) == 1 and told[0].startswith(
        f"step {4 * RECENT}: the training loss is 0.05, the validation loss 4.2"
    )


def test_what_came_after_the_checkpoint_or_is_torn_is_dropped(tmp_path: Path) -> None:
    """A name may hold what Python takes for the end of a line; a line may end in half a letter, or in zeros."""
    monitor = Monitor(tmp_path, steps=9, rate=1.0, say=lambda line: None)
    monitor.skipped(report(1, 1.0), "the loss is nan", ["clip\u2028one"])
    monitor.stepped(report(2, 1.0))
    kept = (tmp_path / METRICS).read_bytes()
    monitor.stepped(report(3, 1.0))
    with (tmp_path / METRICS).open("ab") as file:
        file.write('{"step": 2, "ids": ["ଓ'.encode()[:-1] + b"\0" * 64)
    monitor.resume(2)
    assert (tmp_path / METRICS).read_bytes() == kept
    assert [json.loads(line)["step"] for line in kept.split(b"\n")[:-1]] == [1, 2]
    assert [path.name for path in tmp_path.iterdir()] == [METRICS]
