"""Fine-tunes as the experts of one model: what it computes, and what of each of them is in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from generate.tiny import tiny_whisper_moe
from torch import Tensor
from weights.whispers import tokenizer_json

from whisper_moe.config import ModelConfig, MoEConfig, TTTConfig
from whisper_moe.evaluate.cost import active_parameters, parameters
from whisper_moe.merge.build import (
    fitted,
    low_rank,
    merged_delta,
    spectrum,
    without_expert,
)
from whisper_moe.merge.router import fit
from whisper_moe.model.router import NONE, Router, Routing
from whisper_moe.packing import Layout
from whisper_moe.weights.checkpoint import Loaded, load_checkpoint, read_manifest, save_checkpoint
from whisper_moe.weights.parts import empty_model
from whisper_moe.weights.tokens import EXPERT_SOURCES

DENSE = ModelConfig.model_validate(
    tiny_whisper_moe().config.model_dump() | {"moe": None, "ttt": None, "encoder_layers": 3, "decoder_layers": 2}
)
TOKENS = [torch.arange(5), torch.arange(3)]


def model(seed: int) -> Loaded:
    whole = tiny_whisper_moe(seed, DENSE)
    return Loaded(DENSE, whole.model.state_dict(), dict(whole.generation), b"")


def answers(merged: Loaded, routing: Routing | None = None) -> Tensor:
    """Logits of two clips with two texts."""
    network = empty_model(merged.config).eval()
    network.load_state_dict(merged.state, assign=True)
    torch.manual_seed(5)
    mels = [torch.randn(DENSE.n_mels, frames) for frames in (40, 70)]
    with torch.inference_mode():
        encoded = network.encoder(mels, routing=routing)
        states = network.decoder(torch.cat(TOKENS), Layout(map(len, TOKENS)), encoded).states_TD
        return network.decoder.head(states)


def test_slim_experts_beside_a_shared_one_get_a_router_that_knows_the_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps of the moments what its choice needs: a further expert is not fitted beside feed-forwards."""
    moe = MoEConfig(n_experts=2, expert_dim=4, router_layer=1, fitted_router=True)
    config = ModelConfig.model_validate(DENSE.model_dump() | {"moe": moe})
    slim = Loaded(config, tiny_whisper_moe(0, config).model.state_dict(), {}, tokenizer_json())
    margins: list[float | None] = []

    def heard(decoder: object, clips: Sequence[int], given: Sequence[float | None]) -> Tensor:
        margins[:] = given
        generator = torch.Generator().manual_seed(clips[0])
        place = 3 * torch.randn(16, generator=generator, dtype=torch.float64)
        return place + torch.randn(len(clips), 2, 16, generator=generator, dtype=torch.float64)

    monkeypatch.setattr("whisper_moe.merge.build.heard", heard)
    probes: Any = [[1] * 40, [2] * 40]
    whole = fit([heard(None, clips, ()) for clips in (*probes, [3] * 40)])
    found = fitted(slim, probes, [3] * 40, (0.5, 30.0))
    assert margins == [0.5, 30.0]
    network = empty_model(config)
    network.load_state_dict(found.state, assign=True)
    router, other = network.encoder.router, Router(16, MoEConfig(n_experts=2, fitted_router=True, granularity="delta"))
    assert router is not None
    assert router.fit is not None
    assert router.fit.moments.shape == (3, 1, 17)
    other.load_state_dict({("" if name == "weight" else "fit.") + name: tensor for name, tensor in whole.items()})
    features = torch.cat([heard(None, clips, ())[:, 0] for clips in (*probes, [3] * 40, [4] * 40)]).float()
    chosen = router(features)
    assert chosen.choices == other(features).choices
    assert {first for first, _ in chosen.choices[:40]} == {0}
    assert {first for first, _ in chosen.choices[40:80]} == {1}
    assert {first for first, _ in chosen.choices[80:]} == {NONE}


def test_what_an_expert_was_trained_on_is_in_the_manifest_as_long_as_the_expert_is(tmp_path: Path) -> None:
    base = replace(model(0), tokenizer_json=tokenizer_json())
    merged = merged_delta(base, ["a", "b"], [model(1), model(2)], 2)
    save_checkpoint(tmp_path / "silent", merged)
    assert not read_manifest(tmp_path / "silent").sources
    sources = {name: f"clips of {name} (MIT)" for name in "ab"}
    save_checkpoint(tmp_path / "both", replace(merged, generation=merged.generation | {EXPERT_SOURCES: sources}))
    assert read_manifest(tmp_path / "both").sources == sources
    save_checkpoint(tmp_path / "one", without_expert(load_checkpoint(tmp_path / "both"), "a"))
    assert read_manifest(tmp_path / "one").sources == {"b": "clips of b (MIT)"}


