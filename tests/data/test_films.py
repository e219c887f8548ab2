"""Films of signing become examples: what is measured is what is read, training changes them, evaluation does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data.memory import tiny_reader
from data.miniatures import film
from generate.test_sign import SEES
from generate.tiny import CONFIG, tiny_tokenizer

from whisper_moe.config_aside import FilmConfig
from whisper_moe.data.examples import ExampleConfig, ExampleReader
from whisper_moe.data.sample import DataError, Sample, TooLong
from whisper_moe.data.senses import FilmAugmentation, augmented
from whisper_moe.media.tokenizer import Pieces
from whisper_moe.media.video import load_film, tubelets


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return film(tmp_path_factory.mktemp("signs") / "dog.mov", [0.04 * number for number in range(20)])


def signed(clip: Path | None, **more: Any) -> Sample:
    given = {"text": "dog", "language": "sgn", "target_language": "en"} | more
    return Sample(id="dog", task="sign", video=clip and str(clip), **given)


def test_a_film_is_tubelets_for_the_encoder_and_a_word_for_the_decoder(clip: Path) -> None:
    assert SEES.senses is not None and SEES.senses.film is not None
    pieces, reader = Pieces(tiny_tokenizer(), SEES.senses.tokens, SEES.vocab_size), tiny_reader(SEES)
    example = reader.read(signed(clip, text=" a  dog "), 0.5)
    assert torch.equal(example.mel, torch.from_numpy(tubelets(load_film(clip, SEES.senses.film), SEES.senses.film)))
    assert list(example.tokens) == [*pieces.opening("en", "<|sign|>"), *pieces.encode(" a dog")]
    assert example.labels[-1] == pieces.tokenizer.eot
    assert reader.measure(signed(clip, text="a dog"), float("nan")) == (0, example.size)


def test_training_changes_films_anew_and_the_same_again_for_the_same_draw(clip: Path) -> None:
    config = ExampleConfig(margin=0.0, films=FilmAugmentation())
    reader = ExampleReader(tiny_tokenizer(), SEES, config)
    films = [reader.read(signed(clip), draw).mel for draw in (0.1, 0.7, 0.1)]
    assert torch.equal(films[0], films[2])
    assert films[0].shape != films[1].shape or not torch.equal(films[0], films[1])


@pytest.mark.parametrize(("memory", "decoded"), [(1, 1), (0, 3)])
def test_a_film_that_there_is_room_for_is_decoded_once(
    clip: Path, memory: int, decoded: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    times: list[str] = []

    def counted(path: str, film: FilmConfig) -> Any:
        times.append(path)
        return load_film(path, film)

    config = ExampleConfig(margin=0.0, films=FilmAugmentation(memory=memory))
    plain = ExampleReader(tiny_tokenizer(), SEES, config)
    alone = [plain.read(signed(clip), draw).mel for draw in (0.1, 0.7, 0.1)]
    monkeypatch.setattr("whisper_moe.data.senses.load_film", counted)
    reader = ExampleReader(tiny_tokenizer(), SEES, config)
    films = [reader.read(signed(clip), draw).mel for draw in (0.1, 0.7, 0.1)]
    assert len(times) == decoded
    assert all(map(torch.equal, films, alone)), "what changes one epoch's does not change what is kept"


def test_each_kind_of_change_does_what_it_says() -> None:
    frames = np.zeros((12, 40, 60, 3), np.uint8)
    frames[:, 18:22, 28:32] = 200
    frames[:, :, :, 2] += np.arange(12, dtype=np.uint8)[:, None, None]
    off = dict.fromkeys(("crop", "rotation", "speed", "colour"), 0.0)

    def changed(seed: int = 1, **how: float) -> Any:
        return augmented(frames, FilmAugmentation(**off | how), np.random.default_rng(seed)).astype(int)

    assert np.array_equal(changed(), frames)
    assert {len(changed(seed, speed=0.5)) for seed in range(20)} <= set(range(8, 19))
    assert len({len(changed(seed, speed=0.5)) for seed in range(20)}) > 3
    assert np.abs(changed(colour=0.3)[:, 0, 0] - frames[:, 0, 0]).max() > 3
    where = [np.argwhere(changed(seed, crop=0.3)[0, ..., 0] > 100).mean(0) for seed in range(8)]
    assert np.ptp(where, axis=0).min() > 3, "it moves both ways"
    tilted = changed(rotation=30)
    assert len(tilted) == 12 and not np.array_equal(tilted, frames)
    assert np.argwhere(tilted[0, ..., 0] > 100).mean(0) == pytest.approx([19.5, 29.5], abs=0.6)


@pytest.mark.parametrize(
    ("more", "error", "said"),
    [
        ({"text": " "}, DataError, "no text"),
        ({"text": "dog " * 40}, TooLong, "its text has"),
        ({"language": "ins"}, ValueError, "the model sees sgn, ase, not 'ins'"),
    ],
)
def test_what_is_no_film_with_its_text_is_named(
    clip: Path, more: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        tiny_reader(SEES).tokens(signed(clip, **more))


def test_a_sample_without_a_film_is_named() -> None:
    with pytest.raises(DataError, match="it has no film"):
        tiny_reader(SEES).measure(signed(None), float("nan"))


def test_a_model_that_only_hears_takes_no_films(clip: Path) -> None:
    with pytest.raises(ValueError, match="needs an input that this model does not have"):
        tiny_reader(CONFIG).tokens(signed(clip))
