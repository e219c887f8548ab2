"""The split of the clips that the eight experts learn from and are measured on."""

from __future__ import annotations

import csv
import importlib.util
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "recipes" / "eight-experts"
with open(FOLDER / "split.tsv", newline="") as _file:
    ROWS = list(csv.DictReader(_file, delimiter="\t"))
SPEAKER = {
    "malayalam": r"/(s\d+)_",
    "spelled": r"/(s\d+)_",
    "learners": r"clips/(\d{4})_",
    "digits": r"/\d_([a-z]+)_",
}
"""Where in a path it is."""


def test_every_clip_is_in_one_split_and_every_set_has_three() -> None:
    assert len({row["path"] for row in ROWS}) == len(ROWS) == len({row["sha256"] for row in ROWS})
    assert all(re.fullmatch(r"[0-9a-f]{64}", row["sha256"]) for row in ROWS)
    for name in {row["set"] for row in ROWS}:
        sizes = {s: sum(row["set"] == name and row["split"] == s for row in ROWS) for s in ("train", "dev", "test")}
        assert sum(sizes.values()) == sum(row["set"] == name for row in ROWS)
        assert min(sizes.values()) >= 15, (name, sizes)


@pytest.mark.parametrize("name", SPEAKER)
def test_nobody_is_heard_in_two_splits(name: str) -> None:
    heard: dict[str, set[str]] = {"train": set(), "dev": set(), "test": set()}
    for row in ROWS:
        if row["set"] == name:
            found = re.search(SPEAKER[name], row["path"])
            assert found, row["path"]
            heard[row["split"]].add(found[1])
    assert all(heard.values())
    assert not (heard["test"] & heard["train"] or heard["test"] & heard["dev"] or heard["dev"] & heard["train"])


def test_the_tables_are_of_these_recordings(shared_data: Path, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("split", FOLDER / "split.py")
    assert spec
    assert spec.loader
    split = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(split)
    clips = [clip for each in split.SETS for clip in each(shared_data)]
    found = {clip.path: clip for clip in split.checked(shared_data, clips)}
    assert len(found) == len(ROWS)
    assert len({clip.text for clip in clips if (clip.set, clip.split) == ("malayalam", "test")}) > 50
    texts = {
        part: {c.text for c in clips if (c.set, c.split) == ("malayalam", part)} for part in ("train", "dev", "test")
    }
    assert not texts["test"] & (texts["train"] | texts["dev"])
    with pytest.raises(ValueError, match=r"lacks \d+ clips of split\.tsv"):
        list(split.checked(shared_data, clips[1:]))
    with pytest.raises(ValueError, match=r"not what split\.tsv was made of"):
        list(split.checked(shared_data, [clips[0]._replace(split="other")]))
