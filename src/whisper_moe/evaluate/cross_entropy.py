"""How surprising the references are to a model: cross-entropy per token, teacher forced, on the shipped path.

A clip gets the margin of silence that it is transcribed with, and the prompt that a transcript without times begins with;
counted are the tokens of its text and the end of text. Clips are packed as in transcription.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from whisper_moe.data.sample import Sample
from whisper_moe.generate.decode import SAMPLES_PER_POSITION, WindowDecoder
from whisper_moe.media.languages import UNSPACED_LANGUAGES
from whisper_moe.media.mel import log_mel
from whisper_moe.packing import Layout, first_fit_decreasing

CLIPS_AT_ONCE = 32
"""Clips whose sound is held at a time."""


def cross_entropy(
    decoder: WindowDecoder, samples: Sequence[Sample], *, margin: float, language: str | None = None
) -> list[tuple[float, int] | str]:
    """For each sample the sum of −ln p over its tokens and their number, or why there is none.

    ``language``: in place of the samples' own.
    """
    found: list[tuple[float, int] | str] = [""] * len(samples)
    ready: list[tuple[int, list[int], list[int]]] = []
    for index, sample in enumerate(samples):
        try:
            ready.append((index, *_tokens(decoder, sample, language)))
        except ValueError as error:
            found[index] = str(error)
    for first in range(0, len(ready), CLIPS_AT_ONCE):
        part = ready[first : first + CLIPS_AT_ONCE]
        for index, result in _scored(decoder, [samples[i] for i, _, _ in part], part, margin):
            found[index] = result
    return found


def _tokens(decoder: WindowDecoder, sample: Sample, language: str | None) -> tuple[list[int], list[int]]:
    """The prompt, and what is counted after it."""
    tokenizer = decoder.tokenizer
    if sample.audio is None or sample.task not in ("transcribe", "translate"):
        raise ValueError(f"the model does not take the task {sample.task}")
    spoken = language or sample.language
    prompt = [*tokenizer.sot_sequence(spoken, sample.task), tokenizer.no_timestamps]
    said = sample.text.strip()
    space = "" if sample.target_language in UNSPACED_LANGUAGES else " "
    text = [*(tokenizer.encode(space + said) if said else []), tokenizer.eot]
    room = decoder.model.config.max_target_positions
    if len(prompt) + len(text) - 1 > room:
        raise ValueError(f"its text has more tokens than the decoder has positions ({room})")
    return prompt, text


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
    """One pack: (mel, positions heard, prompt, text) of each clip."""
    model = decoder.model
    encoded = model.encoder([mel for mel, *_ in packed], heard=[heard for _, heard, *_ in packed])
    inputs = [[*prompt, *text[:-1]] for _, _, prompt, text in packed]
    layout = Layout(map(len, inputs))
    flat = torch.tensor([token for tokens in inputs for token in tokens], device=encoded.states_TD.device)
    logits_TV = model.decoder.own_logits(model.decoder(flat, layout, encoded)).float()
    results = []
    for rows, (_, _, prompt, text) in zip(layout.slices(), packed, strict=True):
        own = logits_TV[rows][len(prompt) - 1 :]
        wanted = torch.tensor(text, device=own.device)
        results.append((float(F.cross_entropy(own, wanted, reduction="sum")), len(text)))
    return results
