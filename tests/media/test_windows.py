"""Where long sound is cut, and what counts as speech."""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whisper_moe.config import SAMPLE_RATE
from whisper_moe.media import windows
from whisper_moe.media.audio import load_audio
from whisper_moe.media.windows import (
    Samples,
    Spans,
    Window,
    cut_clips,
    cut_windows,
    drop_silence,
    is_silent,
    sounding,
    speech_spans,
)


def noise(seconds: float, level: float = 0.1, seed: int = 0) -> Samples:
    return (np.random.default_rng(seed).standard_normal(round(seconds * SAMPLE_RATE)) * level).astype(np.float32)


def syllables(seconds: float, level: float = 0.2, seed: int = 0) -> Samples:
    """Noise in bursts of 130 ms with closures of 70 ms, 40 dB apart: speech without a pause."""
    sound = noise(seconds, level, seed)
    inside = (np.arange(len(sound)) % 3_200) < 2_080
    return np.where(inside, sound, sound * np.float32(0.01))


def with_pauses(pauses: list[tuple[float, float]], seconds: float, floor: float = 1e-3) -> Samples:
    """Speech with (start, end) pauses that only room noise fills."""
    sound = syllables(seconds)
    for start, end in pauses:
        a, b = round(start * SAMPLE_RATE), round(end * SAMPLE_RATE)
        sound[a:b] = noise((b - a) / SAMPLE_RATE, floor, seed=7)
    return sound


def split(sound: Samples, size: int) -> list[Samples]:
    return [sound[i : i + size] for i in range(0, len(sound), size)]


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9_000), max_size=12),
    seed=st.integers(0, 2**32 - 1),
    max_seconds=st.sampled_from([0.01, 0.1, 0.33, 1.0]),
    silent=st.booleans(),
)
def test_every_sample_is_in_exactly_one_window(lengths: list[int], seed: int, max_seconds: float, silent: bool) -> None:
    rng = np.random.default_rng(seed)
    level = 0.0 if silent else 10.0 ** rng.integers(-6, 1)
    blocks = [(rng.standard_normal(n) * level).astype(np.float32) for n in lengths]
    cuts = list(cut_windows(blocks, max_seconds=max_seconds))
    whole = np.concatenate([np.zeros(0, np.float32), *blocks])
    np.testing.assert_array_equal(np.concatenate([np.zeros(0, np.float32), *(w.samples for w in cuts)]), whole)
    starts = np.cumsum([0, *(len(w.samples) for w in cuts)])
    for window, start in zip(cuts, starts, strict=False):
        assert 0 < len(window.samples) <= round(max_seconds * SAMPLE_RATE)
        assert window.start == start / SAMPLE_RATE
        assert window.end == pytest.approx(window.start + window.duration)
    if len(whole) <= round(max_seconds * SAMPLE_RATE):
        assert len(cuts) == (1 if len(whole) else 0)


@pytest.mark.parametrize("seconds", [0.5, 5, 13])
def test_what_came_before_damage_comes_out_before_the_error(seconds: float) -> None:
    sound = syllables(seconds)

    def damaged() -> Iterator[Samples]:
        yield from split(sound, 4_000)
        raise ValueError("cut off")

    windows = cut_windows(damaged(), max_seconds=5)
    found: list[Samples] = []
    while sum(map(len, found)) < len(sound):
        found.append(next(windows).samples)
    np.testing.assert_array_equal(np.concatenate(found), sound)
    with pytest.raises(ValueError, match="cut off"):
        next(windows)


@pytest.mark.parametrize("size", [1_601, 16_000, 480_000, 10**9])
def test_the_cuts_do_not_depend_on_the_blocks(size: int) -> None:
    sound = with_pauses([(3.2, 3.6), (8.1, 8.5), (12, 12.4)], 15)
    expected = [(w.start, len(w.samples)) for w in cut_windows([sound], max_seconds=5)]
    assert len(expected) > 3
    cuts = cut_windows(split(sound, size), max_seconds=5)
    assert [(w.start, len(w.samples)) for w in cuts] == expected


def test_the_longest_of_several_pauses_is_taken_and_the_later_of_equal_ones() -> None:
    first, *_ = cut_windows([with_pauses([(21, 21.4), (23, 24), (27, 27.4)], 40)])
    assert first.end == pytest.approx(23.5, abs=0.1)
    silent = [(21.0, 21.5), (26.0, 26.5)]
    first, *_ = cut_windows([with_pauses(silent, 40, floor=0.0)])
    assert first.end == pytest.approx(26.25, abs=0.05)


def test_the_closures_inside_words_are_no_pauses() -> None:
    """70 ms of 40 dB less are everywhere; 400 ms of only 20 dB less are the pause."""
    sound = with_pauses([(25.0, 25.4)], 40, floor=0.02)
    first, *_ = cut_windows([sound])
    assert 25.0 < first.end < 25.4


