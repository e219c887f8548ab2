"""``WhisperMoE``: a model, its tokenizer and its decoder in one object; what people import."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, Self, TypeAlias, overload

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from whisper_moe.config import FULL_WINDOW, SAMPLE_RATE, ModelConfig, problems
from whisper_moe.config_aside import ASIDE
from whisper_moe.generate.decode import WindowDecoder, prompt_ids
from whisper_moe.generate.longform import Recording
from whisper_moe.generate.mixed import Answer, Request, answer
from whisper_moe.generate.mixture import Mixture
from whisper_moe.generate.options import TranscribeOptions
from whisper_moe.generate.result import Outcome, Transcription, by_index
from whisper_moe.generate.schedule import Schedule
from whisper_moe.generate.senses import Film, SensesDecoder, Signed, Signer, Translation, Translator
from whisper_moe.generate.speech import Speaker, Speech
from whisper_moe.machine import check_arithmetic, pick_device, take_threads, weights_apart
from whisper_moe.media.audio import MediaError, stream_audio
from whisper_moe.media.containers import File, name_of
from whisper_moe.media.languages import language_code
from whisper_moe.media.tokenizer import Tokenizer
from whisper_moe.media.windows import cut_clips, drop_silence, is_silent, speech_spans, speech_spans_silero
from whisper_moe.model.inference import prepare_for_inference
from whisper_moe.model.int8 import suits_fbgemm
from whisper_moe.model.layers import TextHead
from whisper_moe.model.model import WhisperMoEModel
from whisper_moe.weights.checkpoint import (
    CONFIG,
    Loaded,
    load_checkpoint,
    load_senses,
    load_speech,
    read_config,
    save_checkpoint,
)
from whisper_moe.weights.load import load_model
from whisper_moe.weights.parts import empty_model
from whisper_moe.weights.tokens import stated_language

Audio: TypeAlias = "File | np.ndarray"
"""A path, an open binary file, or float32 samples at 16 kHz, mono."""

_DETECTORS = {"energy": speech_spans, "silero": speech_spans_silero}


class WhisperMoE:
    """Transcribes, translates and tells languages.

    >>> from whisper_moe import WhisperMoE
    >>> WhisperMoE.from_pretrained().transcribe("talk.m4a").text  # doctest: +SKIP
    """

    def __init__(
        self,
        model: WhisperMoEModel,
        tokenizer: Tokenizer,
        generation: dict[str, Any],
        *,
        name: str = "",
        tokenizer_json: bytes = b"",
        device: str = "cpu",
        dtype: str = "float32",
        experts: Sequence[Callable[[], WindowDecoder]] = (),
        folder: Path | None = None,
    ) -> None:
        """``experts``: whole models, which are then asked in place of this one. ``folder``: its checkpoint, of which what speaks
        is read when it is needed."""
        self.name, self.device, self.dtype = name, device, dtype
        self.tokenizer, self.generation = tokenizer, generation
        self._tokenizer_json, self._folder = tokenizer_json, folder
        self.model = model.eval()
        self._decoder = WindowDecoder(model, tokenizer, generation)
        if experts:
            self._decoder = Mixture(self._decoder, experts)

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str] | None = None,
        *,
        device: str = "auto",
        dtype: str = "auto",
        threads: int | None = None,
        for_inference: bool = True,
        lazy: bool = False,
        model_dir: str | os.PathLike[str] | None = None,
    ) -> Self:
        """Load a whisper-moe directory or training run, any Whisper (``base``, Hub id, folder, ``.pt`` file, LoRA adapter),
        or the default (None).

        ``device``: ``cpu``, ``cuda``, ``mps`` …; ``auto`` takes a GPU if there is one. ``dtype``: ``int8`` is arithmetic
        with a scale for each token, on a CPU only; ``auto`` takes it where the CPU is fast at it, else float32.
        ``threads``: of the CPU, for the whole process; by default as many as others leave cores for. ``for_inference``
        lays the weights out for the machine; without, they are float32 and can be trained and saved. ``lazy``: of experts that
        are whole models, two at most are kept in memory. ``model_dir``: a folder in which the model is looked for first, and
        which downloads go to. Raises ``ValueError`` that names what is wrong.
        """
        check_arithmetic(device, dtype)
        if threads is not None:
            take_threads(threads)
        device = pick_device(device)
        check_arithmetic(device, dtype)
        if not for_inference and dtype not in ("auto", "default", "float32"):
            raise ValueError(f"for_inference=False loads float32 weights; dtype {dtype!r} would round them")
        dtype = _pick_dtype(dtype, device) if for_inference else "float32"
        for_cpu = for_inference and device == "cpu" and dtype in ("float32", "int8")
        network = partial(_network, device=device, dtype=dtype, for_inference=for_inference, for_cpu=for_cpu)

        @lru_cache(maxsize=2 if lazy else None)
        def expert(folder: Path) -> WindowDecoder:
            with weights_apart() if for_cpu else nullcontext():
                loaded = load_checkpoint(folder, keep_int8=for_cpu, aside=False)
                return WindowDecoder(network(loaded), loaded.tokenizer, loaded.generation)

        with weights_apart() if for_cpu else nullcontext():
            loaded = load_model(model, keep_int8=for_cpu, aside=not for_inference, model_dir=model_dir)
            own = network(loaded)
        experts = [partial(expert, folder) for folder in loaded.experts]
        if not lazy:
            for fetch in experts:
                fetch()
        whole = {name: getattr(loaded, name) for name in ("name", "tokenizer_json", "folder")}
        return cls(own, loaded.tokenizer, loaded.generation, device=device, dtype=dtype, experts=experts, **whole)

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def context_margin(self) -> float:
        """Seconds of silence that are kept after a clip where nothing else is asked for."""
        return self.config.margin

    @property
    def stated_language(self) -> str | None:
        """The code of the language that a fine-tune says it is for: what it hears is taken for that, unless told otherwise."""
        return stated_language(self.generation, self.tokenizer)

    def save_pretrained(self, directory: str | os.PathLike[str], *, quantize: bool = False) -> None:
        """Write a checkpoint directory; ``quantize`` stores matrices as int8. Raises ``ValueError`` for a model
        whose weights were rounded, laid out for this machine, or not all read when it was loaded.
        """
        whole = read_config(self._folder / CONFIG) if self._folder is not None else self.config
        left = any(getattr(whole, name) and getattr(self.model, name) is None for name in ASIDE)
        if self.dtype != "float32" or not isinstance(self.model.decoder.head, TextHead) or left:
            raise ValueError("load the model with for_inference=False to save it")
        state: dict[str, Tensor] = {key: value.float().cpu() for key, value in self.model.state_dict().items()}
        model = Loaded(self.config, state, self.generation, self._tokenizer_json)
        save_checkpoint(directory, model, quantize=quantize)

    @overload
    def transcribe(self, audio: Audio, **options: Any) -> Transcription: ...
    @overload
    def transcribe(self, audio: Sequence[Audio], **options: Any) -> list[Transcription]: ...
    def transcribe(self, audio: Audio | Sequence[Audio], **options: Any) -> Transcription | list[Transcription]:
        """The transcript of one recording, or of each in a list (decoded together, which is faster than one by one).

        ``options``: the fields of :class:`~whisper_moe.generate.options.TranscribeOptions`. Raises ``MediaError`` naming the
        first file that cannot be read; :meth:`transcribe_each` goes on with the others, and gives what was heard of that one.
        """
        alone = isinstance(audio, (str, os.PathLike, np.ndarray)) or hasattr(audio, "read")
        sources: list[Any] = [audio] if alone else list(audio)  # pyright: ignore[reportArgumentType]
        results: list[Transcription] = []
        for outcome in self.transcribe_each(sources, **options):
            if outcome.transcription is None:
                raise outcome.error or MediaError(outcome.name, "not transcribed")
            results.append(outcome.transcription)
        return results[0] if alone else results

    def transcribe_each(
        self,
        audio: Iterable[Audio],
        options: TranscribeOptions | None = None,
        *,
        in_order: bool = True,
        progress: Callable[[float], None] | None = None,
        decoder: WindowDecoder | None = None,
        **changes: Any,
    ) -> Iterator[Outcome]:
        """Outcomes in the order given; a file that cannot be read costs that file and no other.

        ``in_order=False``: each as soon as it is there; :attr:`Outcome.index` says whose it is. ``progress`` is told how many
        seconds of audio have just been finished. ``decoder``: another one than the model's own. ``changes``: fields of the
        options.
        """
        asked = self._asked(options or TranscribeOptions(), **changes)
        recordings = (self._recording(source, asked, index) for index, source in enumerate(audio))
        heard = self.schedule(progress, decoder).run(recordings)
        outcomes = (recording.outcome() for recording in heard)
        yield from by_index(outcomes) if in_order else outcomes

    def recording(self, audio: Audio, **options: Any) -> Recording:
        """One on its way to a transcript, for :meth:`schedule`. Raises ``ValueError`` for options that cannot be followed."""
        return self._recording(audio, self._asked(TranscribeOptions(), **options))

    def schedule(
        self, progress: Callable[[float], None] | None = None, decoder: WindowDecoder | None = None
    ) -> Schedule:
        """What decodes recordings side by side, step by step; they may come and go at any time."""
        return Schedule(decoder or self._decoder, progress)

    def detect_language(
        self, audio: Audio, *, languages: Sequence[str] = (), track: int | str | None = None
    ) -> dict[str, float]:
        """Probability of each language in the first 30 s of speech, likeliest first.

        ``languages``: choose among these only. ``track``: as in :class:`TranscribeOptions`. Raises
        ``ValueError`` for a model that knows just one.
        """
        if not self.tokenizer.is_multilingual:
            raise ValueError(f"{self.name}: an English-only model cannot detect languages")
        limits = {"language": "auto", "allowed_languages": tuple(languages), "window": FULL_WINDOW, "track": track}
        options = self._asked(TranscribeOptions(), **limits)
        recording = self._recording(audio, options)
        windows = recording.windows
        window = next((window for window in windows if not is_silent(window.samples)), None)
        if window is None:
            raise MediaError(recording.name, "; ".join(["no sound in it", *recording.notes]))
        next(windows, None)  # damage right behind it is an error too
        return self._decoder.detect_language(window.samples, options, margin=FULL_WINDOW)

    def speak(
        self,
        text: str,
        *,
        voice: str | None = None,
        language: str | None = None,
        rate: float = 1.0,
        progress: Callable[[float], None] = lambda seconds: None,
    ) -> Speech:
        """``text`` read aloud. ``voice``: by name, default one of the text's language; ``rate``: times the voice's own speed.

        Raises ``ValueError`` for a model that does not speak, for a voice or language that it has not, and for a text with
        nothing to read.
        """
        said = language and language_code(language)
        return self.speaker.speak(text, voice=voice, language=said, rate=rate, progress=progress)

    @cached_property
    def speaker(self) -> Speaker:
        """What speaks: a part of its own, read when it is first asked for."""
        if self.model.speech is not None:
            return Speaker(self.model.speech)
        if self._folder is None:
            raise ValueError(f"{self.name}: this model does not speak: it has no part for that")
        return Speaker(load_speech(self._folder).to(self.device))

    def translate(self, text: str, *, source: str | None = None, target: str | None = None) -> Translation:
        """``text`` in another language. ``source``: by default that of most letters; ``target``: the only one there is for that.

        Raises ``ValueError`` for a model that reads no texts, for a direction that it is not for, and for a text without a word.
        """
        source, target = (name and language_code(name) for name in (source, target))
        return self.senses.run([self.translator.job(text, source=source, target=target)])[0]

    @cached_property
    def translator(self) -> Translator:
        """What translates: the expert of texts, beside what hears."""
        return Translator(self.senses)

    @overload
    def sign(self, films: Film, *, language: str | None = None) -> Signed: ...
    @overload
    def sign(self, films: Sequence[Film], *, language: str | None = None) -> list[Signed]: ...
    def sign(self, films: Film | Sequence[Film], *, language: str | None = None) -> Signed | list[Signed]:
        """What is signed in a film, or in each of several, which share packs. ``language``: of the signs (``isl``, ``asl``).

        Raises ``ValueError`` for a model that sees no films, and for a language that it has not learned; ``MediaError`` naming
        the first film that cannot be read.
        """
        alone = isinstance(films, (str, os.PathLike)) or hasattr(films, "read")
        sources: list[Any] = [films] if alone else list(films)  # pyright: ignore[reportArgumentType]
        said: list[Signed] = []
        for each in self.signer.each(sources, self.signer.language(language)):
            if isinstance(each, MediaError):
                raise each
            said.append(each)
        return said[0] if alone else said

    @cached_property
    def signer(self) -> Signer:
        """What reads signs: the expert of films, beside what hears."""
        return Signer(self.senses)

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """What each request asks for, of sound, texts and films alike; what waits to be encoded shares packs.

        A request that cannot be answered has its error, a ``ValueError``, for an answer, and costs no other one.
        """
        return answer(requests, self._decoder, self.transcribe_each, self.speak, lambda: self.senses)

    @cached_property
    def senses(self) -> SensesDecoder:
        """The senses beside hearing, read when they are first asked for."""
        senses = self.model.senses
        if senses is None:
            if self._folder is None:
                raise ValueError(f"{self.name}: this model only hears: it has no part for texts or films")
            like = self.model.encoder.positions  # rounded as the rest is
            senses = load_senses(self._folder).to(like.device, like.dtype)
            senses.attach(self.model)
        return SensesDecoder(self.model, senses, self.tokenizer)

    def _asked(self, options: TranscribeOptions, **changes: Any) -> TranscribeOptions:
        """The options for this model: languages by code, its own language and margin where nothing is said of them."""
        try:
            asked = replace(options, **changes)
        except ValidationError as error:
            raise ValueError(problems(error)) from None
        language = asked.language or ("auto" if asked.allowed_languages else self.stated_language or "auto")
        code = None if language.lower() == "auto" else self.tokenizer.language_code(language)
        allowed = tuple(map(self.tokenizer.language_code, asked.allowed_languages))
        for known in filter(None, (code, *allowed)):
            self.tokenizer.sot_sequence(known, asked.task)
        for text in (asked.initial_prompt, asked.hotwords):
            prompt_ids(text, self.tokenizer)  # says now what cannot be encoded
        if asked.vad == "silero":
            speech_spans_silero(np.zeros(SAMPLE_RATE, np.float32))  # says now, not at the first file, if it is missing
        beyond = [token for token in asked.suppress_tokens or () if token >= self.config.vocab_size]
        if beyond:
            raise ValueError(f"suppress_tokens: {beyond} are beyond the model's {self.config.vocab_size} tokens")
        self._decoder.allowed_experts(asked)
        margin = self.context_margin if asked.context_margin is None else asked.context_margin
        return replace(asked, language=code, allowed_languages=allowed, context_margin=margin)

    def _recording(self, source: Audio, options: TranscribeOptions, index: int = 0) -> Recording:
        name = "samples" if isinstance(source, np.ndarray) else name_of(source)
        recording = Recording(name, iter(()), index, options, language=self._decoder.given_language(options))
        if isinstance(source, np.ndarray):
            blocks: Iterator[np.ndarray] = map(_checked, [source])  # lazily: bad samples cost this recording alone
        else:
            blocks = stream_audio(source, name=name, track=options.track, note=recording.notes.append)
        window = min(options.window_seconds, self._decoder.window_seconds)
        windows = cut_clips(_timed(recording, blocks), options.clip_timestamps, window)
        recording.windows = windows if options.vad == "none" else drop_silence(windows, _DETECTORS[options.vad])
        return recording


def _timed(recording: Recording, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The blocks, while the recording's duration is read off them: also of what is not transcribed."""
    samples = 0
    for block in blocks:
        samples += len(block)
        recording.duration = samples / SAMPLE_RATE
        yield block


