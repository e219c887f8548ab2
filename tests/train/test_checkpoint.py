"""What a training checkpoint keeps, which ones stay, and that damage is seen and passed over."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faults.runs import undamaged
from safetensors.torch import load_file
from torch import nn

from recipes.grokking.division import GrokfastAdamW
from whisper_moe.train import checkpoint
from whisper_moe.train.checkpoint import (
    COMMIT,
    FOLDER,
    STATE,
    best,
    latest,
    load,
    note,
    read,
    read_commit,
    save,
    tensors_of,
)
from whisper_moe.weights.files import CheckpointError, json_bytes

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8]
DTYPES += [torch.bool]


class Tensors(nn.Module):
    """A model of these tensors, and of a parameter, without which there is no optimizer."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        super().__init__()
        self.parameter = nn.Parameter(torch.zeros(1))
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


def nothing_learned(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters())


def commit(run: Path, step: int, keep: int = 9, score: float | None = None) -> Path:
    model = Tensors(w=torch.full((4,), float(step)))
    save(run, step, model, nothing_learned(model), {"step": step}, keep=keep)
    if score is not None:
        note(run, step, {"wer": score}, "wer", keep=keep)
    return sorted((run / FOLDER).iterdir())[-1]


def newest(run: Path) -> Path:
    found = latest(run)
    assert found is not None
    return found


