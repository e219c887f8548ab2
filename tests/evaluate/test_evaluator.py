"""Cross-entropy of references: the model's own probabilities, the same alone and packed, and counted where there is none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("datasets", reason="corpora need an extra")

from data.memory import MemoryCorpus
from evaluate.corpora import clips, table
from generate.tiny import tiny_whisper_moe
from media.recordings import encode
from weights.whispers import tokenizer_json

from whisper_moe import WhisperMoE
from whisper_moe.data.examples import ExampleConfig, ExampleReader
from whisper_moe.data.sample import AudioRef, Sample, Skipped
from whisper_moe.evaluate.metrics import Evaluated, Evaluator
from whisper_moe.media.languages import NewLanguage
from whisper_moe.media.mel import log_mel
from whisper_moe.model.model import WhisperMoEModel
from whisper_moe.weights.checkpoint import Loaded
from whisper_moe.weights.upcycle import add_languages


def evaluator_of(model: WhisperMoE, **options: bool) -> Evaluator:
    reader = ExampleReader(model.tokenizer, model.config, ExampleConfig(empty_text=True, margin=0.5))
    return Evaluator(reader, model.tokenizer, model.generation, margin=0.5, **options)


def evaluated(model: WhisperMoE, samples: Sequence[Sample], **options: bool) -> list[Evaluated]:
    return evaluator_of(model, **options).batch(model.model, samples)


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    return [clip.sample for clip in clips(table(tmp_path))]


def test_it_is_what_the_whole_model_says_of_a_clip_by_itself(tiny_model: WhisperMoE, samples: list[Sample]):
    """Computed here without the evaluation's own packing and prompts."""
    model, tokenizer, sample = tiny_model.model, tiny_model.tokenizer, samples[1]
    assert sample.audio is not None
    sound = torch.from_numpy(sample.audio.read())
    mel = log_mel(sound, model.config.n_mels, samples=len(sound) + 8_000)
    prompt = [tokenizer.sot, tokenizer.language_id("en"), tokenizer.tasks["transcribe"], tokenizer.no_timestamps]
    text = [*tokenizer.encode(" a dog barked"), tokenizer.eot]
    with torch.no_grad():
        encoded = model.encoder([mel], valid_lengths=[50])
        state = model.decoder.start(encoded)
        logits = model.decoder.head(model.decoder.extend(torch.tensor([[*prompt, *text[:-1]]]), state))[0].float()
    expected = -logits.log_softmax(-1)[len(prompt) - 1 :].gather(1, torch.tensor(text)[:, None]).sum()
    (found,) = evaluated(tiny_model, [sample])
    assert (found.skipped, found.tokens) == (None, len(text))
    assert found.cross_entropy == pytest.approx(float(expected), rel=1e-4)


def test_packed_it_is_what_it_is_alone(tiny_model: WhisperMoE, samples: list[Sample]):
    together = evaluated(tiny_model, samples)
    alone = [evaluated(tiny_model, [sample])[0] for sample in samples]
    assert [each.tokens for each in together] == [each.tokens for each in alone]
    assert [each.cross_entropy for each in together] == pytest.approx([e.cross_entropy for e in alone], rel=1e-4)


def test_a_model_that_knows_nothing_needs_the_logarithm_of_its_vocabulary(samples: list[Sample]):
    model = tiny_whisper_moe(seed=3)
    with torch.no_grad():
        model.model.decoder.token_embedding.weight.zero_()
    for each in evaluated(model, samples):
        assert each.cross_entropy / each.tokens == pytest.approx(math.log(model.config.vocab_size), rel=1e-5)


def test_what_has_no_cross_entropy_says_why(tiny_model: WhisperMoE, samples: list[Sample], tmp_path: Path):
    long = encode(tmp_path / "long.wav", np.zeros((1, 31 * 16_000), np.float32), 16_000, "pcm_f32le")
    asked = [
        samples[0],
        replace(samples[0], text="a " * 200),
        replace(samples[0], language="tlh", target_language="tlh"),
        replace(samples[0], task="sign"),
        replace(samples[0], audio=AudioRef(path=str(long))),
        replace(samples[0], text=" "),
        Skipped(id="row 7", cause="no text"),
    ]
    found = evaluator_of(tiny_model).batch(tiny_model.model, asked)
    causes = [str(each.skipped) for each in found]
    assert causes[0] == causes[5] == "None"
    assert "its text has 404 tokens; the decoder has 64 positions" in causes[1]
    assert "tlh" in causes[2] and "the task 'sign'" in causes[3] and "the window has" in causes[4]
    assert found[5].tokens == 1  # the end of text
    assert "no text" in causes[6]


