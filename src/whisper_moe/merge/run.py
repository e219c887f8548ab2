"""The commands ``doctor`` and ``merge``: fine-tunes in, verdicts or one model out."""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from whisper_moe.config import FULL_WINDOW, SAMPLE_RATE, ModelConfig
from whisper_moe.data.corpora import open_corpus
from whisper_moe.data.inspect import named_corpus
from whisper_moe.data.sample import Sample, items
from whisper_moe.generate.options import TranscribeOptions
from whisper_moe.media.audio import MediaError
from whisper_moe.merge.build import decoder_of, fitted, merged_delta, merged_models
from whisper_moe.merge.doctor import Diagnosis, examine
from whisper_moe.merge.grow import moved_choices, with_expert, without_expert
from whisper_moe.weights.checkpoint import Loaded, load_checkpoint, read_manifest, save_checkpoint
from whisper_moe.weights.files import CheckpointError
from whisper_moe.weights.load import config_of, load_model, resolve

PROBE_CLIPS = 60
"""Of each expert, that the router is fitted to: a few minutes."""
_BASES = {
    (384, 4, 4, 80): "tiny",
    (512, 6, 6, 80): "base",
    (768, 12, 12, 80): "small",
    (1024, 24, 24, 80): "medium",
    (1280, 32, 32, 80): "large-v2",
    (1280, 32, 32, 128): "large-v3",
    (1280, 32, 4, 128): "large-v3-turbo",
}
"""Width, layers of encoder and decoder, and mels of OpenAI's Whispers."""
logger = logging.getLogger(__name__)


def named_experts(given: Sequence[str]) -> dict[str, str]:
    """``hindi=models/hi`` or a source alone, which is called as its folder is: name → source."""
    found: dict[str, str] = {}
    for each in given:
        name, mark, source = each.partition("=")
        name, source = (name, source) if mark else (Path(each).name, each)
        if name in found:
            raise ValueError(f"two experts would both be called {name}: name them, as in {name}-2={source}")
        found[name] = source
    return found


def base_of(experts: Mapping[str, str], base: str | None) -> Loaded:
    """The model that the experts were made from: as stated, else OpenAI's of the first one's shape."""
    if base is not None:
        return load_model(base)
    errors: list[str] = []
    for source in experts.values():
        try:
            config = config_of(resolve(source))
        except (CheckpointError, OSError) as error:
            errors.append(str(error))
            continue
        return load_model(openai_like(config, source))
    raise ValueError("; ".join(errors))


def openai_like(config: ModelConfig, source: str) -> str:
    """What OpenAI's Whisper of a shape is called."""
    size = _BASES.get((config.d_model, config.encoder_layers, config.decoder_layers, config.n_mels))
    if size is None:
        raise ValueError(f"{source}: no Whisper of OpenAI's has its shape: name its base with --base")
    return size if config.vocab_size > 51_864 else f"{size}.en"


def clips_of(source: str, limit: int = PROBE_CLIPS) -> Iterator[tuple[Sample, np.ndarray]]:
    """Clips of some data, each of at most 30 s. Raises ``ValueError`` where there is none."""
    found = 0
    for sample in items(open_corpus(named_corpus(source))):
        if found == limit:
            return
        if not isinstance(sample, Sample) or sample.audio is None:
            continue
        try:
            samples = sample.audio.read()[: round(FULL_WINDOW * SAMPLE_RATE)]
        except MediaError as error:
            logger.warning("left out: %s", error)
            continue
        if len(samples):
            found += 1
            yield sample, samples
    if not found:
        raise ValueError(f"{source}: no sound in it that could be read")


def doctor(experts: Sequence[str], base: str | None, dev: Sequence[str], as_json: bool) -> int:
    """Print what is known of each expert; 1 if one of them cannot be merged."""
    named = named_experts(experts)
    root, found = base_of(named, base), list[Diagnosis]()
    sets = {source: list(clips_of(source)) for source in dev}
    first = [clips[0][1] for clips in sets.values()][:1] * len(named)
    for diagnosis, expert in examine(named, root, first):
        if expert is not None:
            diagnosis.wer = {source: _error_rate(expert, clips) for source, clips in sets.items()}
            expert.state.clear()  # before the next is read
        found.append(diagnosis)
    if as_json:
        print(json.dumps([each.to_dict() for each in found], ensure_ascii=False, indent=2))
    else:
        _show(found)
    return int(any(each.verdict == "refuse" for each in found))


