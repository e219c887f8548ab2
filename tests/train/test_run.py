"""Runs from a recipe to a model that commands load: whole, interrupted and gone on with, refused where they must be."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from train import ranks
from train.tiny import recipe_tree
from typer.testing import CliRunner

pytest.importorskip("datasets")

from whisper_moe import WhisperMoE
from whisper_moe.data import loader as loader_module
from whisper_moe.generate.decode import WindowDecoder
from whisper_moe.train import checkpoint
from whisper_moe.train.loop import Trainer
from whisper_moe.train.run import run_lock, train

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _spoken() -> Iterator[None]:
    """What is logged is on standard error, as in the command."""
    handler, logger = logging.StreamHandler(), logging.getLogger("whisper_moe")
    handler.emit = lambda record: print(record.getMessage(), file=sys.stderr)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


def write(material: Path, path: Path, **changes: Any) -> Path:
    """A recipe of six steps; ``changes`` replace its parts."""
    tree = recipe_tree(material / "model", material / "data")
    path.write_text(yaml.safe_dump(tree | changes), "utf-8")
    return path


def lines(run: Path) -> list[dict[str, Any]]:
    """What a run wrote down, without what depends on the clock."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


def model_bytes(run: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((run / "model").rglob("*.safetensors"))}


def test_a_run_ends_as_a_model_that_transcribes(material: Path, tmp_path: Path) -> None:
    run, recipe = tmp_path / "run", write(material, tmp_path / "small.yaml")
    assert train(recipe, ["optimisation.steps=16", "optimisation.lr=1e-2"], run, False) == 0
    losses = [line["loss"] for line in lines(run)]
    assert len(losses) == 16 and sum(losses[-3:]) < 0.8 * sum(losses[:3])
    first = lines(run)[0]
    assert (
        0 < first["fill"] <= 1
        and first["segments"] == 4
        and set(first["load"]) == {"hindi", "tamil", "english", "none"}
    )
    record = json.loads((run / "run.json").read_text("utf-8"))
    assert record["status"] == "finished" and record["step"] == 16 and record["seeds"] == {"run": 42, "loader": 42}
    assert record["versions"]["torch"] == torch.__version__ and record["recipe"]["optimisation"]["lr"] == 1e-2
    trained = WhisperMoE.from_pretrained(run / "model", dtype="float32")
    before = WhisperMoE.from_pretrained(material / "model", dtype="float32")
    assert trained.config == before.config.model_copy(update={"context_margin": 0.1})
    assert trained.transcribe(str(material / "data/0.wav"), language="en").segments is not None
    assert model_bytes(run)["core.safetensors"] != (material / "model/core.safetensors").read_bytes()


def test_a_dense_fine_tune_can_be_taken_to_transformers(material: Path, tmp_path: Path) -> None:
    from transformers import WhisperForConditionalGeneration
    from weights.whispers import TINY, hub_model, write_folder

    from whisper_moe.cli import app

    config = TINY.model_copy(update={"max_source_positions": 100, "max_target_positions": 40})
    source = write_folder(tmp_path / "hub", hub_model(config))
    recipe, run = write(material, tmp_path / "dense.yaml", model={"source": str(source)}), tmp_path / "run"
    assert train(recipe, [], run, False) == 0
    exported = CliRunner().invoke(app, ["export", str(run / "model"), "-o", str(tmp_path / "out")])
    assert exported.exit_code == 0, exported.output
    theirs = WhisperForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    ours = WhisperMoE.from_pretrained(run / "model", for_inference=False).model.eval()
    mel, tokens = torch.randn(80, 200), torch.tensor([257, 258, 261, 265, 97])
    with torch.no_grad():
        expected = theirs(input_features=mel[None], decoder_input_ids=tokens[None]).logits[0]
        assert (ours([mel], [tokens]).logits - expected).abs().max() < 1e-4


