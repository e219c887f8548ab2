"""Feed-forwards in chunks are the feed-forward; the convolution mixes along time and never across segments."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from model.tiny import CONFIGS, random_mels, random_texts, relative
from torch import Tensor

from whisper_moe.config import ConformerConfig, ModelConfig
from whisper_moe.model.layers import CHUNK, ConvolutionModule, by_chunks
from whisper_moe.model.model import WhisperMoEModel
from whisper_moe.packing import Layout
from whisper_moe.weights.upcycle import add_parts


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


LENGTHS = (1, 9, 40, 3)


def opened(kernel_size: int = 7, width: int = 6) -> ConvolutionModule:
    torch.manual_seed(0)
    module = ConvolutionModule(width, kernel_size).double()
    torch.nn.init.normal_(module.gate)
    return module


def reference(module: ConvolutionModule, x_TD: torch.Tensor) -> torch.Tensor:
    """One segment, as the paper draws it: a padded convolution over [1, D, T]."""
    reach = module.depthwise.kernel_size[0] // 2
    hidden = F.glu(module.expand(x_TD), dim=-1).T[None]
    mixed = F.conv1d(hidden, module.depthwise.weight, module.depthwise.bias, padding=reach, groups=hidden.shape[1])
    return module.gate.tanh() * module.out(F.silu(module.norm(mixed[0].T)))


@pytest.mark.parametrize("kernel_size", [1, 3, 31, 99])
def test_packed_is_the_papers_module_on_each_segment(kernel_size: int) -> None:
    module, layout = opened(kernel_size), Layout(LENGTHS)
    x_TD = torch.randn(layout.total, 6, dtype=torch.float64)
    expected = torch.cat([reference(module, x_TD[rows]) for rows in layout.slices()])
    assert relative(module(x_TD, layout), expected) < 1e-12


def test_it_starts_as_the_identity_and_alive() -> None:
    dense = CONFIGS["dense"]
    torch.manual_seed(0)
    plain = WhisperMoEModel(dense).double()
    config, state = add_parts(
        dense, plain.state_dict(), conformer=ConformerConfig(encoder_layers=(0, 1), kernel_size=5)
    )
    model = WhisperMoEModel(config).double()
    model.load_state_dict(state)
    mels, texts = random_mels([40, 23]), random_texts([4, 6])
    assert torch.equal(model(mels, texts).logits, plain(mels, texts).logits)
    model(mels, texts).logits.square().mean().backward()
    for layer in (0, 1):
        gradient = model.encoder.blocks[layer].conv.gate.grad
        assert gradient is not None and gradient.abs().min() > 0
    with torch.no_grad():
        model.encoder.blocks[1].conv.gate.fill_(0.5)
    assert relative(model(mels, texts).logits, plain(mels, texts).logits) > 1e-3


def test_a_configuration_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="kernel_size must be odd, got 4"):
        ConformerConfig(kernel_size=4)
    with pytest.raises(ValueError, match=r"conformer.encoder_layers \[9\] are beyond the encoder's"):
        ModelConfig.model_validate(CONFIGS["dense"].model_dump() | {"conformer": ConformerConfig(encoder_layers=(9,))})
