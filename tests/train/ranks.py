"""Runs jobs in several gloo processes on one machine, and the same in one process to compare with.

As a script it is one rank: ``ranks.py JOB FOLDER`` with torchrun's variables in its environment.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from model.tiny import CONFIGS, random_mels, random_texts, tiny_model
from train.tiny import tiny_recipe

from recipes.parallel.train import ModelParallel, RanksRecipe, local
from whisper_moe.data.examples import Pack
from whisper_moe.data.loader import Batch
from whisper_moe.model.block import Block
from whisper_moe.model.model import WhisperMoEModel
from whisper_moe.packing import Layout
from whisper_moe.train import checkpoint
from whisper_moe.train.loop import Trainer
from whisper_moe.train.losses import SpeechObjective
from whisper_moe.train.parallel import Parallel
from whisper_moe.train.recipe import LossRecipe, ParallelRecipe

CONFIGS["wide"] = CONFIGS["segment"].model_copy(update={"decoder_heads": 4})
"""All heads can be cut over four ranks."""
STEPS = 2
TURN = 2
"""Steps between changes of the layout."""
CLIP = 0.05
PATIENCE = 280
"""Seconds that all processes of a job may take."""
SHARES = (
    ((9, 40, 4), (31, 2), (7, 7, 7, 26), (50,)),
    ((44, 9), (), (16,), ()),
    ((20, 5), (12, 33, 6), (3,), (18, 18)),
    ((8, 21), (13, 4), (30,), (6, 6)),
)
"""Mel frames of the segments in four packs of each step; in the second, two are missing."""


def pack(frames: Sequence[int], seed: int) -> Pack:
    """Ragged segments with texts of other lengths; the first label of each is left out."""
    lengths = [3 + (n + seed) % 6 for n in frames]
    labels = [text.roll(-1).index_fill(0, torch.tensor([0]), -100) for text in random_texts(lengths, seed)]
    return Pack(
        ids=tuple(f"{seed}-{i}" for i in range(len(frames))),
        mels=tuple(random_mels(frames, torch.float32, seed)),
        valid_lengths=tuple(max(1, (n + 1) // 2 - 1) for n in frames),
        tokens_T=torch.cat(random_texts(lengths, seed)),
        labels_T=torch.cat(labels),
        texts=Layout(lengths),
    )


class Shares:
    """The batches of one of ``size`` data ranks: together they are the same for every size."""

    def __init__(self, rank: int, size: int, passes: int = 1) -> None:
        self.rank, self.size, self.passes, self.next = rank, size, passes, 0

    def __iter__(self) -> Iterator[Batch]:
        while True:
            step, part = divmod(self.next, self.passes)
            packs = [pack(f, 10 * step + i) if f else None for i, f in enumerate(SHARES[step % len(SHARES)])]
            packs = packs[part * 4 // self.passes : (part + 1) * 4 // self.passes]
            self.next += 1
            yield Batch(packs=tuple(filter(None, packs[self.rank :: self.size])), epoch=0)

    def state_dict(self) -> dict[str, Any]:
        return {"next": self.next}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.next = state["next"]


@dataclass
class Case:
    """A layout of processes and a model to train in it."""

    name: str
    model: str
    parallel: dict[str, Any]
    passes: int = 1
    recompute: bool = False
    precision: Any = "float32"

    @property
    def alone(self) -> tuple[Any, ...]:
        """What one process has to do to be compared with."""
        return self.model, self.passes, self.recompute, self.precision


def _case(model: str, passes: int = 1, recompute: bool = False, **parallel: Any) -> Case:
    words = [f"{key} {value}" if key != "data" else str(value) for key, value in parallel.items()]
    words += ["accumulating"] * (passes > 1) + ["recomputing"] * recompute
    return Case(f"{model}: {', '.join(words)}", model, parallel, passes, recompute)


CASES = {
    "two": [
        _case("per expert", data="ddp"),
        _case("segment", data="ddp", experts=2, passes=2),
        _case("token", data="fsdp2", recompute=True),
        _case("segment", data="fsdp2", experts=2),
        _case("segment", data="none", tensor=2, recompute=True),
    ],
    "two more": [
        _case("dense", data="ddp"),
        _case("segment", data="ddp"),
        _case("token", data="ddp", passes=2),
        _case("segment", data="fsdp2"),
        _case("per expert", data="fsdp2", passes=2),
        _case("segment", data="fsdp2", reshard=False),
        _case("token", data="ddp", experts=2, recompute=True),
        _case("per expert", data="ddp", experts=2),
        _case("token", data="fsdp2", experts=2, passes=2),
        _case("dense", data="none", tensor=2),
        _case("token", data="none", tensor=2),
        _case("per expert", data="none", tensor=2, passes=2),
    ],
    "four": [
        _case("segment", data="ddp"),
        _case("token", data="fsdp2"),
        _case("per expert", data="fsdp2"),
        _case("segment", data="ddp", experts=2, passes=2),
        _case("token", data="ddp", experts=4),
        _case("segment", data="fsdp2", experts=4),
        _case("segment", data="fsdp2", experts=2, passes=2),
        _case("token", data="fsdp2", experts=2, recompute=True),
        _case("per expert", data="fsdp2", experts=2),
        _case("segment", data="ddp", tensor=2, passes=2),
        _case("token", data="fsdp2", tensor=2),
        _case("segment", data="fsdp2", tensor=2, passes=2, recompute=True),
        _case("wide", data="none", tensor=4),
    ],
}
"""Computed by two or by four processes; the second and third take minutes."""


def make_trainer(case: Case, parallel: Any, steps: int = STEPS, directory: Path | None = None) -> Trainer:
    model: WhisperMoEModel = tiny_model(case.model, torch.float32, seed=parallel.rank)
    for module in model.modules():
        if isinstance(module, Block):
            module.recompute = case.recompute
    optimisation = {"steps": steps, "accumulate": case.passes, "clip": CLIP, "precision": case.precision}
    optimisation |= {"weight_decay": 0.1, "ttt_lr": 2e-3, "most_bad_steps": 1}
    objective = SpeechObjective(LossRecipe(label_smoothing=0.1, balance=0.1, z=0.01))
    batches = Shares(parallel.data_rank, parallel.data_size, case.passes)
    return Trainer(tiny_recipe(optimisation=optimisation), model, objective, batches, parallel, directory=directory)


def trained(case: Case, parallel: Any, steps: int = STEPS) -> dict[str, Any]:
    """Losses and norms of some steps, the first step's whole gradients before clipping, and what was made of the model."""
    trainer = make_trainer(case, parallel, steps)
    gradients: dict[str, Tensor] = {}
    clip = parallel.clip

    def watched(parameters: Any, max_norm: float) -> Tensor:
        if not gradients:
            for name, parameter in trainer.model.named_parameters():
                grad = parameter.grad
                gradients[name] = checkpoint.full(torch.zeros_like(parameter) if grad is None else grad).clone()
        return clip(parameters, max_norm)

    parallel.clip = watched
    reports = [trainer.step() for _ in range(steps)]
    parallel.clip = clip
    return {
        "losses": [r["loss"] for r in reports],
        "norms": [r["gradient_norm"] for r in reports],
        "loads": [r.get("load") for r in reports],
        "labels": [r["label_tokens"] for r in reports],
        "gradients": gradients,
        "tensors": whole_tensors(trainer),
        "parts": {
            name: (
                type(p).__name__,
                [str(place) for place in getattr(p, "placements", ())],
                local(p).numel(),
                p.numel(),
            )
            for name, p in trainer.model.named_parameters()
        },
    }


