"""The configuration: what is refused, by name, and what the presets are made of."""

from __future__ import annotations

import json
from math import prod
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from whisper_moe.config import PRESETS, ModelConfig, MoEConfig, TTTConfig, problems
from whisper_moe.weights.parts import expected_shapes


@pytest.mark.parametrize("kind", [ModelConfig, MoEConfig, TTTConfig])
def test_a_typing_mistake_in_a_file_is_an_error(kind: type[BaseModel]) -> None:
    with pytest.raises(ValidationError, match=r"top_q\n.*Extra inputs are not permitted"):
        kind.model_validate({"top_q": 2})


@pytest.mark.parametrize(
    ("change", "field", "cause"),
    [
        ({"d_model": "wide"}, "d_model", "valid integer"),
        ({"vocab_size": float("nan")}, "vocab_size", "finite number"),
        ({"decoder_layers": 0}, "decoder_layers", "greater than or equal to 1"),
        ({"d_model": 7, "encoder_heads": 1, "decoder_heads": 1}, "d_model", "multiple of 2"),
        ({"d_model": 2, "encoder_heads": 1, "decoder_heads": 1}, "d_model", "greater than or equal to 4"),
        ({"moe": {"scope": "layer"}}, "moe.scope", "'segment' or 'token'"),
        ({"ttt": {"base_lr": float("nan")}}, "ttt.base_lr", "finite number"),
        ({"ttt": {"mini_batch": 2049}}, "ttt.mini_batch", "less than or equal to 2048"),
        ({"model_type": "whisper"}, "model_type", "'whisper_moe'"),
        ({"format_version": 2}, "format_version", "should be 1"),
        ({"new_tokens": ["or"]}, "", "new_tokens must be different names such as <|or|>, got ['or']"),
        ({"new_tokens": ["<|or|>", "<|or|>"]}, "", "must be different names such as <|or|>"),
        (
            {"vocab_size": 1, "new_tokens": ["<|or|>"]},
            "",
            "vocab_size (1) counts the 1 new tokens and the source's own",
        ),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_its_name(change: dict[str, Any], field: str, cause: str) -> None:
    with pytest.raises(ValidationError) as caught:
        ModelConfig.model_validate(change)
    found = [(".".join(map(str, error["loc"])), error["msg"]) for error in caught.value.errors()]
    assert [name for name, _ in found] == [field]
    assert cause in found[0][1]


def test_findings_are_one_line_that_names_each_field() -> None:
    with pytest.raises(ValidationError) as caught:
        ModelConfig.model_validate({"d_model": "wide", "moe": {"top_k": 9}})
    said = problems(caught.value)
    assert said.startswith("d_model: Input should be a valid integer") and "\n" not in said
    assert said.endswith("; moe: top_k (9) is greater than n_experts (8)")
    with pytest.raises(ValidationError) as caught:
        ModelConfig(vocab_size=1, new_tokens=("<|or|>",))
    assert problems(caught.value).startswith("vocab_size (1) counts"), (
        "what concerns several fields has no name before it"
    )


def test_new_tokens_are_counted_in_the_vocabulary() -> None:
    config = ModelConfig(vocab_size=51_867, new_tokens=("<|or|>", "<|sat|>"))
    assert config.source_vocab_size == 51_865
    assert ModelConfig().source_vocab_size == ModelConfig().vocab_size


PER_EXPERT = TTTConfig(encoder_layers=(3,), per_expert=True)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"encoder_heads": 7}, r"d_model \(512\) is not a multiple of encoder_heads \(7\)"),
        ({"decoder_heads": 7}, r"d_model \(512\) is not a multiple of decoder_heads \(7\)"),
        ({"moe": {"n_experts": 2, "top_k": 3}}, r"top_k \(3\) is greater than n_experts \(2\)"),
        ({"moe": {"shared": False}}, "none_choice needs shared=True"),
        ({"moe": {"n_experts": 2, "expert_names": ["a", "a"]}}, "must be 2 different names"),
        ({"moe": {"router_layer": 7}}, r"router_layer \(7\) is beyond the encoder's 6 layers"),
        ({"ttt": {"encoder_layers": [0, 6, -1]}}, r"ttt.encoder_layers \[6, -1\] are beyond the encoder's 6 layers"),
        ({"ttt": {"decoder_layers": [6]}}, r"ttt.decoder_layers \[6\] are beyond the decoder's 6 layers"),
        (
            {"ttt": {"encoder_layers": [0]}, "d_model": 24, "decoder_heads": 1},
            r"ttt.encoder_layers need heads of an even width .*: d_model \(24\) / encoder_heads \(8\)",
        ),
        (
            {"ttt": {"decoder_layers": [0]}, "d_model": 24, "encoder_heads": 1},
            r"ttt.decoder_layers need heads of an even width .*: d_model \(24\) / decoder_heads \(8\)",
        ),
        ({"ttt": PER_EXPERT}, "needs experts that are chosen per segment"),
        ({"ttt": PER_EXPERT, "moe": {"scope": "token"}}, "needs experts that are chosen per segment"),
        (
            {"ttt": {"encoder_layers": [1, 2], "per_expert": True}, "moe": {"router_layer": 2}},
            r"encoder layers \[1\] come before the router's choice",
        ),
        (
            {"ttt": {"decoder_layers": [0], "per_expert": True}, "moe": {}},
            "the decoder's TTT layers serve all experts",
        ),
    ],
)
def test_parts_that_do_not_fit_each_other_are_refused(change: dict[str, Any], cause: str) -> None:
    with pytest.raises(ValidationError, match=cause):
        ModelConfig.model_validate(change)


