"""What flags ask for: words to numbers, truths, options, languages. Nothing here imports torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from whisper_moe.config import EMBEDDED, model_folder, problems
from whisper_moe.generate.options import TranscribeOptions
from whisper_moe.generate.text import SubtitleOptions
from whisper_moe.media.languages import NewLanguage, language_code, stated_languages

if TYPE_CHECKING:
    from whisper_moe.api import WhisperMoE


class UsageError(ValueError):
    """Flags or paths that cannot work; exit status 2."""


def sentence(error: Exception) -> str:
    """What an error says, on one line; of pydantic's only what is wrong with which field, of the system's with which file."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    return problems(error) if isinstance(error, ValidationError) else " ".join(str(error).split())


@contextmanager
def usage() -> Iterator[None]:
    """Errors in here are the flags' fault."""
    try:
        yield
    except ValueError as error:
        raise UsageError(sentence(error)) from error


def transcribe_options(flags: dict[str, Any]) -> TranscribeOptions:
    """The options; languages are still names, as far as only the model can tell what they stand for."""
    increment, first = flags["temperature_increment_on_fallback"] or 0.0, flags["temperature"]
    count = int((1.0 - first + 1e-6) / increment) + 1 if increment > 0 and first <= 1 else 1
    plain = {name: flags[name] for name in (
        "task", "length_penalty", "initial_prompt", "hotwords", "track", "carry_ttt",
        "compression_ratio_threshold", "logprob_threshold", "no_speech_threshold", "detect_language_once",
        "prepend_punctuations", "append_punctuations", "hallucination_silence_threshold",
    )}  # fmt: skip
    return TranscribeOptions(
        **plain, vad=_vad(flags), beam_size=flags["beam_size"] or 1, best_of=flags["best_of"] or 1,
        patience=1.0 if flags["patience"] is None else flags["patience"],
        language="auto" if (flags["language"] or "").lower() == "auto" else flags["language"],
        allowed_languages=names(flags["languages"]),
        temperatures=tuple(round(first + i * increment, 6) for i in range(count)),
        suppress_tokens=numbers("--suppress-tokens", flags["suppress_tokens"]),
        timestamps=not flags["without_timestamps"], context_margin=flags["context_margin"], window=flags["window"],
        word_timestamps=truth("--word-timestamps", flags["word_timestamps"]),
        condition_on_previous_text=truth("--condition-on-previous-text", flags["condition_on_previous_text"]),
        carry_initial_prompt=truth("--carry-initial-prompt", flags["carry_initial_prompt"]),
        clip_timestamps=flags["clip_timestamps"],
    )  # fmt: skip


def _vad(flags: dict[str, Any]) -> Any:
    """``--vad``; faster-whisper's ``--vad_filter True`` is the detector that it has, or ours where that is not installed."""
    if not truth("--vad-filter", flags["vad_filter"]) or flags["vad"] != "none":
        return flags["vad"]
    return "silero" if find_spec("silero_vad") and find_spec("onnxruntime") else "energy"


def subtitle_options(flags: dict[str, Any]) -> SubtitleOptions:
    options = SubtitleOptions(
        highlight_words=truth("--highlight-words", flags["highlight_words"]), max_line_width=flags["max_line_width"],
        max_line_count=flags["max_line_count"], max_words_per_line=flags["max_words_per_line"],
    )  # fmt: skip
    if options != SubtitleOptions() and not truth("--word-timestamps", flags["word_timestamps"]):
        raise UsageError("--highlight-words and the --max-… options need --word-timestamps True")
    return options


def numbers(name: str, value: str | None) -> tuple[int, ...] | None:
    if value is None:
        return None
    try:
        return tuple(int(number) for number in value.split(",") if number.strip())
    except ValueError:
        raise UsageError(f"{name} must be numbers with commas between them, got {value!r}") from None


def truth(name: str, value: str) -> bool:
    """``whisper``'s booleans are the words True and False."""
    if value.lower() not in ("true", "false"):
        raise UsageError(f"{name} must be True or False, got {value!r}")
    return value.lower() == "true"


def names(languages: str | None) -> tuple[str, ...]:
    """``hi,ta,en`` as its parts."""
    return tuple(name.strip() for name in languages.split(",")) if languages else ()


def check_languages(languages: Iterable[str | None], model: str | None, model_dir: Path | None) -> None:
    """Refuse a language that nobody knows, or the model in a folder has not, before anything is loaded.

    A fine-tune may have languages of its own. They are read from its folder; where that cannot be done (a model on the Hub), the
    loaded model is asked: :func:`require_languages`.
    """
    for name in filter(None, languages):
        added = _added_languages(model) if model_dir is None else None
        try:
            code = language_code(name, added or (), added)
        except ValueError:
            if added is not None:
                raise
        else:
            if added is not None:
                _require_token(code, _folder(model))


def _require_token(code: str, folder: Path) -> None:
    """To look for the token costs nothing; only where it is not, the tokenizer is read, which says what there is."""
    file, generation = folder / "tokenizer.json", folder / "generation_config.json"
    if file.is_file() and f'"<|{code}|>"'.encode() not in file.read_bytes():
        from whisper_moe.media.tokenizer import Tokenizer

        said = json.loads(generation.read_bytes()) if generation.is_file() else None
        Tokenizer.from_file(file, said).sot_sequence(code)


def _folder(model: str | None) -> Path:
    return EMBEDDED if model is None else model_folder(Path(model).expanduser())


def _added_languages(model: str | None) -> dict[str, str] | None:
    path = _folder(model)
    if path.is_dir():
        return stated_languages(path)
    on_the_hub = not path.exists() and (model is None or "/" in model)
    return None if on_the_hub else {}


def require_languages(languages: Iterable[str | None], model: WhisperMoE, task: str = "transcribe") -> None:
    """Refuse a language that the loaded model has not."""
    for name in languages:
        if name is not None:
            model.tokenizer.sot_sequence(name, task)


def new_languages(given: Sequence[str] | None) -> list[NewLanguage]:
    """``or=odia:like=bn`` …; each language once."""
    found = [NewLanguage.parse(text) for text in given or ()]
    codes = [language.code for language in found]
    twice = [code for code in codes if codes.count(code) > 1]
    if twice:
        raise UsageError(f"--add-language gives {twice[0]!r} twice")
    return found
