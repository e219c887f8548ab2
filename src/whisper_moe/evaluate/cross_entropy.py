"""How surprising the references are to a model: cross-entropy per token, teacher forced, on the shipped path.

A clip gets the margin of silence that it is transcribed with; its text gets the tokens that training gives it, and counted are
those that training counts, among all that the model could say: so a run's own evaluation has the same figure. Clips are packed
as in transcription.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from whisper_moe.config import SAMPLES_PER_POSITION
from whisper_moe.data.examples import IGNORED, ExampleConfig, ExampleReader
from whisper_moe.data.sample import Sample
from whisper_moe.generate.decode import WindowDecoder
from whisper_moe.media.mel import log_mel
from whisper_moe.packing import Layout, first_fit_decreasing

CLIPS_AT_ONCE = 32
"""Clips whose sound is held at a time."""


def cross_entropy(
    decoder: WindowDecoder, samples: Sequence[Sample], *, margin: float, language: str | None = None
) -> list[tuple[float, int] | str]:
    """For each sample the sum of −ln p over its tokens and their number, or why there is none.

    ``language``: in place of the samples' own, of what is heard and what is said.
    """
    found: list[tuple[float, int] | str] = [""] * len(samples)
    ready: list[tuple[int, list[int], list[int]]] = []
    reader = ExampleReader(decoder.tokenizer, decoder.model.config, ExampleConfig(empty_text=True))
    for index, sample in enumerate(samples):
        try:
            asked = replace(sample, language=language, target_language=language) if language else sample
            prompt, text = reader.tokens(asked)
            ready.append((index, [*prompt, *text], reader.labels(prompt, text)))
        except ValueError as error:
            found[index] = str(error)
    for first in range(0, len(ready), CLIPS_AT_ONCE):
        part = ready[first : first + CLIPS_AT_ONCE]
        for index, result in _scored(decoder, [samples[i] for i, _, _ in part], part, margin):
            found[index] = result
    return found


@torch.inference_mode()
def _scored(
    decoder: WindowDecoder, samples: Sequence[Sample], parts: Sequence[tuple[int, list[int], list[int]]], margin: float
) -> Iterator[tuple[int, tuple[float, int] | str]]:
    mels: dict[int, tuple[Tensor, int]] = {}
    for place, sample in enumerate(samples):
        assert sample.audio is not None
        sound = sample.audio.read()
        heard = decoder.positions(len(sound), 0)
        if len(sound) > decoder.window_positions * SAMPLES_PER_POSITION:
            yield parts[place][0], "it is longer than the model's window"
            continue
        length = decoder.positions(len(sound), margin) * SAMPLES_PER_POSITION
        mel = log_mel(torch.from_numpy(sound), decoder.model.config.n_mels, samples=length)
        mels[place] = mel.to(decoder.model.encoder.positions), heard
    places = list(mels)
    if not places:
        return
    for pack in first_fit_decreasing([-(-mels[place][0].shape[-1] // 2) for place in places]):
        chosen = [places[i] for i in pack]
        packed = [(*mels[place], *parts[place][1:]) for place in chosen]
        for place, result in zip(chosen, _pack(decoder, packed), strict=True):
            yield parts[place][0], result


def _pack(
    decoder: WindowDecoder, packed: Sequence[tuple[Tensor, int, list[int], list[int]]]
) -> list[tuple[float, int]]:
    """One pack: (mel, positions heard, tokens, labels) of each clip."""
    model = decoder.model
    encoded = model.encoder([mel for mel, *_ in packed], heard=[heard for _, heard, *_ in packed])
    layout = Layout(len(tokens) for _, _, tokens, _ in packed)
    flat = torch.tensor([token for _, _, tokens, _ in packed for token in tokens], device=encoded.states_TD.device)
    logits_TV = model.decoder.head(model.decoder(flat, layout, encoded)).float()
    results = []
    for rows, (_, _, _, labels) in zip(layout.slices(), packed, strict=True):
        wanted = torch.tensor(labels, device=logits_TV.device)
        lost = F.cross_entropy(logits_TV[rows], wanted, ignore_index=IGNORED, reduction="sum")
        results.append((float(lost), int((wanted != IGNORED).sum())))
    return results
