"""Pieces of sound, their lengths without decoding, and errors that say where."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from media.recordings import FORMATS, encode, sample, tone

from whisper_moe.data.sample import AudioRef, DataError, Sample
from whisper_moe.media.audio import MediaError, load_audio

RAMP = np.linspace(-0.9, 0.9, 5 * 16_000, dtype=np.float32)
"""Every sample is another one."""


@pytest.fixture(scope="module")
def ramp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encode(tmp_path_factory.mktemp("ramp") / "ramp.wav", RAMP[None], 16_000, "pcm_f32le")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(start=st.floats(0, 4.9), length=st.none() | st.floats(0.01, 8))
def test_a_piece_is_that_part_of_the_whole(ramp: Path, start: float, length: float | None) -> None:
    end = None if length is None else start + length
    piece = AudioRef(path=str(ramp), start=start, end=end).read()
    assert np.array_equal(piece, RAMP[round(start * 16_000) : None if end is None else round(end * 16_000)])


def test_a_piece_spans_the_blocks_of_a_long_recording(tmp_path: Path) -> None:
    wave = np.random.default_rng(0).uniform(-0.5, 0.5, 95 * 16_000).astype(np.float32)
    file = encode(tmp_path / "long.wav", wave[None], 16_000, "pcm_f32le")
    for start, end in ((25.0, 65.5), (30.0, 60.0), (59.9999, 90.0), (89.0, None)):
        piece = AudioRef(path=str(file), start=start, end=end).read()
        assert np.array_equal(piece, wave[round(start * 16_000) : None if end is None else round(end * 16_000)])


def test_damage_behind_a_piece_does_not_cost_it(tmp_path: Path) -> None:
    whole = encode(tmp_path / "whole.wav", tone(70), 16_000, "pcm_f32le").read_bytes()
    cut = tmp_path / "cut.wav"
    cut.write_bytes(whole[: len(whole) * 65 // 70])
    assert len(AudioRef(path=str(cut), start=1, end=3).read()) == 2 * 16_000
    with pytest.raises(MediaError, match=r"cut\.wav: the file is cut off"):
        AudioRef(path=str(cut), start=1, end=69).read()


def test_a_piece_behind_the_end_is_an_error(ramp: Path) -> None:
    with pytest.raises(MediaError, match=r"ramp\.wav: it ends at 5\.00 s, before the piece at 7 s"):
        AudioRef(path=str(ramp), start=7, end=8).read()


def test_bytes_are_read_like_a_file_and_called_by_their_name(ramp: Path) -> None:
    assert np.array_equal(AudioRef(data=ramp.read_bytes(), start=1).read(), RAMP[16_000:])
    with pytest.raises(MediaError, match=r"^row 7: the file is empty"):
        AudioRef(path="row 7", data=b"").read()


@pytest.mark.parametrize("name", FORMATS)
def test_a_header_tells_the_length(tmp_path: Path, name: str) -> None:
    ref = AudioRef(path=str(sample(tmp_path, name, 2.0)))
    exact = len(load_audio(Path(ref.name))) / 16_000
    bare = name in ("sound.aac", "sound.ts")  # their headers state nothing: FFmpeg estimates
    assert ref.seconds() == pytest.approx(exact, abs=0.3 if bare else 0.06)
    assert AudioRef(path=ref.path, start=0.5, end=1.25).seconds() == 0.75
    assert AudioRef(path=ref.path, start=0.5).seconds() == pytest.approx(ref.seconds() - 0.5)


def test_the_header_of_a_file_that_is_cut_off_is_not_believed(tmp_path: Path) -> None:
    file = sample(tmp_path, "faststart.m4a")
    file.write_bytes(file.read_bytes()[:-2_000])
    with pytest.raises(MediaError, match="cut off"):
        AudioRef(path=str(file)).seconds()


def test_an_error_names_file_row_and_column_in_every_process() -> None:
    error = DataError("a.tsv", "no text", row=3, column="text")
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error) == "a.tsv, row 3, column 'text': no text"
    assert (copy.file, copy.row, copy.column, copy.cause) == ("a.tsv", 3, "text", "no text")


def test_text_takes_no_time() -> None:
    pair = Sample(id="1", task="translate-text", text="नदी", language="en", target_language="hi", source_text="river")
    assert pair.seconds() == 0.0
