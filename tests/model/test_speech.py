"""Text to mel frames: alone or packed the same, positions that do not drift, labels that CTC can place."""

from __future__ import annotations

import pytest
import torch
from model.speaking import TINY, tiny_speech
from torch import Tensor

from whisper_moe.config import POSITIONS_PER_SECOND
from whisper_moe.model.speech import LABELS_PER_LETTER, Prosody, SpeechModel, Spoken, positions_of
from whisper_moe.packing import Layout

LENGTHS = (5, 17, 9)
MODEL = tiny_speech()


def utterances(lengths: tuple[int, ...] = LENGTHS) -> list[tuple[Tensor, int, Prosody]]:
    random = torch.Generator().manual_seed(1)
    made = []
    for voice, length in enumerate(lengths):
        seconds, pitch, loudness = (torch.rand(length, generator=random) for _ in range(3))
        phonemes = torch.randint(len(TINY.phonemes), (length,), generator=random)
        made.append((phonemes, voice % len(TINY.voices), Prosody(seconds * 0.2 + 0.02, pitch, loudness)))
    return made


@torch.no_grad()
def said(model: SpeechModel, given: list[tuple[Tensor, int, Prosody]]) -> Spoken:
    phonemes, voices, prosody = zip(*given, strict=True)
    joined = Prosody(*(torch.cat(parts) for parts in zip(*prosody, strict=True)))
    return model(torch.cat(phonemes), Layout(map(len, phonemes)), torch.tensor(voices), joined)


def test_packed_utterances_sound_as_they_do_alone() -> None:
    given = utterances()
    packed = said(MODEL, given)
    alone = [said(MODEL, [each]) for each in given]
    for rows, own in zip(packed.frames.layout.slices(), alone, strict=True):
        torch.testing.assert_close(packed.frames.frames_PF[rows], own.frames.frames_PF, rtol=0, atol=1e-5)
    for field, found in zip(Prosody._fields, packed.own, strict=True):
        torch.testing.assert_close(found, torch.cat([getattr(own.own, field) for own in alone]), rtol=0, atol=1e-5)


def test_packed_texts_are_read_as_they_are_alone() -> None:
    texts = [phonemes for phonemes, *_ in utterances()]
    languages = torch.tensor([0, 1, 0])
    with torch.no_grad():
        packed = MODEL.reader(torch.cat(texts), Layout(LENGTHS), languages).split(
            [LABELS_PER_LETTER * n for n in LENGTHS]
        )
        for index, text in enumerate(texts):
            alone = MODEL.reader(text, Layout([len(text)]), languages[index : index + 1])
            torch.testing.assert_close(packed[index], alone, rtol=0, atol=1e-5)


def test_a_voice_an_order_and_a_prosody_are_heard() -> None:
    ((phonemes, voice, prosody),) = utterances((8,))
    base = said(MODEL, [(phonemes, voice, prosody)]).frames.frames_PF
    others = [
        (phonemes, voice + 1, prosody),
        (phonemes, voice, prosody._replace(pitch_T=prosody.pitch_T + 0.5)),
        (phonemes, voice, prosody._replace(loudness_T=prosody.loudness_T + 0.5)),
        (phonemes.roll(1), voice, prosody),
    ]
    for other in others:
        assert (said(MODEL, [other]).frames.frames_PF - base).abs().max() > 1e-3


def test_a_frame_looks_at_the_phonemes_around_its_own() -> None:
    """A change far behind does not reach the first frames through the text; through the other frames it may."""
    model = tiny_speech()
    for block in model.decoder.stack.blocks:
        torch.nn.init.zeros_(block.attn.out.weight)
        torch.nn.init.zeros_(block.conv.gate)
    for block in (*model.encoder.blocks,):
        torch.nn.init.zeros_(block.attn.out.weight)
        torch.nn.init.zeros_(block.conv.gate)
    ((phonemes, voice, prosody),) = utterances((60,))
    changed = phonemes.clone()
    changed[-5:] = (changed[-5:] + 1) % len(TINY.phonemes)
    one, other = (said(model, [(each, voice, prosody)]).frames.frames_PF for each in (phonemes, changed))
    assert torch.equal(one[:10], other[:10]) and (one[-2] - other[-2]).abs().max() > 1e-4


@pytest.mark.parametrize("steps", [0.011, 0.025, 0.03, 0.2])
def test_ends_are_where_they_are_said_to_be(steps: float) -> None:
    seconds = torch.full((200,), steps)
    counts, layout = positions_of(seconds, Layout([150, 50]))
    ends = counts[:150].cumsum(0) / POSITIONS_PER_SECOND
    assert (ends - seconds[:150].cumsum(0)).abs().max() <= 0.5 / POSITIONS_PER_SECOND + 1e-4
    assert layout.lengths == (int(counts[:150].sum()), int(counts[150:].sum()))


def test_a_rate_makes_it_shorter_and_an_utterance_has_a_frame() -> None:
    phonemes, layout, voice = torch.randint(len(TINY.phonemes), (30,)), Layout([30]), torch.tensor([0])
    slow, fast = (MODEL.speak(phonemes, layout, voice, torch.tensor([rate]))[0].shape[1] for rate in (1.0, 2.0))
    assert fast == pytest.approx(slow / 2, abs=2)
    assert positions_of(torch.tensor([1e-4]), Layout([1]))[1].lengths == (1,)


def test_what_the_reader_says_is_collapsed_as_ctc_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    slots = torch.tensor([0, 3, 3, 0, 3, 5, 5, 0, 5, 5, 0, 0])
    logs = torch.nn.functional.one_hot(slots, 1 + len(TINY.phonemes)).float()
    monkeypatch.setattr(type(MODEL.reader), "forward", lambda *_: logs)
    letters, languages = torch.zeros(3, dtype=torch.int64), torch.tensor([0, 0])
    first, second = MODEL.reader.phonemes(letters, Layout([2, 1]), languages)
    assert LABELS_PER_LETTER == 4 and first.tolist() == [2, 2, 4] and second.tolist() == [4]