def steps(run: Path) -> list[int]:
    return sorted(int(path.name.split("-")[-1]) for path in (run / FOLDER).iterdir())


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_tensors_come_back_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any type and shape, empty and of no dimension too; NaN with its payload; in one file or in many."""
    generator, tensors = np.random.default_rng(0), dict[str, torch.Tensor]()
    for dtype in DTYPES:
        for shape in ((), (0, 3), (1,), (2, 3), (2, 1, 3)):
            raw = generator.integers(0, 2 if dtype == torch.bool else 256, math.prod(shape) * dtype.itemsize)
            tensor = torch.from_numpy(raw.astype(np.uint8)).view(dtype) if len(raw) else torch.zeros(0, dtype=dtype)
            tensors[f"{str(dtype)[6:]}_{len(tensors)}"] = tensor.reshape(shape)
    matrix = torch.arange(12.0).reshape(3, 4)
    tensors |= {"turned": matrix.T, "row": matrix[1], "whole": matrix, "spread": matrix[1, 2].expand(2, 3)}
    model, empty = Tensors(**tensors), Tensors(**{name: torch.zeros_like(t) for name, t in tensors.items()})
    for run, limit in (("one", checkpoint.FILE_BYTES), ("many", 40)):
        monkeypatch.setattr(checkpoint, "FILE_BYTES", limit)
        save(tmp_path / run, 3, model, nothing_learned(model), {}, keep=1)
        path = newest(tmp_path / run)
        files = sorted(path.glob("*.safetensors"))
        assert (len(files) > 1) == (run == "many")
        assert {key for file in files for key in load_file(file)} == {
            f"model/{name}" for name in (*tensors, "parameter")
        }
        load(path, empty, nothing_learned(empty))
        found, whole = empty.state_dict(), read(path, "model/")
        for name, tensor in tensors.items():
            for same in (found[name], whole[f"model/{name}"]):
                assert (same.dtype, same.shape, bits(same)) == (tensor.dtype, tensor.shape, bits(tensor)), name


def test_meta_comes_back(tmp_path: Path) -> None:
    meta = {
        "a": [1, 2.5, None, True, "é"],
        "big": 2**127 + 1,
        "f": [0.1 + 0.2, 5e-324, float("inf")],
        "t": (1, (2,)),
    }
    model = Tensors(w=torch.ones(1))
    save(tmp_path, 1, model, nothing_learned(model), meta, keep=1)
    path = newest(tmp_path)
    assert load(path, model, nothing_learned(model)) == {**meta, "t": [1, [2]]}


def test_another_model_is_refused(tmp_path: Path) -> None:
    path = commit(tmp_path, 1)
    for model, message in ((Tensors(w=torch.ones(5)), "model/w"), (Tensors(v=torch.ones(4)), "model/v")):
        with pytest.raises(CheckpointError, match=rf"step-00000001: cannot be read .*{message}"):
            load(path, model, nothing_learned(model))


# Optimizers


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.LayerNorm(2))


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> list[float]:
    generator, losses = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (net(torch.randn(5, 3, generator=generator)) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def matrices_first(net: nn.Module) -> list[dict[str, Any]]:
    matrices = [p for p in net.parameters() if p.ndim == 2]
    return [
        {"params": matrices, "lr": 0.01},
        {"params": [p for p in net.parameters() if p.ndim < 2], "weight_decay": 0},
    ]


def vectors_first_backwards(net: nn.Module) -> list[dict[str, Any]]:
    return [{**group, "params": group["params"][::-1]} for group in matrices_first(net)[::-1]]


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.98), eps=1e-6),
    "fused": lambda groups: torch.optim.AdamW(groups, lr=1e-2, fused=True),
    "Grokfast": lambda groups: GrokfastAdamW(groups, lr=1e-2),
    "SGD": lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("order", [matrices_first, vectors_first_backwards])
def test_an_optimizer_goes_on_bit_for_bit(kind: str, order: Callable[[nn.Module], Any], tmp_path: Path) -> None:
    """Also where its groups and their parameters now come in another order: names count."""
    net = network()
    optimizer = OPTIMIZERS[kind](matrices_first(net))
    train(net, optimizer, 3, seed=1)
    save(tmp_path, 3, net, optimizer, {}, keep=1)
    expected = train(net, optimizer, 3, seed=2)

    again = network(seed=9)
    optimizer = OPTIMIZERS[kind](order(again))
    path = newest(tmp_path)
    load(path, again, optimizer)
    assert train(again, optimizer, 3, seed=2) == expected
    for name, tensor in net.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_what_never_had_a_gradient_has_no_state(tmp_path: Path) -> None:
    net, again = network(), network()
    optimizer = torch.optim.AdamW(net.parameters())
    assert len(tensors_of(net, optimizer)) == len(net.state_dict()) and not optimizer.state, "nor is it made by a look"
    next(net.parameters()).requires_grad_(False)
    train(net, optimizer, 1, seed=1)
    save(tmp_path, 1, net, optimizer, {}, keep=1)
    path, other = newest(tmp_path), torch.optim.AdamW(again.parameters())
    load(path, again, other)
    assert len(other.state) == len(optimizer.state) == 5
    assert tensors_of(again, other).keys() == tensors_of(net, optimizer).keys()


# Which ones stay


def test_the_newest_and_the_best_stay(tmp_path: Path) -> None:
    scores = {1: 0.9, 2: 0.3, 3: 0.5, 4: None, 5: 0.3, 6: 0.4}
    left = []
    for step, score in scores.items():
        commit(tmp_path, step, keep=2, score=score)
        left.append(steps(tmp_path))
    assert left == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5], [2, 5, 6]]
    found = best(tmp_path)
    assert found is not None and read_commit(found).step == 2, "the earliest of equals"
    commit(tmp_path, 7, keep=1, score=0.1)
    assert steps(tmp_path) == [7]


def test_nothing_has_been_saved_yet(tmp_path: Path) -> None:
    assert latest(tmp_path) is best(tmp_path) is None
    commit(tmp_path, 1)
    assert best(tmp_path) is None, "no score"


def test_the_newest_is_the_one_that_was_committed_last(tmp_path: Path) -> None:
    """A run that fell back from a damaged step 200 does not keep it in place of what it saves afterwards."""
    commit(tmp_path, 100)
    flip(part(commit(tmp_path, 200)))
    assert read_commit(newest(tmp_path)).step == 100
    commit(tmp_path, 150, keep=1)
    assert steps(tmp_path) == [150]
    commit(tmp_path, 150, keep=1)
    assert newest(tmp_path).name == "0004-step-00000150"


def test_what_could_not_be_measured_is_kept_and_is_no_score(tmp_path: Path) -> None:
    commit(tmp_path, 1, score=0.5)
    path = commit(tmp_path, 2, score=math.nan)
    found = best(tmp_path)
    assert found is not None and read_commit(found).step == 1
    evaluation = read_commit(path).evaluation
    assert evaluation is not None and list(evaluation) == ["wer"] and math.isnan(evaluation["wer"])
    with undamaged():
        assert latest(tmp_path) == path


# Damage


def part(path: Path) -> Path:
    return next(path.glob("shard-*"))


def flip(path: Path, at: int | None = None) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 1
    path.write_bytes(data)


def edit_commit(path: Path, **changes: Any) -> None:
    """As somebody would who means it: with the right checksum."""
    body = json.loads((path / COMMIT).read_text())["commit"] | changes
    (path / COMMIT).write_bytes(json_bytes({"commit": body, "sha256": hashlib.sha256(json_bytes(body)).hexdigest()}))


def swap(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped weight": (lambda p: flip(part(p), -1), "shard.*: sha256 differs"),
    "a flipped header": (lambda p: flip(part(p), 9), "shard.*: sha256 differs"),
    "a flipped state": (lambda p: flip(p / STATE), "state.json: sha256 differs"),
    "a truncated file": (lambda p: (p / STATE).write_bytes(b"{"), r"state.json: has 1 bytes, COMMIT.json says"),
    "an empty file": (lambda p: part(p).write_bytes(b""), "shard.*: has 0 bytes"),
    "a missing file": (lambda p: part(p).unlink(), "shard.*: cannot be read"),
    "an empty marker": (lambda p: (p / COMMIT).write_bytes(b""), "COMMIT.json: not JSON"),
    "another step": (lambda p: swap(p / COMMIT, '"step": 2', '"step": 7'), "COMMIT.json: does not match its own"),
    "a later format": (lambda p: edit_commit(p, format_version=3), "format_version: Input"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_with_one_loud_line(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    commit(tmp_path, 1)
    path = commit(tmp_path, 2, score=0.5)
    harm, cause = DAMAGES[damage]
    harm(path)
    caplog.clear()
    assert torch.equal(read(newest(tmp_path))["model/w"], torch.ones(4))
    (line,) = [record.getMessage() for record in caplog.records if record.name == checkpoint.logger.name]
    assert line.startswith("WARNING: a damaged checkpoint is passed over for 0001-step-00000001: ")
    assert path.name in line
    (tmp_path / FOLDER / "0001-step-00000001").rename(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=f"none of 1 checkpoints can be read; the newest: .*{cause}"):
        latest(tmp_path)


def test_what_is_damaged_after_it_was_looked_at_is_named(tmp_path: Path) -> None:
    path = commit(tmp_path, 1)
    part(path).write_bytes(b"\xff" * 64)
    with pytest.raises(CheckpointError, match="0001-step-00000001: cannot be read"):
        read(path)


def test_without_its_marker_it_is_no_checkpoint(tmp_path: Path) -> None:
    commit(tmp_path, 1)
    (commit(tmp_path, 2) / COMMIT).unlink()
    with undamaged():
        assert newest(tmp_path).name == "0001-step-00000001"
    assert commit(tmp_path, 3).name == "0003-step-00000003", "its number is not given again"
