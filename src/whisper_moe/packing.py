"""Segments of any length in contexts of 2,048 tokens (Patch-n-Pack: NaViT, arXiv 2307.06304, section 2.1).

A :class:`Layout` says where each segment lies in a flat [tokens, width] tensor. It is the only thing that attention,
the convolution stem and TTT need in order to keep segments apart; everything pointwise ignores it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

from whisper_moe.config import MAX_PACK_TOKENS


class Layout:
    """Where segments lie in a flat tensor: segment ``i`` is rows ``cu_seqlens[i]`` to ``cu_seqlens[i + 1]``."""

    def __init__(self, lengths: Iterable[int]) -> None:
        self.lengths: tuple[int, ...] = tuple(lengths)
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"a layout needs at least one segment, each of at least one token; got {self.lengths}")

    @cached_property
    def cu_seqlens(self) -> tuple[int, ...]:
        """Cumulative lengths, beginning with 0: ``len(lengths) + 1`` values."""
        return (0, *accumulate(self.lengths))

    @property
    def total(self) -> int:
        return self.cu_seqlens[-1]

    def __len__(self) -> int:
        return len(self.lengths)

    def __repr__(self) -> str:
        return f"Layout({self.lengths})"

    def slices(self) -> list[slice]:
        """One slice of the flat tensor for each segment."""
        return [slice(a, b) for a, b in zip(self.cu_seqlens, self.cu_seqlens[1:], strict=False)]

    def segment_ids(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """[total] int64: the segment that each token belongs to."""
        import torch

        return torch.repeat_interleave(torch.tensor(self.lengths, device=device))

    def positions(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """[total] int64: each token's place in its own segment; restarts at every segment."""
        import torch

        starts = torch.tensor(self.cu_seqlens[:-1], device=device)
        return torch.arange(self.total, device=device) - starts[self.segment_ids(device)]


def first_fit_decreasing(lengths: Sequence[int], capacity: int = MAX_PACK_TOKENS) -> list[list[int]]:
    """Put segments into as few packs as a first fit in decreasing order finds; returns indices into ``lengths``.

    Equal lengths keep their order. Raises ``ValueError`` for a segment that is empty or longer than ``capacity``.
    """
    for index, length in enumerate(lengths):
        if not 0 < length <= capacity:
            raise ValueError(f"segment {index} has {length} tokens; a pack holds 1 to {capacity}")
    packs: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        for pack, left in enumerate(room):
            if lengths[index] <= left:
                packs[pack].append(index)
                room[pack] -= lengths[index]
                break
        else:
            packs.append([index])
            room.append(capacity - lengths[index])
    return packs
