"""The commands ``doctor`` and ``merge``: fine-tunes in, verdicts or one model out."""

from __future__ import annotations

import logging
import random
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from itertools import chain
from json import dumps
from pathlib import Path
from typing import TypeAlias

import numpy as np

from whisper_moe.config import FULL_WINDOW, SAMPLE_RATE, SAMPLES_PER_POSITION, ModelConfig
from whisper_moe.data.inspect import named_corpus
from whisper_moe.data.sample import Sample, items
from whisper_moe.data.table import open_corpus
from whisper_moe.evaluate.run import shown
from whisper_moe.generate.decode import WindowDecoder
from whisper_moe.media.audio import MediaError
from whisper_moe.merge import build
from whisper_moe.merge.build import decoder_of, told_of
from whisper_moe.merge.doctor import Diagnosis, Member, examine, write_card
from whisper_moe.weights.checkpoint import CARD, Loaded, check_place, load_checkpoint, read_manifest, save_checkpoint
from whisper_moe.weights.files import CheckpointError, atomic_file, listed
from whisper_moe.weights.load import config_of, load_model, resolve

PROBE_CLIPS = 60
"""Of each expert, that the router is fitted to: a few minutes."""
LEAST_CLIPS = 2
"""Two halves of which say what is far."""
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
_BATCH = 8
"""Clips that are decoded together."""
Clip: TypeAlias = tuple[Sample, np.ndarray]
logger = logging.getLogger(__name__)


def named_experts(given: Sequence[str]) -> dict[str, str]:
    """``hindi=models/hi`` or a source alone, which is called as its folder is: name → source."""
    found: dict[str, str] = {}
    for each in given:
        name, mark, source = each.partition("=")
        if not mark or "/" in name:
            name, source = Path(each).name, each
        if name in ("", "none") or "," in name:  # as --experts could not say it
            raise ValueError(f"{each}: an expert cannot be called {name!r}: name it, as in hindi={source}")
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


def clips_of(source: str, limit: int = PROBE_CLIPS) -> Iterator[Clip]:
    """Clips of some data from all over it (of a stream, the first), each of at most 30 s.

    Tables often list one speaker after the other, and a router that heard one knows the voice. Raises ``ValueError`` where
    there are too few.
    """
    found, corpus = 0, open_corpus(named_corpus(source))
    rows = None if corpus.streaming else random.Random(0).sample(range(len(corpus)), len(corpus))
    for sample in items(corpus, rows):
        if found == limit:
            return
        if not isinstance(sample, Sample) or sample.audio is None:
            continue
        try:
            samples = sample.audio.read()[: round(FULL_WINDOW * SAMPLE_RATE)]
        except MediaError as error:
            logger.warning("left out: %s", error)
            continue
        if len(samples) >= SAMPLES_PER_POSITION:
            found += 1
            yield sample, samples
    if found < LEAST_CLIPS:
        raise ValueError(f"{source}: {found} clips in it that could be read; a router needs {LEAST_CLIPS} at least")


def doctor(experts: Sequence[str], base: str | None, dev: Sequence[str] | None, json: bool) -> int:
    """Print what is known of each expert; 1 if one of them cannot be merged."""
    named = named_experts(experts)
    root, found = base_of(named, base), list[Diagnosis]()
    sets = {source: list(clips_of(source)) for source in dev or ()}
    first = [clips[0][1] for clips in sets.values()][:1] * len(named)
    for diagnosis, expert in examine(named, root, first):
        if expert is not None:
            decoder = decoder_of(expert)
            diagnosis.wer = {source: _error_rate(decoder, clips) for source, clips in sets.items()}
            expert.state.clear()  # before the next is read
        found.append(diagnosis)
    if json:
        print(dumps(list(map(asdict, found)), ensure_ascii=False, indent=2))
    else:
        _show(found)
    return int(any(each.verdict == "refuse" for each in found))


