"""The decoder of one group after the other: alone or side by side the same, ended by itself, guided along the diagonal."""

from __future__ import annotations

import torch
from model.speaking import TINY
from model.test_speech import LENGTHS, utterances

from whisper_moe.model.speech import STEPS_A_PHONEME, Autoregressive, Prosody, SpeechModel, _off_diagonal, positions_of
from whisper_moe.packing import Layout

CONFIG = TINY.model_copy(update={"decoder": "autoregressive", "reduction": 3})


def model(stop: float = -4.0) -> SpeechModel:
    torch.manual_seed(0)
    made = SpeechModel(CONFIG).eval()
    assert isinstance(made.decoder, Autoregressive)
    with torch.no_grad():
        made.decoder.stop.weight.mul_(8)
        made.decoder.stop.bias.fill_(stop)
    return made


def test_taught_utterances_are_the_same_packed_and_alone() -> None:
    speaks, given = model(), utterances()
    frames = [
        torch.randn(positions_of(each.seconds_T, Layout([n]))[1].total, 160)
        for n, (*_, each) in zip(LENGTHS, given, strict=True)
    ]

    def taught(chosen: list[int]) -> torch.Tensor:
        phonemes, voices, prosody = zip(*(given[i] for i in chosen), strict=True)
        joined = Prosody(*(torch.cat(parts) for parts in zip(*prosody, strict=True)))
        where = Layout(map(len, phonemes))
        with torch.no_grad():
            said = speaks(
                torch.cat(phonemes), where, torch.tensor(voices), joined, torch.cat([frames[i] for i in chosen])
            )
        assert said.frames.losses.keys() == {"coarse", "stop", "guide"} and said.frames.frames_PF.shape == (
            sum(len(frames[i]) for i in chosen),
            160,
        )
        return said.frames.frames_PF

    packed = taught([0, 1, 2])
    torch.testing.assert_close(packed, torch.cat([taught([i]) for i in range(3)]), rtol=0, atol=1e-5)
    for parameter in speaks.decoder.post_out.parameters():  # the post-net sees both ways
        torch.nn.init.zeros_(parameter)
    before = taught([1])
    frames[1][-6:] += 1.0  # what is said later changes nothing before it
    torch.testing.assert_close(taught([1])[:-6], before[:-6], rtol=0, atol=1e-5)
    assert (taught([1])[-3:] - before[-3:]).abs().max() > 1e-3


def test_utterances_side_by_side_end_when_they_would_alone() -> None:
    speaks = model()
    texts = [phonemes for phonemes, *_ in utterances()]
    voices, rates = torch.tensor([0, 1, 2]), torch.ones(3)
    together = speaks.speak(torch.cat(texts), Layout(LENGTHS), voices, rates)
    for index, text in enumerate(texts):
        (alone,) = speaks.speak(text, Layout([len(text)]), voices[index : index + 1], rates[:1])
        torch.testing.assert_close(together[index], alone, rtol=0, atol=1e-4)
    (endless,) = model(-1e4).speak(texts[0], Layout([5]), voices[:1], rates[:1])
    (short,) = model(1e4).speak(texts[0], Layout([5]), voices[:1], rates[:1])
    assert endless.shape[1] == 2 * 3 * STEPS_A_PHONEME * 5 and short.shape[1] == 2 * 3


def test_attention_along_the_diagonal_costs_nothing() -> None:
    along = 50 * torch.eye(20)[None]
    assert _off_diagonal([along]) < 1e-3 < _off_diagonal([along.flip(1)]) / 20
