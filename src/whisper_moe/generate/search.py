"""Greedy, sampled and beam search over anything that steps, and the rules of what may be said next: suppression and timestamps
(Whisper, section 2.3; ``openai/whisper`` decoding semantics).

S segments, B rows each (beams or samples), R = S * B rows; rows of a segment are side by side and equally long. Segments that
are decoded side by side are a :class:`Lane`: each leaves when it is done, and others join between two steps. Rules write −inf
into a [R, vocab] tensor of unnormalised log-probabilities. They look at the tokens sampled so far, without the prompt.
Timestamps are the range [begin, end]: tokens appended behind it are no times, but text as what lies before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from whisper_moe.generate.options import SearchOptions

MAX_INITIAL_TIMESTAMP = 50
"""The first timestamp of a window is at most this many steps of 0.02 s: one second."""

_NEVER = float("-inf")


@dataclass(frozen=True)
class Timestamps:
    """The vocabulary's range of timestamp tokens, and the end of text that borders on it."""

    begin: int
    end: int
    end_of_text: int
    max_initial: int = MAX_INITIAL_TIMESTAMP


@dataclass(frozen=True)
class Rules:
    """Everything that keeps a decoder's next token legal.

    ``suppress``: never; ``suppress_first``: not as the first sampled token; ``timestamps``: the grammar of times, None
    when the text is decoded without any.
    """

    suppress: tuple[int, ...]
    suppress_first: tuple[int, ...] = ()
    timestamps: Timestamps | None = None
    _columns: dict[tuple[int, ...], Tensor] = field(default_factory=dict, repr=False, compare=False)

    def apply(self, logits_RV: Tensor, sampled: Sequence[Sequence[int]]) -> Tensor:
        """Forbid in place, one row of ``logits_RV`` for each sequence in ``sampled``; returns the tensor."""
        self._forbid(logits_RV, self.suppress)
        for row, tokens in enumerate(sampled):
            if not tokens:
                self._forbid(logits_RV[row : row + 1], self.suppress_first)
        if self.timestamps is not None:
            for row, tokens in zip(logits_RV, sampled, strict=True):
                _pair_up(row, tokens, self.timestamps)
            _prefer_timestamps(logits_RV, self.timestamps)
        return logits_RV

    def _forbid(self, logits_RV: Tensor, tokens: tuple[int, ...]) -> None:
        if tokens:
            if tokens not in self._columns:
                self._columns[tokens] = torch.tensor(tokens, device=logits_RV.device)
            logits_RV.index_fill_(1, self._columns[tokens], _NEVER)


def _pair_up(row_V: Tensor, tokens: Sequence[int], ts: Timestamps) -> None:
    """Timestamps come in pairs (end, begin) and never go back; the first token is one, near the window's start."""
    if not tokens:
        _forbid_others(row_V, ts, ts.begin)
        row_V[ts.begin + ts.max_initial + 1 : ts.end + 1] = _NEVER
        return
    last = ts.begin <= tokens[-1] <= ts.end
    before_last = len(tokens) < 2 or ts.begin <= tokens[-2] <= ts.end
    if last and before_last:
        row_V[ts.begin : ts.end + 1] = _NEVER
    elif last:
        _forbid_others(row_V, ts, ts.end_of_text)
    seen = next((t for t in reversed(tokens) if ts.begin <= t <= ts.end), None)
    if seen is not None:
        lowest = seen if last and not before_last else seen + 1
        row_V[ts.begin : lowest] = _NEVER


def _prefer_timestamps(logits_RV: Tensor, ts: Timestamps) -> None:
    """Where all timestamps together are likelier than any one text token, only a timestamp may come."""
    times = logits_RV[:, ts.begin : ts.end + 1].logsumexp(-1)
    text = logits_RV[:, : ts.begin].amax(-1)
    if logits_RV.shape[1] > ts.end + 1:
        text = torch.maximum(text, logits_RV[:, ts.end + 1 :].amax(-1))
    for row in (times > text).nonzero()[:, 0].tolist():
        _forbid_others(logits_RV[row], ts, ts.begin)


def _forbid_others(row_V: Tensor, ts: Timestamps, below: int) -> None:
    """What comes before ``below``, and what was appended behind the timestamps."""
    row_V[:below] = _NEVER
    row_V[ts.end + 1 :] = _NEVER


Step: TypeAlias = Callable[[Tensor, Any], tuple[Tensor, Any]]
"""Tokens [R, 1] and a state in, unnormalised log-probabilities [R, vocab] of the next tokens and the state after them out."""


