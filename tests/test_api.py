"""``WhisperMoE``: whatever sound may come as, one recording gives one answer, and options are checked before any is read."""

from __future__ import annotations

import dataclasses
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from generate.tiny import CONFIG, tiny_whisper_moe
from media.recordings import encode

from whisper_moe import MediaError, Segment, TranscribeOptions, Transcription, WhisperMoE
from whisper_moe.config import PRESETS
from whisper_moe.generate.decode import WindowDecoder
from whisper_moe.packing import Layout

RATE = 16_000
EXAMPLES = Path(__file__).parent.parent / "examples"
TRUSTING: dict[str, Any] = {
    "temperatures": (0.0,),
    "no_speech_threshold": None,
    "logprob_threshold": None,
    "compression_ratio_threshold": None,
    "context_margin": 30.0,
}
"""Every transcript is taken as it comes: random models never sound right."""


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, round(seconds * RATE)).astype(np.float32)


@pytest.fixture(scope="module")
def wav(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "noise.wav"
    return encode(path, noise(2.0)[None], RATE, "pcm_f32le")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_model: WhisperMoE) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_model.save_pretrained(folder)
    return folder


def told(result: Transcription | None) -> tuple[str, float, list[tuple[float, float, tuple[int, ...]]]]:
    """What was said and when: scores differ in the last digits with the company a recording keeps."""
    assert result is not None
    return result.text, result.duration, [(s.start, s.end, s.tokens) for s in result.segments]


# What may be transcribed.


def test_a_recording_is_the_same_however_it_comes(tiny_model: WhisperMoE, wav: Path) -> None:
    expected = tiny_model.transcribe(wav, **TRUSTING)
    assert expected.text and expected.duration == 2.0
    with wav.open("rb") as file:
        forms = (str(wav), file, io.BytesIO(wav.read_bytes()), noise(2.0), noise(2.0).astype(np.float64))
        results = [tiny_model.transcribe(same, **TRUSTING) for same in forms]
    assert [result.source for result in results] == [str(wav), str(wav), "<stream>", "samples", "samples"]
    assert all(replace(result, source=str(wav)) == expected for result in results)


