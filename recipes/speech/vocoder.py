"""Mel frames to sound: a vocoder, from any speech, without a text; then from what the model's own frames leave to be guessed.

    python recipes/speech/vocoder.py RECIPE.yaml [KEY=VALUE ...] -o RUN [--resume]    as whisper-moe train

Losses: spectra at three resolutions (spectral convergence and log-magnitudes, Parallel WaveGAN, arXiv 1910.11480, section 2.2),
the log-mel itself, and, where asked for, critics: small convolutions over periods of the wave (HiFi-GAN, arXiv 2010.05646) and
over spectra, with least-squares targets and the distance of what they see on the way. Critics and vocoder are updated in one
step: the critics' loss does not reach the vocoder, and the vocoder's does not reach the critics.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from whisper_moe.config import ModelConfig, Strict
from whisper_moe.data.examples import Example, ExampleConfig, ExampleReader, Pack
from whisper_moe.data.loader import PackedLoader
from whisper_moe.data.sample import DataError, Sample, share_of
from whisper_moe.media.mel import HOP, mel_power, window_mel
from whisper_moe.media.tokenizer import Tokenizer
from whisper_moe.model.model import WhisperMoEModel
from whisper_moe.train.build import Task, build_model
from whisper_moe.train.loop import Figures
from whisper_moe.train.losses import Terms, Totals, weighed
from whisper_moe.train.parallel import Parallel
from whisper_moe.train.reading import RecipeError
from whisper_moe.train.recipe import Recipe
from whisper_moe.train.run import script

Loss = Literal["spectra", "mel", "critics", "fooling", "seen"]
FACTORS = {"spectra": 1.0, "mel": 5.0, "critics": 1.0, "fooling": 0.5, "seen": 1.0}
"""Of the losses."""
RESOLUTIONS = ((256, 64), (512, 128), (1_024, 256))
"""Windows and hops, in samples."""
PERIODS = (2, 3, 5, 7)
MOST_APART = 10
"""Frames that a model may make more or less than a sound has."""


class VocoderSettings(Strict):
    """How sounding is learned."""

    positions: int = Field(default=32, ge=8)
    """Of 20 ms, in each stretch of sound."""
    critics: bool = False
    """Whether the vocoder also has to fool critics, which learn beside it and stay in the run."""
    factors: dict[Loss, float] = Field(default_factory=dict)
    """Of the losses, by name, where they are others than the usual ones."""


class VocoderRecipe(Recipe):
    """Mel frames in, sound out; only the vocoder learns."""

    vocoder: VocoderSettings = VocoderSettings()
    """Instead of all in ``losses``."""

    def task(self) -> type[Task]:
        return Sounding


class SoundReader(ExampleReader):
    """Another stretch of each sound in every epoch: its mel frames, and below them the 160 samples of each, [n_mels + 160, F].

    Where an array [n_mels, F] is beside it under its name (``.mel.npy``), those are the frames: what a model makes of its text.
    """

    def __init__(self, tokenizer: Tokenizer, model: ModelConfig, positions: int) -> None:
        super().__init__(tokenizer, model, ExampleConfig(margin=(0.0, 1.0), empty_text=True))
        self._positions = positions

    def margin_of(self, id: str, seed: int, epoch: int) -> float:
        """Where the stretch begins, as a share of where it may: no margin of silence here, but the same kind of draw."""
        return share_of(id, seed, epoch)

    def tokens(self, sample: Sample) -> tuple[list[int], list[int]]:
        return [], [0]

    def measure(self, sample: Sample, seconds: float = math.nan) -> tuple[int, int]:
        super().measure(sample, seconds)
        return self._positions * 2 * HOP, 1

    def read(self, sample: Sample, margin: float) -> Example:
        sound = torch.from_numpy(self._sound(sample))
        positions = max(self._positions, -(-len(sound) // (2 * HOP)))
        mel = self._made(sample, len(sound) // HOP, 2 * positions)
        mel = window_mel(sound.numpy(), self._n_mels, positions) if mel is None else mel
        both = torch.cat([mel, F.pad(sound, (0, positions * 2 * HOP - len(sound))).view(-1, HOP).T])
        begin = 2 * round(margin * (positions - self._positions))
        part = both[:, begin : begin + 2 * self._positions].clone()
        return Example(id=sample.id, mel=part, valid_length=self._positions, tokens=(0,), labels=(0,))

    def _made(self, sample: Sample, frames: int, wanted: int) -> Tensor | None:
        path = Path(sample.audio.name if sample.audio else "").with_suffix(".mel.npy")
        if not path.is_file():
            return None
        try:
            made = torch.from_numpy(np.load(path).astype(np.float32))
        except (OSError, ValueError, TypeError, EOFError) as error:
            raise DataError(path, f"is no array of mel frames: {error}") from error
        if made.ndim != 2 or len(made) != self._n_mels or abs(made.shape[1] - frames) > MOST_APART:
            raise DataError(
                path, f"its shape {tuple(made.shape)} is not that of {frames} frames of {self._n_mels} bands"
            )
        return F.pad(made[:, :wanted], (0, max(0, wanted - made.shape[1])), value=float(made.min()))


@dataclass(frozen=True)
class VocoderObjective:
    """Mel frames to the sound that they are of."""

    given: VocoderSettings
    n_mels: int

    def totals(self, packs: Sequence[Pack]) -> Totals:
        return Totals(sum(len(pack.ids) for pack in packs), sum(len(pack.ids) for pack in packs))

    def __call__(self, model: nn.Module, packs: Sequence[Pack], totals: Totals, parallel: Parallel) -> Terms:
        if not packs:
            return weighed({}, {}, model)
        both = torch.stack([each for pack in packs for each in pack.mels]).to(parallel.device)
        mel, wave = both[:, : self.n_mels], both[:, self.n_mels :].transpose(1, 2).flatten(1)
        assert isinstance(model, WhisperMoEModel) and model.speech is not None
        made = model.speech.vocoder(mel)
        with torch.autocast(parallel.device.type, enabled=False):
            parts = {"spectra": spectral_distance(made, wave), "mel": mel_distance(made, wave, self.n_mels)}
            if self.given.critics:
                judged = adversarial(model.critics, made, wave)  # pyright: ignore[reportArgumentType]
                parts |= dict(zip(("critics", "fooling", "seen"), judged, strict=True))
        share = len(both) / totals.segments
        return weighed({name: share * part for name, part in parts.items()}, FACTORS | self.given.factors, model)


def magnitudes(wave_BN: Tensor, size: int, hop: int) -> Tensor:
    window = torch.hann_window(size, device=wave_BN.device)
    spectrum = torch.stft(wave_BN, size, hop, window=window, return_complex=True)
    return (spectrum.real.square() + spectrum.imag.square()).clamp_min(1e-7).sqrt()


def spectral_distance(made_BN: Tensor, wave_BN: Tensor) -> Tensor:
    """Spectral convergence, and the mean distance of log-magnitudes; a mean over resolutions."""
    found = []
    for size, hop in RESOLUTIONS:
        made, wave = magnitudes(made_BN, size, hop), magnitudes(wave_BN, size, hop)
        apart = (made - wave).square().sum((1, 2)).sqrt() / wave.square().sum((1, 2)).sqrt().clamp_min(1e-3)
        found.append(apart.mean() + (made.log() - wave.log()).abs().mean())
    return torch.stack(found).mean()


def mel_distance(made_BN: Tensor, wave_BN: Tensor, n_mels: int) -> Tensor:
    """Of log-mels without a floor that depends on the loudest band: both have the same."""
    logs = [mel_power(wave, n_mels).clamp_min(1e-8).log10() for wave in (made_BN, wave_BN)]
    return (logs[0] - logs[1]).abs().mean()


# Critics


def _convolutions(widths: Sequence[int], kernel: tuple[int, int], stride: tuple[int, int]) -> nn.ModuleList:
    same, last = (kernel[0] // 2, kernel[1] // 2), len(widths) - 1
    pairs = enumerate(zip((1, *widths), widths, strict=False))
    layers = [nn.Conv2d(a, b, kernel, stride if depth < last else 1, same) for depth, (a, b) in pairs]
    return nn.ModuleList([*layers, nn.Conv2d(widths[-1], 1, 3, 1, 1)])


class Critics(nn.Module):
    """Each says of a wave how true it sounds, and what it saw on the way."""

    def __init__(self, widths: Sequence[int] = (16, 32, 64, 64)) -> None:
        super().__init__()
        self.periods = nn.ModuleList(_convolutions(widths, (5, 1), (3, 1)) for _ in PERIODS)
        self.spectra = nn.ModuleList(_convolutions(widths, (3, 5), (1, 2)) for _ in RESOLUTIONS)

    def forward(self, wave_BN: Tensor) -> list[list[Tensor]]:
        views = [F.pad(wave_BN, (0, -wave_BN.shape[1] % p)).unflatten(1, (-1, p))[:, None] for p in PERIODS]
        views += [magnitudes(wave_BN, *each).log()[:, None].transpose(2, 3) for each in RESOLUTIONS]
        found = []
        for view, layers in zip(views, (*self.periods, *self.spectra), strict=True):
            seen = list[Tensor]()
            for layer in layers.children():
                view = layer(F.leaky_relu(view, 0.1) if seen else view)
                seen.append(view)
            found.append(seen)
        return found


def adversarial(critics: nn.Module, made_BN: Tensor, wave_BN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The critics' loss, how far they are from being fooled, and the distance of what they see."""
    true, false = critics(wave_BN), critics(made_BN.detach())
    theirs = sum((t[-1] - 1).square().mean() + f[-1].square().mean() for t, f in zip(true, false, strict=True))
    held = {name: parameter.detach() for name, parameter in critics.named_parameters()}
    judged = functional_call(critics, held, (made_BN,))
    ours = sum((each[-1] - 1).square().mean() for each in judged)
    pairs = [
        (a, b.detach())
        for one, other in zip(judged, true, strict=True)
        for a, b in zip(one[:-1], other[:-1], strict=True)
    ]
    seen = sum((a - b).abs().mean() for a, b in pairs)
    many = len(true)
    return torch.as_tensor(theirs) / many, torch.as_tensor(ours) / many, torch.as_tensor(seen) / len(pairs)


