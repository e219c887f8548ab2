"""Film in: frames by their timestamps, the right way up, within limits; what cannot be read is one ``MediaError``."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from data.miniatures import film, frames_of, number_of, picture
from hypothesis import given, settings
from hypothesis import strategies as st
from media.recordings import encode, sample, sound_track, tone
from media.recordings import film as sound_film

from whisper_moe.config_aside import FilmConfig
from whisper_moe.media import video
from whisper_moe.media.audio import MediaError
from whisper_moe.media.video import film_tokens, grid, header_seconds, load_film, tubelets

EVEN = [0.04 * number for number in range(20)]


@pytest.fixture(scope="module")
def even(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty pictures in 0.8 s."""
    return film(tmp_path_factory.mktemp("film") / "even.mov", EVEN)


def numbers(source: Path, rate: float, **options: Any) -> list[int]:
    return [number_of(frame) for frame in frames_of(source, rate, **options)]


def halved(width: int, height: int) -> tuple[int, int]:
    return width // 2, height // 2


def test_frames_are_rgb_in_their_order(even: Path) -> None:
    frames = frames_of(even)
    assert frames.dtype == np.uint8 and frames.shape == (20, 64, 96, 3)
    for number, frame in enumerate(frames):
        assert number_of(frame) == number
        assert np.abs(frame.astype(int) - picture(number)).mean() < 6
    assert np.array_equal(frames_of(io.BytesIO(even.read_bytes())), frames)


def shown(times: list[float], rate: float, seconds: float) -> list[int]:
    """The definition: at k / rate, the last picture whose time has come (to the millisecond)."""
    steps = max(1, int(np.ceil((seconds - 0.001) * rate - 1e-9)))
    return [max(n for n, time in enumerate(times) if time - 0.001 <= step / rate + 1e-9) for step in range(steps)]


@settings(max_examples=25, deadline=None)
@given(gaps=st.lists(st.integers(10, 300), min_size=1, max_size=18), rate=st.sampled_from([1.0, 5.0, 10.0, 12.5, 30.0]))
def test_a_variable_frame_rate_keeps_its_time(
    tmp_path_factory: pytest.TempPathFactory, gaps: list[int], rate: float
) -> None:
    times = [sum(gaps[:n]) / 1_000 for n in range(len(gaps) + 1)]
    file = film(tmp_path_factory.mktemp("vfr") / "vfr.mkv", times)
    got = numbers(file, rate)
    assert got == shown(times, rate, len(got) / rate)
    assert len(got) / rate == pytest.approx(times[-1] + 0.04, abs=0.04 + 1 / rate)


def patched_times(source: Path, target: Path, times: list[int]) -> Path:
    """An AVI-free way to repeat or turn back time: Matroska's block timestamps, overwritten byte by byte."""
    data = bytearray(source.read_bytes())
    position, blocks = data.find(b"\x1f\x43\xb6\x75"), []  # the first cluster
    while (position := data.find(b"\xa3", position)) >= 0:  # SimpleBlock: id, size, track 1 (0x81), 16-bit time
        length = 9 - data[position + 1].bit_length() if data[position + 1] else 9
        head = position + 1 + length
        if length <= 4 and head + 4 < len(data) and data[head] == 0x81:
            blocks.append(head + 1)
            position = head + 4
        else:
            position += 1
    assert len(blocks) == len(times)
    for block, time in zip(blocks, times, strict=True):
        data[block : block + 2] = time.to_bytes(2, "big", signed=True)
    target.write_bytes(data)
    return target


def test_negative_and_repeated_timestamps(tmp_path: Path) -> None:
    plain = film(tmp_path / "plain.mkv", [0, 0.04, 0.08, 0.12])
    negative = patched_times(plain, tmp_path / "negative.mkv", [-80, -40, 0, 40])
    assert numbers(negative, 25) == [0, 1, 2, 3]
    repeated = patched_times(plain, tmp_path / "repeated.mkv", [0, 40, 40, 80])
    assert numbers(repeated, 25) == [0, 2, 3], "of two pictures at one time, the later one is seen"


def test_timestamps_that_run_backwards_are_an_error(tmp_path: Path) -> None:
    plain = film(tmp_path / "plain.mkv", [0, 0.04, 0.08, 0.12])
    file = patched_times(plain, tmp_path / "back.mkv", [0, 400, 40, 120])
    with pytest.raises(MediaError, match=r"back\.mkv: its timestamps run backwards, from 0\.400 s to 0\.040 s"):
        frames_of(file)


# Rotation.


def turned(source: Path, target: Path, degrees: int) -> Path:
    """The film with a display matrix in its track header (ISO 14496-12, 8.3.2), clockwise as phones write it."""
    data = bytearray(source.read_bytes())
    matrix = data.find(b"tkhd") + 4 + 4 + 20 + 8 + 8
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    for number, value in enumerate((cos, sin, 0, -sin, cos, 0, 0, 0, 1)):
        point = round(value * 2 ** (30 if number % 3 == 2 else 16))
        data[matrix + 4 * number : matrix + 4 * number + 4] = point.to_bytes(4, "big", signed=True)
    target.write_bytes(data)
    return target


