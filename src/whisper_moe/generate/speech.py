"""Texts to sound: sentences, their letters, phonemes and mel frames in packs, a waveform each, one recording.

The text is read by :mod:`whisper_moe.media.spoken`, and cut at sentences; those of all texts share packs. A sentence sounds as it
would alone.
"""

from __future__ import annotations

import io
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from unicodedata import category

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from whisper_moe.config import MAX_PACK_TOKENS, SAMPLE_RATE
from whisper_moe.config_aside import SpeechConfig, VoiceConfig
from whisper_moe.media.audio import write_audio
from whisper_moe.media.spoken import letters_of, number, runs, spoken
from whisper_moe.media.tokenizer import sentences, shortened
from whisper_moe.model.speech import SpeechModel
from whisper_moe.packing import Layout, first_fit_decreasing
from whisper_moe.weights.checkpoint import load_speech
from whisper_moe.weights.files import atomic_file
from whisper_moe.weights.load import default, resolve

logger = logging.getLogger(__name__)
RATES = (0.5, 2.0)
"""Times the voice's own speed."""
LONGEST = 220
"""Letters that are said in one breath; longer sentences are cut at a comma, or between words."""
MOST = 250_000
"""Characters of one text: four hours, which are kept in memory."""
POSITIONS_A_PHONEME = 6
"""At the slowest usual speed: what is planned for a sentence in a pack."""
PAUSE, PARAGRAPH = 0.12, 0.45
"""Seconds between sentences, besides what they begin and end with."""
_PARAGRAPH = re.compile(r"\n\s*(?:\n|(?=(?:\d{1,3}[.)]|[-*•])\s))")
"""A blank line, or the next of a list."""


@dataclass(frozen=True)
class Speech:
    """What was said."""

    samples: NDArray[np.float32]
    """Mono, at 16 kHz."""
    voice: str
    language: str
    sentences: tuple[tuple[str, str, float], ...]
    """Text, phonemes, and the second that it begins at."""

    @property
    def duration(self) -> float:
        return len(self.samples) / SAMPLE_RATE

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        spans = [{"start": round(start, 3), "text": text, "phonemes": said} for text, said, start in self.sentences]
        return {"voice": self.voice, "language": self.language, "duration": round(self.duration, 3), "sentences": spans}

    def save(self, path: str | Path) -> None:
        """As a file of the extension's kind (m4a, wav, mp3, flac, ogg), whole or not at all. Raises ``ValueError``."""
        path, content = Path(path), io.BytesIO()
        write_audio(content, self.samples, path.suffix)
        with atomic_file(path) as scratch:
            scratch.write_bytes(content.getvalue())


def sentences_of(text: str, language: str) -> list[tuple[str, float]]:
    """Pieces of a text as they are read, none longer than a breath, with the pause behind each. Blank lines end paragraphs."""
    found: list[tuple[str, float]] = []
    for paragraph in _PARAGRAPH.split(text):
        before = len(found)
        for sentence in sentences(spoken(paragraph, language)):
            pieces = shortened(sentence, lambda part: len(part) <= LONGEST)
            said = [(piece, PAUSE if piece is pieces[-1] else 0.0) for piece in pieces]
            found += [(piece, pause) for piece, pause in said if any(map(str.isalnum, piece))]
        if len(found) > before:
            found[-1] = (found[-1][0], PARAGRAPH)
    return found


