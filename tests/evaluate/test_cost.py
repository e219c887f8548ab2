"""Costs: counts that can be checked against the model itself, and against torch's own counter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from whisper_moe.config import PRESETS, AdaptConfig, ConformerConfig, ModelConfig, MoEConfig, TTTConfig
from whisper_moe.evaluate import cost
from whisper_moe.evaluate.cost import active_parameters, facts_of, flops, parameters, table
from whisper_moe.model import ttt
from whisper_moe.model.model import WhisperMoEModel
from whisper_moe.model.moe import Experts
from whisper_moe.model.router import Routing
from whisper_moe.packing import Layout
from whisper_moe.weights.checkpoint import save_checkpoint
from whisper_moe.weights.load import DEFAULT_MOE, DEFAULT_TTT, Loaded, Located

SMALL = ModelConfig(
    vocab_size=211,
    n_mels=8,
    d_model=32,
    encoder_layers=2,
    encoder_heads=4,
    encoder_ffn_dim=64,
    decoder_layers=3,
    decoder_heads=4,
    decoder_ffn_dim=96,
    max_source_positions=50,
    max_target_positions=20,
)


def having(**parts: Any) -> ModelConfig:
    return SMALL.model_copy(update=parts)


def experts(**more: Any) -> MoEConfig:
    return MoEConfig(n_experts=4, expert_dim=16, **more)


MOE = having(moe=experts(router_layer=1))
SCOPES = {
    "dense": SMALL,
    "per segment": having(moe=experts(router_layer=1, none_choice=False)),
    "per token": having(moe=experts(none_choice=False, scope="token")),
    "ttt": having(ttt=TTTConfig(encoder_layers=(0,), decoder_layers=(1,), mini_batch=6)),
    "adapted": having(
        adapt=AdaptConfig(encoder_layers=(0, 1), decoder_layers=(1,), adapter_dim=8),
        conformer=ConformerConfig(encoder_layers=(1,), kernel_size=5),
    ),
    "ttt per expert": having(
        moe=experts(router_layer=1, none_choice=False),
        ttt=TTTConfig(encoder_layers=(1,), mini_batch=6, per_expert=True),
    ),
}


def grouped(a: torch.Size, b: torch.Size, *_: Any, out_shape: torch.Size | None = None, **__: Any) -> int:
    """Rows [P, K], each with its group's [K, N]: torch's counter does not know the operation."""
    return 2 * a[0] * a[1] * b[-1]


def counted(config: ModelConfig, frames: int, tokens: int) -> int:
    """What torch's counter sees of one window. Gradients stay on, so that TTT layers are computed whatever their gates."""
    model = WhisperMoEModel(config).eval()
    known = {torch.ops.aten._grouped_mm: grouped}
    # The fused attention kernel of the CPU is unknown to the counter; the plain one is made of products that it sees.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=known) as counter:
        state = model.decoder.start(model.encoder([torch.randn(config.n_mels, frames)]))
        for _ in range(tokens):
            model.decoder.head(model.decoder.extend(torch.zeros(1, 1, dtype=torch.long), state))
    return counter.get_total_flops()


def gap(config: ModelConfig) -> int:
    """The stem's own: two frames of zeros behind the segment, one position, in both convolutions."""
    return 2 * 3 * config.d_model * (2 * config.n_mels + 1 * config.d_model)


@pytest.mark.parametrize("name", SCOPES)
def test_formula_equals_torchs_counter(name: str):
    """Positions are no multiple of the TTT mini-batch, and the decoder fills one mini-batch and begins another."""
    config = SCOPES[name]
    assert sum(flops(config, seconds=0.8, tokens=7)) + gap(config) == counted(config, 80, 7)


def first_two(experts: Experts, x_TD: Tensor, routing: Routing, layout: Layout | None = None) -> Tensor:
    """What experts compute where every token goes to the same two."""
    tokens = routing if layout is None else routing.expand(layout)
    y_TD = tokens.dense(len(experts.down_bias)) @ experts.down_bias
    for up, down in zip(experts.up_weight[:2], experts.down_weight[:2], strict=True):
        y_TD = y_TD + F.gelu(x_TD @ up.T) @ down
    return y_TD


