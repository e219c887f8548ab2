"""Times are the container's: what has no sound in it is silence, of the right length and in the right place."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from tests.media.recordings import Sound, encode, retimed, tone
from whisper_moe.media.audio import Clock, load_audio, stream_audio
from whisper_moe.media.containers import Reader
from whisper_moe.media.video import header_seconds
from whisper_moe.media.windows import cut_windows, is_silent

RATE = 16_000


def spoken(folder: Path, codec: str = "aac", seconds: float = 4.0) -> Path:
    return encode(folder / "source.mka", tone(seconds, 44_100), 44_100, codec)


def codec_of(container: str) -> str:
    return "mp2" if container in ("mpg", "avi") else "aac"


def loud_at(sound: Sound) -> list[float]:
    """Where sound begins after half a second of silence, or at the start, in seconds."""
    loud = np.flatnonzero(np.abs(sound) > 0.1) / RATE
    return [float(loud[0]), *(float(b) for a, b in pairwise(loud) if b - a > 0.5)]


@pytest.mark.parametrize("container", ["mp4", "mov", "mkv", "ts", "flv", "mpg"])
def test_sound_that_starts_later_than_the_film_keeps_its_time(tmp_path: Path, container: str) -> None:
    source = spoken(tmp_path, codec_of(container))
    sound = load_audio(retimed(source, tmp_path / f"late.{container}", lambda _: 4.9, film_seconds=10))
    assert loud_at(sound) == [pytest.approx(4.9, abs=0.06)]
    assert len(sound) / RATE == pytest.approx(8.9, abs=0.1)
    assert not sound[: round(4.7 * RATE)].any()


@pytest.mark.parametrize("container", ["mp4", "mov"])
def test_pictures_that_were_cut_away_are_not_the_start(tmp_path: Path, container: str) -> None:
    """A cut without encoding keeps the pictures since the last whole one, and an edit list that hides them."""
    path = retimed(spoken(tmp_path), tmp_path / f"cut.{container}", lambda _: 0.0, film_seconds=8, film_starts=-3.0)
    sound = load_audio(path)
    assert loud_at(sound) == [pytest.approx(0, abs=0.06)]
    assert len(sound) / RATE == pytest.approx(4.0, abs=0.1)


@pytest.mark.parametrize("container", ["mp4", "mkv", "ts", "flv", "mpg"])
def test_a_gap_in_the_timestamps_is_as_long_in_the_sound(tmp_path: Path, container: str) -> None:
    source = spoken(tmp_path, codec_of(container))
    path = retimed(source, tmp_path / f"gap.{container}", lambda time: 20.0 * (time > 2.0))
    sound = load_audio(path)
    assert loud_at(sound) == [pytest.approx(0, abs=0.06), pytest.approx(22.0, abs=0.1)]
    assert len(sound) / RATE == pytest.approx(24.0, abs=0.1) == header_seconds(path)


def test_a_header_counts_from_where_the_samples_count(tmp_path: Path) -> None:
    path = retimed(spoken(tmp_path), tmp_path / "late.mp4", lambda _: 4.9, film_seconds=10)
    assert header_seconds(path) == pytest.approx(len(load_audio(path)) / RATE, abs=0.05)


def test_sound_alone_starts_at_its_start_whatever_its_timestamps(tmp_path: Path) -> None:
    source = spoken(tmp_path)
    for container in ("mkv", "ts"):
        path = retimed(source, tmp_path / f"alone.{container}", lambda _: 5_000.0)
        assert len(load_audio(path)) == pytest.approx(len(load_audio(source)), abs=RATE // 40), container


def test_silence_lies_at_the_right_sample(tmp_path: Path) -> None:
    """No filter's delay, no group's edge: what is exact in the file is exact in the samples."""
    wave = tone(3, RATE, level=0.5)
    source = encode(tmp_path / "exact.mka", wave, RATE, "pcm_s16le")
    sound = load_audio(retimed(source, tmp_path / "exact.mkv", lambda time: 7.0 * (time > 1.5)))
    gap = np.flatnonzero(np.diff(np.flatnonzero(sound)) > RATE)
    assert len(gap) == 1 and len(sound) == 10 * RATE
    first = int(np.flatnonzero(sound)[gap[0]]) + 1
    np.testing.assert_allclose(sound[:first], wave[0, :first], atol=1e-4)
    np.testing.assert_allclose(sound[first + 7 * RATE :], wave[0, first:], atol=1e-4)


def test_timestamps_that_begin_anew_are_a_clock_of_their_own(tmp_path: Path) -> None:
    """Two streams joined: nothing between them, and the gap in the second is as long as it is there."""
    source = spoken(tmp_path, seconds=12.0)
    first = retimed(source, tmp_path / "first.ts", lambda _: 0.0).read_bytes()
    second = retimed(source, tmp_path / "second.ts", lambda time: 5.0 * (time > 6.0)).read_bytes()
    (tmp_path / "joined.ts").write_bytes(first + second)
    assert loud_at(load_audio(tmp_path / "joined.ts")) == [pytest.approx(0, abs=0.06), pytest.approx(23, abs=0.15)]


class Container:
    """What :class:`Clock` asks of one."""

    def __init__(self, seconds: float | None, name: str = "mpegts") -> None:
        self.start_time, self.duration = 3_000_000, None if seconds is None else round(seconds * 1e6)
        self.format = type("Format", (), {"name": name})


def silences(starts: list[float], *, stated: float | None = None, name: str = "mpegts") -> list[float]:
    """Before frames of one second that start there, from the container's start."""
    stream = type("Stream", (), {"duration": None})
    clock = Clock(Reader(None, Container(stated, name)), stream)  # type: ignore[arg-type]
    return [pytest.approx(clock.missing(start + 3, 1.0)) for start in starts]