Choices: TypeAlias = Sequence[Sequence[tuple[int, float]]]
"""For each row of a segment, tokens that it may go on with, and their log-probabilities."""


@dataclass(frozen=True)
class Hypothesis:
    """Sampled tokens, without prompt and without end of text; ``sum_logprob`` includes the end of text."""

    tokens: tuple[int, ...]
    sum_logprob: float
    finished: bool
    """False: cut off at the token limit."""

    @property
    def avg_logprob(self) -> float:
        return self.sum_logprob / (len(self.tokens) + 1)


class _Row(NamedTuple):
    """What was sampled so far; a sample that ended stays, with ends of text, while others of its segment go on."""

    tokens: tuple[int, ...] = ()
    sum_logprob: float = 0.0
    source: int = 0
    """The row of its segment that it goes on from."""


@dataclass(eq=False)
class Search:
    """One segment on its way to its best continuation.

    ``limit``: the most tokens to sample. ``seed``: of its samples; every segment has its own stream of random numbers, so that
    they do not depend on its neighbours.
    """

    rules: Rules
    options: SearchOptions
    limit: int
    seed: int = 0
    found: list[Hypothesis] = field(default_factory=list)
    rows: list[_Row] = field(default_factory=list)
    cancelled: bool = False

    def __post_init__(self) -> None:
        self.rows = [_Row()] * self.options.beams
        # Not the same noise at the next temperature: that would draw much the same tokens again.
        self.stream = torch.Generator().manual_seed(self.seed + round(1000 * self.options.temperature))

    @property
    def wanted(self) -> int:
        """Hypotheses with which it is done: every sample, or ``beams * patience``."""
        options = self.options
        return max(1, round(options.beams * options.patience)) if options.branches else options.beams

    @property
    def done(self) -> bool:
        return self.cancelled or len(self.found) >= self.wanted

    @property
    def best(self) -> Hypothesis:
        return max(self.found, key=lambda found: self.options.score(found.sum_logprob, len(found.tokens)))

    def go_on(self, choices: Choices, end_of_text: int) -> None:
        """One token more for every row."""
        kept, ended = (_best if self.options.branches else _each)(self.rows, choices, end_of_text)
        found = [Hypothesis(row.tokens[:-1], row.sum_logprob, True) for row in ended]
        if len(kept[0].tokens) >= self.limit:
            running = (row for row in kept if row.tokens[-1] != end_of_text)
            found += [Hypothesis(row.tokens, row.sum_logprob, False) for row in running]
        self.found += found[: self.wanted - len(self.found)]
        self.rows = kept


class Lane:
    """Segments that one model decodes side by side, with equally many rows each."""

    def __init__(self, step: Step, end_of_text: int) -> None:
        self.step, self.end_of_text = step, end_of_text
        self.searches: list[Search] = []
        self._logits_RV, self._state = torch.empty(0), None

    def __len__(self) -> int:
        """Segments that are not done."""
        return sum(not each.done for each in self.searches)

    @property
    def joins(self) -> bool:
        """Whether others may join those that are under way."""
        return self._state is None or self._state.joins

    def join(self, searches: Sequence[Search], logits_RV: Tensor, state: Any) -> None:
        """``logits_RV``, ``state``: after the prompt."""
        self._leave([place for place, each in enumerate(self.searches) if not each.done])
        if self._state is not None:
            logits_RV, state = torch.cat((self._logits_RV, logits_RV)), self._state.joined(state)
        self.searches, self._logits_RV, self._state = [*self.searches, *searches], logits_RV, state

    @torch.inference_mode()
    def advance(self) -> list[Search]:
        """One token more for every row; the segments that are done now."""
        before = {each for each in self.searches if each.done}
        choices: list[Choices] = []
        for (rules, options), run in groupby(self.searches, key=lambda each: (each.rules, each.options)):
            begin, searches = len(choices) * options.beams, list(run)
            rows = slice(begin, begin + len(searches) * options.beams)
            choices += _choices(self._logits_RV[rows], rules, options, searches)
        for search, own in zip(self.searches, choices, strict=True):
            search.go_on(own, self.end_of_text)
        done = [each for each in self.searches if each.done and each not in before]
        self._step()
        return done

    def run(self) -> None:
        """All of them to their ends."""
        while len(self):
            self.advance()

    def _step(self) -> None:
        alive = [place for place, each in enumerate(self.searches) if not each.done]
        if not alive:
            self._leave([])
            return
        width = self.searches[0].options.beams
        sources = [place * width + row.source for place, each in enumerate(self.searches) for row in each.rows]
        device = self._logits_RV.device
        if sources != list(range(len(sources))):
            assert self._state is not None
            self._state = self._state.select(torch.tensor(sources, device=device))
        gone, most = len(self.searches) - len(alive), self.searches[0].options
        # One that is done goes on in the batch: no position may be left for it.
        full = any(each.done and len(each.rows[0].tokens) >= each.limit for each in self.searches)
        if gone and (full or most.branches or 8 * gone >= len(self.searches)):
            self._leave(alive)  # to move a cache costs a step of an eighth of the rows
        tokens = [row.tokens[-1:] for each in self.searches for row in each.rows]
        self._logits_RV, self._state = self.step(torch.tensor(tokens, device=device), self._state)

    def _leave(self, alive: list[int]) -> None:
        """Only these segments stay."""
        if len(alive) == len(self.searches):
            return
        width = self.searches[0].options.beams
        self.searches = [self.searches[place] for place in alive]
        rows = [place * width + row for place in alive for row in range(width)]
        self._logits_RV = self._logits_RV[rows]
        self._state = self._state.keep(alive) if alive and self._state is not None else None