def test_clips_are_transcribed_at_their_times_and_nothing_else(tiny_model: WhisperMoE) -> None:
    wave = noise(12.0)
    asked = {**TRUSTING, "language": "en"}
    result = tiny_model.transcribe(wave, clip_timestamps=[2, 4.5, 9], **asked)
    alone = [tiny_model.transcribe(wave[a * RATE // 2 : b * RATE // 2], **asked) for a, b in ((4, 9), (18, 24))]
    shifted = [(shift, s) for each, shift in zip(alone, (2, 9), strict=True) for s in each.segments]
    assert [s.tokens for s in result.segments] == [s.tokens for _, s in shifted] != []
    assert [s.seek for s in result.segments] == [s.seek + shift * 100 for shift, s in shifted]
    assert [s.start for s in result.segments] == pytest.approx([s.start + shift for shift, s in shifted])
    assert result.duration == 12.0
    text = tiny_model.transcribe(wave, clip_timestamps=" 2,4.5,9", **asked)
    assert [s.tokens for s in text.segments] == [s.tokens for s in result.segments]


@pytest.mark.parametrize(
    "given", ["a,b", "0,5;9", [0, "x"], 5, None, [5, 2], [0, float("inf")], [float("nan")]], ids=str
)
def test_clips_that_are_no_times_are_refused(given: Any) -> None:
    with pytest.raises(ValueError, match="clip_timestamps"):
        TranscribeOptions(clip_timestamps=given)


def test_marks_join_the_words_that_they_are_asked_to_join(tiny_model: WhisperMoE) -> None:
    asked: dict[str, Any] = {**TRUSTING, "language": "en", "word_timestamps": True}
    usual, joined = (
        [
            word.word
            for segment in tiny_model.transcribe(noise(4.0), **asked, **more).segments
            for word in segment.words or ()
        ]
        for more in ({}, {"append_punctuations": "".join(map(chr, range(33, 127)))})
    )
    assert "".join(usual) == "".join(joined) and len(joined) < len(usual)


def test_a_list_gives_a_list_in_its_order(tiny_model: WhisperMoE, wav: Path) -> None:
    sounds = [noise(seconds, seed) for seed, seconds in enumerate((3.0, 0.5, 40.0, 1.0))]
    together = tiny_model.transcribe([*sounds, wav], **TRUSTING)
    assert len({result.text for result in together}) > 2
    assert [result.text for result in together] == [tiny_model.transcribe(s, **TRUSTING).text for s in [*sounds, wav]]
    assert [result.duration for result in together] == [3.0, 0.5, 40.0, 1.0, 2.0]
    assert [told(alone) for alone in tiny_model.transcribe([wav], **TRUSTING)] == [told(together[-1])]
    assert tiny_model.transcribe([], **TRUSTING) == []


def test_a_film_is_heard(default_model: WhisperMoE) -> None:
    text = default_model.transcribe(EXAMPLES / "clip.mov").text
    assert text == "Had he married a more amiable woman, he might have been made still more respectable than he was."


def test_results_are_typed_and_cannot_be_changed(tiny_model: WhisperMoE) -> None:
    result = tiny_model.transcribe(noise(2.0), word_timestamps=True, **TRUSTING)
    assert isinstance(result, Transcription) and isinstance(result.segments[0], Segment)
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.text = "else"  # pyright: ignore[reportAttributeAccessIssue]
    values = result.to_dict()
    assert list(values)[:3] == ["text", "segments", "language"]
    assert list(values["segments"][0])[:5] == ["id", "seek", "start", "end", "text"]
    assert values["segments"][0]["experts"] == dict(result.segments[0].experts) != {}
    words = result.segments[0].words
    assert words and "".join(word.word for word in words) == result.segments[0].text


def test_progress_adds_up_to_what_there_was(tiny_model: WhisperMoE) -> None:
    heard: list[float] = []
    sounds = [noise(65.0), noise(1.0), np.zeros(3 * RATE, np.float32)]
    list(tiny_model.transcribe_each(sounds, progress=heard.append, **TRUSTING))
    assert sum(heard) == pytest.approx(69.0)


@pytest.mark.parametrize("vad", ["none", "energy"])
def test_a_recordings_duration_counts_what_is_silent(tiny_model: WhisperMoE, vad: str) -> None:
    sound = np.concatenate([noise(2.0), np.zeros(6 * RATE, np.float32)])
    result = tiny_model.transcribe(sound, vad=vad, **TRUSTING)
    assert result.duration == 8.0
    assert result.segments[-1].end <= (8.0 if vad == "none" else 2.5)


def test_nothing_gives_nothing(tiny_model: WhisperMoE) -> None:
    for empty in (np.zeros(0, np.float32), np.zeros(RATE, np.float32)):
        result = tiny_model.transcribe(empty)
        assert (result.text, result.segments) == ("", ())


# What cannot be.


def test_one_unreadable_recording_costs_only_itself(tiny_model: WhisperMoE, wav: Path, tmp_path: Path) -> None:
    (tmp_path / "text.wav").write_text("no sound")
    nan = noise(1.0)
    nan[5] = np.nan
    sources: list[Any] = [wav, tmp_path / "text.wav", nan, np.zeros((2, RATE)), np.zeros(9, np.int16), "gone.mp3", wav]
    outcomes = list(tiny_model.transcribe_each(sources, **TRUSTING))
    assert [outcome.transcription is not None for outcome in outcomes] == [True] + 5 * [False] + [True]
    expected = told(tiny_model.transcribe(wav, **TRUSTING))
    assert told(outcomes[0].transcription) == told(outcomes[-1].transcription) == expected
    errors = [str(outcome.error) for outcome in outcomes[1:-1]]
    for error, said in zip(
        errors, ("text.wav: not sound", "NaN", "one-dimensional", "int16", "gone.mp3: no such"), strict=True
    ):
        assert said in error
    assert all(isinstance(outcome.error, MediaError) for outcome in outcomes[1:-1])


def test_outcomes_come_in_the_order_given_or_each_as_soon_as_it_is_there(tiny_model: WhisperMoE) -> None:
    sources: list[Any] = [noise(0.5), noise(4.0), "gone.mp3", *map(noise, range(1, 9))]
    options: dict[str, Any] = {"language": "en", "timestamps": False, "window": 30.0, **TRUSTING}
    given = list(tiny_model.transcribe_each(sources, **options))
    soon = list(tiny_model.transcribe_each(iter(sources), in_order=False, **options))
    assert [outcome.index for outcome in given] == list(range(len(sources)))
    assert [outcome.error is None for outcome in given] == [i != 2 for i in range(len(sources))]
    assert [outcome.transcription.duration for outcome in given if outcome.transcription] == [0.5, 4.0, *range(1, 9)]
    order = [outcome.index for outcome in soon]
    assert order[0] == 2 and sorted(order) == [outcome.index for outcome in given]
    for one, other in zip(given, sorted(soon, key=lambda outcome: outcome.index), strict=True):
        assert (one.name, one.transcription, str(one.error)) == (other.name, other.transcription, str(other.error))


def test_transcribe_raises_for_the_first_that_cannot_be_read(tiny_model: WhisperMoE, wav: Path) -> None:
    with pytest.raises(MediaError, match=r"first\.mp3: no such file"):
        tiny_model.transcribe([wav, "first.mp3", "second.mp3"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"language": "hindu"}, "did you mean hindi"),
        ({"language": "ta"}, "does not know the language"),
        ({"allowed_languages": ("en", "xx")}, "unknown language 'xx'"),
        ({"beam_size": 0}, "beam_size"),
        ({"context_margin": float("nan")}, "context_margin"),
        ({"window": float("nan")}, "window"),
        ({"temperatures": (0.0, -0.2)}, "temperatures"),
        ({"suppress_tokens": (-2,)}, "suppress_tokens"),
        ({"beams": 5}, "beams"),
        ({"suppress_tokens": (CONFIG.vocab_size,)}, "beyond the model's"),
    ],
)
def test_options_are_checked_before_anything_is_read(
    tiny_model: WhisperMoE, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        tiny_model.transcribe("no such file", **options)
    assert not isinstance(caught.value, MediaError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "longest"), [({}, 20), ({"context_margin": 30.0}, 30), ({"window": 5.0, "context_margin": 30.0}, 5)]
)
def test_a_long_recording_is_cut_into_windows(
    tiny_model: WhisperMoE, options: dict[str, Any], longest: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    decode = WindowDecoder.open

    def listening(self: WindowDecoder, clips: list[np.ndarray], *args: Any, **kwargs: Any) -> Any:
        seen.extend(len(clip) / RATE for clip in clips)
        return decode(self, clips, *args, **kwargs)

    monkeypatch.setattr(WindowDecoder, "open", listening)
    tiny_model.transcribe(noise(61.0), **TRUSTING | {"context_margin": 2.5, "timestamps": False} | options)
    assert longest / 2 <= max(seen) <= longest


def test_languages_go_by_code_or_name(tiny_model: WhisperMoE) -> None:
    assert tiny_model.transcribe(noise(1.0), language="Hindi", **TRUSTING).language == "hi"
    assert tiny_model.transcribe(noise(1.0), allowed_languages=("ENGLISH",), **TRUSTING).language == "en"


# Which language.


def test_a_language_is_detected(tiny_model: WhisperMoE) -> None:
    found = tiny_model.detect_language(noise(3.0))
    assert set(found) == {"en", "hi"}
    assert sum(found.values()) == pytest.approx(1.0)
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert tiny_model.detect_language(noise(3.0), languages=("hindi",)) == {"hi": 1.0}


def test_a_language_is_detected_behind_silence(tiny_model: WhisperMoE) -> None:
    late = np.concatenate([np.zeros(30 * RATE, np.float32), noise(3.0)])
    probabilities = tiny_model.detect_language(late)
    with pytest.raises(MediaError, match="no sound in it"):
        tiny_model.detect_language(late[: 30 * RATE])
    assert probabilities.keys() == {"en", "hi"}


@pytest.mark.parametrize(("start", "language"), [(0, "en"), (29, "it"), (58, "ru")])
def test_real_languages_are_detected(default_model: WhisperMoE, start: int, language: str) -> None:
    from whisper_moe.media.audio import load_audio

    sound = load_audio(EXAMPLES / "languages.ogg")[start * RATE : (start + 10) * RATE]
    likeliest, probability = next(iter(default_model.detect_language(sound).items()))
    assert likeliest == language
    assert probability > 0.9


# Which model.


def logits(model: WhisperMoE, mel: torch.Tensor, text: torch.Tensor, routing: Any) -> torch.Tensor:
    encoded = model.model.encoder([mel], routing=routing)
    return model.model.decoder.head(model.model.decoder(text, Layout([len(text)]), encoded).states_TD).float()


def test_a_saved_model_says_the_same(tiny_model: WhisperMoE, checkpoint: Path, tmp_path: Path) -> None:
    expected = tiny_model.transcribe(noise(2.0), **TRUSTING)
    trainable = WhisperMoE.from_pretrained(checkpoint, for_inference=False)
    assert all(parameter.requires_grad for parameter in trainable.model.parameters())
    for model in (trainable, WhisperMoE.from_pretrained(checkpoint, dtype="float32")):
        found = model.transcribe(noise(2.0), **TRUSTING)
        assert [s.tokens for s in found.segments] == [s.tokens for s in expected.segments]
        assert found.segments[0].avg_logprob == pytest.approx(expected.segments[0].avg_logprob, abs=1e-4)
    trainable.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/core.safetensors").read_bytes() == (checkpoint / "core.safetensors").read_bytes()


def test_a_model_whose_weights_were_rounded_or_laid_out_is_not_saved(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="for_inference=False"):
        WhisperMoE.from_pretrained(checkpoint).save_pretrained(tmp_path / "again")
    with pytest.raises(ValueError, match="for_inference=False"):
        WhisperMoE.from_pretrained(checkpoint, dtype="bfloat16").save_pretrained(tmp_path / "again")
    with pytest.raises(ValueError, match="'bfloat16' would round them"):
        WhisperMoE.from_pretrained(checkpoint, dtype="bfloat16", for_inference=False)


@pytest.mark.parametrize("dtype", ["int8_float16", "bfloat16", "float16"])
def test_every_arithmetic_runs_on_a_cpu(checkpoint: Path, tiny_model: WhisperMoE, dtype: str) -> None:
    model = WhisperMoE.from_pretrained(checkpoint, device="cpu", dtype=dtype)
    assert model.dtype == dtype.removesuffix("_float16")
    mel, text = torch.randn(CONFIG.n_mels, 400), torch.tensor([1, 7, 70, 200])
    with torch.inference_mode():
        routing = tiny_model.model.encoder([mel]).routing  # the same experts: their choice may tip over
        expected = logits(tiny_model, mel, text, routing)
        found = logits(model, mel.to(model.model.encoder.positions.dtype), text, routing)
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()
    result = model.transcribe([noise(2.0), noise(1.0)], word_timestamps=True, **TRUSTING)
    assert all(each.segments for each in result)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"dtype": "int4"},
            "dtype must be one of auto, float32, int8, bfloat16, float16, default, int8_float32",
        ),
        ({"device": "toaster"}, "device must be cpu"),
        ({"device": "cpu:7"}, "device cpu:7"),
        ({"device": "cuda:99"}, "device cuda:99"),
        ({"threads": 0}, "threads must be at least 1"),
        ({}, "no such model"),
    ],
)
def test_where_and_how_to_compute_is_checked_before_a_model_is_read(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (what it says is checked below)
        WhisperMoE.from_pretrained("no such model", **options)
    assert said in str(caught.value)


def test_a_bigger_model_is_built_the_same_way() -> None:
    """The presets' experts have no shared one beside them, and each its own TTT layers."""
    preset = PRESETS["8x39m"]
    assert preset.moe is not None and preset.ttt is not None
    moe = preset.moe.model_copy(update={"expert_dim": CONFIG.encoder_ffn_dim, "n_experts": 3, "expert_names": ()})
    ttt = preset.ttt.model_copy(update={"encoder_layers": (0, 1), "mini_batch": 25})
    model = tiny_whisper_moe(config=CONFIG.model_copy(update={"moe": moe, "ttt": ttt}))
    result = model.transcribe([noise(2.0), noise(1.0, 1)], **TRUSTING)
    assert all(segment.experts and "none" not in dict(segment.experts) for each in result for segment in each.segments)
