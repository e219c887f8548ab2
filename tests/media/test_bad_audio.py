"""Sound that cannot be read: one ``MediaError`` that names the file and the cause, after all that could be decoded."""

from __future__ import annotations

import io
import pickle
import random
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.media.recordings import FORMATS, encode, film, sample, tone, wav
from whisper_moe.media.audio import MediaError, load_audio, stream_audio

SHORT_WAV = wav(tone(0.5).T)
NAN, INF = tone(2).T.copy(), tone(2).T.copy()
NAN[24_000], INF[24_000] = np.nan, -np.inf

BAD_FILES = {
    "empty.wav": (b"", "empty"),
    "one-byte.wav": (b"R", "format that can be read"),
    "text.wav": (b"This is no sound at all.\n" * 100, "format that can be read"),
    "truncated-header.wav": (SHORT_WAV[:30], "header is damaged"),
    "rate-0.wav": (wav(tone(0.5).T, 0), "header is damaged"),
    "rate-1.wav": (wav(tone(0.5).T, 1), "1 Hz"),
    "rate-2e31.wav": (wav(tone(0.5).T, 2**31 - 1), "2147483647 Hz"),
    "rate-2e32.wav": (wav(tone(0.5).T, 2**32 - 1), "header is damaged"),
    "channels-0.wav": (wav(tone(0.5).T, channels=0), "channels"),
    "channels-65.wav": (wav(np.zeros((800, 65), np.int16)), "65 channels"),
    "channels-65535.wav": (wav(np.zeros((65_535, 2), np.int16), channels=65_535), "channels"),
    "nan.wav": (wav(NAN), "NaN"),
    "infinite.wav": (wav(INF), "infinite"),
    "overflow.wav": (wav(np.full((1_600, 1), 1e300)), "infinite"),
    "playlist.m3u8": (b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\ngood.ts\n#EXT-X-ENDLIST\n", "format that can be"),
    "playlist.wav": (b"ffconcat version 1.0\nfile 'good.wav'\n", "playlist"),
    "session.wav": (b"v=0\no=- 0 0 IN IP4 127.0.0.1\nm=audio 5004 RTP/AVP 0\n", "format that can be read"),
    "picture.wav": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\1\0\0\0\1\x08\2\0\0\0", "playlist, or another format"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_one_error_with_its_name_and_cause(tmp_path: Path, name: str) -> None:
    data, cause = BAD_FILES[name]
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(MediaError) as caught:
        load_audio(path)
    assert cause in caught.value.cause
    assert str(caught.value).startswith(f"{path}: {caught.value.cause}") and "\n" not in str(caught.value)


def test_the_good_twin_of_every_hand_made_file_is_read() -> None:
    """Otherwise the table above could fail for the wrong reason."""
    assert len(load_audio(io.BytesIO(SHORT_WAV))) == 8_000
    assert len(load_audio(io.BytesIO(wav(tone(2).T)))) == 32_000
    assert len(load_audio(io.BytesIO(wav(np.zeros((800, 64), np.int16))))) == 800


def test_playlists_that_ffmpeg_would_follow_are_refused(tmp_path: Path) -> None:
    for name in ("good.ts", "good.wav"):
        codec = "aac" if name.endswith("ts") else "pcm_s16le"
        encode(tmp_path / name, tone(1, 44_100), 44_100, codec)
    for name in ("playlist.m3u8", "playlist.wav"):
        path = tmp_path / name
        path.write_bytes(BAD_FILES[name][0])
        with av.open(str(path)) as container:
            assert (
                sum(frame.samples for frame in container.decode(audio=0)) > 40_000
            )  # FFmpeg alone opens the other file
        with pytest.raises(MediaError):
            load_audio(path)


def test_missing_files_directories_and_urls_are_errors_of_their_own(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="no such file"):
        load_audio(tmp_path / "nowhere.m4a")
    with pytest.raises(MediaError, match="is a directory"):
        load_audio(tmp_path)
    with pytest.raises(MediaError, match="no such file"):
        load_audio("http://169.254.169.254/sound.wav")


def test_a_disk_that_fails_while_reading_is_an_error(tmp_path: Path) -> None:
    class BadDisk(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() > 1_000_000:
                raise OSError(5, "Input/output error")
            return super().read(size)

    with pytest.raises(MediaError, match=r"tape: input/output error \(decoding stopped after 5\.\d\d s\)"):
        load_audio(BadDisk(sample(tmp_path, "s16.wav", 8).read_bytes()), name="tape")


def test_a_header_that_claims_four_gigabytes_and_has_one_second_is_cut_off() -> None:
    with pytest.raises(MediaError, match=r"cut off: at least 3,999,.* \(decoding stopped after 1\.00 s\)"):
        load_audio(io.BytesIO(wav(tone(1).T, claimed_bytes=4_000_000_000)))


def test_an_m4a_without_its_index_says_that_the_recording_was_cut_off(tmp_path: Path) -> None:
    data = sample(tmp_path, "aac.m4a").read_bytes()
    with pytest.raises(MediaError, match="moov"):
        load_audio(io.BytesIO(data[: data.index(b"moov") - 4]), name="phone.m4a")


@pytest.mark.parametrize("samples", [[], [0.25]])
def test_next_to_nothing_is_sound_and_no_error(samples: list[float]) -> None:
    heard = load_audio(io.BytesIO(wav(np.array(samples, np.float32)[:, None])))
    np.testing.assert_allclose(heard, samples)


def test_a_film_without_sound_says_so(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="no sound track"):
        load_audio(film(tmp_path / "silent.mov", None))


@pytest.mark.parametrize("name", ["faststart.m4a", "fragments.mp4", "s16.wav", "sound.flac", "opus.ogg", "flac.mka"])
def test_half_a_file_gives_its_half_and_then_the_error(tmp_path: Path, name: str) -> None:
    path = sample(tmp_path, name, 3.0)
    whole, data = load_audio(path), path.read_bytes()
    heard: list[np.ndarray] = []
    with pytest.raises(MediaError) as caught:
        heard.extend(stream_audio(io.BytesIO(data[: len(data) // 2]), name=name))
    sound = np.concatenate(heard)
    assert caught.value.seconds == pytest.approx(len(sound) / 16_000, abs=0.01) == pytest.approx(1.4, abs=0.7)
    assert f"{name}: " in str(caught.value) and f"after {caught.value.seconds:.2f} s" in str(caught.value)
    inner = slice(0, len(sound) - 800)  # the resampler's last 50 ms lean on what came next
    np.testing.assert_allclose(sound[inner], whole[: len(sound)][inner], atol=1e-3)


STATED = sorted(name for name in FORMATS if name not in ("sound.aac", "sound.ts"))
"""The formats that say how long they are."""


@pytest.mark.parametrize("name", STATED)
def test_no_cut_goes_unnoticed_in_a_format_that_states_its_length(tmp_path: Path, name: str) -> None:
    data = sample(tmp_path, name).read_bytes()
    cuts = [round(len(data) * share) for share in np.linspace(0.02, 0.92, 10)]
    for cut in cuts:
        with pytest.raises(MediaError):
            load_audio(io.BytesIO(data[:cut]))


@pytest.mark.parametrize("name", ["sound.aac", "sound.ts"])
def test_a_bare_stream_may_be_cut_anywhere(tmp_path: Path, name: str) -> None:
    data = sample(tmp_path, name).read_bytes()
    sound = load_audio(io.BytesIO(data[len(data) // 4 : len(data) * 3 // 4]))
    assert len(sound) == pytest.approx(16_000, abs=2_400)


@pytest.mark.parametrize("name", ["aac.m4a", "alac.m4a", "sound.flac", "flac.mka", "opus.ogg", "flac.ogg", "sound.wv"])
def test_flipped_bytes_stop_the_decoding_where_they_are(tmp_path: Path, name: str) -> None:
    data = bytearray(sample(tmp_path, name).read_bytes())
    rng = random.Random(0)
    for _ in range(30):
        data[rng.randrange(len(data) // 3, len(data) // 2)] ^= rng.randrange(1, 256)
    with pytest.raises(MediaError, match="the sound is damaged") as caught:
        load_audio(io.BytesIO(bytes(data)), name=name)
    assert caught.value.seconds < 1.2


@pytest.mark.parametrize("name", ["sound.flac", "flac.ogg", "sound.wv"])
def test_one_changed_byte_is_noticed_where_there_are_checksums(tmp_path: Path, name: str) -> None:
    data = sample(tmp_path, name).read_bytes()
    for at in range(len(data) // 4, len(data) * 3 // 4, len(data) // 30):
        with pytest.raises(MediaError, match="damaged"):
            load_audio(io.BytesIO(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]))


@pytest.mark.parametrize("name", ["opus.ogg", "flac.ogg"])
def test_a_page_that_is_gone_from_an_ogg_file_is_missed(tmp_path: Path, name: str) -> None:
    data = sample(tmp_path, name, 8).read_bytes()
    pages = [at for at in range(len(data)) if data.startswith(b"OggS", at)]
    start, end = pages[-4], pages[-3]
    with pytest.raises(MediaError, match=r"damaged: \d\.\d+ s of it are missing"):
        load_audio(io.BytesIO(data[:start] + data[end:]))


def test_what_came_before_a_sample_that_is_no_number_is_handed_out() -> None:
    heard: list[np.ndarray] = []
    with pytest.raises(MediaError, match="NaN") as caught:
        heard.extend(stream_audio(io.BytesIO(wav(NAN))))
    np.testing.assert_array_equal(np.concatenate(heard), NAN[:24_000, 0])
    assert caught.value.seconds == pytest.approx(1.5)


def test_more_damage_than_a_seam_stops_a_bare_stream(tmp_path: Path) -> None:
    data = bytearray(sample(tmp_path, "sound.aac").read_bytes())
    rng = random.Random(0)
    for at in range(len(data) // 4, len(data) * 3 // 4, 100):
        data[at + rng.randrange(7, 90)] ^= rng.randrange(1, 256)
    with pytest.raises(MediaError, match="damaged"):
        load_audio(io.BytesIO(bytes(data)))


@pytest.fixture(scope="module")
def small_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("small")
    return {name: sample(folder, name, 0.3).read_bytes() for name in FORMATS}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_whatever_the_bytes_the_answer_is_sound_or_a_media_error(
    small_files: dict[str, bytes], data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(sorted(small_files)))
    content = bytearray(small_files[name])
    place = st.one_of(st.integers(0, 400), st.integers(0, len(content) - 1))
    for at, value in data.draw(st.lists(st.tuples(place, st.binary(min_size=1, max_size=8)), max_size=6)):
        content[at : at + len(value)] = value
    message = "fine"
    try:
        for block in islice(stream_audio(io.BytesIO(bytes(content))), 99):  # not hours of silence
            assert len(block) and np.abs(block).max() <= 1  # false for NaN
    except MediaError as error:
        message = str(error)
    assert message and "\n" not in message


def test_a_track_that_begins_in_the_middle_is_damage(small_files: dict[str, bytes]) -> None:
    content = bytearray(small_files["sound.ts"])
    content[1882] = 1  # the number of the track that the eleventh packet is of
    with pytest.raises(MediaError, match="a track begins in the middle"):
        list(stream_audio(io.BytesIO(bytes(content))))


def test_memory_does_not_grow_with_the_length(tmp_path: Path) -> None:
    path = encode(tmp_path / "bomb.flac", np.zeros((1, 900 * 8_000), np.float32), 8_000, "flac")
    assert path.stat().st_size < 300_000  # a quarter of an hour
    code = (
        "import sys, resource\n"
        "from whisper_moe.media.audio import stream_audio\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "blocks = stream_audio(sys.argv[1])\n"
        "next(blocks)\n"
        "before, count = peak(), 1 + sum(1 for _ in blocks)\n"
        "print(count, peak() - before)"
    )
    result = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    count, kilobytes = map(int, result.stdout.split())
    assert count >= 90
    assert kilobytes < 8_000  # the sound itself is 57,600 kB


def test_nothing_but_the_error_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = sample(tmp_path, "aac.m4a").read_bytes()
    with pytest.raises(MediaError):
        load_audio(io.BytesIO(data[:9_000] + bytes(500) + data[9_500:]))
    assert capfd.readouterr() == ("", "")


def test_an_error_costs_the_next_file_nothing_and_survives_a_process_border(tmp_path: Path) -> None:
    good = sample(tmp_path, "aac.m4a")
    expected = load_audio(good)
    with pytest.raises(MediaError) as caught:
        load_audio(io.BytesIO(good.read_bytes()[:-9_000]), name="bad.m4a")
    np.testing.assert_array_equal(load_audio(good), expected)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert str(copy) == str(caught.value) and copy.name == "bad.m4a"


def test_an_unfinished_stream_leaves_no_file_open(tmp_path: Path) -> None:
    path = sample(tmp_path, "s16.wav")
    stream = stream_audio(path)
    next(stream)
    open_files = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink() and link.readlink() == path]
    assert len(open_files) == 1
    stream.close()
    shutil.rmtree(tmp_path)
    assert not [
        link for link in Path("/proc/self/fd").iterdir() if link.is_symlink() and path.name in str(link.readlink())
    ]
