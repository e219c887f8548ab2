"""Whispers of every published shape: saved by transformers, loaded by us, and their logits are transformers'.

Weights are random, so nothing is downloaded. The real widths, heads, mel bands and vocabularies; only large-v3 is less
deep (its 32 + 32 layers take 6 GB in float32, once for each side), and no layer of it differs from another in shape.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("whisper")
from parity.openai_whisper import hub_backend
from weights.whispers import hub_model, published

from whisper_moe.packing import Layout
from whisper_moe.weights.load import load_model
from whisper_moe.weights.parts import empty_model

TOLERANCE = 2e-4
SECONDS = 30


SHAPES = {
    "tiny.en": published(384, 6, (4, 4), 51_864),
    "base": published(512, 8, (6, 6), 51_865),
    "large-v3, 2 + 2 layers": published(1280, 20, (2, 2), 51_866, n_mels=128),
    "distil-small.en, 4 + 1 layers": published(768, 12, (4, 1), 51_864),
}
"""distil-whisper keeps all of the encoder's layers and a few of the decoder's."""
VOCABULARIES = {51_864: ("gpt2", 99), 51_865: ("multilingual", 99), 51_866: ("multilingual", 100)}


@pytest.mark.parametrize("name", SHAPES)
@torch.inference_mode()
def test_what_transformers_saved_computes_what_transformers_does(name: str, tmp_path: Path) -> None:
    config = SHAPES[name]
    reference = hub_model(config)
    reference.save_pretrained(tmp_path, max_shard_size="200MB")
    hub_backend(*VOCABULARIES[config.vocab_size]).save(str(tmp_path / "tokenizer.json"))
    generator = torch.Generator().manual_seed(1)
    mel = torch.randn(config.n_mels, SECONDS * 100, generator=generator)
    text = torch.randint(config.vocab_size, (6,), generator=generator)
    states = reference.model.encoder(mel[None]).last_hidden_state
    logits = reference(encoder_outputs=(states,), decoder_input_ids=text[None]).logits[0]
    del reference

    loaded = load_model(tmp_path)
    assert loaded.config == config
    assert loaded.tokenizer.vocab_size == config.vocab_size
    assert loaded.tokenizer.is_multilingual == (not name.endswith(".en") and ".en," not in name)
    model = empty_model(config)
    model.load_state_dict(loaded.state, assign=True)
    model.eval()
    assert states.std() > 0.1 and logits.std() > 0.1 and (logits[1:] - logits[:-1]).abs().max() > 0.01
    encoded = model.encoder([mel])
    ours = model.decoder.head(model.decoder(text, Layout([len(text)]), encoded).states_TD)
    assert (encoded.states_TD - states[0]).abs().max() < TOLERANCE * states.abs().max()
    assert (ours - logits).abs().max() < TOLERANCE * logits.abs().max()
