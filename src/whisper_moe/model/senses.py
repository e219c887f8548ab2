"""Senses beside hearing: what a text and a film become before the shared encoder, and the expert that each sense has.

A sense's segments lie in the same packs. They go through the core as it is, without what adapts it to sound and without the
experts of sound, and every matrix of it adds the low-rank difference of the sense's own expert (:mod:`whisper_moe.model.delta`).
What is heard is computed as if there were no other sense, to the last bit.

n tokens of a segment, T of all, D width, V tokens of the core. A film has t, h and w tubelets of P values each.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whisper_moe.config import ModelConfig
from whisper_moe.config_aside import FilmConfig, SensesConfig
from whisper_moe.model.delta import DeltaLinear, LowRank, PreparedDelta

if TYPE_CHECKING:
    from whisper_moe.model.model import Decoder, WhisperMoEModel


class Embedded(NamedTuple):
    """A segment that needs no stem: it is embedded already, its positions in it."""

    x_ND: Tensor
    expert: int
    """Of the senses'."""


def is_sensed(part: Tensor) -> bool:
    """Whether it is no mel: a text [n], a film [t, h, w, P]."""
    return part.ndim != 2


def matrices(config: ModelConfig) -> Iterator[tuple[str, int, int]]:
    """Path, inputs and outputs of every matrix of the core's blocks."""
    d = config.d_model
    for side, layers, hidden in (
        ("encoder", config.encoder_layers, config.encoder_ffn_dim),
        ("decoder", config.decoder_layers, config.decoder_ffn_dim),
    ):
        shapes = [("attn.qkv", d, 3 * d), ("attn.out", d, d), ("ffn.up", d, hidden), ("ffn.down", hidden, d)]
        if side == "decoder":
            shapes += [("cross_attn.q", d, d), ("cross_attn.kv", d, 2 * d), ("cross_attn.out", d, d)]
        for layer in range(layers):
            yield from ((f"{side}.blocks.{layer}.{name}", inputs, outputs) for name, inputs, outputs in shapes)


_FLAT = 0.1
"""Contrast of a tubelet, of colours from -1 to 1, that is little more than noise."""


class FilmStem(nn.Module):
    """Tubelets (ViViT, arXiv 2103.15691, section 3.2) → rows; positions of time, row and column are learned apart and added
    (NaViT, arXiv 2307.06304, section 2.1), so that pictures of all proportions have them.

    Each tubelet is taken less its mean colour, by its contrast (MAE, arXiv 2111.06377, section 4.1): of plain pixels nearly all
    is the same in all films, and a frozen encoder was seen to learn nothing from the rest.
    """

    def __init__(self, film: FilmConfig, d_model: int) -> None:
        super().__init__()
        self.patches = nn.Linear(3 * film.frames * film.patch**2, d_model)
        self.times, self.rows, self.columns = (
            nn.Parameter(torch.randn(places, d_model) * 0.02) for places in (film.slots, film.patches, film.patches)
        )
        self.norm = nn.LayerNorm(d_model)

    def forward(self, film_thwP: Tensor) -> Tensor:
        """uint8 [t, h, w, P] to [t·h·w, D]. Raises ``ValueError`` for more of them than there are positions for."""
        for size, table in zip(film_thwP.shape, (self.times, self.rows, self.columns), strict=False):
            if size > len(table):
                raise ValueError(
                    f"a film of {list(film_thwP.shape[:3])} tubelets; there are positions for {len(table)}"
                )
        t, h, w = film_thwP.shape[:3]
        colours = (film_thwP.to(self.patches.weight.dtype) / 127.5 - 1).unflatten(-1, (-1, 3))
        colours = colours - colours.mean(-2, keepdim=True)
        contrast = colours.square().mean((-2, -1), keepdim=True).sqrt()
        x_thwD = self.patches((colours / (contrast + _FLAT)).flatten(-2))
        x_thwD = x_thwD + self.times[:t, None, None] + self.rows[:h, None] + self.columns[:w]
        return self.norm(x_thwD).flatten(0, 2)


class Senses(nn.Module):
    """What all senses but hearing need beside the core."""

    def __init__(self, senses: SensesConfig, config: ModelConfig) -> None:
        super().__init__()
        self.config = senses
        self.tokens = nn.Embedding(len(senses.tokens), config.d_model)
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.text_norm = nn.LayerNorm(config.d_model) if "translate" in senses.experts else None
        self.film = FilmStem(senses.film, config.d_model) if senses.film else None
        self.experts = nn.ModuleDict(
            {
                path.replace(".", "-"): LowRank(
                    len(senses.experts), senses.rank, inputs, outputs, source=path.endswith("cross_attn.kv")
                )
                for path, inputs, outputs in matrices(config)
            }
        )

    def attach(self, model: WhisperMoEModel) -> None:
        """Let every matrix of ``model``, in training or laid out for inference, add the differences."""
        for name, part in self.experts.items():
            path = name.replace("-", ".")
            layer: Any = model.get_submodule(path)
            if type(layer) is nn.Linear:  # stays the same layer, whose parameters keep their names
                layer.__class__ = DeltaLinear
                layer.__dict__["experts"] = part
            else:
                parent, _, own = path.rpartition(".")
                assert isinstance(part, LowRank)
                setattr(model.get_submodule(parent), own, PreparedDelta(layer, part))
        model.encoder.sense_experts = model.decoder.sense_experts = len(self.config.experts)
        model.encoder.routes_senses = self.config.routed

    def rows(self, ids_T: Tensor, decoder: Decoder) -> Tensor:
        """Embeddings of tokens, those beyond the core's too, [T, D]."""
        own = decoder.vocabulary
        core_TD = decoder.embedded(ids_T.clamp_max(own - 1))
        return torch.where((ids_T < own)[:, None], core_TD, self.tokens((ids_T - own).clamp_min(0)))

    def embedded(self, part: Tensor | Embedded, model: WhisperMoEModel) -> Tensor | Embedded:
        """A segment for the encoder: a text [n] and a film [t, h, w, P] are embedded, a mel is left to the stem."""
        if isinstance(part, Embedded) or not is_sensed(part):
            return part
        if part.ndim == 1 and self.text_norm is not None:
            x_ND = self.text_norm(self.rows(part, model.decoder))
            return Embedded(model.encoder.placed(x_ND), self.config.experts.index("translate"))
        if part.ndim == 4 and self.film is not None:
            return Embedded(self.film(part), self.config.experts.index("sign"))
        raise ValueError(f"the model has no part for {'texts' if part.ndim == 1 else 'films'}")

    def logits(self, core_TV: Tensor, states_TD: Tensor) -> Tensor:
        """The core's, and behind them those of the further tokens, tied to their rows."""
        return torch.cat([core_TV, F.linear(states_TD, self.tokens.weight).to(core_TV.dtype)], -1)
