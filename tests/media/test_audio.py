"""Sound that can be read: every format, rate and channel count becomes the same 16 kHz mono, at the container's time, and nothing
that is there goes unheard without a word."""

from __future__ import annotations

import io
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from tests.media.recordings import FORMATS, Sound, encode, film, film_in, hz_of, retimed, sample, tone, wav
from whisper_moe.media.audio import Clock, MediaError, _resampled, load_audio, stream_audio
from whisper_moe.media.containers import Reader
from whisper_moe.media.languages import LANGUAGES, spoken_code
from whisper_moe.media.video import header_seconds
from whisper_moe.media.windows import cut_windows, is_silent

RATE = 16_000


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_tone_that_was_written(tmp_path: Path, name: str) -> None:
    sound = load_audio(sample(tmp_path, name))
    assert sound.dtype == np.float32 and sound.ndim == 1
    assert len(sound) == pytest.approx(32_000, abs=1_200)  # encoders add up to 75 ms of priming or padding
    assert hz_of(sound) == pytest.approx(440, abs=1)
    assert np.abs(sound[4_000:28_000]).max() == pytest.approx(0.4, abs=0.02)


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 44_100, 192_000])
def test_every_rate_keeps_pitch_length_and_place(rate: int) -> None:
    sound = load_audio(io.BytesIO(wav(tone(2, rate).T, rate)))
    assert len(sound) == pytest.approx(32_000, abs=2)
    expected = tone(2)[0]
    inner = slice(1_000, 31_000)
    np.testing.assert_allclose(sound[inner], expected[inner], atol=2e-3)


@pytest.mark.parametrize("channels", [1, 2, 3, 6, 17, 64])
def test_every_channel_counts_the_same(channels: int) -> None:
    levels = np.linspace(-0.3, 0.9, channels, dtype=np.float32)
    sound = load_audio(io.BytesIO(wav(np.tile(levels, (1_600, 1)))))
    np.testing.assert_allclose(sound, levels.mean(), atol=1e-6)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32, np.float64])
def test_full_scale_is_one_in_every_sample_type(dtype: type) -> None:
    wave = tone(0.5)[0].astype(np.float64)
    scale = {np.uint8: 128, np.int16: 2**15, np.int32: 2**31}.get(dtype, 1)
    samples = (wave * scale + (128 if dtype is np.uint8 else 0)).astype(dtype)
    sound = load_audio(io.BytesIO(wav(samples[:, None])))
    np.testing.assert_allclose(sound, wave, atol=1.01 / scale if scale > 1 else 1e-7)


def test_louder_than_full_scale_is_clipped() -> None:
    sound = load_audio(io.BytesIO(wav(tone(1, level=3).T)))
    assert sound.max() == 1.0 and sound.min() == -1.0


def test_blocks_of_about_a_second_add_up_to_the_whole(tmp_path: Path) -> None:
    path = sample(tmp_path, "aac.m4a", 3.3)
    blocks = list(stream_audio(path))
    assert len(blocks) > 3 and all(0 < len(block) < 24_000 for block in blocks)
    np.testing.assert_array_equal(np.concatenate(blocks), load_audio(path))


class Pipe(io.RawIOBase):
    """Standard input: bytes that come once, a few at a time."""

    def __init__(self, data: bytes) -> None:
        self.data = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        piece = self.data.read(min(len(buffer), 1_000))
        buffer[: len(piece)] = piece
        return len(piece)


@pytest.mark.parametrize("name", ["aac.m4a", "s16.wav", "opus.ogg"])
def test_a_pipe_gives_what_the_file_gives(tmp_path: Path, name: str) -> None:
    path = sample(tmp_path, name)
    np.testing.assert_array_equal(load_audio(Pipe(path.read_bytes())), load_audio(path))  # type: ignore[arg-type]


def test_a_stream_is_read_from_its_start_and_left_open(tmp_path: Path) -> None:
    stream = io.BytesIO(sample(tmp_path, "faststart.m4a").read_bytes())
    stream.seek(5_000)
    first = load_audio(stream)
    np.testing.assert_array_equal(load_audio(stream), first)
    assert not stream.closed and len(first) > 30_000