def _error_rate(decoder: WindowDecoder, clips: Sequence[Clip], expert: str | None = None) -> float:
    """``expert``: the only one that may answer."""
    from whisper_moe.evaluate.metrics import clip_counts, written

    experts = () if expert is None else (expert,)
    batches = [clips[first : first + _BATCH] for first in range(0, len(clips), _BATCH)]
    texts = [text for batch in batches for text in written(decoder, batch, decoder.model.config.margin, experts)]
    samples = [sample for sample, _ in clips]
    return clip_counts([each.text for each in samples], texts, [each.target_language for each in samples]).value


def _show(found: Sequence[Diagnosis]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("expert", "verdict", "moved", "rank", "silence", "times", "WER", "why")
    for each in found:
        ranks = [rank for _, rank in each.layers.values() if rank]
        figures = (each.moved, sum(ranks) / len(ranks) if ranks else None, each.no_speech, each.timestamps)
        pairs = zip(figures, (2, 3, 2, 2), strict=True)
        shown = ["" if value is None else f"{value:.{digits}g}" for value, digits in pairs]
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
    measure: int = 20,
) -> dict[str, np.ndarray]:
    """Write one model of all experts and its card; returns a clip of each, to try it with.

    ``measure``: clips of each probe on which WER is measured, before and after.
    """
    if granularity not in ("delta", "model"):
        raise ValueError(f"granularity must be delta or model, got {granularity!r}")
    check_place(output, overwrite)
    named = named_experts(experts)
    if len(probe) != len(named):
        raise ValueError(
            f"{len(named)} experts need {len(named)} --probe, each with clips for one, in order; got {len(probe)}"
        )
    clips = [list(clips_of(source)) for source in probe]
    others = [samples for source in none for _, samples in clips_of(source)]
    root, whole = base_of(named, base), granularity == "model"
    for source, own in zip(probe, clips, strict=True):
        check_languages(source, own, root)
    judged = [_judged(own, measure) for own in clips]
    found: list[Diagnosis] = []
    tuned = one_by_one(_heard(named, root, [own[0][1] for own in clips], judged, found))
    if whole:
        deque(tuned, maxlen=0)  # what is refused is refused before the router is fitted
        merged = build.merged_models(root, list(named), gate_threshold)
    else:
        merged = build.merged_delta(root, list(named), tuned, delta_rank)
    model = build.fitted(merged, [[samples for _, samples in own] for own in clips], others)
    for diagnosis, own in zip(found, clips, strict=True):
        model = told_of(model, diagnosis.name, language_of(diagnosis, own), untimed=diagnosis.untimed)
    inside = one_by_one(map(load_model, named.values())) if whole else ()
    save_checkpoint(output, model, quantize=quantize, overwrite=overwrite, experts=inside)
    if any(judged):
        _hear_merged(load_checkpoint(output), judged, found)
    spoken = [sorted({sample.target_language for sample, _ in own}) for own in clips]
    members = list(map(Member, named.values(), probe, spoken, map(len, judged), found))
    write_card(output, base or root.name, model, members, none)
    return {name: own[0][1] for name, own in zip(named, clips, strict=True)}


def check_languages(source: str, clips: Sequence[Clip], base: Loaded) -> None:
    """Raises ``ValueError`` for clips in a language that the base has no token of."""
    known = base.tokenizer.languages
    if other := sorted({sample.language for sample, _ in clips} - known.keys()) if known else []:
        raise ValueError(
            f"{source}: {base.name} has no token of {listed(other)}: name the language that the fine-tune takes it for"
        )


def language_of(expert: Diagnosis, clips: Sequence[Clip]) -> str | None:
    """The one that a fine-tune says it is for, else that of all its clips, if they have one."""
    heard = {sample.language for sample, _ in clips}
    return expert.language or (heard.pop() if len(heard) == 1 else None)


def _judged(clips: Sequence[Clip], limit: int) -> list[Clip]:
    """Whose WER is measured: that have a text, and were not cut."""
    if limit and not find_spec("rapidfuzz"):
        logger.warning("what is lost is not measured: that needs pip install 'whisper-moe[evaluate]'")
        limit = 0
    whole = [(sample, sound) for sample, sound in clips if len(sound) < FULL_WINDOW * SAMPLE_RATE]
    return [(sample, sound) for sample, sound in whole if sample.text.strip()][:limit]


