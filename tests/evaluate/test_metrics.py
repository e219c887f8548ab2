"""A corpus's figures: counts, bootstrap intervals, paired differences, loops, scripts, translation scores, labels; and
cross-entropy of references: the model's own probabilities, the same alone and packed, and counted where there is none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

for needed in ("datasets", "rapidfuzz", "whisper_normalizer", "sacrebleu"):
    pytest.importorskip(needed, reason="what evaluation needs is an extra")

import numpy as np
import torch
from data.memory import MemoryCorpus
from evaluate.corpora import clips, table
from generate.tiny import tiny_whisper_moe
from media.recordings import encode
from weights.whispers import tokenizer_json

from whisper_moe import WhisperMoE
from whisper_moe.data.examples import ExampleConfig, ExampleReader
from whisper_moe.data.sample import AudioRef, Sample, Skipped
from whisper_moe.evaluate import metrics
from whisper_moe.evaluate.metrics import (
    ErrorCounts,
    Evaluated,
    Evaluator,
    character_counts,
    clip_counts,
    interval,
    label_accuracy,
    longest_loop,
    paired_difference,
    script_fidelity,
    translation_scores,
)
from whisper_moe.media.languages import NewLanguage
from whisper_moe.media.mel import log_mel
from whisper_moe.model.model import WhisperMoEModel
from whisper_moe.weights.checkpoint import Loaded
from whisper_moe.weights.upcycle import add_languages

REFERENCES: tuple[str, ...] = ("the cat sat on the mat", "a dog barked", "birds sing in spring")


@pytest.mark.parametrize(
    ("references", "transcripts", "edits", "words"),
    [
        (REFERENCES, ["the cat sat on a mat", "a dog barked loudly twice", "birds sing in"], [1, 2, 1], [6, 3, 4]),
        (["Mr. Brown liked the colour, didn't he?"], ["mister brown liked the color did not he"], [0], [8]),
        (["a dog barked", ""], ["", "thank you"], [3, 2], [3, 0]),
    ],
    ids=["edits", "case, punctuation and spelling are none", "nothing, and words for silence"],
)
def test_corpus_rate_is_all_edits_over_all_words(
    references: Sequence[str], transcripts: list[str], edits: list[int], words: list[int]
) -> None:
    counts = clip_counts(references, transcripts)
    assert (counts.part.tolist(), counts.whole.tolist()) == (edits, words)
    assert counts.value == pytest.approx(sum(edits) / sum(words))


@pytest.mark.parametrize("language", ["en", "hi", "zh"])
def test_timestamps_are_no_words_and_join_none(language: str) -> None:
    """A reference with times scores as one without, in every figure."""
    stretches = {"en": ("see you there,", "my friend"), "hi": ("मैं वहाँ", "आऊँगा"), "zh": ("你好", "朋友")}[language]
    plain, timed = " ".join(stretches), "<|0.00|>{}<|1.00|>{}<|2.00|>".format(*stretches)
    sides, codes = ([plain], [timed]), [language]
    for said in sides:
        for written in sides:
            assert clip_counts(said, written, codes).part.tolist() == [0]
            assert character_counts(said, written, codes).part.tolist() == [0]
            assert label_accuracy(said, written, codes).value == 1
    for text in (plain, timed):
        assert longest_loop(text, language) == 1
        assert script_fidelity([text], codes).rows.tolist() == script_fidelity([plain], codes).rows.tolist()
        for figure in ("bleu", "chrf"):
            found = [translation_scores(said, [plain], codes)[figure].rows.tolist() for said in ([plain], [text])]
            assert found[0] == found[1]


def test_the_interval_holds_the_rate_narrows_with_clips_and_repeats() -> None:
    random = np.random.default_rng(1)
    wide = ErrorCounts.of(random.poisson(1, 20), np.full(20, 10))
    narrow = ErrorCounts.of(np.tile(wide.part, 25), np.tile(wide.whole, 25))
    low, high = interval(wide)
    assert low < wide.value < high
    assert interval(wide) == (low, high)
    closer = interval(narrow)
    assert (closer[1] - closer[0]) == pytest.approx((high - low) / 5, rel=0.2)


def test_the_interval_covers_the_true_rate_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(2)
    covered = 0
    for _ in range(200):
        low, high = interval(ErrorCounts.of(random.binomial(10, 0.15, 60), np.full(60, 10)))
        covered += low <= 0.15 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_a_system_does_not_differ_from_itself_and_differences_are_antisymmetric() -> None:
    random = np.random.default_rng(3)
    one = ErrorCounts.of(random.poisson(1, 50), np.full(50, 10))
    two = ErrorCounts.of(random.poisson(1, 50), np.full(50, 10))
    assert paired_difference(one, one) == {"difference": 0, "low": 0, "high": 0, "share_worse": 0}
    forth, back = paired_difference(one, two), paired_difference(two, one)
    assert forth["difference"] == pytest.approx(-back["difference"])
    assert (forth["low"], forth["high"]) == pytest.approx((-back["high"], -back["low"]))


def test_pairing_sees_a_difference_that_separate_intervals_hide() -> None:
    random = np.random.default_rng(4)
    base = ErrorCounts.of(random.poisson(2, 100), np.full(100, 10))
    worse = ErrorCounts.of(base.part + (np.arange(100) % 5 == 0), base.whole)
    found = paired_difference(worse, base)
    assert found["low"] > 0
    assert found["share_worse"] == 1
    assert interval(worse)[0] < interval(base)[1]


@pytest.mark.parametrize(
    ("language", "text", "expected"),
    [
        ("en", "", 0),
        ("en", "nothing is said twice here", 1),
        ("en", "no no no", 3),
        ("en", "so I said so I said so I said stop", 3),
        ("en", "the cat and the dog and the bird", 1),
        ("hi", "नमस्ते नमस्ते नमस्ते", 3),
    ],
)
def test_loops_are_phrases_said_in_a_row(language: str, text: str, expected: int) -> None:
    assert longest_loop(text, language) == expected


def test_each_clip_is_compared_by_the_rules_of_its_language() -> None:
    """Spaces that only the normaliser puts there are no characters: else every other one of Chinese or Thai is right,
    whatever is written."""
    said = ["नमस्ते", "a b", "你好世界朋友", "สวัสดี"]
    counts = character_counts(said, ["नमस्त", "ab", "天地玄黄宇宙", "สวัสดี"], ["hi", "en", "zh", "th"])
    assert counts.part.tolist() == [1, 1, 6, 0] and counts.whole.tolist() == [6, 3, 6, 6]
    counts = clip_counts(["क़लम।", "Mr. Brown"], ["क\u093cलम", "mister brown"], ["hi", "en"])
    assert counts.part.tolist() == [0, 0] and counts.whole.tolist() == [1, 2]


def test_without_words_or_clips_there_is_no_figure_and_no_interval() -> None:
    for counts in (clip_counts(["", "…"], ["", "thank you"], "de"), clip_counts([], [])):
        assert np.isnan(counts.value)
        assert np.isnan(interval(counts)).all()
        assert np.isnan(paired_difference(counts, counts)["difference"])


def test_a_resample_without_words_does_not_spoil_the_interval() -> None:
    """One clip of two has words: a quarter of the resamples have none."""
    low, high = interval(ErrorCounts.of([1, 0], [4, 0]))
    assert (low, high) == (0.25, 0.25)


def test_letters_of_the_wrong_script_count_by_letter_and_not_by_clip() -> None:
    found = script_fidelity(["नमस्ते", "hi", "", "12"], ["hi", "hi", "hi", "hi"])
    assert found.value == pytest.approx(4 / 6)
    assert np.isnan(script_fidelity([""], ["hi"]).value)


def test_labels_are_right_or_wrong_whatever_their_case_and_spacing() -> None:
    found = label_accuracy(["Good Morning", "cat", "dog"], ["good morning.", "Cat", ""], ["en"] * 3)
    assert found.rows.tolist() == [[1, 1], [1, 1], [0, 1]]


SENTENCES = ["The cat sat on the mat today.", "A dog barked at the tall man.", "Birds sing in the early spring."]
OTHER = ["The cat sat on a mat today.", "A dog barked at a man.", "Nothing of the kind was said."]


def test_translation_scores_are_sacrebleus_also_of_a_part_and_of_clips_that_are_drawn_twice() -> None:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    def bleu_of(*clips: int) -> float:
        return BLEU().corpus_score([OTHER[i] for i in clips], [[SENTENCES[i] for i in clips]]).score

    scores = translation_scores(SENTENCES, OTHER, ["en"] * 3)
    bleu, chrf = scores["bleu"], scores["chrf"]
    assert bleu.value == pytest.approx(bleu_of(0, 1, 2))
    assert chrf.value == pytest.approx(CHRF(word_order=2).corpus_score(OTHER, [SENTENCES]).score)
    assert bleu.of_clips([2, 0]).value == pytest.approx(bleu_of(2, 0))
    assert float(bleu.score(np.array([2, 0, 1]) @ bleu.rows)) == pytest.approx(bleu_of(0, 0, 2))
    assert "tok:13a" in bleu.signature and "nw:2" in chrf.signature


def test_an_indian_target_is_tokenised_with_its_punctuation_apart() -> None:
    said, written = ["यह एक बहुत अच्छी किताब है।"], ["यह एक बहुत अच्छी किताब है"]
    scores = translation_scores(said, written, ["hi"])
    assert "tok:intl" in scores["bleu"].signature
    assert scores["bleu"].value > translation_scores(said, written, ["en"])["bleu"].value


def test_for_translations_and_labels_less_is_worse() -> None:
    better, worse = (translation_scores(SENTENCES, texts, ["en"] * 3)["bleu"] for texts in (SENTENCES, OTHER))
    assert paired_difference(worse, better)["share_worse"] == 1
    assert paired_difference(better, worse)["share_worse"] == 0


def test_draws_do_not_depend_on_how_many_are_held_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = clip_counts(REFERENCES, ["the cat sat", "a dog", "spring"])
    whole = interval(counts)
    monkeypatch.setattr(metrics, "_DRAWN_AT_ONCE", 40)
    assert interval(counts) == whole


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
    evaluator, corpora = evaluator_of(tiny_model, decode=True), [MemoryCorpus(samples[:2], name) for name in "ab"]
    figures = evaluator.figures(tiny_model.model, corpora, batch_size=3)
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
