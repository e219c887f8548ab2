"""The program does what it did when its golden files were written (``make golden``; ``golden.py --write``)."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("datasets")
pytest.importorskip("rapidfuzz")
from golden import golden


@pytest.mark.parametrize(
    "part", [pytest.param(p, marks=pytest.mark.slow) if p == "transcripts" else p for p in golden.PARTS]
)
def test_it_is_as_it_was(part: str) -> None:
    differences, notes = golden.compare(part)
    assert not differences, "\n".join(differences)
    if notes:
        pytest.skip("; ".join(notes))


def test_what_changes_comes_and_goes_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        golden.PARTS, "losses", lambda: {"losses-a.json": {"1": {"loss": 1.0}}, "losses-c.json": {"1": 0}}
    )
    folder = golden.home("losses", tmp_path)
    assert golden.compare("losses", tmp_path) == (
        [],
        [f"losses: there are no files for {folder.name}; --write makes them"],
    )
    folder.mkdir()
    for name, loss in (("a", 1.000009), ("b", 1.0)):
        (folder / f"losses-{name}.json").write_text(golden.as_text({"1": {"loss": loss}}))
    differences, _ = golden.compare("losses", tmp_path)
    assert [line for line in differences if line.startswith(("---", "+++"))] == [
        f"{sign} {side}/losses-{name}.json" for name in "bc" for sign, side in (("---", "golden"), ("+++", "now"))
    ]
    (folder / "losses-a.json").write_text(golden.as_text({"1": {"loss": 1.00002}}))
    assert '-"1": {"loss": 1.00002}' in golden.compare("losses", tmp_path)[0]