def test_the_end_of_the_searched_stretch_is_not_quiet_by_itself() -> None:
    sound = noise(40, 0.1)
    sound[22 * SAMPLE_RATE : 23 * SAMPLE_RATE] *= 0.5
    first, *_ = cut_windows([sound])
    assert 22 < first.end < 23


def test_streaming_holds_one_window_and_one_block() -> None:
    read = 0

    def blocks():
        nonlocal read
        for i in range(20):
            read += 1
            yield noise(1, seed=i)

    for count, window in enumerate(cut_windows(blocks(), max_seconds=3), start=1):
        assert read <= window.end + 4, count
    assert read == 20


def test_windows_without_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="max_seconds"):
        next(cut_windows([noise(1)], max_seconds=0))


@pytest.mark.parametrize(
    ("before", "after", "kept"),
    [(1.9, 1.9, (0.0, 5.8)), (2.005, 0.0, (2.0, 4.005)), (0.0, 4.0, (0.0, 2.0)), (3.0, 2.5, (3.0, 5.0))],
)
def test_only_digital_silence_of_two_seconds_or_more_is_taken_off_the_ends(
    before: float, after: float, kept: tuple[float, float]
) -> None:
    sound = np.full(2 * SAMPLE_RATE, 2e-4, np.float32)  # as quiet as can be without being silent
    sound[SAMPLE_RATE // 4 : -SAMPLE_RATE // 4] = 0.0
    wave = np.concatenate([np.zeros(round(s * SAMPLE_RATE), np.float32) + 5e-5 for s in (before, after)])
    wave = np.insert(wave, round(before * SAMPLE_RATE), sound)
    window = sounding(Window(60.0, wave))
    assert (window.start, window.end) == pytest.approx((60.0 + kept[0], 60.0 + kept[1]))
    assert not len(sounding(Window(1.0, wave * 0)).samples)


@pytest.mark.parametrize("size", [1_000, 16_000, 700_000])
@pytest.mark.parametrize(
    ("times", "stretches"),
    [
        ((), [(0, 40)]),
        ((0,), [(0, 40)]),
        ((12.5,), [(12.5, 40)]),
        ((1, 2, 2, 3.25, 30, 99), [(1, 2), (2, 3.25), (30, 40)]),
        ((5, 30, 50, 60), [(5, 30)]),
    ],
)
def test_clips_are_cut_each_for_itself_and_keep_their_times(
    times: tuple[float, ...], stretches: list[tuple[float, float]], size: int
) -> None:
    wave = np.random.default_rng(0).normal(0, 0.1, 40 * SAMPLE_RATE).astype(np.float32)
    blocks = (wave[i : i + size] for i in range(0, len(wave), size))
    found = list(cut_clips(blocks, times, max_seconds=8.0))
    expected = [
        Window(start + window.start, window.samples)
        for start, end in stretches
        for window in cut_windows([wave[round(start * SAMPLE_RATE) : round(end * SAMPLE_RATE)]], max_seconds=8.0)
    ]
    assert [window.start for window in found] == [window.start for window in expected]
    assert all(np.array_equal(a.samples, b.samples) for a, b in zip(found, expected, strict=True))


def test_silence_is_a_matter_of_the_peak() -> None:
    sound = np.zeros(16_000, np.float32)
    assert is_silent(sound) and is_silent(sound[:0])
    sound[5] = -3 / 32_768
    assert is_silent(sound)
    sound[5] = -4 / 32_768
    assert not is_silent(sound)


def covered(spans: Spans, length: int) -> np.ndarray:
    mask = np.zeros(length, bool)
    for start, end in spans:
        mask[start:end] = True
    return mask


@pytest.mark.parametrize("floor", [0.0, 1e-4, 1e-3, 5e-3])
@pytest.mark.parametrize("gain", [0.01, 1.0])
def test_speech_is_kept_and_pauses_are_dropped_at_any_gain(floor: float, gain: float) -> None:
    sound = with_pauses([(0, 3), (8, 12), (17, 20)], 20, floor) * np.float32(gain)
    edges = [edge / SAMPLE_RATE for span in speech_spans(sound) for edge in span]
    assert edges == pytest.approx([3 - 0.3, 8 + 0.3, 12 - 0.3, 17 + 0.3], abs=0.1)


@pytest.mark.parametrize("seed", range(3))
def test_speech_without_a_pause_is_kept_whole(seed: int) -> None:
    sound = syllables(20, seed=seed)
    assert covered(speech_spans(sound), len(sound)).mean() > 0.99


def test_a_voice_far_from_the_microphone_is_kept_beside_a_near_one() -> None:
    sound = with_pauses([(5, 8), (13, 20)], 20)
    sound[15 * SAMPLE_RATE : 17 * SAMPLE_RATE] = syllables(2, level=0.01)  # 26 dB below the near one
    mask = covered(speech_spans(sound), len(sound))
    assert mask[15 * SAMPLE_RATE : 17 * SAMPLE_RATE].all() and not mask[6 * SAMPLE_RATE : 7 * SAMPLE_RATE].any()


def test_what_level_cannot_decide_is_kept() -> None:
    for level in (0.3, 1e-3):
        sound = noise(10, level)
        assert speech_spans(sound) == [(0, len(sound))]


def test_short_pauses_stay_and_clicks_go() -> None:
    sound = with_pauses([(0, 4), (6, 6.8), (9, 20)], 20)
    sound[15 * SAMPLE_RATE : 15 * SAMPLE_RATE + 160] = 0.5
    spans = speech_spans(sound)
    assert len(spans) == 1
    mask = covered(spans, len(sound))
    assert mask[round(6.4 * SAMPLE_RATE)] and not mask[14 * SAMPLE_RATE : 16 * SAMPLE_RATE].any()


def test_dropping_silence_keeps_the_place_of_what_stays() -> None:
    sound = with_pauses([(3, 6), (9, 12), (15, 18)], 20)
    whole = list(cut_windows([sound], max_seconds=10))
    kept = list(drop_silence([*whole, Window(20.0, np.zeros(16_000, np.float32))]))
    assert len(kept) >= 4 and sum(w.duration for w in kept) < 15
    for window in kept:
        start = round(window.start * SAMPLE_RATE)
        np.testing.assert_array_equal(window.samples, sound[start : start + len(window.samples)])
    chosen = list(drop_silence(whole, spans=lambda samples: [(0, 10), (20, 30)]))
    assert [len(w.samples) for w in chosen] == [10] * 2 * len(whole)


def test_without_the_extra_the_message_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable = builtins.__import__

    def hidden(name: str, *rest, **named):
        if name.startswith("silero_vad"):
            raise ModuleNotFoundError("No module named 'silero_vad'", name="silero_vad")
        return real(name, *rest, **named)

    windows._silero.cache_clear()
    monkeypatch.delitem(sys.modules, "silero_vad", raising=False)
    monkeypatch.setattr(builtins, "__import__", hidden)
    with pytest.raises(ImportError, match=r"silero_vad is not installed: pip install 'whisper-moe\[vad\]'"):
        windows.speech_spans_silero(noise(1))


def test_loading_the_learned_detector_leaves_the_threads_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("silero_vad")
    import torch

    for name in [name for name in sys.modules if name.startswith("silero_vad")]:
        monkeypatch.delitem(sys.modules, name)
    windows._silero.cache_clear()
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    windows.speech_spans_silero(noise(1))
    after = torch.get_num_threads()
    torch.set_num_threads(before)
    assert after == 2


def test_the_learned_detector_hears_speech_and_not_noise(shared_data: Path) -> None:
    pytest.importorskip("silero_vad")
    pytest.importorskip("onnxruntime")
    speech = load_audio(sorted((shared_data / "english-read/audio").glob("*.opus"))[0])
    silence = np.zeros(3 * SAMPLE_RATE, np.float32)
    sound = np.concatenate([silence, speech, silence]) + noise(6 + len(speech) / SAMPLE_RATE, 3e-3)
    spans = windows.speech_spans_silero(sound)
    assert 2 * SAMPLE_RATE < spans[0][0] < 4 * SAMPLE_RATE
    assert windows.speech_spans_silero(noise(5, 0.1)) == []


def test_real_speech_is_cut_where_nobody_speaks(shared_data: Path) -> None:
    """Read sentences in a row: the 200 ms around every cut are 30 dB below loud speech."""
    sound = np.concatenate(
        [load_audio(path) for path in sorted((shared_data / "english-read/audio").glob("*.opus"))[:40]]
    )
    cuts = [round(window.end * SAMPLE_RATE) for window in cut_windows(split(sound, 480_000))][:-1]
    assert len(cuts) > 5
    loud = np.percentile(np.square(sound[: len(sound) // 320 * 320]).reshape(-1, 320).mean(1), 90)
    around = np.array([np.square(sound[cut - 1_600 : cut + 1_600]).mean() for cut in cuts])
    assert (10 * np.log10(around / loud + 1e-12)).max() < -30


def test_digital_silence_before_the_first_sound_is_a_window_of_its_own() -> None:
    """Decoded with it, the first words are given its start: seconds early."""
    noise = np.random.default_rng(0).normal(0, 0.1, 3 * SAMPLE_RATE).astype(np.float32)
    led = np.concatenate([np.zeros(5 * SAMPLE_RATE, np.float32), noise])
    assert [(w.start, w.end) for w in cut_windows([led])] == [(0, 5), (5, 8)]
    assert [(w.start, w.end) for w in cut_windows([led[int(4.6 * SAMPLE_RATE) :]])] == [(0, pytest.approx(3.4))]
    gap = np.concatenate([noise, np.zeros(40 * SAMPLE_RATE, np.float32), noise])
    windows = list(cut_windows([gap], max_seconds=20))
    assert [(w.start, w.end) for w in windows if not is_silent(w.samples)][1:] == [(43, 46)]
    np.testing.assert_array_equal(np.concatenate([w.samples for w in windows]), gap)
