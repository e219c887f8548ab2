"""A difference in few numbers: nothing nearer has that rank."""

from __future__ import annotations

import pytest
import torch

from whisper_moe.merge.differences import low_rank, spectrum


@pytest.mark.parametrize(("outputs", "inputs"), [(12, 20), (20, 12), (7, 7)])
@pytest.mark.parametrize("rank", [1, 5, 32])
def test_no_matrix_of_that_rank_is_nearer(outputs: int, inputs: int, rank: int) -> None:
    torch.manual_seed(rank)
    difference = torch.randn(outputs, inputs)
    down, up = low_rank(difference, rank)
    assert (down.shape, up.shape) == ((rank, inputs), (rank, outputs))
    u, s, v = torch.linalg.svd(difference, full_matrices=False)
    nearest = (u[:, :rank] * s[:rank]) @ v[:rank]
    torch.testing.assert_close(up.T @ down, nearest, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(spectrum(difference), s.double().square(), atol=1e-4, rtol=1e-4)


def test_an_adapter_of_that_rank_or_less_comes_back_as_it_was() -> None:
    torch.manual_seed(0)
    adapter = torch.randn(40, 3) @ torch.randn(3, 30)
    down, up = low_rank(adapter, 8)
    torch.testing.assert_close(up.T @ down, adapter, atol=1e-5, rtol=1e-4)
