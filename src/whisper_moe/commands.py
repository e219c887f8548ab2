"""What the commands do, once their flags are read; each returns the exit status.

Torch is imported only after everything that can be checked without it has been.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from whisper_moe.config import EMBEDDED, MoEConfig, TTTConfig, model_folder
from whisper_moe.generate.options import SubtitleOptions, TranscribeOptions
from whisper_moe.jobs import (
    Job,
    Outputs,
    UsageError,
    expand,
    load,
    named,
    progress_bar,
    put,
    readable,
    sentence,
    try_aloud,
    usage,
)
from whisper_moe.machine import check_arithmetic, pick_device, usable_cores
from whisper_moe.media.languages import NewLanguage, language_code, spoken_code
from whisper_moe.weights.files import read_json

if TYPE_CHECKING:
    from whisper_moe.api import WhisperMoE
    from whisper_moe.generate.result import Outcome

logger = logging.getLogger(__name__)


def transcribe(flags: SimpleNamespace) -> int:
    """Texts to standard output or to files, facts to standard error; 1 if any file failed."""
    if not flags.verbose:
        logging.getLogger("whisper_moe").setLevel(logging.WARNING)
    with usage():
        options, subtitles = _options(flags)
        spoken = [name for name in (options.language,) if name and name.lower() != "auto"]
        languages = [*spoken, *options.allowed_languages]
        _check_languages(languages, flags)
        jobs = named(expand(flags.files))
        outputs = Outputs(flags.output_format, flags.output_dir, subtitles, len(jobs), flags.show_routing)
        if flags.skip_existing and flags.output_dir is None:
            raise UsageError("--skip-existing goes by the files of a folder: add -o DIR")
        check_arithmetic(flags.device, flags.dtype)
        if flags.speak:
            try_aloud(flags.speak, jobs)
    if flags.fp16:
        _take_half_precision(flags)
    asked = [job for job in jobs if not (flags.skip_existing and outputs.has(job))]
    if flags.skip_existing:
        done = len(jobs) - len(asked)
        logger.info("%d of %d files have their transcripts in %s already", done, len(jobs), flags.output_dir)
    there = readable(asked)
    failed = len(asked) - len(there)
    if there:
        loaded = load(flags, languages, options.task, lazy=flags.lazy)
        failed += _transcribe(loaded, there, outputs, options, flags.speak)
    if failed and len(asked) > 1:
        logger.error("whisper-moe: %d of %d files failed", failed, len(asked))
    return int(failed > 0)


def _options(flags: SimpleNamespace) -> tuple[TranscribeOptions, SubtitleOptions]:
    """Languages are still names, as far as only the model can tell what they stand for."""
    first, step = flags.temperature, flags.temperature_increment_on_fallback or 0.0
    count = int((1.0 - first + 1e-6) / step) + 1 if step > 0 and first <= 1 else 1
    if flags.vad_filter and flags.vad == "none":  # faster-whisper's flag, whose detector is silero
        flags.vad = "silero" if find_spec("silero_vad") and find_spec("onnxruntime") else "energy"
        logger.info("--vad-filter True: --vad %s", flags.vad)
    given = vars(flags) | {
        "beam_size": flags.beam_size or 1,
        "best_of": flags.best_of or 1,
        "patience": 1.0 if flags.patience is None else flags.patience,
        "allowed_languages": _names(flags.languages),
        "experts": _names(flags.experts),
        "exclude": _names(flags.exclude),
        "temperatures": tuple(round(first + i * step, 6) for i in range(count)),
        "timestamps": not flags.without_timestamps,
    }
    subtitles = SubtitleOptions(**{field.name: given[field.name] for field in fields(SubtitleOptions)})
    if subtitles != SubtitleOptions() and not flags.word_timestamps:
        raise UsageError("--highlight-words and the --max-… options need --word-timestamps True")
    known = {field.name for field in fields(TranscribeOptions)}
    return TranscribeOptions(**{name: value for name, value in given.items() if name in known}), subtitles


def _names(languages: str | None) -> tuple[str, ...]:
    """``hi,ta,en`` as its parts."""
    return tuple(name.strip() for name in languages.split(",")) if languages else ()


def _transcribe(
    loaded: WhisperMoE, jobs: list[Job], outputs: Outputs, options: TranscribeOptions, aloud: Path | None
) -> int:
    """Each transcript is written as soon as it is there, on standard output in the order given; how many failed.

    ``aloud``: the folder of what is also read aloud.
    """
    if aloud is not None:
        _ = loaded.speaker  # says now, not after the first file, if it does not speak
    if loaded.stated_language and options.language is None and not options.allowed_languages:
        said = "taken to be in %s, the language that the model states; --language auto detects it"
        logger.info(said, loaded.stated_language)
    failed, heard, started = 0, 0.0, time.perf_counter()
    with progress_bar() as bar:
        task = bar.add_task("", total=None)
        sources, in_order = (job.source for job in jobs), outputs.directory is None
        progress = lambda seconds: bar.advance(task, seconds)  # noqa: E731
        for outcome in loaded.transcribe_each(sources, options, in_order=in_order, progress=progress):
            bar.stop()
            heard += outcome.transcription.duration if outcome.transcription else 0.0
            job = jobs[outcome.index]
            there = outputs.deliver(outcome, job)
            failed += not (there and (aloud is None or _read_aloud(loaded, outcome, job.aloud(aloud), options)))
            bar.start()
    seconds = time.perf_counter() - started
    logger.info("%.1f s of audio in %.1f s: %.1f times real time", heard, seconds, heard / seconds)
    return failed


def _read_aloud(loaded: WhisperMoE, outcome: Outcome, path: Path, options: TranscribeOptions) -> bool:
    """Whether all that was said could be."""
    heard = outcome.transcription
    if heard is None or not heard.text.strip():
        return True
    try:
        loaded.speak(heard.text, language="en" if options.task == "translate" else heard.language).save(path)
    except (ValueError, OSError) as error:
        logger.error("whisper-moe: %s: not read aloud: %s", path, sentence(error))
        return False
    return True


def _take_half_precision(flags: SimpleNamespace) -> None:
    """What ``whisper``'s ``--fp16 True`` comes to: half precision only on the GPUs where ``whisper`` has it."""
    if flags.dtype in ("auto", "default") and pick_device(flags.device).startswith("cuda"):
        flags.dtype = "float16"
    else:
        logger.warning("whisper-moe: --fp16 True is ignored: it goes with an NVIDIA GPU and --dtype auto")