@pytest.mark.parametrize("languages", [(), ("or",)], ids=["Whisper's own languages", "and Odia"])
def test_a_runs_loss_is_the_mean_of_the_samples(samples: list[Sample], languages: tuple[str, ...]):
    """Also where new tokens take a part of the probability, and the language itself is to be told."""
    old = tiny_whisper_moe()
    wanted = [NewLanguage(code=code) for code in languages]
    new = add_languages(Loaded(old.config, old.model.state_dict(), old.generation, tokenizer_json()), wanted)
    tokenizer = new.tokenizer
    model = WhisperMoEModel(new.config)
    model.load_state_dict(new.state)
    heard = [*samples, *(replace(samples[0], language=code, target_language=code) for code in languages)]
    heard.append(replace(samples[1], text="<|0.00|> cafe\u0301<|0.40|>"))
    evaluator = Evaluator(ExampleReader(tokenizer, new.config, ExampleConfig()), tokenizer, new.generation, margin=0.5)
    figures = evaluator.figures(model, [MemoryCorpus(heard)], batch_size=3)
    assert figures is not None and model.training
    found = evaluator.batch(model.eval(), heard)
    assert figures == {
        "loss": pytest.approx(sum(e.cross_entropy for e in found) / sum(e.tokens for e in found), rel=1e-6)
    }


def test_texts_are_those_of_each_margin_and_of_a_clip_by_itself(tiny_model: WhisperMoE, samples: list[Sample]):
    both = evaluated(tiny_model, samples, decode=True, padded=True)
    alone = [evaluated(tiny_model, [sample], decode=True)[0].texts[""] for sample in samples]
    reader = ExampleReader(tiny_model.tokenizer, tiny_model.config, ExampleConfig())
    at_30 = Evaluator(reader, tiny_model.tokenizer, tiny_model.generation, margin=30.0, decode=True, padded=True)
    padded = [each.texts for each in at_30.batch(tiny_model.model, samples)]
    assert [each.texts[""] for each in both] == alone
    assert [{"": each.texts["_padded"]} for each in both] == padded
    assert alone != [each[""] for each in padded]


def test_figures_are_of_all_corpora_and_of_each_and_end_where_asked(tiny_model: WhisperMoE, samples: list[Sample]):
    pytest.importorskip("jiwer")
    evaluator, corpora = evaluator_of(tiny_model, decode=True), [MemoryCorpus(samples, "a"), MemoryCorpus(samples, "b")]
    figures = evaluator.figures(tiny_model.model, corpora, batch_size=3, limit=2)
    assert figures is not None
    assert figures.keys() == {f"{name}{of}" for name in ("loss", "wer", "cer") for of in ("", "/a", "/b")}
    assert figures["loss"] == pytest.approx(figures["loss/a"]) == pytest.approx(figures["loss/b"])
    assert evaluator.figures(tiny_model.model, corpora, batch_size=3, stop_requested=lambda: True) is None


def test_a_text_is_cut_into_the_tokens_that_it_is_trained_as(tiny_model: WhisperMoE, samples: list[Sample]):
    """Letters and their accents are one sign, in NFC; times are tokens, counted like the words between them."""
    composed, taken_apart = (replace(samples[0], text=text) for text in ("caf\u00e9", "cafe\u0301"))
    timed = replace(samples[0], text="<|0.00|> a cat<|0.40|>")
    first, second, third = evaluated(tiny_model, [composed, taken_apart, timed])
    assert (first.cross_entropy, first.tokens) == (second.cross_entropy, second.tokens)
    assert third.tokens == len(tiny_model.tokenizer.encode(" a cat")) + 3
