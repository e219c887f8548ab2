"""Text to mel frames: letters → phonemes → how long, how high and how loud each sounds → all frames at once; and frames to sound.

*Reader*: letters to phonemes, a label or several for each letter, by CTC (Graves et al. 2006). *Encoder*: what the phonemes are
among their neighbours, in a voice. *Prosody*: duration, pitch and loudness of each phoneme (FastSpeech 2, arXiv 2006.04558;
FastPitch, 2006.06873). *Decoder*: one query for each position of 20 ms, which knows its phoneme and its place in it, attends
to all other positions, and to the phonemes around the place where it is expected to be. Nothing is computed one after the
other, and nothing can run away. *Vocoder*: a frame becomes the short-time spectrum around it, magnitudes and phases, and the
inverse transform the sound (Vocos, arXiv 2306.00814).

S utterances, T letters or phonemes of all of them, P positions of all of them, D width. A position is two mel frames,
F = 2 · n_mels numbers. Of the vocoder B sounds, F frames.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whisper_moe.config import HOP, POSITIONS_PER_SECOND, ConformerConfig, ModelConfig
from whisper_moe.config_aside import SpeechConfig
from whisper_moe.model.block import Block, listed
from whisper_moe.model.layers import sinusoids
from whisper_moe.packing import Layout

LABELS_PER_LETTER = 4
"""Slots that CTC may fill for each letter: x is three phonemes and a stress."""
PITCH = 5.0
"""About the middle of log Hz: networks are given the difference."""
_LOG_SECONDS = -2.9
"""About the mean of a phoneme's."""
_REACH = 3.0
"""Phonemes: the width of where a position is expected to look."""
_LONGEST = 2.0
"""Seconds of one phoneme: a pause."""
WINDOW = 4 * HOP
"""Samples of the vocoder's own windows: 640, three quarters overlap."""
_LOUDEST = 5.0
"""Of a log-magnitude: keeps exp from overflowing where training has just begun."""


Letters: TypeAlias = tuple[Tensor, Layout, Tensor]
"""[T] letters, where the texts lie, [S] their languages."""


class Prosody(NamedTuple):
    """Of each phoneme."""

    seconds_T: Tensor
    """Where the model finds it itself: its logarithm."""
    pitch_T: Tensor
    """Mean log Hz − :data:`PITCH`; where nothing is voiced, between its neighbours'."""
    loudness_T: Tensor


class Frames(NamedTuple):
    """What the decoder makes."""

    frames_PF: Tensor
    """[P, 2 · n_mels]"""
    layout: Layout
    """Where the utterances lie in them."""


class Spoken(NamedTuple):
    """What training reads of one pass."""

    frames: Frames
    own: Prosody
    """As the model would have it."""
    letters: Tensor | None
    """What the reader says of other texts."""


def stack_of(config: SpeechConfig) -> ModelConfig:
    """The shape of the blocks, in the words of Whisper's."""
    convolutions = ConformerConfig(
        encoder_layers=tuple(range(max(config.encoder_layers, config.decoder_layers, config.reader_layers))),
        kernel_size=config.kernel_size,
    )
    return ModelConfig.model_construct(
        d_model=config.d_model,
        encoder_heads=config.heads,
        decoder_heads=config.heads,
        encoder_ffn_dim=config.ffn_dim,
        decoder_ffn_dim=config.ffn_dim,
        conformer=convolutions,
    )


class Stack(nn.Module):
    """Blocks and a last norm."""

    def __init__(self, config: SpeechConfig, layers: int, *, decoder: bool = False) -> None:
        super().__init__()
        side = "decoder" if decoder else "encoder"
        blocks = [Block(stack_of(config), side, layer, parallel=decoder) for layer in range(layers)]
        for block in blocks:
            assert block.conv is not None
            nn.init.ones_(block.conv.gate)  # there is no core that it must leave as it is
        self.blocks, self.norm = listed(blocks), nn.LayerNorm(config.d_model)

    def forward(
        self, x_TD: Tensor, layout: Layout, source: tuple[Tensor, Layout] | None = None, biases: tuple[Tensor, ...] = ()
    ) -> Tensor:
        for block in self.blocks:
            cache = None
            if source is not None:
                assert block.cross_attn is not None
                cache = replace(block.cross_attn.cache(*source), biases=biases)
            x_TD = block(x_TD, layout, None, cache).x_TD
        return self.norm(x_TD)