@dataclass(frozen=True)
class Sounding(Task):
    """The vocoder learns, and critics beside it if asked for."""

    recipe: VocoderRecipe

    def model(self) -> WhisperMoEModel:
        if self.initial.config.speech is None:
            raise RecipeError("the model has no part that speaks; model.speech adds one")
        if self.parallel.world_size > 1:
            raise RecipeError("learning to sound runs in one process")
        model = build_model(self.initial, self.recipe, ["speech.vocoder.*"])
        if self.recipe.vocoder.critics:
            model.critics = Critics()
        return model

    def learned(self, model: WhisperMoEModel) -> tuple[PackedLoader, VocoderObjective]:
        return self.mixed(self._reader()), VocoderObjective(self.recipe.vocoder, self.initial.config.n_mels)

    def figures(self) -> Figures:
        """Without the critics, who judge by another measure in every step."""
        given = self.recipe.vocoder.model_copy(update={"critics": False})
        return self.held_out(self._reader(), VocoderObjective(given, self.initial.config.n_mels))

    def _reader(self) -> SoundReader:
        return SoundReader(self.initial.tokenizer, self.initial.config, self.recipe.vocoder.positions)


if __name__ == "__main__":
    sys.exit(script(VocoderRecipe, "Teach a model to make sound of mel frames."))
