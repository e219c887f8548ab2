"""What may be said next: suppression and timestamp rules (Whisper, section 2.3 and ``openai/whisper`` decoding).

Rules write −inf into a [R, vocab] tensor of unnormalised log-probabilities. They look at the tokens sampled so far, without
the prompt. Timestamps are the range [begin, end]: tokens appended behind it are no times, but text as what lies before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

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
