"""What is always on beside the core starts as the identity, exactly, is alive, and has a file of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from generate.tiny import CONFIG, tiny_whisper_moe
from model.tiny import random_texts, relative

from whisper_moe import WhisperMoE
from whisper_moe.config import DEFAULT_MARGIN, AdaptConfig, ModelConfig
from whisper_moe.generate.options import TranscribeOptions
from whisper_moe.model.inference import Arithmetic, prepare_for_inference
from whisper_moe.model.layers import Norm
from whisper_moe.model.model import WhisperMoEModel
from whisper_moe.weights.load import load_model
from whisper_moe.weights.parts import ADAPT, CORE, part_of, unstack
from whisper_moe.weights.upcycle import add_parts

ADAPT_BOTH = AdaptConfig(encoder_layers=(0, 1), decoder_layers=(0,), adapter_dim=4)
MELS, TEXTS = [torch.randn(CONFIG.n_mels, frames) for frames in (60, 31)], random_texts([5, 9])


def adapted(seed: int = 0) -> tuple[WhisperMoE, WhisperMoEModel]:
    """A model, and the same with an adapting part that has learned nothing."""
    plain = tiny_whisper_moe(seed)
    config, state = add_parts(plain.config, plain.model.state_dict(), adapt=ADAPT_BOTH)
    model = WhisperMoEModel(config).eval()
    model.load_state_dict(state)
    return plain, model


def shaken(model: WhisperMoEModel) -> WhisperMoEModel:
    """As if it had learned."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part_of(name, model.config) == ADAPT:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def test_it_starts_as_the_identity_and_alive() -> None:
    plain, model = adapted()
    logits = model(MELS, TEXTS).logits
    assert torch.equal(logits, plain.model(MELS, TEXTS).logits)
    logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        if "delta_" in name or "adapter.down" in name:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert not torch.equal(shaken(model)(MELS, TEXTS).logits, logits)


def test_what_cannot_be_adapted_is_refused() -> None:
    with pytest.raises(ValueError, match=r"adapt.decoder_layers \[1\] are beyond the decoder's 1 layers"):
        ModelConfig.model_validate(CONFIG.model_dump() | {"adapt": AdaptConfig(decoder_layers=(1,))})
    with pytest.raises(ValueError, match="full_windows: false is for the encoder"):
        AdaptConfig(encoder_layers=(0,), decoder_layers=(0,), full_windows=False)
    _, model = adapted()
    with pytest.raises(ValueError, match="has adapt already"):
        add_parts(model.config, model.state_dict(), adapt=ADAPT_BOTH)


def test_only_the_layers_that_are_named_are_adapted() -> None:
    config = CONFIG.model_copy(update={"adapt": AdaptConfig(encoder_layers=(1,), adapter_dim=4)})
    names = [name for name, _ in WhisperMoEModel(config).named_parameters() if "adapter" in name or "delta_" in name]
    assert names and all(name.startswith("encoder.blocks.1.") for name in names)
    slim = CONFIG.model_copy(update={"adapt": AdaptConfig(decoder_layers=(0,), norms=False, adapter_dim=4)})
    assert not any("delta_" in name for name, _ in WhisperMoEModel(slim).named_parameters())


def test_it_is_a_part_of_its_own() -> None:
    _, model = adapted()
    parts = {name: part_of(name, model.config) for name, _ in unstack(model.state_dict())}
    assert {name for name, part in parts.items() if part == ADAPT} == {
        name for name in parts if ".adapter." in name or "delta_" in name or ".ttt" in name
    }
    assert parts["encoder.blocks.0.attn_norm.weight"] == CORE


def test_it_is_written_and_read(tmp_path: Path) -> None:
    plain, model = adapted()
    shaken(model)
    WhisperMoE(model, plain.tokenizer, plain.generation, tokenizer_json=plain._tokenizer_json).save_pretrained(
        tmp_path / "m"
    )
    plain.save_pretrained(tmp_path / "plain")
    loaded = load_model(tmp_path / "m")
    assert loaded.config == model.config
    assert all(torch.equal(loaded.state[key], tensor) for key, tensor in model.state_dict().items())
    same = {path.name for path in (tmp_path / "plain").rglob("*.safetensors")}
    for name in same - {"adapt.safetensors"}:
        (ours,), (theirs,) = (list((tmp_path / folder).rglob(name)) for folder in ("m", "plain"))
        assert ours.read_bytes() == theirs.read_bytes(), f"{name} is the same without the adapting part"


FULL = 2 * CONFIG.max_source_positions
SHORT_ONLY = AdaptConfig(encoder_layers=(0, 1), adapter_dim=4, full_windows=False)


