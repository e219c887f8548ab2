"""Texts to texts in another language, and films of signing to texts: packs, the encoder once, beams. What shares a pack says what
each would say alone."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from whisper_moe.config_aside import SIGNS
from whisper_moe.generate.options import SearchOptions
from whisper_moe.generate.search import Lane, Rules, Search
from whisper_moe.media.containers import File, MediaError, name_of
from whisper_moe.media.normalize import letters_in_script
from whisper_moe.media.tokenizer import Pieces, Tokenizer, sentences, shortened
from whisper_moe.media.video import Frames, load_film, tubelets
from whisper_moe.model.block import DecoderState, Encoded
from whisper_moe.model.model import WhisperMoEModel
from whisper_moe.model.senses import Embedded, Senses
from whisper_moe.packing import Layout, first_fit_decreasing

BEAMS = 4
TOGETHER = 64
"""Segments that are decoded side by side: a pack may hold hundreds, and each has four beams."""
LONGEST = 120
"""Tokens of a source that are translated as one; longer sentences are cut at a comma, or between words."""
MOST = 250_000
"""Characters of one text."""
FILMS = 16
"""Films that are in memory at a time."""
LONGEST_SIGNED = 64
"""Tokens that are written of a film at most."""
SIGN_NAMES = {
    "sgn": "signs of no stated language",
    "ins": "Indian Sign Language (isl)",
    "ase": "American Sign Language (asl)",
}
_SIGN_CODES = {"isl": "ins", "asl": "ase", "indian sign language": "ins", "american sign language": "ase"}

Film: TypeAlias = File


class Asked(NamedTuple):
    """A segment, and what is to be written of it."""

    part: Tensor
    """A text's tokens [n], or a film uint8 [t, h, w, P]."""
    prompt: list[int]
    limit: int
    """Tokens that are written at most."""

    @property
    def size(self) -> int:
        """Positions of the encoder."""
        return self.part.shape[:3].numel()


class Written(NamedTuple):
    text: str
    avg_logprob: float
    """Of its tokens."""


class Job(NamedTuple):
    """Segments, and what is made of what is written of them."""

    asked: list[Asked]
    finish: Callable[[list[Written]], Any]


