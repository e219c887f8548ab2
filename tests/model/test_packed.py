"""A segment's result in any pack is its result alone: states, logits, loss and every gradient, encoder and decoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.model.masked_oracle import masked_cross_attention, masked_self_attention
from tests.model.tiny import CONFIGS, fixed_routing, hold_choices, random_mels, random_texts, relative, tiny_model
from whisper_moe.model import layers
from whisper_moe.model.attention import CrossAttention, SelfAttention
from whisper_moe.model.layers import positions_of
from whisper_moe.model.moe import Experts
from whisper_moe.model.ttt import TTTMLP
from whisper_moe.packing import Layout

FRAMES, TEXTS = (601, 1, 3000, 8, 250, 2), (3, 1, 448, 20, 7, 2)
"""301, 1, 1500, 4, 125 and 1 positions, from odd and even frames; from one token to the longest text."""
SHORT_FRAMES, SHORT_TEXTS = (81, 40, 7), (9, 20, 4)
KINDS = pytest.mark.parametrize("kind", CONFIGS)


class Case:
    """A model, segments for it, and a choice of experts for each that no computation changes."""

    def __init__(self, kind: str, dtype: torch.dtype, frames: Sequence[int], texts: Sequence[int]) -> None:
        self.model = tiny_model(kind, dtype)
        self.mels, self.texts = random_mels(frames, dtype), random_texts(texts)
        self.routing = fixed_routing(self.model, len(frames))
        self.held = hold_choices(self.model, [positions_of(n) for n in frames], texts)

    @property
    def everything(self) -> range:
        return range(len(self.mels))

    def leaves(self) -> dict[str, Tensor]:
        """Every parameter that a segment's result depends on: with its choice held, the segment's router is not one."""
        leaves: dict[str, Tensor] = dict(self.model.named_parameters())
        if self.routing is not None:
            del leaves["encoder.router.weight"]
            leaves["gates"] = self.routing.gates
        return leaves

    def run(self, segments: Sequence[int]) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """These segments as one pack: the states and the logits of each, and the sum of their losses."""
        for router in self.held:
            router.segments = segments
        routing = self.routing.rows(torch.tensor(segments)) if self.routing else None
        encoded = self.model.encoder([self.mels[i] for i in segments], routing=routing)
        texts = [self.texts[i] for i in segments]
        layout = Layout(map(len, texts))
        logits = self.model.decoder.head(self.model.decoder(torch.cat(texts), layout, encoded).states_TD)
        per_segment = [logits[rows] for rows in layout.slices()]
        labels = [(text + 1) % self.model.config.vocab_size for text in texts]
        loss = torch.stack(
            [F.cross_entropy(*pair, reduction="sum") for pair in zip(per_segment, labels, strict=True)]
        ).sum()
        return [encoded.states_TD[rows] for rows in encoded.layout.slices()], per_segment, loss

    def alone(self) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Each segment by itself, in the same form."""
        parts = [self.run([i]) for i in self.everything]
        losses = torch.stack([loss for _, _, loss in parts])
        return [states[0] for states, _, _ in parts], [logits[0] for _, logits, _ in parts], losses.sum()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["f64", "f32"])
