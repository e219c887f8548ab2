"""A transcript that looks wrong is tried again: padded first, then at rising temperatures, and all of it is counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from generate.tiny import tiny_tokenizer

from whisper_moe import WhisperMoE
from whisper_moe.generate.decode import DecodingResult, WindowDecoder
from whisper_moe.generate.fallback import attempts, decode_with_fallback, is_silence, looks_wrong
from whisper_moe.generate.options import TranscribeOptions
from whisper_moe.generate.search import Hypothesis

TOKENIZER = tiny_tokenizer()
SECOND = np.full(16_000, 0.1, np.float32)
OPTIONS = TranscribeOptions()


def at(seconds: float) -> int:
    return TOKENIZER.timestamp_begin + round(seconds / 0.02)


def take(
    text: str = "Four words are said", *, average: float = -0.2, finished: bool = True, **changes: Any
) -> DecodingResult:
    tokens = tuple(TOKENIZER.encode(text))
    found = Hypothesis(tokens, average * (len(tokens) + 1), finished)
    return replace(DecodingResult(found, "en", None, 0.01, 0.0, 2.0, ()), **changes)


def why(found: DecodingResult, seconds: float = 3.0, **options: Any) -> str | None:
    return looks_wrong(found, seconds, TOKENIZER, replace(OPTIONS, **options))


def test_a_good_take_is_trusted() -> None:
    assert why(take()) is None


@pytest.mark.parametrize(
    ("found", "seconds", "reason", "off"),
    [
        (take("Fail better. " * 9), 30.0, "repetitive", {"compression_ratio_threshold": None}),
        (take(average=-1.01), 3.0, "unsure", {"logprob_threshold": None}),
        (take(finished=False), 3.0, "endless", None),
        (take("The quick brown fox jumps"), 0.5, "too long for its time", None),
    ],
    ids=["repetitive", "unsure", "endless", "too long"],
)
def test_each_reason_speaks_against_a_take(
    found: DecodingResult, seconds: float, reason: str, off: dict[str, None] | None
) -> None:
    assert why(found, seconds) == reason
    if off is not None:
        assert why(found, seconds, **off) is None


def test_a_threshold_itself_is_still_good() -> None:
    assert why(take(average=-1.0)) is None


def test_a_short_word_fits_into_any_time() -> None:
    assert why(take("ten letters"), seconds=0.05) is None


def test_a_text_cut_off_behind_closed_segments_goes_on_and_is_no_loop() -> None:
    """Some languages need more tokens for 30 s than the decoder may sample."""
    closed = [at(0), *TOKENIZER.encode("one"), at(2.5), at(2.5)]
    cut_off = Hypothesis((*closed, *TOKENIZER.encode("tw")), -1.0, False)
    assert why(take(hypothesis=cut_off), seconds=3.0) is None
    assert why(take(hypothesis=cut_off), seconds=2.0) == "endless", "it went on behind the end of the sound"
    early = Hypothesis((at(0), *TOKENIZER.encode("one"), at(0.5), at(0.5), 65), -1.0, False)
    assert why(take(hypothesis=early), seconds=3.0) == "endless", "it got nowhere"


def test_silence_is_silence_however_it_reads() -> None:
    for found in (take(average=-1.5), take("Fail better. " * 9, average=-1.5), take(average=-1.5, finished=False)):
        quiet = replace(found, no_speech_prob=0.7)
        assert is_silence(quiet, OPTIONS)
        assert why(quiet) is None
        assert why(found) is not None


def test_a_sure_text_speaks_against_silence() -> None:
    assert not is_silence(take(average=-0.2, no_speech_prob=0.9), OPTIONS)
    assert is_silence(take(average=-0.2, no_speech_prob=0.9), replace(OPTIONS, logprob_threshold=None))
    assert not is_silence(take(average=-3.0, no_speech_prob=0.9), replace(OPTIONS, no_speech_threshold=None))


def test_first_padding_then_temperatures() -> None:
    assert attempts(TranscribeOptions(context_margin=2.0, temperatures=(0.0, 0.4, 1.0))) == [
        (2.0, 0.0), (30.0, 0.0), (30.0, 0.4), (30.0, 1.0),
    ]  # fmt: skip
    assert attempts(TranscribeOptions(context_margin=30.0, temperatures=(0.0, 0.4))) == [(30.0, 0.0), (30.0, 0.4)]
    assert attempts(TranscribeOptions(context_margin=1.0, temperatures=(0.2,))) == [(1.0, 0.2), (30.0, 0.2)]


@dataclass
class Scripted:
    """A decoder whose takes of a clip are good from the attempt on that the clip's first sample names."""

    calls: list[tuple[tuple[int, ...], float, float, tuple[str | None, ...] | None]] = field(default_factory=list)
    tried: dict[int, int] = field(default_factory=dict)
    tokenizer: Any = TOKENIZER

    def positions(self, samples: int, margin: float) -> int:
        return min(1500, round((samples / 16_000 + margin) * 50))

    def decode(
        self, clips: Sequence[np.ndarray], options: TranscribeOptions, *, temperature: float, margin: float,
        hints: Sequence[str | None] | None = None, carry: Any = None, previous: Any = None,
    ) -> list[DecodingResult]:  # fmt: skip
        names = tuple(int(clip[0]) for clip in clips)
        self.calls.append((names, margin, temperature, tuple(hints) if hints else None))
        takes = []
        for name in names:
            number = self.tried[name] = self.tried.get(name, -1) + 1
            takes.append(take(average=-0.2 if number >= name else -2.0, margin=margin, temperature=temperature))
        return takes