def whole_tensors(trainer: Trainer) -> dict[str, Tensor]:
    """All that a checkpoint keeps, on every rank."""
    tensors = checkpoint.tensors_of(trainer.model, trainer.optimizer)
    return {name: checkpoint.full(tensor).clone() for name, tensor in tensors.items()}


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value that is expected; where that is 0, the difference itself."""
    largest = expected.abs().max().item()
    return (found - expected).abs().max().item() / (largest or 1.0)


def single(case: Case, steps: int = STEPS) -> dict[str, Any]:
    return trained(case, Parallel(), steps)


# Starting


def start(job: str, world: int, folder: Path, **extra: str) -> list[subprocess.Popen[str]]:
    """The processes of a job, as torchrun would start them."""
    return launched([__file__, job, str(folder)], world, **extra)


def launched(words: Sequence[str], world: int, **extra: str) -> list[subprocess.Popen[str]]:
    """Python with these words, in many processes."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = str(sock.getsockname()[1])
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world)}
    shared |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"} | extra
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [
        subprocess.Popen([sys.executable, *words], env=shared | {"RANK": rank, "LOCAL_RANK": rank}, **pipes)
        for rank in map(str, range(world))
    ]


def finish(ranks: Sequence[subprocess.Popen[str]], timeout: float | None = None) -> list[str]:
    """Waits for all; returns what each said on stderr. A loaded machine may take longer than :data:`PATIENCE`."""
    timeout = timeout or float(os.environ.get("WHISPER_MOE_TEST_PATIENCE", PATIENCE))
    try:
        return [rank.communicate(timeout=timeout)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


def run_ranks(job: str, world: int, folder: Path, **extra: str) -> list[Any]:
    """What each rank of a job gave. An error in any is an error here, with what all ranks said."""
    ranks = start(job, world, folder, **extra)
    said = finish(ranks)
    codes = [rank.returncode for rank in ranks]
    assert codes == [0] * world, f"exit statuses {codes}\n" + "\n".join(f"--- {i}\n{s}" for i, s in enumerate(said))
    return [torch.load(folder / f"{job}-{rank}.pt", weights_only=True) for rank in range(world)]


# One rank


def settings(timeout: int = 600) -> Any:
    layout = ParallelRecipe(timeout_seconds=timeout)
    return SimpleNamespace(run=SimpleNamespace(device="cpu"), parallel=layout, processes=lambda world: Parallel)


def within(case: Case) -> Any:
    """The case's layout in the process group that there is."""
    if case.parallel.keys() & {"experts", "tensor"}:
        return ModelParallel("cpu", RanksRecipe(**case.parallel))
    return Parallel("cpu", ParallelRecipe(**case.parallel))


def layouts(folder: Path, parallel: Any) -> dict[str, Any]:
    """Every case of a list: what rank 0 gave, and whether the others say the same."""
    found = {}
    for case in CASES[os.environ["CASES"]]:
        result = trained(case, within(case))
        kept = result if parallel.rank == 0 else ("losses", "norms", "loads", "parts")
        found[case.name] = {key: result[key] for key in kept}
    return found


def going_on(folder: Path, parallel: Any) -> dict[str, Any]:
    """Some steps in a layout, from a checkpoint if there is one, to another."""
    told = json.loads(os.environ["GOING_ON"])
    case = Case("going on", told["model"], told["parallel"])
    return go_on(case, within(case), told["first"], told["before"], told["after"])


def go_on(case: Case, parallel: Any, first: int, before: str | None, after: str | None) -> dict[str, Any]:
    """:data:`TURN` steps from ``first`` on; ``before`` and ``after`` are runs with checkpoints."""
    trainer = make_trainer(case, parallel, 100, Path(after) if after else None)
    if before:
        trainer.load(saved(Path(before)))
    assert trainer.progress.step == first
    losses = [trainer.step()["loss"] for _ in range(TURN)]
    trainer.save()
    return {"losses": losses, "tensors": whole_tensors(trainer)}


def saved(run: Path) -> Path:
    found = checkpoint.latest(run)
    assert found is not None
    return found


STOPS = {"dealt": {"data": "fsdp2", "experts": 2}, "cut": {"data": "none", "tensor": 2}}
"""Layouts that two processes stop in, for one to go on."""


def stopping(folder: Path, parallel: Any) -> dict[str, list[float]]:
    """The first :data:`TURN` steps, and a checkpoint."""
    found = {}
    for name, layout in STOPS.items():
        case = Case(name, "segment", layout)
        found[name] = go_on(case, within(case), 0, None, str(folder / name))["losses"]
    return found


def whole(folder: Path, parallel: Any) -> dict[str, Any]:
    """What rank 0 decodes with, and run checkpoints: whole tensors out of a layout and back into it."""
    found = {}
    layouts = {"fsdp2": {"data": "fsdp2"}, "experts": {"data": "ddp", "experts": 2}, "tensor": STOPS["cut"]}
    for name, layout in layouts.items():
        case = Case(name, "segment", layout)
        run = folder / f"whole {name}"
        trainer, again = make_trainer(case, within(case), directory=run), make_trainer(case, within(case))
        trainer.step()
        tensors = whole_tensors(trainer)
        assert trainer.model.encoder.router is not None
        trainer.model.encoder.router.only = (1,)
        with trainer.parallel.whole(trainer.model) as model:
            assert (model is None) == (parallel.rank > 0)
            logits = None if model is None else model(list(pack((9, 30), 5).mels), random_texts([4, 5])).logits.detach()
        trainer.model.encoder.router.only = None
        trainer.save()
        again.load(saved(run))
        came_back = whole_tensors(again)
        losses = [again.step()["loss"], trainer.step()["loss"]]
        found[name] = {"tensors": tensors, "again": came_back, "logits": logits, "losses": losses}
    return found


def words(folder: Path, parallel: Any) -> dict[str, Any]:
    """What ranks tell each other, in a layout of two data shares of two tensor ranks, or of two shares alone."""
    own = within(Case("words", "dense", {"data": "ddp", "tensor": parallel.world_size // 2}))
    return {
        "data": (own.data_rank, own.data_size),
        "sum": own.sum(torch.tensor([1.0, own.data_rank])),
        "any": (own.any(own.rank == 1), own.any(False)),
        "gather": own.gather([f"clip {own.data_rank}"] * (1 + own.data_rank)),
        "broadcast": own.broadcast("from 0" if own.rank == 0 else ""),
    }


def quick(folder: Path, parallel: Any) -> dict[str, Any]:
    """All that takes seconds, for starting processes takes some too."""
    return {job.__name__: job(folder, parallel) for job in (layouts, stopping, whole, words)}


def failing(folder: Path, parallel: Any) -> None:
    """The last rank ends with an error while the others wait for it."""
    if parallel.rank == parallel.world_size - 1:
        raise ValueError("clip 7 of the corpus has a broken header")
    parallel.barrier()


def silent(folder: Path, parallel: Any) -> None:
    """The last rank never comes."""
    if parallel.rank == parallel.world_size - 1:
        time.sleep(600)
    parallel.barrier()


JOBS: dict[str, Callable[[Path, Any], Any]] = {
    job.__name__: job for job in (quick, layouts, going_on, whole, words, failing, silent)
}


def main() -> None:
    from whisper_moe.train.parallel import processes

    job, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    with processes(settings(int(os.environ.get("TIMEOUT", "600")))) as parallel:
        result = JOBS[job](folder, parallel)
        torch.save(result, folder / f"{job}-{parallel.rank}.pt")


if __name__ == "__main__":
    main()
