"""One model over several ranks: experts dealt out, or attention and feed-forwards cut. ``whisper-moe train`` otherwise.

    torchrun --standalone --nproc-per-node 8 recipes/parallel/train.py RECIPE.yaml parallel.experts=8 -o RUN [--resume]

Parameters become DTensors with the names and whole shapes that they have on one device; a rank holds and optimises its
part, and computes with it. (PyTorch's own plans do not fit: a fused projection has a share of each of its parts on a rank.)
Ranks are numbered replica first, then expert, then tensor: neighbours, which share a machine, share the most traffic.

Expert parallel (GShard arXiv 2006.16668, section 2.2, without its capacity: nothing is dropped). Ranks read different
data. Each token's state is sent to the ranks of its experts, all-to-all, and what they answer is sent back.

Tensor parallel (Megatron-LM arXiv 1909.08053, section 3). Ranks read the same data. The first product of attention or
feed-forward is cut by its outputs (heads, hidden units), the second by its inputs, and partial sums are added.

T tokens, D width, E experts, P pairs of a token and an expert, G ranks of the group, L = E / G experts of one rank, R pairs
that arrive at one rank.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from math import prod
from typing import Any, Literal, Self

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement, _StridedShard
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from whisper_moe.model.attention import CrossAttention, SelfAttention
from whisper_moe.model.block import Block
from whisper_moe.model.layers import FeedForward
from whisper_moe.model.model import WhisperMoEModel
from whisper_moe.model.moe import Experts
from whisper_moe.model.router import NONE, Routing
from whisper_moe.packing import Layout
from whisper_moe.train.parallel import Parallel
from whisper_moe.train.reading import RecipeError
from whisper_moe.train.recipe import ParallelRecipe, Recipe
from whisper_moe.train.run import script


class RanksRecipe(ParallelRecipe):
    """Who holds what."""

    data: Literal["none", "ddp", "fsdp2"] = "ddp"
    """As ``whisper-moe train`` has it; and ``none``: all ranks read the same data, for ``tensor`` alone."""
    experts: int = Field(default=1, ge=1)
    """Ranks that the routed experts are dealt out to. These ranks read different data; tokens travel to their experts."""
    tensor: int = Field(default=1, ge=1)
    """Ranks that each attention and feed-forward is cut over. These ranks read the same data."""

    @model_validator(mode="after")
    def _check_ranks(self) -> Self:
        if self.experts > 1 and self.tensor > 1:
            raise ValueError(
                f"experts ({self.experts}) and tensor ({self.tensor}) cannot both be above 1: experts that are dealt out "
                "to ranks are not cut as well"
            )
        if self.experts > 1 and self.data == "none":
            raise ValueError(f"experts ({self.experts}) needs data ddp or fsdp2: its ranks read different data")
        return self

    def replicas(self, world_size: int) -> int:
        """Copies of the routed experts in a run of so many ranks. Raises :class:`RecipeError` for a number that does not fit."""
        name = "experts" if self.experts > 1 else "tensor"
        replicas, rest = divmod(world_size, shared := self.experts * self.tensor)
        if rest:
            several = "; torchrun starts several" if world_size == 1 else ""
            raise RecipeError(
                f"parallel.{name} is {shared}, which does not divide the {world_size} processes of the run{several}"
            )
        if self.data == "none" and replicas > 1:
            raise RecipeError(
                f"parallel.data is none, so all {world_size} processes must be tensor ranks; parallel.tensor is {self.tensor}"
            )
        return replicas


class ModelParallelRecipe(Recipe):
    """A training run over ranks that share one model."""

    parallel: RanksRecipe = RanksRecipe()

    @model_validator(mode="after")
    def _check_ranks(self) -> Self:
        if self.model.lora and (self.parallel.data == "none" or max(self.parallel.experts, self.parallel.tensor) > 1):
            raise ValueError(
                "model.lora is for parallel.data ddp, without experts and tensor: every process has all of it"
            )
        return self

    def processes(self, world: int) -> type[Parallel]:
        self.parallel.replicas(world)
        return ModelParallel


class ModelParallel(Parallel):
    """This process among those of a run. Ranks that share one model read the same data."""

    config: RanksRecipe

    def __init__(self, device: torch.device | str = "cpu", config: RanksRecipe | None = None) -> None:
        super().__init__(device, config)
        self._apart: list[tuple[dist.ProcessGroup, list[nn.Parameter]]] = []
        if config is None:
            return
        self._replicas = config.replicas(self.world_size)
        shape = (self._replicas, config.experts, config.tensor)
        self.ranks = init_device_mesh(self.device.type, shape, mesh_dim_names=("replicas", "experts", "tensor"))
        self.mesh = self.ranks["replicas", "experts"]._flatten("data")
        self.data_rank, self.data_size = self.mesh.get_local_rank(), self._replicas * config.experts

    def spread(self, model: WhisperMoEModel) -> nn.Module:
        if self.config.tensor > 1:
            cut(model, self.ranks["tensor"])
        if self.config.experts > 1:
            spread_experts(model, self.ranks["experts"])
        network, apart = model, list[nn.Parameter]()
        if self.config.data == "fsdp2":
            apart = [p for p in model.parameters() if self._share_dim(p) is None]
            self._share_out(model, set(apart))
        elif self.data_size > 1:
            # DDP does not know how to handle parts, and is given them too.
            parts = {name: parameter for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)}
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [*parts])
            network, apart = self.replicated(model), [*parts.values()]
        dealt = {p for m in model.modules() if isinstance(m, ExpertsOverRanks) for p in m.parameters()}
        for group, among in ((self.mesh.get_group(), False), (self.ranks.get_group("replicas"), True)):
            own = [p for p in apart if p.requires_grad and (p in dealt) == among]
            if own and group.size() > 1:
                self._apart.append((group, own))
        return network

    def _share_out(self, model: WhisperMoEModel, apart: set[nn.Parameter]) -> None:
        """FSDP2; experts that are dealt out, over their copies only. ``apart`` stays as it is."""
        how: dict[str, Any] = {
            "ignored_params": apart,
            "shard_placement_fn": lambda parameter: Shard(self._share_dim(parameter) or 0),
        }
        options = {"mesh": self.ranks["replicas"], "mp_policy": self.policy, **how}
        for module in list(model.modules()):
            if isinstance(module, ExpertsOverRanks) and not apart.issuperset(module.parameters()):
                fully_shard(module, reshard_after_forward=self.config.reshard, **options)
        self.shared_out(model, **how)

    def _share_dim(self, parameter: nn.Parameter) -> int | None:
        """The dimension that FSDP2 shares a parameter out by: the first, or of a part, another than it was cut by.

        None where no other can be divided, or there is nobody to share with.
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

    @torch.no_grad()
    def exchange(self) -> None:
        """What neither DDP nor FSDP2 exchanges becomes the mean over ``data_size`` too.

        All at once and in one order, for ranks need not agree which of them got a gradient.
        """
        for group, members in self._apart:
            for parameter in members:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            parts = [local(parameter.grad) for parameter in members]  # pyright: ignore[reportArgumentType]
            flat = torch.cat([part.flatten() for part in parts])
            dist.all_reduce(flat, group=group)
            flat /= group.size()
            for part, mean in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
                part.copy_(mean.view_as(part))
        super().exchange()

    def clip(self, parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
        """As everywhere, of parts that lie on several meshes."""
        if self.world_size == 1:
            return super().clip(parameters, max_norm)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for gradient in gradients:
            total += local(gradient).detach().double().square().sum() / _holders(gradient)
        dist.all_reduce(total)
        norm = total.sqrt().float()
        if max_norm != float("inf"):
            factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            for gradient in gradients:
                local(gradient).mul_(factor.to(gradient.dtype))
        return norm


def _holders(tensor: Tensor) -> int:
    """How many ranks have the same elements as this one."""
    if not isinstance(tensor, DTensor):
        return dist.get_world_size()
    mesh = tensor.device_mesh
    parts = [mesh.size(i) for i, placement in enumerate(tensor.placements) if not isinstance(placement, Replicate)]
    return dist.get_world_size() // prod(parts)


def local(tensor: Tensor) -> Tensor:
    """This rank's part, differentiable."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _sharded(parameter: Tensor, mesh: DeviceMesh, placement: Placement) -> nn.Parameter:
    """This rank's part as a DTensor; every rank has the whole, so nothing is sent."""
    part = distribute_tensor(parameter.detach(), mesh, [placement], src_data_rank=None)
    return nn.Parameter(part, requires_grad=parameter.requires_grad)


class _PartOfExperts(Experts):
    """Parameters of :class:`Experts` that are shared out, and their function of any others."""

    def __init__(self, experts: Experts, mesh: DeviceMesh, **placements: Placement) -> None:
        nn.Module.__init__(self)
        self._mesh = mesh
        for name, parameter in experts.named_parameters():
            kept = _sharded(parameter, mesh, placements[name]) if name in placements else parameter
            self.register_parameter(name, kept)
        self._function = (experts.to("meta"),)  # a tuple, for it is no child: it has no parameters

    def _compute(self, parts: dict[str, Tensor], x_TD: Tensor, routing: Routing, layout: Layout | None) -> Tensor:
        return functional_call(self._function[0], parts, (x_TD, routing, layout))


# Expert parallel


class ExpertsOverRanks(_PartOfExperts):
    """:class:`~whisper_moe.model.moe.Experts` of which each rank of a group holds E / G. The same function."""

    def __init__(self, experts: Experts, mesh: DeviceMesh) -> None:
        super().__init__(experts, mesh, **{name: Shard(0) for name, _ in experts.named_parameters()})

    def forward(self, x_TD: Tensor, routing: Routing, layout: Layout | None = None) -> Tensor:
        """[T, D] → [T, D]: the gated sum over each token's experts, as :meth:`Experts.forward`. All ranks call it."""
        if torch.is_autocast_enabled(x_TD.device.type):
            x_TD = x_TD.to(torch.get_autocast_dtype(x_TD.device.type))
        tokens = routing if layout is None else routing.expand(layout)
        token, slot = (tokens.experts != NONE).nonzero(as_tuple=True)
        expert_P, order = tokens.experts[token, slot].sort(stable=True)
        token, slot = token[order], slot[order]
        group = self._mesh.get_group()
        sent_GL = expert_P.bincount(minlength=len(self.down_bias)).view(self._mesh.size(), -1)  # pyright: ignore[reportArgumentType]
        received_GL = torch.empty_like(sent_GL)
        dist.all_to_all_single(received_GL, sent_GL, group=group)
        sent, received = sent_GL.sum(1).tolist(), received_GL.sum(1).tolist()
        x_RD = all_to_all_single_autograd(x_TD[token], received, sent, group)
        y_PD = all_to_all_single_autograd(self._answer(x_RD, received_GL), sent, received, group)
        gates_P1 = tokens.gates.to(x_TD.dtype)[token, slot, None]
        return torch.zeros_like(x_TD).index_add(0, token, (y_PD * gates_P1).to(x_TD.dtype))

    def _answer(self, x_RD: Tensor, received_GL: Tensor) -> Tensor:
        """[R, D] → [R, D]: each row through its expert here. Rows come by rank, and of each rank by expert.

        Gradients of the experts are divided by G: here they come from the data of all ranks of the group, and everywhere
        else the mean over ranks is taken afterwards.
        """
        ranks, experts = received_GL.shape
        parts = {name: local(parameter) for name, parameter in self.named_parameters()}
        if not len(x_RD):  # a gradient of zeros all the same, so that every rank makes the same update
            return x_RD + sum(0 * part.sum() for part in parts.values()).to(x_RD.dtype)  # pyright: ignore[reportAttributeAccessIssue]
        for part in parts.values():
            if part.requires_grad:
                part.register_hook(lambda gradient: gradient / ranks)
        expert_R = torch.arange(experts, device=x_RD.device).repeat(ranks).repeat_interleave(received_GL.flatten())
        return self._compute(parts, x_RD, Routing(expert_R[:, None], x_RD.new_ones(len(x_RD), 1)), None)


def spread_experts(model: WhisperMoEModel, mesh: DeviceMesh) -> None:
    """Deal every layer's routed experts out to the ranks of ``mesh``. Raises ``ValueError`` if they do not come out even."""
    moe = model.config.moe
    if moe is None:
        raise ValueError(f"parallel.experts is {mesh.size()}, but the model has no routed experts")
    if moe.n_experts % mesh.size():
        raise ValueError(
            f"parallel.experts is {mesh.size()}, which does not divide the model's {moe.n_experts} experts"
        )
    for block in model.modules():
        if isinstance(block, Block) and block.experts is not None:
            block.experts = ExpertsOverRanks(block.experts, mesh)


# Tensor parallel


def _enter(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The same tensor on all ranks goes into parts of a computation: their gradients are added."""
    return DTensor.from_local(x, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])


def _leave(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Partial sums of all ranks are added; the gradient of a sum is that of each part."""
    return DTensor.from_local(x, mesh, [Partial()], run_check=False).full_tensor()


class ColumnLinear(nn.Linear):
    """A linear layer of which each rank computes its part of the outputs.

    ``parts`` projections are fused into one; each rank has its share of every one of them, side by side.
    """

    def __init__(self, linear: nn.Linear, mesh: DeviceMesh, parts: int = 1) -> None:
        nn.Module.__init__(self)
        self._mesh = mesh
        # A strided shard takes every G-th of G * parts pieces: rows of this rank's heads in q, then k, then v.
        placement = Shard(0) if parts == 1 else _StridedShard(0, split_factor=parts)
        self.weight = _sharded(linear.weight, mesh, placement)
        self.bias = _sharded(linear.bias, mesh, placement)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(_enter(input, self._mesh), local(self.weight), local(self.bias))


class RowLinear(nn.Linear):
    """A linear layer of which each rank has its part of the inputs; what comes out is whole on every rank."""

    def __init__(self, linear: nn.Linear, mesh: DeviceMesh) -> None:
        nn.Module.__init__(self)
        self._mesh, self.weight, self.bias = mesh, _sharded(linear.weight, mesh, Shard(1)), linear.bias

    def forward(self, input: Tensor) -> Tensor:
        return _leave(F.linear(input, local(self.weight)), self._mesh) + self.bias


class CutExperts(_PartOfExperts):
    """Routed experts of which each rank has a part of every expert's hidden units."""

    def __init__(self, experts: Experts, mesh: DeviceMesh) -> None:
        super().__init__(experts, mesh, up_weight=Shard(1), up_bias=Shard(1), down_weight=Shard(1))

    def forward(self, x_TD: Tensor, routing: Routing, layout: Layout | None = None) -> Tensor:
        """As :meth:`Experts.forward`; what comes out is whole on every rank, of which the first adds the last biases."""
        parts = {name: local(parameter) for name, parameter in self.named_parameters()}
        parts["down_bias"] = _enter(parts["down_bias"], self._mesh) * (self._mesh.get_local_rank() == 0)
        gates = _enter(routing.gates, self._mesh)
        cut = Routing(routing.experts, gates, routing.logits)
        return _leave(self._compute(parts, _enter(x_TD, self._mesh), cut, layout), self._mesh)


def cut(model: WhisperMoEModel, mesh: DeviceMesh) -> None:
    """Cut every attention, feed-forward and expert over the ranks of ``mesh``; the rest is computed by all of them.

    Raises ``ValueError`` for heads or hidden units that do not come out even.
    """
    _check_even(model, mesh.size())
    for module in list(model.modules()):
        if isinstance(module, (SelfAttention, CrossAttention)):
            module.heads //= mesh.size()
            module.out = RowLinear(module.out, mesh)
            if isinstance(module, SelfAttention):
                module.qkv = ColumnLinear(module.qkv, mesh, 3)
            else:
                module.q, module.kv = ColumnLinear(module.q, mesh), ColumnLinear(module.kv, mesh, 2)
        elif type(module) is FeedForward:  # adapters are too slim to be worth it
            module.up, module.down = ColumnLinear(module.up, mesh), RowLinear(module.down, mesh)
        elif isinstance(module, Block) and module.experts is not None:
            module.experts = CutExperts(module.experts, mesh)


def _check_even(model: WhisperMoEModel, ranks: int) -> None:
    config = model.config
    if config.senses is not None:
        raise ValueError("parallel.tensor: a model with senses beside hearing is not cut")
    kinds = [
        (side, *kind) for side in ("encoder", "decoder") for kind in (("heads", "heads"), ("hidden units", "ffn_dim"))
    ]
    counts = {f"{side} {words}": getattr(config, f"{side}_{name}") for side, words, name in kinds}
    if config.moe:
        counts["hidden units of an expert"] = config.moe.expert_dim
    for name, count in counts.items():
        if count % ranks:
            raise ValueError(f"parallel.tensor is {ranks}, which does not divide the model's {count} {name}")


if __name__ == "__main__":
    sys.exit(script(ModelParallelRecipe, "Fine-tune one model over several ranks."))