@KINDS
def test_packed_equals_alone_with_loss_and_gradients(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    case = Case(kind, dtype, FRAMES, TEXTS)
    leaves = case.leaves()
    packed, alone = case.run(case.everything), case.alone()
    for ours, expected in zip(packed[0] + packed[1], alone[0] + alone[1], strict=True):
        assert relative(ours, expected) < tolerance
    assert relative(packed[2], alone[2]) < tolerance
    found, wanted = (torch.autograd.grad(loss, list(leaves.values())) for loss in (packed[2], alone[2]))
    for name, a, b in zip(leaves, found, wanted, strict=True):
        assert b.abs().max() > 1e-4, f"{name} gets no gradient"
        assert relative(a, b) < tolerance, name


@KINDS
def test_other_segments_change_nothing(kind: str) -> None:
    """Not even when they are broken, and not even in the last bit, in a pack of the same shape."""
    case = Case(kind, torch.float64, SHORT_FRAMES, SHORT_TEXTS)
    with torch.no_grad():
        states, logits, _ = case.run(case.everything)
        for broken in case.everything:
            mel, text = case.mels[broken], case.texts[broken]
            case.mels[broken], case.texts[broken] = mel * torch.nan, text.flip(0)
            other_states, other_logits, _ = case.run(case.everything)
            case.mels[broken], case.texts[broken] = mel, text
            for i in case.everything:
                assert (
                    torch.equal(other_states[i], states[i]) == torch.equal(other_logits[i], logits[i]) == (i != broken)
                )


@KINDS
def test_the_order_of_segments_does_not_matter(kind: str) -> None:
    case, order = Case(kind, torch.float64, SHORT_FRAMES, SHORT_TEXTS), [2, 0, 1]
    with torch.no_grad():
        states, logits, loss = case.run(case.everything)
        moved_states, moved_logits, moved_loss = case.run(order)
    assert relative(moved_loss, loss) < 1e-12
    for place, i in enumerate(order):
        assert relative(moved_states[place], states[i]) < 1e-12
        assert relative(moved_logits[place], logits[i]) < 1e-12


@KINDS
def test_the_model_equals_itself_with_masked_attention(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(kind, torch.float64, SHORT_FRAMES, SHORT_TEXTS)
    with torch.no_grad():
        states, logits, _ = case.run(case.everything)
        monkeypatch.setattr(SelfAttention, "forward", masked_self_attention)
        # The oracle computes keys and values itself, so the cache is the states that it computes them from.
        monkeypatch.setattr(CrossAttention, "cache", lambda attention, states_TD, layout: (states_TD, layout))
        monkeypatch.setattr(
            CrossAttention,
            "forward",
            lambda self, x_TD, layout, cache: masked_cross_attention(self, x_TD, layout, *cache),
        )
        masked_states, masked_logits, _ = case.run(case.everything)
    for ours, oracle in zip(states + logits, masked_states + masked_logits, strict=True):
        assert relative(ours, oracle) < 1e-12


def _one(layout: Layout) -> Layout:
    return Layout([layout.total])


def _leak_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Layout, "positions", lambda layout, device="cpu": torch.arange(layout.total, device=device))


def _leak_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    apart = SelfAttention.forward
    monkeypatch.setattr(SelfAttention, "forward", lambda self, x_TD, layout: apart(self, x_TD, _one(layout)))


def _leak_stem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "_inside", lambda frames, stride, like: like.new_ones(stride))


def _leak_ttt(monkeypatch: pytest.MonkeyPatch) -> None:
    apart = TTTMLP.forward
    monkeypatch.setattr(TTTMLP, "forward", lambda self, x_TD, layout: apart(self, x_TD, _one(layout)))


def _leak_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every segment goes to the first one's experts."""
    apart = Experts.forward
    first = lambda routing: routing.rows(torch.zeros(len(routing), dtype=torch.int64))  # noqa: E731
    monkeypatch.setattr(
        Experts, "forward", lambda self, x_TD, routing, layout: apart(self, x_TD, first(routing), layout)
    )


LEAKS = [_leak_positions, _leak_attention, _leak_stem, _leak_ttt, _leak_experts]


@pytest.mark.parametrize("leak", LEAKS)
def test_this_comparison_sees_segments_that_touch(
    leak: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each thing that keeps segments apart, taken away on its own."""
    case = Case("segment", torch.float64, SHORT_FRAMES, SHORT_TEXTS)
    with torch.no_grad():
        leak(monkeypatch)
        packed, alone = case.run(case.everything), case.alone()
    worst = max(relative(a, b) for a, b in zip(packed[0] + packed[1], alone[0] + alone[1], strict=True))
    assert worst > 1e-3
