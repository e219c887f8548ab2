"""Is a fine-tune worth merging? Facts about its weights and its answers, a verdict with the reason; and the card that says it.

People's fine-tunes are uneven: some were trained for ten steps, some lost timestamps or the sense of silence, some are another
size. What cannot be merged is refused, what is doubtful is warned of.

A merged model's card is its ``README.md``, as the Hub shows it, and no part of the checkpoint: people may edit it. What it says
was read or measured while merging; a licence is named only where a source's own card names one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import whisper_moe
from whisper_moe.config import SAMPLE_RATE
from whisper_moe.evaluate.report import markdown_table
from whisper_moe.evaluate.run import shown
from whisper_moe.media.mel import window_mel
from whisper_moe.merge.build import decoder_of, spectrum
from whisper_moe.weights.checkpoint import CARD, Loaded
from whisper_moe.weights.files import CheckpointError, atomic_file, listed
from whisper_moe.weights.load import hub_id, load_model, resolve, under
from whisper_moe.weights.tokens import stated_language

Verdict = Literal["use", "warn", "refuse"]
HARDLY_MOVED = 4e-4
"""‖W_e − W‖ / ‖W‖ of all matrices below which an expert is the base: ten steps at a rate of 1e-5 move less."""
ANOTHER_BASE = 0.5
"""… above which it is no fine-tune of this base: a hundred thousand steps move less."""
TWINS = 0.98
"""Cosine of two experts' differences above which they are one expert twice."""
LEAST_SILENCE = 0.5
"""Of the base's probability that a silent window holds no speech; an expert below has lost the sense of it."""
LEAST_TIMES = 0.1
"""Probability of a timestamp where the base would write one for sure, below which an expert has lost them."""
_HALF = torch.finfo(torch.float16).max


