"""A model learns from itself: lessons are the padded model's, batches are functions of the seed, only the adapting part moves."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from generate.tiny import tiny_whisper_moe
from media.recordings import encode
from train.tiny import tiny_checkpoint, tiny_recipe

from whisper_moe.config import FULL_WINDOW, AdaptConfig
from whisper_moe.data.loader import Batch
from whisper_moe.data.sample import AudioRef, Sample
from whisper_moe.generate.options import TranscribeOptions
from whisper_moe.media.mel import log_mel
from whisper_moe.model.model import WhisperMoEModel
from whisper_moe.packing import Layout
from whisper_moe.train.adapt_context import ContextObjective, Lessons, divergence, relative_error
from whisper_moe.train.loop import Trainer
from whisper_moe.train.losses import Totals, run_packs
from whisper_moe.train.optim import freeze
from whisper_moe.train.parallel import Parallel
from whisper_moe.train.recipe import load_recipe
from whisper_moe.train.teacher import MODES, Teacher, teacher_digest, teacher_of
from whisper_moe.weights.upcycle import add_parts

RATE = 16_000
SECONDS = (0.5, 1.1, 2.0, 3.3, 0.8, 1.6)
SPOKEN = tiny_whisper_moe()
RECIPE = load_recipe(Path(__file__).parents[2] / "recipes" / "context.yaml").model


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    folder = tmp_path_factory.mktemp("clips")
    made = []
    for index, seconds in enumerate(SECONDS):
        sound = np.random.default_rng(index).normal(0, 0.1, round(seconds * RATE)).astype(np.float32)
        path = encode(folder / f"{index}.wav", sound[None], RATE, "pcm_f32le")
        made.append(
            Sample(
                id=f"clip-{index}", task="transcribe", text="", language="en", target_language="en",
                audio=AudioRef(path=str(path)),
            )
        )  # fmt: skip
    return made


@pytest.fixture(scope="module")
def teacher(samples: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    teacher = Teacher(SPOKEN._decoder, tmp_path_factory.mktemp("lessons"))
    assert list(teacher.prepare(samples)) == samples
    return teacher


def lessons_of(samples: list[Sample], teacher: Teacher, **changed: float | tuple[float, float]) -> Lessons:
    settings = {"margins": (0.0, 4.0), "batch": 2, "seed": 3} | changed
    return Lessons(samples, teacher, SPOKEN.config, **settings)  # pyright: ignore[reportArgumentType]


def adapted() -> WhisperMoEModel:
    everywhere = AdaptConfig(encoder_layers=(0, 1), decoder_layers=(0,), adapter_dim=8)
    config, state = add_parts(SPOKEN.config, SPOKEN.model.state_dict(), adapt=everywhere)
    model = WhisperMoEModel(config)
    model.load_state_dict(state)
    freeze(model, RECIPE.freeze, RECIPE.train)
    return model


def seen(batches: list[Batch]) -> list[tuple[tuple[str, ...], list[tuple[int, ...]]]]:
    return [(batch.ids, [tuple(mel.shape) for pack in batch.packs for mel in pack.mels]) for batch in batches]


# Lessons.


@pytest.mark.parametrize("mode", MODES)
def test_a_lesson_is_what_the_padded_model_says(samples: list[Sample], teacher: Teacher, mode: str) -> None:
    options = TranscribeOptions(timestamps=mode == "timestamps")
    for sample in samples[:3]:
        assert sample.audio is not None
        clip = sample.audio.read()
        (take,) = SPOKEN._decoder.decode([clip], options, temperature=0.0, margin=FULL_WINDOW)
        lesson = teacher.lesson(sample, mode)  # pyright: ignore[reportArgumentType]
        assert tuple(lesson.tokens[-1 - len(take.hypothesis.tokens) : -1].tolist()) == take.hypothesis.tokens
        mel = log_mel(torch.from_numpy(clip), SPOKEN.config.n_mels, samples=30 * RATE)
        heard = [math.ceil(len(clip) / 320)]
        encoded = SPOKEN.model.encoder([mel], valid_lengths=heard)
        read = lesson.tokens[:-1]
        decoded = SPOKEN.model.decoder(read, Layout([len(read)]), encoded)
        expected = torch.stack([*decoded.depths, decoded.states_TD])
        assert (lesson.states.float() - expected).abs().max() < 2e-3 * expected.abs().max()


def test_lessons_are_made_once(samples: list[Sample], teacher: Teacher) -> None:
    again = Teacher(SPOKEN._decoder, teacher._folder)
    again.dismiss()
    assert list(again.prepare(samples)) == samples


def test_a_folder_that_is_full_is_said(samples: list[Sample], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="over its limit of 0 MB"):
        list(Teacher(SPOKEN._decoder, tmp_path, limit_mb=0).prepare(samples))


def test_a_clip_that_gives_no_lesson_is_left_out_by_name(samples: list[Sample], tmp_path: Path) -> None:
    path = encode(tmp_path / "long.wav", np.full((1, 31 * RATE), 0.1, np.float32), RATE, "pcm_f32le")
    long = Sample(
        id="long", task="transcribe", text="", language="en", target_language="en", audio=AudioRef(path=str(path))
    )
    gone = replace(long, id="gone", audio=AudioRef(path=str(tmp_path / "gone.wav")))
    teacher, left_out = Teacher(SPOKEN._decoder, tmp_path / "lessons"), []
    assert list(teacher.prepare([gone, long, samples[0]], left_out)) == [samples[0]]
    assert [(skipped.id, skipped.corrupt) for skipped in left_out] == [("gone", True), ("long", False)]
    assert "gone.wav" in left_out[0].cause and "31.00 s" in left_out[1].cause


def test_a_lesson_that_was_damaged_is_named(samples: list[Sample], teacher: Teacher, tmp_path: Path) -> None:
    damaged = Teacher(SPOKEN._decoder, tmp_path)
    list(damaged.prepare(samples[:1]))
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"{file.name}: not a lesson"):
        damaged.lesson(samples[0], "plain")


def test_a_lesson_is_of_one_teacher_and_one_recording(samples: list[Sample], tmp_path: Path) -> None:
    config, state = SPOKEN.config, dict(SPOKEN.model.state_dict())
    own = teacher_digest(config, state, SPOKEN.generation)
    name = next(name for name, tensor in state.items() if tensor.ndim == 2)
    other = teacher_digest(config, state | {name: state[name] * 1.01}, SPOKEN.generation)
    assert own == teacher_digest(config, state, SPOKEN.generation) != other
    assert samples[0].audio is not None and samples[0].audio.path is not None
    path = tmp_path / "clip.wav"
    path.write_bytes(Path(samples[0].audio.path).read_bytes())
    sample = replace(samples[0], audio=AudioRef(path=str(path)))
    teacher = Teacher(SPOKEN._decoder, tmp_path / "lessons", digest=own)
    list(teacher.prepare([sample]))
    assert teacher.knows(sample)
    assert not Teacher(SPOKEN._decoder, tmp_path / "lessons", digest=other).knows(sample)
    os.utime(path, ns=(0, 0))
    assert not teacher.knows(sample)
    with pytest.raises(ValueError, match="no lesson of clip-0: it is gone, or the sound has changed"):
        teacher.lesson(sample, "plain")


def test_a_teacher_that_is_loaded_is_known_by_its_weights(samples: list[Sample], tmp_path: Path) -> None:
    model, lessons = tiny_checkpoint(tmp_path / "model"), tmp_path / "lessons"
    first, second = (teacher_of(str(model), lessons, torch.device("cpu"), limit_mb=64) for _ in range(2))
    list(first.prepare(samples[:1]))
    assert second.knows(samples[0]) and not Teacher(SPOKEN._decoder, lessons).knows(samples[0])


def test_the_order_is_that_of_the_clips_whatever_is_known(samples: list[Sample], tmp_path: Path) -> None:
    teacher = Teacher(SPOKEN._decoder, tmp_path)
    list(teacher.prepare(samples[1:2]))
    assert list(teacher.prepare(samples)) == samples


# Batches.


def test_an_epoch_has_every_clip_once_and_the_next_another_order(samples: list[Sample], teacher: Teacher) -> None:
    lessons = lessons_of(samples, teacher)
    first, second = list(lessons), list(lessons)
    for epoch in (first, second):
        assert sorted(id.split("\n")[0] for batch in epoch for id in batch.ids) == [sample.id for sample in samples]
    assert seen(first) != seen(second)
    assert seen(list(lessons_of(samples, teacher))) == seen(first)


def test_going_on_is_as_if_never_stopped(samples: list[Sample], teacher: Teacher) -> None:
    whole = seen([*(lessons := lessons_of(samples, teacher)), *lessons])
    for cut in range(1, 6):
        lessons, begun = lessons_of(samples, teacher), []
        while len(begun) < cut:
            for batch in lessons:
                begun.append(batch)
                if len(begun) == cut:
                    break
        resumed = lessons_of(samples, teacher)
        resumed.load_state_dict(lessons.state_dict())
        rest = [*resumed, *resumed][: 6 - cut]
        assert seen([*begun, *rest]) == whole, cut


def test_clips_that_are_called_alike_are_refused(samples: list[Sample], teacher: Teacher) -> None:
    with pytest.raises(ValueError, match="'clip-1' is that of several"):
        lessons_of([*samples, samples[1]], teacher)


def test_going_on_with_other_clips_is_refused(samples: list[Sample], teacher: Teacher) -> None:
    state = lessons_of(samples, teacher).state_dict()
    lessons_of(samples, teacher).load_state_dict(state)
    with pytest.raises(ValueError, match="cannot go on with other clips"):
        lessons_of(samples[:-1], teacher).load_state_dict(state)


def test_margins_are_within_their_range(samples: list[Sample], teacher: Teacher) -> None:
    lessons, margins = lessons_of(samples, teacher, margins=(0.5, 2.0)), []
    for _ in range(8):
        for batch in lessons:
            for pack in batch.packs:
                margins += [mel.shape[1] / 100 - n / 50 for mel, n in zip(pack.mels, pack.heard, strict=True)]
    assert 0.48 <= min(margins) < 0.7 and 1.5 < max(margins) <= 2.02
    assert sum(margins) / len(margins) < 1.25, "small ones are drawn more often"


def test_some_clips_are_padded_to_the_window(samples: list[Sample], teacher: Teacher) -> None:
    lessons = lessons_of(samples, teacher, padded=0.5)
    frames = [mel.shape[1] for _ in range(8) for batch in lessons for pack in batch.packs for mel in pack.mels]
    assert 0.3 < sum(n == 3_000 for n in frames) / len(frames) < 0.7 and min(frames) < 500


# The objective.


def test_the_relative_error() -> None:
    wanted = torch.randn(3, 5, 4) * torch.tensor([1.0, 10.0, 100.0])[:, None, None]
    assert relative_error(wanted, wanted) == 0
    assert relative_error(torch.zeros_like(wanted), wanted).item() == pytest.approx(5)
    assert relative_error(wanted * 1.1, wanted).item() == pytest.approx(5 * 0.01, rel=1e-3)


def test_the_divergence() -> None:
    found, wanted = torch.randn(4, 7), torch.randn(4, 7)
    p = wanted.softmax(-1)
    expected = (p * (p.log() - found.softmax(-1).log())).sum()
    assert divergence(found, wanted).item() == pytest.approx(expected.item(), rel=1e-5)
    assert divergence(wanted, wanted).item() == pytest.approx(0, abs=1e-6)


def test_padded_to_the_window_there_is_nothing_to_learn(samples: list[Sample], teacher: Teacher) -> None:
    model, process = adapted(), Parallel("cpu")
    for margin, least, most in ((30.0, 0.0, 1e-4), (0.0, 1e-3, math.inf)):
        lessons = lessons_of(samples, teacher, margins=(margin, margin))
        objective = ContextObjective(lessons=lessons, head=model.decoder.head)
        packs = next(iter(lessons)).packs
        terms = objective(model, packs, objective.totals(packs), process)
        assert least <= terms.loss.item() <= most, margin


def test_it_learns_and_only_the_adapting_part_moves(samples: list[Sample], teacher: Teacher) -> None:
    model = adapted()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    lessons = lessons_of(samples, teacher, margins=(0.0, 0.0), batch=6)
    objective = ContextObjective(lessons=lessons, head=model.decoder.head)
    recipe = tiny_recipe(optimisation={"lr": 1e-2, "weight_decay": 0.0, "clip": 1.0})
    trainer = Trainer(recipe, model, objective, lessons, Parallel())
    losses = [trainer.step().loss for _ in range(12)]
    assert min(losses[-3:]) < 0.7 * losses[0], losses
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert moved and moved <= learning
    assert all(".adapter." in name or "delta_" in name or ".ttt" in name for name in learning)


def test_logits_that_are_wanted_are_the_teachers_own(samples: list[Sample], teacher: Teacher) -> None:
    """The cached states through the head are the teacher's distribution: greedy, they say its transcript."""
    lesson = teacher.lesson(samples[1], "plain")
    logits = SPOKEN.model.decoder.head(lesson.states[-1].float())
    model = adapted()
    lessons = lessons_of(samples, teacher, margins=(30.0, 30.0))
    packs = next(iter(lessons)).packs
    output = run_packs(model, packs)
    own = torch.cat([lessons.lesson(id).states[-1] for pack in packs for id in pack.ids]).float()
    assert F.mse_loss(output.logits, SPOKEN.model.decoder.head(own)) < 1e-4 * output.logits.square().mean()
    assert logits.shape == (len(lesson.tokens) - 1, SPOKEN.config.vocab_size)
    tokens = sum(len(lessons.lesson(id).tokens) - 1 for pack in packs for id in pack.ids)
    assert ContextObjective(lessons=lessons, head=model.decoder.head).totals(packs) == Totals(tokens, 2)
