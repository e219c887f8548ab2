"""Low-rank fine-tuning starts as its source, computes no gradient of a matrix, and ends as a plain model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from model.tiny import CONFIGS, random_mels, random_texts, tiny_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from train.test_run import interrupted, lines, model_bytes
from train.tiny import Fixed, random_pack, recipe_tree, tiny_recipe

from whisper_moe import WhisperMoE
from whisper_moe.train import checkpoint
from whisper_moe.train.build import TRAINED, LoRALinear, add_lora, build_model, folded
from whisper_moe.train.loop import Trainer
from whisper_moe.train.losses import SpeechObjective, freeze
from whisper_moe.train.parallel import Parallel
from whisper_moe.train.reading import RecipeError
from whisper_moe.train.recipe import LoRARecipe
from whisper_moe.train.run import train
from whisper_moe.weights.checkpoint import Loaded

LORA = LoRARecipe(rank=2, alpha=3.0)


@pytest.fixture
def recipe(material: Path, tmp_path: Path) -> Path:
    """Six steps of a dense Whisper with a TTT layer, whose parameters are trained too."""
    from weights.whispers import TINY, hub_model, write_folder

    config = TINY.model_copy(update={"max_source_positions": 100, "max_target_positions": 40})
    tree = recipe_tree(write_folder(tmp_path / "hub", hub_model(config)), material / "data", lr=1e-2)
    tree["model"] |= {
        "lora": {"rank": 4},
        "ttt": {"encoder_layers": [1], "mini_batch": 10},
        "train": ["*.ttt.*", "*.ttt_norm.*"],
    }
    (tmp_path / "lora.yaml").write_text(yaml.safe_dump(tree), "utf-8")
    return tmp_path / "lora.yaml"


def logits(model: nn.Module) -> torch.Tensor:
    mels, texts = random_mels((40, 21), torch.float32, 0), random_texts((5, 8), 0)
    with torch.no_grad():
        return model(mels, texts).logits


def lora_model(learned: bool = True) -> nn.Module:
    model = tiny_model("segment", torch.float32, seed=0)
    add_lora(model, LORA)
    for module in model.modules():
        if learned and isinstance(module, LoRALinear):
            nn.init.normal_(module.lora_b, std=0.2)
    return model


def test_it_starts_as_its_source_bit_for_bit() -> None:
    assert torch.equal(logits(lora_model(learned=False)), logits(tiny_model("segment", torch.float32, seed=0)))


def test_folding_gives_a_plain_model_that_computes_the_same() -> None:
    model = lora_model()
    plain = tiny_model("segment", torch.float32, seed=1)
    before = logits(tiny_model("segment", torch.float32, seed=0))
    plain.load_state_dict(folded(model.state_dict(), LORA))
    assert (logits(plain) - logits(model)).abs().max() < 1e-5 < (before - logits(model)).abs().max()


def test_all_linear_layers_of_attention_and_feed_forwards_are_targets() -> None:
    model = tiny_model("segment", torch.float32, seed=0)
    add_lora(model, LORA)
    found = {path for path, module in model.named_modules() if isinstance(module, LoRALinear)}
    assert found == {
        path for path, module in model.named_modules() if isinstance(module, nn.Linear) and ".ttt." not in path
    }
    assert {path.split(".", 3)[-1] for path in found} == {
        f"{part}.{layer}"
        for part, layers in {"attn": ["qkv", "out"], "cross_attn": ["q", "kv", "out"], "ffn": ["up", "down"]}.items()
        for layer in layers
    }


def test_experts_that_are_differences_are_refused() -> None:
    recipe = tiny_recipe(model={"lora": {}})
    with pytest.raises(RecipeError, match="the experts of this model are low-rank differences already"):
        build_model(Loaded(CONFIGS["delta"], {}, {}, b""), recipe)


def test_no_gradient_of_a_matrix_is_computed() -> None:
    """Backward: the input's gradient through W, and two products each for A and for B."""
    tokens, inputs, outputs, rank = 32, 24, 40, 2
    model = nn.Sequential(nn.Linear(inputs, outputs)).requires_grad_(False)
    add_lora(model, LoRARecipe(rank=rank, targets=("*",)))
    y = model(torch.randn(tokens, inputs, requires_grad=True))
    with FlopCounterMode(display=False) as counted:
        y.sum().backward()
    assert counted.get_total_flops() == 2 * tokens * (inputs * outputs + 2 * rank * (inputs + outputs))
    assert model[0].weight.grad is None and model[0].lora_b.grad is not None