def test_a_quarter_turn_is_all_that_is_taken(even: Path, tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=r"turned by .*45°, which is no quarter turn"):
        frames_of(turned(even, tmp_path / "askew.mov", 45))


@pytest.mark.parametrize(("degrees", "corner"), [(90, "upper right"), (180, "lower right"), (270, "lower left")])
def test_a_film_is_turned_as_it_says(even: Path, tmp_path: Path, degrees: int, corner: str) -> None:
    """The white mark in the upper left corner goes clockwise."""
    file = turned(even, tmp_path / "turned.mov", degrees)
    frame = frames_of(file)[5]
    assert frame.shape == ((64, 96, 3) if degrees == 180 else (96, 64, 3))
    half = {name: np.array_split(frame, 2)[i] for i, name in enumerate(("upper", "lower"))}
    corners = {f"{v} {h}": np.array_split(half[v], 2, axis=1)[i] for v in half for i, h in enumerate(("left", "right"))}
    assert max(corners, key=lambda name: np.percentile(corners[name], 99)) == corner
    assert frames_of(file, fit=halved)[5].shape[:2] == tuple(side // 2 for side in frame.shape[:2])


# Sizes and limits.


def test_frames_are_of_the_size_that_is_asked_for(even: Path) -> None:
    assert frames_of(even, fit=halved).shape == (20, 32, 48, 3)
    assert numbers(even, 25, fit=halved) == list(range(20))


def test_limits_are_kept_while_decoding(even: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"MAX_PIXELS": (6_143, 25), "MAX_DECODED": (19, 0.1), "MAX_BYTES": (20 * 64 * 96 * 3 - 1, 25)}
    said = ["frames of 96×64 are over the limit of 6,143 pixels", "limit of 19 frames", "limit of 368,639 bytes"]
    for (name, (limit, rate)), words in zip(limits.items(), said, strict=True):
        monkeypatch.setattr(video, name, limit)
        with pytest.raises(MediaError, match=words):
            frames_of(even, rate)
        monkeypatch.setattr(video, name, limit + 1)
        assert len(frames_of(even, rate)) == (20 if rate == 25 else 1)
    gap = film(tmp_path / "gap.mkv", [0, 30_000])
    reformatted: list[object] = []
    monkeypatch.setattr(video, "_picture", lambda *frame: reformatted.append(frame))
    with pytest.raises(MediaError, match="more than the limit of"):
        frames_of(gap)
    assert reformatted == [], "a gap of hours is refused before a picture is made for it"


def test_a_size_that_changes_is_an_error(tmp_path: Path) -> None:
    files = [
        film(tmp_path / f"{n}.mjpeg.avi", [0, 0.04], width=w, height=64, codec="mjpeg") for n, w in enumerate((96, 48))
    ]
    both = tmp_path / "both.mkv"
    with av.open(str(files[0])) as first, av.open(str(files[1])) as second, av.open(str(both), "w") as new:
        track = new.add_stream_from_template(first.streams.video[0])
        time = 0
        for old in (first, second):
            for packet in old.demux(old.streams.video[0]):
                if packet.size:
                    packet.stream, packet.time_base = track, Fraction(1, 1_000)
                    packet.pts = packet.dts = time
                    time += 40
                    new.mux(packet)
    with pytest.raises(
        MediaError, match=r"its pictures change from 96×64 turned by 0° to 48×64 turned by 0° at 0\.08 s"
    ):
        frames_of(both)


# What cannot be read.


def test_bad_files_are_one_error_with_name_and_cause(even: Path, tmp_path: Path) -> None:
    whole = even.read_bytes()
    middle = bytearray(whole)
    start = whole.find(b"mdat") + 4
    middle[start + 200 : start + 2_000] = bytes(1_800)
    no_index = whole[: whole.find(b"moov") - 4]
    (tmp_path / "sound.m4a").write_bytes(sample(tmp_path, "aac.m4a").read_bytes())
    sound_film(tmp_path / "cover.m4a", tone(1.0, 44_100), pictures=1, codec="png")
    cases = {
        "empty.mov": (b"", "the file is empty"),
        "text.mov": (b"no film at all\n" * 99, "not sound or film"),
        "list.mov": (b"ffconcat version 1.0\nfile 'even.mov'\n", "a playlist"),
        "index.mov": (no_index, "its index (moov) is missing"),
        "damaged.mov": (bytes(middle), "the film is damaged"),
        "cut.mov": (shortened(even), "cut off"),
        "sound.m4a": (None, "it has no film track"),
        "cover.m4a": (None, "it has no film track, only a cover picture"),
        "gone.mov": (None, "no such file or directory"),
    }
    for name, (data, cause) in cases.items():
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(MediaError) as caught:
            frames_of(tmp_path / name)
        assert cause in caught.value.cause, name
        assert str(caught.value).startswith(str(tmp_path / name)) and "\n" not in str(caught.value)


def shortened(mov: Path) -> bytes:
    """The index first, then the film, of which the end is missing."""
    moved = mov.with_name("faststart.mov")
    with av.open(str(mov)) as old, av.open(str(moved), "w", options={"movflags": "faststart"}) as new:
        track = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(old.streams.video[0]):
            if packet.size:
                packet.stream = track
                new.mux(packet)
    return moved.read_bytes()[:-600]


def test_a_film_without_a_frame_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "none.mkv"
    with av.open(str(file), "w") as container:
        track = container.add_stream("mpeg4", rate=25)
        assert isinstance(track, av.VideoStream)
        track.width, track.height, track.pix_fmt = 64, 64, "yuv420p"
        audio = sound_track(container, "flac", 16_000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1_600), np.int16), "s16", "mono")
        frame.sample_rate, frame.pts = 16_000, 0
        container.start_encoding()
        container.mux(audio.encode(frame))
        container.mux(audio.encode(None))
    with pytest.raises(MediaError, match=r"none\.mkv: it has a film track, and no frame in it"):
        frames_of(file)


