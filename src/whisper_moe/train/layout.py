"""How processes share a training run: what a recipe says about it, and which rank does what. Imports no torch.

Ranks are numbered replica first, then expert, then tensor: neighbours, which share a machine, share the most traffic.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class ParallelConfig(BaseModel):
    """Who holds what. A process alone needs none of it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)

    data: Literal["none", "ddp", "fsdp2"] = "ddp"
    """``ddp``: every rank holds all parameters. ``fsdp2``: each holds a share of every parameter, gradient and moment, and
    gathers a block when it is computed. ``none``: all ranks read the same data, for ``tensor`` alone."""
    experts: int = Field(default=1, ge=1)
    """Ranks that the routed experts are dealt out to. These ranks read different data; tokens travel to their experts."""
    tensor: int = Field(default=1, ge=1)
    """Ranks that each attention and feed-forward is cut over. These ranks read the same data."""
    gathered: Literal["float32", "bfloat16"] = "float32"
    """What ``fsdp2`` gathers blocks as; routers and fast weights stay float32, and so do shares, gradients and moments."""
    reshard: bool = True
    """``fsdp2``: let go of a block after its forward pass and gather it again for the backward pass (ZeRO-3)."""
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """``auto``: NCCL on GPUs, gloo on CPUs."""
    timeout_seconds: int = Field(default=1_800, ge=1)
    """How long a rank waits for another. Longer than the longest evaluation, which rank 0 makes while the others wait."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.experts > 1 and self.tensor > 1:
            raise ValueError(
                f"experts ({self.experts}) and tensor ({self.tensor}) cannot both be above 1: experts that are dealt out "
                "to ranks are not cut as well"
            )
        if self.experts > 1 and self.data == "none":
            raise ValueError(f"experts ({self.experts}) needs data ddp or fsdp2: its ranks read different data")
        if self.gathered != "float32" and self.data != "fsdp2":
            raise ValueError(f"gathered ({self.gathered}) is for data fsdp2; with data {self.data} nothing is gathered")
        return self

    def replicas(self, world_size: int) -> int:
        """Copies of the routed experts in a run of so many ranks: what is left when ``experts`` and ``tensor`` have theirs.

        Raises ``ValueError`` for a number that this layout cannot use.
        """
        name = "experts" if self.experts > 1 else "tensor"
        replicas, rest = divmod(world_size, shared := self.experts * self.tensor)
        if rest:
            raise ValueError(
                f"parallel.{name} is {shared}, which does not divide the {world_size} processes of the run"
            )
        if self.data == "none" and replicas > 1:
            raise ValueError(
                f"parallel.data is none, so all {world_size} processes must be tensor ranks; parallel.tensor is {self.tensor}"
            )
        return replicas
