"""Learning to speak, all but the vocoder: from sounds, each with what its phonemes should sound like in a JSON file of its name.

    python recipes/speech/speech.py RECIPE.yaml [KEY=VALUE ...] -o RUN [--resume]    as whisper-moe train

    {"phonemes": "ðə sˌiʧ…", "seconds": [0.1, 0.025, …], "pitch": […], "loudness": […]}

``seconds``, ``pitch`` and ``loudness`` begin and end with those of a pause. The sample's speaker is the voice. Whoever made the
speech knows all that (a synthesiser), or an alignment does.

Losses: mean absolute error of mel frames that are made by the given prosody; of log-seconds, pitch and loudness that the
model finds itself; and of phonemes found in letters (CTC), of the sentences and of a table of ``pronounced`` words, of which
each step reads some.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from whisper_moe.config import SAMPLE_RATE, ModelConfig, Strict
from whisper_moe.config_aside import SpeechConfig
from whisper_moe.data.examples import Example, ExampleConfig, ExampleReader, Pack
from whisper_moe.data.loader import PackedLoader
from whisper_moe.data.sample import DataError, Sample
from whisper_moe.media.mel import window_mel
from whisper_moe.media.spoken import letters_of, number
from whisper_moe.media.tokenizer import Tokenizer
from whisper_moe.model.model import WhisperMoEModel
from whisper_moe.model.speech import LABELS_PER_LETTER, Letters, Prosody, positions_of
from whisper_moe.packing import Layout
from whisper_moe.train.build import Task, build_model
from whisper_moe.train.loop import Figures
from whisper_moe.train.losses import Terms, Totals, seed_of, weighed
from whisper_moe.train.parallel import Parallel
from whisper_moe.train.reading import RecipeError
from whisper_moe.train.recipe import Recipe
from whisper_moe.train.run import script

Loss = Literal["mel", "durations", "pitch", "loudness", "letters"]
FACTORS = {"mel": 1.0} | dict.fromkeys(("durations", "pitch", "loudness", "letters"), 0.1)
"""Of the losses."""
APART = 0.1
"""Seconds that a sound and its phonemes may differ by."""
MILLI = 1_000
"""Prosody travels in whole numbers."""
PARTS = ("phonemes", "voices", "encoder", "planner", "plan", "decoder")


class SpeechSettings(Strict):
    """How speaking is learned."""

    pronounced: str | None = None
    """A table of texts and their phonemes, of which the reader of letters learns."""
    words: int = Field(default=64, ge=1)
    """Of them, in each step."""
    factors: dict[Loss, float] = Field(default_factory=dict)
    """Of the losses, by name, where they are others than the usual ones."""


class SpeechRecipe(Recipe):
    """Text in, mel frames out; only what makes those learns."""

    speech: SpeechSettings = SpeechSettings()
    """Instead of all in ``losses``."""

    def task(self) -> type[Task]:
        return Speaking


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


@dataclass(frozen=True)
class MelObjective:
    """Of the given prosody and texts."""

    given: SpeechSettings
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
        assert isinstance(model, WhisperMoEModel) and model.speech is not None
        found = model.speech(phonemes, layout, voices, wanted, letters)
        parts = {"mel": (found.frames.frames_PF.float() - mel).abs().mean(1).sum() / totals.tokens}
        theirs = wanted._replace(seconds_T=wanted.seconds_T.clamp_min(1 / MILLI).log())
        for name, mine, other in zip(("durations", "pitch", "loudness"), found.own, theirs, strict=True):
            parts[name] = (mine.float() - other).abs().sum() / totals.segments
        if letters is not None:
            parts["letters"] = (
                ctc(found.letters, letters[1], said) * sum(pack.encoder_tokens for pack in packs) / totals.tokens
            )
        return weighed(parts, FACTORS | self.given.factors, model)


@dataclass(frozen=True)
class Speaking(Task):
    """All that makes mel frames of letters learns; the core and the vocoder stay as they are."""

    recipe: SpeechRecipe

    def model(self) -> WhisperMoEModel:
        if self.initial.config.speech is None:
            raise RecipeError("the model has no part that speaks; model.speech adds one")
        if self.parallel.world_size > 1:
            raise RecipeError("learning to speak runs in one process")
        parts = (*PARTS, *["reader"] * (self.recipe.speech.pronounced is not None))
        return build_model(self.initial, self.recipe, [f"speech.{part}.*" for part in parts])

    def learned(self, model: WhisperMoEModel) -> tuple[PackedLoader, MelObjective]:
        reader, objective = self._spoken()
        return self.mixed(reader), objective

    def figures(self) -> Figures:
        """Of the letters, on the table that the reader learns of: without it nothing would tell which step reads best."""
        return self.held_out(*self._spoken())

    def _spoken(self) -> tuple[SpokenReader, MelObjective]:
        given, config = self.recipe.speech, self.initial.config
        assert config.speech is not None
        table = Pronounced(Path(given.pronounced), config.speech) if given.pronounced else None
        return SpokenReader(self.initial.tokenizer, config), MelObjective(given, table)


if __name__ == "__main__":
    sys.exit(script(SpeechRecipe, "Teach a model to make mel frames of letters."))
