"""What a training checkpoint keeps, which ones stay, and that damage is seen and passed over."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faults.runs import newest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from whisper_moe.train.checkpoint import COMMIT, FOLDER, STATE, best, latest, load, note, read_commit, save
from whisper_moe.weights.files import CheckpointError

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
]  # fmt: skip


def commit(run: Path, step: int, keep: int = 9, score: float | None = None, **options: Any) -> Path:
    tensors = {"model/w": torch.full((4,), float(step)), "optimizer/w/exp_avg": torch.full((4,), step / 3)}
    path = save(run, step, tensors, {"step": step}, keep=keep, **options)
    if score is not None:
        note(run, step, {"wer": score}, "wer", keep=keep)
    return path


def steps(run: Path) -> list[int]:
    return sorted(int(path.name.split("-")[-1]) for path in (run / FOLDER).iterdir())


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.text("ab./é", min_size=1, max_size=6),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3), st.integers(0, 2**31)),
        max_size=6,
    )
)
def test_tensors_come_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, kinds: dict[str, tuple[torch.dtype, list[int], int]]
) -> None:
    """Any dtype and shape, empty and of no dimension too; NaN with its payload."""
    tensors: dict[str, Tensor] = {}
    for name, (dtype, shape, seed) in kinds.items():
        count = int(np.prod(shape, dtype=int))
        raw = np.random.default_rng(seed).integers(0, 2 if dtype == torch.bool else 256, count * dtype.itemsize)
        tensor = torch.from_numpy(raw.astype(np.uint8)).view(dtype) if count else torch.zeros(0, dtype=dtype)
        tensors[f"model/{name}"] = tensor.reshape(shape)
    run = tmp_path_factory.mktemp("run")
    path = save(run, 3, tensors, {}, keep=1)
    loaded = load(path).tensors
    assert loaded.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert (loaded[key].dtype, loaded[key].shape) == (tensor.dtype, tensor.shape)
        assert bits(loaded[key]) == bits(tensor)
    if tensors:
        assert load_file(path / "model.safetensors").keys() == {key.removeprefix("model/") for key in tensors}


def test_views_parameters_and_shared_memory(tmp_path: Path) -> None:
    matrix = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "model/t": matrix.T, "model/row": matrix[1], "model/tied": matrix, "model/p": torch.nn.Parameter(matrix),
        "model/spread": matrix[1, 2].expand(2, 3), "model/one": matrix[2, 1].expand(1), "model/none": matrix[0, 0].expand(0),
    }  # fmt: skip
    loaded = load(save(tmp_path, 1, tensors, {}, keep=1)).tensors
    for key, tensor in tensors.items():
        assert torch.equal(loaded[key], tensor) and not loaded[key].requires_grad
    loaded["model/tied"].zero_()
    assert loaded["model/row"].any(), "each has memory of its own"


def test_what_is_loaded_outlives_its_files(tmp_path: Path) -> None:
    path = commit(tmp_path, 1)
    loaded = load(path)
    for file in path.iterdir():
        file.write_bytes(b"\xff" * file.stat().st_size)
    assert torch.equal(loaded.tensors["model/w"], torch.ones(4))


def test_meta_comes_back(tmp_path: Path) -> None:
    meta = {
        "a": [1, 2.5, None, True, "é\ud7ff"],
        "big": 2**127 + 1,
        "f": [0.1 + 0.2, 5e-324, float("inf")],
        "t": (1, (2,)),
    }
    loaded = load(save(tmp_path, 1, {}, meta, keep=1)).meta
    assert loaded == {**meta, "t": [1, [2]]}
    nan = load(save(tmp_path, 2, {}, {"loss": float("nan")}, keep=1)).meta["loss"]
    assert nan != nan


@pytest.mark.parametrize(
    ("tensors", "meta", "message"),
    [
        ({}, {"loader": {"epochs": {0: "x"}}}, r"meta.loader.epochs has the key 0; JSON has only text"),
        ({}, {"a": [1, {"b": torch.zeros(1)}]}, r"meta.a\[1\].b is of Tensor, which JSON does not have"),
        ({}, {"a": np.int64(3)}, r"meta.a is of int64"),
        ({"weight": torch.zeros(1)}, {}, r"named like model/encoder.norm.bias, group first; not 'weight'"),
        ({"../model/w": torch.zeros(1)}, {}, r"not '../model/w'"),
        ({"/w": torch.zeros(1)}, {}, r"not '/w'"),
        ({"model/": torch.zeros(1)}, {}, r"not 'model/'"),
        ({"model/w": torch.zeros(1, dtype=torch.complex64)}, {}, "model/w: safetensors cannot hold torch.complex64"),
    ],
)
def test_what_cannot_be_kept_is_refused_before_anything_is_written(
    tensors: dict[str, Tensor], meta: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        save(tmp_path, 1, tensors, meta, keep=1)
    assert list(tmp_path.iterdir()) == []


def test_keep_is_at_least_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep must be at least 1, is 0"):
        commit(tmp_path, 1, keep=0)


# Which ones stay


def test_the_newest_and_the_best_stay(tmp_path: Path) -> None:
    scores = {1: 0.9, 2: 0.3, 3: 0.5, 4: None, 5: 0.3, 6: 0.4}
    left = []
    for step, score in scores.items():
        commit(tmp_path, step, keep=2, score=score)
        left.append(steps(tmp_path))
    assert left == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5], [2, 5, 6]]
    found = best(tmp_path)
    assert found is not None and load(found).step == 2, "the earliest of equals"
    commit(tmp_path, 7, keep=1, score=0.1)
    assert steps(tmp_path) == [7]


def test_nothing_has_been_saved_yet(tmp_path: Path) -> None:
    assert latest(tmp_path) is best(tmp_path) is None
    commit(tmp_path, 1)
    assert best(tmp_path) is None, "no score"


def test_the_newest_is_the_one_that_was_committed_last(tmp_path: Path) -> None:
    """A run that fell back from a damaged step 200 does not keep it in place of what it saves afterwards."""
    commit(tmp_path, 100)
    flip(commit(tmp_path, 200) / "model.safetensors")
    loaded = newest(tmp_path, announce=lambda _: None)
    assert loaded is not None and loaded.step == 100
    commit(tmp_path, 150, keep=1)
    assert steps(tmp_path) == [150]
    commit(tmp_path, 150, keep=1)
    loaded = newest(tmp_path)
    assert loaded is not None and loaded.step == 150 and loaded.path.name.startswith("0004-")


def test_what_could_not_be_measured_is_kept_and_is_no_score(tmp_path: Path) -> None:
    commit(tmp_path, 1, score=0.5)
    path = commit(tmp_path, 2, score=math.nan)
    found = best(tmp_path)
    assert found is not None and load(found).step == 1
    evaluation = read_commit(path).evaluation
    assert evaluation is not None and list(evaluation) == ["wer"] and math.isnan(evaluation["wer"])
    assert load(path).step == 2, "and the checkpoint is whole"


# Damage


def flip(path: Path, at: int | None = None) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 1
    path.write_bytes(data)


def edit_commit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """As somebody would who means it: with the right checksum."""
    import hashlib

    from whisper_moe.weights.files import json_bytes

    body = json.loads((path / COMMIT).read_text())["commit"]
    change(body)
    (path / COMMIT).write_bytes(json_bytes({"commit": body, "sha256": hashlib.sha256(json_bytes(body)).hexdigest()}))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped weight": (lambda p: flip(p / "model.safetensors", -1), "model.safetensors: sha256 differs"),
    "a flipped header": (lambda p: flip(p / "optimizer.safetensors", 9), "optimizer.safetensors: sha256 differs"),
    "a flipped state": (lambda p: flip(p / STATE), "state.json: sha256 differs"),
    "a truncated file": (lambda p: (p / STATE).write_bytes(b"{"), r"state.json: has 1 bytes, COMMIT.json says"),
    "an empty file": (lambda p: (p / "model.safetensors").write_bytes(b""), "model.safetensors: has 0 bytes"),
    "a missing file": (lambda p: (p / "model.safetensors").unlink(), "model.safetensors: cannot be read"),
    "an empty marker": (lambda p: (p / COMMIT).write_bytes(b""), "COMMIT.json: not JSON"),
    "another step": (lambda p: swap(p / COMMIT, '"step": 2', '"step": 7'), "COMMIT.json: does not match its own"),
    "a later format": (lambda p: edit_commit(p, lambda c: c.update(format_version=2)), "format_version: Input"),
    "an escape": (
        lambda p: edit_commit(p, lambda c: c["files"].update({"../x": c["files"][STATE]})),
        "COMMIT.json: lists '../x', which is not the name",
    ),
    "no state": (lambda p: edit_commit(p, lambda c: c["files"].pop(STATE)), "does not list state.json"),
}


def swap(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_with_one_loud_line(damage: str, tmp_path: Path) -> None:
    commit(tmp_path, 1)
    path = commit(tmp_path, 2, score=0.5)
    harm, cause = DAMAGES[damage]
    harm(path)
    with pytest.raises(CheckpointError, match=cause):
        load(path)
    lines: list[str] = []
    loaded = newest(tmp_path, announce=lines.append)
    assert loaded is not None and loaded.step == 1 and torch.equal(loaded.tensors["model/w"], torch.ones(4))
    (line,) = lines
    assert (
        line.startswith("WARNING: a damaged checkpoint is passed over for 0001-step-00000001: ") and path.name in line
    )
    assert latest(tmp_path, announce=lines.append) == loaded.path and lines == [line, line]


def test_without_its_marker_it_is_no_checkpoint(tmp_path: Path) -> None:
    commit(tmp_path, 1)
    (commit(tmp_path, 2) / COMMIT).unlink()
    loaded = newest(tmp_path, announce=lambda line: pytest.fail(line))
    assert loaded is not None and loaded.step == 1
    assert commit(tmp_path, 3).name == "0003-step-00000003", "its number is not given again"


def test_a_run_is_not_begun_anew_because_all_is_damaged(tmp_path: Path) -> None:
    for step in (1, 2):
        flip(commit(tmp_path, step) / STATE)
    with pytest.raises(CheckpointError, match=r"none of 2 checkpoints can be read; the newest: .*00000002/state.json"):
        latest(tmp_path)


def test_groups_are_read_alone(tmp_path: Path) -> None:
    path = commit(tmp_path, 1)
    flip(path / "optimizer.safetensors")
    assert load(path, ["model"]).tensors.keys() == {"model/w"}
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors: sha256"):
        load(path, ["optimizer"])
    with pytest.raises(CheckpointError, match=r"has no ema\.safetensors"):
        load(path, ["ema"])
