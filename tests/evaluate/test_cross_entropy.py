"""Cross-entropy of references: the model's own probabilities, the same alone and packed, and counted where there is none."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("datasets", reason="corpora need an extra")

from data.memory import MemoryCorpus
from evaluate.corpora import clips, table
from generate.tiny import tiny_whisper_moe
from weights.whispers import tokenizer_json

from whisper_moe import WhisperMoE
from whisper_moe.data.examples import ExampleConfig, ExampleReader
from whisper_moe.data.sample import Sample
from whisper_moe.evaluate.cross_entropy import cross_entropy
from whisper_moe.generate.decode import WindowDecoder
from whisper_moe.media.languages import NewLanguage
from whisper_moe.media.mel import log_mel
from whisper_moe.media.tokenizer import Tokenizer
from whisper_moe.model.model import WhisperMoEModel
from whisper_moe.train.evaluation import Judge
from whisper_moe.weights.tokens import add_languages, read_tokenizer_json


def decoder_of(model: WhisperMoE) -> WindowDecoder:
    return WindowDecoder(model.model, model.tokenizer, model.generation)


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    return [clip.sample for clip in clips(table(tmp_path))]


def counts(found: list[tuple[float, int] | str]) -> list[tuple[float, int]]:
    assert not any(isinstance(each, str) for each in found), found
    return [each for each in found if not isinstance(each, str)]


def test_it_is_what_the_whole_model_says_of_a_clip_by_itself(tiny_model: WhisperMoE, samples: list[Sample]):
    """Computed here without the evaluation's own packing and prompts."""
    model, tokenizer, sample = tiny_model.model, tiny_model.tokenizer, samples[1]
    assert sample.audio is not None
    sound = torch.from_numpy(sample.audio.read())
    mel = log_mel(sound, model.config.n_mels, samples=len(sound) + 8_000)
    prompt = [tokenizer.sot, tokenizer.language_id("en"), tokenizer.tasks["transcribe"], tokenizer.no_timestamps]
    text = [*tokenizer.encode(" a dog barked"), tokenizer.eot]
    with torch.no_grad():
        encoded = model.encoder([mel], heard=[50])
        state = model.decoder.start(encoded)
        logits = model.decoder.head(model.decoder.extend(torch.tensor([[*prompt, *text[:-1]]]), state))[0].float()
    expected = -logits.log_softmax(-1)[len(prompt) - 1 :].gather(1, torch.tensor(text)[:, None]).sum()
    ((found, number),) = counts(cross_entropy(decoder_of(tiny_model), [sample], margin=0.5))
    assert number == len(text)
    assert found == pytest.approx(float(expected), rel=1e-4)


def test_packed_it_is_what_it_is_alone(tiny_model: WhisperMoE, samples: list[Sample]):
    decoder = decoder_of(tiny_model)
    together = counts(cross_entropy(decoder, samples, margin=0.5))
    alone = [counts(cross_entropy(decoder, [sample], margin=0.5))[0] for sample in samples]
    assert [number for _, number in together] == [number for _, number in alone]
    assert [value for value, _ in together] == pytest.approx([value for value, _ in alone], rel=1e-4)


def test_a_model_that_knows_nothing_needs_the_logarithm_of_its_vocabulary(samples: list[Sample]):
    model = tiny_whisper_moe(seed=3)
    with torch.no_grad():
        model.model.decoder.token_embedding.weight.zero_()
    for value, number in counts(cross_entropy(decoder_of(model), samples, margin=0.5)):
        assert value / number == pytest.approx(math.log(model.config.vocab_size), rel=1e-5)


def test_what_has_no_cross_entropy_says_why(tiny_model: WhisperMoE, samples: list[Sample], tmp_path: Path):
    import numpy as np
    from media.recordings import encode

    from whisper_moe.data.sample import AudioRef

    long = encode(tmp_path / "long.wav", np.zeros((1, 31 * 16_000), np.float32), 16_000, "pcm_f32le")
    asked = [
        samples[0],
        replace(samples[0], text="a " * 200),
        replace(samples[0], language="tlh", target_language="tlh"),
        replace(samples[0], task="sign"),
        replace(samples[0], audio=AudioRef(path=str(long))),
        replace(samples[0], text=" "),
    ]
    found = cross_entropy(decoder_of(tiny_model), asked, margin=0.5)
    said = [each if isinstance(each, str) else "" for each in found]
    assert said[0] == said[5] == ""
    assert "its text has 404 tokens; the decoder has 64 positions" in said[1]
    assert "tlh" in said[2] and "the task 'sign'" in said[3] and "longer than the model's window" in said[4]
    assert found[5][1] == 1  # the end of text


def test_another_language_in_the_prompt_is_another_figure(tiny_model: WhisperMoE, samples: list[Sample]):
    decoder = decoder_of(tiny_model)
    own, told = (counts(cross_entropy(decoder, samples[:1], margin=0.5, language=code)) for code in (None, "hi"))
    assert own != told


@pytest.mark.parametrize("languages", [(), ("or",)], ids=["Whisper's own languages", "and Odia"])
def test_it_is_the_loss_that_a_run_is_judged_by(samples: list[Sample], languages: tuple[str, ...]):
    """Also where new tokens take a part of the probability, and the language itself is to be told."""
    old = tiny_whisper_moe()
    files: dict[str, Path | bytes] = {"tokenizer.json": tokenizer_json()}
    wanted = [NewLanguage(code=code) for code in languages]
    new = add_languages(old.config, old.model.state_dict(), old.generation, files, wanted)
    tokenizer = Tokenizer(read_tokenizer_json(new.tokenizer_files), new.generation)
    model = WhisperMoEModel(new.config).eval()
    model.load_state_dict(new.state)
    heard = [*samples, *(replace(samples[0], language=code, target_language=code) for code in languages)]
    heard.append(replace(samples[1], text="<|0.00|> cafe\u0301<|0.40|>"))
    reader = ExampleReader(tokenizer, new.config, ExampleConfig())
    judge = Judge(
        [MemoryCorpus(heard)], reader, tokenizer, new.generation, margin=0.5, batch_size=3, limit=None, decode=False
    )  # fmt: skip
    found = counts(cross_entropy(WindowDecoder(model, tokenizer, new.generation), heard, margin=0.5))
    mean = sum(value for value, _ in found) / sum(number for _, number in found)
    assert mean == pytest.approx(judge(model)["loss"], rel=1e-6)


def test_a_text_is_cut_into_the_tokens_that_it_is_trained_as(tiny_model: WhisperMoE, samples: list[Sample]):
    """Letters and their accents are one sign, in NFC; times are tokens, counted like the words between them."""
    decoder, sample = decoder_of(tiny_model), samples[0]
    composed, taken_apart = (replace(sample, text=text) for text in ("caf\u00e9", "cafe\u0301"))
    timed = replace(sample, text="<|0.00|> a cat<|0.40|>")
    first, second, third = counts(cross_entropy(decoder, [composed, taken_apart, timed], margin=0.5))
    assert first == second
    assert third[1] == len(tiny_model.tokenizer.encode(" a cat")) + 3