def for_short_windows() -> tuple[WhisperMoEModel, WhisperMoEModel]:
    """A model, and one that has learned something about short windows, TTT layers included."""
    plain = tiny_whisper_moe(0)
    with torch.no_grad():
        for name, parameter in plain.model.named_parameters():
            if ".ttt.gate_" in name:
                parameter.zero_()
    config, state = add_parts(plain.config, plain.model.state_dict(), adapt=SHORT_ONLY)
    model = WhisperMoEModel(config).eval()
    model.load_state_dict(state)
    assert config.ttt is not None and config.ttt.encoder_layers
    return plain.model, shaken(model)


@pytest.mark.parametrize("training", [False, True])
def test_full_windows_go_through_the_core_alone(training: bool) -> None:
    """Exactly, whatever shares their pack; short ones are adapted as they are alone."""
    plain, model = for_short_windows()
    full, short = torch.randn(CONFIG.n_mels, FULL), torch.randn(CONFIG.n_mels, FULL - 2)
    with torch.set_grad_enabled(training):
        assert torch.equal(model.encoder([full, full]).states_TD, plain.encoder([full, full]).states_TD)
        together, alone = model.encoder([short, full, short]), model.encoder([short]).states_TD
        first, middle, last = (together.states_TD[rows] for rows in together.layout.slices())
        assert relative(middle, plain.encoder([full]).states_TD) < 1e-5
        assert relative(first, alone) < 1e-5 and relative(last, alone) < 1e-5
        assert relative(alone, plain.encoder([short]).states_TD) > 1e-2


def test_full_windows_teach_the_core_alone() -> None:
    """What adapts it has the gradient of the short windows in the pack, and none without any."""
    model, full, short = for_short_windows()[1], torch.randn(CONFIG.n_mels, FULL), torch.randn(CONFIG.n_mels, FULL - 2)
    adapting = [p for name, p in model.encoder.named_parameters() if part_of(f"encoder.{name}", model.config) == ADAPT]

    def gradients(mels: list[torch.Tensor], wanted: int) -> tuple[torch.Tensor | None, ...]:
        encoded = model.encoder(mels)
        loss = encoded.states_TD[: encoded.layout.cu_seqlens[wanted]].square().sum()
        return torch.autograd.grad(loss, adapting, allow_unused=True)

    assert adapting and all(gradient is None for gradient in gradients([full, full], 2))
    for found, expected in zip(gradients([short, full], 1), gradients([short], 1), strict=True):
        assert found is not None and expected is not None and relative(found, expected) < 1e-4


def test_full_windows_alone_leave_a_gradient_to_what_learns() -> None:
    """Of 0: a pass that only what adapts the core could learn from is a pass all the same, in every process."""
    model, full = for_short_windows()[1], torch.randn(CONFIG.n_mels, FULL)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = part_of(name, model.config) == ADAPT
    model([full, full], [torch.tensor([1, 2]), torch.tensor([3])]).logits.sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert gradients and not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize(("arithmetic", "close"), [("float32", 1e-5), ("int8", 0.1)])
def test_arranged_full_windows_go_through_the_core_alone(arithmetic: Arithmetic, close: float) -> None:
    plain, model = for_short_windows()
    mels = [torch.randn(CONFIG.n_mels, frames) for frames in (FULL, FULL - 8)]
    expected = model.encoder(mels).states_TD.detach()
    prepare_for_inference(model, arithmetic), prepare_for_inference(plain, arithmetic)
    with torch.inference_mode():
        assert relative(model.encoder(mels).states_TD, expected) < close
        assert torch.equal(model.encoder(mels[:1]).states_TD, plain.encoder(mels[:1]).states_TD)


def test_a_model_that_was_trained_with_a_margin_is_given_that() -> None:
    plain = tiny_whisper_moe(0)
    for margin, kept in ((None, DEFAULT_MARGIN), (0.25, 0.25), (0.0, 0.0)):
        model = WhisperMoEModel(CONFIG.model_copy(update={"context_margin": margin}))
        spoken = WhisperMoE(model, plain.tokenizer, plain.generation)
        for asked, given in ((None, kept), (2.0, 2.0)):
            assert spoken._asked(TranscribeOptions(context_margin=asked)).margin == given
        assert spoken.context_margin == kept
    assert plain._asked(TranscribeOptions()).margin == TranscribeOptions().margin == DEFAULT_MARGIN


@pytest.mark.parametrize(("arithmetic", "close"), [("float32", 1e-5), ("int8", 0.1)])
def test_arranged_it_computes_the_same(arithmetic: Arithmetic, close: float) -> None:
    model = shaken(adapted()[1])
    expected = model(MELS, TEXTS).logits.detach()
    arranged = prepare_for_inference(model, arithmetic)
    assert not any(isinstance(module, Norm) and module.delta_weight is not None for module in arranged.modules())
    with torch.inference_mode():
        assert relative(arranged(MELS, TEXTS).logits, expected) < close
