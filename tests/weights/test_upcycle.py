"""Upcycling: the mixture of experts starts as the very function of the dense Whisper, and can learn from there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from model.tiny import CONFIGS
from torch import Tensor

from whisper_moe.config import ModelConfig, MoEConfig, TTTConfig
from whisper_moe.model.model import WhisperMoEModel
from whisper_moe.weights.load import DEFAULT_MOE, DEFAULT_TTT, load_model
from whisper_moe.weights.parts import expected_shapes
from whisper_moe.weights.upcycle import upcycle

DENSE = CONFIGS["dense"].model_copy(update={"decoder_ffn_dim": 48})
TTT = TTTConfig(encoder_layers=(0, 2), decoder_layers=(1,), mini_batch=5)
COPIES = MoEConfig(n_experts=8, expert_dim=48, shared=False, none_choice=False, router_layer=1)
PLANS: dict[str, tuple[MoEConfig | None, TTTConfig | None]] = {
    "shared, per segment": (MoEConfig(n_experts=8, expert_dim=24, router_layer=1), TTT),
    "shared, without none": (MoEConfig(n_experts=8, expert_dim=24, router_layer=0, none_choice=False), None),
    "shared, per token": (MoEConfig(n_experts=8, expert_dim=24, scope="token"), TTT),
    "shared, TTT per expert": (
        MoEConfig(n_experts=2, expert_dim=24, router_layer=1, none_choice=False),
        TTTConfig(encoder_layers=(1, 2), mini_batch=5, per_expert=True),
    ),
    "TTT alone": (None, TTT),
}
FRAMES, TEXTS = (81, 1, 40), (9, 4, 1)


def dense_state(config: ModelConfig = DENSE) -> dict[str, Tensor]:
    """Random everywhere, also where a fresh model has zeros or ones."""
    generator = torch.Generator().manual_seed(0)
    return {key: torch.randn(shape, generator=generator) * 0.3 for key, shape in expected_shapes(config).items()}


def model_of(config: ModelConfig, state: dict[str, Tensor]) -> WhisperMoEModel:
    model = WhisperMoEModel(config)
    model.load_state_dict(state)
    return model.eval()


def batch(n_mels: int = 8, vocab_size: int = 61, frames: Sequence[int] = FRAMES) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(3)
    mels = [torch.randn(n_mels, n, generator=generator) for n in frames]
    return mels, [torch.randint(vocab_size, (n,), generator=generator) for n in TEXTS]


def outputs(model: WhisperMoEModel, mels: list[Tensor], texts: list[Tensor]) -> tuple[Tensor, Tensor]:
    return model.encoder(mels).states_TD, model(mels, texts).logits


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("plan", PLANS)
def test_with_a_shared_expert_the_upcycled_model_is_the_dense_one_to_the_last_bit(plan: str, gradients: bool) -> None:
    state = dense_state()
    dense, upcycled = model_of(DENSE, state), model_of(*upcycle(DENSE, state, moe=PLANS[plan][0], ttt=PLANS[plan][1]))
    with torch.set_grad_enabled(gradients):
        for ours, expected in zip(outputs(upcycled, *batch()), outputs(dense, *batch()), strict=True):
            assert expected.std() > 0.01
            assert torch.equal(ours, expected)


def test_decoding_step_by_step_is_the_dense_one_too() -> None:
    state = dense_state()
    moe, ttt = PLANS["shared, per segment"]
    mels, _ = batch()
    tokens = torch.randint(61, (6, 7), generator=torch.Generator().manual_seed(4))
    results = []
    with torch.inference_mode():
        for model in (model_of(DENSE, state), model_of(*upcycle(DENSE, state, moe=moe, ttt=ttt))):
            decoding = model.decoder.start(model.encoder(mels), beams=2)
            results.append([model.decoder.extend(part, decoding) for part in tokens.split([4, 1, 1, 1], dim=1)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("scope", ["segment", "token"])
@torch.no_grad()
def test_eight_copies_add_up_to_the_feed_forward_that_they_replace(scope: str) -> None:
    state = dense_state()
    moe = MoEConfig.model_validate(COPIES.model_dump() | {"scope": scope})
    dense, upcycled = model_of(DENSE, state), model_of(*upcycle(DENSE, state, moe=moe))
    assert sum(block.ffn is None for block in upcycled.encoder.blocks) == (3 if scope == "token" else 2)
    assert all(block.ffn is None for block in upcycled.decoder.blocks)
    for ours, expected in zip(outputs(upcycled, *batch()), outputs(dense, *batch()), strict=True):
        assert (ours - expected).abs().max() < 2e-4
        assert expected.std() > 0.1
    # A copy of another layer's feed-forward would be noticed.
    upcycled.encoder.blocks[1].experts.load_state_dict(upcycled.encoder.blocks[2].experts.state_dict())
    assert (upcycled.encoder(batch()[0]).states_TD - dense.encoder(batch()[0]).states_TD).abs().max() > 0.01


@pytest.mark.parametrize(("side", "layer"), [("encoder", 2), ("decoder", 1)])
def test_every_expert_is_its_own_copy(side: str, layer: int) -> None:
    state = dense_state()
    _, upcycled = upcycle(DENSE, state, moe=COPIES)
    block = f"{side}.blocks.{layer}"
    for expert in range(8):
        assert torch.equal(upcycled[f"{block}.experts.up_weight"][expert], state[f"{block}.ffn.up.weight"])
        assert torch.equal(upcycled[f"{block}.experts.up_bias"][expert], state[f"{block}.ffn.up.bias"])
        assert torch.equal(upcycled[f"{block}.experts.down_weight"][expert], state[f"{block}.ffn.down.weight"].T)
        assert torch.equal(upcycled[f"{block}.experts.down_bias"][expert], state[f"{block}.ffn.down.bias"])
    upcycled[f"{block}.experts.up_weight"][0] += 1
    before = dense_state()[f"{block}.ffn.up.weight"]
    assert torch.equal(upcycled[f"{block}.experts.up_weight"][1], before)
    assert torch.equal(state[f"{block}.ffn.up.weight"], before), "the dense model keeps its own"


def moved_by(model: WhisperMoEModel, steps: int) -> set[str]:
    """The parameters that so many steps of Adam change."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.Adam(model.train().parameters(), lr=1e-3)
    mels, texts = batch(frames=(81, 9, 40))
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(mels, texts).logits, (torch.cat(texts) + 1) % 61).backward()
        optimizer.step()
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


