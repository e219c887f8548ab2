"""Mel frames one group after the other: the other decoder (Transformer TTS, arXiv 1809.08895; Tacotron 2, 1712.05884).

Each step reads the last frames so far through a narrow pre-net, attends to the steps before and to the phonemes, and says the
next frames and whether they are the last; a post-net looks at all frames from both sides. Where it attends is guided along the
diagonal in training (arXiv 1710.08969, section 4.1). It finds durations by itself: those of the prosody only
say in training where an utterance ends, and a rate cannot be asked for.

S utterances, P positions of all of them, N steps, D width, F = 2 · n_mels numbers of a position.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whisper_moe.config import SpeechConfig
from whisper_moe.embed import sinusoids
from whisper_moe.model.block import Block, listed
from whisper_moe.model.speech import Frames, Prosody, Stack, positioned, positions_of, stack_of
from whisper_moe.packing import Layout

STEPS_A_PHONEME = 12
"""What an utterance may take before it is ended."""
_GUIDED, _DIAGONAL = [0, 1], 0.2
"""Heads of the last block, and the width of the diagonal, as a share of the whole."""


class Autoregressive(nn.Module):
    """The same interface as the parallel decoder's."""

    def __init__(self, config: SpeechConfig, n_mels: int) -> None:
        super().__init__()
        d, self.width, self.reduction = config.d_model, 2 * n_mels, config.reduction
        self.pre_in, self.pre_out = nn.Linear(self.width, d), nn.Linear(d, d)
        self.blocks = listed(Block(stack_of(config), "decoder", i) for i in range(config.decoder_layers))
        self.norm = nn.LayerNorm(d)
        self.out, self.stop = nn.Linear(d, self.reduction * self.width), nn.Linear(d, 1)
        self.post_in, self.post, self.post_out = nn.Linear(self.width, d), Stack(config, 1), nn.Linear(d, self.width)

    def forward(self, states_TD: Tensor, layout: Layout, prosody: Prosody, frames_PF: Tensor | None = None) -> Frames:
        if frames_PF is None:
            return self._alone(states_TD, layout)
        spoken = positions_of(prosody.seconds_T, layout)[1]
        groups = [
            F.pad(frames_PF[rows], (0, 0, 0, -n % self.reduction))
            for rows, n in zip(spoken.slices(), spoken.lengths, strict=True)
        ]
        steps = Layout(len(group) // self.reduction for group in groups)
        last = [F.pad(group[self.reduction - 1 :: self.reduction][:-1], (0, 0, 1, 0)) for group in groups]
        x_ND = positioned(self._pre(torch.cat(last)).float(), steps)
        guided = x_ND.new_zeros(())
        for block in self.blocks:
            assert block.cross_attn is not None
            cache = block.cross_attn.cache(states_TD, layout)
            if block is self.blocks[-1]:
                guided = _off_diagonal(block.cross_logits(x_ND, steps, cache, _GUIDED))
            x_ND = block(x_ND, steps, None, cache).x_TD
        x_ND = self.norm(x_ND)
        coarse = self._unpadded(self.out(x_ND), steps, spoken)
        over = torch.zeros(steps.total, device=x_ND.device)
        over[torch.tensor(steps.cu_seqlens[1:], device=x_ND.device) - 1] = 1.0
        stops = F.binary_cross_entropy_with_logits(
            self.stop(x_ND)[:, 0].float(), over, reduction="sum", pos_weight=over.new_tensor(5.0)
        )
        losses = {
            "coarse": (coarse.float() - frames_PF).abs().mean(1).sum(),
            "stop": self.reduction * stops,
            "guide": self.reduction * guided,
        }
        return Frames(self._polished(coarse, spoken), spoken, losses)

    def _pre(self, x: Tensor) -> Tensor:
        x = F.dropout(F.relu(self.pre_in(x)), training=self.training)
        return F.dropout(F.relu(self.pre_out(x)), training=self.training)

    def _polished(self, coarse_PF: Tensor, layout: Layout) -> Tensor:
        return coarse_PF + self.post_out(self.post(self.post_in(coarse_PF), layout))

    def _unpadded(self, groups_NG: Tensor, steps: Layout, spoken: Layout) -> Tensor:
        parts = zip(groups_NG.split(steps.lengths), spoken.lengths, strict=True)
        return torch.cat([part.reshape(-1, self.width)[:n] for part, n in parts])

    def _alone(self, states_TD: Tensor, layout: Layout) -> Frames:
        """Step by step, all utterances side by side, until each has said that it is over or has taken too long."""
        rows, limit = len(layout), STEPS_A_PHONEME * max(layout.lengths)
        states = [block.start(rows, 64, (states_TD, layout)) for block in self.blocks]
        each, places = Layout([1] * rows), sinusoids(limit, states_TD.shape[1]).to(states_TD)
        last, made = states_TD.new_zeros(rows, self.width), list[Tensor]()
        ends = torch.tensor([STEPS_A_PHONEME * n for n in layout.lengths], device=states_TD.device)
        while len(made) < int(ends.max()):
            x_SD = self._pre(last) + places[len(made)]
            for block, state in zip(self.blocks, states, strict=True):
                x_SD = block.extend(x_SD, each, None, state, each)
            x_SD = self.norm(x_SD)
            made.append(self.out(x_SD).view(rows, self.reduction, self.width))
            last = made[-1][:, -1]
            ends = torch.where(self.stop(x_SD)[:, 0] > 0, ends.clamp_max(len(made)), ends)
        spoken = Layout((ends * self.reduction).tolist())
        whole = torch.cat(made, 1)
        coarse = torch.cat([part[:n] for part, n in zip(whole, spoken.lengths, strict=True)])
        return Frames(self._polished(coarse, spoken), spoken, {})


def _off_diagonal(logits: list[Tensor]) -> Tensor:
    """[heads, steps, phonemes] of each utterance → the sum over steps of the attention that is off the diagonal."""
    found = []
    for each in logits:
        steps, phonemes = (torch.linspace(0, 1, n, device=each.device) for n in each.shape[1:])
        apart = 1 - torch.exp(-(steps[:, None] - phonemes).square() / (2 * _DIAGONAL**2))
        found.append((each.float().softmax(-1) * apart).sum(-1).mean(0).sum())
    return torch.stack(found).sum()
