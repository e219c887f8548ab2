"""Searches find what an exhaustive one finds, keep each row's state its own, and equal openai/whisper's."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest
import torch
from parity.openai_whisper import load_openai, openai_mel, read_samples
from torch import Tensor

from whisper_moe.generate.options import SearchOptions, TranscribeOptions
from whisper_moe.generate.search import Hypothesis, Lane, Rules, Search

VOCABULARY, END = 40, 3
"""Tokens 0 to 2 are text; what is behind the end of text is never said, but there is room for many beams."""
RULES = Rules(tuple(range(END + 1, VOCABULARY)))


def logits_after(segment: int, history: Sequence[int]) -> Tensor:
    """What an arbitrary model says after this history: every history has unrelated logits."""
    chance = random.Random(f"{segment} {list(history)}")
    return torch.tensor([chance.gauss(0, 1.5) for _ in range(VOCABULARY)])


@dataclass
class History:
    """A state that holds what each row was fed: rows that are mixed up get another history's logits."""

    segments: list[int]
    rows: list[list[int]]

    joins = True

    @property
    def beams(self) -> int:
        return len(self.rows) // len(self.segments)

    def joined(self, other: History) -> History:
        return History(self.segments + other.segments, self.rows + other.rows)

    def select(self, rows: Tensor) -> History:
        return History(self.segments, [list(self.rows[row]) for row in rows.tolist()])

    def keep(self, segments: list[int]) -> History:
        rows = [list(self.rows[s * self.beams + b]) for s in segments for b in range(self.beams)]
        return History([self.segments[s] for s in segments], rows)

    def logits(self) -> Tensor:
        pairs = [(self.segments[index // self.beams], row) for index, row in enumerate(self.rows)]
        return torch.stack([logits_after(*pair) for pair in pairs])


class Model:
    """Steps a :class:`History`; ``sizes`` are the rows of each step."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def step(self, tokens_Rn: Tensor, state: History) -> tuple[Tensor, History]:
        self.sizes.append(len(tokens_Rn))
        state = History(state.segments, [[*row, *new] for row, new in zip(state.rows, tokens_Rn.tolist(), strict=True)])
        return state.logits(), state


def run(
    segments: Sequence[int], options: SearchOptions, limits: Sequence[int], model: Model | None = None, seed: int = 0
) -> list[Hypothesis]:
    state = History(list(segments), [[] for _ in range(len(segments) * options.beams)])
    lane, searches = Lane((model or Model()).step, END), [Search(RULES, options, limit, seed) for limit in limits]
    lane.join(searches, state.logits(), state)
    lane.run()
    return [each.best for each in searches]


def log_probabilities(segment: int, history: Sequence[int]) -> Tensor:
    return RULES.apply(logits_after(segment, history)[None], [list(history)]).log_softmax(-1)[0]


def sum_logprob(segment: int, hypothesis: Hypothesis) -> float:
    tokens = [*hypothesis.tokens, END] if hypothesis.finished else hypothesis.tokens
    return sum(float(log_probabilities(segment, tokens[:i])[token]) for i, token in enumerate(tokens))


def texts(limit: int) -> list[Hypothesis]:
    """Every text that may be said: shorter than the limit with its end, or as long as it and cut off."""
    found = [Hypothesis(text, 0.0, True) for n in range(limit) for text in product(range(END), repeat=n)]
    return found + [Hypothesis(text, 0.0, False) for text in product(range(END), repeat=limit)]


@pytest.mark.parametrize("segment", range(4))
def test_greedy_takes_the_likeliest_token_each_time(segment: int) -> None:
    limit = 12
    said: list[int] = []
    while len(said) < limit and (token := int(log_probabilities(segment, said).argmax())) != END:
        said.append(token)
    (found,) = run([segment], SearchOptions(), [limit])
    assert found.tokens == tuple(said)
    assert found.finished == (len(said) < limit)
    assert found.sum_logprob == pytest.approx(sum_logprob(segment, found), abs=1e-4)
    assert found.avg_logprob == pytest.approx(found.sum_logprob / (len(said) + 1))


@pytest.mark.parametrize("penalty", [None, 0.0, 0.6, 1.0])
@pytest.mark.parametrize("segment", range(3))
def test_as_many_beams_as_texts_find_the_best_text(segment: int, penalty: float | None) -> None:
    limit = 3
    options = SearchOptions(beams=36, length_penalty=penalty)
    candidates = [Hypothesis(each.tokens, sum_logprob(segment, each), each.finished) for each in texts(limit)]
    best = max(candidates, key=lambda each: options.score(each.sum_logprob, len(each.tokens)))
    (found,) = run([segment], options, [limit])
    assert (found.tokens, found.finished) == (best.tokens, best.finished)
    assert found.sum_logprob == pytest.approx(best.sum_logprob, abs=1e-4)


SEARCHES = {
    "greedy": SearchOptions(),
    "beams": SearchOptions(beams=4),
    "patience": SearchOptions(beams=3, patience=2.0),
    "one sample": SearchOptions(beams=1, temperature=0.7),
    "samples": SearchOptions(beams=5, temperature=1.0),
}


@pytest.mark.parametrize("options", SEARCHES.values(), ids=SEARCHES)
def test_a_segment_is_searched_as_if_it_were_alone(options: SearchOptions) -> None:
    """Others finish earlier and later, and leave the batch: that changes nothing."""
    segments, limits = list(range(24)), [2 + 5 * (i % 4) for i in range(24)]
    model = Model()
    together = run(segments, options, limits, model)
    assert len(set(model.sizes)) > 2, "nobody left the batch"
    for segment, limit, found in zip(segments, limits, together, strict=True):
        assert [found] == run([segment], options, [limit])


def test_the_best_sample_is_kept() -> None:
    options = SearchOptions(beams=6, temperature=1.0)
    for segment in range(5):
        (best,) = run([segment], options, [6], seed=3)
        assert best.sum_logprob == pytest.approx(sum_logprob(segment, best), abs=1e-4)  # its own, not the tempered
        singles = [run([segment], SearchOptions(temperature=1.0), [6], seed=seed)[0] for seed in range(40)]
        scores = [options.score(one.sum_logprob, len(one.tokens)) for one in (best, *singles)]
        assert sum(score > scores[0] for score in scores) < len(singles) / 2


def test_samples_follow_the_seed() -> None:
    options, limits = SearchOptions(temperature=1.0), [8] * 12
    first, again, other = (run(range(12), options, limits, seed=seed) for seed in (5, 5, 6))
    assert first == again
    assert first != other


def test_samples_are_drawn_at_their_temperature() -> None:
    logits = logits_after(0, [])
    for temperature in (0.4, 1.0):
        expected = (logits[: END + 1] / temperature).softmax(-1)
        options, draws = SearchOptions(temperature=temperature), 1500
        drawn = [run([0], options, [1], seed=seed)[0] for seed in range(draws)]
        counts = torch.zeros(END + 1)
        for one in drawn:
            counts[one.tokens[0] if one.tokens else END] += 1
        assert (counts / draws - expected).abs().max() < 4 * (0.25 / draws) ** 0.5


def test_a_sample_that_ended_does_not_go_on() -> None:
    """Where the longest of them is the best, while others of its segment go on."""
    for found in run(range(12), SearchOptions(beams=6, temperature=1.0, length_penalty=50.0), [12] * 12):
        assert END not in found.tokens


def entering(lane: Lane, segments: Sequence[int], searches: Sequence[Search]) -> None:
    state = History(list(segments), [[] for each in searches for _ in range(each.options.beams)])
    lane.join(searches, state.logits(), state)


@pytest.mark.parametrize(
    "options", [[SearchOptions()], [SearchOptions(beams=3)], [SearchOptions(5, 1.0), SearchOptions(5)]]
)
def test_segments_that_join_others_say_what_each_says_alone(options: list[SearchOptions]) -> None:
    """A few enter at every step or two, so that they meet others anywhere in their texts."""
    limits = [3 + segment * 7 % 20 for segment in range(24)]
    asked = [options[segment // 2 % len(options)] for segment in range(24)]
    searches = [Search(RULES, one, limit, 7) for one, limit in zip(asked, limits, strict=True)]
    model, left = Model(), list(range(24))
    lane, done = Lane(model.step, END), list[Search]()
    while left or len(lane):
        own, left = left[:2], left[2:]
        if own:
            entering(lane, own, [searches[segment] for segment in own])
        done += lane.advance()
        assert len(lane) == sum(not each.done for each in lane.searches)
    assert len(done) == 24 and {*done} == {*searches}
    assert done != searches and max(model.sizes) > 2 * asked[0].beams, "some leave before others that came earlier"
    for segment, each in enumerate(searches):
        (alone,) = run([segment], asked[segment], [limits[segment]], seed=7)
        assert (each.best.tokens, each.best.finished) == (alone.tokens, alone.finished)
        assert each.best.sum_logprob == pytest.approx(alone.sum_logprob, abs=1e-4)


def test_a_search_that_is_cancelled_frees_its_place_and_changes_no_neighbour() -> None:
    searches, model = [Search(RULES, SearchOptions(), 12) for _ in range(6)], Model()
    lane = Lane(model.step, END)
    entering(lane, range(6), searches)
    lane.advance()
    for each in searches[:4]:
        each.cancelled = True
    done = lane.advance()
    while len(lane):
        done += lane.advance()
    assert max(model.sizes[1:]) <= 2 and not {*done} & {*searches[:4]}
    for segment in (4, 5):
        assert searches[segment].best.tokens == run([segment], SearchOptions(), [12])[0].tokens


class _Inference:
    """openai/whisper's side of the model: it hears the whole history every time."""

    def __init__(self) -> None:
        self.moves = 0

    def rearrange_kv_cache(self, source_indices: list[int]) -> None:
        self.moves += source_indices != sorted(source_indices)


def by_openai(segments: Sequence[int], beams: int, patience: float | None, limit: int) -> list[tuple[int, ...]]:
    from whisper.decoding import BeamSearchDecoder, MaximumLikelihoodRanker

    start, inference = 99, _Inference()
    decoder = BeamSearchDecoder(beams, END, inference, patience)
    tokens = torch.full((len(segments) * beams, 1), start)
    sums = torch.zeros(len(tokens))
    for _ in range(limit):
        histories = [row[1:] for row in tokens.tolist()]
        pairs = [(segments[index // beams], history) for index, history in enumerate(histories)]
        logits = RULES.apply(torch.stack([logits_after(*pair) for pair in pairs]), histories)
        tokens, completed = decoder.update(tokens, logits, sums)
        if completed:
            break
    found, sum_logprobs = decoder.finalize(tokens.view(len(segments), beams, -1), sums.view(len(segments), beams))
    said = [[tuple(t[1 : (t == END).nonzero()[0, 0]].tolist()) for t in group] for group in found]
    chosen = MaximumLikelihoodRanker(0.7).rank([[torch.tensor(t) for t in g] for g in said], sum_logprobs)
    assert inference.moves, "no beam changed its place"
    return [group[index] for index, group in zip(chosen, said, strict=True)]


@pytest.mark.parametrize("patience", [1.0, 2.0])
@pytest.mark.parametrize("beams", [2, 3, 5])
def test_beams_find_what_openais_find(beams: int, patience: float) -> None:
    segments, limit = list(range(30)), 20
    options = SearchOptions(beams=beams, patience=patience, length_penalty=0.7)
    ours = [found.tokens for found in run(segments, options, [limit] * 30)]
    assert ours == by_openai(segments, beams, patience, limit)


@pytest.mark.slow
def test_five_beams_write_what_openais_write(whisper_base: Path, shared_data: Path) -> None:
    from whisper.decoding import DecodingOptions, decode

    from whisper_moe import WhisperMoE

    clip = shared_data / "english-read/audio/LJ002-0053.opus"
    mel, _ = openai_mel(clip)
    theirs = decode(load_openai(whisper_base), mel, DecodingOptions(language="en", beam_size=5, fp16=False))
    options = TranscribeOptions(language="en", beam_size=5)
    ours = WhisperMoE.from_pretrained(whisper_base, dtype="float32")._decoder.decode(
        [read_samples(clip).numpy()], options, temperature=0.0, margin=30.0
    )[0]
    assert isinstance(theirs.tokens, list) and len(theirs.tokens) > 10
    assert list(ours.hypothesis.tokens) == theirs.tokens
    assert ours.hypothesis.avg_logprob == pytest.approx(theirs.avg_logprob, abs=1e-3)
    assert ours.no_speech_prob == pytest.approx(theirs.no_speech_prob, abs=1e-3)