@dataclass
class Diagnosis:
    """What is known of one expert."""

    name: str
    verdict: Verdict = "use"
    reasons: list[str] = field(default_factory=list)
    moved: float | None = None
    """‖W_e − W‖ / ‖W‖ of all matrices."""
    layers: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Of each block, and of the rest by name: how far it moved, and the effective rank of that (Roy and Vetterli, 2007)."""
    no_speech: float | None = None
    """Probability that a silent window holds no speech."""
    timestamps: float | None = None
    """Probability that a text begins with a timestamp, where times are asked for."""
    untimed: bool = False
    """Whether it has lost timestamps."""
    largest_activation: float | None = None
    wer: dict[str, float] = field(default_factory=dict)
    """On each development set."""
    language: str | None = None
    """The one that it says it is for."""

    def find(self, verdict: Verdict, reason: str) -> None:
        self.reasons.append(reason)
        if verdict == "refuse" or self.verdict == "use":
            self.verdict = verdict


def examine(
    experts: Mapping[str, str], base: Loaded, speech: Sequence[np.ndarray] = ()
) -> Iterator[tuple[Diagnosis, Loaded | None]]:
    """A diagnosis for each expert (name → source), and its weights unless they are refused.

    ``speech``: clips of each that show whether it still writes times; without, that is not tested.
    """
    seen: dict[str, Tensor] = {}
    clips = dict(zip(experts, speech, strict=False))
    before = _Ear(base, list(clips.values()))
    times = dict(zip(clips, before.timestamps, strict=True))
    for name, source in experts.items():
        found = Diagnosis(name)
        try:
            if other := _another_base(source, base):
                what = "not for this base: how they differ becomes part of it"
                found.find("warn", f"its adapter was made for {other}, {what}")
            expert = load_model(source)
        except (CheckpointError, OSError) as error:
            found.find("refuse", str(error))
            yield found, None
            continue
        if reason := misfit(expert, base):
            found.find("refuse", reason)
            yield found, None
            continue
        if ttt := expert.config.ttt:
            sides = {"encoder": ttt.encoder_layers, "decoder": ttt.decoder_layers}
            told = (f"{side} layers {', '.join(map(str, layers))}" for side, layers in sides.items() if layers)
            found.find("use", f"brings TTT in {' and '.join(told)}")
        found.language = stated_language(expert.generation, expert.tokenizer)
        _weigh(found, expert.state, base.state)
        _listen(found, _Ear(expert, [clips[name]] if name in clips else []), before.no_speech, times.get(name))
        own = _sketch(expert.state, base.state)
        for name, other in seen.items():
            if (cosine := float(own @ other)) > TWINS:
                found.find("warn", f"nearly the same as {name} (cosine of the differences {cosine:.3f})")
        seen[found.name] = own
        yield found, expert if found.verdict != "refuse" else None


def _another_base(source: str, base: Loaded) -> str | None:
    """What an adapter belongs to, where that has other weights than the base."""
    at = resolve(source)
    if at.kind != "adapter":
        return None
    own = under(at)
    state = load_model(own.path).state
    same = all(torch.equal(state.get(key, tensor[:0]), tensor) for key, tensor in base.state.items())
    return None if same else own.name


def misfit(expert: Loaded, base: Loaded) -> str | None:
    """Why an expert cannot be a fine-tune of the base, in words."""
    config = expert.config
    if config.moe or config.adapt or config.conformer:
        return "it is no dense Whisper: it has experts, adapters or convolution modules of its own"
    if base.config.ttt:
        return "the base has TTT layers, which only experts may bring"
    ours, theirs = base.config.model_dump(), config.model_dump()
    other = [key for key in ours if ours[key] != theirs[key] and key not in ("context_margin", "ttt")]
    if other:
        return "another architecture: " + ", ".join(f"{key} {theirs[key]}, the base has {ours[key]}" for key in other)
    theirs, ours = (model.tokenizer.vocabulary for model in (expert, base))
    if other := sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)):
        return f"another vocabulary: {listed(other)}"
    return None


def _weigh(found: Diagnosis, expert: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> None:
    """How far each block moved, and in how many directions."""
    sums: dict[str, list[float]] = {}
    for key, tensor in base.items():
        if tensor.ndim < 2:
            continue
        change, group = expert[key] - tensor, sums.setdefault(_group(key), [0.0, 0.0, 0.0, 0.0])
        group[0] += float(change.norm(dtype=torch.float64)) ** 2
        group[1] += float(tensor.norm(dtype=torch.float64)) ** 2
        if ".blocks." in key:
            group[2] += _effective_rank(change.flatten(1))
            group[3] += 1
    found.layers = {
        name: (math.sqrt(change / weight) if weight else 0.0, rank / matrices if matrices else 0.0)
        for name, (change, weight, rank, matrices) in sums.items()
    }
    blocks = [group for name, group in sums.items() if "blocks" in name]
    found.moved = math.sqrt(sum(group[0] for group in blocks) / sum(group[1] for group in blocks))
    if found.moved < HARDLY_MOVED:
        found.find("warn", f"hardly moved from the base ({found.moved:.1e} of its norm): an expert of a few steps")
    elif found.moved > ANOTHER_BASE:
        found.find("refuse", f"no fine-tune of this base: it differs by {found.moved:.0%} of its norm")


def _group(key: str) -> str:
    """``encoder.blocks.3`` of a tensor in it; else the module's name."""
    parts = key.split(".")
    return ".".join(parts[:3]) if parts[1] == "blocks" else ".".join(parts[:2])


def _effective_rank(change_OI: Tensor) -> float:
    """exp of the entropy of the singular values' shares."""
    values = spectrum(change_OI).sqrt()
    if not float(values.sum()):
        return 0.0
    shares = values / values.sum()
    return float(torch.exp(-torch.special.xlogy(shares, shares).sum()))