def test_a_dense_whisper_gets_experts_ttt_and_a_language(material: Path, tmp_path: Path) -> None:
    from weights.whispers import TINY, hub_model, write_folder

    config = TINY.model_copy(update={"max_source_positions": 100, "max_target_positions": 40})
    source = write_folder(tmp_path / "hub", hub_model(config))
    model = {
        "source": str(source),
        "new_languages": ["or"],
        "freeze": ["*"],
        "train": ["*.experts.*", "*.router.*", "*.ttt.*", "*.new_tokens.*"],
        "moe": {"n_experts": 3, "expert_dim": 4, "router_layer": 1},
        "ttt": {"encoder_layers": [1], "mini_batch": 10},
    }
    data = recipe_tree(material / "model", material / "data")["data"]
    data["train"] = [{**data["train"][0], "languages": ["or"]}]
    recipe, run = write(material, tmp_path / "moe.yaml", model=model, data=data), tmp_path / "run"
    assert train(recipe, ["optimisation.precision=float32"], run, False) == 0
    trained = WhisperMoE.from_pretrained(run / "model", dtype="float32")
    assert trained.config.new_tokens == ("<|or|>",) and "or" in trained.tokenizer.languages
    sound = material / "data" / "0.wav"
    assert next(iter(trained.detect_language(sound))) == trained.transcribe(sound).language == "or"
    gate = trained.model.encoder.blocks[1].ttt.gate_forward
    assert gate.abs().max() > 1e-3  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
    dense = WhisperMoE.from_pretrained(source, for_inference=False).model.state_dict()
    kept = trained.model.encoder.blocks[0].attn_norm.weight
    assert torch.equal(kept, dense["encoder.blocks.0.attn_norm.weight"])  # pyright: ignore[reportArgumentType]
    groups = json.loads((run / "run.json").read_text("utf-8"))["trained_parameters"]
    assert set(groups) == {"ttt", "router", "new_tokens", "decay", "no_decay"}