class Speaker:
    """A model that speaks, and what it needs around it."""

    def __init__(self, model: SpeechModel, vocoder: Callable[[Tensor], Tensor] | None = None) -> None:
        """``vocoder``: [n_mels, frames] → samples; default the model's own."""
        self.model = model.eval()
        self.config: SpeechConfig = model.config
        self._vocoder = vocoder or (lambda mel: model.vocoder(mel[None])[0])

    @classmethod
    def from_pretrained(cls, model: str | os.PathLike[str] | None = None, *, model_dir: Path | None = None) -> Self:
        """What speaks of a checkpoint or training run, and nothing else of it; or of the default. Raises ``ValueError``."""
        located = resolve(default() if model is None else model, model_dir=model_dir)
        if located.kind != "checkpoint":
            raise ValueError(f"{located.name}: a Whisper, which does not speak")
        return cls(load_speech(located.path))

    def voice(self, name: str | None, language: str) -> VoiceConfig:
        """The voice of this name, or the first of the language. Raises ``ValueError`` naming those there are."""
        voices = self.config.voices
        fit = [each for each in voices if (each.name == name if name else each.language == language)]
        if not fit:
            known = ", ".join(f"{each.name} ({each.language})" for each in voices)
            raise ValueError(f"no voice {f'is called {name!r}' if name else f'speaks {language!r}'}; there are {known}")
        return fit[0]

    def speak(
        self,
        text: str,
        *,
        voice: str | None = None,
        language: str | None = None,
        rate: float = 1.0,
        progress: Callable[[float], None] = lambda seconds: None,
    ) -> Speech:
        """``language``: default the voice's, or that of most letters. ``progress`` is told of the seconds just finished.

        Raises ``ValueError`` for a voice, a language or a rate that there is not, for a text with nothing to say, and for one
        of more than :data:`MOST` characters.
        """
        if len(text) > MOST:
            raise ValueError(
                f"the text has {len(text):,} characters; at most {MOST:,} are read aloud at a time: cut it"
            )
        if not RATES[0] <= rate <= RATES[1]:
            raise ValueError(f"rate must be {RATES[0]:g} to {RATES[1]:g} times the voice's own, got {rate:g}")
        said = language or (self.voice(voice, "").language if voice else self._language_of(text))
        if said not in self.config.languages:
            raise ValueError(f"language {said!r} cannot be spoken; there are {', '.join(self.config.languages)}")
        own = self.voice(voice, said)
        written = sentences_of(text, said)
        phonemes = self.phonemes([piece for piece, _ in written], said)
        heard = {i for i, each in enumerate(self.config.phonemes) if i and category(each) != "Lm" and each.isalpha()}
        pieces = [(*piece, ids) for piece, ids in zip(written, phonemes, strict=True) if heard.intersection(ids)]
        if not pieces:
            raise ValueError(f"nothing in it can be read aloud: {text[:40]!r}")
        sounds = self._sounds([ids for *_, ids in pieces], own, rate, progress)
        spans, samples, begin = list[tuple[str, str, float]](), list[NDArray[np.float32]](), 0
        for (piece, pause, ids), sound in zip(pieces, sounds, strict=True):
            spans.append((piece, "".join(self.config.phonemes[i] for i in ids[1:-1]), begin / SAMPLE_RATE))
            samples += [sound, np.zeros(round(pause / rate * SAMPLE_RATE), np.float32)]
            begin += len(sound) + len(samples[-1])
        return Speech(np.concatenate(samples[:-1]), own.name, said, tuple(spans))

    def _language_of(self, text: str) -> str:
        counts = Counter[str]()
        for language, stretch in runs(text, self.config.languages[0]):
            counts[language] += sum(map(str.isalpha, stretch))
        return max(self.config.languages, key=lambda language: counts[language])

    @torch.inference_mode()
    def phonemes(self, texts: Sequence[str], language: str) -> list[list[int]]:
        """Of texts as they are read, a pause at both ends. Stretches in another script are read in their own language."""
        stretches: list[tuple[int, int, list[int]]] = []
        unread = set[str]()
        for index, text in enumerate(texts):
            for own, stretch in runs(letters_of(text), language):
                known = self.config.letters if own in self.config.languages else ""
                unread |= {char for char in stretch if char.isalnum() and char not in known}
                if letters := number(known, stretch, 1):
                    stretches.append((index, self.config.languages.index(own), letters))
        if unread:
            logger.warning("no letters of this model, and not read: %s", "".join(sorted(unread))[:40])
        found: list[list[int]] = [[0] for _ in texts]
        space = self.config.phonemes.find(" ")
        for group in first_fit_decreasing([len(letters) for *_, letters in stretches]) if stretches else []:
            parts = [stretches[i] for i in sorted(group)]
            flat = self._tensor([id for *_, letters in parts for id in letters])
            layout, languages = Layout(len(part[2]) for part in parts), self._tensor([part[1] for part in parts])
            for place, ids in zip(sorted(group), self.model.reader.phonemes(flat, layout, languages), strict=True):
                stretches[place] = (*stretches[place][:2], ids.tolist())
        for index, _, ids in stretches:
            found[index] += [space] * (len(found[index]) > 1) + ids
        return [[*ids, 0] for ids in found]

    @torch.inference_mode()
    def _sounds(
        self, phonemes: list[list[int]], voice: VoiceConfig, rate: float, progress: Callable[[float], None]
    ) -> list[NDArray[np.float32]]:
        sounds: dict[int, NDArray[np.float32]] = {}
        place = self.config.voices.index(voice)
        for group in first_fit_decreasing([min(MAX_PACK_TOKENS, POSITIONS_A_PHONEME * len(ids)) for ids in phonemes]):
            layout = Layout(len(phonemes[i]) for i in group)
            flat = self._tensor([id for i in group for id in phonemes[i]])
            voices, rates = self._tensor([place] * len(group)), self._tensor([float(rate)] * len(group))
            for index, mel in zip(group, self.model.speak(flat, layout, voices, rates), strict=True):
                sounds[index] = self._vocoder(mel).clamp(-1, 1).float().cpu().numpy()
            progress(sum(len(sounds[index]) for index in group) / SAMPLE_RATE)
        return [sounds[index] for index in range(len(phonemes))]

    def _tensor(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, device=self.model.phonemes.weight.device)
