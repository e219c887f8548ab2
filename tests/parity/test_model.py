"""Our model with whisper-base's weights against transformers', in float32: states, logits, alignment."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
from transformers import WhisperForConditionalGeneration

from whisper_moe.config import POSITIONS_PER_SECOND, SAMPLE_RATE
from whisper_moe.media.audio import load_audio
from whisper_moe.media.mel import log_mel
from whisper_moe.model.block import Encoded
from whisper_moe.model.inference import prepare_for_inference
from whisper_moe.model.model import WhisperMoEModel
from whisper_moe.packing import Layout
from whisper_moe.weights.load import Loaded, load_model
from whisper_moe.weights.parts import empty_model

TOLERANCE = 2e-4
WINDOW = 30 * SAMPLE_RATE
NOISE_TEXT = [50258, 50259, 50359, 50363, 440, 1002, 11, 2221, 50257]
pytestmark = pytest.mark.usefixtures("_inference")


@pytest.fixture
def _inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def loaded(whisper_base: Path) -> Loaded:
    return load_model(whisper_base)


@pytest.fixture(scope="module")
def hub(whisper_base: Path) -> WhisperForConditionalGeneration:
    return WhisperForConditionalGeneration.from_pretrained(whisper_base, dtype=torch.float32).eval()


def make(loaded: Loaded) -> WhisperMoEModel:
    model = empty_model(loaded.config)
    model.load_state_dict(loaded.state, assign=True)
    return model.eval()


@pytest.fixture(scope="module")
def ours(loaded: Loaded) -> WhisperMoEModel:
    return make(loaded)


@dataclass(frozen=True)
class Window:
    """Thirty seconds, their text, and what transformers makes of both."""

    mel: Tensor
    text: Tensor
    states: Tensor
    logits: Tensor
    heard: int = 1500
    """Positions before the padding."""


@torch.inference_mode()
def window(hub: WhisperForConditionalGeneration, mel: Tensor, text: list[int], heard: int = 1500) -> Window:
    ids = torch.tensor(text)
    states = hub.model.encoder(mel[None]).last_hidden_state
    logits = hub(encoder_outputs=(states,), decoder_input_ids=ids[None]).logits
    return Window(mel, ids, states[0], logits[0], heard)


@pytest.fixture(scope="module")
def noise(hub: WhisperForConditionalGeneration) -> Window:
    return window(hub, torch.randn(80, 3000, generator=torch.Generator().manual_seed(0)), NOISE_TEXT)


@pytest.fixture(scope="module")
def speech(hub: WhisperForConditionalGeneration, loaded: Loaded, shared_data: Path) -> Window:
    """A recording, padded with silence, and the transcript that it came with."""
    folder = shared_data / "english-read"
    with (folder / "transcripts.tsv").open(encoding="utf-8") as table:
        first = next(csv.DictReader(table, delimiter="\t"))
    samples = torch.from_numpy(load_audio(folder / first["path"]))
    text = loaded.tokenizer.encode(" " + first["text"])
    mel, prompt = log_mel(samples, samples=WINDOW), [50258, 50259, 50359, 50363]
    return window(hub, mel, [*prompt, *text, 50257], heard=len(samples) * POSITIONS_PER_SECOND // SAMPLE_RATE)


def far(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def forced(model: WhisperMoEModel, windows: list[Window], encoded: Encoded) -> list[Tensor]:
    """Teacher-forced logits of every window."""
    layout = Layout(len(w.text) for w in windows)
    logits = model.decoder.head(model.decoder(torch.cat([w.text for w in windows]), layout, encoded).states_TD)
    return [logits[rows] for rows in layout.slices()]


def check(model: WhisperMoEModel, windows: list[Window]) -> None:
    """In one pack, and beside a short segment that transformers could not have encoded."""
    encoded = model.encoder([*(w.mel for w in windows), windows[0].mel[:, :321]])
    states = [encoded.states_TD[rows] for rows in encoded.layout.slices()]
    stray = Window(windows[0].mel, torch.tensor(NOISE_TEXT), states[-1], torch.empty(0))
    logits = forced(model, [*windows, stray], encoded)
    for index, expected in enumerate(windows):
        assert expected.states.std() > 0.1 and expected.logits.std() > 1
        assert far(states[index], expected.states) < TOLERANCE
        assert far(logits[index], expected.logits) < TOLERANCE


def test_states_and_logits_are_transformers(ours: WhisperMoEModel, noise: Window) -> None:
    check(ours, [noise])


def test_states_and_logits_of_a_recording_are_transformers(
    ours: WhisperMoEModel, noise: Window, speech: Window
) -> None:
    check(ours, [speech, noise])
    right = speech.logits[3:-1].argmax(-1) == speech.text[4:]
    assert right.float().mean() > 0.6, "the text is what is said, so that its logits are those of real use"


def test_logits_step_by_step_are_transformers(ours: WhisperMoEModel, noise: Window) -> None:
    """Two beams of one window; the prompt at once, then token by token."""
    encoded = ours.encoder([noise.mel])
    state = ours.decoder.start(encoded, beams=2)
    tokens = noise.text.expand(2, -1)
    steps = [ours.decoder.extend(part, state) for part in tokens.split([4, *[1] * (len(noise.text) - 4)], dim=1)]
    for beam in ours.decoder.head(torch.cat(steps, dim=1)):
        assert far(beam, noise.logits) < TOLERANCE


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_arranged_for_this_machine_it_is_as_exact_as_transformers(loaded: Loaded, speech: Window) -> None:
    """oneDNN adds up in another order. A few of the padding's states, of size 24, are then up to 3e-3 from transformers',
    which are themselves 1e-3 from those of float64; what is heard and the logits do not notice. By the CPU, they are up to
    2.2 times as far from float64's as transformers' are."""
    model, exact = make(loaded), make(loaded).double()
    prepare_for_inference(model)
    encoded = model.encoder([speech.mel])
    states = exact.encoder([speech.mel.double()]).states_TD
    assert 200 < speech.heard < 1000
    assert far(encoded.states_TD[: speech.heard], speech.states[: speech.heard]) < TOLERANCE
    assert far(encoded.states_TD, states) < 3 * far(speech.states, states)
    assert far(forced(model, [speech], encoded)[0], speech.logits) < TOLERANCE


def test_alignment_is_transformers_cross_attention(
    ours: WhisperMoEModel, hub: WhisperForConditionalGeneration, noise: Window
) -> None:
    heads = [(layer, head) for layer in (0, 3, 5) for head in (1, 7)]
    layout = Layout([len(noise.text)])
    encoded = Encoded(noise.states, Layout([len(noise.states)]), None)
    found = ours.decoder(noise.text, layout, encoded, heads).attention[0].softmax(-1)
    hub.set_attn_implementation("eager")  # the only one that gives its weights out
    output = hub(encoder_outputs=(noise.states[None],), decoder_input_ids=noise.text[None], output_attentions=True)
    expected = torch.stack([output.cross_attentions[layer][0, head] for layer, head in heads])
    assert expected.amax() > 0.05
    assert far(found, expected) < 1e-5
