"""What becomes of flags: the spellings and words that `whisper` takes, and what they ask for; no model is loaded."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from commandline import SAMPLE

import whisper_moe
from whisper_moe import MediaError, Outcome, WhisperMoE, cli, commands
from whisper_moe.generate.options import APPENDED_PUNCTUATION, PREPENDED_PUNCTUATION

ROOT = Path(__file__).parent.parent
Asked = Callable[..., dict[str, Any]]


def status(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    monkeypatch.setattr(sys, "argv", ["whisper-moe", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """With which options a model is loaded and asked, given these flags."""

    def call(*flags: str) -> dict[str, Any]:
        seen: dict[str, Any] = {}

        def transcribe_each(audio: Iterable[str], **options: Any) -> list[Outcome]:
            seen.update(options)
            return [Outcome(path, None, MediaError(path, "not heard")) for path in audio]

        def load(model: str | None, **options: Any) -> SimpleNamespace:
            seen.update(options)
            return SimpleNamespace(stated_language=None, name="", device="", dtype="", transcribe_each=transcribe_each)

        monkeypatch.setattr(WhisperMoE, "from_pretrained", load)
        assert status(monkeypatch, "transcribe", str(SAMPLE), *flags) == 1
        return seen

    return call


def test_whispers_spellings_with_underscores_mean_the_same() -> None:
    """Every long flag with a dash in it."""
    command: Any = cli.typer.main.get_command(cli.app)
    for name, sub in command.commands.items():
        options = [option for option in sub.params if option.param_type_name == "option"]
        flags = {flag for option in options for flag in [*option.opts, *option.secondary_opts] if len(flag) > 2}
        assert all(flag.startswith("--") and "/" not in flag for flag in flags), name
        assert {f"--{flag[2:].replace('-', '_')}" for flag in flags} <= flags, name


@pytest.mark.parametrize(
    ("flag", "field", "meant"),
    [
        ("--beam_size", "beam_size", 1),
        ("--best_of", "best_of", 1),
        ("--patience", "patience", 1.0),
        ("--length_penalty", "length_penalty", None),
        ("--temperature_increment_on_fallback", "temperatures", (0.0,)),
        ("--compression_ratio_threshold", "compression_ratio_threshold", None),
        ("--logprob_threshold", "logprob_threshold", None),
        ("--no_speech_threshold", "no_speech_threshold", None),
        ("--threads", "threads", None),
    ],
)
def test_none_leaves_a_setting_out_as_in_whisper(asked: Asked, flag: str, field: str, meant: Any) -> None:
    assert asked(flag, "None")[field] == asked(flag, "none")[field] == meant
    assert asked(flag, "0.5" if field == "temperatures" else "3")[field] not in (meant, None)


@pytest.mark.parametrize(
    ("flags", "field", "usual", "meant"),
    [
        (["--condition_on_previous_text", "True"], "condition_on_previous_text", False, True),
        (["--carry_initial_prompt", "True"], "carry_initial_prompt", False, True),
        (["--clip_timestamps", "0,5.5,10"], "clip_timestamps", (0.0,), (0.0, 5.5, 10.0)),
        (
            ["--word_timestamps", "True", "--hallucination_silence_threshold", "2"],
            "hallucination_silence_threshold", None, 2.0,
        ),
        (["--prepend_punctuations", "<"], "prepend_punctuations", PREPENDED_PUNCTUATION, "<"),
        (["--append_punctuations", ">"], "append_punctuations", APPENDED_PUNCTUATION, ">"),
        (["--detect-language-once"], "detect_language_once", False, True),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)  # fmt: skip
def test_a_flag_of_whispers_sets_its_option(asked: Asked, flags: list[str], field: str, usual: Any, meant: Any) -> None:
    assert asked()[field] == usual
    assert asked(*flags)[field] == meant


def test_subtitles_without_limits_are_what_they_are_by_default(asked: Asked) -> None:
    assert asked("--max_line_width", "None", "--max_line_count", "None", "--max_words_per_line", "None")


def test_a_path_may_begin_with_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A shell that leaves ``~`` behind ``=`` alone, as bash does."""
    monkeypatch.setenv("HOME", str(tmp_path))
    seen: dict[str, Any] = {}
    monkeypatch.setattr(commands, "transcribe", lambda **given: seen.update(given) or 0)
    flags = ("--output-dir=~/x", "--model_dir=~/m", "--initial-prompt=~/x")
    assert status(monkeypatch, "transcribe", str(SAMPLE), *flags) == 0
    assert (seen["output_dir"], seen["model_dir"]) == (tmp_path / "x", tmp_path / "m")
    assert seen["initial_prompt"] == "~/x", "which is no path"
    monkeypatch.setattr(commands, "export", lambda model, output, to: seen.update(output=output) or 0)
    assert status(monkeypatch, "export", "m", "--output=~/e") == 0 and seen["output"] == tmp_path / "e"
    monkeypatch.setattr("whisper_moe.data.inspect.run", lambda **given: seen.update(given) or 0)
    assert status(monkeypatch, "data", "inspect", "x", "--videos=~/v") == 0 and seen["videos"] == f"{tmp_path}/v"


def test_no_threads_are_the_default_number(asked: Asked) -> None:
    assert asked("--threads", "0")["threads"] is None


