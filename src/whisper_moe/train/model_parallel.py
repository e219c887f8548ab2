"""One model over several ranks: experts dealt out, or attention and feed-forwards cut. Applied to a model from outside.

Parameters become DTensors with the names and whole shapes that they have on one device; a rank holds and optimises its
part. Modules are replaced by forms that compute with that part, and exchange activations by collectives of their own.

Expert parallel (GShard arXiv 2006.16668, section 2.2, without its capacity: nothing is dropped). Ranks read different
data. Each token's state is sent to the ranks of its experts, all-to-all, and what they answer is sent back.

Tensor parallel (Megatron-LM arXiv 1909.08053, section 3). Ranks read the same data. The first product of attention or
feed-forward is cut by its outputs (heads, hidden units), the second by its inputs, and partial sums are added.

T tokens, D width, K slots, E experts, F hidden units, P pairs of a token and an expert, G ranks of the group, L = E / G
experts of one rank, R pairs that arrive at one rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from whisper_moe.model.attention import CrossAttention, SelfAttention
from whisper_moe.model.block import Block
from whisper_moe.model.layers import FeedForward
from whisper_moe.model.model import WhisperMoEModel
from whisper_moe.model.moe import Experts
from whisper_moe.model.router import NONE, Routing
from whisper_moe.packing import Layout

# Collectives with gradients


class _AllToAll(torch.autograd.Function):
    """Rows [Σ sent, …] to the ranks of a group, ``sent[r]`` to rank r; ``received[r]`` rows come from it, in order of r."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.way_back = received, sent, group
        return _exchange(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(gradients[0], *ctx.way_back), None, None, None


def _exchange(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    out = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
    return out


class _Enter(torch.autograd.Function):
    """The same tensor on all ranks goes into parts of a computation: their gradients are added."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _added(gradients[0], ctx.group), None


class _Leave(torch.autograd.Function):
    """Partial sums of all ranks are added; the gradient of a sum is that of each part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _added(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def _added(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=group)
    return x


class _ScaledGradient(torch.autograd.Function):
    """Itself; its gradient is multiplied."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None


def _sharded(parameter: Tensor, mesh: DeviceMesh, placement: Placement) -> nn.Parameter:
    """This rank's part as a DTensor; every rank has the whole, so nothing is sent."""
    part = distribute_tensor(parameter.detach(), mesh, [placement], src_data_rank=None)
    return nn.Parameter(part, requires_grad=parameter.requires_grad)


def local(tensor: Tensor) -> Tensor:
    """This rank's part, differentiable."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


# Expert parallel


class ExpertsOverRanks(nn.Module):
    """:class:`~whisper_moe.model.moe.Experts` of which each rank of a group holds E / G. The same function.

    Gradients of the experts are divided by G: here they come from the data of all ranks of the group, and everywhere
    else the mean over ranks is taken afterwards.
    """

    def __init__(self, experts: Experts, mesh: DeviceMesh) -> None:
        super().__init__()
        self._group, self._ranks, self._experts = mesh.get_group(), mesh.size(), len(experts.down_bias)
        for name, parameter in list(experts.named_parameters(recurse=False)):
            self.register_parameter(name, _sharded(parameter, mesh, Shard(0)))

    def forward(self, x_TD: Tensor, routing: Routing, layout: Layout | None = None) -> Tensor:
        """[T, D] → [T, D]: the gated sum over each token's experts, as :meth:`Experts.forward`. All ranks call it."""
        if torch.is_autocast_enabled(x_TD.device.type):
            x_TD = x_TD.to(torch.get_autocast_dtype(x_TD.device.type))
        tokens = routing if layout is None else routing.expand(layout)
        token, slot = (tokens.experts != NONE).nonzero(as_tuple=True)
        expert_P, order = tokens.experts[token, slot].sort(stable=True)
        token, slot = token[order], slot[order]
        sent_GL, received_GL = self._counts(expert_P)
        sent, received = sent_GL.sum(1).tolist(), received_GL.sum(1).tolist()
        x_RD = _AllToAll.apply(x_TD[token], sent, received, self._group)
        y_PD = _AllToAll.apply(self._answer(x_RD, received_GL), received, sent, self._group)
        gates_P1 = tokens.gates.to(x_TD.dtype)[token, slot, None]
        return torch.zeros_like(x_TD).index_add(0, token, (y_PD * gates_P1).to(x_TD.dtype))

    def _counts(self, expert_P: Tensor) -> tuple[Tensor, Tensor]:
        """Pairs that go to each expert of each rank, and those that come from each rank for each expert here, [G, L]."""
        sent_GL = expert_P.bincount(minlength=self._experts).view(self._ranks, -1)
        received_GL = torch.empty_like(sent_GL)
        dist.all_to_all_single(received_GL, sent_GL, group=self._group)
        return sent_GL, received_GL

    def _answer(self, x_RD: Tensor, received_GL: Tensor) -> Tensor:
        """[R, D] → [R, D]: each row through its expert here. Rows come by rank, and of each rank by expert.

        An expert without a row is computed too: every parameter then has a gradient on every rank, and they stay in step.
        """
        ranks, experts = received_GL.shape
        expert_R = torch.arange(experts, device=x_RD.device).repeat(ranks).repeat_interleave(received_GL.flatten())
        order = expert_R.argsort(stable=True)
        pieces = x_RD[order].split(received_GL.sum(0).tolist())
        weights = [_ScaledGradient.apply(local(w), 1 / self._ranks) for w in self._weights()]
        each = zip(pieces, *(w.unbind() for w in weights), strict=True)
        answers = [
            F.linear(F.gelu(F.linear(x, up, up_bias)), down.mT, down_bias) for x, up, up_bias, down, down_bias in each
        ]
        y_RD = torch.cat(answers)
        return torch.empty_like(y_RD).index_copy(0, order, y_RD)

    def _weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.up_weight, self.up_bias, self.down_weight, self.down_bias  # pyright: ignore[reportReturnType]


def spread_experts(model: WhisperMoEModel, mesh: DeviceMesh) -> None:
    """Deal every layer's routed experts out to the ranks of ``mesh``. Raises ``ValueError`` if they do not come out even."""
    moe = model.config.moe
    if moe is None:
        raise ValueError(f"parallel.experts is {mesh.size()}, but the model has no routed experts")
    if moe.n_experts % mesh.size():
        raise ValueError(
            f"parallel.experts is {mesh.size()}, which does not divide the model's {moe.n_experts} experts"
        )
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Experts):
                setattr(parent, name, ExpertsOverRanks(child, mesh))


# Tensor parallel


class ColumnLinear(nn.Module):
    """A linear layer of which each rank computes its part of the outputs.

    ``parts`` projections are fused into one; each rank has its share of every one of them, side by side.
    """

    def __init__(self, linear: nn.Linear, mesh: DeviceMesh, parts: int = 1) -> None:
        super().__init__()
        self._group = mesh.get_group()
        # A strided shard takes every G-th of G * parts pieces: rows of this rank's heads in q, then k, then v.
        placement = Shard(0) if parts == 1 else _StridedShard(0, split_factor=parts)
        self.weight = _sharded(linear.weight, mesh, placement)
        self.bias = _sharded(linear.bias, mesh, placement)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(_Enter.apply(x, self._group), local(self.weight), local(self.bias))


class RowLinear(nn.Module):
    """A linear layer of which each rank has its part of the inputs; what comes out is whole on every rank."""

    def __init__(self, linear: nn.Linear, mesh: DeviceMesh) -> None:
        super().__init__()
        self._group = mesh.get_group()
        self.weight = _sharded(linear.weight, mesh, Shard(1))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return _Leave.apply(F.linear(x, local(self.weight)), self._group) + self.bias


class _Part(Experts):
    """Plain tensors in place of parameters, and no last bias."""

    def __init__(self, up_weight: Tensor, up_bias: Tensor, down_weight: Tensor) -> None:
        nn.Module.__init__(self)
        down_bias = up_weight.new_zeros(up_weight.shape[0], up_weight.shape[2])
        # Past nn.Module, which takes no computed tensor for a parameter.
        self.__dict__ |= {
            "up_weight": up_weight,
            "up_bias": up_bias,
            "down_weight": down_weight,
            "down_bias": down_bias,
        }


class CutExperts(Experts):
    """Routed experts of which each rank has a part of every expert's hidden units."""

    def __init__(self, experts: Experts, mesh: DeviceMesh) -> None:
        nn.Module.__init__(self)
        self._group = mesh.get_group()
        for name in ("up_weight", "up_bias", "down_weight"):
            self.register_parameter(name, _sharded(getattr(experts, name), mesh, Shard(1)))
        self.down_bias = experts.down_bias

    def forward(self, x_TD: Tensor, routing: Routing, layout: Layout | None = None) -> Tensor:
        """As :meth:`Experts.forward`; what comes out is whole on every rank."""
        part = _Part(local(self.up_weight), local(self.up_bias), local(self.down_weight))
        cut = Routing(routing.experts, _Enter.apply(routing.gates, self._group), routing.logits)
        y_TD = _Leave.apply(part(_Enter.apply(x_TD, self._group), cut, layout), self._group)
        tokens = routing if layout is None else routing.expand(layout)
        return y_TD + self._gated_down_bias(tokens.experts, tokens.gates.to(y_TD.dtype))


def cut(model: WhisperMoEModel, mesh: DeviceMesh) -> None:
    """Cut every attention, feed-forward and expert over the ranks of ``mesh``; the rest is computed by all of them.

    Raises ``ValueError`` for heads or hidden units that do not come out even.
    """
    _check_even(model, mesh.size())
    for parent in list(model.modules()):
        if isinstance(parent, SelfAttention):
            parent.heads //= mesh.size()
            parent.qkv = ColumnLinear(parent.qkv, mesh, 3)  # pyright: ignore[reportAttributeAccessIssue]
            parent.out = RowLinear(parent.out, mesh)  # pyright: ignore[reportAttributeAccessIssue]
        elif isinstance(parent, CrossAttention):
            parent.heads //= mesh.size()
            parent.q = ColumnLinear(parent.q, mesh)  # pyright: ignore[reportAttributeAccessIssue]
            parent.kv = ColumnLinear(parent.kv, mesh, 2)  # pyright: ignore[reportAttributeAccessIssue]
            parent.out = RowLinear(parent.out, mesh)  # pyright: ignore[reportAttributeAccessIssue]
        elif type(parent) is FeedForward:  # adapters are too slim to be worth it
            parent.up = ColumnLinear(parent.up, mesh)  # pyright: ignore[reportAttributeAccessIssue]
            parent.down = RowLinear(parent.down, mesh)  # pyright: ignore[reportAttributeAccessIssue]
        elif isinstance(parent, Block) and parent.experts is not None:
            parent.experts = CutExperts(parent.experts, mesh)


def _check_even(model: WhisperMoEModel, ranks: int) -> None:
    config = model.config
    counts = {
        f"{side} {name}": getattr(config, f"{side}_{key}")
        for side in ("encoder", "decoder")
        for name, key in (("heads", "heads"), ("hidden units", "ffn_dim"))
    }
    if config.moe:
        counts["hidden units of an expert"] = config.moe.expert_dim
    for name, count in counts.items():
        if count % ranks:
            raise ValueError(f"parallel.tensor is {ranks}, which does not divide the model's {count} {name}")
