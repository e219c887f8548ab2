"""Experts that are differences: each segment of a mixed pack gets its own expert's answer, whatever it shares the pack with."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from tests.model.tiny import CONFIGS, random_mels, random_texts, relative, tiny_model
from whisper_moe.config import ModelConfig, MoEConfig, TTTConfig
from whisper_moe.merge.build import low_rank, with_ttt
from whisper_moe.model.delta import EMBEDDING_RANK
from whisper_moe.model.layers import CHUNK
from whisper_moe.model.model import WhisperMoEModel
from whisper_moe.model.router import NONE, Routing
from whisper_moe.packing import Layout
from whisper_moe.weights.checkpoint import Loaded

FRAMES, TEXTS = (601, 400, 81, 500, 222), (9, 20, 4, 150, 7)
EXPERTS = 3


def moved(base: WhisperMoEModel, seed: int, layers: tuple[int, ...] = ()) -> WhisperMoEModel:
    """A fine-tune: every matrix, norm and bias is another, the tokens' table in a few directions, that of positions not.

    ``layers``: those of the encoder with TTT.
    """
    torch.manual_seed(seed)
    ttt = TTTConfig(encoder_layers=layers, mini_batch=25) if layers else None
    model = WhisperMoEModel(base.config.model_copy(update={"ttt": ttt})).double().eval()
    model.load_state_dict(base.state_dict(), strict=False)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "token_embedding" in key:
                rows, columns = parameter.shape
                parameter += torch.randn(rows, EMBEDDING_RANK) @ torch.randn(EMBEDDING_RANK, columns) * 0.02
            elif key != "decoder.positions":
                parameter += torch.randn_like(parameter) * (0.5 if ".gate_" in key else 0.05)
    return model


def with_experts(base: WhisperMoEModel, experts: list[WhisperMoEModel], top_k: int = 1) -> WhisperMoEModel:
    """Differences of full rank, not rounded."""
    rank = base.config.d_model
    moe = MoEConfig(granularity="delta", delta_rank=rank, n_experts=len(experts), top_k=top_k, router_layer=1)
    merged = Loaded(ModelConfig.model_validate(base.config.model_dump() | {"moe": moe}), {}, {}, b"")
    for number, expert in enumerate(experts):
        merged = with_ttt(merged, number, Loaded(expert.config, expert.state_dict(), {}, b""))
    model = WhisperMoEModel(merged.config).double().eval()
    state, own = model.state_dict(), base.state_dict()
    stacks = [key for key in state if ".experts." in key and key not in merged.state]
    state |= own | merged.state
    for number, expert in enumerate(experts):
        change = {key: tensor - own[key] for key, tensor in expert.state_dict().items() if key in own}
        for key in stacks:
            layer, name = key.split(".experts.")
            if name == "down":
                down, up = low_rank(change[f"{layer}.weight"].flatten(1), state[key].shape[1])
                state[key][number], state[f"{layer}.experts.up"][number, :-1] = down, up
            elif name != "up" or f"{layer}.bias" in change:
                row = state[key][number]
                (row[-1] if name == "up" else row)[:] = change[f"{layer}.{name if name != 'up' else 'bias'}"]
    model.load_state_dict(state)
    return model


def answers(model: WhisperMoEModel, mels: list[Tensor], texts: list[Tensor], routing: Routing | None) -> list[Tensor]:
    layout = Layout(map(len, texts))
    with torch.no_grad():
        states = model.decoder(torch.cat(texts), layout, model.encoder(mels, routing=routing)).states_TD
        logits = model.decoder.logits(states, routing, layout)
        return [logits[rows] for rows in layout.slices()]


@pytest.fixture(scope="module")
def family() -> tuple[WhisperMoEModel, list[WhisperMoEModel]]:
    base = tiny_model("dense")
    return base, [moved(base, seed) for seed in range(EXPERTS)]


@pytest.mark.parametrize("layers", [((), (), ()), ((0, 2), (), (1, 2))], ids=["dense", "with TTT"])
def test_each_segment_of_a_mixed_pack_is_answered_by_its_own_fine_tune(family, layers) -> None:
    base, _ = family
    experts = [moved(base, seed, own) for seed, own in enumerate(layers)]
    mels, texts = random_mels(FRAMES, torch.float64), random_texts(TEXTS)
    assert sum(frames / 2 for frames in FRAMES) > CHUNK, "chunks of tokens cut through segments"
    choice = [0, NONE, 2, 1, 2]
    mixed = answers(
        with_experts(base, experts), mels, texts, Routing(torch.tensor(choice)[:, None], torch.ones(5, 1).double())
    )
    for expert, mel, text, ours in zip(choice, mels, texts, mixed, strict=True):
        alone = answers(base if expert == NONE else experts[expert], [mel], [text], None)[0]
        assert relative(ours, alone) < (1e-14 if expert == NONE else 1e-6)  # the factors are float32
        assert expert == NONE or relative(ours, answers(base, [mel], [text], None)[0]) > 1e-2


def test_two_experts_are_the_model_of_averaged_differences(family) -> None:
    base, experts = family
    mels, texts = random_mels(FRAMES[:3], torch.float64), random_texts(TEXTS[:3])
    routing = Routing(
        torch.tensor([[0, 1], [2, NONE], [1, 2]]), torch.tensor([[0.7, 0.3], [0.6, 0.4], [0.5, 0.5]]).double()
    )
    mixed = answers(with_experts(base, experts, top_k=2), mels, texts, routing)
    own = base.state_dict()
    for row, (mel, text, ours) in enumerate(zip(mels, texts, mixed, strict=True)):
        average = copy.deepcopy(base)
        state = {key: tensor.clone() for key, tensor in own.items()}
        for expert, gate in zip(routing.experts[row].tolist(), routing.gates[row].tolist(), strict=True):
            for key, tensor in experts[expert].state_dict().items() if expert != NONE else ():
                state[key] += gate * (tensor - own[key])
        average.load_state_dict(state)
        assert relative(ours, answers(average, [mel], [text], None)[0]) < 1e-6


def test_new_differences_change_nothing_and_have_a_gradient() -> None:
    base = tiny_model("dense")
    moe = MoEConfig(granularity="delta", delta_rank=4, n_experts=2, top_k=1, router_layer=1)
    torch.manual_seed(0)
    model = WhisperMoEModel(ModelConfig.model_validate(CONFIGS["dense"].model_dump() | {"moe": moe})).double().eval()
    model.load_state_dict(base.state_dict(), strict=False)
    mels, texts = random_mels((81, 40), torch.float64), random_texts((9, 20))
    routing = Routing(torch.tensor([[0], [1]]), torch.ones(2, 1).double())
    for ours, alone in zip(answers(model, mels, texts, routing), answers(base, mels, texts, None), strict=True):
        torch.testing.assert_close(ours, alone, rtol=0, atol=1e-12)
    layout = Layout(map(len, texts))
    states = model.decoder(torch.cat(texts), layout, model.encoder(mels, routing=routing)).states_TD
    model.decoder.logits(states, routing, layout).square().sum().backward()
    lifeless = [
        k
        for k, p in model.named_parameters()
        if k.endswith("experts.up") and p.grad is not None and p.grad[:, :-1].abs().amax((1, 2)).min() == 0
    ]
    assert not lifeless
