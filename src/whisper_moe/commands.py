"""What the commands do, once their flags are read; each returns the exit status.

Torch is imported only after everything that can be checked without it has been.
"""

from __future__ import annotations

import json
import re
import sys
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
from whisper_moe.generate.options import TranscribeOptions
from whisper_moe.generate.text import expand_formats
from whisper_moe.jobs import Job, Outputs, expand, give_up_output, named, readable, say, standard_output

if TYPE_CHECKING:
    from whisper_moe.api import WhisperMoE

_DTYPES = ("auto", "float32", "int8", "bfloat16", "float16")
_COMPUTE_TYPES = {"default": "auto"} | {f"int8_{dtype}": dtype for dtype in ("float32", "bfloat16", "float16")}
"""CTranslate2's names that are not ours too."""
P = ParamSpec("P")
_Progress: TypeAlias = "tuple[Callable[[float], None] | None, Callable[[], AbstractContextManager[None]]]"
"""What is told the seconds that are finished, and what takes the bar away for as long as something else is written."""


def _guarded(command: Callable[P, int]) -> Callable[P, int]:
    """A failure that a user can mend is one sentence and an exit status; anything else is a bug and shows itself."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return command(*args, **kwargs)
        except BrokenPipeError:  # the reader of our output has gone, as in `| head`
            give_up_output()
            return 0
        except (ValueError, ImportError, OSError) as error:
            say(f"whisper-moe: {sentence(error)}")
            return 2 if isinstance(error, UsageError) else 1

    return run


@_guarded
def transcribe(
    files: list[str] | None, model: str | None, model_dir: Path | None, output_format: str | None, output_dir: Path | None,
    skip_existing: bool, device: str, dtype: str, fp16: str, threads: int | None, verbose: str, **flags: Any,
) -> int:  # fmt: skip
    """Texts to standard output or to files, facts to standard error; 1 if any file failed."""
    with usage():
        options = transcribe_options(flags)
        spoken = (None if options.language == "auto" else options.language, *options.allowed_languages)
        check_languages(spoken, model, model_dir)
        talkative, half = truth("--verbose", verbose), truth("--fp16", fp16)
        formats = expand_formats((output_format or ("txt" if output_dir is None else "all")).split(","))
        jobs = named(expand(files))
        outputs = Outputs.checked(formats, output_dir, subtitle_options(flags), inputs=len(jobs))
        if skip_existing and output_dir is None:
            raise UsageError("--skip-existing goes by the files of a folder: add -o DIR")
        dtype = _checked_dtype(device, dtype)
    if half:
        dtype = _half_precision(device, dtype)
    if talkative and options.vad != flags["vad"]:
        say(f"--vad-filter True: --vad {options.vad}")
    asked = [job for job in jobs if not (skip_existing and outputs.has(job))]
    if skip_existing and talkative:
        say(f"{len(jobs) - len(asked)} of {len(jobs)} files have their transcripts in {output_dir} already")
    there = readable(asked)
    failed = len(asked) - len(there)
    if there:
        loaded = _load(model, model_dir, device, dtype, threads, talkative)
        with usage():
            require_languages(spoken, loaded, options.task)
        if talkative and not any(spoken) and options.language is None and loaded.stated_language:
            say(
                f"taken to be in {loaded.stated_language}, the language that the model states; --language auto detects it"
            )
        failed += _transcribe(loaded, there, outputs, options, talkative)
    if failed and len(asked) > 1:
        say(f"whisper-moe: {failed} of {len(asked)} files failed")
    return 1 if failed else 0


def _transcribe(
    loaded: WhisperMoE, jobs: Sequence[Job], outputs: Outputs, options: TranscribeOptions, talkative: bool
) -> int:
    """Each transcript is written as soon as it is there, on standard output in the order given; how many failed."""
    failed, heard, started = 0, 0.0, time.perf_counter()
    with _progress(talkative) as (progress, aside):
        sources, in_order = (job.source for job in jobs), outputs.directory is None
        for outcome in loaded.transcribe_each(sources, in_order=in_order, progress=progress, **vars(options)):
            with aside():
                heard += outcome.transcription.duration if outcome.transcription else 0.0
                failed += not outputs.deliver(outcome, jobs[outcome.index], talkative)
    if talkative:
        seconds = time.perf_counter() - started
        say(f"{heard:.1f} s of audio in {seconds:.1f} s: {heard / seconds:.1f} times real time")
    return failed


def _checked_dtype(device: str, dtype: str) -> str:
    """What the model is loaded with. CTranslate2's ``int8_float16`` is int8 on a CPU; on a GPU, what it has beside the int8."""
    if dtype not in (*_DTYPES, *_COMPUTE_TYPES):
        raise UsageError(f"--dtype must be one of {', '.join((*_DTYPES, *_COMPUTE_TYPES))}, got {dtype!r}")
    if not re.fullmatch(r"auto|[a-z]+(:\d+)?", device):
        raise UsageError(f"--device must be cpu, cuda, cuda:1, mps or auto, got {device!r}")
    if dtype == "int8" and device not in ("auto", "cpu"):
        raise UsageError(f"--dtype int8 runs on a CPU; on {device} take bfloat16 or float16")
    if dtype in _COMPUTE_TYPES:
        return "int8" if "_" in dtype and not _on_cuda(device) else _COMPUTE_TYPES[dtype]
    return dtype


