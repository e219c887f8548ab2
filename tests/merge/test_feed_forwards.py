"""Feed-forwards of fine-tunes as the routed experts of one model, made by a recipe: what it computes, and that it learns."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from merge.test_build import DENSE, TOKENS, answers, model, tuned
from merge.test_merge import CLIPS, Family, noise
from torch import Tensor

from whisper_moe import WhisperMoE
from whisper_moe.cli import app
from whisper_moe.config import PRESETS, MoEConfig
from whisper_moe.generate.hearing import middle
from whisper_moe.generate.options import TranscribeOptions
from whisper_moe.merge.build import ROUTER
from whisper_moe.merge.router import fit
from whisper_moe.model.router import Router, Routing
from whisper_moe.train.losses import build_optimizer, router_terms
from whisper_moe.train.recipe import LossRecipe, OptimisationRecipe
from whisper_moe.weights.checkpoint import Loaded, load_checkpoint
from whisper_moe.weights.parts import empty_model, expected_shapes

recipe = import_module("recipes.eight-experts.feed_forwards")


def merge(base: Loaded, experts: Mapping[str, Loaded], router_layer: int, scale: float = 1.0, **how: bool) -> Loaded:
    return recipe.merged_feed_forwards(base, list(experts), experts.values(), router_layer, scale, **how)


def with_router(merged: Loaded, seed: int) -> Loaded:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(merged.state[f"{ROUTER}weight"].shape, generator=generator)
    ones = {
        f"{ROUTER}fit.{name}": torch.ones_like(merged.state[f"{ROUTER}fit.{name}"]) for name in ("scale", "temperature")
    }
    return replace(merged, state=merged.state | ones | {f"{ROUTER}weight": weight})


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("router_layer", [0, 2, 3])
def test_eight_copies_of_the_base_are_the_base(router_layer: int, shared: bool) -> None:
    base = model(0)
    merged = merge(base, {f"copy-{i}": base for i in range(8)}, router_layer, shared=shared)
    found = answers(merged, Routing(torch.tensor([[6, 1], [3, 7]]), torch.tensor([[0.7, 0.3], [0.9, 0.1]])))
    assert (found - answers(base)).abs().max() < 2e-4
    for key in merged.state.keys() & base.state.keys():
        factor = 0.5 if ".ffn.down" in key and shared and merged.config.routed(*place(key)) else 1
        assert torch.equal(merged.state[key], factor * base.state[key])


def place(key: str) -> tuple[str, int]:
    side, _, layer, *_ = key.split(".")
    return side, int(layer)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_what_is_no_expert_is_the_base_and_so_much_of_the_mean_difference(scale: float) -> None:
    base, experts = model(0), {name: model(seed) for seed, name in enumerate(("a", "b", "c"), 1)}
    merged = merge(base, experts, 1, scale)
    rest = [key for key in merged.state if ".experts." not in key and ".router." not in key]
    assert {key for key in rest if ".ffn." in key} == {key for key in base.state if "encoder.blocks.0.ffn." in key}
    for key in rest:
        average = torch.stack([each.state[key] for each in experts.values()]).mean(0)
        torch.testing.assert_close(merged.state[key], (1 - scale) * base.state[key] + scale * average)


@pytest.mark.parametrize("shared", [False, True])
def test_an_expert_alone_is_its_feed_forwards_in_the_average(shared: bool) -> None:
    base, experts = model(0), {"a": model(1), "b": model(2)}
    merged = merge(base, experts, 1, shared=shared)
    routing = Routing(torch.tensor([[1, 0], [1, 0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    torch.testing.assert_close(answers(merged, routing), answers(twin(merged, base, experts["b"], shared)))


def twin(merged: Loaded, base: Loaded, expert: Loaded, shared: bool) -> Loaded:
    """A dense model with two feed-forwards side by side in every layer, one of weight 0 where there is only one."""
    config = DENSE.model_copy(update={"encoder_ffn_dim": 64, "decoder_ffn_dim": 64})
    state = {key: merged.state[key] for key in base.state if ".ffn." not in key}
    for key in base.state:
        _, own, name = key.partition(".ffn.")
        if not own:
            continue
        parts: list[tuple[Mapping[str, Tensor], float]] = [(merged.state, 1.0), (merged.state, 0.0)]
        if merged.config.routed(*place(key)):
            parts = [(base.state, 0.5), (expert.state, 0.5)] if shared else [(base.state, 0.0), (expert.state, 1.0)]
        tensors = [each[key] * (factor if "down" in name else 1) for each, factor in parts]
        state[key] = sum(tensors) if name == "down.bias" else torch.cat(tensors, 1 if name == "down.weight" else 0)
    return replace(base, config=config, state={key: state[key] for key in expected_shapes(config)})


def test_one_step_of_training_moves_every_expert_that_was_chosen_and_the_router() -> None:
    merged = with_router(merge(model(0), {"a": model(1), "b": model(2), "c": model(3)}, 1), 3)
    network = empty_model(merged.config).train()
    network.load_state_dict(merged.state, assign=True)
    optimizer = build_optimizer(network, OptimisationRecipe(lr=1e-3, router_lr=1e-2))
    assert {group["name"] for group in optimizer.param_groups} == {"router", "decay", "no_decay"}
    mels = [torch.randn(DENSE.n_mels, frames, generator=torch.Generator().manual_seed(frames)) for frames in (40, 70)]

    def loss() -> Tensor:
        output = network(mels, TOKENS)
        said = torch.nn.functional.cross_entropy(output.logits, torch.cat(TOKENS))
        found.append({expert for choice in output.routings[0].choices for expert in choice})
        return said + router_terms(output.routings, 1.0, LossRecipe(), lambda counts: counts)[0]

    found: list[set[int]] = []
    before = loss()
    before.backward()
    for key, parameter in network.named_parameters():
        if ".experts." in key:
            moved = {i for i, gradient in enumerate(parameter.grad) if gradient.any()}
            assert moved == found[0], key
    assert network.encoder.router.weight.grad.any()
    optimizer.step()
    assert loss().item() < before.item()


def test_a_fitted_router_chooses_the_same_when_it_can_be_trained() -> None:
    generator = torch.Generator().manual_seed(0)
    places = 3 * torch.randn(3, 16, generator=generator, dtype=torch.float64)
    clips = [30 + place + torch.randn(40, 2, 16, generator=generator, dtype=torch.float64) for place in places]
    raw = fit([*clips, clips[0][:0]])
    router = Router(16, MoEConfig(n_experts=3, none_choice=False, fitted_router=True))
    tensors = recipe.trainable(raw)
    router.load_state_dict({("" if name == "weight" else "fit.") + name: tensor for name, tensor in tensors.items()})
    features = torch.cat([part[:, 0] for part in clips]).float()
    standard = (features - raw["centre"]) / raw["scale"]
    logits = (standard @ raw["weight"][:3].T + raw["intercept"][:3]) / raw["temperature"]
    found = router(features).logits
    assert found is not None
    torch.testing.assert_close(found.softmax(1), logits.softmax(1), atol=1e-4, rtol=1e-3)
    assert found.logsumexp(1).abs().max() < 0.5 * logits.logsumexp(1).abs().min()
    assert not router.fit.moments.numel()


@pytest.mark.parametrize("preset", PRESETS)
def test_eight_whispers_merged_have_the_presets_shape_but_for_ttt_and_what_a_fitted_router_has(preset: str) -> None:
    wanted = PRESETS[preset].model_copy(update={"ttt": None})
    dense = wanted.model_copy(update={"moe": None})
    whisper = Loaded(dense, empty_model(dense).state_dict(), {}, b"")
    with torch.device("meta"):
        merged = merge(whisper, {f"expert {i}": whisper for i in range(8)}, 0)
    found = {key: tuple(tensor.shape) for key, tensor in merged.state.items() if ".router.fit." not in key}
    assert found == expected_shapes(wanted)


def test_ttt_that_only_an_expert_has_is_refused() -> None:
    with pytest.raises(ValueError, match=r"b: cannot be merged: .* one norm"):
        merge(model(0), {"a": model(1), "b": tuned(2, 1)}, 0)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(tmp_path_factory.mktemp("merge"))


@pytest.fixture(scope="module")
def feed_forwards(family: Family) -> Path:
    experts = [str(family.folder / "low"), f"high={family.folder / 'high'}"]
    probes = ["--probe", family.probes["low"], "--probe", family.probes["high"]]
    base = ["--base", str(family.folder / "base")]
    recipe.main([*experts, "-o", str(family.folder / "ffn"), *probes, *base, "--router-layer", "1"])
    return family.folder / "ffn"


def test_feed_forwards_are_chosen_by_what_the_average_hears(feed_forwards: Path, family: Family) -> None:
    merged = WhisperMoE.from_pretrained(feed_forwards, dtype="float32")
    moe = merged.config.moe
    assert moe is not None
    assert (moe.granularity, moe.router_layer, moe.top_k, moe.shared, moe.none_choice) == ("ffn", 1, 2, False, False)
    assert [path.stem for path in sorted((feed_forwards / "experts").iterdir())] == ["00-low", "01-high"]
    options = TranscribeOptions(language="en", temperatures=(0.0,))
    clips = [(kind, clip) for kind, clip in CLIPS if kind != "other"]
    results = merged._decoder.decode([clip for _, clip in clips], options, temperature=0.0, margin=merged.config.margin)
    for (kind, clip), result in zip(clips, results, strict=True):
        assert result.experts[0][0] == kind
        assert sum(gate for _, gate in result.experts) == pytest.approx(1)
        heard = merged._decoder.choose([clip])  # as probes were heard: the whole clip and the model's own silence
        assert heard.gates[0].tolist() == pytest.approx([gate for _, gate in result.experts], abs=1e-4)
    forced = merged.transcribe(clips[0][1], experts=("high",), language="en", no_speech_threshold=None)
    assert {expert for segment in forced.segments for expert in segment.experts} == {("high", 1.0)}


def test_a_router_that_chooses_ahead_hears_the_middle_and_one_in_the_pass_the_whole(
    family: Family, feed_forwards: Path
) -> None:
    delta = family.merge("delta", "--delta-rank", "16")
    long = np.concatenate([noise("low", 1, 2.0), noise("high", 2, 5.0), noise("low", 3, 2.0)])
    for folder, same in ((delta, True), (feed_forwards, False)):
        decoder = WhisperMoE.from_pretrained(folder, dtype="float32")._decoder
        whole, part = decoder.features([long]), decoder.features([middle(long)])
        assert torch.allclose(whole, part, atol=1e-5) == same


def test_feed_forwards_are_trained_on(feed_forwards: Path, family: Family, tmp_path: Path) -> None:
    file, run = tmp_path / "recipe.yaml", tmp_path / "run"
    file.write_text(f"""
