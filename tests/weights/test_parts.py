"""Which tensors there are, and whose they are."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers")
from weights.whispers import CONFIGS, random_state

from whisper_moe.model.model import WhisperMoEModel
from whisper_moe.weights.parts import empty_model, expected_shapes, file_key, part_of, unstack


@pytest.mark.parametrize("name", CONFIGS)
def test_expected_shapes_are_the_real_models(name: str) -> None:
    real = WhisperMoEModel(CONFIGS[name]).state_dict()
    assert expected_shapes(CONFIGS[name]) == {key: tuple(tensor.shape) for key, tensor in real.items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_an_empty_model_takes_a_state_and_is_then_a_whole_one(name: str) -> None:
    state = random_state(CONFIGS[name])
    model = empty_model(CONFIGS[name])
    model.load_state_dict(state, assign=True)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"cpu"}
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    whole = WhisperMoEModel(CONFIGS[name])
    whole.load_state_dict(state)
    mel, text = torch.randn(80, 40), torch.arange(5)
    with torch.no_grad():
        assert torch.equal(model.eval()([mel], [text]).logits, whole.eval()([mel], [text]).logits)


def test_asking_for_shapes_costs_no_memory_and_imports_no_symbolic_mathematics() -> None:
    program = """
import resource, sys
from whisper_moe.config import PRESETS
from whisper_moe.weights.parts import expected_shapes
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert len(expected_shapes(PRESETS["8x769m"])) > 1000
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
assert grown < 100_000, grown
assert "sympy" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("name", CONFIGS)
def test_unstacked_tensors_are_views_that_cover_the_state_once(name: str) -> None:
    config = CONFIGS[name]
    state = random_state(config)
    alone = dict(unstack(state))
    assert sum(tensor.numel() for tensor in alone.values()) == sum(tensor.numel() for tensor in state.values())
    for tensor in alone.values():
        tensor.zero_()
    assert not any(tensor.any() for tensor in state.values())
    parts = {part_of(key, config) for key in alone}
    experts = {f"experts/{i:02d}" for i in range(config.moe.n_experts)} if config.moe else set()
    assert {part[:10] for part in parts if part.startswith("experts/")} == experts
    assert parts - {"core", "router", "adapt"} == {part for part in parts if part.startswith("experts/")}


def test_parts_by_name() -> None:
    config = CONFIGS["shared"]
    assert part_of("decoder.token_embedding.weight", config) == "core"
    assert part_of("decoder.new_tokens.weight", config) == "tokens"
    assert part_of("encoder.blocks.2.ffn.up.weight", config) == "core"
    assert part_of("encoder.router.weight", config) == "router"
    assert part_of("decoder.blocks.0.router.weight", CONFIGS["token"]) == "router"
    assert part_of("encoder.blocks.0.ttt.w1", config) == "adapt"
    assert part_of("encoder.blocks.0.ttt_norm.bias", config) == "adapt"
    assert part_of("encoder.blocks.1.ttt_norm.bias", CONFIGS["per expert"]) == "adapt"
    assert part_of("encoder.blocks.1.ttt.1.out.weight", CONFIGS["per expert"]) == "experts/01-expert-1"
    assert part_of("encoder.blocks.2.experts.0.up_weight", config) == "experts/00-hindi"
    assert part_of("encoder.blocks.2.experts.2.up_weight", config) == "experts/02-en-us"
    with pytest.raises(ValueError, match="no expert 3; the configuration has 3"):
        part_of("encoder.blocks.2.experts.3.up_weight", config)
    assert file_key("encoder.blocks.12.experts.7.up_bias") == "encoder.blocks.12.experts.up_bias"
    assert file_key("encoder.blocks.12.ffn.up.bias") == "encoder.blocks.12.ffn.up.bias"
