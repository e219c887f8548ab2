"""How a run's processes share its work: one alone, or many on PyTorch's own engine (torchrun, DDP, ``fully_shard``, DTensor).

The training loop asks :class:`Parallel`; the model knows nothing of it.

- Data parallel: DDP, where all ranks hold everything, or FSDP2, where each holds a share of it (ZeRO, arXiv 1910.02054).
- Model parallel: experts dealt out to ranks, or attention and feed-forwards cut over them; see
  :mod:`whisper_moe.train.model_parallel`.

Nothing that torch.distributed sends is authenticated or encrypted: it is for private networks only.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from whisper_moe.machine import pick_device
from whisper_moe.model.block import Block
from whisper_moe.model.model import WhisperMoEModel
from whisper_moe.model.router import Router
from whisper_moe.model.ttt import TTTMLP, ExpertTTT
from whisper_moe.train import checkpoint
from whisper_moe.train.layout import ParallelConfig
from whisper_moe.train.model_parallel import ExpertsOverRanks, cut, spread_experts
from whisper_moe.train.optim import Rest, Use, clip_gradients
from whisper_moe.train.reading import RecipeError
from whisper_moe.train.recipe import Recipe

logger = logging.getLogger(__name__)
Said = TypeVar("Said")


class LostPeerError(ConnectionError):
    """Another process of the run ended, or did not answer in time."""


class Parallel:
    """One process on one device; :class:`Processes` answers for many. Ranks that share one model read the same data."""

    rank = 0
    """Of all processes; 0 writes files and speaks."""
    world_size = 1
    data_rank = 0
    """Which share of the data this process reads, of ``data_size``."""
    data_size = 1

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)

    def wrap(self, model: WhisperMoEModel) -> nn.Module:
        """What is called for the forward pass; before the optimizer is made, since parameters may become DTensors.

        ``model`` itself stays the owner of the names. Gradients become the mean over ``data_size``.
        """
        return model

    def accumulating(self, model: nn.Module) -> AbstractContextManager[None]:
        """Around the passes of a step before its last: gradients are added up, and exchanged in the last."""
        return nullcontext()

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
        """The norm of all gradients of the whole model, a plain scalar; above ``max_norm`` they are scaled down to it.

        ``max_norm`` may be infinite: then the norm is only measured.
        """
        return nn.utils.clip_grad_norm_(list(parameters), max_norm)

    def full(self, tensor: Tensor) -> Tensor:
        """The whole of a parameter or of an optimizer's tensor, on the CPU. Every process calls it, in the same order."""
        return tensor.detach().cpu()

    def whole(self, model: WhisperMoEModel) -> AbstractContextManager[WhisperMoEModel | None]:
        """A model with whole parameters on rank 0, to decode with; None on other ranks. Every process enters it."""
        return nullcontext(model)

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the shares of the data; for counts and losses, no gradient flows through it."""
        return values.detach()

    def any(self, flag: bool) -> bool:
        """Whether any process says so: all then do the same."""
        return flag

    def gather(self, names: Sequence[Said]) -> list[Said]:
        """What each share of the data gives, one after another."""
        return list(names)

    def broadcast(self, text: str) -> str:
        """What rank 0 says."""
        return text

    def barrier(self) -> None:
        """All processes wait for each other."""


@contextmanager
def processes(recipe: Recipe) -> Iterator[Parallel]:
    """One process, or those that torchrun started, for the block.

    An error in the block is told with rank and machine, so that the one which began it can be found among those which
    follow from it; the others are not waited for. Raises :class:`RecipeError` for a layout that these processes cannot have,
    and :class:`LostPeerError` if another one ended.
    """
    world, rank, config = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0")), recipe.parallel
    try:
        config.replicas(world)
    except ValueError as error:
        raise RecipeError(f"{error}; torchrun starts several" if world == 1 else str(error)) from None
    device = device_of(recipe.run.device, world)
    if world == 1:
        yield Parallel(device)
        return
    if config.backend == "nccl" and device.type == "cpu":
        raise RecipeError("parallel.backend is nccl, which needs a GPU in every process; on a CPU it is gloo")
    backend = {"cuda": "cpu:gloo,cuda:nccl", "cpu": "gloo"}[device.type] if config.backend == "auto" else config.backend
    if rank:
        logging.getLogger("whisper_moe").setLevel(logging.ERROR)
    try:
        _meet(backend, timedelta(seconds=config.timeout_seconds))
        yield Processes(config, device)
    except BaseException as error:
        lost = _lost_peer(error)
        said = " ".join(str(lost or error).split()) or "no message"
        place = f"rank {rank} of {world} ({socket.gethostname()}, process {os.getpid()})"
        logger.error("%s: %s: %s", place, type(lost or error).__name__, said)
        if lost:
            raise lost from error
        raise
    finally:
        if dist.is_initialized():
            _leave(failed=sys.exc_info()[0] is not None)


def _meet(backend: str, timeout: timedelta) -> None:
    """Join the process group, under keys of this attempt's own.

    torchrun keeps one store for all attempts: a process that was started anew could read where a dead one had listened. On
    one machine all processes count the restarts alike; on several they may not, and there torchrun itself has to make a
    store for each attempt (``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1``).
    """
    said = os.environ
    if said.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or said.get("GROUP_WORLD_SIZE", "1") != "1":
        dist.init_process_group(backend, timeout=timeout)
        return
    store, rank, world = next(dist.rendezvous("env://", timeout=timeout))  # pyright: ignore[reportPrivateImportUsage]
    store.set_timeout(timeout)
    attempt = said.get("TORCHELASTIC_RESTART_COUNT", "0")
    own = dist.PrefixStore(f"attempt_{attempt}", store)  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group(backend, store=own, rank=rank, world_size=world, timeout=timeout)


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
    said = str(error)
    signs = ("closed by peer", "Connection reset", "Broken pipe", "Timed out", "timed out", "timeout", "NCCL")
    if not isinstance(error, RuntimeError) or not any(sign in said for sign in signs):
        return None
    first = said.strip().splitlines()[0][:200]
    return LostPeerError(
        f"another process of the run ended or did not answer in time; its own message says why ({first})"
    )


def _leave(*, failed: bool) -> None:
    """After an error, peers may sit in a collective that will never end: nothing is waited for."""
    if failed and dist.get_backend() != "gloo":
        from torch.distributed.distributed_c10d import _abort_process_group

        _abort_process_group()
    else:
        dist.destroy_process_group()


class Processes(Parallel):
    """This process among those of a run."""

    def __init__(self, config: ParallelConfig, device: torch.device) -> None:
        """The process group exists; every rank of it comes here."""
        super().__init__(device)
        self.config, self.rank, self.world_size = config, dist.get_rank(), dist.get_world_size()
        self._replicas = config.replicas(self.world_size)
        self.data_size = self._replicas * config.experts
        shape = (self._replicas, config.experts, config.tensor)
        self.mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicas", "experts", "tensor"))
        self._data: DeviceMesh = self.mesh["replicas", "experts"]._flatten("data")
        self.data_rank = self._data.get_local_rank()
        self._rest: Rest | None = None
        self._use: Use | None = None

    def wrap(self, model: WhisperMoEModel) -> nn.Module:
        """Parallelise ``model`` in place; returns what is to be called. All ranks get rank 0's weights.

        Raises ``ValueError`` for a model that the layout does not fit.
        """
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.detach(), src=0)
        if self.config.tensor > 1:
            cut(model, self.mesh["tensor"])
        if self.config.experts > 1:
            spread_experts(model, self.mesh["experts"])
        if self.config.data == "fsdp2":
            network, managed = self._sharded(model)
        elif self.data_size > 1:
            network, managed = self._replicated(model)
        else:
            network, managed = model, list(model.parameters())
        known = {id(parameter) for parameter in managed}
        dealt = {id(p) for m in model.modules() if isinstance(m, ExpertsOverRanks) for p in m.parameters()}
        groups = [
            (parameter, self.mesh.get_group("replicas") if id(parameter) in dealt else self._data.get_group())
            for parameter in model.parameters()
            if id(parameter) not in known
        ]
        self._rest, self._use = Rest(model, groups), Use(model, self.device)
        return network

    def _replicated(self, model: WhisperMoEModel) -> tuple[nn.Module, list[nn.Parameter]]:
        """DDP for all parameters but those that are parts, which it does not know how to handle."""
        parts = [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, parts)
        network = DistributedDataParallel(
            model,
            process_group=self._data.get_group(),
            forward_sync_buffers=False,  # what moves a router's bias moves it alike on all ranks
            gradient_as_bucket_view=True,
            # An expert's own TTT layer, if nobody chose it; what adapts the core, if all windows are full.
            find_unused_parameters=model.config.moe is not None or model.config.core_alone_on_full_windows,
        )
        return network, [parameter for parameter in model.parameters() if not isinstance(parameter, DTensor)]

    def _sharded(self, model: WhisperMoEModel) -> tuple[nn.Module, list[nn.Parameter]]:
        """FSDP2, a unit for each block and one for the rest; experts that are dealt out, over their copies only."""
        whole, policy = MixedPrecisionPolicy(), MixedPrecisionPolicy()
        if self.config.gathered == "bfloat16":
            policy = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
        ignored: set[nn.Parameter] = set()
        for parameter in model.parameters():
            if isinstance(parameter, DTensor) and self._share_dim(parameter) is None:
                ignored.add(parameter)
        kept = (Router, TTTMLP, ExpertTTT) if self.config.gathered == "bfloat16" else ()

        def shard(module: nn.Module, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
            fully_shard(
                module,
                mesh=mesh,
                mp_policy=policy,
                reshard_after_forward=self.config.reshard,
                ignored_params=ignored,
                shard_placement_fn=self._placement,
            )

        for block in [module for module in model.modules() if isinstance(module, Block)]:
            for child in block.children():
                if isinstance(child, ExpertsOverRanks) and not ignored.issuperset(child.parameters()):
                    shard(child, self.mesh["replicas"], policy)
                elif isinstance(child, kept):
                    shard(child, self._data, whole)
            shard(block, self._data, policy)
        fully_shard(model, mesh=self._data, mp_policy=whole, ignored_params=ignored, shard_placement_fn=self._placement)
        assert isinstance(model, FSDPModule)
        # Ranks may differ in which parameters they used; all take part in every exchange.
        model.set_reduce_scatter_unused_params(True)
        ignored_ids = {id(parameter) for parameter in ignored}
        return model, [parameter for parameter in model.parameters() if id(parameter) not in ignored_ids]

    def _placement(self, parameter: nn.Parameter) -> Shard:
        dim = self._share_dim(parameter)
        assert dim is not None
        return Shard(dim)

    def _share_dim(self, parameter: nn.Parameter) -> int | None:
        """The dimension that FSDP2 shares a parameter out by: the first, or of a part, another than it was cut by.

        None where no other can be divided, or there is nobody to share with: it stays as it is.
        """
        if not isinstance(parameter, DTensor):
            return 0
        dealt = parameter.device_mesh.mesh_dim_names == ("experts",)
        ranks = self._replicas if dealt else self.data_size
        if ranks == 1:
            return None
        taken = {getattr(placement, "dim", None) for placement in parameter.placements}
        free = [d for d in range(parameter.ndim) if d not in taken and (d == 0 or parameter.shape[d] % ranks == 0)]
        return free[0] if free else None

    @contextmanager
    def accumulating(self, model: nn.Module) -> Iterator[None]:
        assert self._rest is not None, "wrap the model first"
        self._rest.exchanging = False
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(False)
        try:
            with model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext():
                yield
        finally:
            self._rest.exchanging = True
            if isinstance(model, FSDPModule):
                model.set_requires_gradient_sync(True)

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
        """Each element counts once, however many ranks hold it; what no rank used loses its gradient of zeros here."""
        if self._use is not None:
            self._use.forget_unused()
        return clip_gradients(parameters, max_norm, self.device)

    def full(self, tensor: Tensor) -> Tensor:
        return checkpoint.full(tensor.detach()).cpu()

    @contextmanager
    def whole(self, model: WhisperMoEModel) -> Iterator[WhisperMoEModel | None]:
        from whisper_moe.weights.parts import empty_model

        if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
            yield model if self.rank == 0 else None
            return
        state = {}
        for name, tensor in model.state_dict().items():
            full = self.full(tensor)
            if self.rank == 0:
                state[name] = full.to(self.device)
        if self.rank:
            yield None
            return
        copy = empty_model(model.config)
        copy.load_state_dict(state, assign=True)
        yield copy.train(model.training)

    def sum(self, values: Tensor) -> Tensor:
        total = values.detach().clone()
        dist.all_reduce(total, group=self._data.get_group())
        return total

    def any(self, flag: bool) -> bool:
        said = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(said, op=dist.ReduceOp.MAX)
        return bool(said)

    def gather(self, names: Sequence[Said]) -> list[Said]:
        said: list[list[Said]] = [[] for _ in range(self.data_size)]
        dist.all_gather_object(said, list(names), group=self._data.get_group())
        return [name for part in said for name in part]

    def broadcast(self, text: str) -> str:
        said = [text]
        dist.broadcast_object_list(said, src=0)
        return said[0]

    def barrier(self) -> None:
        dist.barrier()
