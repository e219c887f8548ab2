"""What the commands do, once their flags are read; each returns the exit status.

Torch is imported only after everything that can be checked without it has been.
"""

from __future__ import annotations

import glob
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeAlias

from whisper_moe.flags import (
    UsageError,
    check_languages,
    names,
    new_languages,
    numbers,
    require_languages,
    sentence,
    subtitle_options,
    transcribe_options,
    truth,
    usage,
)
from whisper_moe.generate.result import mean_gates
from whisper_moe.generate.text import SubtitleOptions, expand_formats, output_names, save, write

if TYPE_CHECKING:
    from whisper_moe.api import Outcome, WhisperMoE

SAMPLE = Path(__file__).parents[2] / "examples" / "sample.m4a"
"""What is transcribed when no file is named; it comes with a checkout."""
_DTYPES = ("auto", "float32", "int8", "bfloat16", "float16")
P = ParamSpec("P")
_Progress: TypeAlias = "tuple[Callable[[float], None] | None, Callable[[], AbstractContextManager[None]]]"
"""What is told the seconds that are finished, and what takes the bar away for as long as something else is written."""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _guarded(command: Callable[P, int]) -> Callable[P, int]:
    """A failure that a user can mend is one sentence and an exit status; anything else is a bug and shows itself."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return command(*args, **kwargs)
        except BrokenPipeError:  # the reader of our output has gone, as in `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except (ValueError, ImportError, OSError) as error:
            say(f"whisper-moe: {sentence(error)}")
            return 2 if isinstance(error, UsageError) else 1

    return run


@_guarded
def transcribe(
    files: list[str] | None, model: str | None, output_format: str | None, output_dir: Path | None, device: str,
    dtype: str, fp16: str, threads: int | None, verbose: str, **flags: Any,
) -> int:  # fmt: skip
    """Texts to standard output or to files, facts to standard error; 1 if any file failed."""
    with usage():
        options = transcribe_options(flags)
        spoken = (options.language, *options.allowed_languages)
        check_languages(spoken, model)
        subtitles = subtitle_options(flags)
        formats = expand_formats((output_format or ("txt" if output_dir is None else "all")).split(","))
        talkative, half = truth("--verbose", verbose), truth("--fp16", fp16)
        paths = _expand(files)
        if len(formats) > 1 and output_dir is None:
            raise UsageError("several formats need a folder to be written to: add -o DIR")
        _check_machine(device, dtype)
        _check_output(output_dir)
    if half:
        dtype = _half_precision(device, dtype)
    loaded = _load(model, device, dtype, threads, talkative)
    with usage():
        require_languages(spoken, loaded, options.task)
    outputs, failed, started = output_names(paths), 0, time.perf_counter()
    with _progress(talkative) as (progress, aside):
        outcomes = loaded.transcribe_each(map(_source, paths), progress=progress, **vars(options))
        heard = 0.0
        for path, name, outcome in zip(paths, outputs, outcomes, strict=True):
            with aside():
                heard += outcome.transcription.duration if outcome.transcription else 0.0
                name = name if outcome.error is None else _partial(name, outputs)
                if not _deliver(outcome, path, name, formats, output_dir, subtitles, several=len(paths) > 1):
                    failed += 1
                elif talkative:
                    say(_facts(outcome))
    if talkative:
        seconds = time.perf_counter() - started
        say(f"{heard:.1f} s of audio in {seconds:.1f} s: {heard / seconds:.1f} times real time")
    if failed and len(paths) > 1:
        say(f"whisper-moe: {failed} of {len(paths)} files failed")
    return 1 if failed else 0


def _expand(files: Sequence[str] | None) -> list[str]:
    """Files and globs as paths; a path that is there is never taken for a pattern. Missing files fail later, one by one."""
    if not files:
        if not SAMPLE.is_file():
            raise UsageError("name a file to transcribe: the bundled sample is only in a checkout of the project")
        return [str(SAMPLE)]
    if list(files).count("-") > 1:
        raise UsageError("standard input (-) can be read only once")
    found: list[str] = []
    for file in files:
        if file == "-" or os.path.exists(file) or not glob.has_magic(file):
            found.append(file)
            continue
        matches = sorted(glob.glob(file, recursive=True))
        if not matches:
            raise UsageError(f"no file matches {file!r}")
        found += matches
    return found


def _check_output(directory: Path | None) -> None:
    """The folder is made, and tried: a disk that refuses is better known before all the work than after it."""
    if directory is None:
        return
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"{directory}: is a file; -o needs a folder")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise UsageError(f"{directory}: cannot be written to: {error.strerror}") from error


def _check_machine(device: str, dtype: str) -> None:
    if dtype not in _DTYPES:
        raise UsageError(f"--dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    if not re.fullmatch(r"auto|[a-z]+(:\d+)?", device):
        raise UsageError(f"--device must be cpu, cuda, cuda:1, mps or auto, got {device!r}")
    if dtype == "int8" and device not in ("auto", "cpu"):
        raise UsageError(f"--dtype int8 runs on a CPU; on {device} take bfloat16 or float16")


def _half_precision(device: str, dtype: str) -> str:
    """What ``whisper``'s ``--fp16 True`` comes to: half precision only on the GPUs where ``whisper`` has it."""
    if dtype == "auto":
        from torch import cuda

        if device.startswith("cuda") or (device == "auto" and cuda.is_available()):
            return "float16"
    say("whisper-moe: --fp16 True is ignored: it goes with an NVIDIA GPU and --dtype auto")
    return dtype