model: {{source: {feed_forwards}}}
data:
  train: [{{kind: table, source: {family.probes["low"]}}}]
  loader: {{batch_size: 4, batch_unit: examples, seed: 1}}
optimisation: {{steps: 3, lr: 1.0e-3, router_lr: 1.0e-3, warmup: 0, schedule: constant}}
""")
    app(["train", str(file), "-o", str(run)], standalone_mode=False)
    before, after = load_checkpoint(feed_forwards).state, load_checkpoint(run / "model").state
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 3
    assert losses[2] < losses[0]
    assert all("balance" in line for line in lines if "loss" in line)
    for key in ("encoder.router.weight", "encoder.blocks.1.experts.up_weight", "decoder.blocks.0.experts.down_weight"):
        moved = (after[key] - before[key]).flatten(1).abs().amax(1)
        assert (moved > 0).all(), key
    assert torch.equal(after["encoder.router.fit.intercept"], before["encoder.router.fit.intercept"])


def test_what_shares_an_average_does_not_grow(
    feed_forwards: Path, family: Family, caplog: pytest.LogCaptureFixture
) -> None:
    folder, base = str(feed_forwards), ["--base", str(family.folder / "base")]
    again = "its experts (low, high) are feed-forwards: make it again from all"
    for given, reason in (
        (["add-expert", folder, str(family.folder / "new"), *base, "--probe", family.probes["new"]], again),
        (["remove-expert", folder, "low"], again),
    ):
        caplog.clear()
        assert app(given, standalone_mode=False) == 1
        assert reason in caplog.text