@pytest.mark.parametrize("rate", [0, float("nan"), 61])
def test_rates_that_mean_nothing_are_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="rate"):
        FilmConfig(rate=rate)


def test_headers_tell_how_long_a_film_is(even: Path, tmp_path: Path) -> None:
    assert header_seconds(even) == pytest.approx(0.8, abs=0.001)
    both = sound_film(tmp_path / "both.mp4", tone(3.0, 44_100), pictures=25)
    assert header_seconds(both) == pytest.approx(3.0, abs=0.05), "sound, where there is any"
    assert header_seconds(encode(tmp_path / "s.mka", tone(1.5), 16_000, "flac")) == pytest.approx(1.5, abs=0.01)
    (tmp_path / "text.wav").write_text("text" * 100)
    with pytest.raises(MediaError, match=r"text\.wav: not sound or film"):
        header_seconds(tmp_path / "text.wav")


def test_a_real_film_is_read(shared_data: Path) -> None:
    file = shared_data / "sign-avatar" / "assets" / "0.mp4"
    frames = frames_of(file, 10, fit=lambda width, height: (round(width * 90 / height), 90))
    assert frames.shape == (15, 90, 160, 3) and header_seconds(file) == pytest.approx(1.458, abs=0.001)
    assert frames.std() > 10 and np.abs(np.diff(frames.astype(int), axis=0)).mean() > 0.1


# Tubelets.

FILM = FilmConfig(rate=25, frames=2, patch=8, patches=24, tokens=240)


@given(width=st.integers(1, 5_000), height=st.integers(1, 5_000), patches=st.integers(1, 64))
def test_a_picture_keeps_its_proportions_as_far_as_patches_go(width: int, height: int, patches: int) -> None:
    rows, columns = grid(width, height, patches)
    assert 1 <= rows * columns <= patches and grid(height, width, patches) == (columns, rows)
    if max(width, height) <= 2 * min(width, height) and patches >= 16:
        assert 0.6 < (columns / rows) / (width / height) < 1.7
        assert rows * columns > 0.55 * patches


def test_pictures_become_tubelets(even: Path) -> None:
    frames = load_film(even, FILM)
    assert frames.shape == (20, 32, 48, 3)
    cut = tubelets(frames, FILM)
    assert cut.shape == (10, 4, 6, 2 * 8 * 8 * 3) and film_tokens(even, FILM) == 240
    assert np.array_equal(cut[3, 1, 5].reshape(2, 8, 8, 3), frames[6:8, 8:16, 40:48])
    odd = tubelets(frames[:3], FILM)
    assert np.array_equal(odd[1, 0, 0].reshape(2, 8, 8, 3), frames[[2, 2], :8, :8]), (
        "the last picture fills the tubelet"
    )


def test_any_film_fits_its_tokens(even: Path) -> None:
    few = FILM.model_copy(update={"tokens": 100})
    frames = load_film(even, few)
    most = few.slots * few.frames
    assert most == 8 and len(frames) == 20 and tubelets(frames, few).shape[0] == few.slots
    sparse = load_film(even, few.model_copy(update={"tokens": 24}))
    assert np.array_equal(sparse, frames[::4]), "of more than four times what is needed, every second, or every fourth"
    still = film(even.parent / "still.mkv", [0.0, 3_000.0])
    assert len(load_film(still, few)) <= 4 * most
    long = np.arange(50, dtype=np.uint8)[:, None, None, None] * np.ones((32, 48, 3), np.uint8)
    kept = tubelets(long, few)
    assert kept[:, 0, 0].reshape(8, -1)[:, 0].tolist() == [0, 6, 12, 18, 25, 31, 37, 43]


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_a_phones_film_is_that_of_the_upright_one(even: Path, tmp_path: Path, degrees: int) -> None:
    upright, lying = (
        load_film(each, FILM).astype(int) for each in (even, turned(even, tmp_path / "phone.mov", degrees))
    )
    assert np.abs(np.rot90(upright, -degrees // 90, axes=(1, 2)) - lying).max() <= 2
