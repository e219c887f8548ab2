"""The comparison of experts, merged models and rivals: its arithmetic, who is sent where, and that nothing is decoded twice."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

for needed in ("datasets", "rapidfuzz", "matplotlib", "sacrebleu", "whisper_normalizer"):
    pytest.importorskip(needed, reason="what evaluation needs is an extra")

from evaluate.corpora import clips, table
from generate.tiny import CONFIG, tiny_whisper_moe

from whisper_moe.config import TTTConfig
from whisper_moe.evaluate.measure import Heard
from whisper_moe.evaluate.metrics import ErrorCounts, interval
from whisper_moe.weights.load import load_model

FOLDER = Path(__file__).parent.parent / "recipes" / "eight-experts"
sys.path.insert(0, str(FOLDER))
compare, decoding, figures, soup = map(import_module, ("compare", "decoding", "figures", "soup"))
sys.path.remove(str(FOLDER))
DENSE = CONFIG.model_copy(update={"moe": None, "ttt": None})
TTT = TTTConfig(encoder_layers=(1,))


def test_a_loop_costs_no_more_than_silence_and_a_set_as_much_as_any_other(tmp_path: Path) -> None:
    four = clips(table(tmp_path, ["a b", "c d", "e f", "g h"], ["en"] * 4))
    loop, silence = (figures.counts(four[:1], [Heard(text)]) for text in ("x " * 50, ""))
    assert loop["wer"].value == 25
    assert loop["wer_capped"].value == silence["wer_capped"].value == 1
    half, none = (
        figures.counts(four, [Heard(text) for text in said])["wer"] for said in (["a b", "c d", "x y", "z"], "abcd")
    )
    whole = figures.mean([half, none.of_clips([0])])
    assert (half.value, none.of_clips([0]).value, whole.value) == (0.5, 0.5, 0.5)
    one_wrong, all_right = ErrorCounts.of([1], [1]), ErrorCounts.of([0] * 99, [1] * 99)
    assert figures.mean([one_wrong, all_right]).value == 0.5
    apart = figures.compared(half, half, silence["wer_capped"].of_clips([0, 0, 0, 0]))
    assert (apart["less_base"]["low"], apart["less_base"]["high"]) == (0, 0)
    assert apart["less_oracle"]["high"] <= 0
    assert interval(figures.mean([half])) == interval(half)


def test_fewer_clips_are_some_of_more_and_the_order_of_the_table_does_not_matter(tmp_path: Path) -> None:
    file = table(tmp_path)
    drawn = [clip.sample.text for clip in decoding.sample(str(file), None)]
    head, *rows = file.read_text(encoding="utf-8").splitlines()
    file.write_text("\n".join([head, *rows[::-1]]) + "\n", encoding="utf-8")
    assert [clip.sample.text for clip in decoding.sample(str(file), 3)] == drawn[:3]


def test_every_clip_that_is_for_no_expert_and_changed_is_listed(tmp_path: Path) -> None:
    four = clips(table(tmp_path, ["a b", "c d", "e f", "g h"], ["en"] * 4))
    base, new = ([Heard(text) for text in texts] for texts in (["A b.", "c", "e f", "g"], ["a b", "c d", "e f", "h"]))
    texts = {name: {"cats": each, "none:fr": each} for name, each in {"base": base, "new": new}.items()}
    shown = figures.transcripts({"cats": four, "none:fr": four}, texts, ["new"], ["cats"])
    cats, other = shown.split("## ")[1:]
    assert cats.startswith("cats: 2 of 4") and cats.count("- said") == 2
    assert other.startswith("none:fr: 2 of 4")
    assert "- said: c d\n- base: c\n- new: c d" in other and "- said: g h\n- base: g\n- new: h" in other


@pytest.mark.parametrize(
    ("language", "expert"),
    [("ml", "malayalam"), ("ur", "hindi"), ("en", "digits"), ("sw", "base"), ("fr", "base"), (None, "base")],
)
def test_a_language_says_who_answers(language: str | None, expert: str) -> None:
    assert compare.sent_to(language, "digits", ["malayalam", "hindi", "digits"]) == expert


def test_who_answered_is_the_expert_with_the_greatest_gate() -> None:
    heard = [Heard("", experts=(("sw", 0.2), ("ml", 0.8))), Heard("", experts=(("none", 1.0),)), Heard("")]
    found = figures.routing(["ml", "sw", "none"], {"ml:radio": heard, "hi": heard, "none:fr": heard})
    assert found["ml:radio"]["shares"] == {name: pytest.approx(1 / 3) for name in ("ml", "none", "nobody")} | {"sw": 0}
    assert found["ml:radio"]["right"][0] == found["none:fr"]["right"][0] == pytest.approx(1 / 3)
    assert found["hi"]["right"] is None


def here(work: Callable[..., Any], *given: Any, threads: int) -> Any:
    """In this process."""
    if work is decoding.decode:
        DECODED.append(given[0].name)
    else:
        HELD.append([*given[0].crew])
    return work(*given)


DECODED: list[str] = []
HELD: list[list[str]] = []
"""The models that are in memory together, in each process that is timed."""


@pytest.fixture
def compared(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    for name, seed, config in [("base", 0, DENSE), ("cats", 1, DENSE), ("hindi", 2, DENSE), ("merged", 3, CONFIG)]:
        tiny_whisper_moe(seed, config).save_pretrained(tmp_path / name)
    tiny_whisper_moe(4, DENSE.model_copy(update={"ttt": TTT})).save_pretrained(tmp_path / "ttt")
    tables = {"cats": ("en", "a cat"), "hindi": ("hi", "नमस्ते"), "ttt": ("en", "a dog"), "none:fr": ("fr", "un chat")}
    flags = [f"--base={tmp_path / 'base'}", f"--system=merged={tmp_path / 'merged'}", "--speed-clips=1", "--rounds=1"]
    for name, (language, text) in tables.items():
        (folder := tmp_path / f"clips-{name.replace(':', '-')}").mkdir()
        flags.append(f"--set={name}={table(folder, [f'{text} {i}' for i in range(3)], [language] * 3)}")
    flags += [f"--expert={name}={tmp_path / name}" for name in ("cats", "hindi", "ttt")]

    def run(*more: str, experts: bool = True, status: int = 0) -> dict[str, Any]:
        DECODED.clear(), HELD.clear()
        given = [flag for flag in flags if experts or "--expert" not in flag]
        asked = compare.arguments([str(tmp_path / "out"), *given, "--limit=1", "--no-fallback", *more])
        assert compare.compare(asked, apart=here) == status
        return json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))

    return run


def test_everything_is_decoded_once_until_a_model_is_trained_anew(tmp_path: Path, compared: Callable[..., Any]) -> None:
    report = compared("--margins=0.5")
    assert DECODED == ["base", "base@0.5", "cats", "hindi", "ttt", "soup", "merged", "merged@0.5"]
    assert report["not_in_soup"] == []
    assert {name: each["clips"] for name, each in report["sets"].items()} == dict.fromkeys(report["sets"], 1)
    found, took = report["figures"], report["costs"]
    assert {*found} == {*DECODED, *compare.CHOSEN}
    assert took.keys() == {"base", "soup", "merged", *compare.CHOSEN}
    assert HELD[-3:-1] == [["base", "cats", "hindi", "ttt"], ["base", *sorted({report["english"], "hindi"})]]
    for place, expert in {"cats": "cats", "hindi": "hindi", "none:fr": "base"}.items():
        assert found["oracle"][place]["wer"]["value"] == found[expert][place]["wer"]["value"]
    own = [found["oracle"][name]["cer"]["value"] for name in ("cats", "hindi", "ttt")]
    assert found["oracle"]["mean"]["cer"]["value"] == pytest.approx(np.mean(own))
    assert report["english"] == min(
        ("cats", "ttt"), key=lambda x: sum(found[x][y]["wer_capped"]["value"] for y in ("cats", "ttt"))
    )
    assert all((tmp_path / "out" / name).stat().st_size for name in ("table.md", "routing.md", "errors.svg"))
    assert {"routing-merged.svg", "routing-merged@0.5.svg"} <= {file.name for file in (tmp_path / "out").iterdir()}

    again = compared("--margins=0.5")
    assert DECODED == []
    assert (again["figures"], again["costs"]) == (found, took)

    tiny_whisper_moe(7, DENSE).save_pretrained(tmp_path / "again")
    (tmp_path / "hindi").rename(tmp_path / "before")
    (tmp_path / "again").rename(tmp_path / "hindi")
    (tmp_path / "report.json").write_text('{"english": "hindi"}')  # as if of the dev sets
    later = compared(f"--dev={tmp_path}")
    assert DECODED == ["hindi", "soup"]
    files = [*(tmp_path / "out" / "transcripts" / "hindi").iterdir()]
    assert len(files) == 4
    assert not any(str(tmp_path) in file.read_text(encoding="utf-8") for file in files)
    assert later["figures"]["base"]["cats"] == found["base"]["cats"]
    assert [sent for _, sent in later["dispatch"]["cats"]] == [
        "hindi" if language in ("en", "hi", "ur") else "base" for language, _ in report["dispatch"]["cats"]
    ]


def test_one_model_can_be_compared_with_the_base_alone(compared: Callable[..., Any]) -> None:
    report = compared(experts=False)
    assert DECODED == ["base", "merged"]
    assert {*report["figures"]} == {"base", "merged"} == {*report["costs"]}
    found = report["figures"]["base"]
    own = [found[place]["cer"]["value"] for place in ("cats", "hindi", "ttt")]
    assert found["mean"]["cer"]["value"] == pytest.approx(np.mean(own))
    assert found["for none"]["cer"]["value"] == found["none:fr"]["cer"]["value"]


def test_the_soup_is_the_mean_of_what_all_have(tmp_path: Path) -> None:
    for name, seed, config in [("base", 0, DENSE), ("a", 1, DENSE), ("b", 2, DENSE.model_copy(update={"ttt": TTT}))]:
        tiny_whisper_moe(seed, config).save_pretrained(tmp_path / name)
    experts = {name: tmp_path / name for name in "ab"}
    assert soup.alike(experts, tmp_path / "base") == experts
    soup.cook(experts, tmp_path / "base", tmp_path / "soup")
    base, one, other, mean = (load_model(tmp_path / name).state for name in ("base", "a", "b", "soup"))
    assert mean.keys() == base.keys()
    for key, tensor in mean.items():
        torch.testing.assert_close(tensor, (one[key] + other[key]) / 2)


def test_names_that_would_be_mixed_up_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="names that are taken: oracle"):
        compare.compare(compare.arguments([str(tmp_path), "--expert=oracle=x"]))
    with pytest.raises(ValueError, match="experts without a set of their own: cats"):
        compare.compare(compare.arguments([str(tmp_path), "--expert=cats=x"]))
    for names, said in ((["mean"], "names that are taken: mean"), (["a:b", "a-b"], "files of one name: a:b, a-b")):
        with pytest.raises(ValueError, match=said):
            compare.compare(compare.arguments([str(tmp_path), *(f"--set={name}=x" for name in names)]))


def test_what_would_fail_at_the_end_is_refused_at_the_beginning(tmp_path: Path) -> None:
    tiny_whisper_moe(0, DENSE).save_pretrained(tmp_path / "base")
    given = [str(tmp_path / "out"), f"--base={tmp_path / 'base'}"]
    DECODED.clear()
    with pytest.raises(ValueError, match="no set is named after an expert, only none:fr: name one, as in french="):
        compare.compare(compare.arguments([*given, f"--set=none:fr={table(tmp_path)}"]), apart=here)
    given += [f"--set=cats={table(tmp_path)}", f"--system=merged={tmp_path / 'nowhere'}"]
    with pytest.raises(ValueError, match="nowhere"):
        compare.compare(compare.arguments(given), apart=here)
    assert DECODED == []


def test_who_is_chosen_on_these_very_clips_is_said_to_be(tmp_path: Path, compared: Callable[..., Any]) -> None:
    """An earlier comparison may have had no English expert, or one that is not there now."""
    for chosen in (None, "gone"):
        (tmp_path / "report.json").write_text(json.dumps({"english": chosen}))
        report = compared(f"--dev={tmp_path}", "--speed-clips=0")
        assert (report["english"] in ("cats", "ttt"), report["chosen"]) == (True, "these very clips")


def test_clips_that_break_count_as_empty_and_are_told(tmp_path: Path, compared: Callable[..., Any]) -> None:
    compared("--speed-clips=0", experts=False)
    (file,) = (tmp_path / "out/transcripts/merged").glob("cats.*")
    head, row = file.read_text(encoding="utf-8").splitlines()
    cells = row.split("\t")
    file.write_text("\n".join([head, "\t".join([*cells[:4], "it broke", cells[5], ""])]) + "\n", encoding="utf-8")
    report = compared("--speed-clips=0", experts=False, status=1)
    assert report["broken"] == {"merged": {"cats": 1}}
    assert "Broken, so counted as empty: merged: 1 of cats." in (tmp_path / "out/table.md").read_text(encoding="utf-8")


def test_a_clip_of_another_language_is_told_anew(tmp_path: Path) -> None:
    tiny_whisper_moe(0, DENSE).save_pretrained(tmp_path / "base")
    told = decoding.Model("base", str(tmp_path / "base"), decoding.THE_CLIPS)
    english = clips(table(tmp_path, ["a b"], ["en"]))
    relabelled = [replace(each, sample=replace(each.sample, language="hi")) for each in english]
    assert told.key(english) != told.key(relabelled)
    assert told._replace(language=None).key(english) == told._replace(language=None).key(relabelled)


def test_every_model_is_warm_before_the_clock_starts_and_the_base_hears_a_language_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    heard, detected = list[str](), list[Any]()

    class Slow:
        """Its first clip costs as much as loading."""

        tokenizer = generation = context_margin = None

        def __init__(self, name: str) -> None:
            self.name, self.model = name, self

        def load(self) -> Slow:
            return self

        def hear(self, adapter: Slow, clips: Sequence[Any]) -> None:
            heard.append(self.name)
            end = time.process_time() + 0.2 * (heard.count(self.name) == 1)
            while time.process_time() < end:
                pass

    crew = {name: Slow(name) for name in ("base", "cats", "hindi")}
    chosen, three = ["base", "cats", "hindi"], [SimpleNamespace(sound=number) for number in range(3)]
    assert decoding.timed(decoding.Job(crew, chosen, three))["cpu"] < 0.1
    detecting = SimpleNamespace(detect_language=lambda sound, *_: detected.append(sound))
    monkeypatch.setattr(decoding, "WindowDecoder", lambda *_: detecting)
    decoding.timed(decoding.Job(crew, chosen, three, detect=True))
    assert detected == [1, 2]  # of its own clip the base hears it as it answers