def test_silence_is_what_the_timestamps_leave_out() -> None:
    assert silences([0, 1, 2]) == [0, 0, 0]
    assert silences([2, 3, 9]) == [2, 0, 5]
    assert silences([0, 1.05, 2.09, 3.12]) == [0, 0, 0, 0.12]  # a slow clock is caught up with, once it shows
    assert silences([0, 0.4, 1.4, 10]) == [0, 0, 0, 7]  # what overlapped is not silence
    assert silences([100, 0, 1, 5]) == [100, 0, 0, 3]  # begins anew
    assert silences([0, 1, 2], name="mp3") == silences([0, 1, 9], name="wav") == [0, 0, 0]
    assert silences([2, 3], name="ogg") == silences([2, 9], name="avi") == [2, 0]


def test_a_jump_out_of_all_proportion_is_not_believed() -> None:
    assert silences([0, 50, 51], stated=60) == [0, 49, 0]
    assert silences([0, 80, 81, 90], stated=60) == [0, 0, 0, 0]
    assert silences([0, 80, 2, 3, 9], stated=60) == [0, 0, 0, 0, 5]  # one timestamp damaged, and back
    assert silences([0, 14_000, 14_001, 14_300, 14_500]) == [0, 13_999, 0, 298, 0]  # four hours altogether
    assert silences([0, 9e6, 9e6 + 1, 9e6 + 4]) == [0, 0, 0, 2]


def test_a_gap_longer_than_windows_is_windows_of_silence(tmp_path: Path) -> None:
    path = retimed(spoken(tmp_path), tmp_path / "gap.mkv", lambda time: 100.0 * (time > 2.0))
    windows = list(cut_windows(stream_audio(path), max_seconds=20))
    assert windows[-1].end == pytest.approx(104, abs=0.1) and all(window.duration <= 20 for window in windows)
    assert sum(is_silent(window.samples) for window in windows) >= 4
    loud = [w.start + t for w in windows if not is_silent(w.samples) for t in loud_at(w.samples)]
    assert loud == [pytest.approx(0, abs=0.06), pytest.approx(102, abs=0.1)]
