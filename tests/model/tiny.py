"""Tiny models with random weights in every way a model can be built, and ragged input for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from whisper_moe.config import AdaptConfig, ConformerConfig, ModelConfig, MoEConfig, TTTConfig
from whisper_moe.model.block import Encoded
from whisper_moe.model.model import WhisperMoEModel
from whisper_moe.model.router import NONE, Routing
from whisper_moe.packing import Layout

MINI_BATCH = 25
_EVERYWHERE = TTTConfig(encoder_layers=(0, 2), decoder_layers=(0,), mini_batch=MINI_BATCH)
_SHAPE = ModelConfig(
    vocab_size=61,
    n_mels=8,
    d_model=32,
    encoder_layers=3,
    encoder_heads=4,
    encoder_ffn_dim=48,
    decoder_layers=2,
    decoder_heads=2,
    decoder_ffn_dim=40,
)
CONFIGS = {
    "dense": _SHAPE,
    "segment": _SHAPE.model_copy(
        update={"moe": MoEConfig(n_experts=4, expert_dim=24, router_layer=1), "ttt": _EVERYWHERE}
    ),
    "token": _SHAPE.model_copy(
        update={"moe": MoEConfig(n_experts=4, expert_dim=24, scope="token"), "ttt": _EVERYWHERE}
    ),
    "per expert": _SHAPE.model_copy(
        update={
            "moe": MoEConfig(n_experts=4, expert_dim=24, shared=False, none_choice=False, router_layer=0),
            "ttt": TTTConfig(encoder_layers=(1,), mini_batch=MINI_BATCH, per_expert=True),
        }
    ),
    "delta": _SHAPE.model_copy(
        update={
            "moe": MoEConfig(granularity="delta", delta_rank=5, n_experts=4, router_layer=2),
            "ttt": TTTConfig(encoder_layers=(1,), mini_batch=MINI_BATCH, per_expert=True),
        }
    ),
    "conformer": _SHAPE.model_copy(
        update={
            "adapt": AdaptConfig(encoder_layers=(0,), decoder_layers=(1,), adapter_dim=8),
            "conformer": ConformerConfig(encoder_layers=(0, 1), kernel_size=7),
        }
    ),
}
"""Without experts; experts chosen per segment or per token beside a shared one; experts alone, each with its own TTT; experts
that are differences; without experts, adapted and with convolutions."""


def tiny_model(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> WhisperMoEModel:
    """In evaluation mode and as if trained: every parameter is random, experts contribute, TTT gates are open."""
    torch.manual_seed(seed)
    model = WhisperMoEModel(CONFIGS[name]).to(dtype).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("norm.weight"):
                parameter.normal_(1, 0.2)
            elif ".gate_" in key or ".router." in key:
                parameter.normal_(0, 0.5)
            elif parameter.ndim == 1 or ".experts." in key or ".ttt." in key or ".adapter." in key:
                parameter.normal_(0, 0.2)
    return model


def random_mels(frames: Sequence[int], dtype: torch.dtype = torch.float64, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(_SHAPE.n_mels, n, generator=generator, dtype=torch.float64).to(dtype) for n in frames]


def random_texts(lengths: Sequence[int], seed: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(_SHAPE.vocab_size, (n,), generator=generator) for n in lengths]


def fixed_routing(model: WhisperMoEModel, segments: int) -> Routing | None:
    """A choice for each segment with gates that take a gradient; *none* and every expert are among them."""
    moe = model.config.moe
    if moe is None or moe.scope == "token":
        return None
    table = [[0, 1], [3, 2], [1, NONE], [NONE, NONE], [2, 3]] if moe.none_choice else [[0, 1], [3, 2], [1, 3], [2, 0]]
    experts = torch.tensor([table[i % len(table)] for i in range(segments)])
    gates = torch.linspace(0.3, 0.9, segments, dtype=model.decoder.positions.dtype)
    return Routing(experts, torch.stack([gates, 1 - gates], dim=1).requires_grad_())


class HeldChoice(nn.Module):
    """In place of a router per token: its choice is held fixed, its gates follow from its logits as ever.

    Two logits that nearly tie may change places with the last bit of a sum; no property of packing is about that.
    """

    def __init__(self, weight: nn.Parameter, top_k: int, lengths: Sequence[int], seed: int) -> None:
        super().__init__()
        self.weight = weight
        generator = torch.Generator().manual_seed(seed)
        scores = (torch.rand(n, len(weight), generator=generator) for n in lengths)
        self.choices = [score.topk(top_k, dim=1).indices for score in scores]
        self.segments: Sequence[int] = range(len(lengths))

    def forward(self, x_TD: Tensor) -> Routing:
        column = torch.cat([self.choices[i] for i in self.segments])
        logits = x_TD @ self.weight.T
        return Routing(column.masked_fill(column == len(self.weight) - 1, NONE), logits.gather(1, column).softmax(1))


def hold_choices(model: WhisperMoEModel, positions: Sequence[int], tokens: Sequence[int]) -> list[HeldChoice]:
    """Replace every token's router, if there are any; returns the replacements, to be told which segments come."""
    held = []
    for lengths, blocks in ((positions, model.encoder.blocks), (tokens, model.decoder.blocks)):
        for block in blocks:
            if block.router is not None:
                assert model.config.moe is not None and model.config.moe.none_choice
                block.router = HeldChoice(block.router.weight, block.router.top_k, lengths, seed=len(held))
                held.append(block.router)
    return held


def segment_alone(encoded: Encoded, segment: int) -> Encoded:
    """What the encoder says about one segment, without the others."""
    routing = encoded.routing.rows(torch.tensor([segment])) if encoded.routing else None
    own = encoded.states_TD[encoded.layout.slices()[segment]]
    return Encoded(own, Layout([len(own)]), routing)


def relative(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest value of ``b``."""
    return ((a - b).abs().max() / b.abs().max()).item()
