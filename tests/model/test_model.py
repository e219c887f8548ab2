"""The encoder's choice of experts, and a decoder that says token by token what it says in one teacher-forced pass."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.model.tiny import (
    CONFIGS,
    MINI_BATCH,
    fixed_routing,
    random_mels,
    random_texts,
    relative,
    segment_alone,
    tiny_model,
)
from whisper_moe.config import MoEConfig
from whisper_moe.model.block import DecoderState, Encoded
from whisper_moe.model.model import Encoder, WhisperMoEModel
from whisper_moe.model.router import Routing, pool_segments
from whisper_moe.packing import Layout

FRAMES = (40, 9, 31)
LENGTH = 2 * MINI_BATCH + 3
"""Two commits of a causal TTT layer."""
KINDS = pytest.mark.parametrize("kind", CONFIGS)
pytestmark = pytest.mark.usefixtures("_no_gradients")


@pytest.fixture
def _no_gradients():
    with torch.no_grad():
        yield


def forced(model: WhisperMoEModel, tokens_Rn: Tensor, encoded: Encoded) -> Tensor:
    """The teacher-forced pass over a text for each segment, [R, n, D]."""
    rows, n = tokens_Rn.shape
    return model.decoder(tokens_Rn.flatten(), Layout([n] * rows), encoded).states_TD.view(rows, n, -1)


def stepwise(model: WhisperMoEModel, tokens_Rn: Tensor, state: DecoderState, sizes: Sequence[int]) -> Tensor:
    steps = [model.decoder.extend(part, state) for part in tokens_Rn.split(list(sizes), dim=1)]
    return torch.cat(steps, dim=1)


def texts(rows: int, length: int, seed: int = 2) -> Tensor:
    return torch.stack(random_texts([length] * rows, seed))


def case(kind: str) -> tuple[WhisperMoEModel, Encoded]:
    """A model and three segments with different experts, if there are any to choose."""
    model = tiny_model(kind)
    encoded = model.encoder(random_mels(FRAMES))
    if encoded.routing is not None:
        experts = torch.tensor([[0, 1], [3, -1], [1, 2]])
        encoded = encoded._replace(routing=type(encoded.routing)(experts, encoded.routing.gates))
    return model, encoded


@pytest.mark.parametrize(
    "sizes", [[1] * LENGTH, [4, 1, LENGTH - 5], [MINI_BATCH, 1, LENGTH - MINI_BATCH - 1], [LENGTH]]
)
@KINDS
def test_step_by_step_equals_teacher_forcing(kind: str, sizes: list[int]) -> None:
    model, encoded = case(kind)
    tokens = texts(3, LENGTH)
    state = model.decoder.start(encoded)
    assert state.length == 0
    assert relative(stepwise(model, tokens, state, sizes), forced(model, tokens, encoded)) < 1e-10
    assert state.length == LENGTH


@KINDS
def test_a_restarted_state_remembers_the_sound_and_nothing_else(kind: str) -> None:
    model, encoded = case(kind)
    tokens = texts(6, LENGTH)
    state = model.decoder.start(encoded, beams=2)
    stepwise(model, texts(6, LENGTH, seed=9), state, [LENGTH])
    again = stepwise(model, tokens, model.decoder.restarted(state), [1] * LENGTH)
    assert torch.equal(again, stepwise(model, tokens, model.decoder.start(encoded, beams=2), [1] * LENGTH))


@KINDS
def test_a_cache_grows_beyond_its_first_size(kind: str) -> None:
    model, encoded = case(kind)
    tokens = texts(3, 140)
    state = model.decoder.start(encoded)
    first = state.blocks[0].cache.keys.shape[2]
    assert first == 64
    assert relative(stepwise(model, tokens, state, [60, 1, 9, *[1] * 60, 10]), forced(model, tokens, encoded)) < 1e-10
    assert state.blocks[0].cache.keys.shape[2] >= 140


@pytest.mark.parametrize("leave_after", [1, MINI_BATCH])
@pytest.mark.parametrize("kept", [[0, 2], [2, 1]], ids=str)
@KINDS
def test_segments_that_stay_decode_as_if_alone(kind: str, kept: list[int], leave_after: int) -> None:
    """The others leave the batch on the way, before and after the commit of a TTT layer."""
    model, encoded = case(kind)
    beams, tokens = 2, texts(6, LENGTH).view(3, 2, LENGTH)
    state = model.decoder.start(encoded, beams)
    model.decoder.extend(tokens[:, :, :leave_after].flatten(0, 1), state)
    state = state.keep(kept)
    assert (state.segments, state.beams, state.length) == (len(kept), beams, leave_after)
    rest = tokens[kept, :, leave_after:].flatten(0, 1)
    after = stepwise(model, rest, state, [1] * (LENGTH - leave_after)).view(len(kept), beams, -1, 32)
    for place, segment in enumerate(kept):
        alone = model.decoder.start(segment_alone(encoded, segment), beams)
        expected = stepwise(model, tokens[segment], alone, [LENGTH])[:, leave_after:]
        assert relative(after[place], expected) < 1e-10


@pytest.mark.parametrize("prompt", [1, 5, 12])
@pytest.mark.parametrize("joins_after", [1, 6])
@KINDS
def test_segments_that_join_on_the_way_decode_as_if_alone(kind: str, joins_after: int, prompt: int) -> None:
    """One is under way when two others join, of which one goes on alone when the first two have left."""
    model, encoded = case(kind)
    beams, tokens = 2, texts(6, LENGTH).view(3, 2, LENGTH)
    state = model.decoder.start(segment_alone(encoded, 2), beams)
    if not state.joins:
        assert any(block.ttt is not None for block in model.decoder.blocks)
        return
    found = [[] for _ in range(3)]
    done = [0, 0, 0]

    def step(state: DecoderState, segments: list[int], n: int) -> None:
        now = torch.cat([tokens[segment, :, done[segment] : done[segment] + n] for segment in segments])
        for segment, part in zip(segments, model.decoder.extend(now, state).split(beams), strict=True):
            found[segment].append(part)
            done[segment] += n

    step(state, [2], joins_after)
    others = model.decoder.start(encoded.segments([0, 1]), beams)
    step(others, [0, 1], prompt)
    state = state.joined(others)
    assert state.segments == 3 and state.length == max(joins_after, prompt)
    for _ in range(3):
        step(state, [2, 0, 1], 1)
    step(state, [2, 0, 1], 2)
    state = state.keep([1])
    assert state.length == done[0], "the columns before its first are gone"
    step(state, [0], 1)
    for segment in range(3):
        alone = model.decoder.start(segment_alone(encoded, segment), beams)
        expected = stepwise(model, tokens[segment, :, : done[segment]], alone, [done[segment]])
        assert relative(torch.cat(found[segment], dim=1), expected) < 1e-10


@KINDS
def test_beams_that_move_take_their_past_along(kind: str) -> None:
    """Reordered within their segments at each of several steps, across two commits of a causal TTT layer."""
    model, encoded = case(kind)
    beams, rows = 3, 9
    generator = torch.Generator().manual_seed(5)
    state = model.decoder.start(encoded, beams)
    histories = torch.empty(rows, 0, dtype=torch.int64)
    outputs = torch.empty(rows, 0, 32, dtype=torch.float64)
    while histories.shape[1] < LENGTH:
        tokens = torch.randint(61, (rows, 3), generator=generator)
        histories = torch.cat([histories, tokens], dim=1)
        outputs = torch.cat([outputs, model.decoder.extend(tokens, state)], dim=1)
        within = torch.randint(beams, (rows,), generator=generator)
        order = torch.arange(rows) // beams * beams + within
        state, histories, outputs = state.select(order), histories[order], outputs[order]
    for row in range(rows):
        expected = forced(model, histories[row : row + 1], segment_alone(encoded, row // beams))[0]
        assert relative(outputs[row], expected) < 1e-10


@KINDS
def test_a_selected_state_does_not_change_the_one_it_came_from(kind: str) -> None:
    """Two continuations of one past, in turn."""
    model, encoded = case(kind)
    tokens, other = texts(3, LENGTH), texts(3, LENGTH, seed=7)
    state = model.decoder.start(encoded)
    model.decoder.extend(tokens[:, :5], state)
    branch = state.select(torch.arange(3))
    model.decoder.extend(other[:, 5:], branch)
    rest = stepwise(model, tokens[:, 5:], state, [1] * (LENGTH - 5))
    assert relative(rest, forced(model, tokens, encoded)[:, 5:]) < 1e-10


@KINDS
def test_beams_of_a_segment_share_one_cache(kind: str) -> None:
    model, encoded = case(kind)
    state = model.decoder.start(encoded, beams=4)
    for block in state.blocks:
        assert [keys.shape[2] for keys in block.cross.keys] == [20, 5, 16], "one for each segment, not for each beam"
        assert block.cache.keys.shape[0] == 12
    moved = state.select(torch.arange(12).flip(0).view(3, 4).flip(0).flatten())
    assert all(new.cross is old.cross for new, old in zip(moved.blocks, state.blocks, strict=True))
    left = state.keep([2])
    assert all(new.cross.keys == (old.cross.keys[2],) for new, old in zip(left.blocks, state.blocks, strict=True))
    tokens = texts(3, 6).repeat_interleave(4, dim=0)
    out = stepwise(model, tokens, state, [1, 5]).view(3, 4, 6, -1)
    assert relative(out, forced(model, tokens[::4], encoded)[:, None].expand_as(out)) < 1e-10


def test_alignment_logits_are_those_of_the_heads_that_are_named() -> None:
    """Softmax of them, times the values of each head, is what the layer's cross-attention gives out."""
    model, encoded = case("segment")
    written = random_texts([5, 1, 9])
    layout, flat = Layout(map(len, written)), torch.cat(written)
    seen: list[Tensor] = []
    for block in model.decoder.blocks:
        block.cross_attn.out.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    found = model.decoder(flat, layout, encoded, [(0, 1), (1, 0), (1, 1)]).attention
    assert [tuple(logits.shape) for logits in found] == [(3, 5, 20), (3, 1, 5), (3, 9, 16)]
    for segment, rows in enumerate(layout.slices()):
        for place, (layer, head) in enumerate([(0, 1), (1, 0), (1, 1)]):
            cache = model.decoder.blocks[layer].cross_attn.cache(encoded.states_TD, encoded.layout)
            mixed = found[segment][place].softmax(-1) @ cache.values[segment][0, head]
            assert relative(mixed, seen[layer][rows].unflatten(-1, (2, -1))[:, head]) < 1e-10


