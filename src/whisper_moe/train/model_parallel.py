"""One model over several ranks: experts dealt out, or attention and feed-forwards cut. Applied to a model from outside.

Parameters become DTensors with the names and whole shapes that they have on one device; a rank holds and optimises its
part, and computes with it. (PyTorch's own plans do not fit: a fused projection has a share of each of its parts on a rank.)

Expert parallel (GShard arXiv 2006.16668, section 2.2, without its capacity: nothing is dropped). Ranks read different
data. Each token's state is sent to the ranks of its experts, all-to-all, and what they answer is sent back.

Tensor parallel (Megatron-LM arXiv 1909.08053, section 3). Ranks read the same data. The first product of attention or
feed-forward is cut by its outputs (heads, hidden units), the second by its inputs, and partial sums are added.

T tokens, D width, E experts, P pairs of a token and an expert, G ranks of the group, L = E / G experts of one rank, R pairs
that arrive at one rank.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement, _StridedShard
from torch.func import functional_call

from whisper_moe.model.attention import CrossAttention, SelfAttention
from whisper_moe.model.block import Block
from whisper_moe.model.layers import FeedForward
from whisper_moe.model.model import WhisperMoEModel
from whisper_moe.model.moe import Experts
from whisper_moe.model.router import NONE, Routing
from whisper_moe.model.ttt import ExpertTTT
from whisper_moe.packing import Layout


def local(tensor: Tensor) -> Tensor:
    """This rank's part, differentiable."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _sharded(parameter: Tensor, mesh: DeviceMesh, placement: Placement) -> nn.Parameter:
    """This rank's part as a DTensor; every rank has the whole, so nothing is sent."""
    part = distribute_tensor(parameter.detach(), mesh, [placement], src_data_rank=None)
    return nn.Parameter(part, requires_grad=parameter.requires_grad)


class _PartOfExperts(nn.Module):
    """Parameters of :class:`Experts` that are shared out, and their function of any others."""

    def __init__(self, experts: Experts, mesh: DeviceMesh, **placements: Placement) -> None:
        super().__init__()
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
            block.experts = ExpertsOverRanks(block.experts, mesh)  # pyright: ignore[reportAttributeAccessIssue]


class Use:
    """Which experts' parameters any rank used in a step.

    One process leaves what no segment chose without a gradient, and AdamW then leaves it alone. FSDP2 gives it zeros, with
    which AdamW would move it on, so that they are taken away again.
    """

    def __init__(self, model: WhisperMoEModel, device: torch.device) -> None:
        modules = list(model.modules())
        followed = [module for module in modules if isinstance(module, (Experts, _PartOfExperts))]
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
            module.experts = CutExperts(module.experts, mesh)  # pyright: ignore[reportAttributeAccessIssue]


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