@pytest.mark.parametrize("wrong", ["sound.mp3", "sound.txt", "sound.m3u8", "sound", "-", "http:sound.wav", "%d.png"])
def test_the_name_of_a_file_says_nothing(tmp_path: Path, wrong: str) -> None:
    path = sample(tmp_path, "aac.m4a")
    expected = load_audio(path)
    np.testing.assert_array_equal(load_audio(path.rename(tmp_path / wrong)), expected)


def test_cover_art_is_no_obstacle(tmp_path: Path) -> None:
    path = film(tmp_path / "album.m4a", tone(1, 44_100), pictures=1, codec="png")
    assert b"covr" in path.read_bytes() and b"\x89PNG" in path.read_bytes()
    assert hz_of(load_audio(path)) == pytest.approx(440, abs=1.5)


def test_joined_mp3_files_are_read_to_the_end_across_seams_tags_and_rates(tmp_path: Path) -> None:
    low = encode(tmp_path / "low.mp3", tone(2, 44_100, 440), 44_100, "libmp3lame").read_bytes()
    high = encode(tmp_path / "high.mp3", tone(2, 48_000, 880), 48_000, "libmp3lame").read_bytes()
    tags = b"LYRICSBEGIN" + b"la la la " * 40 + b"000371LYRICS200" + b"TAG" + b"title".ljust(125, b"\0")
    sound = load_audio(io.BytesIO(low + tags + high + tags))
    assert len(sound) == pytest.approx(64_000, abs=3_200)
    assert hz_of(sound[:28_000]) == pytest.approx(440, abs=1)
    assert hz_of(sound[-28_000:]) == pytest.approx(880, abs=1)


def test_no_sample_is_lost_where_the_rate_changes() -> None:
    groups = [(tone(1, rate, 100)[0], rate) for rate in (8_000, 48_000, 16_000, 44_100)]
    sound = np.concatenate(list(_resampled(groups)))
    assert len(sound) == pytest.approx(64_000, abs=4)


# When it sounds.


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


# Which track, and what of it is mixed.


def heard(path: Path | io.BytesIO, track: int | str | None = None) -> tuple[Sound, list[str]]:
    notes: list[str] = []
    blocks = list(stream_audio(path, track=track, note=notes.append))
    return np.concatenate(blocks), notes


@pytest.mark.parametrize("container", ["mp4", "mkv", "ts"])
def test_a_track_is_chosen_by_number_or_language(tmp_path: Path, container: str) -> None:
    hz = [300.0, 600.0, 1_200.0]
    path = film_in(["eng", "hin", "ger"], [tone(2, RATE, h) for h in hz], tmp_path / f"film.{container}")
    choices = [0, 1, 2, "1", "hin", "hi", "Hindi", "HIN", "de", "deu", "german", "de-AT", "en"]
    wanted = [0, 1, 2, 1, 1, 1, 1, 1, 2, 2, 2, 2, 0]
    for track, number in zip(choices, wanted, strict=True):
        assert hz_of(heard(path, track)[0]) == pytest.approx(hz[number], abs=2), track
    assert heard(path)[1] == []


@pytest.mark.parametrize("track", [2, "2", "tam", "Tamil", "und"])
def test_a_track_that_is_not_there_is_an_error_that_lists_those_that_are(tmp_path: Path, track: int | str) -> None:
    path = film_in(["eng", "hin"], [tone(2, RATE), tone(2, RATE)], tmp_path / "film.mkv")
    with pytest.raises(MediaError, match=r"no sound track .*; its sound tracks are 0 \(eng, aac\), 1 \(hin, aac\)"):
        heard(path, track)


def test_a_silent_track_tells_of_the_others(tmp_path: Path) -> None:
    path = film_in(["eng", "hin"], [tone(2, RATE, level=0), tone(2, RATE)], tmp_path / "film.mkv")
    sound, notes = heard(path)
    assert not sound.any()
    assert notes == ["its sound track 0 (eng, aac) is silent, and was chosen by default; there is also 1 (hin, aac)"]
    assert heard(path, 0)[1] == heard(path, 1)[1] == []


