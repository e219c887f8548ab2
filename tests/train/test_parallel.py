"""Many processes do what one does: loss, gradients and what becomes of the model, in every layout."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from train import ranks
from train.tiny import recipe_tree

from recipes.parallel.train import ModelParallelRecipe, RanksRecipe, cut, spread_experts
from whisper_moe.train import checkpoint
from whisper_moe.train.parallel import Use, device_of
from whisper_moe.train.reading import RecipeError, checked

UNUSED = r"\.experts\.(up|down_weight)"
TOLERANCE = 1e-5
"""Relative to a tensor's largest value, in float32."""


@cache
def alone(key: tuple[Any, ...]) -> dict[str, Any]:
    case = next(case for cases in ranks.CASES.values() for case in cases if case.alone == key)
    return ranks.single(case)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def quick(folder: Path) -> list[dict[str, Any]]:
    """All that two processes compute in seconds."""
    return ranks.run_ranks("quick", 2, folder, CASES="two")


@pytest.fixture(scope="module")
def two(quick: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [rank["layouts"] for rank in quick]


@pytest.fixture(scope="module")
def two_more(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return ranks.run_ranks("layouts", 2, tmp_path_factory.mktemp("two_more"), CASES="two more")


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return ranks.run_ranks("layouts", 4, tmp_path_factory.mktemp("four"), CASES="four")


def every_case() -> list[Any]:
    return [
        pytest.param(
            name.replace(" ", "_"), case, id=f"{name}: {case.name}", marks=[pytest.mark.slow] * (name != "two")
        )
        for name, cases in ranks.CASES.items()
        for case in cases
    ]


@pytest.mark.parametrize(("world", "case"), every_case())
def test_many_processes_compute_what_one_computes(world: str, case: ranks.Case, request: pytest.FixtureRequest) -> None:
    all_ranks = request.getfixturevalue(world)
    found, expected = all_ranks[0][case.name], alone(case.alone)
    assert found["labels"] == expected["labels"] and min(found["labels"]) > 0
    assert found["losses"] == pytest.approx(expected["losses"], rel=TOLERANCE)
    assert found["norms"] == pytest.approx(expected["norms"], rel=TOLERANCE)
    assert min(found["norms"]) > 2 * ranks.CLIP, "nothing was clipped"
    assert found["loads"] == expected["loads"], "another choice of experts"
    assert found["gradients"].keys() == expected["gradients"].keys()
    differences = {name: ranks.relative(found["gradients"][name], g) for name, g in expected["gradients"].items()}
    assert {name: value for name, value in differences.items() if value > TOLERANCE} == {}
    assert sum(bool(g.any()) for g in expected["gradients"].values()) > 0.9 * len(differences)
    for other in all_ranks[1:]:
        for key in ("losses", "norms", "loads"):
            assert other[case.name][key] == found[key], f"ranks disagree about their {key}"


def layout_of(two: list[dict[str, Any]], name: str) -> dict[str, tuple[str, list[str], int, int]]:
    return two[0][name]["parts"]


def test_fsdp2_holds_a_share_of_every_parameter(two: list[dict[str, Any]]) -> None:
    """By what lies on the rank, not by what was asked for: every parameter a DTensor, half of the elements each."""
    by_rank = [rank["token: fsdp2, recomputing"]["parts"] for rank in two]
    assert len(by_rank[0]) > 100
    assert {(kind, tuple(places)) for kind, places, _, _ in by_rank[0].values()} == {("DTensor", ("S(0)",))}
    for name, (_, _, mine, whole) in by_rank[0].items():
        assert mine + by_rank[1][name][2] == whole
        assert mine < whole or by_rank[0][name][3] < 2
    held = sum(mine for _, _, mine, _ in by_rank[0].values()) / sum(whole for _, _, _, whole in by_rank[0].values())
    assert 0.5 <= held < 0.52
    replicated = two[0]["per expert: ddp"]["parts"].values()
    assert all(kind != "DTensor" and mine == whole for kind, _, mine, whole in replicated)


def test_experts_and_cut_layers_lie_on_one_rank_each(two: list[dict[str, Any]]) -> None:
    dealt = layout_of(two, "segment: ddp, experts 2, accumulating")
    assert {name.split(".")[-2] for name, part in dealt.items() if part[0] == "DTensor"} == {"experts"}
    cut = layout_of(two, "segment: none, tensor 2, recomputing")
    for parts, pattern in (
        (dealt, r"experts\."),
        (cut, r"(qkv|\.q|kv|up)\.|(out|down)\.weight|experts\.(up|down_weight)"),
    ):
        expected = {name for name in parts if re.search(pattern, name) and ".ttt." not in name}
        halves = {name for name, (_, _, mine, whole) in parts.items() if 2 * mine == whole}
        assert halves == expected and len(halves) >= 8


# Whole tensors, and checkpoints


@pytest.fixture(scope="module")
def single_run() -> dict[str, Any]:
    """One process, without a break, as long as a run that changes its layout twice."""
    return ranks.single(ranks.Case("alone", "segment", {}), 3 * ranks.TURN)


def test_whole_tensors_leave_a_layout_and_come_back(quick: list[dict[str, Any]]) -> None:
    found = [rank["whole"] for rank in quick]
    expected = ranks.single(ranks.Case("alone", "segment", {}), 1)["tensors"]
    model = ranks.tiny_model("segment", torch.float32)
    model.load_state_dict({name.removeprefix("model/"): t for name, t in expected.items() if name.startswith("model/")})
    assert model.encoder.router is not None
    model.encoder.router.only = (1,)  # as where one expert is trained alone
    logits = model(list(ranks.pack((9, 30), 5).mels), ranks.random_texts([4, 5])).logits.detach()
    for layout in ("fsdp2", "experts", "tensor"):
        for rank in found:
            own = rank[layout]
            assert own["tensors"].keys() == expected.keys() == own["again"].keys()
            assert all(torch.equal(own["again"][name], tensor) for name, tensor in own["tensors"].items())
            assert own["losses"][0] == own["losses"][1]
            assert (
                max(ranks.relative(own["tensors"][n], t) for n, t in expected.items() if n.startswith("model/")) < 1e-4
            )
        assert ranks.relative(found[0][layout]["logits"], logits) < 1e-4


def going_on(
    world: int, folder: Path, first: int, before: str | None, after: str | None, **parallel: Any
) -> list[float]:
    told = {"model": "segment", "parallel": parallel, "first": first, "before": before, "after": after}
    return ranks.run_ranks("going_on", world, folder, GOING_ON=ranks.json.dumps(told))[0]["losses"]


@pytest.mark.parametrize("layout", ranks.STOPS)
def test_one_process_goes_on_where_two_stopped(
    layout: str, quick: list[dict[str, Any]], folder: Path, single_run: dict[str, Any]
) -> None:
    case, turn = ranks.Case("alone", "segment", {}), ranks.TURN
    losses = quick[0]["stopping"][layout]
    losses = losses + ranks.go_on(case, ranks.Parallel(), turn, str(folder / layout), None)["losses"]
    assert losses == pytest.approx(single_run["losses"][: 2 * turn], rel=TOLERANCE)
    (made,) = (folder / layout / checkpoint.FOLDER).iterdir()
    commit, *shards, state = sorted(path.name for path in made.iterdir())
    assert (commit, state) == (checkpoint.COMMIT, checkpoint.STATE)
    assert [name[:11] for name in shards] == ["shard-00001", "shard-00002"]
    assert set(json.loads((made / commit).read_text("utf-8"))["commit"]["files"]) == {*shards, state}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("two", "four"),
    [
        ({"data": "fsdp2"}, {"data": "fsdp2"}),
        ({"data": "ddp", "experts": 2}, {"data": "fsdp2", "experts": 2}),
        ({"data": "none", "tensor": 2}, {"data": "fsdp2", "tensor": 2}),
        ({"data": "fsdp2", "experts": 2}, {"data": "ddp", "tensor": 2}),
    ],
    ids=str,
)
def test_a_run_goes_on_in_two_then_one_then_four_processes(
    two: dict[str, Any], four: dict[str, Any], tmp_path: Path, single_run: dict[str, Any]
) -> None:
    folders, turn = [str(tmp_path / name) for name in ("two", "one")], ranks.TURN
    losses = going_on(2, tmp_path, 0, None, folders[0], **two)
    case = ranks.Case("alone", "segment", {})
    losses += ranks.go_on(case, ranks.Parallel(), turn, folders[0], folders[1])["losses"]
    losses += going_on(4, tmp_path, 2 * turn, folders[1], None, **four)
    assert losses == pytest.approx(single_run["losses"], rel=TOLERANCE)


# Words between ranks, and errors


def check_words(said_by_rank: list[dict[str, Any]]) -> None:
    for rank, said in enumerate(said_by_rank):
        assert said["data"] == (2 * rank // len(said_by_rank), 2)
        assert said["sum"].tolist() == [2.0, 1.0]
        assert said["any"] == (True, False)
        assert said["gather"] == ["clip 0", "clip 1", "clip 1"]
        assert said["broadcast"] == "from 0"


def test_two_ranks_tell_each_other(quick: list[dict[str, Any]]) -> None:
    check_words([rank["words"] for rank in quick])


@pytest.mark.slow
def test_two_shares_of_two_ranks_tell_each_other(tmp_path: Path) -> None:
    check_words(ranks.run_ranks("words", 4, tmp_path))


def test_a_rank_that_fails_ends_all_and_is_named(tmp_path: Path) -> None:
    started = ranks.start("failing", 2, tmp_path)
    first, last = ranks.finish(started, timeout=120)
    assert [process.returncode != 0 for process in started] == [True, True]
    assert re.search(r"rank 1 of 2 \(\S+, process \d+\): ValueError: clip 7 of the corpus has a broken header", last)
    assert re.search(r"rank 0 of 2 \(.*\): LostPeerError: another process of the run ended", first)


def test_a_rank_that_never_comes_is_not_waited_for(tmp_path: Path) -> None:
    started = ranks.start("silent", 2, tmp_path, TIMEOUT="3")
    try:
        first = started[0].communicate(timeout=120)[1]
    finally:
        for process in started:
            process.kill()
    assert started[0].returncode == 1
    assert re.search(r"rank 0 of 2 \(.*\): LostPeerError: .*did not answer in time", first)


# Layouts


def test_ranks_are_dealt_out() -> None:
    assert RanksRecipe(data="fsdp2", experts=4).replicas(8) == 2
    assert RanksRecipe(data="ddp", tensor=2).replicas(8) == 4
    assert RanksRecipe().replicas(1) == 1


@pytest.mark.parametrize(
    ("values", "world", "message"),
    [
        ({"experts": 3}, 8, "parallel.experts is 3, which does not divide the 8 processes"),
        ({"tensor": 2}, 1, "parallel.tensor is 2, which does not divide the 1 processes"),
        ({"data": "none"}, 4, "parallel.data is none, so all 4 processes must be tensor ranks; parallel.tensor is 1"),
        ({"data": "none", "experts": 2}, 2, "needs data ddp or fsdp2"),
        ({"experts": 2, "tensor": 2}, 4, "cannot both be above 1"),
        ({"gathered": "bfloat16"}, 2, "is for data fsdp2"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(values: dict[str, Any], world: int, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        RanksRecipe(**values).replicas(world)


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        (
            {"experts": 3},
            "parallel.experts is 3, which does not divide the 1 processes of the run; torchrun starts several",
        ),
        ({"data": "none", "tensor": 2, "lora": {}}, "model.lora is for parallel.data ddp, without experts and tensor"),
    ],
)
def test_what_one_process_cannot_do_is_refused(layout: dict[str, Any], said: str) -> None:
    tree = recipe_tree(Path("model"), Path("data"))
    tree["model"]["lora"], tree["parallel"] = layout.pop("lora", None), layout
    with pytest.raises(RecipeError, match=re.escape(said)):
        checked(ModelParallelRecipe, tree, "a.yaml").processes(1)


@pytest.mark.parametrize(
    ("model", "size", "message"),
    [
        ("dense", 2, "parallel.experts is 2, but the model has no routed experts"),
        ("segment", 3, "parallel.experts is 3, which does not divide the model's 4 experts"),
    ],
)
def test_experts_that_do_not_come_out_even_are_refused(model: str, size: int, message: str) -> None:
    mesh: Any = SimpleNamespace(size=lambda: size)
    with pytest.raises(ValueError, match=message):
        spread_experts(ranks.tiny_model(model, torch.float32), mesh)


def test_heads_that_do_not_come_out_even_are_refused() -> None:
    mesh: Any = SimpleNamespace(size=lambda: 4)
    with pytest.raises(ValueError, match=r"parallel\.tensor is 4, which does not divide the model's 2 decoder heads"):
        cut(ranks.tiny_model("segment", torch.float32), mesh)


@pytest.mark.parametrize("change", [cut, spread_experts, lambda model, mesh: None])
def test_what_no_rank_chose_loses_its_gradient_of_zeros(change: Any) -> None:
    """In every form of experts, and what was chosen keeps its own."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())  # pyright: ignore[reportPrivateImportUsage]
    try:
        model = ranks.tiny_model("segment", torch.float32)
        change(model, init_device_mesh("cpu", (1,)))
        use = Use(model, torch.device("cpu"))
        for chosen in (True, False):
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            if chosen:
                model(list(ranks.pack((9, 30), 5).mels), ranks.random_texts([4, 5]))
            use.forget_unused()
            lost = {name for name, parameter in model.named_parameters() if parameter.grad is None}
            assert lost == {name for name in dict(model.named_parameters()) if not chosen and re.search(UNUSED, name)}
    finally:
        dist.destroy_process_group()


def test_a_process_without_a_gpu_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match=r"run\.device: device cuda:2: PyTorch .* sees no such device"):
        device_of("auto", world=4)
    with pytest.raises(ValueError, match=r"run\.device is 'cuda:1'; many processes take"):
        device_of("cuda:1", world=4)
    with pytest.raises(ValueError, match=r"run\.device: device must be cpu"):
        device_of("gpu")
    assert device_of("cpu", world=4) == torch.device("cpu")
