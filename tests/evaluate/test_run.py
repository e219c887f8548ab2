"""The whole evaluation of a tiny model: what the report says follows from what was heard, and it is whole or not there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

for needed in ("datasets", "rapidfuzz", "sacrebleu", "whisper_normalizer"):
    pytest.importorskip(needed, reason="what evaluation needs is an extra")

from commandline import trusting_flags
from evaluate.corpora import TEXTS, clips, table, written

from whisper_moe import WhisperMoE
from whisper_moe.evaluate import report as reports
from whisper_moe.evaluate import run as module
from whisper_moe.evaluate.cost import flops
from whisper_moe.evaluate.measure import Clip, Measured, Options, System, SystemFailed, measure
from whisper_moe.evaluate.run import evaluate, plan

PAIR = {"source_text": "यह अच्छी किताब है", "text": "This is a good book today.", "language": "hi"}
PAIR |= {"target_language": "en", "task": "translate-text"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return table(tmp_path)


def saved(model: WhisperMoE, folder: Path) -> str:
    trusting_flags(model, folder)
    return str(folder)


def here(system: System, clips: list[Clip], options: Options, load: Any) -> Measured:
    """In this process."""
    return measure(system, system.weights(), clips, options, load)


def evaluated(folder: Path, model: str, *files: Path, **settings: Any) -> tuple[int, dict[str, Any]]:
    """Status and report, measured in this process."""
    output = folder / "out"
    asked = plan(
        model, list(map(str, files)), output=output, dtype="float32", fallback=False, latency_clips=2, **settings
    )
    status = evaluate(asked, WhisperMoE.from_pretrained, measure=here)
    return status, json.loads((output / "report.json").read_text(encoding="utf-8"))


def quality(report: dict[str, Any], task: str = "transcribe") -> dict[str, Any]:
    """Of the first system."""
    return next(iter(report["systems"].values()))["quality"][task]


def saying(folder: Path, file: Path, texts: Sequence[str] = TEXTS, name: str = "perfect") -> str:
    """A system that has written a text for each clip."""
    return written(folder, name, dict(zip((clip.sample.id for clip in clips(file)), texts, strict=True)))


def test_a_model_beside_a_peer(tmp_path: Path, tiny_model: WhisperMoE):
    file = table(tmp_path, domain=["home", "home", "street", "street"])
    status, report = evaluated(tmp_path, saved(tiny_model, tmp_path / "m"), file, compare=[saying(tmp_path, file)])
    assert status == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(reports.FILES)
    ours, theirs = report["systems"]["m"], report["systems"]["transcripts:perfect.tsv"]
    speech = theirs["quality"]["transcribe"]
    assert (speech["figures"]["wer"]["value"], speech["figures"]["script"]["value"]) == (0, 1)
    assert speech["by"]["language"].keys() == {"en", "hi"}
    assert speech["by"]["domain"]["home"]["clips"] == 2
    assert [part["clips"] for part in speech["by"]["duration"].values()] == [3, 1]
    wer = ours["quality"]["transcribe"]["figures"]["wer"]
    assert wer["of"] == sum(len(text.split()) for text in TEXTS)
    assert list(report["systems"]) == ["m", "m, padded", "transcripts:perfect.tsv"]
    assert [report["systems"][name]["margin"] for name in report["systems"]] == [2.5, 30, None]
    difference = report["comparisons"][1]["tasks"]["transcribe"]["figures"]["wer"]["difference"]
    assert difference == pytest.approx(wer["value"])
    assert ours["quality"]["transcribe"]["figures"]["cross_entropy"]["value"] > 0
    weights = sum(path.stat().st_size for path in (tmp_path / "m").rglob("*.safetensors"))
    assert ours["cost"]["disk_bytes"] == weights


def test_cost_and_experts_are_those_of_the_model(tmp_path: Path, tiny_model: WhisperMoE, file: Path):
    _, report = evaluated(tmp_path, saved(tiny_model, tmp_path / "m"), file, margin=0.5)
    cost, experts = report["systems"]["m"]["cost"], report["systems"]["m"]["experts"]
    assert cost["parameters_total"] == sum(t.numel() for t in tiny_model.model.state_dict().values())
    assert cost["latency"]["clips"] == 2
    assert cost["times_real_time"] == pytest.approx(5 / cost["wall_seconds"])
    least, most = (
        sum(sum(flops(tiny_model.config, seconds + 0.5, tokens)) for seconds in (0.5, 1, 1.5, 2)) / 5
        for tokens in (0, cost["tokens"])
    )
    assert least < cost["flops_per_second"] < most
    assert experts.keys() == {"en", "hi"}
    assert all(sum(row.values()) == pytest.approx(1) for row in experts.values())
    assert all([*row] == ["hindi", "tamil", "english", "none"] for row in experts.values())


def test_the_load_of_a_language_or_corpus_is_that_of_its_segments(tmp_path: Path, tiny_model: WhisperMoE, file: Path):
    tables = [file, tmp_path / "birds.tsv"]
    head, *rows = file.read_text(encoding="utf-8").splitlines()
    file.write_text("\n".join([head, *rows[:3]]) + "\n", encoding="utf-8")
    tables[1].write_text(f"{head}\n{rows[3]}\n", encoding="utf-8")
    _, report = evaluated(tmp_path, saved(tiny_model, tmp_path / "m"), *tables, margin=0.5)
    model = WhisperMoE.from_pretrained(tmp_path / "m", dtype="float32")
    options = {"temperatures": (0.0,), "context_margin": 0.5, "timestamps": False}
    heard = [
        model.transcribe(tmp_path / f"clip-{i}.wav", language="hi" if i == 2 else "en", **options) for i in range(4)
    ]
    expected = {"en": [0, 1, 3], "hi": [2], "table": [0, 1, 2], "birds": [3]}
    parts = report["systems"]["m"]["experts"] | report["systems"]["m"]["experts_by_corpus"]
    assert parts.keys() == expected.keys()
    for part, places in expected.items():
        gates = [dict(segment.experts) for i in places for segment in heard[i].segments]  # one for each of these clips
        assert len(gates) == len(places)
        load = {name: sum(each.get(name, 0.0) for each in gates) / len(gates) for name in parts[part]}
        assert parts[part] == pytest.approx(load, abs=1e-3)
        assert f"| {part} |" in (tmp_path / "out/report.md").read_text(encoding="utf-8")


def test_a_broken_file_costs_that_file_and_is_named(tmp_path: Path, file: Path):
    spec = saying(tmp_path, file)
    (tmp_path / "clip-1.wav").write_bytes(b"RIFF no sound")
    status, report = evaluated(tmp_path, spec, file)
    ((name, cause),) = report["broken"]
    assert (status, report["clips"]) == (1, 3)
    assert name.endswith("clip-1.wav") and "clip-1.wav" in cause
    assert "clip-1.wav" in (tmp_path / "out/report.md").read_text()
    for path in tmp_path.glob("*.wav"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"nothing to evaluate on: .*clip-0.wav"):
        evaluated(tmp_path, spec, file)


def test_clips_that_a_system_fails_on_count_as_empty_transcripts(tmp_path: Path, file: Path):
    status, report = evaluated(tmp_path, written(tmp_path, "none", {}), file)
    part = quality(report)
    assert (status, part["failed"], part["empty_transcripts"]) == (1, 4, 4)
    assert (part["figures"]["wer"]["value"], part["figures"]["cer"]["value"]) == (1, 1)
    assert part["figures"]["script"] == {"value": None, "low": None, "high": None}
    assert len(report["systems"]["transcripts:none.tsv"]["failures"]) == 4


def test_an_empty_reference_is_counted_and_what_is_written_there_is_an_error(tmp_path: Path):
    file = table(tmp_path, ["a dog barked", "[laughter]"], ["en", "en"])
    part = quality(evaluated(tmp_path, saying(tmp_path, file, ["a dog barked", "thank you"]), file)[1])
    assert part["empty_references"] == 1
    assert part["figures"]["wer"]["value"] == pytest.approx(2 / 3)


def test_a_peer_that_cannot_be_measured_is_named_and_the_rest_is_reported(tmp_path: Path, file: Path):
    def some(system: System, *others: Any) -> Any:
        if "bad" in system.name:
            raise SystemFailed("bad: killed")
        return here(system, *others)

    bad = written(tmp_path, "bad", {})
    asked = plan(saying(tmp_path, file), [str(file)], compare=[bad], output=tmp_path / "out")
    assert evaluate(asked, WhisperMoE.from_pretrained, measure=some) == 1
    report = json.loads((tmp_path / "out/report.json").read_text(encoding="utf-8"))
    assert report["not_measured"] == {"transcripts:bad.tsv": "bad: killed"}
    assert "bad: killed" in (tmp_path / "out/report.md").read_text()


def test_translations_and_signs_have_figures_of_their_own(tmp_path: Path):
    file = tmp_path / "pairs.jsonl"
    other = PAIR | {"source_text": "वह घर जाता है", "text": "He goes home in the evening."}
    (tmp_path / "hello.mp4").write_bytes(b"a film")
    rows = [PAIR, other, {"path": "hello.mp4", "text": "Good Morning", "task": "sign"}]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    texts = [PAIR["text"], "He is at home.", "good morning"]
    _, report = evaluated(tmp_path, saying(tmp_path, file, texts), file)
    assert report["tasks"] == ["translate-text", "sign"]
    assert 0 < quality(report, "translate-text")["figures"]["bleu"]["value"] < 100
    assert quality(report, "translate-text")["by"]["language"].keys() == {"hi→en"}
    assert quality(report, "sign")["figures"].keys() == {"accuracy", "script"}
    assert quality(report, "sign")["figures"]["accuracy"]["value"] == 1


def test_columns_of_other_names_are_told(tmp_path: Path, file: Path):
    spec = saying(tmp_path, file)
    _, expected = evaluated(tmp_path, spec, file)
    file.write_text(file.read_text("utf-8").replace("path\ttext", "snd\tsaid", 1), "utf-8")
    status, report = evaluated(tmp_path, spec, file, columns="path=snd, text=said")
    assert status == 0 and quality(report) == quality(expected)


def test_a_task_that_a_system_does_not_do_is_said_before_anything_is_loaded(tmp_path: Path, tiny_model: WhisperMoE):
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(PAIR) + "\n")
    with pytest.raises(ValueError, match="m does not do the task translate-text; it does transcribe, translate"):
        evaluated(tmp_path, saved(tiny_model, tmp_path / "m"), file)


EVIL = '<script>alert("x")</script> | & "quoted"'


def test_the_tables_take_no_orders_from_what_they_show(tmp_path: Path):
    file = table(tmp_path, domain=[EVIL, "b", "c", "d"])
    evaluated(tmp_path, saying(tmp_path, file, name="<b>bold"), file)
    table_text = (tmp_path / "out/report.md").read_text(encoding="utf-8")
    assert "<script>" not in table_text and "&lt;script>" in table_text
    assert all(line.replace("\\|", "").count("|") > 2 for line in table_text.splitlines() if EVIL[:4] in line)


def test_transcripts_are_a_row_for_each_clip_with_every_systems_words(tmp_path: Path, file: Path):
    other = saying(tmp_path, file, ["a  b"] * 4, "other")
    evaluated(tmp_path, saying(tmp_path, file), file, compare=[other])
    rows = [line.split("\t") for line in (tmp_path / "out/transcripts.tsv").read_text(encoding="utf-8").splitlines()]
    assert {len(row) for row in rows} == {len(rows[0])}
    assert [row[-2] for row in rows] == ["transcripts:perfect.tsv", *TEXTS]
    assert [row[-1] for row in rows] == ["transcripts:other.tsv", *["a b"] * 4]


def test_a_report_is_replaced_whole_and_a_failed_one_leaves_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: Path
):
    spec, out = saying(tmp_path, file), tmp_path / "out"
    evaluated(tmp_path, spec, file)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    around = sorted(path.name for path in tmp_path.iterdir())

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("whisper_moe.weights.files.sync", full)
        with pytest.raises(OSError, match="No space"):
            evaluated(tmp_path, spec, file, limit=2)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == around
    out.rename(tmp_path / "elsewhere")
    out.symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    _, report = evaluated(tmp_path, spec, file, limit=2)
    assert report["clips"] == 2 and out.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["elsewhere", *around])


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path: Path):
    mine, spec = tmp_path / "mine", written(tmp_path, "w", {})
    mine.mkdir()
    (mine / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="is a file"):
        plan(spec, ["nowhere.tsv"], output=mine / "letter.txt")
    for name in (*reports.FILES, reports.JSON):
        with pytest.raises(ValueError, match=r"it holds more than a report: letter\.txt"):
            plan(spec, ["nowhere.tsv"], output=mine)
        (mine / name).write_text("{}")
    (mine / "letter.txt").unlink()
    plan(spec, ["nowhere.tsv"], output=mine)
    (mine / reports.JSON).unlink()
    with pytest.raises(ValueError, match="not replaced"):
        plan(spec, ["nowhere.tsv"], output=mine)


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        ("", {}, "names no model"),
        ("transcripts:nowhere.tsv", {}, "no such file"),
        ("a", {"compare": ["b", "b"]}, "two systems would both be called b"),
        ("a", {"task": "sing"}, "sing"),
        ("a", {"languages": ("klingon",)}, "unknown language 'klingon'"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_read(model: str, settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        plan(model, ["nowhere.tsv"], **settings)


def test_a_part_of_what_the_hub_has_is_streamed():
    (corpus,) = plan("a", ["some/speech"], configuration="hi_in").corpora
    assert (corpus.source, corpus.configuration, corpus.split, corpus.streaming) == (
        "some/speech",
        "hi_in",
        "test",
        True,
    )


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"pip install 'whisper-moe\[evaluate\]'"):
        plan("a", ["nowhere.tsv"])