def clips_that_are_good_from(*attempts: int, seconds: float = 1.0) -> list[np.ndarray]:
    return [np.full(round(seconds * 16_000), number, np.float32) for number in attempts]


def in_pairs(indices: Sequence[int], margin: float, temperature: float) -> list[list[int]]:
    return [list(indices[i : i + 2]) for i in range(0, len(indices), 2)]


def fall_back(decoder: Scripted, clips: Sequence[np.ndarray], **more: Any) -> list[tuple[DecodingResult, int]]:
    options = TranscribeOptions(context_margin=2.0, temperatures=(0.0, 0.5, 1.0))
    found = decode_with_fallback(decoder, clips, options, groups=in_pairs, **more)  # pyright: ignore[reportArgumentType]
    return [(one, thrown_away) for _, one, thrown_away in sorted(found, key=lambda each: each[0])]


def test_only_what_looks_wrong_is_tried_again_and_each_take_is_counted() -> None:
    decoder = Scripted()
    found = fall_back(decoder, clips_that_are_good_from(0, 3, 1, 2))
    assert [(names, margin, temperature) for names, margin, temperature, _ in decoder.calls] == [
        ((0, 3), 2.0, 0.0), ((1, 2), 2.0, 0.0), ((3, 1), 30.0, 0.0), ((2,), 30.0, 0.0), ((3, 2), 30.0, 0.5), ((3,), 30.0, 1.0),
    ]  # fmt: skip
    assert [(one.margin, one.temperature, thrown_away) for one, thrown_away in found] == [
        (2.0, 0.0, 0), (30.0, 1.0, 3), (30.0, 0.0, 1), (30.0, 0.5, 2),
    ]  # fmt: skip


def test_a_take_is_handed_out_with_the_batch_in_which_it_is_accepted() -> None:
    """And so is the last that there will be."""
    decoder = Scripted()
    options = TranscribeOptions(context_margin=2.0, temperatures=(0.0,))
    clips = clips_that_are_good_from(0, 9, 1, 0, 9)
    found = decode_with_fallback(decoder, clips, options, groups=in_pairs)  # pyright: ignore[reportArgumentType]
    assert [(index, len(decoder.calls)) for index, *_ in found] == [(0, 1), (3, 2), (1, 4), (2, 4), (4, 5)]


def test_the_last_attempt_is_taken_as_it_is() -> None:
    decoder = Scripted()
    ((last, thrown_away),) = fall_back(decoder, clips_that_are_good_from(99))
    assert (last.temperature, thrown_away, len(decoder.calls)) == (1.0, 3, 4)


def test_a_clip_that_fills_its_window_is_not_decoded_twice_alike() -> None:
    decoder = Scripted()
    ((_, thrown_away),) = fall_back(decoder, clips_that_are_good_from(1, seconds=29.0))
    assert [(margin, temperature) for _, margin, temperature, _ in decoder.calls] == [(2.0, 0.0), (30.0, 0.5)]
    assert thrown_away == 1


def test_hints_stay_with_their_clips() -> None:
    decoder = Scripted()
    fall_back(decoder, clips_that_are_good_from(0, 1, 2), hints=["hi", None, "en"])
    assert [hints for *_, hints in decoder.calls] == [("hi", None), ("en",), (None, "en"), ("en",)]


def test_the_second_attempt_hears_a_full_window(tiny_model: WhisperMoE, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[list[int]] = []
    encode = WindowDecoder.encode

    def spy(self: WindowDecoder, *args: Any) -> Any:
        order, encoded = encode(self, *args)
        heard.append(list(encoded.layout.lengths))
        return order, encoded

    monkeypatch.setattr(WindowDecoder, "encode", spy)
    unsatisfiable = {"logprob_threshold": 1.0, "no_speech_threshold": None, "temperatures": (0.0,)}
    result = tiny_model.transcribe(SECOND, context_margin=0.5, **unsatisfiable)
    assert heard == [[75], [1500]]
    assert result.fallbacks == 1
    heard.clear()
    assert tiny_model.transcribe(SECOND, context_margin=30.0, **unsatisfiable).fallbacks == 0
    assert heard == [[1500]]


def test_how_many_windows_fell_back_is_reported(tiny_model: WhisperMoE) -> None:
    minute = np.random.default_rng(0).normal(0, 0.1, 65 * 16_000).astype(np.float32)
    options: dict[str, Any] = {"no_speech_threshold": None, "timestamps": False, "logprob_threshold": 1.0}
    assert tiny_model.transcribe(minute, temperatures=(0.0, 0.5), window=30.0, **options).fallbacks == 3
    assert tiny_model.transcribe(minute, temperatures=(0.0,), context_margin=30.0, **options).fallbacks == 0
