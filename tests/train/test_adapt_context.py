"""A model learns from itself: lessons are the padded model's, batches are functions of the seed, only the adapting part moves."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from generate.tiny import tiny_whisper_moe
from media.recordings import encode
from train.tiny import recipe_tree, tiny_recipe

from recipes.context.adapt import (
    MODES,
    Adapting,
    ContextObjective,
    ContextRecipe,
    ContextSettings,
    LessonReader,
    Lessons,
    Teacher,
    divergence,
    relative_error,
    teacher_digest,
)
from whisper_moe.config import FULL_WINDOW, AdaptConfig
from whisper_moe.data.examples import Pack
from whisper_moe.data.loader import PackedLoader
from whisper_moe.data.sample import AudioRef, Sample
from whisper_moe.data.sampler import LoaderConfig
from whisper_moe.generate.options import TranscribeOptions
from whisper_moe.media.mel import log_mel
from whisper_moe.model.model import WhisperMoEModel
from whisper_moe.packing import Layout
from whisper_moe.train.loop import Trainer
from whisper_moe.train.losses import Totals, freeze, run_packs
from whisper_moe.train.parallel import Parallel
from whisper_moe.train.reading import RecipeError, checked
from whisper_moe.train.recipe import load_recipe
from whisper_moe.train.run import RECORD, script
from whisper_moe.weights.checkpoint import Loaded, load_checkpoint
from whisper_moe.weights.upcycle import add_parts

RATE = 16_000
SECONDS = (0.5, 1.1, 2.0, 3.3, 0.8, 1.6)
SPOKEN = tiny_whisper_moe()
GIVEN = ContextSettings()
YAML = Path(__file__).parents[2] / "recipes/context/adapt.yaml"
RECIPE = load_recipe(YAML, kind=ContextRecipe).model


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    folder = tmp_path_factory.mktemp("clips")
    made = []
    for index, seconds in enumerate(SECONDS):
        sound = np.random.default_rng(index).normal(0, 0.1, round(seconds * RATE)).astype(np.float32)
        path = encode(folder / f"{index}.wav", sound[None], RATE, "pcm_f32le")
        made.append(
            Sample(
                id=f"clip-{index}",
                task="transcribe",
                text="",
                language="en",
                target_language="en",
                audio=AudioRef(path=str(path)),
            )
        )
    return made


@pytest.fixture(scope="module")
def lessons(samples: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> Lessons:
    return taught(samples, tmp_path_factory.mktemp("lessons"))


def taught(samples: Iterable[Sample], folder: Path, digest: str = "", **limit: int) -> Lessons:
    return Teacher(SPOKEN._decoder, Lessons(folder, digest)).teach(samples, **limit)


def batches_of(lessons: Lessons, given: ContextSettings = GIVEN, batch: int = 4) -> PackedLoader:
    reader = LessonReader(SPOKEN.tokenizer, SPOKEN.config, given, lessons)
    config = LoaderConfig(batch_size=batch, seed=3, max_corrupt_share=1.0)
    return PackedLoader([lessons], SPOKEN.tokenizer, SPOKEN.config, config, reader=reader)


def packs_of(lessons: Lessons, margin: float) -> tuple[ContextSettings, tuple[Pack, ...]]:
    given = ContextSettings(margins=(margin, margin))
    return given, next(iter(batches_of(lessons, given))).packs


def adapted() -> WhisperMoEModel:
    everywhere = AdaptConfig(encoder_layers=(0, 1), decoder_layers=(0,), adapter_dim=8)
    config, state = add_parts(SPOKEN.config, SPOKEN.model.state_dict(), adapt=everywhere)
    model = WhisperMoEModel(config)
    model.load_state_dict(state)
    freeze(model, RECIPE.freeze, RECIPE.train)
    return model


# Lessons.


@pytest.mark.parametrize("mode", MODES)
def test_a_lesson_is_what_the_padded_model_says(lessons: Lessons, mode: str) -> None:
    options = TranscribeOptions(timestamps=mode == "timestamps")
    for sample in list(lessons)[MODES.index(mode) : 6 : 2]:
        assert sample.audio is not None
        clip = sample.audio.read()
        (result,) = SPOKEN._decoder.decode([clip], options, temperature=0.0, margin=FULL_WINDOW)
        lesson = lessons.lesson(sample.id)
        assert tuple(lesson.tokens[-1 - len(result.hypothesis.tokens) : -1].tolist()) == result.hypothesis.tokens
        mel = log_mel(torch.from_numpy(clip), SPOKEN.config.n_mels, samples=30 * RATE)
        encoded = SPOKEN.model.encoder([mel], valid_lengths=[math.ceil(len(clip) / 320)])
        read = lesson.tokens[:-1]
        decoded = SPOKEN.model.decoder(read, Layout([len(read)]), encoded)
        expected = torch.stack([*decoded.depths, decoded.states_TD])
        assert (lesson.states.float() - expected).abs().max() < 2e-3 * expected.abs().max()


def test_lessons_are_made_once_and_the_order_is_that_of_the_clips(samples: list[Sample], tmp_path: Path) -> None:
    taught(samples[1:2], tmp_path)
    (first,) = [path.stat().st_mtime_ns for path in tmp_path.iterdir()]
    lessons = taught(samples, tmp_path)
    assert lessons.samples == samples and lessons.path(samples[1]).stat().st_mtime_ns == first
    unable = Teacher(SPOKEN._decoder, Lessons(tmp_path))
    unable._teach = None  # pyright: ignore[reportAttributeAccessIssue]
    assert unable.teach(samples).samples == samples


def test_a_folder_that_is_full_is_said(samples: list[Sample], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="over its limit of 0 MB"):
        taught(samples, tmp_path, limit_mb=0)


def test_a_clip_that_gives_no_lesson_is_left_out_by_name(samples: list[Sample], tmp_path: Path) -> None:
    path = encode(tmp_path / "long.wav", np.full((1, 31 * RATE), 0.1, np.float32), RATE, "pcm_f32le")
    long = replace(samples[0], id="long", audio=AudioRef(path=str(path)))
    gone = replace(long, id="gone", audio=AudioRef(path=str(tmp_path / "gone.wav")))
    lessons = taught([gone, long, samples[0]], tmp_path / "lessons")
    assert lessons.samples == [samples[0]]
    assert [(skipped.id, skipped.corrupt) for skipped in lessons.left_out] == [("gone", True), ("long", False)]
    assert "gone.wav" in lessons.left_out[0].cause and "31.00 s" in lessons.left_out[1].cause
    assert batches_of(lessons, batch=1).excluded == tuple(lessons.left_out)


def test_a_lesson_that_was_damaged_is_named(samples: list[Sample], tmp_path: Path) -> None:
    lessons = taught(samples[:1], tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"{file.name}: not a lesson"):
        lessons.lesson(lessons[0].id)


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
    lessons = taught([sample], tmp_path / "lessons", own)
    assert lessons.path(sample).is_file() and not Lessons(tmp_path / "lessons", other).path(sample).exists()
    os.utime(path, ns=(0, 0))
    assert not lessons.path(sample).exists()
    with pytest.raises(ValueError, match="no lesson of clip-0: it is gone, or the sound has changed"):
        lessons.lesson(lessons[0].id)


# Batches.


def test_an_epoch_has_every_clip_with_and_without_timestamps(samples: list[Sample], lessons: Lessons) -> None:
    loader = batches_of(lessons)
    for _ in range(2):
        ids = [id.split("\n") for batch in loader for id in batch.ids]
        assert sorted((name, mode) for name, _, mode in ids) == [(s.id, mode) for s in samples for mode in MODES]
    example = LessonReader(SPOKEN.tokenizer, SPOKEN.config, ContextSettings(), lessons).read(lessons[0], 0.5)
    said = lessons.lesson(lessons[0].id).tokens.tolist()
    assert (*example.tokens, example.labels[-1]) == tuple(said) and example.labels == tuple(said[1:])


def test_a_lesson_is_measured_by_its_tokens_alone(lessons: Lessons, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its states are hundreds of times as many bytes, and a survey is of all lessons."""

    def whole(*_: object) -> None:
        raise AssertionError("the states were read")

    monkeypatch.setattr(lessons, "lesson", whole)
    reader = LessonReader(SPOKEN.tokenizer, SPOKEN.config, ContextSettings(), lessons)
    assert reader.measure(lessons[0], 1.0)[1] == len(lessons.tokens(lessons[0].id)) - 1


