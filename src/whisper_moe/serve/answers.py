"""What is asked for, and what is answered, in the words of OpenAI's API; what is ours beside them is optional there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, ConfigDict, Field

from whisper_moe.config import Frozen
from whisper_moe.generate.options import SubtitleOptions
from whisper_moe.generate.result import Transcription, as_text, mean_gates
from whisper_moe.media.languages import FURTHER_LANGUAGES, LANGUAGES

TextFormat: TypeAlias = Literal["json", "text", "srt", "verbose_json", "vtt"]
_SEVERAL = BeforeValidator(lambda given: given if isinstance(given, (list, tuple)) else [given])
MEDIA_TYPES = {
    "json": "application/json",
    "verbose_json": "application/json",
    "text": "text/plain; charset=utf-8",
    "srt": "application/x-subrip; charset=utf-8",
    "vtt": "text/vtt; charset=utf-8",
}
SOUND = {
    "mp3": "audio/mpeg",
    "opus": "audio/ogg",
    "aac": "audio/mp4",
    "flac": "audio/flac",
    "wav": "audio/wav",
    "pcm": "audio/L16; rate=16000",
}


class Asked(Frozen):
    """Fields that are not known are left alone, as there are new ones every year."""

    model_config = ConfigDict(extra="ignore")

    model: str = "whisper-moe"


class TranslationForm(Asked):
    """Fields of ``/v1/audio/translations``, beside its ``file``."""

    prompt: str | None = Field(default=None, max_length=10_000)
    response_format: TextFormat = "json"
    temperature: float = Field(default=0.0, ge=0, le=1)

    def options(self, experts: Sequence[str]) -> dict[str, Any]:
        """Of :class:`~whisper_moe.generate.options.TranscribeOptions`."""
        rising = [round(self.temperature + 0.2 * step, 2) for step in range(6)]
        words = {"initial_prompt": self.prompt, "experts": tuple(experts), "task": "translate"}
        return words | {"temperatures": tuple(value for value in rising if value <= 1)}


class TranscriptionForm(TranslationForm):
    """Fields of ``/v1/audio/transcriptions``, beside its ``file``."""

    language: str | None = None
    timestamp_granularities: Annotated[tuple[Literal["word", "segment"], ...], _SEVERAL] = Field(
        default=("segment",), alias="timestamp_granularities[]"
    )
    stream: bool = False

    def options(self, experts: Sequence[str]) -> dict[str, Any]:
        words = {"language": self.language, "word_timestamps": "word" in self.timestamp_granularities}
        return super().options(experts) | words | {"task": "transcribe"}


class SpeechRequest(Asked):
    """The body of ``/v1/audio/speech``."""

    input: str = Field(min_length=1)
    voice: str | dict[str, str] | None = None
    """By name; the names of OpenAI's voices, which this model has not, stand for the first one of the text's language."""
    response_format: Literal["mp3", "opus", "aac", "flac", "wav", "pcm"] = "mp3"
    speed: float = Field(default=1.0, ge=0.5, le=2.0)
    language: str | None = None


class TextRequest(Asked):
    """The body of ``/v1/text/translations``."""

    input: str = Field(min_length=1)
    source: str | None = None
    target: str | None = None


def usage_of(result: Transcription) -> dict[str, Any]:
    return {"type": "duration", "seconds": result.duration}


def transcript(result: Transcription, form: TranslationForm) -> str:
    """The body, in the format that is asked for."""
    kind = form.response_format
    if kind == "text":
        return f"{result.text}\n"
    if kind in ("srt", "vtt"):
        return as_text(result, kind, SubtitleOptions())
    facts: dict[str, Any] = {"text": result.text, "usage": usage_of(result)}
    if kind == "verbose_json":
        facts = verbose(result, form) | facts
    return json.dumps(facts, ensure_ascii=False, allow_nan=False)


def verbose(result: Transcription, form: TranslationForm) -> dict[str, Any]:
    """OpenAI's keys; each segment's experts and language are ours."""
    names = LANGUAGES | FURTHER_LANGUAGES
    segments = [segment.to_dict() for segment in result.segments]
    words = [word for segment in segments for word in segment.pop("words", ())]
    granularities = form.timestamp_granularities if isinstance(form, TranscriptionForm) else ("segment",)
    task, language = ("transcribe", result.language) if isinstance(form, TranscriptionForm) else ("translate", "en")
    facts = {
        "task": task,
        "language": names.get(language or "", language or ""),
        "duration": result.duration,
        "experts": dict(mean_gates(result.segments)),
        "fallbacks": result.fallbacks,
        "notes": list(result.notes),
    }
    if "word" in granularities:
        facts["words"] = [{**word, "word": word["word"].strip()} for word in words]
    return facts | ({"segments": segments} if "segment" in granularities else {})


def event(kind: str, **facts: Any) -> str:
    """A server-sent event, as OpenAI's clients read it."""
    return f"data: {json.dumps({'type': kind, **facts}, ensure_ascii=False)}\n\n"