def _check_languages(names: Sequence[str], flags: SimpleNamespace) -> None:
    """Refuse a language that nobody knows, or that the model in a folder has not, before anything is loaded.

    Where that cannot be told (of a model on the Hub, or an adapter, whose base has the tokens), the loaded model is asked.
    """
    folder = EMBEDDED if flags.model is None else model_folder(Path(flags.model).expanduser())
    tokenizer, generation = folder / "tokenizer.json", folder / "generation_config.json"
    whole = tokenizer.is_file() and (folder / "config.json").is_file()
    known = not folder.is_dir() and flags.model is not None and (folder.exists() or "/" not in flags.model)
    for name in names if not flags.model_dir else ():
        if known:  # turbo, or a .pt file: Whisper's own languages
            language_code(name)
        # To look for the token costs nothing; only where it is not, the tokenizer is read, which says what there is.
        elif whole and f'"<|{spoken_code(name)}|>"'.encode() not in tokenizer.read_bytes():
            from whisper_moe.media.tokenizer import Tokenizer

            said = read_json(generation) if generation.is_file() else None
            Tokenizer.from_file(tokenizer, said).sot_sequence(name)


def detect_language(flags: SimpleNamespace) -> int:
    """One line a file: language, probability, file name."""
    with usage():
        allowed, jobs = _names(flags.languages), named(expand(flags.files))
        _check_languages(allowed, flags)
        TranscribeOptions(track=flags.track)
        check_arithmetic(flags.device, flags.dtype)
    there = readable(jobs)
    if not there:
        return 1
    loaded, failed = load(flags, allowed), len(jobs) - len(there)
    from whisper_moe.media.audio import MediaError

    for job in there:
        try:
            found = loaded.detect_language(job.source, languages=allowed, track=flags.track)
            code, probability = next(iter(found.items()))
            put(f"{code}\t{probability:.4f}\t{job.path}\n")
        except MediaError as error:
            logger.error("whisper-moe: %s", error)
            failed += 1
    return int(failed > 0)