def _on_cuda(device: str) -> bool:
    from torch import cuda

    return device.startswith("cuda") or (device == "auto" and cuda.is_available())


def _half_precision(device: str, dtype: str) -> str:
    """What ``whisper``'s ``--fp16 True`` comes to: half precision only on the GPUs where ``whisper`` has it."""
    if dtype == "auto" and _on_cuda(device):
        return "float16"
    say("whisper-moe: --fp16 True is ignored: it goes with an NVIDIA GPU and --dtype auto")
    return dtype


def _load(
    model: str | None, model_dir: Path | None, device: str, dtype: str, threads: int | None, talkative: bool
) -> WhisperMoE:
    started = time.perf_counter()
    from whisper_moe.api import WhisperMoE

    loaded = WhisperMoE.from_pretrained(
        model, device=device, dtype=dtype, threads=threads or None, model_dir=model_dir, announce=say  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
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


@_guarded
def detect_language(
    files: list[str], model: str | None, model_dir: Path | None, languages: str | None, track: str | None, device: str,
    dtype: str, threads: int | None,
) -> int:  # fmt: skip
    """One line a file: language, probability, file name."""
    with usage():
        allowed, jobs = names(languages), named(expand(files))
        check_languages(allowed, model, model_dir)
        TranscribeOptions(track=track)
        dtype = _checked_dtype(device, dtype)
    there = readable(jobs)
    if not there:
        return 1
    loaded, failed = _load(model, model_dir, device, dtype, threads, talkative=True), len(jobs) - len(there)
    with usage():
        require_languages(allowed, loaded)
    from whisper_moe.media.audio import MediaError

    for job in there:
        try:
            code, probability = next(iter(loaded.detect_language(job.source, languages=allowed, track=track).items()))
            with standard_output() as stream:
                stream.write(f"{code}\t{probability:.4f}\t{job.path}\n")
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
    from whisper_moe.weights.default import load_model
    from whisper_moe.weights.generation import stated_language
    from whisper_moe.weights.tokens import add_languages
    from whisper_moe.weights.upcycle import answer, read_back
    from whisper_moe.weights.upcycle import upcycle as upcycled

    whisper = load_model(source, base=base, announce=say)
    said = answer(whisper.config, whisper.state)
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
    if code := stated_language(new.generation, whisper.tokenizer):
        say(
            f"{whisper.name} states the language {code}: what is heard is taken for that, unless --language says otherwise"
        )
    for held in (whisper.state, state, new.state):  # a large one need not be there twice
        held.clear()
    difference = read_back(output, said)
    say(
        f"{output}: {whisper.name} with {experts} experts{spoken}, {size}; read back, logits differ by {difference:.2g}"
    )
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
    from whisper_moe.machine import usable_cores

    with usage():
        flags["dtype"] = _checked_dtype(flags["device"], flags["dtype"])
        asked = run.plan(model, data, threads=threads or usable_cores(), languages=names(languages), **flags)
    return run.evaluate(asked, _from_pretrained, say=say)


def _from_pretrained(model: str | None, **options: Any) -> WhisperMoE:
    """For processes that measure: torch is imported in those of this project's models, within their time, and in no peer's."""
    from whisper_moe.api import WhisperMoE

    return WhisperMoE.from_pretrained(model, **options)
