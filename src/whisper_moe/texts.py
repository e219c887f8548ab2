"""What the commands of texts and signs do: read aloud, translate, read signs; each returns the exit status.

Torch is imported only after everything that can be checked without it has been.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from whisper_moe.jobs import UsageError, expand, given_text, load, progress_bar, put, usage
from whisper_moe.machine import check_arithmetic, take_threads
from whisper_moe.media.audio import MediaError
from whisper_moe.media.languages import language_code
from whisper_moe.weights.files import atomic_file

if TYPE_CHECKING:
    from whisper_moe.api import WhisperMoE

logger = logging.getLogger(__name__)
_RECORDED = 4_096
"""Bytes of a file, of which none is 0 in a text."""


def speak(flags: SimpleNamespace) -> int:
    """The sound to a file; facts to standard error, or as JSON to standard output."""
    _check_sound(flags.output)
    with usage():
        text = given_text(flags.text)
        asked = {"voice": flags.voice, "language": flags.language and language_code(flags.language), "rate": flags.rate}
    if flags.threads:
        take_threads(flags.threads)
    from whisper_moe.generate.speech import Speaker

    speaker, started = Speaker.from_pretrained(flags.model, model_dir=flags.model_dir), time.perf_counter()
    with progress_bar() as bar:
        task = bar.add_task("", total=None)
        speech = speaker.speak(text, **asked, progress=lambda seconds: bar.advance(task, seconds))
    seconds, facts = time.perf_counter() - started, (flags.output, speech.duration, speech.voice)
    speech.save(flags.output)
    logger.info("%s: %.1f s in the voice %s: %.1f times real time", *facts, speech.duration / seconds)
    if flags.json:
        put(json.dumps(speech.facts(), ensure_ascii=False) + "\n")
    return 0


def translate(flags: SimpleNamespace) -> int:
    """The translation to standard output or a file."""
    if flags.speak:
        _check_sound(flags.speak)
    _check_folder(flags.output)
    with usage():
        source, target = (name and language_code(name) for name in (flags.source, flags.to))
        check_arithmetic(flags.device, flags.dtype)
        recorded = _is_recording(flags.text)
        text = "" if recorded else given_text(flags.text)
    loaded = load(flags, ())
    _ = loaded.speaker if flags.speak else None  # says now, not after the text, if it cannot
    if recorded:
        found, source, target = _heard(loaded, flags.text, source, target)
        facts: dict[str, Any] = {"source": source, "target": target, "text": found}
    else:
        translation = loaded.translate(text, source=source, target=target)
        found, facts, target = translation.text, translation.facts(), translation.target
    _write(json.dumps(facts, ensure_ascii=False) if flags.json else found, flags.output)
    if flags.speak:
        loaded.speak(found, language=target).save(flags.speak)
    return 0


def sign(flags: SimpleNamespace) -> int:
    """A line for each film; one that cannot be read costs that film alone, and the status is 1 then."""
    _check_folder(flags.output)
    with usage():
        check_arithmetic(flags.device, flags.dtype)
        films = expand(flags.files)
    signer = load(flags, ()).signer
    with usage():
        language = signer.language(flags.language)
    lines, failed = list[str](), 0
    for each in signer.each(films, language):
        if isinstance(each, MediaError):
            failed += 1
            logger.error("whisper-moe: %s", each)
            continue
        plain = f"{each.source}\t{each.text}" if len(films) > 1 else each.text
        lines.append(json.dumps(each.facts(), ensure_ascii=False) if flags.json else plain)
        if not flags.output:
            put(f"{lines[-1]}\n")
    if flags.output:
        _write("\n".join(lines), flags.output)
    return int(failed > 0)


def _check_folder(path: Path | None) -> None:
    if path and not path.parent.is_dir():
        raise UsageError(f"{path}: there is no folder {path.parent}")


def _write(said: str, path: Path | None) -> None:
    if path:
        with atomic_file(path) as scratch:
            scratch.write_text(f"{said}\n", "utf-8")
    else:
        put(f"{said}\n")


def _is_recording(given: str) -> bool:
    """Whether it is a file of something else than text."""
    try:
        with Path(given).open("rb") as file:
            return b"\0" in file.read(_RECORDED)
    except (OSError, ValueError):
        return False


def _heard(loaded: WhisperMoE, path: str, source: str | None, target: str | None) -> tuple[str, str | None, str | None]:
    """What is said in a recording, in the target language (by default English; of English the only one there is), and both
    languages. Into English Whisper translates by itself; from a language that no text is translated from, its English goes on.
    """
    lines = lambda heard: "\n".join(part.text.strip() for part in heard.segments)  # noqa: E731
    if target != "en":
        heard = loaded.transcribe(path, language=source)
        source = heard.language
        if source == target:
            return lines(heard), source, target
        directions = loaded.translator.directions if target or source == "en" else ()
        if source == "en" or (source, target) in directions:
            found = loaded.translate(lines(heard), source=source, target=target)
            return found.text, source, found.target
    heard = loaded.transcribe(path, language=source, task="translate")
    if target in (None, "en"):
        return lines(heard), source or heard.language, "en"
    return loaded.translate(lines(heard), source="en", target=target).text, source, target


def _check_sound(path: Path) -> None:
    from whisper_moe.media.audio import WRITTEN

    if path.suffix.lower() not in WRITTEN:
        raise UsageError(f"{path}: sound is written as {' '.join(WRITTEN)}")
    _check_folder(path)
