"""Greedy, sampled and beam search over anything that steps (``openai/whisper`` decoding semantics).

A :class:`Stepper` is a model that is asked for next tokens: the dense model and the mixture of experts today. S segments,
B rows each (beams or samples), R = S * B rows; rows of a segment are side by side and all rows are equally long.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from whisper_moe.generate.options import SearchOptions
from whisper_moe.generate.rules import Rules


class Stepper(Protocol):
    """One decoding step: tokens [R, n] in, unnormalised log-probabilities [R, vocab] of the next one out."""

    def step(self, tokens_Rn: Tensor, state: Any) -> tuple[Tensor, Any]: ...


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


@dataclass
class _Row:
    tokens: list[int]
    sum_logprob: float = 0.0


def search(
    stepper: Stepper,
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
    samples do not depend on its neighbours. Finished segments leave the batch on the way.
    """
    if options.beams > 1 and options.temperature == 0:
        groups = _beam_search(stepper, logits_RV, state, rules, options, end_of_text, limits)
    else:
        groups = _sample(stepper, logits_RV, state, rules, options, end_of_text, limits, seed)
    return [max(group, key=lambda found: options.score(found.sum_logprob, len(found.tokens))) for group in groups]


def _sample(
    stepper: Stepper,
    logits_RV: Tensor,
    state: Any,
    rules: Rules,
    options: SearchOptions,
    end_of_text: int,
    limits: Sequence[int],
    seed: int,
) -> list[list[Hypothesis]]:
    """Each row by itself: the likeliest token, or one drawn at a temperature."""
    width = options.beams
    done: list[list[Hypothesis]] = [[] for _ in limits]
    active = list(range(len(limits)))
    # Not the same noise at the next temperature: that would draw much the same tokens again.
    streams = [torch.Generator().manual_seed(seed + round(1000 * options.temperature)) for _ in limits]
    rows = [_Row([]) for _ in range(len(limits) * width)]
    over: set[int] = set()
    while True:
        logits_RV = rules.apply(logits_RV, [row.tokens for row in rows])
        tokens_R = _draw(logits_RV, options.temperature, [streams[segment] for segment in active])
        gains = (logits_RV.gather(1, tokens_R[:, None])[:, 0] - logits_RV.logsumexp(-1)).tolist()
        for index, (row, token, gain) in enumerate(zip(rows, tokens_R.tolist(), gains, strict=True)):
            segment = active[index // width]
            if index in over:
                row.tokens.append(end_of_text)
                continue
            row.sum_logprob += gain
            ended = token == end_of_text
            if ended or len(row.tokens) + 1 >= limits[segment]:
                kept = row.tokens if ended else [*row.tokens, token]
                done[segment].append(Hypothesis(tuple(kept), row.sum_logprob, ended))
                over.add(index)
            row.tokens.append(token)
        alive = [p for p, segment in enumerate(active) if len(done[segment]) < width]
        if not alive:
            return done
        if _worth_leaving(len(alive), len(active)):
            index_R = [p * width + b for p in alive for b in range(width)]
            state, tokens_R = state.keep(alive), tokens_R[index_R]
            rows = [rows[i] for i in index_R]
            over = {new for new, old in enumerate(index_R) if old in over}
            active = [active[p] for p in alive]
        logits_RV, state = stepper.step(tokens_R[:, None], state)


def _worth_leaving(alive: int, active: int) -> bool:
    """Moving a cache costs about as much as carrying an eighth of the rows for a step."""
    return (active - alive) * 8 >= active


def _draw(logits_RV: Tensor, temperature: float, streams: Sequence[torch.Generator]) -> Tensor:
    """The likeliest token of each row, or one drawn from the segment's own stream (on the CPU: the same on any device)."""
    if temperature == 0:
        return logits_RV.argmax(-1)
    sums_RV = (logits_RV / temperature).softmax(-1).cpu().cumsum(-1, dtype=torch.float64)
    rows = len(logits_RV) // len(streams)
    draws = [torch.rand(rows, 1, generator=stream, dtype=torch.float64) for stream in streams]
    # The first token whose sum is above the draw: one that is impossible adds nothing to it and is never the first.
    return torch.searchsorted(sums_RV, torch.cat(draws) * sums_RV[:, -1:], right=True)[:, 0].to(logits_RV.device)


def _beam_search(
    stepper: Stepper,
    logits_RV: Tensor,
    state: Any,
    rules: Rules,
    options: SearchOptions,
    end_of_text: int,
    limits: Sequence[int],
) -> list[list[Hypothesis]]:
    """Width-B search; a segment is done when it has ``beams * patience`` finished hypotheses."""
    width, wanted = options.beams, max(1, round(options.beams * options.patience))
    done: list[list[Hypothesis]] = [[] for _ in limits]
    active = list(range(len(limits)))
    rows = [_Row([]) for _ in range(len(limits) * width)]
    while True:
        logits_RV = rules.apply(logits_RV, [row.tokens for row in rows])
        values, tokens = logits_RV.log_softmax(-1).topk(width + 1)
        sources: list[int] = []
        survivors: list[_Row] = []
        for place, segment in enumerate(active):
            group = slice(place * width, (place + 1) * width)
            kept, finished = _advance(rows[group], values[group].tolist(), tokens[group].tolist(), end_of_text, width)
            done[segment].extend(finished[: wanted - len(done[segment])])
            if len(kept[0][0].tokens) >= limits[segment] and len(done[segment]) < wanted:
                cut = [Hypothesis(tuple(row.tokens), row.sum_logprob, False) for row, _ in kept]
                done[segment].extend(cut[: wanted - len(done[segment])])
            sources += [place * width + source for _, source in kept]
            survivors += [row for row, _ in kept]
        alive = [p for p, segment in enumerate(active) if len(done[segment]) < wanted]
        if not alive:
            return done
        if sources != list(range(len(sources))):
            state = state.select(torch.tensor(sources, device=logits_RV.device))
        if len(alive) < len(active):
            state = state.keep(alive)
            survivors = [survivors[p * width + b] for p in alive for b in range(width)]
            active = [active[p] for p in alive]
        rows = survivors
        last = torch.tensor([[row.tokens[-1]] for row in rows], device=logits_RV.device)
        logits_RV, state = stepper.step(last, state)


def _advance(
    rows: list[_Row], values: list[list[float]], tokens: list[list[int]], end_of_text: int, width: int
) -> tuple[list[tuple[_Row, int]], list[Hypothesis]]:
    """One segment's beams, one token on: the best ``width`` that go on (with the row each came from), and those that end."""
    candidates: dict[tuple[int, ...], tuple[float, int]] = {}
    for source, row in enumerate(rows):
        for value, token in zip(values[source], tokens[source], strict=True):
            candidates.setdefault((*row.tokens, token), (row.sum_logprob + value, source))
    kept: list[tuple[_Row, int]] = []
    finished: list[Hypothesis] = []
    for sequence, (score, source) in sorted(candidates.items(), key=lambda item: -item[1][0]):
        if sequence[-1] == end_of_text:
            finished.append(Hypothesis(sequence[:-1], score, True))
        else:
            kept.append((_Row(list(sequence), score), source))
            if len(kept) == width:
                break
    return kept, finished