@pytest.mark.parametrize("plan", ["shared, without none", "shared, per token", "shared, TTT per expert", "TTT alone"])
def test_the_identity_is_alive(plan: str) -> None:
    """Gates and the experts' last halves move in the first step, what lies behind them from the second."""
    moe, ttt = PLANS[plan]
    config, state = upcycle(DENSE, dense_state(), moe=moe, ttt=ttt)
    first, second = moved_by(model_of(config, state), 1), moved_by(model_of(config, state), 2)
    names = [name for name, _ in model_of(config, state).named_parameters()]
    added = set(names) - set(expected_shapes(DENSE))
    assert set(names) - added <= first, "everything dense moves"
    opening = {name for name in added if ".gate_" in name or ".experts.down_" in name}
    behind = {name for name in added if ".router" in name or ".experts.up_" in name or ".ttt.w1" in name}
    assert opening and opening <= first
    assert behind and not behind & first and behind <= second


def test_copied_experts_are_alive() -> None:
    config, state = upcycle(DENSE, dense_state(), moe=COPIES)
    moved = moved_by(model_of(config, state), 1)
    assert {name for name in state if ".experts." in name} <= moved


def test_the_seed_decides_what_is_new_and_nothing_else() -> None:
    state = dense_state()
    moe, ttt = PLANS["shared, per segment"]
    (_, first), (_, same), (_, other) = (upcycle(DENSE, state, moe=moe, ttt=ttt, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(first[key], same[key]) for key in first)
    changed = {key for key in first if not torch.equal(first[key], other[key])}
    assert {"encoder.router.weight", "encoder.blocks.1.experts.up_weight", "encoder.blocks.0.ttt.w1"} <= changed
    assert not changed & state.keys()
    assert all(first[key] is state[key] for key in state)


def test_the_callers_random_numbers_are_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    upcycle(DENSE, dense_state(), moe=COPIES)
    assert torch.equal(torch.rand(3), expected)


def test_a_model_with_experts_or_ttt_is_refused() -> None:
    for moe, ttt in ((PLANS["shared, per segment"][0], None), (None, TTT)):
        config, state = upcycle(DENSE, dense_state(), moe=moe, ttt=ttt)
        with pytest.raises(ValueError, match="only a dense Whisper can be upcycled; this model has experts or TTT"):
            upcycle(config, state, moe=COPIES)


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_copies_of_another_size_are_refused(side: str) -> None:
    config = DENSE.model_copy(update={f"{side}_ffn_dim": 40})
    with pytest.raises(ValueError, match=f"copy of the {side}'s feed-forward of 40 hidden units; expert_dim is 48"):
        upcycle(config, dense_state(config), moe=COPIES)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"encoder.norm.bias": None}, "lacks encoder.norm.bias"),
        ({"decoder.positions": torch.zeros(447, 32)}, r"decoder.positions is \[447, 32\]"),
        ({"encoder.blocks.3.attn.out.bias": torch.zeros(32)}, "does not have: encoder.blocks.3.attn.out.bias"),
    ],
    ids=["missing", "other shape", "superfluous"],
)
def test_weights_that_are_not_the_configurations_are_refused(change: dict[str, Tensor | None], cause: str) -> None:
    """A missing tensor would otherwise stay random, and the model would speak nonsense without a word."""
    state = {key: tensor for key, tensor in (dense_state() | change).items() if tensor is not None}
    with pytest.raises(ValueError, match=f"the model's state: .*{cause}"):
        upcycle(DENSE, state, moe=PLANS["shared, per segment"][0])


@torch.inference_mode()
def test_whisper_base_with_the_default_experts_is_whisper_base_to_the_last_bit(whisper_base: Path) -> None:
    source = load_model(whisper_base)
    dense = model_of(source.config, source.state)
    upcycled = model_of(*upcycle(source.config, source.state, moe=DEFAULT_MOE, ttt=DEFAULT_TTT))
    mels, texts = batch(80, 51_865, frames=(501, 120, 64))
    for ours, expected in zip(outputs(upcycled, mels, texts), outputs(dense, mels, texts), strict=True):
        assert torch.equal(ours, expected)