class SensesDecoder:
    """A model with the senses beside hearing attached, ready to write what segments of them say."""

    def __init__(self, model: WhisperMoEModel, senses: Senses, tokenizer: Tokenizer) -> None:
        self.model, self.senses, self.tokenizer = model, senses, tokenizer
        self.pieces = Pieces(tokenizer, senses.config.tokens, model.config.vocab_size)
        times = range(tokenizer.timestamp_begin, tokenizer.timestamp_end + 1)
        never = {*tokenizer.suppressed(()), *tokenizer.languages.values(), *times, *self.pieces.control}
        self._rules = Rules(tuple(sorted({*never, tokenizer.no_timestamps})), (tokenizer.eot,))

    def run(self, jobs: Sequence[Job]) -> list[Any]:
        """What becomes of each job; the segments of all share packs."""
        written = iter(self.write([each for job in jobs for each in job.asked]))
        return [job.finish([*islice(written, len(job.asked))]) for job in jobs]

    @torch.inference_mode()
    def write(self, asked: Sequence[Asked]) -> list[Written]:
        """What each segment says."""
        found: dict[int, Written] = {}
        packs = first_fit_decreasing([each.size for each in asked])
        for pack in (whole[i : i + TOGETHER] for whole in packs for i in range(0, len(whole), TOGETHER)):
            own = [asked[i] for i in pack]
            encoded = self.model.encoder([self.embedded(each) for each in own])
            found |= zip(pack, self.decoded(encoded, own), strict=True)
        return [found[index] for index in range(len(asked))]

    def embedded(self, asked: Asked) -> Embedded:
        part = self.senses.embedded(asked.part.to(self.model.encoder.positions.device), self.model)
        assert isinstance(part, Embedded)
        return part

    @torch.inference_mode()
    def decoded(self, encoded: Encoded, asked: Sequence[Asked]) -> list[Written]:
        """What segments say that are encoded already."""
        state = self.model.decoder.start(encoded, BEAMS)
        prompts = torch.tensor([each.prompt for each in asked]).repeat_interleave(BEAMS, 0)
        logits, state = self._step(prompts, state)
        room = self.model.config.max_target_positions - prompts.shape[1]
        searches = [Search(self._rules, SearchOptions(beams=BEAMS), min(room, each.limit)) for each in asked]
        lane = Lane(self._step, self.tokenizer.eot)
        lane.join(searches, logits, state)
        lane.run()
        best = [each.best for each in searches]
        return [Written(self.pieces.decode(each.tokens).strip(), each.avg_logprob) for each in best]

    def _step(self, tokens_Rn: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """As :mod:`whisper_moe.generate.search` asks for it."""
        decoder, rows = self.model.decoder, Layout([1] * len(tokens_Rn))
        tokens_T = tokens_Rn.flatten().to(self.model.encoder.positions.device)
        embedded_RnD = self.senses.rows(tokens_T, decoder).unflatten(0, tokens_Rn.shape)
        last_RD = decoder.extend(embedded_RnD, state)[:, -1]
        return self.senses.logits(decoder.logits(last_RD, state.routing, rows), last_RD).float(), state


# Texts


@dataclass(frozen=True)
class Translation:
    """What a text says in another language."""

    text: str
    """Line by line as the source."""
    source: str
    target: str
    sentences: tuple[tuple[str, str, float], ...]
    """Of each piece: the source, the translation, and the mean log-probability of its tokens."""

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        pairs = [{"source": a, "text": b, "avg_logprob": round(sure, 4)} for a, b, sure in self.sentences]
        return {"source": self.source, "target": self.target, "text": self.text, "sentences": pairs}


class Translator:
    """Translates, with a model that reads texts."""

    def __init__(self, decoder: SensesDecoder) -> None:
        """Raises ``ValueError`` for a model that reads none."""
        self._decoder, self.directions = decoder, decoder.senses.config.directions
        if not self.directions:
            raise ValueError("this model reads no texts: it has no part for that")

    def job(self, text: str, *, source: str | None = None, target: str | None = None) -> Job:
        """The sentences of a text, and how their translations become its own. Languages by code; by default the source is that of
        most letters, and the target the only one.

        Raises ``ValueError`` for a direction that the model is not for, for a text without a word, and for one of more than
        :data:`MOST` characters.
        """
        if len(text) > MOST:
            raise ValueError(
                f"the text has {len(text):,} characters; at most {MOST:,} are translated at a time: cut it"
            )
        source, target = self._direction(text, source, target)
        lines = [self._cut(" ".join(unicodedata.normalize("NFC", line).split()), source) for line in text.splitlines()]
        wanted = [*dict.fromkeys(piece for line in lines for piece in line if any(map(str.isalnum, piece)))]
        if not wanted:
            raise ValueError(f"nothing in it can be translated: {text[:40]!r}")

        def finish(written: list[Written]) -> Translation:
            found = dict(zip(wanted, written, strict=True))
            said = [" ".join(found[piece].text if piece in found else piece for piece in line) for line in lines]
            pieces = [piece for line in lines for piece in line if piece in found]
            sentences = tuple((piece, found[piece].text, found[piece].avg_logprob) for piece in pieces)
            return Translation("\n".join(said), source, target, sentences)

        return Job([self._asked(piece, source, target) for piece in wanted], finish)

    def _direction(self, text: str, source: str | None, target: str | None) -> tuple[str, str]:
        source = source or max((code for code, _ in self.directions), key=lambda code: letters_in_script(text, code)[0])
        fit = [pair for pair in self.directions if pair[0] == source and target in (None, pair[1])]
        if len(fit) != 1:
            known = ", ".join(" to ".join(pair) for pair in self.directions)
            said = f"a text in {source!r} into {target!r}" if target else f"a text in {source!r}: no target is said"
            raise ValueError(f"{said}; the model translates {known}")
        return fit[0]

    def _cut(self, line: str, language: str) -> list[str]:
        """Sentences, none longer than the model is good at."""
        fits = lambda part: len(self._decoder.pieces.source(part, language)) <= LONGEST  # noqa: E731
        return [piece for sentence in sentences(line) for piece in shortened(sentence, fits)]

    def _asked(self, text: str, source: str, target: str) -> Asked:
        """The segment of a sentence."""
        ids = self._decoder.pieces.source(text, source)
        return Asked(torch.tensor(ids), self._decoder.pieces.opening(target), 2 * len(ids) + 32)


# Films


@dataclass(frozen=True)
class Signed:
    """What is signed in a film."""

    source: str
    text: str
    language: str
    """Of the signs: ``ins``, ``ase``, or ``sgn`` where what was learned from did not say which."""
    avg_logprob: float

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        return {**vars(self), "avg_logprob": round(self.avg_logprob, 4)}


class Signer:
    """Reads signs, with a model that sees films."""

    def __init__(self, decoder: SensesDecoder) -> None:
        """Raises ``ValueError`` for a model that sees none."""
        self._decoder, self._config = decoder, decoder.senses.config
        if self._config.film is None:
            raise ValueError("this model sees no films: it has no part for that")

    def each(self, films: Iterable[Film], code: str) -> Iterator[Signed | MediaError]:
        """What is signed in each film, or why it cannot be read, in order; a few films are in memory at a time."""
        coming = iter(films)
        while some := [*islice(coming, FILMS)]:
            jobs: list[Job | MediaError] = []
            for film in some:
                try:
                    jobs.append(self.job(film, code))
                except MediaError as error:
                    jobs.append(error)
            said = iter(self._decoder.run([job for job in jobs if isinstance(job, Job)]))
            yield from (next(said) if isinstance(job, Job) else job for job in jobs)

    def language(self, language: str | None) -> str:
        """The code of a sign language, by code or name; by default the first one learned. Raises ``ValueError`` for another."""
        learned = self._config.signs
        wanted = (language or learned[0]).strip().lower()
        code = _SIGN_CODES.get(wanted, wanted)
        if code not in learned:
            known = ", ".join(SIGN_NAMES[each] for each in learned)
            said = SIGN_NAMES.get(code, f"{language!r}, which is none of isl, asl")
            raise ValueError(f"the model was not trained in {said}; what it has learned: {known}")
        return code

    def job(self, film: Film, code: str) -> Job:
        """The segment of a film, and what becomes of it. Raises ``MediaError``."""
        assert self._config.film is not None
        return self.job_of(tubelets(load_film(film, self._config.film), self._config.film), name_of(film), code)

    def job_of(self, film: Frames, name: str, code: str) -> Job:
        """The segment of a film that was read already: :func:`~whisper_moe.media.video.tubelets`."""
        prompt = self._decoder.pieces.opening("en", SIGNS[code])
        return Job(
            [Asked(torch.from_numpy(film), prompt, LONGEST_SIGNED)],
            lambda said: Signed(name, " ".join(said[0].text.split()), code, said[0].avg_logprob),
        )


assert SIGN_NAMES.keys() == SIGNS.keys()
