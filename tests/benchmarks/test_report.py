"""The benchmark's report: what a run means, which pairs are compared, and the files it writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

for needed in ("rapidfuzz", "whisper_normalizer", "matplotlib"):
    pytest.importorskip(needed, reason="the benchmark's packages are an extra")

from benchmarks.scripts import script

report, peers = script("report"), script("peers")

REFERENCES: tuple[str, ...] = ("the cat sat on the mat", "a dog barked", "birds sing in spring")


words = st.lists(st.sampled_from(["alpha", "bravo", "delta", "echo", "golf"]), min_size=1, max_size=6).map(" ".join)
clips = st.lists(words, min_size=1, max_size=5)


@given(clips, words)
def test_edits_of_a_joined_recording_add_up_to_the_whole(references: list[str], transcript: str) -> None:
    split = report.joined_counts(references, transcript)
    whole = report.clip_counts([" ".join(references)], [transcript])
    assert split.part.sum() == whole.part.sum()
    assert split.whole.sum() == whole.whole.sum()


def test_errors_of_a_joined_recording_stay_in_their_clip() -> None:
    said = "the cat sat on the mat a frog barked birds sing loudly in spring"
    assert report.joined_counts(REFERENCES, said).part.tolist() == [0, 1, 1]
    between = "the cat sat on the mat yes a dog barked birds sing in spring"
    assert report.joined_counts(REFERENCES, between).part.tolist() == [1, 0, 0]


def material(joined: bool = False) -> Any:
    return report.Material(names=("one", "two", "three"), references=REFERENCES, joined=joined)


def measured(texts: Sequence[str], wall: float, batched: bool = False) -> dict[str, Any]:
    """What the process of one system hands back."""
    one = {"wall": wall, "cpu": 2 * wall, "latencies": [] if batched else [wall / 3] * 3, "texts": texts}
    return {
        "passes": [one],
        "import_seconds": 1.0,
        "load_seconds": 0.5,
        "peak_bytes": 300_000_000,
        "disk_bytes": 74_000_000,
        "batched": batched,
        "options": {"beam_size": 1},
        "fallbacks": None,
        "machine_load_before": 0.0,
        "one_by_one": [0.2, 0.3, 0.4],
    }


def test_every_clip_that_differs_is_listed_with_both_texts() -> None:
    mine = ["The cat sat on the mat.", "A dog parked.", "Birds sing in spring."]
    theirs = ["The cat sat on the mat.", "A dog barked.", "Birds sing in spring"]
    found = report.changed(material(), mine, theirs)
    assert [row["clip"] for row in found] == ["two", "three"]
    assert (found[0]["text"], found[0]["baseline"]) == ("A dog parked.", "A dog barked.")
    assert [(row["edits"], row["baseline_edits"]) for row in found] == [(1, 0), (0, 0)]


def built(joined: bool = False) -> dict[str, Any]:
    right, wrong = list(REFERENCES), [REFERENCES[0], "a frog barked", REFERENCES[2]]
    if joined:
        right, wrong = [" ".join(right)], [" ".join(wrong)]
    runs = {
        "ours": [measured(wrong, 2.0, batched=True), measured(wrong, 1.0, batched=True)],
        "ours-padded": [measured(right, 4.0, batched=True)],
        "peer": [measured(right, 6.0), measured(right, 3.0), measured(right, 4.5)],
    }
    return report.build(runs, material(joined), 30.0, "peer", report.default_pairs(list(runs), "peer"))


def test_speed_is_of_the_best_run_and_ratios_are_to_the_baseline() -> None:
    found = built()["systems"]
    assert found["ours"]["real_time_factor"] == {"best": 30.0, "median": 20.0}
    assert found["ours"]["times_baseline"] == {"min": 3.0, "median": 3.0}
    assert found["peer"]["times_baseline"] == {"min": 1.0, "median": 1.0}
    assert found["ours"]["latency"]["median"] == 0.3  # measured one by one
    assert found["peer"]["latency"]["median"] == pytest.approx(1.5)


def test_transcripts_that_change_between_runs_are_reported() -> None:
    runs = {"ours": [measured(list(REFERENCES), 1.0), measured(["", "", ""], 1.0)]}
    found = report.build(runs, material(), 30.0, "ours", [])
    assert not found["systems"]["ours"]["same_transcripts_every_time"]
    assert built()["systems"]["ours"]["same_transcripts_every_time"]


def test_pairs_put_the_padded_form_first_and_refuse_systems_that_did_not_run() -> None:
    pairs = [(row["system"], row["baseline"]) for row in built()["comparisons"]]
    assert pairs == [("ours", "ours-padded"), ("ours", "peer"), ("ours-padded", "peer")]
    with pytest.raises(ValueError, match="cannot compare ours:nobody"):
        report.build({"ours": [measured(list(REFERENCES), 1.0)]}, material(), 30.0, "ours", [("ours", "nobody")])


def test_a_pair_that_is_asked_for_and_a_default_is_listed_once_and_first() -> None:
    runs = {name: [measured(list(REFERENCES), 1.0)] for name in ("ours", "peer", "other")}
    pairs = [("other", "peer"), *report.default_pairs(list(runs), "peer")]
    rows = report.build(runs, material(), 30.0, "peer", pairs)["comparisons"]
    assert [(row["system"], row["baseline"]) for row in rows] == [("other", "peer"), ("ours", "peer")]


def test_the_int8_form_is_compared_with_its_own_padded_form() -> None:
    names = [name for name in peers.systems("openai/whisper-base") if name.startswith("ours")]
    pairs = report.default_pairs(names, "nobody")
    assert ("ours-int8", "ours-int8-padded") in pairs
    assert ("ours-whisper-base-int8", "ours-whisper-base-int8-padded") in pairs


@pytest.mark.parametrize("joined", [False, True])
def test_the_written_files_hold_the_figures(tmp_path: Path, joined: bool) -> None:
    heading = {
        "date": "2026-01-02T03:04:05+00:00",
        "manifest": "read/transcripts.tsv",
        "clips": 3,
        "audio_seconds": 30.0,
        "settings": {
            "mode": "long" if joined else "clips",
            "model": "openai/whisper-base",
            "threads": 2,
            "repeats": 3,
            "language": "en",
            "beam": 1,
            "fallback": False,
            "baseline": "peer",
        },
        "machine": {"cpu": "a processor", "system": "Linux", "python": "3.11"},
        "versions": {"torch": "2.13"},
    }
    results = heading | built(joined)
    report.write(results, material(joined), tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(results))
    table = (tmp_path / "table.md").read_text()
    assert "| ours | 7.69 (" in table
    assert ("a frog barked" in table) is not joined
    rows = [line.split("\t") for line in (tmp_path / "transcripts.tsv").read_text().splitlines()]
    assert rows[0] == ["clip", "reference", "ours", "ours-padded", "peer"]
    assert {len(row) for row in rows} == {5}
    assert len(rows) == (2 if joined else 4)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
