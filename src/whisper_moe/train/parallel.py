"""How a run's processes share its data: one alone, or many on PyTorch's own engine (torchrun, DDP, ``fully_shard``).

The training loop asks :class:`Parallel`; the model knows nothing of it. With DDP all ranks hold everything, with FSDP2 each
holds a share of it (ZeRO, arXiv 1910.02054). A script may share out the model in other ways: ``recipes/parallel``.

Nothing that torch.distributed sends is authenticated or encrypted: it is for private networks only.
"""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from whisper_moe.machine import pick_device
from whisper_moe.model.block import Block
from whisper_moe.model.model import WhisperMoEModel
from whisper_moe.model.moe import Experts
from whisper_moe.model.router import NONE, Router, Routing
from whisper_moe.model.ttt import TTTMLP, ExpertTTT
from whisper_moe.train import checkpoint
from whisper_moe.train.reading import RecipeError
from whisper_moe.train.recipe import ParallelRecipe, Recipe

logger = logging.getLogger(__name__)
Said = TypeVar("Said")


class LostPeerError(ConnectionError):
    """Another process of the run ended, or did not answer in time."""


class Parallel:
    """This process among those of a run, or alone."""

    rank = 0
    """Of all processes; 0 writes files and speaks."""
    world_size = 1
    data_rank = 0
    """Which share of the data this process reads, of ``data_size``."""
    data_size = 1

    def __init__(self, device: torch.device | str = "cpu", config: ParallelRecipe | None = None) -> None:
        """With ``config``: there is a process group, and every rank of it comes here."""
        self.device, self.config = torch.device(device), config or ParallelRecipe()
        if config is not None:
            self.rank = self.data_rank = dist.get_rank()
            self.world_size = self.data_size = dist.get_world_size()
            self.mesh = init_device_mesh(self.device.type, (self.world_size,), mesh_dim_names=("data",))
            """Of the ranks that read different data."""

    def wrap(self, model: WhisperMoEModel) -> nn.Module:
        """Parallelise ``model`` in place, all ranks with rank 0's weights; returns what is called for the forward pass.

        Before the optimizer is made, since parameters may become DTensors. ``model`` stays the owner of the names. Raises
        ``ValueError`` for a model that the layout does not fit.
        """
        if self.world_size == 1:
            return model
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.detach(), src=0)
        network = self.spread(model)
        self._use = Use(model, self.device)
        return network

    def spread(self, model: WhisperMoEModel) -> nn.Module:
        """:meth:`wrap`, where all ranks have the same weights already."""
        return self.shared_out(model) if self.config.data == "fsdp2" else self.replicated(model)

    def replicated(self, model: WhisperMoEModel) -> nn.Module:
        """DDP."""
        return DistributedDataParallel(
            model,
            process_group=self.mesh.get_group(),
            forward_sync_buffers=False,  # none changes in training
            gradient_as_bucket_view=True,
            # An expert's own TTT layer, if nobody chose it; what adapts the core, if all windows are full; a sense without input.
            find_unused_parameters=model.config.moe is not None
            or model.config.core_alone_on_full_windows
            or model.senses is not None,
        )

    def shared_out(self, model: WhisperMoEModel, **how: Any) -> nn.Module:
        """FSDP2, a unit for each block and one for the rest; ``how``: more of ``fully_shard``'s options."""
        whole = MixedPrecisionPolicy()
        shard = partial(fully_shard, mesh=self.mesh, **how)
        inner = partial(shard, reshard_after_forward=self.config.reshard)
        for block in [module for module in model.modules() if isinstance(module, Block)]:
            for child in block.children() if self.config.gathered == "bfloat16" else ():
                if isinstance(child, (Router, TTTMLP, ExpertTTT)):
                    inner(child, mp_policy=whole)
            inner(block, mp_policy=self.policy)
        shard(model, mp_policy=whole)
        assert isinstance(model, FSDPModule)
        # Ranks may differ in which parameters they used; all take part in every exchange.
        model.set_reduce_scatter_unused_params(True)
        return model

    @property
    def policy(self) -> MixedPrecisionPolicy:
        """What FSDP2 gathers blocks as."""
        if self.config.gathered == "float32":
            return MixedPrecisionPolicy()
        half, single = torch.bfloat16, torch.float32
        return MixedPrecisionPolicy(param_dtype=half, reduce_dtype=single, cast_forward_inputs=False)

    @contextmanager
    def accumulating(self, model: nn.Module) -> Iterator[None]:
        """Around the passes of a step before its last: gradients are added up, and exchanged in the last."""
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(False)
        with model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext():
            yield
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(True)

    def exchange(self) -> None:
        """Once a step, after its passes: what no rank used loses its zeros here."""
        if self.world_size > 1:
            self._use.forget_unused()

    def clip(self, parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
        """The norm of all gradients of the whole model; above ``max_norm``, which may be infinite, they are scaled down to it.

        Each element counts once, however many ranks hold it.
        """
        return checkpoint.full(nn.utils.clip_grad_norm_(parameters, max_norm))

    @contextmanager
    def whole(self, model: WhisperMoEModel) -> Iterator[WhisperMoEModel | None]:
        """A model with whole parameters on rank 0, to decode with; None on other ranks. Every process enters it."""
        from whisper_moe.weights.parts import empty_model

        copy = model
        if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
            state = {}
            for name, tensor in model.state_dict().items():
                full = checkpoint.full(tensor.detach())
                state |= {name: full} if self.rank == 0 else {}
            if self.rank == 0:
                copy = empty_model(model.config).train(model.training)
                copy.load_state_dict(state, assign=True)
                if copy.encoder.router is not None and model.encoder.router is not None:
                    copy.encoder.router.only = model.encoder.router.only  # judged as it is trained
        yield copy if self.rank == 0 else None

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the shares of the data; for counts and losses, no gradient flows through it."""
        total = values.detach()
        if self.world_size > 1:
            total = total.clone()
            dist.all_reduce(total, group=self.mesh.get_group())
        return total

    def any(self, flag: bool) -> bool:
        """Whether any process says so: all then do the same."""
        if self.world_size == 1:
            return flag
        said = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(said, op=dist.ReduceOp.MAX)
        return bool(said)

    def gather(self, names: Sequence[Said]) -> list[Said]:
        """What each share of the data gives, one after another."""
        said = [list(names)] * self.data_size
        if self.world_size > 1:
            dist.all_gather_object(said, said[0], group=self.mesh.get_group())
        return [name for part in said for name in part]

    def broadcast(self, text: str) -> str:
        """What rank 0 says."""
        said = [text]
        if self.world_size > 1:
            dist.broadcast_object_list(said, src=0)
        return said[0]

    def barrier(self) -> None:
        """All processes wait for each other."""
        if self.world_size > 1:
            dist.barrier()


class Use:
    """Which experts' parameters any rank used in a step.

    One process leaves what no segment chose without a gradient, and AdamW then leaves it alone. FSDP2 gives it zeros, with
    which AdamW would move it on, so that they are taken away again.
    """

    def __init__(self, model: WhisperMoEModel, device: torch.device) -> None:
        modules = list(model.modules())
        followed: list[nn.Module] = [module for module in modules if isinstance(module, Experts)]
        followed += [layer for module in modules if isinstance(module, ExpertTTT) for layer in module]
        # The last bias of experts takes part for *none* too.
        self._members = [[p for name, p in module.named_parameters() if name != "down_bias"] for module in followed]
        self._used = torch.zeros(len(followed), device=device)
        for place, module in enumerate(followed):
            module.register_forward_pre_hook(partial(self._note, place))

    def _note(self, place: int, _module: nn.Module, inputs: tuple[object, ...]) -> None:
        chosen = inputs[1].experts != NONE if isinstance(inputs[1], Routing) else self._used.new_ones(1)
        self._used[place] += chosen.any()

    def forget_unused(self) -> None:
        """To be called once a step, between the passes and the update."""
        dist.all_reduce(self._used)
        for used, parameters in zip(self._used.tolist(), self._members, strict=True):
            for parameter in () if used else parameters:
                parameter.grad = None
        self._used.zero_()


@contextmanager
def processes(recipe: Recipe) -> Iterator[Parallel]:
    """One process, or those that torchrun started, for the block.

    An error in the block is told with rank and machine, so that the one which began it can be found among those which
    follow from it; the others are not waited for. Raises :class:`RecipeError` for a layout that these processes cannot have,
    and :class:`LostPeerError` if another one ended.
    """
    world, rank, config = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0")), recipe.parallel
    kind, device = recipe.processes(world), device_of(recipe.run.device, world)
    if world == 1:
        yield kind(device)
        return
    if config.backend == "nccl" and device.type == "cpu":
        raise RecipeError("parallel.backend is nccl, which needs a GPU in every process; on a CPU it is gloo")
    backend = {"cuda": "cpu:gloo,cuda:nccl", "cpu": "gloo"}[device.type] if config.backend == "auto" else config.backend
    if rank:
        logging.getLogger("whisper_moe").setLevel(logging.ERROR)
    try:
        _meet(backend, timedelta(seconds=config.timeout_seconds))
        yield kind(device, config)
    except BaseException as error:
        told = _lost_peer(error) or error
        said = " ".join(str(told).split()) or "no message"
        place = f"rank {rank} of {world} ({socket.gethostname()}, process {os.getpid()})"
        logger.error("%s: %s: %s", place, type(told).__name__, said)
        if dist.is_initialized() and dist.get_backend() != "gloo":
            # Peers may sit in a collective that will never end: nothing is waited for.
            from torch.distributed.distributed_c10d import _abort_process_group

            _abort_process_group()
        if told is error:
            raise
        raise told from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _meet(backend: str, timeout: timedelta) -> None:
    """Join the process group, under keys of this attempt's own.

    torchrun keeps one store for all attempts: a process that was started anew could read where a dead one had listened. On
    one machine all processes count the restarts alike; on several they may not, and there torchrun itself has to make a
    store for each attempt (``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1``).
    """
    said, place = os.environ, {}
    if said.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and said.get("GROUP_WORLD_SIZE", "1") == "1":
        store, rank, world = next(dist.rendezvous("env://", timeout=timeout))  # pyright: ignore[reportPrivateImportUsage]
        store.set_timeout(timeout)
        attempt = f"attempt_{said.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        place = {"store": dist.PrefixStore(attempt, store), "rank": rank, "world_size": world}  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group(backend, timeout=timeout, **place)


def device_of(wanted: str, world: int = 1) -> torch.device:
    """Of many processes on a machine each has a GPU of its own, by ``LOCAL_RANK``. Raises :class:`RecipeError`."""
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if world > 1 and wanted not in ("cuda", "cpu"):
        raise RecipeError(f"run.device is {wanted!r}; many processes take auto, cuda (a GPU for each) or cpu")
    if world > 1 and wanted == "cuda":
        wanted = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        device = torch.device(pick_device(wanted))
    except ValueError as error:
        raise RecipeError(f"run.device: {error}") from None
    if world > 1 and device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _lost_peer(error: BaseException) -> LostPeerError | None:
    """Whether an error only says that another process is gone: those of collectives are RuntimeErrors with a text."""
    said = str(error).strip()
    gone = re.search("closed by peer|Connection reset|Broken pipe|[Tt]imed out|timeout|NCCL", said)
    if not isinstance(error, RuntimeError) or not gone:
        return None
    first = said.splitlines()[0][:200]
    return LostPeerError(
        f"another process of the run ended or did not answer in time; its own message says why ({first})"
    )
