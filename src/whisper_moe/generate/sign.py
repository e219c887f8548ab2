"""Films of signing to texts: each a segment of its own, several in a pack."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import torch

from whisper_moe.config_aside import SIGNS
from whisper_moe.generate.senses import Asked, Job, SensesDecoder
from whisper_moe.media.audio import MediaError
from whisper_moe.media.video import Frames, load_film, tubelets

TOGETHER = 16
"""Films that are in memory at a time."""
LONGEST = 64
"""Tokens that are written of a film at most."""
NAMES = {
    "sgn": "signs of no stated language",
    "ins": "Indian Sign Language (isl)",
    "ase": "American Sign Language (asl)",
}
_CODES = {"isl": "ins", "asl": "ase", "indian sign language": "ins", "american sign language": "ase"}

Film: TypeAlias = "str | os.PathLike[str] | BinaryIO"
"""A path, or an open binary file."""


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
        while some := [*islice(coming, TOGETHER)]:
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
        code = _CODES.get(wanted, wanted)
        if code not in learned:
            known = ", ".join(NAMES[each] for each in learned)
            said = NAMES.get(code, f"{language!r}, which is none of isl, asl")
            raise ValueError(f"the model was not trained in {said}; what it has learned: {known}")
        return code

    def job(self, film: Film, code: str) -> Job:
        """The segment of a film, and what becomes of it. Raises ``MediaError``."""
        assert self._config.film is not None
        given: Any = film if hasattr(film, "read") else Path(film)  # pyright: ignore[reportArgumentType]
        name = name_of(film)
        return self.job_of(tubelets(load_film(given, self._config.film, name=name), self._config.film), name, code)

    def job_of(self, film: Frames, name: str, code: str) -> Job:
        """The segment of a film that was read already: :func:`~whisper_moe.media.video.tubelets`."""
        prompt = self._decoder.pieces.opening("en", SIGNS[code])
        return Job(
            [Asked(torch.from_numpy(film), prompt, LONGEST)],
            lambda said: Signed(name, " ".join(said[0].text.split()), code, said[0].avg_logprob),
        )


def name_of(film: Film) -> str:
    """What messages call a path or an open file."""
    return str(getattr(film, "name", "<stream>") if hasattr(film, "read") else film)


assert NAMES.keys() == SIGNS.keys()