def test_the_languages_of_containers_are_whispers() -> None:
    assert {spoken_code(code) for code in LANGUAGES} == set(LANGUAGES)
    stated = "hin fre fra chi zho ori pt-BR nob qaa und"
    assert " ".join(map(spoken_code, stated.split())) == "hi fr fr zh zh or pt no qaa und"


def stereo(left: Sound, right: Sound, dtype: type = np.float32) -> io.BytesIO:
    pair = np.stack([left, right], 1)
    scale = {np.int16: 2**15 - 1, np.uint8: 127}.get(dtype, 1)
    return io.BytesIO(wav((pair * scale + (128 if dtype is np.uint8 else 0)).astype(dtype)))


def voice(seconds: float, seed: int) -> Sound:
    return np.random.default_rng(seed).normal(0, 0.1, round(seconds * RATE)).astype(np.float32)


@pytest.mark.parametrize("dtype", [np.float32, np.int16, np.uint8])
@pytest.mark.parametrize("level", [1.0, 0.85])
def test_channels_that_cancel_are_turned_over(dtype: type, level: float) -> None:
    left = voice(3, 0)
    sound, notes = heard(stereo(left, -level * left, dtype))
    np.testing.assert_allclose(sound, left * (1 + level) / 2, atol=0.012 if dtype is np.uint8 else 1e-4)
    assert notes == ["its channels cancel each other out; one is turned over before they are mixed"]


def test_ordinary_stereo_and_two_voices_are_mixed_as_ever() -> None:
    one, other = voice(3, 1), voice(3, 2)
    turns = np.arange(len(one)) // RATE % 2
    pairs = [(one, one), (one, other), (one * turns, other * (1 - turns)), (one, one * 0), (one, -0.5 * one)]
    for left, right in pairs:
        sound, notes = heard(stereo(left, right))
        np.testing.assert_array_equal(sound, np.clip((left + right) / 2, -1, 1))
        assert notes == []


def test_the_mix_turns_where_the_sound_does_and_only_there() -> None:
    """A quiet stretch decides nothing; two voices after it lose nothing; and where turning over cancels, it is taken back."""
    one, other = voice(2, 3), voice(2, 4)
    quiet = np.zeros(2 * RATE, np.float32)
    left = np.concatenate([one, one, quiet, one, one])
    right = np.concatenate([one, -one, quiet, other, one])
    sound, notes = heard(stereo(left, right))
    expected = np.concatenate([one, one, quiet, (one - other) / 2, one])
    same = np.isclose(np.abs(sound), np.abs(expected), atol=1e-6)
    lost = np.flatnonzero(~same)
    assert len(lost) < RATE / 2  # of the groups in which it changes
    assert len(notes) == 1


def test_a_change_of_layout_starts_the_mix_anew(tmp_path: Path) -> None:
    left = voice(2, 5)[None]
    turned = encode(tmp_path / "turned.ts", np.concatenate([left, -left]), RATE, "mp2").read_bytes()
    mono = encode(tmp_path / "mono.ts", left, RATE, "mp2").read_bytes()
    (tmp_path / "both.ts").write_bytes(turned + mono + turned)
    sound, _ = heard(tmp_path / "both.ts")
    seconds = sound[: len(sound) // RATE * RATE].reshape(-1, RATE)
    assert len(seconds) >= 6 and np.sqrt(np.square(seconds).mean(1)).min() > 0.05


def test_timestamps_that_are_not_believed_are_told(tmp_path: Path) -> None:
    source = encode(tmp_path / "source.mka", tone(4, RATE), RATE, "pcm_s16le")
    path = retimed(source, tmp_path / "days.mkv", lambda time: 9e5 * (time > 2))
    notes = heard(path)[1]
    assert len(notes) == 1 and "jump by 900000.0 s" in notes[0] and "not believed" in notes[0]
    assert len(load_audio(path)) == 4 * RATE
