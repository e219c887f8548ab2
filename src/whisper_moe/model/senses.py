"""Senses beside hearing: what a text and a film become before the shared encoder, and the expert that each sense has.

A sense's segments lie in the same packs. They go through the core as it is, without what adapts it to sound and without the
experts of sound, and every matrix of it adds the low-rank difference of the sense's own expert (:mod:`whisper_moe.model.delta`).
What is heard is computed as if there were no other sense, to the last bit.

n tokens of a segment, T of all, D width, V tokens of the core. A film has t, h and w tubelets of P values each.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whisper_moe.config import ModelConfig
from whisper_moe.config_aside import FilmConfig, SensesConfig
from whisper_moe.model.delta import LowRank, with_difference

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


_BINS, _CELLS, _FINEST, _FLAT = 8, 4, 4, 0.1
"""Directions of an edge, cells to a patch's side, the most pixels to a cell's, and an edge that is little more than noise."""
_EDGES, _COLOURS, _MOVES = 3.0, 2.0, 20.0
"""What makes edges, colours, and what moves about as large as 1."""
_CHANNELS, _GROUPS = (64, 128, 256), 8
"""Of the convolutions, and in how many groups each picture's are normalized (arXiv 1803.08494)."""


def edges(pictures_NppC: Tensor) -> Tensor:
    """Colours from 0 to 1, [N, p, p, 3], to histograms of the directions of edges in 4 × 4 cells (HOG, Dalal and Triggs 2005,
    sections 6.1 to 6.4), [N, 4, 4, 8]: light, contrast and small shifts change little of them. They are looked for in grey and
    where a cell has at most four pixels to a side, for what is finer is noise."""
    side = min(pictures_NppC.shape[1], _CELLS * _FINEST)
    grey_Npp = F.adaptive_avg_pool2d(pictures_NppC.mean(-1), side)
    across, down = F.pad(grey_Npp.diff(dim=2), (0, 1)), F.pad(grey_Npp.diff(dim=1), (0, 0, 0, 1))
    place = torch.atan2(down, across) / torch.pi % 1 * _BINS
    low, share, length = place.floor(), place - place.floor(), (across.square() + down.square()).sqrt()
    histogram = length.new_zeros(*length.shape, _BINS)
    for bin, part in ((low, 1 - share), (low + 1, share)):
        histogram.scatter_add_(-1, bin.long()[..., None] % _BINS, (length * part)[..., None])
    cells = histogram.unflatten(1, (_CELLS, -1)).unflatten(3, (_CELLS, -1)).mean((2, 4))
    return cells / (cells.square().sum((1, 2, 3), keepdim=True).sqrt() + _FLAT)


class FilmStem(nn.Module):
    """Tubelets (ViViT, arXiv 2103.15691, section 3.2) → rows; positions of time, row and column are learned apart and added
    (NaViT, arXiv 2307.06304, section 2.1), so that pictures of all proportions have them.

    A picture's edges and the mean colours of its cells, and what of them is not so in all of the film, go through convolutions
    before the linear layer ("early convolutions", arXiv 2106.14881, section 4), as sound does in Whisper; they halve the picture
    twice, so that a patch of cells becomes a place. What moves is a hundredth of what is seen: of pixels, what all films have in
    common is nearly all that is left behind a norm, and nothing is learned (``docs/lab.md``). To every row is added what all of
    them say together (a global context, arXiv 1904.11492, section 4): a decoder that knows nothing of films looks anywhere.
    """

    def __init__(self, film: FilmConfig, d_model: int) -> None:
        super().__init__()
        self.film = film
        self.early = nn.Sequential()
        for (inputs, outputs), stride in zip(pairwise((2 * (_BINS + 3), *_CHANNELS)), (1, 2, 2), strict=True):
            self.early.extend(
                [nn.Conv2d(inputs, outputs, 3, stride, padding=1), nn.GroupNorm(_GROUPS, outputs), nn.GELU()]
            )
        self.patches = nn.Linear(film.frames * _CHANNELS[-1], d_model)
        self.times, self.rows, self.columns = (
            nn.Parameter(torch.randn(places, d_model) * 0.02) for places in (film.slots, film.patches, film.patches)
        )
        self.read, self.whole = nn.Linear(d_model, 2 * d_model), nn.Linear(4 * d_model, d_model)
        self.norm = nn.LayerNorm(d_model)

    def forward(self, film_thwP: Tensor) -> Tensor:
        """uint8 [t, h, w, P] to [t·h·w, D]. Raises ``ValueError`` for more of them than there are positions for."""
        for size, table in zip(film_thwP.shape, (self.times, self.rows, self.columns), strict=False):
            if size > len(table):
                raise ValueError(
                    f"a film of {list(film_thwP.shape[:3])} tubelets; there are positions for {len(table)}"
                )
        t, h, w = film_thwP.shape[:3]
        side = self.film.patch
        pictures = film_thwP.reshape(-1, side, side, 3).float() / 255
        cells = pictures.unflatten(1, (_CELLS, -1)).unflatten(3, (_CELLS, -1)).mean((2, 4))
        seen = torch.cat([_EDGES * edges(pictures), _COLOURS * (cells - 0.5)], -1).unflatten(0, (t, h, w, -1))
        maps = seen.permute(0, 3, 6, 1, 4, 2, 5).reshape(-1, _BINS + 3, h * _CELLS, w * _CELLS)
        maps = torch.cat([maps, _MOVES * (maps - maps.mean(0))], 1)
        places = self.early(maps.to(self.patches.weight.dtype)).unflatten(0, (t, -1))
        x_thwD = self.patches(places.permute(0, 3, 4, 1, 2).flatten(3))
        x_ND = (x_thwD + self.times[:t, None, None] + self.rows[:h, None] + self.columns[:w]).flatten(0, 2)
        read = F.gelu(self.read(x_ND))
        return self.norm(x_ND + self.whole(torch.cat([read.amax(0), read.mean(0)])))


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
            layer = model.get_submodule(name.replace("-", "."))
            vars(layer)["experts"] = part  # which is not registered a second time: parameters keep their names
            layer.register_forward_hook(with_difference)
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