def _choices(logits_RV: Tensor, rules: Rules, options: SearchOptions, searches: Sequence[Search]) -> list[Choices]:
    """What each segment's rows may go on with; all by the same rules."""
    logits_RV = rules.apply(logits_RV, [row.tokens for each in searches for row in each.rows])
    if options.branches:
        values, tokens = logits_RV.log_softmax(-1).topk(options.beams + 1)
    else:
        tokens = _draw(logits_RV, options.temperature, [each.stream for each in searches])
        # No logsumexp: threads share the sum of one long row, and its last bit says how many they were.
        values = logits_RV.log_softmax(-1).gather(1, tokens)
    each = [list(zip(*row, strict=True)) for row in zip(tokens.tolist(), values.tolist(), strict=True)]
    return [each[begin : begin + options.beams] for begin in range(0, len(each), options.beams)]


def _draw(logits_RV: Tensor, temperature: float, streams: Sequence[torch.Generator]) -> Tensor:
    """[R, 1]: the likeliest token, or one drawn from the segment's own stream (on the CPU: the same on any device)."""
    if temperature == 0:
        return logits_RV.argmax(-1, keepdim=True)
    sums_RV = (logits_RV / temperature).softmax(-1).cpu().cumsum(-1, dtype=torch.float64)
    rows = len(logits_RV) // len(streams)
    draws = [torch.rand(rows, 1, generator=stream, dtype=torch.float64) for stream in streams]
    # The first token whose sum is above the draw: one that is impossible adds nothing to it and is never the first.
    return torch.searchsorted(sums_RV, torch.cat(draws) * sums_RV[:, -1:], right=True).to(logits_RV.device)


def _each(rows: Sequence[_Row], choices: Choices, end_of_text: int) -> tuple[list[_Row], list[_Row]]:
    """One segment's samples, each with its token; and those of them that end."""
    kept: list[_Row] = []
    ended: list[_Row] = []
    for place, (row, [(token, gain)]) in enumerate(zip(rows, choices, strict=True)):
        if row.tokens[-1:] == (end_of_text,):
            kept.append(_Row((*row.tokens, end_of_text), row.sum_logprob, place))
            continue
        kept.append(_Row((*row.tokens, token), row.sum_logprob + gain, place))
        if token == end_of_text:
            ended.append(kept[-1])
    return kept, ended


def _best(rows: Sequence[_Row], choices: Choices, end_of_text: int) -> tuple[list[_Row], list[_Row]]:
    """One segment's beams, one token on: as many of the best that go on as there are beams, and better ones that end."""
    found: dict[tuple[int, ...], _Row] = {}
    for place, row in enumerate(rows):
        for token, gain in choices[place]:
            tokens = (*row.tokens, token)
            found.setdefault(tokens, _Row(tokens, row.sum_logprob + gain, place))
    kept: list[_Row] = []
    ended: list[_Row] = []
    for row in sorted(found.values(), key=lambda row: -row.sum_logprob):
        (ended if row.tokens[-1] == end_of_text else kept).append(row)
        if len(kept) == len(rows):
            break
    return kept, ended
