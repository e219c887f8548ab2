"""Which sound track is read, and what of it is mixed: nothing that is there goes unheard without a word."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from tests.media.recordings import Sound, encode, film_in, hz_of, retimed, tone, wav
from whisper_moe.generate.options import TranscribeOptions
from whisper_moe.media.audio import MediaError, load_audio, stream_audio
from whisper_moe.media.languages import LANGUAGES, spoken_code

RATE = 16_000


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
    for wrong in ("", " ", -1, "-1"):
        with pytest.raises(ValueError, match="track"):
            TranscribeOptions(track=wrong)


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
