"""The loader: the same batches for any number of workers and ranks, from any place; bad samples cost only themselves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from data.memory import MODEL, MemoryCorpus, clip, clips, damaged, tiny_reader
from generate.tiny import tiny_tokenizer

from whisper_moe.config import MAX_PACK_TOKENS
from whisper_moe.data.examples import Example, ExampleReader, pack_examples
from whisper_moe.data.loader import Batch, PackedLoader
from whisper_moe.data.sample import DataError, Sample, Skipped
from whisper_moe.data.sampler import LoaderConfig

TOKENIZER = tiny_tokenizer()
SAMPLES = [*clips(18), *clips(9, "h", language="hi"), *clips(5, "t", language="hi", task="translate")]


def loader_of(
    samples: Sequence[Sample | DataError] = SAMPLES,
    *,
    rank: int = 0,
    world: int = 1,
    streaming: bool = False,
    **changes: Any,
) -> PackedLoader:
    return loader_over([MemoryCorpus(samples, streaming=streaming)], rank=rank, world=world, **changes)


def loader_over(
    corpora: Sequence[MemoryCorpus],
    *,
    rank: int = 0,
    world: int = 1,
    weights: dict[str, float] | None = None,
    **changes: Any,
) -> PackedLoader:
    settings: dict[str, Any] = {"batch_size": 5, "planning_buffer": 14, "examples": {"margin": [0.2, 1.0]}}
    config = LoaderConfig.model_validate(settings | changes)
    return PackedLoader(corpora, TOKENIZER, MODEL, config, rank=rank, world=world, weights=weights)


def same(a: Sequence[Batch], b: Sequence[Batch]) -> bool:
    """Whether all batches are equal, bit for bit."""
    return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))


def _same(a: Batch, b: Batch) -> bool:
    if (a.epoch, a.ids, a.skipped, len(a.packs)) != (b.epoch, b.ids, b.skipped, len(b.packs)):
        return False
    return all(
        (x.valid_lengths, x.texts.lengths) == (y.valid_lengths, y.texts.lengths)
        and torch.equal(x.tokens_T, y.tokens_T)
        and torch.equal(x.labels_T, y.labels_T)
        and all(torch.equal(m, n) for m, n in zip(x.mels, y.mels, strict=True))
        for x, y in zip(a.packs, b.packs, strict=True)
    )


UNITS: list[dict[str, Any]] = [
    {},
    {"batch_unit": "packs", "batch_size": 2},
    {"streaming": True},
    {"streaming": True, "samples": SAMPLES[:28]},
]
"""Ways to make batches. The last stream ends with a buffer."""


def named(changes: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in changes.items() if key != "samples") or "default"


@pytest.mark.parametrize("changes", UNITS, ids=named)
def test_every_sample_comes_once_in_every_epoch(changes: dict[str, Any]) -> None:
    loader, samples = loader_of(**changes), changes.get("samples", SAMPLES)
    epochs = [list(loader), list(loader)]
    for number, batches in enumerate(epochs):
        assert sorted(id for batch in batches for id in batch.ids) == sorted(sample.id for sample in samples)
        assert {batch.epoch for batch in batches} == {number}
    assert loader.epoch == 2
    assert [batch.ids for batch in epochs[0]] != [batch.ids for batch in epochs[1]]
    fresh, first = loader_of(**changes), loader_of(**changes)
    list(first)
    fresh.load_state_dict(first.state_dict())
    assert same(list(fresh), epochs[1])


def test_a_batch_has_what_the_reader_reads_with_the_margin_of_the_epoch() -> None:
    known = {sample.id: sample for sample in SAMPLES}
    reader = tiny_reader(margin=(0.2, 1.0))
    for batch in loader_of():
        assert batch.tokens == sum(pack.encoder_tokens + pack.decoder_tokens for pack in batch.packs)
        assert batch.examples == len(batch.ids)
        for pack in batch.packs:
            assert pack.encoder_tokens + pack.decoder_tokens <= MAX_PACK_TOKENS
            alone = [reader.read(known[id], reader.margin_of(id, 42, 0)) for id in pack.ids]
            assert same([replace(batch, packs=(pack,))], [replace(batch, packs=tuple(pack_examples(alone)))])


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("changes", UNITS, ids=named)
def test_workers_change_nothing(changes: dict[str, Any]) -> None:
    alone = loader_of(**changes)
    batches = list(alone)
    for workers in (1, 3) if not changes else (2,):
        loader = loader_of(workers=workers, **changes)
        assert same(list(loader), batches)
        assert loader.state_dict() == alone.state_dict()


@pytest.mark.parametrize("changes", UNITS, ids=named)
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_divide_the_same_batches(changes: dict[str, Any], world: int) -> None:
    changes = changes | ({"batch_size": 4} if changes.get("batch_unit") else {})
    alone = loader_of(**changes)
    ranks = [loader_of(rank=rank, world=world, **changes) for rank in range(world)]
    for whole, *shares in zip(alone, *ranks, strict=True):
        assert sorted(id for share in shares for id in share.ids) == sorted(whole.ids)
        mels = {id: mel for pack in whole.packs for id, mel in zip(pack.ids, pack.mels, strict=True)}
        for share in shares:
            assert share.epoch == whole.epoch
            for pack in share.packs:
                assert all(torch.equal(mel, mels[id]) for id, mel in zip(pack.ids, pack.mels, strict=True))
        assert all(loader.state_dict() == alone.state_dict() for loader in ranks)


@pytest.mark.parametrize("changes", UNITS, ids=named)
def test_after_every_batch_the_rest_is_the_same_as_without_a_stop(changes: dict[str, Any]) -> None:
    loader = loader_of(**changes)
    batches, states = [], [json.dumps(loader.state_dict())]
    for batch in loader:
        batches.append(batch)
        states.append(json.dumps(loader.state_dict()))
    following = list(loader)
    for done, state in enumerate(states):
        resumed = loader_of(**changes)
        resumed.load_state_dict(json.loads(state))
        rest = list(resumed)
        assert same(rest, batches[done:] if done < len(batches) else following)
        assert resumed.epoch == (1 if done < len(batches) else 2)


def test_a_run_goes_on_with_other_numbers_of_ranks_and_workers() -> None:
    whole = list(loader_of(batch_size=4))
    state = loader_of(batch_size=4).state_dict()
    done = 0
    for world, workers in ((2, 0), (1, 1), (4, 0)):
        ranks = [loader_of(batch_size=4, rank=rank, world=world, workers=workers) for rank in range(world)]
        for loader in ranks:
            loader.load_state_dict(json.loads(json.dumps(state)))
        for shares in zip(*ranks, strict=True):
            assert sorted(id for share in shares for id in share.ids) == sorted(whole[done].ids)
            done += 1
            if done % 3 == 0 and world != 4:
                break
        state = ranks[-1].state_dict()
    assert done == len(whole)


def test_leaving_an_iteration_early_loses_nothing() -> None:
    loader = loader_of(workers=1)
    first = [batch for batch, _ in zip(loader, range(2), strict=False)]
    taken = 2 + (len(list(loader_of())) - 2 - len(rest := list(loader)))
    assert taken in (2, 3)  # zip takes one more than it gives
    whole = list(loader_of())
    assert same([*first, *rest], [*whole[:2], *whole[taken:]])


def test_the_random_numbers_of_a_run_are_left_alone() -> None:
    torch.manual_seed(0)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1]  # noqa: NPY002
    for workers in (0, 1):
        list(loader_of(workers=workers))
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)  # noqa: NPY002


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed: 42 then, 1 now"),
        ({"batch_size": 6}, "batch_size"),
        ({"examples": {"margin": 1}}, "margin"),
        ({"weights": {"memory": 3}}, "mixing"),
        ({"samples": SAMPLES[:-1]}, "data: the training data's rows, texts or lengths have changed"),
        ({"samples": [*SAMPLES[:-1], replace(SAMPLES[-1], text="something else")]}, "rows, texts or lengths"),
    ],
)
def test_a_state_of_other_data_is_refused(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        loader_of(**change).load_state_dict(loader_of().state_dict())


def test_a_state_of_another_version_is_refused() -> None:
    with pytest.raises(ValueError, match="version 2, got 9"):
        loader_of().load_state_dict(loader_of().state_dict() | {"version": 9})


# Samples that cannot be used.


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_sample_costs_only_itself(workers: int) -> None:
    broken = [damaged(sample) if sample.id in ("c3", "t1") else sample for sample in SAMPLES]
    with_both = list(loader_of())
    batches = list(loader_of(broken, workers=workers, max_corrupt_share=0.1))
    skipped = {sample.id: sample for batch in batches for sample in batch.skipped}
    assert set(skipped) == {"c3", "t1"} and all("broken.wav" in sample.cause for sample in skipped.values())
    for whole, batch in zip(with_both, batches, strict=True):
        assert [id for id in whole.ids if id not in skipped] == list(batch.ids)
        mels = {id: mel for pack in whole.packs for id, mel in zip(pack.ids, pack.mels, strict=True)}
        for pack in batch.packs:
            assert all(torch.equal(mel, mels[id]) for id, mel in zip(pack.ids, pack.mels, strict=True))


def test_too_many_corrupt_samples_stop_the_run_and_are_named() -> None:
    broken = [damaged(sample) if i % 10 == 0 else sample for i, sample in enumerate(SAMPLES)]  # 4 of 32
    with pytest.raises(DataError, match=r"12\.5% of 32 samples are corrupt, more than 5\.0%; the first: .*broken\.wav"):
        list(loader_of(broken))
    assert len([1 for batch in loader_of(broken, max_corrupt_share=0.125) for _ in batch.skipped]) == 4
    read = 0
    with pytest.raises(DataError, match="corrupt"):  # noqa: PT012
        for batch in loader_of([damaged(sample) for sample in SAMPLES]):
            read += len(batch.skipped)
    assert read <= 5  # the first batches are enough to know


def test_what_a_survey_finds_is_named_before_the_first_batch() -> None:
    unusable = {
        "memory, row 33": DataError("memory.tsv", "no such column", row=7),
        "mute": clip("mute", 0.3, " "),
        "wordy": clip("wordy", 0.3, "x" * 500),
        "long": replace(clip("long", 0.3), duration=31.0),
        "broken": replace(damaged(clip("broken", 0.3)), duration=None),
    }
    absent = Skipped(id="absent", kind="missing", cause="no such file")
    corpus = MemoryCorpus([*SAMPLES, *unusable.values()], left_out=(absent,))
    loader = loader_over([corpus], max_corrupt_share=0.2)
    assert {each.id: each.corrupt for each in loader.excluded} == {
        name: name not in ("wordy", "long") for name in ("absent", *unusable)
    }
    assert "memory.tsv, row 7: no such column" in loader.excluded[1].cause
    assert sorted(id for batch in loader for id in batch.ids) == sorted(sample.id for sample in SAMPLES)
    with pytest.raises(DataError, match=r"11\.1% of 36 samples are corrupt"):
        loader_over([corpus])
    with pytest.raises(ValueError, match=r"no sample of .* can be used.*wordy"):
        loader_of([unusable["wordy"]])


def test_corrupt_samples_of_the_survey_and_of_reading_add_up() -> None:
    both = [*(damaged(s) for s in SAMPLES[:1]), *SAMPLES[1:], DataError("memory.tsv", "no such column", row=7)]
    assert list(loader_of(both, max_corrupt_share=0.07))
    with pytest.raises(DataError, match="corrupt"):
        list(loader_of(both, max_corrupt_share=0.05))


def test_clips_longer_than_their_corpus_says_stay_within_a_pack() -> None:
    lying = [replace(sample, duration=(sample.duration or 0) / 2) for sample in clips(40, shortest=8, longest=12)]
    batches = list(loader_of(lying, planning_buffer=40))
    assert sorted(id for batch in batches for id in batch.ids) == sorted(sample.id for sample in lying)
    assert all(p.encoder_tokens + p.decoder_tokens <= MAX_PACK_TOKENS for batch in batches for p in batch.packs)
    over = [replace(clip("over", 30.5), duration=29.0), *SAMPLES]
    skipped = [sample for batch in loader_of(over) for sample in batch.skipped]
    assert [(sample.id, sample.corrupt) for sample in skipped] == [("over", False)]


def test_lengths_that_nobody_gives_are_read_from_the_headers() -> None:
    unknown = [replace(sample, duration=None) for sample in SAMPLES]
    assert same(list(loader_of(unknown)), list(loader_of()))


def test_what_the_model_cannot_learn_is_an_error_not_a_skipped_sample() -> None:
    odia = clip("o", 0.3, language="or")
    for streaming in (False, True):
        with pytest.raises(ValueError, match="'or'") as raised:
            list(loader_of([*SAMPLES, odia], streaming=streaming))
        assert not isinstance(raised.value, DataError)


class Refusing(ExampleReader):
    """Something is wrong with more than a sample."""

    def read(self, sample: Sample, margin: float) -> Example:
        raise ValueError("nothing can be read")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_is_the_same_from_a_worker(workers: int) -> None:
    config = LoaderConfig(workers=workers)
    reader = Refusing(TOKENIZER, MODEL, config.examples)
    with pytest.raises(ValueError, match=r"^nothing can be read$"):
        list(PackedLoader([MemoryCorpus(SAMPLES)], TOKENIZER, MODEL, config, reader=reader))


# Streams.


def test_a_stream_tells_what_it_leaves_out_once() -> None:
    unusable = [DataError("memory.tsv", "no such column", row=7), clip("wordy", 0.3, "x" * 500)]
    stream = [*SAMPLES[:10], unusable[0], *SAMPLES[10:30], unusable[1], *SAMPLES[30:]]
    loader = loader_of(stream, streaming=True)
    batches, states = [], []
    for batch in loader:
        batches.append(batch)
        states.append(loader.state_dict())
    assert sorted(id for batch in batches for id in batch.ids) == sorted(sample.id for sample in SAMPLES)
    told = [[sample.id for sample in batch.skipped] for batch in batches]
    assert [id for ids in told for id in ids] == ["memory", "wordy"]
    for done, state in enumerate(states[:-1], 1):
        resumed = loader_of(stream, streaming=True)
        resumed.load_state_dict(state)
        assert [[sample.id for sample in batch.skipped] for batch in resumed] == told[done:]
    ranks = [loader_of(stream, streaming=True, rank=rank, world=2, max_corrupt_share=0.1) for rank in (0, 1)]
    told = [sample.id for loader in ranks for batch in loader for sample in batch.skipped]
    assert sorted(told) == ["memory", "wordy"]


def test_a_stream_that_gives_nothing_usable_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("whisper_moe.data.sampler.MOST_SKIPPED_IN_A_ROW", 20)
    rows = [DataError("memory.tsv", "no such column", row=i) for i in range(30)]
    with pytest.raises(DataError, match=r"20 samples in a row cannot be used; the last: .*row 19"):
        list(loader_of([*SAMPLES, *rows], streaming=True, max_corrupt_share=1))


def test_a_stream_beside_a_corpus_with_an_index() -> None:
    corpora = [MemoryCorpus(SAMPLES[:20], "map"), MemoryCorpus(SAMPLES[20:], "stream", streaming=True)]
    loader = loader_over(corpora, weights={"stream": 2})
    batches = list(loader)
    assert sorted(id for batch in batches for id in batch.ids) == sorted(sample.id for sample in SAMPLES)
    resumed = loader_over(corpora, weights={"stream": 2})
    resumed.load_state_dict(loader.state_dict() | {"position": resumed.state_dict()["position"]})
    assert same(list(resumed), batches)


@pytest.mark.parametrize(
    ("corpora", "changes", "message"),
    [
        ([], {}, "different names"),
        ([MemoryCorpus(SAMPLES), MemoryCorpus(SAMPLES)], {}, "different names.*give each a `name` in the recipe"),
        ([MemoryCorpus(SAMPLES)], {"world": 6}, "cannot be shared by 6 ranks"),
        ([MemoryCorpus(SAMPLES)], {"rank": 2, "world": 2}, "rank must be within 0 and 1"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    corpora: list[MemoryCorpus], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        loader_over(corpora, **changes)
