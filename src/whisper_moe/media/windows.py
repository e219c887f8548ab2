"""Long sound in pieces that fit Whisper's 30 s window, cut where nobody speaks; and what is speech at all (numpy only).

Everything rests on the energy in 20 ms steps. That cannot tell a voice from a fan, so what it does not prove to be silence
stays. The learned detector, which can tell, is :func:`speech_spans_silero` (the optional extra ``vad``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from whisper_moe.config import HOP, SAMPLE_RATE

Samples = NDArray[np.float32]
Spans = list[tuple[int, int]]
"""Half-open ranges of samples, in order, without overlap."""

SILENT_PEAK = 1e-4
"""-80 dBFS, three steps of 16-bit sound: what stays below has no speech in it at any gain."""

LEAD_SECONDS = 2.0
"""Digital silence at the ends of a window that is not decoded with it; less is a pause between sentences, and does no harm."""

STEP = SAMPLE_RATE // 50
"""Samples in a step of short-time energy: 320, 20 ms."""
SMOOTH_STEPS = 13
"""Steps that a cut's surroundings are judged by: 260 ms, longer than a stop's closure inside a word (about 100 ms)."""
QUIET_RATIO = 2.0
"""Energy over the quietest point's that still belongs to the same pause: 3 dB."""

NOISE_PERCENTILE, LOUD_PERCENTILE = 10, 95
"""Where the noise floor and the speech level of a window are read, among its steps' energies."""
SPEECH_OVER_NOISE_DB = 8.0
"""A step this far above the noise floor may be speech."""
SPEECH_UNDER_LOUD_DB = 20.0
"""Nothing less than this far below the loud steps is silence: without a pause, the "noise floor" is speech itself."""


@dataclass(frozen=True, eq=False)
class Window:
    """A piece of a recording, 16 kHz mono."""

    start: float
    """Seconds from the start of the recording."""
    samples: Samples

    @property
    def duration(self) -> float:
        """Seconds."""
        return len(self.samples) / SAMPLE_RATE

    @property
    def end(self) -> float:
        """Seconds from the start of the recording."""
        return self.start + self.duration

    def part(self, begin: int, end: int | None = None) -> Window:
        """Its samples from one to before the other."""
        return Window(self.start + begin / SAMPLE_RATE, self.samples[begin:end])


def is_silent(samples: Samples) -> bool:
    """Whether the samples never leave :data:`SILENT_PEAK`: digital silence, which needs no model at all."""
    return len(samples) == 0 or max(float(samples.max()), -float(samples.min())) < SILENT_PEAK


def cut_windows(blocks: Iterable[Samples], max_seconds: float = 30.0) -> Iterator[Window]:
    """Cut a stream into windows of at most ``max_seconds``, each cut in the longest pause of the latter half.

    A recording that fits comes out as one window; of a longer one every sample is in exactly one window, none is empty.
    Digital silence before the first sound of a window becomes one of its own.
    Holds one window and one block in memory. Where ``blocks`` end in a ``ValueError``, as of a damaged file, it is raised
    after what came before it.

    :param blocks: float32 16 kHz mono of any lengths, as from :func:`whisper_moe.media.audio.stream_audio`.
    :raises ValueError: for ``max_seconds`` of less than two samples.
    """
    limit = round(max_seconds * SAMPLE_RATE)
    if limit < 2:
        raise ValueError(f"max_seconds must hold at least two samples, got {max_seconds}")
    held, start, damage = np.zeros(0, np.float32), 0, None
    try:
        for block in blocks:
            held = np.concatenate([held, block])
            while len(held) > limit:
                cut = silent_lead(held[:limit]) or limit // 2 + _pause(held[limit // 2 : limit])
                yield Window(start / SAMPLE_RATE, held[:cut])
                held, start = held[cut:], start + cut
    except ValueError as error:
        damage = error
    while len(held):
        cut = silent_lead(held) or len(held)
        yield Window(start / SAMPLE_RATE, held[:cut])
        held, start = held[cut:], start + cut
    if damage is not None:
        raise damage


def silent_lead(samples: Samples) -> int:
    """Samples of digital silence before the first sound, where there are :data:`LEAD_SECONDS` of them; of mere silence, none.

    In whole mel frames. A model that hears them puts the first words at their start, seconds early, and invents or loses some.
    """
    heard = np.abs(samples) >= SILENT_PEAK
    first = int(heard.argmax()) // HOP * HOP if len(samples) else 0
    return first if first >= LEAD_SECONDS * SAMPLE_RATE else 0


def sounding(window: Window) -> Window:
    """The window without :data:`LEAD_SECONDS` or more of digital silence at its ends; empty if it is nothing else."""
    if is_silent(window.samples):
        return window.part(0, 0)
    return window.part(silent_lead(window.samples), len(window.samples) - silent_lead(window.samples[::-1]))


def cut_clips(blocks: Iterable[Samples], times: Sequence[float], max_seconds: float) -> Iterator[Window]:
    """The same of some stretches of a stream only, cut each for itself; all of it without any.

    ``times``: seconds in order: start, end, start, end … of the stretches; the last end may be missing.
    """
    samples = [round(time * SAMPLE_RATE) for time in times]
    ends = [*samples[1::2], None] if len(samples) % 2 else samples[1::2]
    stretches = list(zip(samples[::2], ends, strict=True)) or [(0, None)]
    for start, group in groupby(_within(blocks, stretches), key=lambda found: found[0]):
        for window in cut_windows((piece for _, piece in group), max_seconds):
            yield Window(start / SAMPLE_RATE + window.start, window.samples)