@pytest.mark.parametrize("padded", [0.0, 0.5])
def test_margins_are_within_their_range_but_for_what_is_padded(lessons: Lessons, padded: float) -> None:
    loader, margins = batches_of(lessons, ContextSettings(margins=(0.5, 2.0), padded=padded)), []
    for pack in (pack for _ in range(8) for batch in loader for pack in batch.packs):
        margins += [mel.shape[1] / 100 - n / 50 for mel, n in zip(pack.mels, pack.valid_lengths, strict=True)]
    drawn = [margin for margin in margins if margin < 20]
    assert abs(len(drawn) / len(margins) - (1 - padded)) < 0.2
    assert 0.48 <= min(drawn) < 0.7 and 1.5 < max(drawn) <= 2.02
    assert sum(drawn) / len(drawn) < 1.25, "small ones are drawn more often"


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


def test_padded_to_the_window_there_is_nothing_to_learn(lessons: Lessons) -> None:
    model = adapted()
    for margin, least, most in ((30.0, 0.0, 1e-4), (0.0, 1e-3, math.inf)):
        given, packs = packs_of(lessons, margin)
        objective = ContextObjective(given, lessons, model.decoder.head)
        terms = objective(model, packs, objective.totals(packs), Parallel())
        assert least <= terms.loss.item() <= most, margin


