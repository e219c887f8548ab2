"""Greedy, sampled and beam search over anything that steps, and the rules of what may be said next: suppression and timestamps
(Whisper, section 2.3; ``openai/whisper`` decoding semantics).

S segments, B rows each (beams or samples), R = S * B rows; rows of a segment are side by side and all rows are equally long.
Rules write −inf into a [R, vocab] tensor of unnormalised log-probabilities. They look at the tokens sampled so far, without the
prompt. Timestamps are the range [begin, end]: tokens appended behind it are no times, but text as what lies before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
    max_initial: int | None = MAX_INITIAL_TIMESTAMP


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
        if not sampled[0]:  # all rows are equally long
            self._forbid(logits_RV, self.suppress_first)
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
        if ts.max_initial is not None:
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


def search(
    step: Step,
    logits_RV: Tensor,
    state: Any,
    rules: Rules,
    options: SearchOptions,
    *,
    end_of_text: int,
    limits: Sequence[int],
    seed: int = 0,
) -> list[Hypothesis]:
    """The best continuation for each segment.

    ``logits_RV``, ``state``: after the prompt, B = ``options.beams`` rows a segment. ``limits``: the most tokens to
    sample for each segment. ``seed``: of the samples; every segment has its own stream of random numbers, so that its
    samples do not depend on its neighbours. A segment of beams is done when it has ``beams * patience`` finished hypotheses.
    Segments that are done leave the batch on the way.
    """
    width, beams = options.beams, options.beams > 1 and options.temperature == 0
    wanted = max(1, round(width * options.patience)) if beams else width
    # Not the same noise at the next temperature: that would draw much the same tokens again.
    streams = [torch.Generator().manual_seed(seed + round(1000 * options.temperature)) for _ in limits]
    done: list[list[Hypothesis]] = [[] for _ in limits]
    active, rows = list(range(len(limits))), [_Row()] * (len(limits) * width)
    while True:
        logits_RV = rules.apply(logits_RV, [row.tokens for row in rows])
        if beams:
            values, tokens = logits_RV.log_softmax(-1).topk(width + 1)
        else:
            tokens = _draw(logits_RV, options.temperature, [streams[segment] for segment in active])
            # No logsumexp: threads share the sum of one long row, and its last bit says how many they were.
            values = logits_RV.log_softmax(-1).gather(1, tokens)
        choices = [list(zip(*row, strict=True)) for row in zip(tokens.tolist(), values.tolist(), strict=True)]
        groups: list[list[_Row]] = []
        for place, segment in enumerate(active):
            group = slice(place * width, (place + 1) * width)
            kept, ended = (_best if beams else _each)(rows[group], choices[group], end_of_text)
            found = [Hypothesis(row.tokens[:-1], row.sum_logprob, True) for row in ended]
            if len(kept[0].tokens) >= limits[segment]:
                running = (row for row in kept if row.tokens[-1] != end_of_text)
                found += [Hypothesis(row.tokens, row.sum_logprob, False) for row in running]
            done[segment] += found[: wanted - len(done[segment])]
            groups.append(kept)
        alive = [place for place, segment in enumerate(active) if len(done[segment]) < wanted]
        if not alive:
            break
        sources = [place * width + row.source for place, group in enumerate(groups) for row in group]
        if sources != list(range(len(sources))):
            state = state.select(torch.tensor(sources, device=logits_RV.device))
        gone = len(active) - len(alive)
        if gone and (beams or 8 * gone >= len(active)):  # to move a cache costs a step of an eighth of the rows
            state = state.keep(alive)
            active, groups = [active[place] for place in alive], [groups[place] for place in alive]
        rows = [row for group in groups for row in group]
        logits_RV, state = step(torch.tensor([row.tokens[-1:] for row in rows], device=logits_RV.device), state)
    return [max(group, key=lambda found: options.score(found.sum_logprob, len(found.tokens))) for group in done]


def _draw(logits_RV: Tensor, temperature: float, streams: Sequence[torch.Generator]) -> Tensor:
    """[R, 1]: the likeliest token, or one drawn from the segment's own stream (on the CPU: the same on any device)."""
    if temperature == 0:
        return logits_RV.argmax(-1, keepdim=True)
    sums_RV = (logits_RV / temperature).softmax(-1).cpu().cumsum(-1, dtype=torch.float64)
    rows = len(logits_RV) // len(streams)
    draws = [torch.rand(rows, 1, generator=stream, dtype=torch.float64) for stream in streams]
    # The first token whose sum is above the draw: one that is impossible adds nothing to it and is never the first.
    return torch.searchsorted(sums_RV, torch.cat(draws) * sums_RV[:, -1:], right=True).to(logits_RV.device)


Choices: TypeAlias = Sequence[Sequence[tuple[int, float]]]
"""For each row of a segment, tokens that it may go on with, and their log-probabilities."""


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