def _heard(
    experts: Mapping[str, str],
    base: Loaded,
    speech: Sequence[np.ndarray],
    judged: Sequence[Sequence[Clip]],
    found: list[Diagnosis],
) -> Iterator[Loaded]:
    """Each expert once its WER and the base's have been measured; they are added to its diagnosis, which ``found`` gets."""
    before = decoder_of(base)
    for (diagnosis, expert), clips in zip(accepted(experts, base, speech), judged, strict=True):
        if clips:
            diagnosis.wer = {"base": _error_rate(before, clips), "fine-tune": _error_rate(decoder_of(expert), clips)}
        found.append(diagnosis)
        yield expert


def _hear_merged(model: Loaded, judged: Sequence[Sequence[Clip]], found: Sequence[Diagnosis]) -> None:
    """Measure what was written, each expert alone, and say what is lost."""
    shared = None if model.experts else decoder_of(model)
    for number, (diagnosis, clips) in enumerate(zip(found, judged, strict=True)):
        if not clips:
            continue
        decoder = shared or decoder_of(load_checkpoint(model.experts[number]))
        diagnosis.wer["merged"] = _error_rate(decoder, clips, diagnosis.name if shared else None)
        rates = ", ".join(f"{system} {100 * rate:.1f}" for system, rate in diagnosis.wer.items())
        logger.info("%s: WER %% of %d probe clips: %s", diagnosis.name, len(clips), rates)


def one_by_one(models: Iterable[Loaded]) -> Iterator[Loaded]:
    """Each is given up when the next is asked for: two large ones need not be there at once."""
    for model in models:
        yield model
        model.state.clear()


def accepted(
    experts: Mapping[str, str], base: Loaded, speech: Sequence[np.ndarray]
) -> Iterator[tuple[Diagnosis, Loaded]]:
    """Each expert, its faults logged. Raises ``ValueError`` for one that is refused."""
    for diagnosis, expert in examine(experts, base, speech):
        if expert is None:
            raise ValueError(f"{diagnosis.name}: cannot be merged: {'; '.join(diagnosis.reasons)}")
        level = logging.WARNING if diagnosis.verdict == "warn" else logging.INFO
        for reason in diagnosis.reasons:
            logger.log(level, "%s: %s", diagnosis.name, reason)
        yield diagnosis, expert


def add_expert(model: Path, expert: str, probe: str, base: str | None) -> None:
    """Write the merged model with one expert more in its place."""
    ((name, source),) = named_experts([expert]).items()
    merged, probed = load_checkpoint(model), list(clips_of(probe))
    clips = [samples for _, samples in probed]
    root = base_of({name: source}, base)
    check_languages(probe, probed, root)
    ((diagnosis, found),) = accepted({name: source}, root, clips[:1])
    grown = build.with_expert(merged, root, name, found, clips)
    grown = told_of(grown, name, language_of(diagnosis, probed), untimed=diagnosis.untimed)
    whole = chain(one_by_one(map(load_checkpoint, merged.experts)), [found] if merged.experts else ())
    remarks = "".join(f"; {reason}" for reason in diagnosis.reasons)
    _rewrite(model, grown, whole, f"Added: {name}, {shown(source)}; probe {shown(probe)}{remarks}.")
    logger.info("%s: %s added", model, name)


def remove_expert(model: Path, name: str) -> None:
    """Write the merged model without one of its experts in its place."""
    shrunk = build.without_expert(load_checkpoint(model), name)
    _rewrite(model, shrunk, one_by_one(map(load_checkpoint, shrunk.experts)), f"Removed: {name}.")
    logger.info("%s: %s removed", model, name)


def _rewrite(directory: Path, model: Loaded, experts: Iterable[Loaded], change: str) -> None:
    """``change``: a line for its card, where it has one."""
    quantize = read_manifest(directory).quantization is not None
    save_checkpoint(directory, model, quantize=quantize, overwrite=True, experts=experts)
    if (card := directory / CARD).is_file():
        with atomic_file(card) as file:
            file.write_bytes(card.read_bytes() + f"\n{change}\n".encode())