def test_what_borders_on_the_refused_is_accepted() -> None:
    assert ModelConfig(moe=MoEConfig(router_layer=6)).routed("decoder", 0)
    assert ModelConfig(moe=MoEConfig(), ttt=PER_EXPERT).ttt == PER_EXPERT
    assert MoEConfig(n_experts=2, top_k=2).top_k == 2
    assert TTTConfig(mini_batch=2048).mini_batch == 2048
    odd_but_without_ttt = ModelConfig(d_model=24, encoder_heads=1, ttt=TTTConfig(encoder_layers=(0,)))
    assert odd_but_without_ttt.decoder_heads == 8
    one_layer = ModelConfig(encoder_layers=1, moe=MoEConfig(scope="token"))
    assert one_layer.routed("encoder", 0), "router_layer means nothing where every token is routed"


def test_which_blocks_are_routed() -> None:
    segment, token = (ModelConfig(moe=MoEConfig(router_layer=2, scope=scope)) for scope in ("segment", "token"))
    assert [segment.routed("encoder", i) for i in range(4)] == [False, False, True, True]
    assert all(segment.routed("decoder", i) and token.routed("decoder", i) for i in range(6))
    assert all(token.routed("encoder", i) for i in range(6))
    assert not ModelConfig().routed("decoder", 0)


def test_a_configuration_is_written_and_read_unchanged_and_never_changed() -> None:
    for config in (ModelConfig(), *PRESETS.values()):
        assert ModelConfig.model_validate(json.loads(json.dumps(config.model_dump(mode="json")))) == config
        with pytest.raises(ValidationError, match="frozen"):
            config.d_model = 8
    assert MoEConfig(n_experts=2).names == ("expert-0", "expert-1")
    assert MoEConfig(n_experts=2, expert_names=("hindi", "french")).names == ("hindi", "french")


WHISPER_SMALL = 241_734_912
"""Parameters of ``openai/whisper-small`` as transformers counts them, the encoder's table of positions included."""


def counts(config: ModelConfig) -> tuple[int, int, int]:
    """Numbers in all tensors, in those of routed experts, and in TTT layers with their norms.

    The encoder's positions are counted, as in transformers, though here they are a buffer; so are the zeros that fill
    the place of the bias that keys do not have, which transformers has not.
    """
    shapes = expected_shapes(config)
    parts = (lambda key: True, lambda key: ".experts." in key, lambda key: ".ttt" in key)
    total, experts, ttt = (sum(prod(shape) for key, shape in shapes.items() if part(key)) for part in parts)
    return total, experts, ttt


def key_biases(config: ModelConfig) -> int:
    return config.d_model * (config.encoder_layers + 2 * config.decoder_layers)


def test_the_preset_of_eight_small_whispers_has_the_parameters_it_is_named_after() -> None:
    config = PRESETS["8x241m"]
    dense, _, _ = counts(config.model_copy(update={"moe": None, "ttt": None}))
    assert dense - key_biases(config) == WHISPER_SMALL
    total, experts, ttt = counts(config)
    assert total - ttt == 1_035_137_280
    assert total - ttt - experts // 8 * (8 - 2) == 355_107_072, "active: two of eight experts"
    assert ttt == 265_956_480
    router = 8 * config.d_model
    feed_forwards = experts // 8
    assert dense - feed_forwards + router == total - ttt - experts, "all else is one copy of whisper-small"


@pytest.mark.parametrize(
    ("name", "dense"),
    [("8x39m", 37_760_640), ("8x74m", 72_593_920), ("8x241m", WHISPER_SMALL), ("8x769m", 763_857_920)],
)
def test_every_preset_has_the_shape_of_a_published_whisper(name: str, dense: int) -> None:
    config = PRESETS[name].model_copy(update={"moe": None, "ttt": None})
    assert counts(config)[0] - key_biases(config) == dense