def test_the_head_is_the_embedding() -> None:
    model = tiny_model("dense")
    x = torch.randn(3, 32, dtype=torch.float64)
    assert torch.equal(model.decoder.head(x), F.linear(x, model.decoder.token_embedding.weight))
    assert "decoder.head.weight" not in model.state_dict() and not list(model.decoder.head.parameters())


HEARD = (40, 9, 64)


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
    encoder, mels = encoder_routed_after(layer), random_mels(HEARD)
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
    encoder, mels = tiny_model("segment").encoder, random_mels([*HEARD, 200, 1, 33, 90])
    together = encoder(mels).routing
    assert together is not None
    assert len(set(together.choices)) > 1, "one choice for all would compare nothing"
    for segment, mel in enumerate(mels):
        alone = encoder([mel]).routing
        assert alone is not None and same_choice(together.rows(torch.tensor([segment])), alone)


@torch.no_grad()
def test_what_is_heard_changes_the_routers_reading_and_nothing_else() -> None:
    encoder, mels, heard = tiny_model("segment").encoder, random_mels(HEARD), [7, 5, 32]
    whole, part = encoder(mels), encoder(mels, valid_lengths=heard)
    assert whole.routing is not None and part.routing is not None
    read = (whole.routing.logits - part.routing.logits).abs().amax(dim=1)
    assert read[0] > 1e-2 and (read[1:] == 0).all(), "segments 1 and 2 are heard to their ends"
    assert torch.equal(encoder(mels, valid_lengths=heard, routing=whole.routing).states_TD, whole.states_TD)
    assert torch.equal(encoder(mels, routing=part.routing).states_TD, part.states_TD)