def _pick_dtype(dtype: str, device: str) -> str:
    """int8 where the CPU is faster at it than at float32: with AVX-512, or with AVX2 and a kernel made for that.

    CTranslate2's ``int8_float16`` is int8 on a CPU; on a GPU, what it has beside the int8.
    """
    if "_" in dtype:
        return "int8" if device == "cpu" else dtype.removeprefix("int8_")
    if dtype not in ("auto", "default"):
        return dtype
    wide = torch.backends.cpu.get_cpu_capability().startswith(("AVX512", "AMX"))
    return "int8" if device == "cpu" and (wide or suits_fbgemm()) else "float32"


def _network(loaded: Loaded, device: str, dtype: str, *, for_inference: bool, for_cpu: bool) -> WhisperMoEModel:
    """``for_cpu``: the weights are laid out for the CPU, and given up for that."""
    network = empty_model(loaded.config)
    network.load_state_dict(loaded.state, strict=not loaded.quantized, assign=True)
    loaded.state.clear()  # what is prepared below is then freed layer by layer
    network.eval().requires_grad_(not for_inference)
    if for_cpu:
        prepare_for_inference(network, "int8" if dtype == "int8" else "float32", loaded.quantized)
        return network
    return network.to(device, getattr(torch, dtype))


def _checked(samples: np.ndarray) -> np.ndarray:
    if samples.ndim != 1 or not np.issubdtype(samples.dtype, np.floating):
        raise ValueError(
            f"samples must be a one-dimensional float array at {SAMPLE_RATE} Hz, got {samples.dtype}{samples.shape}"
        )
    if not np.isfinite(samples).all():
        raise MediaError("samples", "they hold NaN or infinity")
    return np.ascontiguousarray(samples, dtype=np.float32)
