"""What a file's own framing promises, against what is there."""

from __future__ import annotations

import io
from pathlib import Path

import av
import pytest

from tests.media.recordings import FORMATS, sample, tone, wav
from whisper_moe.media.containers import CONTAINERS, SOUND_CODECS, missing_bytes, ogg_is_damaged

EXACT = ["aac.m4a", "faststart.m4a", "fragments.mp4", "pcm.mov", "opus.webm", "flac.mka", "sound.caf", "opus.ogg"]
"""Formats whose framing ends with the file, to the byte."""
SILENT = ["sound.flac", "sound.wv", "sound.aac", "sound.ts"]
"""Formats whose framing says nothing about bytes."""


@pytest.mark.parametrize("name", FORMATS)
def test_nothing_is_missing_from_a_whole_file(tmp_path: Path, name: str) -> None:
    assert missing_bytes(io.BytesIO(sample(tmp_path, name).read_bytes())) == 0


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("cut", [1, 300])
def test_every_missing_byte_is_counted(tmp_path: Path, name: str, cut: int) -> None:
    data = sample(tmp_path, name).read_bytes()
    if name == "aac.m4a":  # the index comes last: what is missing is part of it
        assert data.rindex(b"moov") > data.rindex(b"mdat")
    last_box = 67 if name == "fragments.mp4" and cut > 67 else 0  # nothing announces a box that is missing as a whole
    assert missing_bytes(io.BytesIO(data[:-cut])) == cut - last_box


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in SILENT])
def test_half_a_file_lacks_its_other_half(tmp_path: Path, name: str) -> None:
    data = sample(tmp_path, name).read_bytes()
    missing = missing_bytes(io.BytesIO(data[: len(data) // 2]))
    # Of Ogg only the last page's end is known; RIFF and AIFF are given 1 KiB, MP3 1 %.
    assert 0 < missing <= len(data) / 2 + 1
    assert missing > len(data) / 2 - 1_200 or name.endswith(".ogg")


@pytest.mark.parametrize("name", FORMATS)
def test_a_tag_behind_the_sound_is_not_a_promise(tmp_path: Path, name: str) -> None:
    data = sample(tmp_path, name).read_bytes() + b"TAG" + b"title".ljust(125, b"\0")
    assert missing_bytes(io.BytesIO(data)) == 0
    assert not ogg_is_damaged(io.BytesIO(data))


@pytest.mark.parametrize("claimed", [0, 0x7FFF_F000, 0x8000_0000, 0xFFFF_FFFF])
def test_a_size_written_to_a_pipe_promises_nothing(claimed: int) -> None:
    assert missing_bytes(io.BytesIO(wav(tone(0.1).T, claimed_bytes=claimed))) == 0


def test_a_size_that_is_a_little_off_is_a_sloppy_writer() -> None:
    samples = tone(0.1).T
    assert missing_bytes(io.BytesIO(wav(samples, claimed_bytes=samples.nbytes + 44))) == 0
    assert missing_bytes(io.BytesIO(wav(samples, claimed_bytes=samples.nbytes + 5_000))) > 3_000


@pytest.mark.parametrize("size", [1, 2**32 - 1])
def test_absurd_sizes_are_missing_bytes_and_not_a_crash(tmp_path: Path, size: int) -> None:
    data = bytearray(sample(tmp_path, "faststart.m4a").read_bytes())
    mdat = data.index(b"mdat")
    data[mdat - 4 : mdat] = size.to_bytes(4, "big")  # 1: the next eight bytes are a 64-bit size, here sound
    assert missing_bytes(io.BytesIO(bytes(data))) > 2**30
    path = tmp_path / "absurd.m4a"
    path.write_bytes(data)
    with path.open("rb") as file:
        assert missing_bytes(file) > 2**30


@pytest.mark.parametrize("name", ["opus.ogg", "flac.ogg"])
def test_one_changed_bit_anywhere_damages_an_ogg_page(tmp_path: Path, name: str) -> None:
    data = sample(tmp_path, name).read_bytes()
    for at in range(0, len(data), len(data) // 40):
        assert ogg_is_damaged(io.BytesIO(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])), at


def test_the_allow_lists_name_what_ffmpeg_knows() -> None:
    demuxers = {part for name in av.formats_available for part in name.split(",")}
    assert set(CONTAINERS.split(",")) <= demuxers
    assert av.codecs_available >= SOUND_CODECS
    assert {av.Codec(name, "r").type for name in SOUND_CODECS} == {"audio"}
    assert not {"hls", "concat", "dash", "sdp", "image2", "lavfi"} & set(CONTAINERS.split(","))