def test_formula_equals_torchs_counter_at_full_size(monkeypatch: pytest.MonkeyPatch):
    """The default's shape, 30 s, without computing anything: fake tensors, and a choice that needs no data."""

    def outside(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with unset_fake_temporarily():
                return function(*args)

        return run

    for owner, name in ((Layout, "positions"), (Layout, "segment_ids"), (ttt, "plan_chunks")):
        monkeypatch.setattr(owner, name, outside(getattr(owner, name)))
    monkeypatch.setattr(Experts, "forward", first_two)
    config = ModelConfig(moe=DEFAULT_MOE, ttt=DEFAULT_TTT)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert sum(flops(config, 30, 5)) + gap(config) == counted(config, 3000, 5)


def test_experts_add_what_the_chosen_ones_cost():
    dense, routed = sum(flops(SMALL, 0.8, 7)), sum(flops(MOE, 0.8, 7))
    chosen_units, tokens, router = 2 * 16, 40 * 1 + 7 * 3, 2 * 32 * 5
    assert routed - dense == (2 * 2 * 32 * chosen_units + 2 * 32 * 4) * tokens + router


def test_parts_sum_to_every_tensor_of_the_model():
    config = MOE.model_copy(update={"ttt": TTTConfig(encoder_layers=(1,), per_expert=True, mini_batch=4)})
    counts = parameters(config)
    total = sum(tensor.numel() for tensor in WhisperMoEModel(config).state_dict().values())
    assert sum(counts.values()) == total
    experts = [count for part, count in counts.items() if part.startswith("experts/")]
    assert len(experts) == 4
    assert len(set(experts)) == 1
    assert active_parameters(config) == total - 2 * experts[0]


def test_parts_are_called_what_their_files_are_called(tmp_path: Path):
    moe = MoEConfig(n_experts=2, expert_dim=16, router_layer=1, expert_names=("Hindi", "en US / old"))
    config = having(moe=moe, ttt=TTTConfig(encoder_layers=(1,), per_expert=True))
    save_checkpoint(tmp_path / "m", Loaded(config, WhisperMoEModel(config).state_dict(), {}, b"{}"))
    facts = facts_of(str(tmp_path / "m"))
    assert facts["parameters"].keys() == facts["bytes"].keys() >= {"experts/00-hindi", "experts/01-en-us-old"}
    assert facts["experts"] == ["Hindi", "en US / old"]
    rows = [line for line in table(facts).splitlines() if "experts/" in line]
    assert len(rows) == 2 and all("MB" in row for row in rows)
    text = table(facts_of("8x39m"))
    assert "granularity: ffn" in text and "expert-7" in text


def test_the_default_made_from_a_whisper_is_described_as_it_will_be(monkeypatch: pytest.MonkeyPatch):
    """An installation without a checkout has no checkpoint: its default is a dense Whisper, upcycled when it is loaded."""
    monkeypatch.setattr(cost, "resolve", lambda _: Located("whisper", Path("nowhere"), "openai/whisper-base"))
    monkeypatch.setattr(cost, "config_of", lambda _: ModelConfig())
    upcycled = ModelConfig(moe=DEFAULT_MOE, ttt=DEFAULT_TTT)
    assert facts_of(None)["parameters"] == parameters(upcycled)
    assert facts_of(None)["experts"] == list(DEFAULT_MOE.names)
    assert facts_of("openai/whisper-base")["parameters"] == parameters(ModelConfig())


def test_presets_have_the_published_size_without_ttt():
    config = PRESETS["8x241m"].model_copy(update={"ttt": None})
    assert sum(parameters(config).values()) == pytest.approx(1.035e9, rel=2e-3)
    assert active_parameters(config) == pytest.approx(0.355e9, rel=3e-3)
    assert active_parameters(SMALL) == sum(parameters(SMALL).values())
