"""The encoder's choice of experts: what the router reads, on whom it depends, and who may overrule it."""

from __future__ import annotations

import pytest
import torch

from tests.model.tiny import CONFIGS, fixed_routing, random_mels, relative, tiny_model
from whisper_moe.config import MoEConfig
from whisper_moe.model.model import Encoder, WhisperMoEModel
from whisper_moe.model.router import Routing, pool_segments

FRAMES = (40, 9, 64)


def encoder_routed_after(layer: int) -> Encoder:
    config = CONFIGS["dense"].model_copy(update={"moe": MoEConfig(n_experts=4, expert_dim=24, router_layer=layer)})
    torch.manual_seed(0)
    model = WhisperMoEModel(config).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.encoder


def same_choice(a: Routing, b: Routing) -> bool:
    assert a.logits is not None and b.logits is not None
    return torch.equal(a.experts, b.experts) and relative(a.logits, b.logits) < 1e-12


@pytest.mark.parametrize("layer", range(4))
@torch.no_grad()
def test_the_router_reads_the_states_after_its_layer(layer: int) -> None:
    """``router_layer`` 0 is what enters the first block, 3 of 3 what leaves the last."""
    encoder, mels = encoder_routed_after(layer), random_mels(FRAMES)
    seen: dict[int, torch.Tensor] = {}
    for depth, block in enumerate(encoder.blocks):
        block.register_forward_hook(
            lambda block, args, out, depth=depth: seen.update({depth: args[0], depth + 1: out.x_TD})
        )
    encoded = encoder(mels)
    assert encoded.routing is not None and encoder.router is not None
    assert same_choice(encoded.routing, encoder.router(pool_segments(seen[layer], encoded.layout)))
    others = [encoder.router(pool_segments(seen[i], encoded.layout)) for i in range(4) if i != layer]
    assert all(relative(other.logits, encoded.routing.logits) > 1e-3 for other in others)
    assert [block.experts is not None for block in encoder.blocks] == [depth >= layer for depth in range(3)]


@torch.no_grad()
def test_a_segments_choice_does_not_depend_on_its_batch_mates() -> None:
    encoder, mels = tiny_model("segment").encoder, random_mels([*FRAMES, 200, 1, 33, 90])
    together = encoder(mels).routing
    assert together is not None
    assert len(set(together.choices)) > 1, "one choice for all would compare nothing"
    for segment, mel in enumerate(mels):
        alone = encoder([mel]).routing
        assert alone is not None and same_choice(together.rows(torch.tensor([segment])), alone)


@torch.no_grad()
def test_what_is_heard_changes_the_routers_reading_and_nothing_else() -> None:
    encoder, mels, heard = tiny_model("segment").encoder, random_mels(FRAMES), [7, 5, 32]
    whole, part = encoder(mels), encoder(mels, valid_lengths=heard)
    assert whole.routing is not None and part.routing is not None
    read = (whole.routing.logits - part.routing.logits).abs().amax(dim=1)
    assert read[0] > 1e-2 and (read[1:] == 0).all(), "segments 1 and 2 are heard to their ends"
    assert torch.equal(encoder(mels, valid_lengths=heard, routing=whole.routing).states_TD, whole.states_TD)
    assert torch.equal(encoder(mels, routing=part.routing).states_TD, part.states_TD)


@torch.no_grad()
def test_only_what_is_heard_is_read() -> None:
    """Before the first block a position depends on two frames to either side; what lies behind is not read."""
    encoder, mels = encoder_routed_after(0), random_mels(FRAMES)
    noise = mels[0].clone()
    noise[:, 20:] += 1
    before, after = (encoder([mel, *mels[1:]], valid_lengths=[9, 5, 32]).routing for mel in (mels[0], noise))
    assert torch.equal(before.logits, after.logits)
    before, after = (encoder([mel, *mels[1:]]).routing for mel in (mels[0], noise))
    assert not torch.equal(before.logits[0], after.logits[0])


@pytest.mark.parametrize("heard", [[0, 5, 32], [21, 5, 32]])
def test_a_count_outside_its_segment_is_refused(heard: list[int]) -> None:
    with pytest.raises(ValueError, match=rf"segment 0 has 20 tokens; {heard[0]} of them"):
        tiny_model("segment").encoder(random_mels(FRAMES), valid_lengths=heard)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["segment", "per expert"])
def test_a_choice_made_elsewhere_overrules_the_router(kind: str) -> None:
    model, mels = tiny_model(kind), random_mels(FRAMES)
    given = fixed_routing(model, len(FRAMES))
    own, ruled = model.encoder(mels), model.encoder(mels, routing=given)
    assert ruled.routing is given and own.routing is not None
    assert relative(ruled.states_TD, own.states_TD) > 1e-3
    again = model.encoder(mels, routing=own.routing)
    assert torch.equal(again.states_TD, own.states_TD)


def test_the_routers_own_choice_carries_its_gradient() -> None:
    """Where experts were chosen: *none* in every slot adds nothing, so nothing could be learned from it."""
    model = tiny_model("per expert")
    model.encoder(random_mels(FRAMES)).states_TD[:, 0].sum().backward()
    assert model.encoder.router.weight.grad.abs().max() > 1e-4


def test_experts_per_token_leave_the_segment_without_a_choice() -> None:
    assert tiny_model("token").encoder(random_mels(FRAMES)).routing is None
    assert tiny_model("dense").encoder(random_mels(FRAMES)).routing is None


def test_a_segment_longer_than_the_positions_is_refused() -> None:
    encoder = tiny_model("dense").encoder
    assert encoder(random_mels([3000])).layout.lengths == (1500,)
    with pytest.raises(ValueError, match="a segment has 1501 positions; the encoder has 1500"):
        encoder(random_mels([10, 3001]))


def test_a_choice_for_segments_that_are_not_routed_is_refused() -> None:
    mels, routing = random_mels((40,)), Routing(torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]]))
    for kind in ("dense", "token"):
        with pytest.raises(ValueError, match="segments are not routed"):
            tiny_model(kind).encoder(mels, routing=routing)