def _error_rate(model: Loaded, clips: Sequence[tuple[Sample, np.ndarray]]) -> float:
    from whisper_moe.evaluate.metrics import clip_counts

    decoder, texts = decoder_of(model), dict[int, str]()
    languages = [sample.language for sample, _ in clips]
    for language in dict.fromkeys(languages):
        own = [index for index, each in enumerate(languages) if each == language]
        options = TranscribeOptions(language=language, timestamps=False)
        results = decoder.decode([clips[i][1] for i in own], options, temperature=0.0, margin=options.margin)
        texts |= {i: model.tokenizer.decode(result.hypothesis.tokens) for i, result in zip(own, results, strict=True)}
    references = [sample.text for sample, _ in clips]
    return clip_counts(references, [texts[i] for i in range(len(clips))], languages).value


def _show(found: Sequence[Diagnosis]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("expert", "verdict", "moved", "rank", "silence", "times", "WER", "why")
    for each in found:
        ranks = [rank for _, rank in each.layers.values() if rank]
        figures = (each.moved, sum(ranks) / len(ranks) if ranks else None, each.no_speech, each.timestamps)
        shown = [
            f"{value:.{digits}g}" if value is not None else ""
            for value, digits in zip(figures, (2, 3, 2, 2), strict=True)
        ]
        rates = " ".join(f"{100 * rate:.1f}" for rate in each.wer.values())
        table.add_row(each.name, each.verdict, *shown, rates, "; ".join(each.reasons))
    Console().print(table)


def merge(
    experts: Sequence[str],
    output: Path,
    *,
    probe: Sequence[str],
    none: Sequence[str] = (),
    base: str | None = None,
    granularity: str = "delta",
    delta_rank: int = 32,
    gate_threshold: float = 0.1,
    quantize: bool = False,
    overwrite: bool = False,
) -> dict[str, np.ndarray]:
    """Write one model of all experts; returns a clip of each, to try it with."""
    if granularity not in ("delta", "model"):
        raise ValueError(f"granularity must be delta or model, got {granularity!r}")
    named = named_experts(experts)
    if len(probe) != len(named):
        raise ValueError(
            f"{len(named)} experts need {len(named)} --probe, each with clips for one, in order; got {len(probe)}"
        )
    clips = [list(clips_of(source)) for source in probe]
    others = [samples for source in none for _, samples in clips_of(source)]
    root, whole = base_of(named, base), granularity == "model"
    accepted = _one_by_one(_accepted(named, root, [own[0][1] for own in clips]))
    if whole:
        deque(accepted, maxlen=0)  # what is refused is refused before the router is fitted
        merged = merged_models(root, list(named), gate_threshold)
    else:
        merged = merged_delta(root, list(named), accepted, delta_rank)
    model = fitted(merged, [[samples for _, samples in own] for own in clips], others)
    inside = _one_by_one(map(load_model, named.values())) if whole else ()
    save_checkpoint(output, model, quantize=quantize, overwrite=overwrite, experts=inside)
    return {name: own[0][1] for name, own in zip(named, clips, strict=True)}


def _one_by_one(models: Iterable[Loaded]) -> Iterator[Loaded]:
    """Each is given up when the next is asked for: two large ones need not be there at once."""
    for model in models:
        yield model
        model.state.clear()


def _accepted(experts: Mapping[str, str], base: Loaded, speech: Sequence[np.ndarray]) -> Iterator[Loaded]:
    """Each expert, its faults logged. Raises ``ValueError`` for one that is refused."""
    for diagnosis, expert in examine(experts, base, speech):
        if expert is None:
            raise ValueError(f"{diagnosis.name}: cannot be merged: {'; '.join(diagnosis.reasons)}")
        for reason in diagnosis.reasons:
            logger.warning("%s: %s", diagnosis.name, reason)
        yield expert


def add_expert(directory: Path, expert: str, probe: str, base: str | None) -> None:
    """Write the merged model with one expert more in its place."""
    ((name, source),) = named_experts([expert]).items()
    model, clips = load_checkpoint(directory), [samples for _, samples in clips_of(probe)]
    root = base_of({name: source}, base)
    (found,) = _accepted({name: source}, root, clips[:1])
    grown = with_expert(model, root, name, found, clips)
    whole = chain(_one_by_one(map(load_checkpoint, model.experts)), [found] if model.experts else ())
    _rewrite(directory, grown, whole)
    moved = moved_choices(model.state, grown, name)
    logger.info(
        "%s: %s added; %s",
        directory,
        name,
        f"takes over from {', '.join(moved)}" if moved else "the others keep theirs",
    )


def remove_expert(directory: Path, name: str) -> None:
    """Write the merged model without one of its experts in its place."""
    shrunk = without_expert(load_checkpoint(directory), name)
    _rewrite(directory, shrunk, _one_by_one(map(load_checkpoint, shrunk.experts)))
    logger.info("%s: %s removed", directory, name)


def _rewrite(directory: Path, model: Loaded, experts: Iterable[Loaded]) -> None:
    quantize = read_manifest(directory).quantization is not None
    save_checkpoint(directory, model, quantize=quantize, overwrite=True, experts=experts)