def _source(path: str) -> Any:
    return sys.stdin.buffer if path == "-" else path


def _load(model: str | None, device: str, dtype: str, threads: int | None, talkative: bool) -> WhisperMoE:
    started = time.perf_counter()
    from whisper_moe.api import WhisperMoE

    loaded = WhisperMoE.from_pretrained(model, device=device, dtype=dtype, threads=threads or None, announce=say)  # pyright: ignore[reportArgumentType]
    if talkative:
        say(f"{loaded.name} on {loaded.device} ({loaded.dtype}), loaded in {time.perf_counter() - started:.1f} s")
    return loaded


@contextmanager
def _progress(talkative: bool) -> Iterator[_Progress]:
    """A bar of the seconds finished, where standard error is a terminal; how many there will be is not known before.

    Rich would redirect standard output to the terminal of the bar, even where it is a file: that is turned off.
    """
    if not talkative or not sys.stderr.isatty():
        yield None, nullcontext
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.completed:.0f} s of audio done"), TimeElapsedColumn())
    console = Console(stderr=True)
    bar = Progress(
        *columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False,
        disable=not console.is_interactive,
    )  # fmt: skip

    @contextmanager
    def aside() -> Iterator[None]:
        bar.stop()
        yield
        bar.start()

    with bar:
        task = bar.add_task("", total=None)
        yield lambda seconds: bar.advance(task, seconds), aside


def _deliver(
    outcome: Outcome, path: str, name: str, formats: Sequence[str], directory: Path | None, subtitles: SubtitleOptions,
    several: bool,
) -> bool:  # fmt: skip
    """Write one result; whether it is whole and could be written: what ails one file costs that file alone.

    Of a damaged file, what was said before the damage is written, to a file whose ``name`` says so.
    """
    result = outcome.transcription or outcome.partial
    if outcome.error is not None:
        say(f"whisper-moe: {outcome.error}")
    if result is None:
        return False
    try:
        if directory is not None:
            save(result, directory, name, formats, subtitles)
        else:
            if several:
                say(f"{path}:")
            write(result, formats[0], sys.stdout, subtitles)
            # The file of json has no end of line; on a terminal, and between two results, one is wanted.
            print(end="\n" if formats[0] == "json" else "", flush=True)
        if outcome.partial is not None:
            where = f"in {directory / name}.*" if directory is not None else "on standard output"
            say(f"{path}: what was said before, up to {outcome.partial.duration:.1f} s, is {where}")
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as error:
        say(f"whisper-moe: {path}: {sentence(error)}")
        return False
    return outcome.error is None


def _partial(name: str, names: Sequence[str]) -> str:
    """What the part of a transcript is called; no name of a whole one."""
    name += ".partial"
    while name in names:
        name += ".partial"
    return name


def _facts(outcome: Outcome) -> str:
    """What the model decided about one file: language, experts with their mean gates, and how often it tried again."""
    result = outcome.transcription
    assert result is not None
    spoken = ", ".join(dict.fromkeys(segment.language or "?" for segment in result.segments)) or "no speech"
    facts = [f"{outcome.name}: {result.duration:.1f} s, {spoken}"]
    experts = sorted(mean_gates(result.segments), key=lambda item: -item[1])
    if experts:
        facts.append("experts " + ", ".join(f"{name} {gate:.2f}" for name, gate in experts))
    if result.fallbacks:
        facts.append(f"{result.fallbacks} of its windows decoded again")
    return "; ".join(facts)