class Reader(nn.Module):
    """Letters to phonemes: in [T], out log-probabilities [T · 4, 1 + phonemes], 0 the blank."""

    def __init__(self, config: SpeechConfig) -> None:
        super().__init__()
        self.letters = nn.Embedding(1 + len(config.letters), config.d_model)
        self.languages = nn.Embedding(len(config.languages), config.d_model)
        self.stack = Stack(config, config.reader_layers)
        self.out = nn.Linear(config.d_model, LABELS_PER_LETTER * (1 + len(config.phonemes)))

    def forward(self, letters_T: Tensor, layout: Layout, languages_S: Tensor) -> Tensor:
        device = letters_T.device
        x_TD = self.letters(letters_T) + self.languages(languages_S)[layout.segment_ids(device)]
        x_TD = self.stack(positioned(x_TD, layout), layout)
        return self.out(x_TD).unflatten(-1, (LABELS_PER_LETTER, -1)).flatten(0, 1).log_softmax(-1)

    def phonemes(self, letters_T: Tensor, layout: Layout, languages_S: Tensor) -> list[Tensor]:
        """The likeliest phonemes of each text, by number from 0."""
        best = self(letters_T, layout, languages_S).argmax(-1)
        return [
            (once := torch.unique_consecutive(part))[once > 0] - 1
            for part in best.split([LABELS_PER_LETTER * n for n in layout.lengths])
        ]


class Parallel(nn.Module):
    """All mel frames at once, where the durations say."""

    def __init__(self, config: SpeechConfig, n_mels: int) -> None:
        super().__init__()
        d = config.d_model
        self.prosody, self.place = nn.Linear(2, d), nn.Linear(2, d)
        self.stack = Stack(config, config.decoder_layers, decoder=True)
        self.out = nn.Linear(d, 2 * n_mels)
        nn.init.constant_(self.out.bias, -0.5)  # about the mean of a log-mel

    def forward(self, states_TD: Tensor, layout: Layout, prosody: Prosody) -> Frames:
        counts_T, spoken = positions_of(prosody.seconds_T, layout)
        states_TD = states_TD + self.prosody(torch.stack([prosody.pitch_T, prosody.loudness_T], -1))
        device = states_TD.device
        owner_P = torch.repeat_interleave(torch.arange(layout.total, device=device), counts_T)
        starts_T = counts_T.cumsum(0) - counts_T
        share_P = (torch.arange(spoken.total, device=device) - starts_T[owner_P] + 0.5) / counts_T[owner_P]
        within_PD = self.place(torch.stack([share_P, counts_T[owner_P].float().log()], -1))
        expected_P = owner_P + share_P - 0.5
        biases = [
            -(((expected_P[rows] - own.start)[:, None] - torch.arange(n, device=device)) / _REACH).square()
            for rows, own, n in zip(spoken.slices(), layout.slices(), layout.lengths, strict=True)
        ]
        x_PD = positioned(states_TD[owner_P] + within_PD, spoken)
        return Frames(self.out(self.stack(x_PD, spoken, (states_TD, layout), tuple(biases))), spoken)


class _Mix(nn.Module):
    """ConvNeXt's block (arXiv 2201.03545) in one dimension: depthwise convolution → LayerNorm → feed-forward, scaled."""

    def __init__(self, width: int, hidden: int, scale: float) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.scale = nn.Parameter(torch.full((width,), scale))

    def forward(self, x_BDF: Tensor) -> Tensor:
        mixed_BFD = self.norm(self.depthwise(x_BDF).transpose(1, 2))
        return x_BDF + (self.scale * self.down(F.gelu(self.up(mixed_BFD)))).transpose(1, 2)


