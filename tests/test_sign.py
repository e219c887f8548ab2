"""``whisper-moe sign``: films in, a line for each out; mistakes before anything is loaded, a bad film costs itself alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from data.miniatures import film
from generate.test_sign import SEES
from generate.tiny import tiny_whisper_moe

if TYPE_CHECKING:
    from commandline import Run


@pytest.fixture(scope="module")
def sees(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags for a tiny model that sees films."""
    folder = tmp_path_factory.mktemp("models")
    tiny_whisper_moe(config=SEES).save_pretrained(folder / "sees")
    tiny_whisper_moe().save_pretrained(folder / "hears")
    return ["--model", str(folder / "sees"), "--dtype", "float32", "--device", "cpu"]


@pytest.fixture
def clips(tmp_path: Path) -> list[Path]:
    return [
        film(tmp_path / f"{name}.mov", [0.04 * n for n in range(10)], width=w) for name, w in (("a", 96), ("b", 64))
    ]


def test_a_film_is_a_line_and_several_are_named(run: Run, sees: list[str], clips: list[Path], tmp_path: Path) -> None:
    alone, *_ = (run("sign", str(clip), *sees).out.rstrip("\n") for clip in clips)
    both = run("sign", str(tmp_path / "*.mov"), *sees, "-o", str(tmp_path / "said.txt"))
    assert (both.status, both.out) == (0, "")
    lines = (tmp_path / "said.txt").read_text("utf-8").splitlines()
    assert [line.split("\t")[0] for line in lines] == [str(clip) for clip in clips]
    assert lines[0].split("\t")[1] == alone
    facts = json.loads(run("sign", str(clips[0]), "--json", "--language", "asl", *sees).out)
    assert (facts["source"], facts["language"]) == (str(clips[0]), "ase") and facts["avg_logprob"] < 0


def test_a_film_that_cannot_be_read_costs_itself_alone(
    run: Run, sees: list[str], clips: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "cut.mov").write_bytes(clips[0].read_bytes()[:400])
    done = run("sign", str(clips[0]), str(tmp_path / "cut.mov"), str(clips[1]), str(tmp_path / "none.mov"), *sees)
    assert done.status == 1 and "cut.mov" in done.err and "none.mov" in done.err
    assert [line.split("\t")[0] for line in done.out.splitlines()] == [str(clip) for clip in clips]


@pytest.mark.parametrize(
    ("flags", "status", "said"),
    [
        (["--language", "isl"], 2, "not trained in Indian Sign Language"),
        (["-o", "no/where.txt"], 2, "there is no folder no"),
        (["--dtype", "int3"], 2, "int3"),
    ],
)
def test_mistakes_are_one_sentence(
    run: Run, sees: list[str], clips: list[Path], flags: list[str], status: int, said: str
) -> None:
    done = run("sign", str(clips[0]), *sees, *flags)
    assert (done.status, done.out) == (status, "") and said in done.err.splitlines()[-1]


def test_a_model_that_only_hears_says_so(run: Run, sees: list[str], clips: list[Path]) -> None:
    done = run("sign", str(clips[0]), "--model", sees[1].replace("sees", "hears"))
    assert done.status == 1 and "only hears: it has no part for texts or films" in done.err