@_guarded
def detect_language(
    files: list[str], model: str | None, languages: str | None, device: str, dtype: str, threads: int | None
) -> int:
    """One line a file: language, probability, file name."""
    with usage():
        allowed, paths = names(languages), _expand(files)
        check_languages(allowed, model)
        _check_machine(device, dtype)
    loaded, failed = _load(model, device, dtype, threads, talkative=True), 0
    with usage():
        require_languages(allowed, loaded)
    from whisper_moe.media.audio import MediaError

    for path in paths:
        try:
            code, probability = next(iter(loaded.detect_language(_source(path), languages=allowed).items()))
            print(f"{code}\t{probability:.4f}\t{path}", flush=True)
        except MediaError as error:
            say(f"whisper-moe: {error}")
            failed += 1
    return 1 if failed else 0


@_guarded
def upcycle(
    source: str, output: Path, experts: int, expert_dim: int | None, top_k: int, shared: bool,
    scope: Literal["segment", "token"], router_layer: int, ttt_layers: str | None, base: str | None, quantize: bool,
    overwrite: bool, seed: int, add_language: list[str] | None = None,
) -> int:  # fmt: skip
    """Write a whisper-moe directory that computes what ``source`` computes, with tokens for languages that it lacks."""
    from whisper_moe.config import MoEConfig, TTTConfig

    if output.exists() and not overwrite:
        raise UsageError(f"{output}: exists already; --overwrite replaces it")
    with usage():
        languages = new_languages(add_language)
        default = "3" if experts else ""
        layers = numbers("--ttt-layers", default if ttt_layers is None else ttt_layers)
        ttt = TTTConfig(encoder_layers=layers) if layers else None
        moe = MoEConfig(
            n_experts=experts, expert_dim=expert_dim or 256, top_k=top_k, shared=shared, none_choice=shared, scope=scope,
            router_layer=router_layer,
        ) if experts else None  # fmt: skip
    from whisper_moe.weights.checkpoint import save_checkpoint
    from whisper_moe.weights.sources import load_whisper
    from whisper_moe.weights.tokens import add_languages
    from whisper_moe.weights.upcycle import upcycle as upcycled

    whisper = load_whisper(source, base=base, announce=say)
    if moe is not None and not shared and expert_dim is None:
        moe = moe.model_copy(update={"expert_dim": whisper.config.encoder_ffn_dim})
    config, state = upcycled(whisper.config, whisper.state, moe=moe, ttt=ttt, seed=seed)
    with usage():
        new = add_languages(config, state, whisper.generation, whisper.tokenizer_files, languages)
    save_checkpoint(
        output, new.config, new.state, generation=new.generation, tokenizer_files=new.tokenizer_files,
        quantize=quantize, overwrite=overwrite,
    )  # fmt: skip
    size = f"{sum(tensor.numel() for tensor in new.state.values()) / 1e6:.1f} M parameters"
    spoken = "".join(f", {language.name} ({language.code})" for language in languages)
    say(f"{output}: {whisper.name} with {experts} experts{spoken}, {size}")
    return 0


@_guarded
def export(model: str, output: Path, to: str) -> int:
    """Write a dense model in another program's layout."""
    if to != "whisper":
        raise UsageError(f"--to must be whisper, got {to!r}")
    if output.exists():
        raise UsageError(f"{output}: exists already")
    from whisper_moe.weights.default import load_model
    from whisper_moe.weights.export import save_whisper

    loaded = load_model(model, announce=say)
    save_whisper(
        output, loaded.config, loaded.state, generation=loaded.generation, tokenizer_files=loaded.tokenizer_files
    )
    say(f"{output}: written")
    return 0


@_guarded
def info(model: str | None, as_json: bool) -> int:
    """Parameters, bytes, FLOPs and experts, as a table or as JSON."""
    from whisper_moe.evaluate.cost import facts_of, table

    facts = facts_of(model)
    print(json.dumps(facts, indent=2) if as_json else table(facts))
    return 0


@_guarded
def evaluate(model: str, data: list[str], threads: int | None, languages: str | None, **flags: Any) -> int:
    """Figures of a model and of what it is compared with; 1 if a file, a clip or a system failed."""
    from whisper_moe.evaluate import run

    with usage():
        _check_machine(flags["device"], flags["dtype"])
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        asked = run.plan(model, data, threads=threads or usable or 1, languages=names(languages), **flags)
    return run.evaluate(asked, _from_pretrained, say=say)


def _from_pretrained(model: str | None, **options: Any) -> WhisperMoE:
    """For processes that measure: torch is imported in those of this project's models, within their time, and in no peer's."""
    from whisper_moe.api import WhisperMoE

    return WhisperMoE.from_pretrained(model, **options)
