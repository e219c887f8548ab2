"""The key map: Whisper in, Whisper out, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
from parity.openai_whisper import openai_name
from transformers import WhisperForConditionalGeneration, WhisperModel, WhisperProcessor, WhisperTokenizer
from weights.whispers import (
    CONFIGS,
    TINY,
    hub_config,
    hub_model,
    hub_state,
    published,
    random_state,
    same,
    write_folder,
)

from whisper_moe.config import ModelConfig, MoEConfig
from whisper_moe.model.model import WhisperMoEModel
from whisper_moe.weights.checkpoint import Loaded
from whisper_moe.weights.files import CheckpointError
from whisper_moe.weights.load import load_model, read_weights
from whisper_moe.weights.parts import expected_shapes
from whisper_moe.weights.whisper import (
    config_from_openai,
    config_from_whisper,
    config_to_whisper,
    save_whisper,
    state_from_openai,
    state_from_whisper,
    state_to_whisper,
)

SHAPES = {
    "tiny.en, 2 + 1 layers": published(384, 6, (2, 1), 51_864),
    "large-v3, 1 + 1 layers": published(1280, 20, (1, 1), 51_866, n_mels=128),
}
FULL = {
    "large-v3": published(1280, 20, (32, 32), 51_866, n_mels=128),
    "distil-large-v3": published(1280, 20, (32, 2), 51_866, n_mels=128),
}


def openai_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {openai_name(key): tensor for key, tensor in state.items()}


def comes_through(config: ModelConfig, folder: Path) -> None:
    """Saved by transformers in float16 and in shards, read as ours, mapped back: every tensor as it was."""
    with torch.device("meta"):
        model = WhisperForConditionalGeneration(hub_config(config))
    model = model.to_empty(device="cpu").to(torch.float16)
    model.tie_weights()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randint(-2048, 2048, parameter.shape, generator=generator, dtype=torch.int16))
    model.save_pretrained(folder, max_shard_size="100MB")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 1 or config.d_model < 768
    weights, origin = read_weights(folder)
    source = state_from_whisper(weights, config, origin=origin)
    back = state_to_whisper(source, config)
    expected = hub_state(model)
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[key].half(), expected[key]) and back[key].dtype == torch.float32 for key in back)
    assert {key: tuple(tensor.shape) for key, tensor in source.items()} == expected_shapes(config)


@pytest.mark.parametrize("name", SHAPES)
def test_published_shapes_come_through_unchanged(name: str, tmp_path: Path) -> None:
    comes_through(SHAPES[name], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_full_published_shapes_come_through_unchanged(name: str, tmp_path: Path) -> None:
    comes_through(FULL[name], tmp_path)


def test_our_model_with_the_mapped_weights_computes_what_transformers_does() -> None:
    """Also the order of query, key and value in a fused matrix, which no comparison of shapes would notice."""
    reference = hub_model()
    model = WhisperMoEModel(TINY)
    model.load_state_dict(state_from_whisper(hub_state(reference), TINY))
    mel, text = torch.randn(80, 40), torch.randint(0, TINY.vocab_size, (7,))
    with torch.no_grad():
        theirs = reference(input_features=mel[None], decoder_input_ids=text[None]).logits[0]
        ours = model.eval()([mel], [text]).logits
    assert theirs.std() > 0.01
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_there_and_back_is_exact_in_both_directions() -> None:
    theirs = hub_state(hub_model())
    ours = state_from_whisper(theirs, TINY)
    assert same(state_to_whisper(ours, TINY), theirs)
    assert same(state_from_whisper(state_to_whisper(ours, TINY), TINY), ours)
    assert config_from_whisper(config_to_whisper(TINY)) == TINY
    assert config_from_whisper(hub_config().to_dict()) == TINY


def test_a_bias_on_keys_changes_nothing_and_is_dropped() -> None:
    """It adds q·b to every logit of a query, and the softmax takes that away."""
    state = random_state(TINY)
    without = {key: tensor.clone() for key, tensor in state.items()}
    width = TINY.d_model
    for key, tensor in without.items():
        if key.endswith("attn.qkv.bias"):
            tensor[width : 2 * width] = 0
        elif key.endswith("cross_attn.kv.bias"):
            tensor[:width] = 0
    assert not same(state, without)
    assert same(state_from_whisper(state_to_whisper(state, TINY), TINY), without)
    mel, text = torch.randn(80, 40), torch.randint(0, TINY.vocab_size, (7,))
    outputs = []
    for weights in (state, without):
        model = WhisperMoEModel(TINY)
        model.load_state_dict(weights)
        outputs.append(model.double()([mel.double()], [text]).logits)
    assert torch.allclose(*outputs, atol=1e-9)


def test_openai_names_and_transformers_names_give_the_same_state() -> None:
    theirs = hub_state(hub_model())
    assert same(state_from_openai(openai_state(theirs), TINY), state_from_whisper(theirs, TINY))


def test_every_tensor_of_openais_own_model_is_taken() -> None:
    whisper_model = pytest.importorskip("whisper.model")
    dims = whisper_model.ModelDimensions(80, 20, 8, 2, 3, 50, 9, 8, 2, 1)
    config = config_from_openai(vars(dims))
    theirs = whisper_model.Whisper(dims)
    torch.nn.init.zeros_(theirs.decoder.positional_embedding)  # whatever lay in memory there may not be finite
    state = state_from_openai(theirs.state_dict(), config)
    assert config == TINY.model_copy(update={"vocab_size": 50, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32})
    WhisperMoEModel(config).load_state_dict(state)


def test_an_output_projection_equal_to_the_embedding_is_ignored_and_another_refused() -> None:
    theirs = hub_state(hub_model())
    embedding = theirs["model.decoder.embed_tokens.weight"]
    tied = theirs | {"proj_out.weight": embedding.clone()}
    assert same(state_from_whisper(tied, TINY), state_from_whisper(theirs, TINY))
    with pytest.raises(CheckpointError, match=r"a\.bin: proj_out\.weight differs"):
        state_from_whisper(theirs | {"proj_out.weight": embedding + 1e-6}, TINY, origin="a.bin")


def test_a_whisper_saved_without_its_head_is_taken() -> None:
    bare = WhisperModel(hub_config())
    state = state_from_whisper(bare.state_dict(), TINY)
    assert torch.equal(state["encoder.stem.conv1.weight"], bare.encoder.conv1.weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_floating_type_becomes_float32_in_memory_of_its_own(dtype: torch.dtype) -> None:
    theirs = {key: tensor.to(dtype) for key, tensor in hub_state(hub_model()).items()}
    state = state_from_whisper(theirs, TINY)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    untouched = theirs["model.encoder.layer_norm.bias"].clone()
    state["encoder.norm.bias"].zero_()
    assert torch.equal(theirs["model.encoder.layer_norm.bias"], untouched)


KEY = "model.encoder.layers.2.self_attn.v_proj.weight"


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({KEY: None}, f"lacks {KEY}"),
        ({"model.encoder.layers.2.self_attn.k_proj.bias": torch.zeros(8)}, "does not have: .*k_proj.bias"),
        ({KEY: torch.zeros(8, 7)}, r"v_proj.weight is \[8, 7\] torch.float32, must be \[8, 8\]"),
        ({KEY: torch.zeros(64)}, r"v_proj.weight is \[64\]"),
        ({KEY: torch.full((8, 8), float("nan"))}, "v_proj.weight is not finite"),
        ({KEY: torch.full((8, 8), float("-inf"))}, "v_proj.weight is not finite"),
        ({KEY: torch.zeros(8, 8, dtype=torch.int8)}, "v_proj.weight is .* torch.int8, must be .* torch.float32 or"),
    ],
    ids=["missing", "superfluous", "wrong shape", "wrong rank", "NaN", "infinity", "integers"],
)
def test_weights_that_do_not_fit_are_refused_by_name(change: dict[str, Tensor | None], cause: str) -> None:
    theirs = {key: tensor for key, tensor in (hub_state(hub_model()) | change).items() if tensor is not None}
    with pytest.raises(CheckpointError, match=f"folder/model.safetensors: .*{cause}"):
        state_from_whisper(theirs, TINY, origin="folder/model.safetensors")


def test_a_value_too_large_for_float32_is_refused() -> None:
    theirs: dict[str, Tensor] = hub_state(hub_model()) | {KEY: torch.full((8, 8), 1e300, dtype=torch.float64)}
    with pytest.raises(CheckpointError, match="not finite"):
        state_from_whisper(theirs, TINY)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"model_type": "wav2vec2"}, "model_type is 'wav2vec2'"),
        ({"model_type": None}, "model_type is None"),
        ({"activation_function": "relu"}, "activation_function is 'relu'"),
        ({"scale_embedding": True}, "scale_embedding is True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ({"d_model": "8"}, "d_model: Input should be a valid integer"),
        ({"encoder_layers": True}, "encoder_layers: Input should be a valid integer"),
        ({"vocab_size": None}, "vocab_size: Input should be a valid integer"),
        ({"encoder_attention_heads": 3}, "d_model .8. is not a multiple of encoder_heads"),
        ({"num_mel_bins": 0}, "n_mels: .*greater than or equal to 1"),
    ],
)
def test_configurations_that_are_no_whisper_are_refused(change: dict[str, object], cause: str) -> None:
    with pytest.raises(CheckpointError, match=f"here/config.json: {cause}"):
        config_from_whisper(config_to_whisper(TINY) | change, origin="here/config.json")


def test_a_configuration_far_larger_than_any_model_is_refused_before_anything_is_built() -> None:
    for name, size in (
        ("encoder_layers", 10**9),
        ("max_source_positions", 10**12),
        ("max_target_positions", 10**7),
        ("vocab_size", 10**20),
        ("decoder_ffn_dim", 10**20),
    ):
        with pytest.raises(CheckpointError, match=f"config.json: {name}: Input should be less than"):
            config_from_whisper(config_to_whisper(TINY) | {name: size})


def test_only_a_dense_model_goes_back() -> None:
    config = TINY.model_copy(update={"moe": MoEConfig(n_experts=2, expert_dim=4)})
    with pytest.raises(ValueError, match="only a dense model is a Whisper; this one has moe"):
        state_to_whisper(random_state(config), config)


# The way back, as a folder


def test_what_comes_in_goes_out_and_comes_in_again(tmp_path: Path) -> None:
    source = load_model(write_folder(tmp_path / "in", hub_model()))
    save_whisper(tmp_path / "out", source)
    again = load_model(tmp_path / "out")
    assert same(again.state, source.state)
    assert (again.config, again.generation, again.tokenizer_json) == (
        source.config,
        source.generation,
        source.tokenizer_json,
    )


def test_transformers_loads_model_and_processor(tmp_path: Path) -> None:
    save_whisper(tmp_path / "out", load_model(write_folder(tmp_path / "in", hub_model())))
    model = WhisperForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert same(hub_state(model), hub_state(hub_model()))
    assert model.config.decoder_start_token_id == model.generation_config.decoder_start_token_id == 257
    processor = WhisperProcessor.from_pretrained(tmp_path / "out")
    assert processor.tokenizer.decode(processor.tokenizer("नमस्ते", add_special_tokens=False).input_ids) == "नमस्ते"
    mel = processor.feature_extractor(torch.randn(16_000).numpy(), sampling_rate=16_000, return_tensors="pt")
    assert mel.input_features.shape == (1, 80, 3000)


def test_experts_and_existing_directories_are_refused(tmp_path: Path) -> None:
    shared, dense = (Loaded(CONFIGS[name], random_state(CONFIGS[name]), {}, b"{}") for name in ("shared", "dense"))
    with pytest.raises(ValueError, match="this one has moe and ttt"):
        save_whisper(tmp_path / "out", shared)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="exists already"):
        save_whisper(tmp_path, dense)


def test_whisper_base_goes_out_as_it_came_in(whisper_base: Path, tmp_path: Path) -> None:
    save_whisper(tmp_path / "out", load_model(whisper_base))
    model = WhisperForConditionalGeneration.from_pretrained(tmp_path / "out")
    reference = WhisperForConditionalGeneration.from_pretrained(whisper_base, dtype=torch.float32)
    assert same(hub_state(model), hub_state(reference))
    ours, theirs = model.generation_config.to_dict(), reference.generation_config.to_dict()
    assert {key: ours[key] for key in theirs if key != "transformers_version"} == {
        key: theirs[key] for key in theirs if key != "transformers_version"
    }
    ours_tokenizer, their_tokenizer = (WhisperTokenizer.from_pretrained(f) for f in (tmp_path / "out", whisper_base))
    text = "Hello नमस्ते 你好 <|en|>"
    assert ours_tokenizer(text).input_ids == their_tokenizer(text).input_ids