def test_it_learns_and_only_the_adapting_part_moves(lessons: Lessons) -> None:
    model, given = adapted(), ContextSettings(margins=(0.0, 0.0))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    objective = ContextObjective(given, lessons, model.decoder.head)
    recipe = tiny_recipe(optimisation={"lr": 1e-2, "weight_decay": 0.0, "clip": 1.0})
    trainer = Trainer(recipe, model, objective, batches_of(lessons, given, 12), Parallel())
    losses = [trainer.step()["loss"] for _ in range(12)]
    assert min(losses[-3:]) < 0.7 * losses[0], losses
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert moved and moved <= learning
    assert all(".adapter." in name or "delta_" in name or ".ttt" in name for name in learning)


def test_logits_that_are_wanted_are_the_teachers_own(lessons: Lessons) -> None:
    """The cached states through the head are the teacher's distribution: greedy, they say its transcript."""
    model = adapted()
    given, packs = packs_of(lessons, 30.0)
    output = run_packs(model, packs)
    said = [lessons.lesson(id) for pack in packs for id in pack.ids]
    own = torch.cat([lesson.states[-1] for lesson in said]).float()
    assert F.mse_loss(output.logits, SPOKEN.model.decoder.head(own)) < 1e-4 * output.logits.square().mean()
    tokens = sum(len(lesson.tokens) - 1 for lesson in said)
    assert ContextObjective(given, lessons, model.decoder.head).totals(packs) == Totals(tokens, len(said))


# Runs.


def a_recipe(material: Path, **sections: Any) -> dict[str, Any]:
    tree = recipe_tree(material / "model", material / "data", lr=1e-2)
    tree["model"] |= {"adapt": {"encoder_layers": [0, 1], "adapter_dim": 8}, "freeze": ["*"], "train": ["*.adapter.*"]}
    tree["data"]["train"][0]["limit"] = 4
    return tree | {"context": {"margins": [0.0, 1.0]}} | sections


def test_a_run_goes_on_as_if_it_had_not_stopped(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "small.yaml").write_text(json.dumps(a_recipe(material)), "utf-8")

    def called(*words: str) -> int:
        monkeypatch.setattr("sys.argv", ["adapt.py", *words])
        return script(ContextRecipe, "")

    small, whole, parts = (str(tmp_path / name) for name in ("small.yaml", "whole", "parts"))
    assert called(small, "optimisation.steps=4", "-o", whole, f"context.lessons={tmp_path / 'lessons'}") == 0
    assert called(small, "optimisation.steps=2", "-o", parts) == 0
    assert called("--resume", parts, "optimisation.steps=4", f"context.lessons={tmp_path / 'lessons'}") == 0
    states = [load_checkpoint(Path(name) / "model") for name in (whole, parts)]
    assert states[0].config == states[1].config and states[0].config.margin == 0.0
    assert all(torch.equal(states[0].state[key], states[1].state[key]) for key in states[0].state)
    before = load_checkpoint(material / "model").state
    assert all(torch.equal(states[0].state[key], before[key]) for key in before)
    assert any(".adapter." in key and tensor.any() for key, tensor in states[0].state.items())
    assert json.loads((Path(parts) / RECORD).read_text("utf-8"))["status"] == "finished"
    assert len(list((tmp_path / "lessons").iterdir())) == len(list((Path(parts) / "lessons").iterdir())) == 4
    assert called("--resume", parts, "context.padded=0.5") == 2
    assert "context.padded was 0.0, is 0.5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": {"adapt": {"full_windows": False}}, "context": {"padded": 0.1}}, "full windows teach nothing"),
        ({"context": {"margins": [2.0, 1.0]}}, "context: margins must be 0 to 30 seconds, the lesser first"),
        ({"context": {"margin": 1}}, "context.margin is not a key of a recipe; did you mean context.margins?"),
    ],
)
def test_a_mistake_names_the_key_and_what_was_meant(material: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as raised:
        checked(ContextRecipe, a_recipe(material, **change), "test")
    assert said in str(raised.value)


def test_full_windows_that_the_loaded_model_leaves_alone_teach_nothing(material: Path, tmp_path: Path) -> None:
    tree = a_recipe(material, context={"padded": 0.1})
    del tree["model"]["adapt"]
    adapt = AdaptConfig(encoder_layers=(0, 1), adapter_dim=8, full_windows=False)
    start = Loaded(SPOKEN.config.model_copy(update={"adapt": adapt}), {}, {}, b"")
    task = Adapting(checked(ContextRecipe, tree, "test"), start, Parallel(), lambda skipped: None, tmp_path)
    with pytest.raises(RecipeError, match="full windows teach nothing"):
        task.learned(SPOKEN.model)