def _sketch(expert: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> Tensor:
    """The difference of all blocks as one unit vector: every 61st number, for comparing experts with each other."""
    parts = [expert[key].flatten()[::61] - base[key].flatten()[::61] for key in base if ".blocks." in key]
    vector = torch.cat(parts)
    return vector / vector.norm().clamp_min(1e-30)


def _listen(found: Diagnosis, ear: _Ear, no_speech: float, before: float | None) -> None:
    """What the expert answers to silence, noise and speech; ``no_speech`` and ``before``: what the base does."""
    times = ear.timestamps[0] if ear.timestamps else None
    found.no_speech, found.timestamps, found.largest_activation = ear.no_speech, times, ear.largest
    if not math.isfinite(ear.largest):
        found.find("refuse", "its answer to noise is not finite (NaN or infinity)")
    elif ear.largest > _HALF:
        found.find("warn", f"overflows in half precision: activations up to {ear.largest:.0f}")
    if ear.no_speech < LEAST_SILENCE * no_speech and no_speech > 0.1:  # else the base has none to lose
        found.find("warn", f"lost the sense of silence: no speech {ear.no_speech:.0%} sure, the base {no_speech:.0%}")
    if times is not None and before is not None and times < LEAST_TIMES < before:
        found.untimed = True
        found.find("warn", f"lost timestamps: {times:.0%} sure of one at the start, the base {before:.0%}")


class _Ear:
    """A model's answer to two seconds of silence, to two of noise, and to each clip of speech."""

    @torch.inference_mode()
    def __init__(self, model: Loaded, speech: Sequence[np.ndarray]) -> None:
        network = decoder_of(model).model
        self.largest = 0.0
        for module in network.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(self._note)
        noise = 0.05 * torch.randn(2 * SAMPLE_RATE, generator=torch.Generator().manual_seed(0)).numpy()
        tokenizer, positions = model.tokenizer, model.config.max_source_positions
        prefix = torch.tensor(tokenizer.sot_sequence("en", "transcribe"))
        times = slice(tokenizer.timestamp_begin, tokenizer.timestamp_end + 1)
        clips: list[np.ndarray] = [np.zeros_like(noise), noise, *(each[: 30 * SAMPLE_RATE] for each in speech)]
        first, last = [], []
        for clip in clips:
            logits = network([window_mel(clip, model.config.n_mels, positions)], [prefix]).logits
            first.append(float(logits[0].softmax(-1)[tokenizer.no_speech]))
            last.append(float(logits[-1].softmax(-1)[times].sum()))
        self.no_speech, self.timestamps = first[0], last[2:]

    def _note(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.largest = max(self.largest, float(output.abs().max())) if output.isfinite().all() else math.inf


# The card of a merged model

SYSTEMS = ("base", "fine-tune", "merged")
"""Whose WER is measured: the base's, the expert's as it was, and of the merged model where that expert alone may answer."""
_CARD = """---
{head}
---

# {name}

Fine-tunes of {base} as the experts of one model, which chooses among them for each window of up to 30 s; *none* is the base
itself. Made by `whisper-moe merge` {version}, granularity `{kind}`. Nothing was trained: the router was fitted to clips.

{experts}

{lost}## Use

    whisper-moe transcribe talk.m4a --model {name} --show-routing
"""
_LOST = """## What is lost

WER, %, on probe clips that have a text, greedily and in the language that they state: the base, the fine-tune alone,
and this model where that expert alone may answer. The fine-tune may have been trained on these clips.

{rates}

"""


class Member(NamedTuple):
    """An expert, and what is known of it; the diagnosis' ``wer`` is of :data:`SYSTEMS`."""

    source: str
    probe: str
    languages: Sequence[str]
    """Of the probe's clips."""
    measured: int
    """Clips whose WER was measured."""
    found: Diagnosis

    @property
    def rates(self) -> list[str]:
        return [f"{100 * self.found.wer[system]:.1f}" for system in SYSTEMS]


def write_card(folder: Path, base: str, model: Loaded, members: Sequence[Member], none: Sequence[str]) -> None:
    """``base``: its source, like the members'; ``none``: the probes that are for no expert."""
    moe = model.config.moe
    assert moe is not None
    sources = [each for each in (base, *(member.source for member in members)) if not Path(each).exists()]
    head: dict[str, str | list[str]] = {
        "language": sorted({code for member in members for code in member.languages if code}),
        "base_model": [known for each in sources if (known := hub_id(each))],
        "base_model_relation": "merge",
        "pipeline_tag": "automatic-speech-recognition",
        "tags": ["whisper", "mixture-of-experts"],
    }
    rows = [
        (each.found.name, each.source, ", ".join(each.languages), shown(each.probe), "; ".join(each.found.reasons))
        for each in members
    ]
    rows += [("none", base, "", ", ".join(map(shown, none)), "")]
    experts = [(name, shown(source), _licence(source), *rest) for name, source, *rest in rows]
    measured = [(each.found.name, str(each.measured), *each.rates) for each in members if each.measured]
    text = _CARD.format(
        head="\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items() if value),
        name=folder.resolve().name,
        base=shown(base),
        version=whisper_moe.__version__,
        kind=f"{moe.granularity}`, rank `{moe.delta_rank}" if moe.granularity == "delta" else moe.granularity,
        experts=markdown_table(("expert", "source", "stated licence", "languages", "probe", "doctor"), experts),
        lost=_LOST.format(rates=markdown_table(("expert", "clips", *SYSTEMS), measured)) if measured else "",
    )
    with atomic_file(folder / CARD) as file:
        file.write_text(text, encoding="utf-8")


def _licence(source: str) -> str:
    """As the head of its card says, where there is one on this disk."""
    from huggingface_hub import metadata_load
    from yaml import YAMLError

    try:
        head = metadata_load(resolve(source).path / CARD) or {}
    except (OSError, ValueError, YAMLError):
        return ""
    return str(head.get("license") or "")