class Vocoder(nn.Module):
    """[B, n_mels, F] → [B, F · 160] samples at 16 kHz."""

    def __init__(self, n_mels: int, width: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.stem = nn.Conv1d(n_mels, width, 7, padding=3)
        self.stem_norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(_Mix(width, hidden, 1 / layers) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, WINDOW + 2)

    def forward(self, mel_BMF: Tensor) -> Tensor:
        x_BDF = self.stem_norm(self.stem(mel_BMF).transpose(1, 2)).transpose(1, 2)
        for block in self.blocks:
            x_BDF = block(x_BDF)
        with torch.autocast(mel_BMF.device.type, enabled=False):  # phases and logarithms need all digits
            loudness, phase = self.head(self.norm(x_BDF.float().transpose(1, 2))).transpose(1, 2).chunk(2, dim=1)
        magnitude = loudness.clamp_max(_LOUDEST).exp()
        window = torch.hann_window(WINDOW, device=mel_BMF.device)
        return inverse(torch.complex(magnitude * phase.cos(), magnitude * phase.sin()), window)


def inverse(spectrum_BKF: Tensor, window: Tensor) -> Tensor:
    """Overlap-add of F windows centred on samples 0, 160, …: [B, F · 160] samples. As frames of log-mels lie."""
    return torch.istft(spectrum_BKF, len(window), HOP, window=window, length=spectrum_BKF.shape[-1] * HOP)


class SpeechModel(nn.Module):
    """Phonemes to mel frames in a voice."""

    def __init__(self, config: SpeechConfig, n_mels: int = 80) -> None:
        super().__init__()
        self.config, d = config, config.d_model
        self.reader = Reader(config)
        self.phonemes, self.voices = nn.Embedding(len(config.phonemes), d), nn.Embedding(len(config.voices), d)
        self.encoder = Stack(config, config.encoder_layers)
        self.planner = Stack(config, 1)
        self.plan = nn.Linear(d, len(Prosody._fields))
        nn.init.constant_(self.plan.bias[0], _LOG_SECONDS)
        self.decoder = Parallel(config, n_mels)
        self.vocoder = Vocoder(n_mels, config.vocoder_dim, config.vocoder_hidden, config.vocoder_layers)

    def encode(self, phonemes_T: Tensor, layout: Layout, voices_S: Tensor) -> tuple[Tensor, Prosody]:
        """States of the phonemes, and how they should sound."""
        x_TD = self.phonemes(phonemes_T) + self.voices(voices_S)[layout.segment_ids(phonemes_T.device)]
        x_TD = self.encoder(positioned(x_TD, layout), layout)
        seconds_T, pitch_T, loudness_T = self.plan(self.planner(x_TD, layout)).unbind(-1)
        return x_TD, Prosody(seconds_T, pitch_T, loudness_T)

    def forward(
        self,
        phonemes_T: Tensor,
        layout: Layout,
        voices_S: Tensor,
        prosody: Prosody,
        letters: Letters | None = None,
    ) -> Spoken:
        """In training: frames by a given prosody; the model's own prosody; and other texts read."""
        states_TD, own = self.encode(phonemes_T, layout, voices_S)
        frames = self.decoder(states_TD, layout, prosody)
        return Spoken(frames, own, self.reader(*letters) if letters else None)

    @torch.inference_mode()
    def speak(self, phonemes_T: Tensor, layout: Layout, voices_S: Tensor, rate_S: Tensor) -> list[Tensor]:
        """Mels [n_mels, frames] of packed texts."""
        states_TD, own = self.encode(phonemes_T, layout, voices_S)
        seconds_T = own.seconds_T.exp().clamp_max(_LONGEST) / rate_S[layout.segment_ids(phonemes_T.device)]
        frames, spoken = self.decoder(states_TD, layout, own._replace(seconds_T=seconds_T))
        return [frames[rows].unflatten(-1, (2, -1)).flatten(0, 1).T for rows in spoken.slices()]


def positions_of(seconds_T: Tensor, layout: Layout) -> tuple[Tensor, Layout]:
    """Positions of each phoneme, [T] int64, and of each utterance: ends are rounded, so that errors do not add up."""
    counts = []
    for rows in layout.slices():
        ends = (seconds_T[rows].double().cumsum(0) * POSITIONS_PER_SECOND).round().long()
        ends[-1].clamp_min_(1)
        counts.append(ends.diff(prepend=ends.new_zeros(1)))
    return torch.cat(counts), Layout(int(each.sum()) for each in counts)


def positioned(x_TD: Tensor, layout: Layout) -> Tensor:
    """With sinusoids of each one's place in its segment, however long that is."""
    table = sinusoids(max(layout.lengths), x_TD.shape[1]).to(x_TD)
    return x_TD + table[layout.positions(x_TD.device)]
