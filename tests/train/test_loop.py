"""The loop: how a step is cut does not change it, a run that goes on is the same run, and bad steps change nothing."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model.tiny import CONFIGS
from torch import Tensor, nn
from train.tiny import Fixed, notes, random_pack, tiny_trainer

from whisper_moe.data.examples import Pack
from whisper_moe.model.block import Block
from whisper_moe.train import checkpoint
from whisper_moe.train.loop import NonFiniteError, Trainer
from whisper_moe.train.losses import LossScale

GLOBAL = np.random  # what libraries draw from
LENGTHS = [[(20, 4), (33, 9)], [(51, 5)], [(12, 12), (7, 3), (25, 6)], [(40, 8)]]


def packs(name: str = "segment") -> list[Pack]:
    return [random_pack(lengths, CONFIGS[name], seed) for seed, lengths in enumerate(LENGTHS)]


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def moments(trainer: Trainer) -> dict[str, Tensor]:
    kept = checkpoint.tensors_of(trainer.model, trainer.optimizer)
    return {name: tensor.clone() for name, tensor in kept.items()}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def stopping(trainer: Trainer, after: int) -> Trainer:
    """As if some process were told to stop after this step."""
    trainer.parallel.any = lambda flag: trainer.progress.step == after  # pyright: ignore[reportAttributeAccessIssue]
    return trainer


def saving(trainer: Trainer, done: list[Any]) -> Trainer:
    """What is saved, and the figures that are added to it, go into a list instead."""

    def save(metrics: Mapping[str, float] | None = None) -> None:
        done.append(trainer.progress.step if metrics is None else metrics)

    trainer.save = save
    return trainer


def drawing(trainer: Trainer) -> list[tuple[float, ...]]:
    """What each pass draws from the global generators, as dropout would."""
    drawn: list[tuple[float, ...]] = []
    draw = lambda *_: drawn.append((random.random(), GLOBAL.rand(), torch.rand(()).item()))  # noqa: E731
    trainer.model.register_forward_pre_hook(draw)
    return drawn


def gradients(trainer: Trainer) -> dict[str, Tensor]:
    """What one step's gradients are, before anything is clipped."""
    caught: dict[str, Tensor] = {}

    def clip(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
        caught.update({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None})
        return nn.utils.clip_grad_norm_(list(parameters), max_norm)

    trainer.parallel.clip = clip  # pyright: ignore[reportAttributeAccessIssue]
    trainer.step()
    return caught


@pytest.mark.parametrize("name", ["dense", "segment", "token", "per expert"])
def test_several_passes_equal_one_big_batch(name: str) -> None:
    """With z-loss, but without the balance loss: its counts are of one pass."""
    losses: dict[str, Any] = {"losses": {"balance": 0.0, "z": 0.1 if name == "segment" else 0.0}}
    big = tiny_trainer(name, [packs(name)], double=True, sections=losses)
    cut = tiny_trainer(name, [[pack] for pack in packs(name)], double=True, accumulate=4, sections=losses)
    one, four = gradients(big), gradients(cut)
    assert one.keys() == four.keys() and len(one) > 20
    for key in one:
        assert (one[key] - four[key]).abs().max() <= 1e-10 * max(1e-3, one[key].abs().max().item()), key
    assert notes(big).losses == pytest.approx(notes(cut).losses, rel=1e-12)
    assert notes(big).reports[0]["label_tokens"] == notes(cut).reports[0]["label_tokens"] == 47 - 2 * 7


def test_every_kind_of_parameter_moves() -> None:
    trainer = tiny_trainer("segment", [packs()], steps=3)
    before = weights(trainer)
    trainer.run()
    still = [name for name, tensor in trainer.model.named_parameters() if torch.equal(before[name], tensor)]
    assert still == []


@pytest.mark.parametrize("name", ["segment", "token"])
def test_a_run_that_goes_on_is_the_same_run(name: str, tmp_path: Path) -> None:
    batches = [[pack] for pack in packs(name)]
    whole = tiny_trainer(name, batches, steps=7, accumulate=2)
    drawn = [drawing(whole)]
    whole.run()

    first = stopping(tiny_trainer(name, batches, steps=7, accumulate=2, directory=tmp_path), after=3)
    drawn.append(drawing(first))
    assert first.run() == "interrupted"
    found = checkpoint.latest(tmp_path)
    assert found is not None and checkpoint.step_of(found) == 3
    second = tiny_trainer(name, batches, seed=99, steps=7, accumulate=2)
    assert not same(weights(second), weights(first))
    second.load(found)
    drawn.append(drawing(second))
    second.run()
    assert drawn[1] + drawn[2] == drawn[0] and len(set(drawn[0])) == 14  # random numbers go on, too
    assert notes(first).losses + notes(second).losses == notes(whole).losses
    assert same(weights(second), weights(whole))
    given = [trainer.batches.given for trainer in (first, second, whole)]  # pyright: ignore[reportAttributeAccessIssue]
    assert given[0] + given[1] == given[2]


def poisoned(pack: Pack) -> Pack:
    return replace(pack, mels=(pack.mels[0] * math.nan, *pack.mels[1:]))


def test_a_step_that_is_not_finite_is_left_out_and_named() -> None:
    good, bad = packs()[:2], poisoned(packs()[2])
    trainer = tiny_trainer("segment", [good[:1], [bad], good[1:]], steps=3, accumulate=1)
    trainer.step()
    before = weights(trainer), moments(trainer)
    trainer.step()
    assert same(before[0], weights(trainer)) and same(before[1], moments(trainer))
    ((step, cause, ids),) = notes(trainer).skips
    assert (step, cause, tuple(ids)) == (2, "the loss is nan", bad.ids)
    trainer.step()
    assert not same(before[0], weights(trainer))
    progress = trainer.progress
    assert (progress.step, progress.bad_steps, progress.bad_in_a_row) == (3, 1, 0)


def test_only_the_batches_at_fault_are_named() -> None:
    trainer = tiny_trainer("segment", [packs()[:1], [poisoned(packs()[1])], packs()[2:]], accumulate=3)
    trainer.step()
    assert notes(trainer).skips[0][2] == list(packs()[1].ids)


def test_a_gradient_that_is_not_finite_counts_as_well() -> None:
    trainer = tiny_trainer("dense", [packs("dense")])
    trainer.model.encoder.norm.weight.register_hook(lambda gradient: gradient / 0)
    before = weights(trainer)
    trainer.step()
    assert same(before, weights(trainer))
    assert "the gradient is" in notes(trainer).skips[0][1] and len(notes(trainer).skips[0][2]) == 7


def test_after_too_many_in_a_row_the_run_ends() -> None:
    trainer = tiny_trainer("segment", [[poisoned(packs()[0])]], steps=9, most_bad_steps=3)
    with pytest.raises(NonFiniteError, match=r"step 3: the loss is nan, as in the 2 steps before.*0-0"):
        trainer.run()
    mixed = tiny_trainer("segment", [[poisoned(packs()[0])], packs()[1:]], steps=9, most_bad_steps=2)
    assert mixed.run() == "finished" and mixed.progress.bad_steps == 5


def test_gradients_are_clipped_to_the_norm() -> None:
    trainer = tiny_trainer("dense", [packs("dense")], clip=1e-3)
    seen: list[float] = []
    step = trainer.optimizer.step

    def watched(*args: Any) -> Any:
        grads = [p.grad for p in trainer.model.parameters() if p.grad is not None]
        seen.append(torch.cat([g.flatten() for g in grads]).norm().item())
        return step(*args)

    trainer.optimizer.step = watched
    assert trainer.step()["gradient_norm"] > 1e-2 and seen == [pytest.approx(1e-3, rel=1e-3)]


def test_the_best_evaluation_is_kept_and_a_run_without_progress_ends() -> None:
    """What could not be measured is neither better nor worse. A step is saved before it is judged."""
    figures: Iterator[float] = iter([0.9, math.nan, 0.5, 0.6, math.nan, 0.7, math.inf, 0.8, 0.1])
    done: list[Any] = []
    trainer = tiny_trainer(
        "dense",
        [packs("dense")],
        steps=18,
        sections={"evaluation": {"every": 2, "patience": 3}},
        figures=lambda model, stop: done.append("judged") or {"wer": next(figures)},
    )
    saving(trainer, done)
    assert trainer.run() == "stopped early"
    assert trainer.progress.step == 16 and (trainer.progress.best, trainer.progress.best_step) == (0.5, 6)
    assert [best for _, _, best in notes(trainer).evaluations] == [True, False, True, *[False] * 5]
    assert done[6:9] == [6, "judged", {"wer": 0.5}] and len(done) == 3 * 8


def test_nothing_but_what_cannot_be_measured_is_no_reason_to_stop() -> None:
    trainer = tiny_trainer(
        "dense",
        [packs("dense")],
        steps=6,
        sections={"evaluation": {"every": 1, "patience": 1}},
        figures=lambda model, stop: {"wer": math.nan},
    )
    assert trainer.run() == "finished" and trainer.progress.best is None


@pytest.mark.parametrize("last", [False, True])
def test_an_evaluation_that_is_owed_is_made_once_and_no_step_twice(last: bool, tmp_path: Path) -> None:
    """Stopped in an evaluation, on the way or at the end: the next trainer begins with it."""
    settings: dict[str, Any] = {"steps": 4 if last else 6, "sections": {"evaluation": {"every": 4}}}
    batches = [[pack] for pack in packs("dense")]
    first = tiny_trainer("dense", batches, figures=lambda model, stop: None, directory=tmp_path, **settings)
    assert stopping(first, after=4).run() == "interrupted" and first.progress.step == 4 and first.progress.judged == 0
    second = tiny_trainer("dense", batches, seed=5, figures=lambda model, stop: {"wer": 0.5}, **settings)
    (found,) = (tmp_path / checkpoint.FOLDER).iterdir()
    second.load(found)
    assert second.ended() is None and second.run() == "finished"
    assert [step for step, *_ in notes(second).evaluations] == ([4] if last else [4, 6])
    assert [report["step"] for report in notes(second).reports] == ([] if last else [5, 6])
    assert checkpoint.step_of(found) == 4


def test_checkpoints_come_when_they_are_due_and_at_the_end() -> None:
    saved: list[int] = []
    trainer = tiny_trainer("dense", [packs("dense")], steps=7, sections={"run": {"checkpoint_every": 3}})
    saving(trainer, saved).run()
    assert saved == [3, 6, 7]


def test_the_rate_of_a_step_is_the_schedules() -> None:
    trainer = tiny_trainer("dense", [packs("dense")], steps=9, warmup=4)
    before = weights(trainer)
    trainer.step()
    assert same(before, weights(trainer))  # the first rate is 0
    trainer.step()
    assert trainer.optimizer.param_groups[0]["lr"] == trainer.optimizer.param_groups[0]["peak"] / 4
    assert not same(before, weights(trainer))


@pytest.mark.parametrize("name", ["segment", "token"])
def test_recomputed_activations_give_the_same_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, recomputed = (tiny_trainer(name, [packs(name)], double=True) for _ in range(2))
    for module in recomputed.model.modules():
        if isinstance(module, Block):
            module.recompute = True
    runs: list[int] = []
    compute = Block._compute
    monkeypatch.setattr(Block, "_compute", lambda self, *args: (runs.append(self.layer), compute(self, *args))[1])
    expected = gradients(plain)
    once = len(runs)
    found = gradients(recomputed)
    assert len(runs) - once == 2 * once
    assert found.keys() == expected.keys()
    assert max((found[key] - expected[key]).abs().max().item() for key in found) < 1e-12
    first, second = notes(plain).reports[0], notes(recomputed).reports[0]
    assert first.pop("load") == pytest.approx(second.pop("load"))
    assert first == pytest.approx(second)


def test_half_precision_leaves_routers_fast_weights_and_parameters_alone() -> None:
    single, half = (tiny_trainer("segment", [packs()], precision=p) for p in ("float32", "bfloat16"))
    first, second = single.step(), half.step()
    assert first["loss"] != second["loss"] == pytest.approx(first["loss"], rel=0.02)
    assert all(parameter.dtype == torch.float32 for parameter in half.model.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        output = half.model([packs()[0].mels[0]], [packs()[0].tokens_T[:4]])
    assert output.logits.dtype == torch.bfloat16 and output.routings[0].logits.dtype == torch.float32


def test_a_scale_that_overflows_is_halved_and_grows_again() -> None:
    scale = LossScale(enabled=True)
    assert scale.value == 65_536
    assert scale.halve() and scale.value == 32_768
    for _ in range(scale.growth_steps):
        scale.grow()
    assert scale.value == 65_536
    scale.value = 1.0
    assert not scale.halve() and not LossScale(enabled=False).halve()
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.full((2,), 65_536.0)
    LossScale(enabled=True).remove([parameter])
    assert parameter.grad.tolist() == [1, 1]


def test_a_scaled_loss_makes_the_same_update() -> None:
    plain, scaled = (tiny_trainer("segment", [packs()]) for _ in range(2))
    scaled.scale = LossScale(enabled=True)
    for _ in range(2):
        plain.step(), scaled.step()
    assert (
        max((a - b).abs().max().item() for a, b in zip(weights(plain).values(), weights(scaled).values(), strict=True))
        < 1e-6
    )


def test_data_without_a_batch_is_an_error() -> None:
    trainer = tiny_trainer("dense", [])
    with pytest.raises(ValueError, match="gives no batch"):
        trainer.step()


def test_epochs_follow_one_another() -> None:
    trainer = tiny_trainer("dense", [[pack] for pack in packs("dense")], steps=6)
    trainer.run()
    assert isinstance(trainer.batches, Fixed)
    assert trainer.batches.given[4:] == trainer.batches.given[:2]


def test_a_step_that_overflows_updates_nothing_and_is_told() -> None:
    trainer = tiny_trainer("segment", [packs()])
    trainer.precision, trainer.scale = "float16", LossScale(enabled=True)
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    trainer.scale.value = 2.0**120  # the scaled loss is finite, its gradients are not
    trainer.step()
    assert all(map(torch.equal, before, trainer.model.parameters()))
    assert notes(trainer).scales == [(1, 2.0**119)] and not notes(trainer).skips and not notes(trainer).reports
    assert trainer.progress.bad_steps == 0 and trainer.progress.step == 1