@torch.no_grad()
def test_only_what_is_heard_is_read() -> None:
    """Before the first block a position depends on two frames to either side; what lies behind is not read."""
    encoder, mels = encoder_routed_after(0), random_mels(HEARD)
    noise = mels[0].clone()
    noise[:, 20:] += 1
    before, after = (encoder([mel, *mels[1:]], valid_lengths=[9, 5, 32]).routing for mel in (mels[0], noise))
    assert torch.equal(before.logits, after.logits)
    before, after = (encoder([mel, *mels[1:]]).routing for mel in (mels[0], noise))
    assert not torch.equal(before.logits[0], after.logits[0])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["segment", "per expert"])
def test_a_choice_made_elsewhere_overrules_the_router(kind: str) -> None:
    model, mels = tiny_model(kind), random_mels(HEARD)
    given = fixed_routing(model, len(HEARD))
    own, ruled = model.encoder(mels), model.encoder(mels, routing=given)
    assert ruled.routing is given and own.routing is not None
    assert relative(ruled.states_TD, own.states_TD) > 1e-3
    again = model.encoder(mels, routing=own.routing)
    assert torch.equal(again.states_TD, own.states_TD)


@torch.enable_grad()
def test_the_routers_own_choice_carries_its_gradient() -> None:
    """Where experts were chosen: *none* in every slot adds nothing, so nothing could be learned from it."""
    model = tiny_model("per expert")
    model.encoder(random_mels(HEARD)).states_TD[:, 0].sum().backward()
    assert model.encoder.router.weight.grad.abs().max() > 1e-4


def test_what_does_not_fit_is_refused() -> None:
    model, encoded = case("dense")
    routing = Routing(torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]]))
    with pytest.raises(ValueError, match="a text has 449 tokens; the decoder has 448 positions"):
        model.decoder(torch.zeros(454, dtype=torch.int64), Layout([3, 449, 2]), encoded)
    state = model.decoder.start(encoded)
    model.decoder.extend(texts(3, 448), state)
    with pytest.raises(ValueError, match="449 tokens; the decoder has 448 positions"):
        model.decoder.extend(texts(3, 1), state)
    assert state.length == 448
    assert model.encoder(random_mels([3000])).layout.lengths == (1500,)
    with pytest.raises(ValueError, match="a segment has 1501 positions; the encoder has 1500"):
        model.encoder(random_mels([10, 3001]))
    for heard in (0, 21):
        with pytest.raises(ValueError, match=rf"segment 0 has 20 tokens; {heard} of them"):
            tiny_model("segment").encoder(random_mels(HEARD), valid_lengths=[heard, 5, 32])
    for kind in ("dense", "token"):
        assert tiny_model(kind).encoder(random_mels(HEARD)).routing is None
        with pytest.raises(ValueError, match="segments are not routed"):
            tiny_model(kind).encoder(random_mels((40,)), routing=routing)
