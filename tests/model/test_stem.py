"""The stem: segments that share a buffer do not touch, at even and odd numbers of frames."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from whisper_moe.model import layers
from whisper_moe.model.layers import AudioStem, positions_of, sinusoids

MELS, WIDTH = 5, 8
FRAMES = st.lists(st.integers(1, 23), min_size=1, max_size=8)


def make_stem() -> AudioStem:
    torch.manual_seed(0)
    return AudioStem(MELS, WIDTH).double()


def mels_of(frames: list[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(MELS, n, generator=generator, dtype=torch.float64) for n in frames]


def definition(stem: AudioStem, mel: Tensor) -> Tensor:
    """Whisper's stem on one recording, with its own padding."""
    hidden = F.gelu(F.conv1d(mel[None], stem.conv1.weight, stem.conv1.bias, padding=1))
    return F.gelu(F.conv1d(hidden, stem.conv2.weight, stem.conv2.bias, stride=2, padding=1))[0].T


@settings(deadline=None, max_examples=50)
@given(FRAMES)
def test_every_segment_of_a_pack_is_what_whispers_stem_makes_of_it(frames: list[int]) -> None:
    stem, mels = make_stem(), mels_of(frames)
    x_TD, layout = stem(mels)
    assert layout.lengths == tuple(positions_of(n) for n in frames)
    expected = torch.cat([definition(stem, mel) for mel in mels])
    assert x_TD.shape == expected.shape
    assert (x_TD - expected).abs().max() < 1e-12


@pytest.mark.parametrize("frames", [[6, 6, 6], [7, 7, 7], [1, 2, 1]])
def test_a_broken_neighbour_changes_nothing(frames: list[int]) -> None:
    stem, mels = make_stem(), mels_of(frames)
    before, layout = stem(mels)
    after, _ = stem([mel * torch.nan if i == 1 else mel for i, mel in enumerate(mels)])
    first, middle, last = layout.slices()
    assert torch.equal(after[first], before[first]) and torch.equal(after[last], before[last])
    assert after[middle].isnan().all()


def test_without_silence_between_them_neighbours_would_touch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first convolution's bias and reach make its gap loud; it is silenced, or the second would hear it."""
    stem, mels = make_stem(), mels_of([6, 7, 5])
    expected, _ = stem(mels)
    monkeypatch.setattr(layers, "_inside", lambda frames, stride, like: like.new_ones(stride))
    assert (stem(mels)[0] - expected).abs().max() > 1e-2


def test_gradients_of_a_pack_are_the_sum_of_those_alone() -> None:
    stem, mels = make_stem(), mels_of([9, 1, 4])
    weight = torch.randn(8, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    packed = torch.autograd.grad((stem(mels)[0] * weight).sum(), list(stem.parameters()))
    alone = torch.autograd.grad(
        (torch.cat([definition(stem, mel) for mel in mels]) * weight).sum(), list(stem.parameters())
    )
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(packed, alone, strict=True))


@pytest.mark.parametrize(("frames", "positions"), [(1, 1), (2, 1), (200, 100), (201, 101), (3000, 1500)])
def test_fifty_positions_a_second_rounded_up(frames: int, positions: int) -> None:
    assert positions_of(frames) == positions


def test_a_segment_without_frames_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        make_stem()([torch.zeros(MELS, 4, dtype=torch.float64), torch.zeros(MELS, 0, dtype=torch.float64)])


def test_positions_are_sines_then_cosines() -> None:
    """Side by side, not interleaved, from wavelength 2π to 10,000 · 2π."""
    table = sinusoids(50, 8)
    place = torch.arange(50)
    for column, wavelength in enumerate([1.0, 10_000 ** (1 / 3), 10_000 ** (2 / 3), 10_000.0]):
        assert torch.allclose(table[:, column], (place / wavelength).sin(), atol=1e-5)
        assert torch.allclose(table[:, 4 + column], (place / wavelength).cos(), atol=1e-5)
