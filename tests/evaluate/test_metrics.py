"""A corpus's figures: counts, bootstrap intervals, paired differences, loops, scripts, translation scores, labels."""

from __future__ import annotations

import pytest

for needed in ("jiwer", "whisper_normalizer", "sacrebleu"):
    pytest.importorskip(needed, reason="what evaluation needs is an extra")

import numpy as np

from whisper_moe.evaluate import metrics
from whisper_moe.evaluate.metrics import (
    ErrorCounts,
    character_counts,
    clip_counts,
    interval,
    label_accuracy,
    longest_loop,
    paired_difference,
    script_fidelity,
    translation_scores,
)

REFERENCES: tuple[str, ...] = ("the cat sat on the mat", "a dog barked", "birds sing in spring")


def test_corpus_rate_is_all_edits_over_all_words() -> None:
    counts = clip_counts(REFERENCES, ["the cat sat on a mat", "a dog barked loudly twice", "birds sing in"])
    assert counts.part.tolist() == [1, 2, 1]
    assert counts.whole.tolist() == [6, 3, 4]
    assert counts.value == pytest.approx(4 / 13)


def test_case_punctuation_and_spelling_are_no_errors() -> None:
    counts = clip_counts(["Mr. Brown liked the colour, didn't he?"], ["mister brown liked the color did not he"])
    assert counts.part.tolist() == [0]


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


def test_a_clip_left_empty_costs_its_words_and_words_for_silence_cost_themselves() -> None:
    counts = clip_counts(["a dog barked", ""], ["", "thank you"])
    assert counts.part.tolist() == [3, 2]
    assert counts.whole.tolist() == [3, 0]


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
    ("text", "expected"),
    [
        ("", 0),
        ("nothing is said twice here", 1),
        ("no no no", 3),
        ("so I said so I said so I said stop", 3),
        ("the cat and the dog and the bird", 1),
    ],
)
def test_loops_are_phrases_said_in_a_row(text: str, expected: int) -> None:
    assert longest_loop(text) == expected


def test_characters_are_counted_with_spaces_and_by_the_language() -> None:
    counts = character_counts(["नमस्ते", "a b"], ["नमस्त", "ab"], ["hi", "en"])
    assert counts.part.tolist() == [1, 1]
    assert counts.whole.tolist() == [6, 3]


def test_spaces_that_only_the_normaliser_puts_there_are_no_characters() -> None:
    """Else every other character of Chinese or Thai is right, whatever is written."""
    counts = character_counts(["你好世界朋友", "สวัสดี"], ["天地玄黄宇宙", "สวัสดี"], ["zh", "th"])
    assert counts.part.tolist() == [6, 0] and counts.whole.tolist() == [6, 6]


def test_each_clip_is_compared_by_the_rules_of_its_language() -> None:
    counts = clip_counts(["क़लम।", "Mr. Brown"], ["क\u093cलम", "mister brown"], ["hi", "en"])
    assert counts.part.tolist() == [0, 0]
    assert counts.whole.tolist() == [1, 2]


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


def test_translation_scores_are_sacrebleus_and_so_are_those_of_a_part() -> None:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    scores = translation_scores(SENTENCES, OTHER, ["en"] * 3)
    bleu, chrf = scores["bleu"], scores["chrf"]
    assert bleu.value == pytest.approx(BLEU().corpus_score(OTHER, [SENTENCES]).score)
    assert chrf.value == pytest.approx(CHRF(word_order=2).corpus_score(OTHER, [SENTENCES]).score)
    part = BLEU().corpus_score([OTHER[2], OTHER[0]], [[SENTENCES[2], SENTENCES[0]]]).score
    assert bleu.of_clips([2, 0]).value == pytest.approx(part)
    assert "tok:13a" in scores["bleu"].signature and "nw:2" in scores["chrf"].signature


def test_counts_of_a_translation_that_is_drawn_twice_score_as_its_text_twice() -> None:
    from sacrebleu.metrics.bleu import BLEU

    counts, draw = translation_scores(SENTENCES, OTHER, ["en"] * 3)["bleu"], np.array([2, 0, 1])
    expected = BLEU().corpus_score([OTHER[i] for i in (0, 0, 2)], [[SENTENCES[i] for i in (0, 0, 2)]]).score
    assert float(counts.score(draw @ counts.rows)) == pytest.approx(expected)


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


@pytest.mark.parametrize("language", ["hi", "de"])
def test_loops_are_seen_in_any_language(language: str) -> None:
    assert longest_loop("नमस्ते नमस्ते नमस्ते" if language == "hi" else "ja ja ja", language) == 3
