from __future__ import annotations

import csv
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from whisper_moe.generate.align import (
    WordTiming,
    add_words,
    align,
    attention_scores,
    dtw,
    median_filter,
    token_probabilities,
)
from whisper_moe.generate.options import TranscribeOptions
from whisper_moe.generate.result import Segment
from whisper_moe.media.tokenizer import Tokenizer

timing = pytest.importorskip("whisper.timing")
pytest.importorskip("transformers")
from parity.openai_whisper import hub_backend, load_openai, openai_mel
from whisper.tokenizer import get_tokenizer

TOKENIZER = Tokenizer(hub_backend())


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 1, 4), (2, 3, 7), (8, 20, 300), (5, 9), (11,)])
@pytest.mark.parametrize("width", [1, 3, 7])
def test_median_filter_equals_openai(shape: tuple[int, ...], width: int) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(median_filter(x, width), timing.median_filter(x, width))


@pytest.mark.parametrize("values", ["normal", "ties", "constant"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (7, 7), (40, 300), (60, 20)])
def test_path_equals_openai(shape: tuple[int, int], values: str) -> None:
    random = np.random.default_rng(0)
    cost = {"normal": random.normal(size=shape), "ties": random.integers(-1, 2, shape), "constant": np.ones(shape)}
    x = cost[values].astype(np.float32)
    rows, columns = dtw(x)
    expected = timing.dtw_cpu(x.astype(np.float64))
    assert np.array_equal(rows, expected[0]) and np.array_equal(columns, expected[1])


def test_a_position_that_all_tokens_share_does_not_spoil_the_scores() -> None:
    logits = torch.randn(2, 6, 40, generator=torch.Generator().manual_seed(0))
    logits[:, :, 20:] = float("-inf")
    scores = attention_scores(logits)
    assert torch.isfinite(scores).all()
    assert (scores[:, 24:] == 0).all() and (scores[:, :20] != 0).any()


def test_scores_are_standardised_over_tokens_smoothed_and_averaged_over_heads() -> None:
    logits = torch.randn(3, 6, 40, generator=torch.Generator().manual_seed(0))
    weights = logits.softmax(dim=-1)
    std, mean = torch.std_mean(weights, dim=-2, keepdim=True, unbiased=False)
    expected = timing.median_filter((weights - mean) / std, 7).mean(dim=0)
    torch.testing.assert_close(attention_scores(logits), expected)


def peaked(starts: list[int], positions: int, heads: int = 2, before: int = 3) -> torch.Tensor:
    """[H, T, P] logits: token i attends from ``starts[i]`` to ``starts[i + 1]``; the row of eot is not used."""
    logits = torch.zeros(heads, before + len(starts), positions)
    for row, (start, stop) in enumerate(pairwise([*starts, positions])):
        logits[:, before + row, start:stop] = 8.0
    return torch.cat([logits, torch.zeros(heads, 1, positions)], dim=1)


def test_words_begin_where_their_first_token_attends() -> None:
    """One row more than tokens: the row of the last token, which predicts the end, is where the last word ends."""
    tokens = TOKENIZER.encode(" internationalisation matters")
    assert len(tokens) == 3
    words = align(peaked([0, 40, 140, 160], 200), [0.5, 1.0, 0.2], tokens, TOKENIZER, language="en")
    assert [(word.word, word.tokens) for word in words] == [
        (" internationalisation", tuple(tokens[:2])),
        (" matters", tuple(tokens[2:])),
    ]
    assert [(word.start, word.end) for word in words] == [
        (0.0, pytest.approx(2.8, abs=0.05)),
        (words[0].end, pytest.approx(3.2, abs=0.05)),
    ]
    assert [word.probability for word in words] == [0.75, 0.2]


def test_no_text_has_no_words() -> None:
    assert align(torch.zeros(2, 5, 10), [], [], TOKENIZER) == []
    assert add_words([], [], TOKENIZER, TranscribeOptions()) == []


def read_clip(shared_data: Path, row: int) -> tuple[Path, str]:
    folder = shared_data / "english-read"
    with (folder / "transcripts.tsv").open(encoding="utf-8", newline="") as file:
        clip = list(csv.DictReader(file, delimiter="\t"))[row]
    return folder / clip["path"], clip["text"]


