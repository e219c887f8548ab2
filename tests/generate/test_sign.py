"""Signs read by a tiny model that talks nonsense: alone as together, in languages that it knows; and mixed requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data.miniatures import film
from generate.test_translate import DIRECTIONS, PIECES
from generate.tiny import CONFIG, tiny_whisper_moe

from whisper_moe import MediaError, Request, Transcription, WhisperMoE
from whisper_moe.config_aside import FilmConfig, SensesConfig
from whisper_moe.generate import mixed
from whisper_moe.generate.senses import Signed, Translation
from whisper_moe.packing import Layout

SENSES = SensesConfig(
    tokens=("<|sign|>", "<|isl|>", "<|asl|>", *PIECES),
    directions=DIRECTIONS,
    rank=2,
    experts=("translate", "sign"),
    signs=("sgn", "ase"),
    film=FilmConfig(rate=10, patch=4, patches=12, tokens=60),
)
SEES = CONFIG.model_copy(update={"senses": SENSES})


@pytest.fixture(scope="module")
def model() -> WhisperMoE:
    made = tiny_whisper_moe(config=SEES)
    senses = made.model.senses
    assert senses is not None and senses.film is not None
    weights = senses.tokens.weight, senses.film.patches.weight, senses.film.whole.weight, senses.film.norm.weight
    with torch.no_grad():
        for weight, factor in zip(weights, (12, 4, 0.1, 16), strict=True):  # so that films are told apart
            weight *= factor
    return made


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("clips")
    kinds = ((10, 96, 64), (14, 64, 96), (20, 64, 64))
    return [
        film(folder / f"clip-{count}.mov", [0.04 * n for n in range(count)], width=width, height=height)
        for count, width, height in kinds
    ]


def sound(seed: int, seconds: float = 1.0) -> Any:
    return np.random.default_rng(seed).normal(0, 0.1, round(16_000 * seconds)).astype(np.float32)


def test_clips_that_share_a_pack_say_what_each_says_alone(model: WhisperMoE, clips: list[Path]) -> None:
    together = model.sign(clips)
    assert [each.text for each in together] == [model.sign(clip).text for clip in clips]
    assert len({each.text for each in together}) > 1
    assert together[0].source == str(clips[0]) and together[0].language == "sgn"
    with clips[0].open("rb") as file:
        assert model.sign(file).text == together[0].text


@pytest.mark.parametrize(
    ("language", "said"),
    [
        (
            "isl",
            r"not trained in Indian Sign Language \(isl\); what it has learned: signs of no stated language, American",
        ),
        ("ins", "not trained in Indian Sign Language"),
        ("fsl", "not trained in 'fsl', which is none of isl, asl"),
    ],
)
def test_a_sign_language_that_was_not_learned_is_refused(
    model: WhisperMoE, clips: list[Path], language: str, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        model.sign(clips[0], language=language)
    assert {model.sign(clips[0], language=name).language for name in ("asl", "ASE", "American Sign Language")} == {
        "ase"
    }


def test_what_cannot_be_read_is_named(model: WhisperMoE, clips: list[Path], tmp_path: Path) -> None:
    (tmp_path / "cut.mov").write_bytes(clips[0].read_bytes()[:500])
    with pytest.raises(MediaError, match=r"cut\.mov"):
        model.sign([clips[0], tmp_path / "cut.mov"])
    with pytest.raises(ValueError, match="this model only hears: it has no part for texts or films"):
        tiny_whisper_moe().sign(clips[0])
    reads = tiny_whisper_moe(
        config=CONFIG.model_copy(update={"senses": SensesConfig(tokens=PIECES, directions=DIRECTIONS, rank=2)})
    )
    with pytest.raises(ValueError, match="this model sees no films"):
        reads.sign(clips[0])


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_what_is_read_aside_sees_as_the_whole_model(
    model: WhisperMoE, clips: list[Path], tmp_path: Path, dtype: str
) -> None:
    model.save_pretrained(tmp_path / "model")
    names = {"tokens.safetensors", "video.safetensors", "experts/translate.safetensors", "experts/sign.safetensors"}
    assert all((tmp_path / "model" / name).is_file() for name in names)
    loaded = WhisperMoE.from_pretrained(tmp_path / "model", dtype=dtype, device="cpu")
    said = [each.text for each in loaded.sign(clips)]
    assert len(said) == 3
    if dtype == "float32":
        assert said == [each.text for each in model.sign(clips)]


def requests_of(clips: list[Path]) -> list[Request]:
    films = [Request(task="sign", film=clip) for clip in clips]
    texts = [Request(task="translate", text=text) for text in ("A dog. A cat!", "मेरा काम है।", "one two")]
    heard = [Request(task="transcribe", audio=sound(seed), options={"language": "en"}) for seed in range(3)]
    into = [Request(task="translate", audio=sound(9), options={"language": "hi"})]
    asl = [Request(task="sign", film=clips[0], options={"language": "asl"})]
    to = [Request(task="translate", text="It sat.", options={"source": "en", "target": "Hindi"})]
    return [films[0], texts[0], heard[0], *films[1:], *texts[1:], *heard[1:], *into, *asl, *to]


def test_twelve_requests_of_all_kinds_in_one_call(model: WhisperMoE, clips: list[Path]) -> None:
    requests = requests_of(clips)
    answers = model.answer(requests)
    assert len(answers) == 12
    for request, found in zip(requests, answers, strict=True):
        kind = Signed if request.film is not None else Translation if request.text is not None else Transcription
        assert isinstance(found, kind)
        (alone,) = model.answer([request])
        assert isinstance(alone, kind) and alone.text == found.text


def test_sound_texts_and_films_are_encoded_in_one_pack(
    model: WhisperMoE, clips: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    packs: list[int] = []
    forward = type(model.model.encoder).forward

    def spy(self: Any, inputs: Any, **how: Any) -> Any:
        packs.append(len(inputs))
        return forward(self, inputs, **how)

    monkeypatch.setattr(type(model.model.encoder), "forward", spy)
    options = {"language": "en", "temperatures": (0.0,), "logprob_threshold": None, "compression_ratio_threshold": None}
    heard = [Request(task="transcribe", audio=sound(seed), options=options) for seed in range(2)]
    films = [Request(task="sign", film=clip) for clip in clips[:2]]
    model.answer([*heard, *films, Request(task="translate", text="A dog.")])
    assert packs[0] == 5 and set(packs[1:]) <= {1}, "after that only windows that looked wrong are heard again"
    packs.clear()
    monkeypatch.setattr(mixed, "MAX_PACK_TOKENS", Layout([200]).total)
    model.answer([*heard, *films, Request(task="translate", text="A dog.")])
    assert packs[0] == 2 and packs[-1] == 3, "what finds no room goes by itself"


def test_a_choice_of_experts_is_for_sound_alone(clips: list[Path]) -> None:
    """In a joint model, too, whose router chooses for texts and films."""
    joint = tiny_whisper_moe(config=CONFIG.model_copy(update={"senses": SENSES.model_copy(update={"routed": True})}))
    others = [Request(task="sign", film=clips[0]), Request(task="translate", text="A dog. A cat")]
    options = {"language": "en", "experts": ("hindi",)}
    heard, *together = joint.answer([Request(task="transcribe", audio=sound(1), options=options), *others])
    assert isinstance(heard, Transcription)
    alone = [joint.answer([each])[0] for each in others]
    assert [each.text for each in together] == [each.text for each in alone]  # pyright: ignore[reportAttributeAccessIssue]


def test_a_request_that_cannot_be_answered_costs_no_other(model: WhisperMoE, clips: list[Path], tmp_path: Path) -> None:
    (tmp_path / "no.mov").write_bytes(b"no film")
    bad = [
        Request(task="sign", film=tmp_path / "no.mov"),
        Request(task="sign", film=clips[0], options={"language": "isl"}),
        Request(task="transcribe", audio=tmp_path / "no.wav"),
        Request(task="transcribe", audio=sound(1), options={"language": "xx"}),
        Request(task="translate", text="…"),
        Request(task="speak", text="A dog."),
    ]
    *errors, last = model.answer([*bad, Request(task="sign", film=clips[0])])
    assert [type(each) for each in errors if not isinstance(each, ValueError)] == []
    said = ["no.mov", "isl", "no.wav", "xx", "can be translated", "does not speak"]
    assert [part for part, error in zip(said, errors, strict=True) if part not in str(error)] == []
    assert isinstance(last, Signed) and last.text == model.sign(clips[0]).text
    assert model.answer([]) == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"task": "sing", "text": "a"}, "task must be one of transcribe, translate, sign, speak, got 'sing'"),
        ({"task": "sign"}, "the task 'sign' needs film, got nothing"),
        ({"task": "sign", "text": "a"}, "needs film, got text"),
        ({"task": "sign", "film": "a", "options": {"speed": 2}}, "the task 'sign' has no option speed"),
        ({"task": "transcribe", "audio": "a", "options": {"decoder": None}}, "has no option decoder"),
        ({"task": "translate", "text": "a", "options": {"voice": "x"}}, "has no option voice"),
        ({"task": "sign", "film": "a", "options": {"language": 3}}, "language: a name is wanted, got 3"),
        ({"task": "sign", "film": np.zeros(3)}, "film is not to be given as ndarray"),
        ({"task": "transcribe", "audio": [1, 2]}, "audio is not to be given as list"),
        ({"task": "translate", "text": "a", "audio": "b"}, "needs audio or text, got audio and text"),
    ],
)
def test_requests_are_checked_as_they_are_made(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Request(**given)