def tuned(seed: int, *layers: int, core: float = 0.1, **ttt: Any) -> Loaded:
    """A fine-tune of ``model(0)`` with TTT in these encoder layers; ``core`` is how far all but the tokens' table moved."""
    own = TTTConfig(encoder_layers=layers, **{"mini_batch": 15} | ttt) if layers or ttt else None
    whole = tiny_whisper_moe(seed, DENSE.model_copy(update={"ttt": own}))
    state, base = whole.model.state_dict(), model(0)
    for key, tensor in base.state.items():
        moves = key not in ("decoder.token_embedding.weight", "decoder.positions", "encoder.positions")
        state[key] = tensor + core * moves * state[key]
    return Loaded(whole.model.config, state, base.generation, tokenizer_json())


def differences(experts: Sequence[Loaded]) -> Loaded:
    """Of full rank."""
    base = replace(model(0), tokenizer_json=tokenizer_json())
    return merged_delta(base, [f"e{i}" for i in range(len(experts))], experts, 3 * DENSE.d_model)


def only(first: int, second: int) -> Routing:
    return Routing(torch.tensor([[first], [second]]), torch.ones(2, 1))


@pytest.mark.parametrize(("core", "error"), [(0.0, 1e-6), (0.1, 2e-4)], ids=["the base's core", "a core of its own"])
def test_experts_with_ttt_and_without_share_a_pack_and_each_is_its_fine_tune(core: float, error: float) -> None:
    experts = [tuned(1, 0, 2, core=core), tuned(2, core=core), tuned(3, 1, 2, core=core)]
    merged = differences(experts)
    assert merged.config.ttt == TTTConfig(encoder_layers=(0, 1, 2), mini_batch=15, per_expert=True)
    rows = Layout(map(len, TOKENS)).slices()
    for pair in ((0, 1), (1, 2), (2, 0), (NONE, 2), (0, NONE)):
        found = answers(merged, only(*pair))
        for expert, own in zip(pair, rows, strict=True):
            alone = answers(model(0) if expert == NONE else experts[expert])[own]
            assert (found[own] - alone).abs().max() < error * alone.abs().max(), pair


def test_who_brings_no_ttt_and_none_answer_as_without_those_that_do() -> None:
    plain, learner = tuned(1), tuned(2, 1)
    alone, beside = differences([plain]), differences([plain, learner])
    for pair in ((0, 0), (NONE, NONE), (0, NONE)):
        torch.testing.assert_close(answers(beside, only(*pair)), answers(alone, only(*pair)), rtol=0, atol=1e-5)
    assert not torch.equal(answers(beside, only(0, 1)), answers(beside, only(0, NONE)))


@pytest.mark.parametrize("quantize", [False, True])
def test_ttt_layers_lie_whole_in_their_experts_files(quantize: bool, tmp_path: Path) -> None:
    learner = tuned(2, 1)
    merged = differences([tuned(1), learner])
    save_checkpoint(tmp_path / "merged", merged, quantize=quantize)
    read = load_checkpoint(tmp_path / "merged")
    kept = {key for key in merged.state if ".ttt" in key}
    assert all(torch.equal(read.state[key], merged.state[key]) for key in (kept if quantize else merged.state))
    assert read.config == merged.config
    for key in learner.state.keys() - model(0).state.keys():
        if ".ttt." in key:
            assert torch.equal(read.state[key.replace(".ttt.", ".ttt.1.")], learner.state[key])
    counts, dense = parameters(merged.config), parameters(differences([tuned(1), tuned(2)]).config)
    brought = sum(tensor.numel() for key, tensor in learner.state.items() if ".ttt" in key)
    assert {part: counts[part] - dense.get(part, 0) for part in counts} == {
        "core": 0,
        "router": 0,
        "adapt": 2 * DENSE.d_model,
        "experts/00-e0": brought,
        "experts/01-e1": brought,
    }
    assert active_parameters(merged.config) == sum(counts.values()) - counts["experts/00-e0"]


def test_an_expert_that_goes_takes_its_ttt_along_and_no_others() -> None:
    left, expected = without_expert(differences([tuned(1, 2), tuned(2, 1)]), "e0"), differences([tuned(2, 1)])
    assert left.config.ttt == expected.config.ttt
    assert left.state.keys() == expected.state.keys()
    assert all(torch.equal(left.state[key], tensor) for key, tensor in expected.state.items() if ".router." not in key)


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        (
            tuned(2, 1, mini_batch=30),
            "e1: cannot be merged: its TTT layers have mini_batch 30 .* those of e0 mini_batch 15",
        ),
        (tuned(2, 1, base_lr=0.5), "e1: .* mini_batch 15 and base_lr 0.5, those of e0 mini_batch 15 and base_lr 0.1"),
        (tuned(2, decoder_layers=(1,)), r"e1: cannot be merged: it has TTT layers in its decoder \[1\]"),
    ],
)
def test_ttt_that_one_model_cannot_have_is_refused(second: Loaded, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        differences([tuned(1, 2), second])


# A difference in few numbers: nothing nearer has that rank.


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
