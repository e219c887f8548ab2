"""The feed-forward in runs of tokens is the feed-forward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from whisper_moe.model.layers import CHUNK, FeedForward, by_chunks


@pytest.mark.parametrize("tokens", [1, CHUNK, CHUNK + 1, 3 * CHUNK - 1])
def test_inference_in_runs_computes_what_training_does(tokens: int) -> None:
    torch.manual_seed(0)
    layer, x = FeedForward(16, 48).double(), torch.randn(tokens, 16, dtype=torch.float64)
    trained = layer(x)
    with torch.no_grad():
        assert_close(layer(x), trained, rtol=0, atol=1e-14)


@pytest.mark.parametrize("tokens", [0, 1, CHUNK, CHUNK + 1, 3 * CHUNK - 1])
def test_every_token_is_computed_once_and_in_its_place(tokens: int) -> None:
    seen: list[int] = []

    def doubled(x: Tensor) -> Tensor:
        seen.append(len(x))
        return torch.cat([2 * x, x], 1)

    x = torch.arange(3.0 * tokens).view(tokens, 3)
    with torch.no_grad():
        assert torch.equal(by_chunks(doubled, x), torch.cat([2 * x, x], 1))
    assert sum(seen) == tokens and max(seen) <= CHUNK


def test_a_backward_pass_sees_one_product() -> None:
    x = torch.randn(2 * CHUNK, 3, requires_grad=True)
    calls: list[int] = []
    by_chunks(lambda run: calls.append(len(run)) or run, x)
    assert calls == [2 * CHUNK]
