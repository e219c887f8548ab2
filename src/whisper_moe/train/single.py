"""What the training loop asks of the processes it runs in, and the answers of a single one.

:mod:`whisper_moe.train.parallel` answers for many. The loop and the model know no other engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from whisper_moe.model.model import WhisperMoEModel

Said = TypeVar("Said")


class Parallel(Protocol):
    """A layout of processes. Ranks that share one model (expert or tensor parallel) read the same data."""

    rank: int
    """Of all processes; 0 writes files and speaks."""
    world_size: int
    data_rank: int
    """Which share of the data this process reads, of ``data_size``."""
    data_size: int
    device: torch.device

    def wrap(self, model: WhisperMoEModel) -> nn.Module:
        """What is called for the forward pass; before the optimizer is made, since parameters may become DTensors.

        ``model`` itself stays the owner of the names. Gradients become the mean over ``data_size``.
        """
        ...

    def accumulating(self, model: nn.Module) -> AbstractContextManager[None]:
        """Around the passes of a step before its last: gradients need not be exchanged yet."""
        ...

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the shares of the data; for counts and losses, no gradient flows through it."""
        ...

    def any(self, flag: bool) -> bool:
        """Whether any process says so: all then do the same."""
        ...

    def gather(self, names: Sequence[Said]) -> list[Said]:
        """What each share of the data gives, one after another."""
        ...

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
        """The norm of all gradients of the whole model, a plain scalar; above ``max_norm`` they are scaled down to it.

        ``max_norm`` may be infinite: then the norm is only measured.
        """
        ...

    def full(self, tensor: Tensor) -> Tensor:
        """The whole of a parameter or of an optimizer's tensor, on the CPU (every process calls it)."""
        ...

    def share(self, full: Tensor, like: Tensor) -> Tensor:
        """This process's part of ``full``, laid out as ``like`` is, on its device and of its type."""
        ...

    def whole(self, model: WhisperMoEModel) -> AbstractContextManager[WhisperMoEModel | None]:
        """A model with whole parameters on rank 0, to decode with; None on other ranks. Every process enters it."""
        ...

    def broadcast(self, text: str) -> str:
        """What rank 0 says."""
        ...

    def barrier(self) -> None:
        """All processes wait for each other."""
        ...


class SingleProcess:
    """One process on one device."""

    rank = data_rank = 0
    world_size = data_size = 1

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)

    def wrap(self, model: WhisperMoEModel) -> nn.Module:
        return model

    def accumulating(self, model: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()

    def sum(self, values: Tensor) -> Tensor:
        return values.detach()

    def any(self, flag: bool) -> bool:
        return flag

    def gather(self, names: Sequence[Said]) -> list[Said]:
        return list(names)

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
        return nn.utils.clip_grad_norm_(list(parameters), max_norm)

    def full(self, tensor: Tensor) -> Tensor:
        return tensor.detach().cpu()

    def share(self, full: Tensor, like: Tensor) -> Tensor:
        return full.to(like.device, like.dtype)

    def whole(self, model: WhisperMoEModel) -> AbstractContextManager[WhisperMoEModel | None]:
        return nullcontext(model)

    def broadcast(self, text: str) -> str:
        return text

    def barrier(self) -> None:
        pass
