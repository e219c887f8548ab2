"""The command line: which words it takes, what they ask for, and that mistakes are said before anything is loaded."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from commandline import SAMPLE, Run
from typer.main import get_command

from whisper_moe import MediaError, Outcome, TranscribeOptions, WhisperMoE, cli, commands

ROOT = Path(__file__).parent.parent


class Seen(dict[str, Any]):
    """With which options a model is loaded and asked."""

    said = ""
    """On standard error."""


Asked = Callable[..., Seen]
NO_MODEL = ["--model", "no such model"]
"""Whoever gets as far as loading it is told so, with status 1."""


@pytest.fixture
def asked(run: Run, monkeypatch: pytest.MonkeyPatch) -> Asked:
    """With which options a model is loaded and asked, given these flags."""

    def call(*flags: str) -> Seen:
        seen = Seen()

        def transcribe_each(audio: Iterable[str], options: TranscribeOptions, **_: Any) -> list[Outcome]:
            seen.update(vars(options))
            return [Outcome(path, None, MediaError(path, "not heard")) for path in audio]

        def load(model: str | None, **options: Any) -> SimpleNamespace:
            seen.update(options)
            tokenizer = SimpleNamespace(sot_sequence=lambda *_: ())
            facts = {"name": "", "device": "", "dtype": "", "stated_language": None, "tokenizer": tokenizer}
            return SimpleNamespace(transcribe_each=transcribe_each, **facts)

        monkeypatch.setattr(WhisperMoE, "from_pretrained", load)
        done = run("transcribe", SAMPLE, *flags)
        assert done.status == 1
        seen.said = done.err
        return seen

    return call


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--task sing", "task: Input should be 'transcribe' or 'translate', got 'sing'"),
        ("--language klingon", "unknown language 'klingon'"),
        ("--languages en,klingon", "unknown language 'klingon'"),
        ("--languages en,,hi", "unknown language ''"),
        ("-f docx", "unknown output format 'docx': one of txt,"),
        ("-f srt,json", "add -o DIR"),
        (f"-o {SAMPLE}", "is a file; -o needs a folder"),
        ("--compute_type int16", "dtype must be one of auto, "),
        ("--dtype int8 --device cuda", "dtype int8 runs on a CPU; on cuda take"),
        ("--device a-toaster", "device must be cpu, cuda"),
        ("--threads -1", "'--threads': -1 is less than 0"),
        ("--beam-size 0", "'--beam-size': 0 is less than 1"),
        ("--condition_on_previous_text yes", "'yes' is not True or False"),
        ("--clip_timestamps=5,2", "clip_timestamps: must be ascending seconds, start,end,start,end …, got 5,2"),
        ("--hallucination_silence_threshold 2", "hallucination_silence_threshold needs word_timestamps"),
        ("--patience 0", "patience: Input should be greater than 0, got 0.0"),
        ("--temperature -1", "--temperature"),
        ("--suppress-tokens 1,two", "'1,two' is not numbers with commas between"),
        ("--suppress_tokens=-2", "suppress_tokens.0: Input should be greater than or equal to -1, got -2"),
        ("--track=-1", "track: must be a number from 0 or a language, got '-1'"),
        ("--max-line-width 20", "need --word-timestamps True"),
        ("- -", "standard input (-) can be read only once"),
        ("--skip-existing", "--skip-existing goes by the files of a folder: add -o DIR"),
        (f"{SAMPLE} gone.wav -f tsv", "3 files would be one broken tsv on standard output: add -o DIR"),
        ("--no-such-flag", "No such option: --no-such-flag"),
    ],
)
def test_a_flag_that_cannot_work_is_said_in_one_sentence(run: Run, flags: str, said: str) -> None:
    done = run("transcribe", SAMPLE, *NO_MODEL, *flags.split(" "))
    assert (done.status, done.out, len(done.err.splitlines())) == (2, "", 1)
    assert done.err.startswith("whisper-moe") and said in done.err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("sing", "No such command 'sing'"),
        ("detect-language", "files"),
        ("detect-language a.wav --track=-1", "track: must be a number from 0 or a language"),
        ("upcycle source", "--output"),
        (f"upcycle source -o {ROOT}", "exists already; --overwrite replaces it"),
        ("upcycle source -o new --top-k 9", "top_k (9) is greater than n_experts (8)"),
        ("upcycle source -o new --ttt-layers 1,b", "'--ttt-layers': '1,b' is not numbers"),
        ("upcycle source -o new --add-language or=odia:bn", "a new language is given as or, or=odia or"),
        ("upcycle source -o new --add-language or=hindi", "'hindi' cannot be the name of the language"),
        ("upcycle s -o new --add-language or --add-language or", "--add-language gives a language twice: or, or"),
        (f"export source -o {ROOT}", "exists already"),
        ("export source -o new --to tape", "--to must be whisper, got 'tape'"),
    ],
)
def test_other_commands_are_as_strict(run: Run, line: str, said: str) -> None:
    done = run(*line.split(" "))
    assert (done.status, done.out, len(done.err.splitlines())) == (2, "", 1)
    assert said in done.err and "pydantic" not in done.err


@pytest.mark.parametrize("flags", [["--device", "toaster"], ["--device", "cuda:99"], []], ids=" ".join)
def test_what_only_this_machine_can_tell_is_one_sentence_too(run: Run, flags: list[str]) -> None:
    done = run("transcribe", SAMPLE, *NO_MODEL, *flags)
    assert (done.status, done.out, len(done.err.splitlines())) == (1, "", 1)
    assert ("no such model" in done.err) == (not flags)


def contexts(command: Any, parent: Any = None) -> Iterator[tuple[Any, Any]]:
    """Every command, and the context in which its flags are read."""
    context = command.make_context(command.name, [], parent=parent, resilient_parsing=True)
    yield command, context
    for inner in getattr(command, "commands", {}).values():
        yield from contexts(inner, context)


def test_whispers_spellings_with_underscores_mean_the_same() -> None:
    """Every long flag with a dash in it, of every command."""
    read = set[str]()
    for command, context in contexts(get_command(cli.app)):
        for option in (each for each in command.params if each.param_type_name == "option"):
            flags = {flag for flag in [*option.opts, *option.secondary_opts] if len(flag) > 2}
            assert all(flag.startswith("--") and "/" not in flag for flag in flags), command.name
            for flag in flags:
                words = [f"--{flag[2:].replace('-', '_')}", "1"]
                assert command.make_parser(context).parse_args(words)[2][:1] == [option], (command.name, flag)
            read |= flags
    assert {"--beam-size", "--no-shared", "--detect-language", "--compute-type"} <= read


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


def test_a_flag_sets_its_option_and_no_other(asked: Asked) -> None:
    usual, plain = asked(), vars(TranscribeOptions(clip_timestamps=(0.0,)))
    assert {name: usual[name] for name in plain} == plain and usual["threads"] is None
    for flags, changed in (
        ("--condition_on_previous_text True", {"condition_on_previous_text": True}),
        ("--carry_initial_prompt True", {"carry_initial_prompt": True}),
        ("--clip_timestamps 0,5.5,10", {"clip_timestamps": (0.0, 5.5, 10.0)}),
        (
            "--word_timestamps True --hallucination_silence_threshold 2",
            {"word_timestamps": True, "hallucination_silence_threshold": 2.0},
        ),
        ("--prepend_punctuations <", {"prepend_punctuations": "<"}),
        ("--append_punctuations >", {"append_punctuations": ">"}),
        ("--detect-language-once", {"detect_language_once": True}),
        ("--languages hi,en", {"allowed_languages": ("hi", "en")}),
        ("--temperature 0.6", {"temperatures": (0.6, 0.8, 1.0)}),
        ("--suppress_tokens=-1,7", {"suppress_tokens": (-1, 7)}),
        ("--without-timestamps", {"timestamps": False}),
        ("--threads 0", {}),
        ("--max_line_width None --max_line_count None --max_words_per_line None", {}),
    ):
        assert asked(*flags.split()) == usual | changed, flags


@pytest.mark.parametrize(
    ("flags", "gpu", "dtype"),
    [
        ("--fp16 True", True, "float16"),
        ("--fp16 True", False, "auto"),
        ("--fp16 True --device cpu", True, "auto"),
        ("--fp16 True --dtype bfloat16", True, "bfloat16"),
        ("--fp16 False", True, "auto"),
        ("--compute_type int8_float16", True, "int8_float16"),
        ("--compute-type default", True, "default"),
    ],
)
def test_fp16_is_half_precision_on_a_gpu_and_says_where_it_is_ignored(
    asked: Asked, monkeypatch: pytest.MonkeyPatch, flags: str, gpu: bool, dtype: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    seen = asked(*flags.split(), "--verbose", "False")
    assert seen["dtype"] == dtype
    assert seen.said.count("--fp16 True is ignored") == ("True" in flags and dtype != "float16")


@pytest.mark.parametrize(
    ("flags", "installed", "vad"),
    [
        ("--vad_filter True", True, "silero"),
        ("--vad_filter true", False, "energy"),
        ("--vad_filter False", True, "none"),
        ("--vad_filter True --vad energy", True, "energy"),
        ("--vad-filter False --vad energy", True, "energy"),
    ],
)
def test_vad_filter_is_the_best_detector_that_is_installed_and_says_which(
    asked: Asked, monkeypatch: pytest.MonkeyPatch, flags: str, installed: bool, vad: str
) -> None:
    monkeypatch.setattr("whisper_moe.commands.find_spec", lambda name: installed or None)
    seen = asked(*flags.split())
    assert seen["vad"] == vad
    assert seen.said.count(f"--vad-filter True: --vad {vad}\n") == (vad != "none" and "--vad " not in flags)


def test_words_that_are_no_options_of_the_model_arrive_too(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A shell leaves ``~`` behind ``=`` alone, as bash does; a flag of two names has underscores in both."""
    seen: dict[str, Any] = {}
    for name in ("transcribe", "upcycle", "evaluate"):
        monkeypatch.setattr(commands, name, lambda flags: seen.update(vars(flags)) or 0)
    monkeypatch.setattr("whisper_moe.data.inspect.run", lambda **flags: seen.update(flags))
    monkeypatch.setenv("HOME", str(tmp_path))
    for line, expected in (
        ("transcribe a --output-dir=~/x", {"files": ["a"], "output_dir": tmp_path / "x"}),
        ("transcribe --model_dir=~/m --initial-prompt=~/x", {"model_dir": tmp_path / "m", "initial_prompt": "~/x"}),
        ("data inspect x --path=~/v", {"path": "~/v", "sources": ["x"], "limit": None}),
        ("upcycle _mymodel -o new", {"shared": True, "source": "_mymodel", "output": Path("new"), "experts": 8}),
        ("upcycle a -o new --no_shared --ttt-layers=", {"shared": False, "ttt_layers": ()}),
        ("upcycle a -o new --no-shared --ttt-layers 1,2", {"shared": False, "ttt_layers": (1, 2)}),
        ("upcycle a -o new --shared --add-language a --add-language b", {"shared": True, "add_language": ["a", "b"]}),
        ("evaluate m d e --no_fallback --limit 3", {"fallback": False, "data": ["d", "e"], "limit": 3}),
    ):
        assert run(*line.split()).status == 0
        assert expected.items() <= seen.items(), line


def test_stopping_it_by_hand_has_its_own_status(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(flags: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "transcribe", stop)
    assert run("transcribe", SAMPLE).status == 130


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
    """Every spelling of an option of ``transcribe``, with hyphens or underscores → its default."""
    command: Any = get_command(cli.app)
    options = command.commands["transcribe"].params
    named = {name: option.default for option in options for name in option.opts if name.startswith("--")}
    return named | {f"--{name[2:].replace('-', '_')}": default for name, default in named.items()}


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