@pytest.mark.parametrize(
    ("flags", "gpu", "dtype"),
    [
        (["--fp16", "True"], True, "float16"),
        (["--fp16", "True", "--device", "cuda:0"], False, "float16"),
        (["--fp16", "True"], False, "auto"),
        (["--fp16", "True", "--device", "cpu"], True, "auto"),
        (["--fp16", "True", "--dtype", "bfloat16"], True, "bfloat16"),
        (["--fp16", "False"], True, "auto"),
    ],
    ids=str,
)
def test_fp16_is_half_precision_on_a_gpu_and_says_where_it_is_ignored(
    asked: Asked,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    gpu: bool,
    dtype: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert asked(*flags)["dtype"] == dtype
    ignored = "True" in flags and dtype != "float16"
    assert capsys.readouterr().err.count("--fp16 True is ignored") == ignored


@pytest.mark.parametrize(
    ("given", "device", "gpu", "dtype"),
    [
        ("int8", "cpu", False, "int8"),
        ("float32", "cuda", True, "float32"),
        ("bfloat16", "cpu", False, "bfloat16"),
        ("default", "auto", False, "auto"),
        ("auto", "auto", True, "auto"),
        ("int8_float32", "auto", False, "int8"),
        ("int8_float16", "cpu", True, "int8"),
        ("int8_float16", "auto", True, "float16"),
        ("int8_bfloat16", "cuda:0", True, "bfloat16"),
    ],
)
def test_compute_type_is_another_name_of_dtype(
    asked: Asked, monkeypatch: pytest.MonkeyPatch, given: str, device: str, gpu: bool, dtype: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    for flag in ("--compute_type", "--compute-type", "--dtype"):
        assert asked(flag, given, "--device", device)["dtype"] == dtype


@pytest.mark.parametrize(
    ("flags", "installed", "vad"),
    [
        (["--vad_filter", "True"], True, "silero"),
        (["--vad_filter", "true"], False, "energy"),
        (["--vad_filter", "False"], True, "none"),
        (["--vad_filter", "True", "--vad", "energy"], True, "energy"),
        (["--vad-filter", "False", "--vad", "energy"], True, "energy"),
    ],
    ids=str,
)
def test_vad_filter_is_the_best_detector_that_is_installed_and_says_which(
    asked: Asked, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    flags: list[str], installed: bool, vad: str,
) -> None:  # fmt: skip
    monkeypatch.setattr("whisper_moe.flags.find_spec", lambda name: installed or None)
    assert asked(*flags)["vad"] == vad
    chosen = vad != "none" and "--vad" not in flags
    assert capsys.readouterr().err.count(f"--vad-filter True: --vad {vad}\n") == chosen


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], {"shared": True, "source": "_mymodel"}),
        (["--no_shared"], {"shared": False}),
        (["--no-shared"], {"shared": False}),
        (["--shared"], {"shared": True}),
    ],
    ids=str,
)
def test_a_flag_of_two_names_has_underscores_in_both_and_leaves_other_words_alone(
    monkeypatch: pytest.MonkeyPatch, flags: list[str], expected: dict[str, Any]
) -> None:
    seen: dict[str, Any] = {}

    def upcycle(**given: Any) -> int:
        seen.update(given)
        return 0

    monkeypatch.setattr(commands, "upcycle", upcycle)
    assert status(monkeypatch, "upcycle", "_mymodel", "-o", "new", *flags) == 0
    assert expected.items() <= seen.items()


# The table in docs/flags.md.


def rows(heading: str) -> dict[str, tuple[str, str]]:
    """First column → the others, of the table under a heading."""
    text = (
        (ROOT / "docs" / "flags.md").read_text(encoding="utf-8").partition(f"## {heading}\n")[2].partition("\n## ")[0]
    )
    cells = [
        [cell.strip(" `") for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| `")
    ]
    found = {name: (here, why) for name, here, why in cells}
    assert len(found) == len(cells) > 10
    return found


def installed(module: str, file: str) -> ast.Module:
    """A module of a peer, read and not imported."""
    found = find_spec(module)
    if found is None or found.origin is None:
        pytest.skip(f"{module} is not installed")
    return ast.parse((Path(found.origin).parent / file).read_text(encoding="utf-8"))


def ours() -> dict[str, Any]:
    """Every spelling of an option of ``transcribe`` → its default."""
    command: Any = cli.typer.main.get_command(cli.app)
    options = command.commands["transcribe"].params
    return {name: option.default for option in options for name in option.opts if name.startswith("--")}


def test_the_table_has_every_flag_of_whisper_and_says_what_is_true_of_it() -> None:
    calls = [node for node in ast.walk(installed("whisper", "transcribe.py")) if isinstance(node, ast.Call)]
    added = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument"]
    theirs: dict[str, str] = {}
    for call in added:
        name = ast.literal_eval(call.args[0])
        if name.startswith("--"):
            default = next((word.value for word in call.keywords if word.arg == "default"), ast.Constant(None))
            theirs[name] = str(default.value if isinstance(default, ast.Constant) else ast.unparse(default))
    table, here = rows("Of `whisper`"), ours()
    assert set(table) == set(theirs)
    assert {word for word, _ in table.values()} <= {"same", "different", "not here"}
    assert {name for name, (word, _) in table.items() if word != "not here"} == set(theirs) & set(here)
    for name, (word, why) in table.items():
        assert (word == "same") == (not why), name
        if word == "same":
            one, other = theirs[name], str(here[name])
            assert one == other or float(one) == float(other), name


def test_the_table_of_faster_whisper_names_flags_that_are_there() -> None:
    here = ours()
    named = {name: flag for name, (flag, _) in rows("Of faster-whisper").items() if flag != "not here"}
    assert set(named.values()) <= set(here)
    functions = [n for n in ast.walk(installed("faster_whisper", "transcribe.py")) if isinstance(n, ast.FunctionDef)]
    parameters = {argument.arg for f in functions if f.name in ("__init__", "transcribe") for argument in f.args.args}
    assert set(rows("Of faster-whisper")) <= parameters


def test_what_transcribe_each_gives_is_a_public_name() -> None:
    assert "Outcome" in whisper_moe.__all__ and whisper_moe.Outcome.__module__ == "whisper_moe.api"
