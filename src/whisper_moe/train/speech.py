"""Learning to speak: from sounds, each with what its phonemes should sound like in a JSON file of its name beside it.

    {"phonemes": "ðə sˌiʧ…", "seconds": [0.1, 0.025, …], "pitch": […], "loudness": […]}

``seconds``, ``pitch`` and ``loudness`` begin and end with those of a pause. The sample's speaker is the voice. Whoever made the
speech knows all that (a synthesiser), or an alignment does.

Losses: mean absolute error of mel frames that are made by the given prosody; of log-seconds, pitch and loudness that the
model finds itself; and of phonemes found in letters (CTC), of the sentences and of a table of ``pronounced`` words, of which
each step reads some.

And to sound: a vocoder, from any speech, without a text; then from what the model's own mel frames leave to be guessed. Losses:
spectra at three resolutions (spectral convergence and log-magnitudes, Parallel WaveGAN, arXiv 1910.11480, section 2.2), the
log-mel itself, and, where asked for, critics: small convolutions over periods of the wave (HiFi-GAN, arXiv 2010.05646) and over
spectra, with least-squares targets and the distance of what they see on the way. Critics and vocoder are updated in one step: the
critics' loss does not reach the vocoder, and the vocoder's does not reach the critics.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from whisper_moe.config import SAMPLE_RATE, ModelConfig
from whisper_moe.config_aside import SpeechConfig
from whisper_moe.data.examples import Example, ExampleConfig, ExampleReader, Pack
from whisper_moe.data.sample import DataError, Sample, share_of
from whisper_moe.media.mel import HOP, mel_power, window_mel
from whisper_moe.media.spoken import letters_of, number
from whisper_moe.media.tokenizer import Tokenizer
from whisper_moe.model.model import WhisperMoEModel
from whisper_moe.model.speech import LABELS_PER_LETTER, Letters, Prosody, SpeechModel, positions_of
from whisper_moe.packing import Layout
from whisper_moe.train.losses import Terms, Totals, seed_of, weighed
from whisper_moe.train.parallel import Parallel
from whisper_moe.train.recipe import SpeechRecipe

FACTORS = {
    "speech": {"mel": 1.0} | dict.fromkeys(("durations", "pitch", "loudness", "letters"), 0.1),
    "vocoder": {"spectra": 1.0, "mel": 5.0, "critics": 1.0, "fooling": 0.5, "seen": 1.0},
}
"""The usual ones of the losses of each part, by name."""
APART = 0.1
"""Seconds that a sound and its phonemes may differ by."""
MILLI = 1_000
"""Prosody travels in whole numbers."""
RESOLUTIONS = ((256, 64), (512, 128), (1_024, 256))
"""Windows and hops, in samples."""
PERIODS = (2, 3, 5, 7)
MOST_APART = 10
"""Frames that a model may make more or less than a sound has."""


class SpokenReader(ExampleReader):
    """Sounds to examples: ``tokens`` are phonemes, pauses at both ends; ``labels`` the voice, and of each phoneme milliseconds,
    pitch and loudness in thousandths, one after the other."""

    def __init__(self, tokenizer: Tokenizer, model: ModelConfig) -> None:
        super().__init__(tokenizer, model, ExampleConfig(margin=0.0))
        assert model.speech is not None
        self._speech = model.speech
        self._voices = [voice.name for voice in model.speech.voices]

    def tokens(self, sample: Sample) -> tuple[list[int], list[int]]:
        return [], self._planned(sample)[0]

    def read(self, sample: Sample, margin: float) -> Example:
        tokens, labels = self._planned(sample)
        seconds = torch.tensor(labels[1 : 1 + len(tokens)]) / MILLI
        sound, said = self._sound(sample), float(seconds.sum())
        if abs(said - len(sound) / SAMPLE_RATE) > APART:
            cause = f"the sound has {len(sound) / SAMPLE_RATE:.2f} s, its phonemes {said:.2f} s"
            raise DataError(sample.id, cause)
        frames = positions_of(seconds, Layout([len(tokens)]))[1].total
        mel = window_mel(sound, self._n_mels, frames)
        return Example(id=sample.id, mel=mel, valid_length=frames, tokens=tuple(tokens), labels=tuple(labels))

    def _planned(self, sample: Sample) -> tuple[list[int], list[int]]:
        assert sample.audio is not None
        path = Path(sample.audio.name).with_suffix(".json")
        try:
            plan = json.loads(path.read_text("utf-8"))
            strangers = set(plan["phonemes"]) - set(self._speech.phonemes)
            columns = [[round(MILLI * value) for value in plan[name]] for name in ("seconds", "pitch", "loudness")]
        except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
            raise DataError(path, f"says nothing of what each phoneme sounds like: {error!r}") from error
        if strangers:
            raise DataError(path, f"its phonemes {''.join(sorted(strangers))!r} are none of the model's")
        phonemes = number(self._speech.phonemes, plan["phonemes"])
        if {len(phonemes) + 2} != {*map(len, columns)} or min(columns[0]) < 0:
            raise DataError(
                path, "its seconds, pitch and loudness must be of each phoneme, and of a pause at both ends"
            )
        if sample.speaker not in self._voices:
            raise DataError(sample.id, f"its speaker {sample.speaker!r} is none of {', '.join(self._voices)}")
        return [0, *phonemes, 0], [self._voices.index(sample.speaker), *(n for column in columns for n in column)]


class Pronounced:
    """Texts and their phonemes: language, text, phonemes, with tabs between them."""

    def __init__(self, path: Path, config: SpeechConfig) -> None:
        """Rows of other languages, and with more phonemes than their letters have room for, are passed over.

        Raises ``ValueError`` naming the file, and a line that is none.
        """
        self.rows: list[tuple[int, list[int], list[int]]] = []
        for line, row in enumerate(path.read_text("utf-8").splitlines(), 1):
            if row.count("\t") != 2:
                raise ValueError(
                    f"{path}, line {line}: needs a language, a text and its phonemes, with tabs between them"
                )
            language, text, said = row.split("\t")
            letters, phonemes = number(config.letters, letters_of(text), 1), number(config.phonemes, said, 1)
            room = LABELS_PER_LETTER * len(letters) - sum(a == b for a, b in pairwise(phonemes))
            if language in config.languages and 0 < len(phonemes) <= room:
                self.rows.append((config.languages.index(language), letters, phonemes))
        if not self.rows:
            raise ValueError(f"{path}: no row is of {' or '.join(config.languages)}")
        self._ends = torch.tensor([len(letters) for _, letters, _ in self.rows]).cumsum(0)

    def drawn(self, many: int, seed: int, device: torch.device) -> tuple[Letters, tuple[list[int], ...]]:
        """Some texts, for the reader, and their phonemes; longer ones oftener, by their letters."""
        random = torch.Generator().manual_seed(seed)
        places = torch.randint(int(self._ends[-1]), (many,), generator=random)
        rows = [self.rows[i] for i in torch.searchsorted(self._ends, places, right=True).tolist()]
        languages, letters, phonemes = zip(*rows, strict=True)
        flat = torch.tensor([id for text in letters for id in text], device=device)
        return (flat, Layout(map(len, letters)), torch.tensor(languages, device=device)), phonemes


def ctc(logs: Tensor, layout: Layout, phonemes: Sequence[Sequence[int]]) -> Tensor:
    """A mean over phonemes; ``layout``: of the letters."""
    lengths = [LABELS_PER_LETTER * n for n in layout.lengths]
    padded = nn.utils.rnn.pad_sequence(list(logs.float().split(lengths)))
    wanted = torch.tensor([id for text in phonemes for id in text], device=logs.device)
    counts = torch.tensor([*map(len, phonemes)])
    lost = F.ctc_loss(padded, wanted, torch.tensor(lengths), counts, reduction="sum", zero_infinity=True)
    return lost / len(wanted)


def _speaking(model: nn.Module) -> SpeechModel:
    assert isinstance(model, WhisperMoEModel) and model.speech is not None
    return model.speech


@dataclass(frozen=True)
class MelObjective:
    """The losses of all but the vocoder."""

    given: SpeechRecipe
    pronounced: Pronounced | None

    def totals(self, packs: Sequence[Pack]) -> Totals:
        return Totals(sum(pack.encoder_tokens for pack in packs), sum(pack.texts.total for pack in packs))

    def __call__(self, model: nn.Module, packs: Sequence[Pack], totals: Totals, parallel: Parallel) -> Terms:
        if not packs:
            return weighed({}, {}, model)
        here = [pack.to(parallel.device) for pack in packs]
        phonemes = torch.cat([pack.tokens_T for pack in here])
        layout = Layout(n for pack in here for n in pack.texts.lengths)
        labels = torch.cat([pack.labels_T for pack in here]).split([3 * n + 1 for n in layout.lengths])
        voices = torch.stack([each[0] for each in labels])
        wanted = Prosody(*torch.cat([each[1:].unflatten(0, (3, -1)) for each in labels], 1).float() / MILLI)
        letters, said = None, ()
        if self.pronounced is not None:
            letters, said = self.pronounced.drawn(self.given.words, seed_of(packs), parallel.device)
        mel = torch.cat([mel for pack in here for mel in pack.mels], 1).T.unflatten(0, (-1, 2)).flatten(1)
        found = _speaking(model)(phonemes, layout, voices, wanted, letters)
        parts = {"mel": (found.frames.frames_PF.float() - mel).abs().mean(1).sum() / totals.tokens}
        theirs = wanted._replace(seconds_T=wanted.seconds_T.clamp_min(1 / MILLI).log())
        for name, mine, other in zip(("durations", "pitch", "loudness"), found.own, theirs, strict=True):
            parts[name] = (mine.float() - other).abs().sum() / totals.segments
        if letters is not None:
            parts["letters"] = (
                ctc(found.letters, letters[1], said) * sum(pack.encoder_tokens for pack in packs) / totals.tokens
            )
        return weighed(parts, FACTORS["speech"] | self.given.factors, model)


# Learning to sound


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

    def measure(self, sample: Sample, seconds: float) -> tuple[int, int]:
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

    given: SpeechRecipe
    n_mels: int

    def totals(self, packs: Sequence[Pack]) -> Totals:
        return Totals(sum(len(pack.ids) for pack in packs), sum(len(pack.ids) for pack in packs))

    def __call__(self, model: nn.Module, packs: Sequence[Pack], totals: Totals, parallel: Parallel) -> Terms:
        if not packs:
            return weighed({}, {}, model)
        both = torch.stack([each for pack in packs for each in pack.mels]).to(parallel.device)
        mel, wave = both[:, : self.n_mels], both[:, self.n_mels :].transpose(1, 2).flatten(1)
        made = _speaking(model).vocoder(mel)
        with torch.autocast(parallel.device.type, enabled=False):
            parts = {"spectra": spectral_distance(made, wave), "mel": mel_distance(made, wave, self.n_mels)}
            if self.given.critics:
                judged = adversarial(model.critics, made, wave)  # pyright: ignore[reportArgumentType]
                parts |= dict(zip(("critics", "fooling", "seen"), judged, strict=True))
        share = len(both) / totals.segments
        return weighed(
            {name: share * part for name, part in parts.items()}, FACTORS["vocoder"] | self.given.factors, model
        )


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