def upcycle(flags: SimpleNamespace) -> int:
    """Write a whisper-moe directory that computes what ``source`` computes, with tokens for languages that it lacks."""
    if flags.output.exists() and not flags.overwrite:
        raise UsageError(f"{flags.output}: exists already; --overwrite replaces it")
    with usage():
        languages, moe, ttt = _new_parts(flags)
    from whisper_moe.weights.checkpoint import load_checkpoint, save_checkpoint
    from whisper_moe.weights.load import load_model
    from whisper_moe.weights.tokens import stated_language
    from whisper_moe.weights.upcycle import add_languages, upcycle

    whisper = load_model(flags.source, base=flags.base, aside=True)
    if moe is not None and not flags.shared and flags.expert_dim is None:
        moe = moe.model_copy(update={"expert_dim": whisper.config.encoder_ffn_dim})
    config, state = upcycle(whisper.config, whisper.state, moe=moe, ttt=ttt, seed=flags.seed)
    with usage():
        new = add_languages(replace(whisper, config=config, state=state), languages)
    save_checkpoint(flags.output, new, quantize=flags.quantize, overwrite=flags.overwrite)
    size = sum(tensor.numel() for tensor in new.state.values()) / 1e6
    spoken = "".join(f", {language.name} ({language.code})" for language in languages)
    if code := stated_language(new.generation, new.tokenizer):
        text = "%s states the language %s: what is heard is taken for that, unless --language says otherwise"
        logger.info(text, whisper.name, code)
    for held in (whisper.state, state, new.state):  # a large one need not be there twice
        held.clear()
    load_checkpoint(flags.output)  # whole, as its checksums say, before it is called done
    text = "%s: %s with %d experts%s, %.1f M parameters"
    logger.info(text, flags.output, whisper.name, flags.experts, spoken, size)
    return 0


def _new_parts(flags: SimpleNamespace) -> tuple[list[NewLanguage], MoEConfig | None, TTTConfig | None]:
    languages = [NewLanguage.parse(text) for text in flags.add_language or ()]
    codes = [language.code for language in languages]
    if len(set(codes)) < len(codes):
        raise UsageError(f"--add-language gives a language twice: {', '.join(codes)}")
    default = (3,) if flags.experts else ()
    layers = default if flags.ttt_layers is None else flags.ttt_layers
    ttt = TTTConfig(encoder_layers=layers) if layers else None
    if not flags.experts:
        return languages, None, ttt
    given = {name: getattr(flags, name) for name in ("top_k", "shared", "scope", "router_layer")}
    wide = flags.expert_dim or MoEConfig().expert_dim
    return languages, MoEConfig(n_experts=flags.experts, expert_dim=wide, none_choice=flags.shared, **given), ttt


def export(flags: SimpleNamespace) -> int:
    """Write a dense model in another program's layout."""
    if flags.to != "whisper":
        raise UsageError(f"--to must be whisper, got {flags.to!r}")
    if flags.output.exists():
        raise UsageError(f"{flags.output}: exists already")
    from whisper_moe.weights.load import load_model
    from whisper_moe.weights.whisper import save_whisper

    save_whisper(flags.output, load_model(flags.model))
    logger.info("%s: written", flags.output)
    return 0


def info(flags: SimpleNamespace) -> int:
    """Parameters, bytes, FLOPs and experts, as a table or as JSON."""
    from whisper_moe.evaluate.cost import facts_of, table

    facts = facts_of(flags.model)
    print(json.dumps(facts, indent=2) if flags.json else table(facts))
    return 0


def evaluate(flags: SimpleNamespace) -> int:
    """Figures of a model and of what it is compared with; 1 if a file, a clip or a system failed."""
    from whisper_moe.evaluate import run

    with usage():
        check_arithmetic(flags.device, flags.dtype)
        given = vars(flags) | {"threads": flags.threads or usable_cores(), "languages": _names(flags.languages)}
        renamed = {"output_dir": "output", "detect_language": "detect", "beam_size": "beam", "context_margin": "margin"}
        given = {renamed.get(name, name): value for name, value in given.items()}
        plan = run.plan(**given)
    return run.evaluate(plan, _from_pretrained)


def _from_pretrained(model: str | None, **options: Any) -> WhisperMoE:
    """For processes that measure: torch is imported there, within their time."""
    from whisper_moe.api import WhisperMoE

    return WhisperMoE.from_pretrained(model, **options)


def merge(flags: SimpleNamespace) -> int:
    if flags.output.exists() and not flags.overwrite:
        raise UsageError(f"{flags.output}: exists already; --overwrite replaces it")
    from whisper_moe.merge import run

    given: dict[str, Any] = vars(flags) | {"probe": flags.probe or (), "none": flags.none or ()}
    clips = run.merge(**given)
    from whisper_moe.api import WhisperMoE

    model = WhisperMoE.from_pretrained(flags.output)
    for name, said in zip(clips, model.transcribe(list(clips.values())), strict=True):
        chosen = ", ".join(f"{expert} {gate:.2f}" for s in said.segments[:1] for expert, gate in s.experts)
        logger.info("%s → %s: %s", name, chosen or "nothing said", said.text)
    return 0