@pytest.fixture(scope="module")
def undisturbed(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happens to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert train(write(material, folder / "whole.yaml"), [], folder / "whole", False) == 0
    return folder / "whole"


def test_a_run_is_not_mixed_up_with_another(
    material: Path, undisturbed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = write(material, tmp_path / "whole.yaml")
    assert train(recipe, [], undisturbed, False) == 2
    assert "has a run already; --resume" in capfd.readouterr().err
    assert train(recipe, ["optimisation.lr=1e-4"], undisturbed, True) == 2
    assert "optimisation.lr was 0.003, is 0.0001" in capfd.readouterr().err
    # The best so far was found by another measure.
    assert train(recipe, ["evaluation.metric=loss"], undisturbed, True) == 2
    assert "evaluation.metric was 'wer', is 'loss'" in capfd.readouterr().err
    assert train(recipe, [], recipe, False) == 2
    assert "is a file" in capfd.readouterr().err


def test_a_finished_run_stays_as_it_is(
    material: Path, undisturbed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = lines(undisturbed), model_bytes(undisturbed)
    assert train(write(material, tmp_path / "whole.yaml"), ["run.keep=3"], undisturbed, True) == 0
    assert (lines(undisturbed), model_bytes(undisturbed)) == before
    said = "whole: is finished, nothing is left to train after step 6; with more optimisation.steps it goes on\n"
    assert said in capfd.readouterr().err


def test_a_run_that_stopped_early_stays_as_it_is(
    material: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rapidfuzz")
    data = recipe_tree(material / "model", material / "data")["data"]
    recipe, run = write(material, tmp_path / "a.yaml", data=data | {"evaluation": data["train"]}), tmp_path / "run"
    words = ["evaluation.metric=loss", "evaluation.limit=2", "evaluation.every=1", "optimisation.lr=0.5"]
    words += ["optimisation.steps=30", "evaluation.patience=1"]
    assert train(recipe, words, run, False) == 0
    before, names = lines(run), sorted(path.name for path in (run / "checkpoints").iterdir())
    assert before[-1]["step"] < 30
    capfd.readouterr()
    assert train(recipe, words, run, True) == 0
    assert lines(run) == before and sorted(path.name for path in (run / "checkpoints").iterdir()) == names
    assert "is finished, nothing is left to train" in capfd.readouterr().err
    record = json.loads((run / "run.json").read_text("utf-8"))
    assert (record["status"], record["step"]) == ("stopped early", before[-1]["step"])
    # More patience is enough to go on; so are more steps, which give patience anew.
    assert train(run, ["evaluation.patience=2"], None, True) == 0
    patient = lines(run)
    assert patient[: len(before)] == before and patient[-1]["step"] > before[-1]["step"]
    assert train(run, ["optimisation.steps=31"], None, True) == 0
    assert lines(run)[-1]["step"] > patient[-1]["step"]


def interrupted(recipe: Path, run: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    """A run that was stopped after its third step."""
    step, handler = Trainer.step, signal.getsignal(signal.SIGINT)

    def struck(self: Trainer) -> dict[str, Any]:
        figures = step(self)
        if self.progress.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return figures

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", struck)
        assert train(recipe, list(words), run, False) == 130
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_run_goes_on_by_its_directory_alone(
    material: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From anywhere, without the recipe's file, and where all of it was moved: paths are those of the folder it was begun in."""
    home = tmp_path / "home"
    shutil.copytree(material, home / "material")
    monkeypatch.chdir(home)
    recipe = write(Path("material"), Path("whole.yaml"))
    interrupted(recipe, Path("runs/mine"), monkeypatch)
    recipe.unlink()
    shutil.copytree("runs/mine", "runs/again")
    home.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "again/run.json"):
        assert train(Path("moved/runs") / name, ["run.keep=1"], None, True) == 0
        run = (tmp_path / "moved/runs" / name.partition("/")[0]).resolve()
        assert lines(run) == lines(undisturbed) and model_bytes(run) == model_bytes(undisturbed)
    assert Path.cwd() == tmp_path and sorted(path.name for path in tmp_path.iterdir()) == ["moved"]
    record = json.loads((run / "run.json").read_text("utf-8"))
    assert record["recipe"]["model"]["source"] == "material/model" and record["folder"] == str(tmp_path / "moved")


def test_data_that_was_moved_alone_is_named_anew(
    material: Path,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(material / "data", tmp_path / "a/data")
    shutil.copytree(material / "model", tmp_path / "a/model")
    run = tmp_path / "run"
    interrupted(write(tmp_path / "a", tmp_path / "whole.yaml"), run, monkeypatch)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    word = f"data.train.0.source={tmp_path / 'b/data'}"
    assert train(run, [word], None, True) == 2, "what it has read is still there"
    assert "data.train.0.source was" in capfd.readouterr().err
    shutil.rmtree(tmp_path / "a")  # a run needs its model no longer
    assert train(run, [word], None, True) == 0
    assert lines(run) == lines(undisturbed)


def test_more_steps_are_the_steps_of_a_longer_run_from_there_on(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of an unfinished run and of a finished one: whose rate is that of the new number of steps."""
    longer, short, finished = (tmp_path / name for name in ("longer", "short", "finished"))
    recipe = write(material, tmp_path / "a.yaml")
    linear = "optimisation.schedule=linear"
    assert train(recipe, [linear, "optimisation.steps=10"], longer, False) == 0
    interrupted(recipe, short, monkeypatch, linear)
    assert train(recipe, [linear], finished, False) == 0
    for run, done in ((short, 3), (finished, 6)):
        before = lines(run)
        assert train(run, ["optimisation.steps=2"], None, True) == 2
        said = capfd.readouterr().err
        assert f"{done} steps are done, and 2 are asked for; there can be more, not fewer" in said
        assert json.loads((run / "run.json").read_text("utf-8"))["recipe"]["optimisation"]["steps"] == 6
        assert train(run, ["optimisation.steps=10"], None, True) == 0
        said = capfd.readouterr().err
        assert "10 steps instead of 6; from here on the rate is that of a run of 10" in said
        assert lines(run)[:done] == before and [line["step"] for line in lines(run)] == [*range(1, 11)]
        assert [line["lr"] for line in lines(run)[done:]] == [line["lr"] for line in lines(longer)[done:]]
        assert train(run, [], None, True) == 0 and "nothing is left to train after step 10" in capfd.readouterr().err
    assert [line["lr"] for line in lines(finished)[:6]] != [line["lr"] for line in lines(longer)[:6]]


def test_epochs_are_gone_through_whole(material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve clips, three batches of four in an epoch; a step that takes two takes the last from the epoch behind."""
    recipe = write(material, tmp_path / "a.yaml", optimisation={"epochs": 2, "lr": 3e-3, "warmup": 1})
    whole, run, two = (tmp_path / name for name in ("whole", "run", "two"))
    assert train(recipe, [], whole, False) == 0
    assert [line["epoch"] for line in lines(whole)] == [1, 1, 1, 2, 2, 2]
    interrupted(recipe, run, monkeypatch)
    assert train(run, [], None, True) == 0
    assert lines(run) == lines(whole) and model_bytes(run) == model_bytes(whole)
    assert train(run, ["optimisation.epochs=3"], None, True) == 0
    assert [line["epoch"] for line in lines(run)] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert train(recipe, ["optimisation.epochs=1", "optimisation.accumulate=2"], two, False) == 0
    assert [line["epoch"] for line in lines(two)] == [1, 2]


@pytest.mark.parametrize("unit", ["examples", "packs"])
def test_the_batches_of_epochs_are_counted_as_they_come(unit: str, material: Path, tmp_path: Path) -> None:
    words = [f"data.loader.batch_unit={unit}", "data.loader.batch_size=2", "data.loader.planning_buffer=5"]
    words += ["data.loader.examples.margin=[0, 20]"]
    recipe = write(material, tmp_path / "a.yaml", optimisation={"epochs": 2, "lr": 3e-3, "warmup": 1})
    assert train(recipe, words, tmp_path / "run", False) == 0
    epochs = [line["epoch"] for line in lines(tmp_path / "run")]
    assert set(epochs) == {1, 2}
    assert train(recipe, [*words, "optimisation.epochs=3"], tmp_path / "run", True) == 0
    longer = [line["epoch"] for line in lines(tmp_path / "run")]
    assert longer[: len(epochs)] == epochs and set(longer[len(epochs) :]) == {3}


def test_epochs_of_a_stream_are_refused(material: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = write(material, tmp_path / "a.yaml", optimisation={"epochs": 2})
    assert train(recipe, ["data.train.0.streaming=true"], tmp_path / "run", False) == 2
    assert "optimisation.epochs: a streamed corpus has no length" in capfd.readouterr().err
    assert train(recipe, ["optimisation.steps=9"], tmp_path / "run", False) == 2
    assert "either steps or epochs, got 9 and 2; optimisation.steps=null" in capfd.readouterr().err


def test_what_is_no_run_is_said(
    material: Path, undisturbed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = write(material, tmp_path / "a.yaml")

    def said(path: Path, output: Path | None = None, resume: bool = True) -> str:
        assert train(path, [], output, resume) == 2
        return capfd.readouterr().err

    assert f"{tmp_path}: has no run.json, so no run can go on there\n" in said(tmp_path)
    for part in ("model", "checkpoints", "start"):
        assert f"has no run.json, so no run can go on there; it is a part of the run {undisturbed}" in said(
            undisturbed / part
        )
    assert "is a run; --resume goes on with it" in said(undisturbed, resume=False)
    assert "goes on in" in said(undisturbed, tmp_path / "other")
    assert "cannot be read" in said(tmp_path / "gone.yaml")
    assert f"--resume {undisturbed} goes on with the recipe that the run itself keeps" in said(
        tmp_path / "gone.yaml", undisturbed
    )
    bare = tmp_path / "bare"
    shutil.copytree(undisturbed / "checkpoints", bare / "checkpoints")
    assert "has a run already" in said(recipe, bare, resume=False)
    (bare / "run.json").write_text("{}", "utf-8")
    assert "has no recipe, so it is not what a run writes" in said(bare)


def test_what_a_checkpoint_tells_of_is_on_the_disk_before_it(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = (tmp_path / "run").resolve()
    on_disk: dict[str, int] = {}
    torn: list[str] = []
    fsync, rename = os.fsync, os.rename

    def noted(descriptor: int) -> None:
        fsync(descriptor)
        on_disk[os.readlink(f"/proc/self/fd/{descriptor}")] = os.fstat(descriptor).st_size

    def named(old: Any, new: Any) -> None:
        if Path(new).name in ("run.json", "metrics.jsonl") and on_disk.get(str(old)) != Path(old).stat().st_size:
            torn.append(Path(new).name)
        metrics = run / "metrics.jsonl"
        if Path(new).name == "COMMIT.json" and on_disk.get(str(metrics)) != metrics.stat().st_size:
            torn.append(str(new))
        on_disk.pop(str(run), None)
        rename(old, new)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "rename", named)
    monkeypatch.setattr(os, "replace", named)
    assert train(write(material, tmp_path / "a.yaml"), ["optimisation.steps=3"], run, False) == 0
    assert torn == [] and {str(run), str(run / "metrics.jsonl")} <= on_disk.keys()


JUDGED = """
import logging, os, signal, sys
logging.basicConfig(level="INFO", format="%(message)s")
from pathlib import Path
from whisper_moe.evaluate import metrics
from whisper_moe.train.run import train
recipe, folder, struck = sys.argv[1:]
(Path(folder) / os.environ["RANK"]).write_text(str(os.getpid()))
pack = metrics.pack_examples
def strike(examples):
    os.kill(int((Path(folder) / struck).read_text()), signal.SIGTERM)
    return pack(examples)
metrics.pack_examples = strike
words = ["evaluation.metric=loss", "evaluation.batch_size=1", "evaluation.every=2", "parallel.data=fsdp2"]
sys.exit(train(Path(recipe), words, Path(folder) / "run", False))
"""


@pytest.mark.parametrize("struck", ["0", "1"])
def test_a_signal_to_one_of_two_ends_an_evaluation_in_both(struck: str, material: Path, tmp_path: Path) -> None:
    """Whichever it is sent to. Twelve clips are judged one at a time; after the first, or the second, none is."""
    data = recipe_tree(material / "model", material / "data")["data"]
    recipe = write(material, tmp_path / "a.yaml", data=data | {"evaluation": data["train"]})
    started = ranks.launched(["-c", JUDGED, str(recipe), str(tmp_path), struck], 2)
    said = ranks.finish(started)
    assert [process.returncode for process in started] == [143, 143], "\n".join(said)
    assert "interrupted after step 2" in said[0]
    assert not any("evaluation" in line for line in lines(tmp_path / "run"))
    (found,) = (tmp_path / "run/checkpoints").iterdir()
    assert checkpoint.step_of(found) == 2
    assert {path.name[:11] for path in found.glob("*.safetensors")} == {"shard-00001", "shard-00002"}
    if struck == "0":  # one process goes on from the parts that two wrote
        assert train(tmp_path / "run", ["optimisation.steps=3"], None, True) == 0
        assert [line["step"] for line in lines(tmp_path / "run") if "loss" in line] == [1, 2, 3]


def test_two_that_share_a_model_learn_and_one_goes_on(material: Path, tmp_path: Path) -> None:
    """With the script for it; and a run's record may have keys that there were once."""
    recipe, run = write(material, tmp_path / "a.yaml"), tmp_path / "run"
    words = [str(recipe), "parallel.experts=1", "parallel.data=none", "parallel.tensor=2", "optimisation.steps=2"]
    started = ranks.launched([str(ROOT / "recipes/parallel/train.py"), *words, "-o", str(run)], 2)
    said = ranks.finish(started)
    assert [process.returncode for process in started] == [0, 0], "\n".join(said)
    path = run / "run.json"
    record = json.loads(path.read_text("utf-8"))
    assert record["processes"] == 2 and record["recipe"]["parallel"]["tensor"] == 2
    record["recipe"]["parallel"] |= {"data": "ddp", "tensor": 1}
    record["recipe"]["run"]["tensorboard"] = True
    path.write_text(json.dumps(record), "utf-8")
    assert train(run, ["optimisation.steps=3"], None, True) == 0
    assert [line["step"] for line in lines(run) if "loss" in line] == [1, 2, 3]


def test_every_sample_that_is_left_out_is_named_once(material: Path, tmp_path: Path) -> None:
    """By id, place, kind and cause: before the first step, where sound cannot be decoded, and of the evaluation."""
    folder = shutil.copytree(material / "data", tmp_path / "data")
    damaged = folder / "damaged.wav"
    damaged.write_bytes((folder / "1.wav").read_bytes()[:44])
    rows = ["0.wav\t", "0.wav\t<|0.0|> a", "gone.wav\ta", f"0.wav\t{'a ' * 500}", "damaged.wav\ta", "0.wav\ta\0b"]
    with (folder / "transcripts.tsv").open("a", encoding="utf-8") as table:
        table.write("".join(f"{row}\n" for row in rows))
    (folder / "test.tsv").write_text("path\ttext\n1.wav\ta\n2.wav\t\n", "utf-8")
    data = recipe_tree(material / "model", folder)["data"]
    data["evaluation"] = [{"kind": "table", "source": str(folder / "test.tsv"), "languages": ["en"]}]
    data["loader"]["max_corrupt_share"] = 0.6
    recipe, run = write(material, tmp_path / "some.yaml", data=data, evaluation={"metric": "loss"}), tmp_path / "run"
    assert train(recipe, [], run, False) == 0

    def named() -> list[tuple[str, str, str]]:
        found = map(json.loads, (run / "skipped.jsonl").read_text("utf-8").splitlines())
        return [(Path(each["place"]).name, each["kind"], each["cause"]) for each in found]

    kinds = {place: kind for place, kind, _ in named()}
    expected = {f"transcripts.tsv, row {row}": "corrupt" for row in (14, 15, 18, 19)}
    expected |= {"transcripts.tsv, row 16": "missing", "transcripts.tsv, row 17": "too long"}
    assert kinds == expected | {"test.tsv, row 3": "corrupt"} and len(named()) == len(kinds)
    assert any("'<|0.0|>' is markup" in cause for _, _, cause in named())
    before = named()
    (run / "model").rename(tmp_path / "gone")
    assert train(recipe, [], run, True) == 0 and named() == before
    strict = ["data.loader.max_corrupt_share=0.05"]
    assert train(recipe, strict, tmp_path / "strict", False) == 1
    lines = (tmp_path / "strict" / "skipped.jsonl").read_text("utf-8").splitlines()
    assert sorted(json.loads(line)["place"] for line in lines) == sorted(
        f"{folder / 'transcripts.tsv'}, row {row}" for row in range(14, 20)
    )


HOLD = """
import os, sys, time
from pathlib import Path
from whisper_moe.train.run import run_lock
with run_lock(Path(sys.argv[1])):
    if not os.fork():
        print(os.getpid(), flush=True)
    time.sleep(60)
"""


def test_a_killed_trainer_does_not_keep_its_directory(tmp_path: Path) -> None:
    """Nor does a worker that outlives it."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    worker = int(process.stdout.readline())
    try:
        with pytest.raises(ValueError, match="another trainer"), run_lock(tmp_path):
            pass
        process.kill()
        process.wait(timeout=60)
        os.kill(worker, 0)
        with run_lock(tmp_path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


def test_the_best_checkpoint_becomes_the_model(material: Path, tmp_path: Path) -> None:
    pytest.importorskip("rapidfuzz")
    data = recipe_tree(material / "model", material / "data")["data"]
    recipe = write(material, tmp_path / "judged.yaml", data=data | {"evaluation": data["train"]})
    run = tmp_path / "run"
    words = ["evaluation.every=2", "evaluation.metric=loss", "evaluation.limit=5", "optimisation.lr=0.5", "run.keep=1"]
    assert train(recipe, words, run, False) == 0
    judged = [line for line in lines(run) if "evaluation" in line]
    assert [line["step"] for line in judged] == [2, 4, 6]
    losses = {line["step"]: line["evaluation"]["loss"] for line in judged}
    best = min(losses, key=losses.__getitem__)
    kept = checkpoint.best(run)
    assert kept is not None and kept.name.endswith(f"step-{best:08d}")
    state = checkpoint.read(kept)["model/decoder.norm.weight"]
    model = WhisperMoE.from_pretrained(run / "model", for_inference=False).model
    assert torch.equal(model.decoder.norm.weight, state)  # pyright: ignore[reportArgumentType]
    assert json.loads((run / "run.json").read_text("utf-8"))["best_step"] == best


def test_words_and_characters_are_judged_by_what_the_model_writes(material: Path, tmp_path: Path) -> None:
    pytest.importorskip("rapidfuzz")
    data = recipe_tree(material / "model", material / "data")["data"]
    recipe = write(material, tmp_path / "judged.yaml", data=data | {"evaluation": data["train"]})
    assert train(recipe, ["optimisation.steps=1", "evaluation.limit=3"], tmp_path / "run", False) == 0
    (line,) = [line for line in lines(tmp_path / "run") if "evaluation" in line]
    figures = {"loss", "wer", "cer", "wer_padded", "cer_padded"}
    assert set(line["evaluation"]) == figures and line["evaluation"]["wer"] > 0


@pytest.mark.parametrize(
    ("overrides", "kept", "drawn", "judged"),
    [
        (["data.loader.examples.margin=null"], 2.5, (2.5, 30), {2.5, 30}),
        (["data.loader.examples.margin=[0.2, 0.7]"], 0.2, (0.2, 0.7), {0.2, 30}),
        (["data.loader.examples.margin=null", "model.context_margin=0.4"], 0.4, (0.4, 30), {0.4, 30}),
        (["evaluation.padded=false"], 0.1, (0.1, 0.1), {0.1}),
    ],
)
def test_the_margin_of_training_is_kept_judged_by_and_used(
    material: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    overrides: list[str],
    kept: float,
    drawn: tuple[float, float],
    judged: set[float],
) -> None:
    pytest.importorskip("rapidfuzz")
    decode, margins, ranges = WindowDecoder.open, set[float](), set[tuple[float, float]]()
    open_order = loader_module.open_order

    def noted(self: Any, *args: Any, margin: float, **options: Any) -> Any:
        margins.add(margin)
        return decode(self, *args, margin=margin, **options)

    def opened(corpora: Any, reader: Any, *how: Any) -> Any:
        ranges.add(reader.margins)
        return open_order(corpora, reader, *how)

    monkeypatch.setattr(WindowDecoder, "open", noted)
    monkeypatch.setattr(loader_module, "open_order", opened)
    data, run = recipe_tree(material / "model", material / "data")["data"], tmp_path / "run"
    recipe = write(material, tmp_path / "a.yaml", data=data | {"evaluation": data["train"]})
    assert train(recipe, ["optimisation.steps=1", "evaluation.limit=1", *overrides], run, False) == 0
    assert (margins, ranges) == (judged, {drawn})
    trained = WhisperMoE.from_pretrained(run / "model", dtype="float32")
    assert trained.config.context_margin == trained.context_margin == kept
    margins.clear()
    trained.transcribe(material / "data/0.wav", language="en", temperatures=(0.0,))
    assert kept in margins and margins <= {kept, 30}


def test_a_model_that_is_trained_again_keeps_its_margin_and_hands_it_on(material: Path, tmp_path: Path) -> None:
    once, twice = write(material, tmp_path / "once.yaml"), tmp_path / "twice.yaml"
    assert train(once, ["optimisation.steps=1"], tmp_path / "once", False) == 0
    write(material, twice, model={"source": str(tmp_path / "once/model")})
    assert train(twice, ["optimisation.steps=1", "data.loader.examples.margin=null"], tmp_path / "twice", False) == 0
    assert WhisperMoE.from_pretrained(tmp_path / "twice/model", dtype="float32").context_margin == 0.1


@pytest.mark.parametrize(
    ("override", "said", "status"),
    [
        ("model.freeze=[encoders.*]", "model.freeze: no parameter is called 'encoders.*'", 2),
        ("optimisation.precision=float16", "needs a GPU", 2),
        ("losses.balancing=bias", "losses.balancing: Input should be 'loss' or 'none'", 2),
        ("parallel.experts=3", "parallel.experts is not a key of a recipe", 2),
        ("model.source=nowhere/at-all.pt", "nowhere/at-all.pt", 1),
        ("data.train.0.source=nowhere", "nowhere", 1),
    ],
)
def test_what_cannot_work_is_said_in_a_sentence(
    material: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], override: str, said: str, status: int
) -> None:
    words = [override, "optimisation.steps=1"]
    assert train(write(material, tmp_path / "a.yaml"), words, tmp_path / "run", False) == status
    assert said in capfd.readouterr().err


def test_a_long_warmup_is_told_at_the_start(material: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = write(material, tmp_path / "a.yaml")
    words = ["optimisation.steps=2", "optimisation.warmup=10", "optimisation.schedule=linear"]
    assert train(recipe, words, tmp_path / "run", False) == 0
    assert caplog.messages[0].startswith("WARNING: the warm-up of 10 steps is longer than the run of 2")