def _within(blocks: Iterable[Samples], stretches: Sequence[tuple[int, int | None]]) -> Iterator[tuple[int, Samples]]:
    """Pieces of the blocks, each with the sample that its stretch begins at."""
    done = 0
    for block in blocks:
        for start, end in stretches:
            piece = block[max(0, start - done) : None if end is None else max(0, end - done)]
            if len(piece):
                yield start, piece
        done += len(block)


def halved(window: Window) -> list[Window]:
    """Two windows instead of one, cut in the longest pause of its middle third. At least three samples long."""
    third = len(window.samples) // 3
    cut = third + _pause(window.samples[third : 2 * third])
    return [window.part(0, cut), window.part(cut)]


def _pause(samples: Samples) -> int:
    """The middle of the longest pause, as a sample index (never 0); the later one of two that are as long."""
    around = _smooth(_energies(samples), SMOOTH_STEPS)
    quiet = _runs(around <= max(QUIET_RATIO * float(around.min()), SILENT_PEAK**2))
    first, last = max(quiet, key=lambda run: (run[1] - run[0], run[0]))
    return min(len(samples), (first + last) * STEP // 2)


def _energies(samples: Samples) -> NDArray[np.float64]:
    """Mean square in steps of 20 ms, the last step shorter."""
    edges = np.arange(0, len(samples), STEP)
    return np.add.reduceat(np.square(samples, dtype=np.float64), edges) / np.diff(edges, append=len(samples))


def _smooth(energy: NDArray[np.float64], steps: int) -> NDArray[np.float64]:
    """The mean of that many (odd) steps around each step; at the ends, of what there is."""
    kernel = np.ones(steps)
    inside = slice(steps // 2, steps // 2 + len(energy))
    return np.convolve(energy, kernel)[inside] / np.convolve(np.ones(len(energy)), kernel)[inside]


def _runs(mask: NDArray[np.bool_]) -> Spans:
    """The stretches of true values."""
    edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


# What is speech.

MIN_SPEECH_SECONDS = 0.1
"""A shorter sound that stands alone is a click; the shortest syllables are longer."""
MIN_SILENCE_SECONDS = 1.0
"""Shorter pauses belong to the speech around them: a sentence stays in one window."""
PADDING_SECONDS = 0.3
"""Kept on either side of speech: faint consonants begin and end words, and Whisper wants some silence at the end."""
LEVEL_STEPS = 3
"""Steps of 20 ms that a level is averaged over, so that one glottal period more or less does not matter."""


def speech_spans(samples: Samples, *, padding: float = PADDING_SECONDS) -> Spans:
    """Where the samples may hold speech, by their level against the noise floor of this window.

    :param samples: one window, 16 kHz mono; some seconds at least, so that its floor can be heard.
    :param padding: seconds kept on both sides of a span.
    :returns: sample ranges; none for digital silence, everything where the noise is as loud as speech.
    """
    if is_silent(samples):
        return []
    level = 10 * np.log10(_smooth(_energies(samples), LEVEL_STEPS) + 1e-12)
    noise, loud = np.percentile(level, [NOISE_PERCENTILE, LOUD_PERCENTILE])
    floor = max(min(noise + SPEECH_OVER_NOISE_DB, loud - SPEECH_UNDER_LOUD_DB), 20 * np.log10(SILENT_PEAK))
    joined = _join([(a * STEP, b * STEP) for a, b in _runs(level > floor)], round(MIN_SILENCE_SECONDS * SAMPLE_RATE))
    speech = [(a, b) for a, b in joined if b - a >= MIN_SPEECH_SECONDS * SAMPLE_RATE]
    pad = round(padding * SAMPLE_RATE)
    return _join([(max(0, a - pad), min(len(samples), b + pad)) for a, b in speech], 1)


def _join(spans: Spans, gap: int) -> Spans:
    """Spans in order, those less than ``gap`` apart made one."""
    joined: Spans = []
    for start, end in spans:
        if joined and start - joined[-1][1] < gap:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined


def speech_spans_silero(samples: Samples) -> Spans:
    """The same question answered by silero-vad, a learned detector that tells speech from noise, 50 times slower.

    :raises ImportError: where the optional extra ``vad`` (silero-vad 6.2.3 or later, onnxruntime) is not installed.
    """
    model, find = _silero()
    pauses = {"min_silence_duration_ms": 1_000 * MIN_SILENCE_SECONDS, "speech_pad_ms": 1_000 * PADDING_SECONDS}
    return [(span["start"], span["end"]) for span in find(samples, model, sampling_rate=SAMPLE_RATE, **pauses)]


@lru_cache(maxsize=1)
def _silero() -> tuple[object, Callable[..., list[dict[str, int]]]]:
    """The detector's ONNX form: all frames in one call, seven times as fast as frame by frame, the same answer."""
    import torch

    threads = torch.get_num_threads()
    try:
        from silero_vad import get_speech_timestamps_sequence, load_silero_vad  # pyright: ignore[reportMissingImports]

        return load_silero_vad(sequence=True), get_speech_timestamps_sequence
    except ImportError as error:
        raise ImportError(f"{error.name or 'silero_vad'} is not installed: pip install 'whisper-moe[vad]'") from error
    finally:
        torch.set_num_threads(threads)  # importing silero_vad sets it to 1 for the whole process


def drop_silence(windows: Iterable[Window], spans: Callable[[Samples], Spans] = speech_spans) -> Iterator[Window]:
    """Only the speech of the windows, each span a window of its own that knows its place in the recording."""
    for window in windows:
        yield from (window.part(start, end) for start, end in spans(window.samples))
