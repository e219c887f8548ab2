"""Learning to speak: from sounds, each with what its phonemes should sound like in a JSON file of its name beside it.

    {"phonemes": "ðə sˌiʧ…", "seconds": [0.1, 0.025, …], "pitch": […], "loudness": […]}

``seconds``, ``pitch`` and ``loudness`` begin and end with those of a pause. The sample's speaker is the voice. Whoever made the
speech knows all that (a synthesiser), or an alignment does.

Losses: mean absolute error of mel frames that are made by the given prosody; of log-seconds, pitch and loudness that the
model finds itself; and of phonemes found in letters (CTC), of the sentences and of a table of ``pronounced`` words, of which
each step reads some.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whisper_moe.config import SAMPLE_RATE, ModelConfig, SpeechConfig
from whisper_moe.data.examples import Example, ExampleConfig, ExampleReader, Pack
from whisper_moe.data.sample import DataError, Sample
from whisper_moe.media.mel import window_mel
from whisper_moe.media.spoken import letters_of, number
from whisper_moe.media.tokenizer import Tokenizer
from whisper_moe.model.speech import LABELS_PER_LETTER, Letters, Prosody, positions_of
from whisper_moe.packing import Layout
from whisper_moe.train.losses import Terms, Totals, weighed
from whisper_moe.train.parallel import Parallel
from whisper_moe.train.recipe import SpeechRecipe

FACTORS = {
    "mel": 1.0,
    "coarse": 1.0,
    "stop": 0.1,
    "guide": 1.0,
    "durations": 0.1,
    "pitch": 0.1,
    "loudness": 0.1,
    "letters": 0.1,
}
APART = 0.1
"""Seconds that a sound and its phonemes may differ by."""
MILLI = 1_000
"""Prosody travels in whole numbers."""


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
    """The losses of all but the vocoder."""

    given: SpeechRecipe
    pronounced: Pronounced | None

    def totals(self, packs: Sequence[Pack]) -> Totals:
        return Totals(sum(pack.encoder_tokens for pack in packs), sum(pack.texts.total for pack in packs))

    def __call__(self, model: nn.Module, packs: Sequence[Pack], totals: Totals, parallel: Parallel) -> Terms:
        if not packs:
            return weighed({}, FACTORS, model)
        here = [pack.to(parallel.device) for pack in packs]
        phonemes = torch.cat([pack.tokens_T for pack in here])
        layout = Layout(n for pack in here for n in pack.texts.lengths)
        labels = torch.cat([pack.labels_T for pack in here]).split([3 * n + 1 for n in layout.lengths])
        voices = torch.stack([each[0] for each in labels])
        wanted = Prosody(*torch.cat([each[1:].unflatten(0, (3, -1)) for each in labels], 1).float() / MILLI)
        letters, said = None, ()
        if self.pronounced is not None:
            names = "".join(id for pack in packs for id in pack.ids)
            seed = int.from_bytes(blake2b(names.encode(), digest_size=7).digest())
            letters, said = self.pronounced.drawn(self.given.words, seed, parallel.device)
        mel = torch.cat([mel for pack in here for mel in pack.mels], 1).T.unflatten(0, (-1, 2)).flatten(1)
        found = model((), (), spoken=(phonemes, layout, voices, wanted, mel, letters))
        frames = found.frames
        parts = {"mel": (frames.frames_PF.float() - mel).abs().mean(1).sum()} | frames.losses
        parts, own = {name: part / totals.tokens for name, part in parts.items()}, found.own
        logs = wanted.seconds_T.clamp_min(1 / MILLI).log()
        pairs = (
            ("durations", own.seconds_T, logs),
            ("pitch", own.pitch_T, wanted.pitch_T),
            ("loudness", own.loudness_T, wanted.loudness_T),
        )
        for name, ours, theirs in pairs:
            parts[name] = (ours.float() - theirs).abs().sum() / totals.segments
        if letters is not None:
            parts["letters"] = (
                ctc(found.letters, letters[1], said) * sum(pack.encoder_tokens for pack in packs) / totals.tokens
            )
        return weighed(parts, FACTORS | self.given.factors, model)