def test_it_learns_a_batch_by_heart() -> None:
    model, recipe = tiny_model("dense", torch.float32, seed=0), tiny_recipe(optimisation={"lr": 1e-2})
    add_lora(model, LORA)
    freeze(model, ["*"], TRAINED)
    batches = Fixed([[random_pack([(10, 6), (7, 5)], CONFIGS["dense"])]])
    trainer = Trainer(recipe, model, SpeechObjective(recipe.losses), batches, Parallel())
    losses = [trainer.step()["loss"] for _ in range(40)]
    assert losses[-1] < 0.3 * losses[0]


def test_only_what_learns_changes_and_has_moments_and_the_model_is_plain(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(recipe, [], run, False) == 0
    tensors = checkpoint.read(checkpoint.latest(run))  # pyright: ignore[reportArgumentType]
    moments = {key.split("/")[1] for key in tensors if key.startswith("optimizer/")}
    assert moments == {key[6:] for key in tensors if ".lora_" in key or ".ttt" in key if key.startswith("model/")}
    trained = WhisperMoE.from_pretrained(run / "model", for_inference=False).model.state_dict()
    source = WhisperMoE.from_pretrained(tmp_path / "hub", for_inference=False).model.state_dict()
    changed = {key for key in source if not torch.equal(source[key], trained[key])}
    assert changed == {key.removesuffix("lora_a") + "weight" for key in moments if key.endswith("lora_a")}
    assert trained.keys() - source.keys() == {key for key in trained if ".ttt" in key}
    assert trained["encoder.blocks.1.ttt.gate_forward"].abs().max() > 1e-3


def test_a_run_goes_on_as_if_it_was_never_stopped(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert train(recipe, [], whole, False) == 0
    interrupted(recipe, run, monkeypatch)
    assert train(run, [], None, True) == 0
    assert lines(run) == lines(whole) and model_bytes(run) == model_bytes(whole)


def test_a_run_is_judged_with_what_it_has_learned(recipe: Path, tmp_path: Path) -> None:
    """By what the exported model then is judged by."""
    tree = yaml.safe_load(recipe.read_text("utf-8"))
    tree["data"]["evaluation"], tree["evaluation"] = tree["data"]["train"], {"metric": "loss", "padded": False}
    recipe.write_text(yaml.safe_dump(tree), "utf-8")
    assert train(recipe, ["model.lora.alpha=40"], tmp_path / "run", False) == 0
    (judged,) = [line["evaluation"] for line in lines(tmp_path / "run") if "evaluation" in line]
    plain = tmp_path / "plain"
    words = [f"model={{source: {tmp_path / 'run/model'}}}", "optimisation.steps=1", "optimisation.warmup=1"]
    assert train(recipe, words, plain, False) == 0  # the first step of a warm-up has a rate of 0
    (again,) = [line["evaluation"] for line in lines(plain) if "evaluation" in line]
    assert again["loss"] == pytest.approx(judged["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["model.lora.targets=['*.attn.*', '*.attention.*']"],
            "model.lora.targets: no linear layer is called '*.attention.*'",
        ),
        (["model.freeze=['encoder.*']"], "freeze (encoder.*) has nothing to freeze beside lora"),
        (["parallel.data=fsdp2"], "model.lora is for parallel.data ddp"),
    ],
)
def test_what_cannot_be_is_said(
    recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], overrides: list[str], said: str
) -> None:
    assert train(recipe, overrides, tmp_path / "run", False) == 2
    assert said in capfd.readouterr().err
