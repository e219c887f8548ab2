"""Sound that can be read: every format, rate and channel count becomes the same 16 kHz mono."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from tests.media.recordings import FORMATS, encode, film, hz_of, sample, tone, wav
from whisper_moe.media.audio import _resampled, load_audio, stream_audio


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
