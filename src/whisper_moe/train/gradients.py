"""Gradients of a model that lies on many ranks: exchanged where no engine does it, measured as a whole, and clipped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from whisper_moe.model.model import Output, WhisperMoEModel
from whisper_moe.model.moe import Experts
from whisper_moe.model.router import NONE, Routing
from whisper_moe.model.ttt import ExpertTTT
from whisper_moe.train.model_parallel import ExpertsOverRanks, local


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, device: torch.device) -> Tensor:
    """Their norm over all ranks, each element counted once, however many ranks hold it; scaled down to ``max_norm``."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    squares = [local(g).detach().double().square().sum() / _holders(g) for g in gradients]
    total = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64, device=device)
    dist.all_reduce(total)
    norm = total.sqrt().float()
    if max_norm != float("inf"):
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            local(gradient).mul_(factor.to(gradient.dtype))
    return norm


def _holders(tensor: Tensor) -> int:
    """How many ranks have the same elements as this one."""
    world = dist.get_world_size()
    if not isinstance(tensor, DTensor):
        return world
    mesh = tensor.device_mesh
    parts = [mesh.size(i) for i, placement in enumerate(tensor.placements) if not isinstance(placement, Replicate)]
    return world // prod(parts)


class Rest:
    """Gradients that neither DDP nor FSDP2 exchanges, averaged over each one's group at the end of a backward pass.

    All at once and in one order: ranks need not agree in which order, or whether at all, theirs become ready. What starts
    it is the first gradient of anything that the model gave out.
    """

    def __init__(self, model: WhisperMoEModel, groups: Sequence[tuple[nn.Parameter, dist.ProcessGroup]]) -> None:
        self.exchanging, self._queued = True, False
        self._groups = [(p, group) for p, group in groups if p.requires_grad and group.size() > 1]
        if self._groups:
            model.register_forward_hook(self._watch)

    def _watch(self, _module: nn.Module, _inputs: object, output: Tensor | Output) -> None:
        outputs = (output,) if isinstance(output, Tensor) else (output.logits, output.states_TD, *output.depths)
        for tensor in outputs:
            if tensor.requires_grad:
                tensor.register_hook(self._queue)

    def _queue(self, _gradient: Tensor) -> None:
        if self.exchanging and not self._queued:
            self._queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self._exchange)  # pyright: ignore[reportAttributeAccessIssue]

    @torch.no_grad()
    def _exchange(self) -> None:
        self._queued = False
        for group in dict.fromkeys(group for _, group in self._groups):
            members = [parameter for parameter, own in self._groups if own is group]
            for parameter in members:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            parts = [local(parameter.grad) for parameter in members]  # pyright: ignore[reportArgumentType]
            flat = torch.cat([part.flatten() for part in parts])
            dist.all_reduce(flat, group=group)
            flat /= group.size()
            for part, mean in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
                part.copy_(mean.view_as(part))


class Use:
    """Which experts' parameters any rank used in a step.

    One process leaves what no segment chose without a gradient, and AdamW then leaves it alone. FSDP2 gives it zeros, with
    which AdamW would move it on, so that they are taken away again.
    """

    def __init__(self, model: WhisperMoEModel, device: torch.device) -> None:
        self._members: list[list[nn.Parameter]] = []
        for module in model.modules():
            if isinstance(module, ExpertTTT):
                for layer in module:
                    self._follow(layer, list(layer.parameters()))
            elif isinstance(module, (Experts, ExpertsOverRanks)):  # their last bias takes part for *none* too
                self._follow(module, [p for name, p in module.named_parameters() if name != "down_bias"])
        self._used = torch.zeros(len(self._members), device=device)

    def _follow(self, module: nn.Module, parameters: list[nn.Parameter]) -> None:
        place = len(self._members)
        self._members.append(parameters)

        def note(_module: nn.Module, inputs: tuple[object, ...]) -> None:
            chosen = inputs[1].experts != NONE if isinstance(inputs[1], Routing) else self._used.new_ones(1)
            self._used[place] += chosen.any()

        module.register_forward_pre_hook(note)

    def forget_unused(self) -> None:
        """To be called once a step, between the passes and the update."""
        if self._members:
            dist.all_reduce(self._used)
            for used, parameters in zip(self._used.tolist(), self._members, strict=True):
                for parameter in () if used else parameters:
                    parameter.grad = None
            self._used.zero_()