def test_words_equal_openai_for_the_same_attention(whisper_base: Path, shared_data: Path) -> None:
    openai_model: Any = load_openai(whisper_base)
    path, text = read_clip(shared_data, 0)
    mel, frames = openai_mel(path)
    tokenizer = Tokenizer.from_file(whisper_base / "tokenizer.json")
    tokens = tokenizer.encode(" " + text)
    attention: dict[int, torch.Tensor] = {}
    outputs: list[torch.Tensor] = []
    hooks = [openai_model.register_forward_hook(lambda _, inputs, output: outputs.append(output[0]))]
    for i, block in enumerate(openai_model.decoder.blocks):
        hook = lambda _, inputs, output, i=i: attention.__setitem__(i, output[-1][0])  # noqa: E731
        hooks.append(block.cross_attn.register_forward_hook(hook))
    theirs = timing.find_alignment(openai_model, get_tokenizer(True, language="en"), tokens, mel, frames)
    for hook in hooks:
        hook.remove()

    heads = openai_model.alignment_heads.indices().T.tolist()
    logits = torch.stack([attention[layer][head] for layer, head in heads])[:, :, : frames // 2]
    probabilities = token_probabilities(outputs[0], tokens, tokenizer)
    ours = align(logits, probabilities, tokens, tokenizer, language="en")
    assert len(ours) > 10
    assert [(w.word, list(w.tokens), w.start, w.end) for w in ours] == [
        (w.word, w.tokens, w.start, w.end) for w in theirs
    ]
    assert [w.probability for w in ours] == pytest.approx([w.probability for w in theirs], rel=1e-6)

    from_probabilities = align(logits.softmax(-1).log(), probabilities, tokens, tokenizer, language="en")
    assert [(w.start, w.end) for w in from_probabilities] == [(w.start, w.end) for w in ours]


marks = [" (", ' "', " [", " -", " ", ".", ",", "!", "。", '"', ")", "...", "”", "'", ".,", "?!"]
spoken = [" so", "well ", " it", " goes", "n't", " extraordinary", "Hi", " ¿qué", "你"]


@st.composite
def alignments(draw: st.DrawFn) -> list[WordTiming]:
    """Words and marks one after the other, each of 1 to 3 text tokens, some very long, some of no length."""
    now, timings = 0.0, []
    for word in draw(st.lists(st.sampled_from(marks + spoken + spoken), max_size=14)):
        start = now + draw(st.sampled_from([0.0, 0.0, 0.0, 0.3, 4.0]))
        now = start + draw(st.sampled_from([0.0, 0.02, 0.2, 0.24, 0.3, 0.5, 1.3, 2.9]))
        ids = draw(st.lists(st.integers(0, 50_000), min_size=1, max_size=3))
        timings.append(WordTiming(word, tuple(ids), round(start, 2), round(now, 2), draw(st.floats(0, 1))))
    return timings


def as_openai(timings: list[WordTiming]) -> list[Any]:
    return [timing.WordTiming(t.word, list(t.tokens), t.start, t.end, t.probability) for t in timings]


@st.composite
def windows(draw: st.DrawFn) -> tuple[list[Segment], list[WordTiming], float]:
    """Segments that share out an alignment's tokens in order, with ends of their own, and when speech ended before."""
    timings = draw(alignments())
    ids = [id for timing in timings for id in timing.tokens]
    cuts = sorted(draw(st.lists(st.integers(0, len(ids)), max_size=3)))
    seek = draw(st.sampled_from([0, 300, 12_345]))
    segments = []
    for begin, end in pairwise([0, *cuts, len(ids)]):
        tokens = (TOKENIZER.timestamp_begin, *ids[begin:end], TOKENIZER.timestamp_begin + 50)
        start = seek / 100 + draw(st.floats(0, 20))
        segments.append(
            Segment(
                id=len(segments),
                seek=seek,
                start=start,
                end=start + draw(st.floats(0, 5)),
                text="",
                tokens=tokens,
                temperature=0.0,
                avg_logprob=0.0,
                compression_ratio=1.0,
                no_speech_prob=0.0,
            )
        )
    return segments, timings, draw(st.sampled_from([0.0, seek / 100, seek / 100 - 5.0]))


def openai_words(segments: list[Segment], timings: list[WordTiming], last_speech_end: float) -> list[dict[str, Any]]:
    """What openai/whisper makes of the same segments and alignment."""
    listed = [{"seek": s.seek, "start": s.start, "end": s.end, "tokens": list(s.tokens)} for s in segments]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "find_alignment", lambda *_: as_openai(timings))
        timing.add_word_timestamps(
            segments=listed,
            model=None,
            tokenizer=get_tokenizer(True),
            mel=None,
            num_frames=3000,
            last_speech_timestamp=last_speech_end,
        )
    return listed


@settings(deadline=None, max_examples=200)
@given(windows())
@example(([], [], 0.0))
def test_segments_with_words_equal_openai(window: tuple[list[Segment], list[WordTiming], float]) -> None:
    segments, timings, last_speech_end = window
    theirs = openai_words(segments, timings, last_speech_end)
    ours = add_words(segments, timings, TOKENIZER, TranscribeOptions(), last_speech_end=last_speech_end)
    assert [(s.start, s.end) for s in ours] == [(s["start"], s["end"]) for s in theirs]
    assert [[w.to_dict() for w in s.words or ()] for s in ours] == [s["words"] for s in theirs]
    assert all(segment.words is not None for segment in ours)


@pytest.mark.parametrize("rows", list(product([1, 2], [1, 3])))
def test_probabilities_are_among_text_tokens_only(rows: tuple[int, int]) -> None:
    before, count = rows
    logits = torch.randn(before + count + 2, 51_865, generator=torch.Generator().manual_seed(0))
    logits[:, TOKENIZER.eot :] += 50.0
    tokens = [100 + i for i in range(count)]
    expected = [logits[before + i, : TOKENIZER.eot].softmax(-1)[token].item() for i, token in enumerate(tokens)]
    assert token_probabilities(logits, tokens, TOKENIZER) == pytest.approx(expected, rel=1e-5)
