"""Grokking: a small model that learns a table by heart, and long after that understands it (arXiv 2201.02177).

    python recipes/grokking/division.py [KEY=VALUE ...] [-o runs/grokking]    a folder for curve, figures and plot

Modular division a / b mod p as the tokens ``a / b =``, the loss on the answer alone, half of all equations for training. The
model is this project's own decoder block, without cross-attention: what is seen here is seen of the code that speech is
trained with. :class:`Plateau` tells when it looks like the time before.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from whisper_moe.config import Frozen, ModelConfig
from whisper_moe.jobs import sentence
from whisper_moe.model.block import Block
from whisper_moe.packing import Layout
from whisper_moe.train.monitor import METRICS
from whisper_moe.train.reading import RecipeError, checked, read_tree
from whisper_moe.train.recipe import Decay

RECIPE, PLOT = Path(__file__).with_name("division.yaml"), "curve.png"
logger = logging.getLogger(__name__)


class GrokkingRecipe(Frozen):
    """``division.yaml``; the defaults are the paper's (appendix A.1.2), as far as it says."""

    prime: int = Field(default=97, ge=3, le=10_007)
    """p: there are p (p − 1) equations."""
    train_share: float = Field(default=0.5, gt=0, lt=1)
    layers: int = Field(default=2, ge=1)
    width: int = Field(default=128, ge=4)
    heads: int = Field(default=4, ge=1)
    steps: int = Field(default=10_000, ge=1)
    batch_size: int = Field(default=512, ge=1)
    lr: float = Field(default=1e-3, gt=0)
    warmup: int = Field(default=10, ge=0)
    weight_decay: float = Field(default=1.0, ge=0)
    betas: tuple[Decay, Decay] = (0.9, 0.98)
    grokfast: tuple[Decay, Annotated[float, Field(ge=0)]] | None = None
    """(α, λ) of Grokfast-EMA; None trains with AdamW alone."""
    seed: int = Field(default=0, ge=0)
    evaluate_every: int = Field(default=100, ge=1)
    stop_at: float = Field(default=0.99, gt=0, le=1)
    """Validation accuracy at which the run ends."""
    threads: int = Field(default=1, ge=1)

    @field_validator("prime")
    @classmethod
    def _is_prime(cls, value: int) -> int:
        if divisor := next((n for n in range(2, math.isqrt(value) + 1) if value % n == 0), None):
            raise ValueError(f"{value} is {divisor} times {value // divisor}: division needs a prime")
        return value


def equations(prime: int) -> tuple[Tensor, Tensor]:
    """All a / b = c mod p with b ≠ 0: tokens [p (p − 1), 4] of ``a / b =``, and answers [p (p − 1)]."""
    a, b = torch.cartesian_prod(torch.arange(prime), torch.arange(1, prime)).T
    inverse = torch.tensor([pow(int(n), -1, prime) for n in range(1, prime)])
    divided_by, equals = torch.full_like(a, prime), torch.full_like(a, prime + 1)
    return torch.stack([a, divided_by, b, equals], dim=1), a * inverse[b - 1] % prime


class Divider(nn.Module):
    """Embedding, positions, decoder blocks without cross-attention, norm, linear: [N, 4] tokens → [N, p] logits."""

    def __init__(self, recipe: GrokkingRecipe) -> None:
        super().__init__()
        width = recipe.width
        config = ModelConfig(
            d_model=width,
            encoder_heads=recipe.heads,
            decoder_layers=recipe.layers,
            decoder_heads=recipe.heads,
            decoder_ffn_dim=4 * width,
        )
        self.embedding = nn.Embedding(recipe.prime + 2, width)
        self.positions = nn.Parameter(torch.randn(4, width) * 0.02)
        blocks = [Block(config, "decoder", layer) for layer in range(recipe.layers)]
        for block in blocks:
            block.cross_attn = block.cross_norm = None
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, recipe.prime, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, tokens_Nn: Tensor) -> Tensor:
        rows, n = tokens_Nn.shape
        x_TD, layout = (self.embedding(tokens_Nn) + self.positions).flatten(0, 1), Layout([n] * rows)
        for block in self.blocks:
            x_TD = block(x_TD, layout, None).x_TD
        return self.head(self.norm(x_TD.view(rows, n, -1)[:, -1]))


class GrokfastAdamW(torch.optim.AdamW):
    """AdamW on gradients whose slow part is amplified: g ← g + λ · EMA_α(g) (Grokfast-EMA, arXiv 2405.20233, algorithm 1).

    The average is part of the optimizer's state, so a run goes on with it. Clip before, not after.
    """

    def __init__(self, params: Any, *, alpha: float = 0.98, amplification: float = 2.0, **options: Any) -> None:
        """``alpha`` of the moving average, ``amplification`` λ; ``options`` are AdamW's."""
        super().__init__(params, **options)
        self.alpha, self.amplification = alpha, amplification

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert closure is None, "gradients are changed before the step; a closure would make them anew"
        slow: dict[Tensor, Tensor] = {}
        for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            before = self.state[parameter].get("slow_gradient")
            now = parameter.grad.clone() if before is None else before.lerp_(parameter.grad, 1 - self.alpha)
            parameter.grad.add_(now, alpha=self.amplification)
            slow[parameter] = now
        done = super().step()
        for parameter, gradient in slow.items():  # only now: AdamW begins with parameters that have no state at all
            self.state[parameter]["slow_gradient"] = gradient
        return done


class Plateau:
    """Tells when a run looks like the plateau before grokking: what is trained on is known, what is not is not.

    Nothing says that it will end (arXiv 2201.02177), and overfitting looks the same.
    """

    def __init__(self) -> None:
        self._first: float | None = None
        self._row = 0

    def warn(self, step: int, train_loss: float, validation_loss: float) -> bool:
        """Log a warning when the plateau has just been reached, and say so: in three evaluations in a row, the training loss
        is under a tenth of the first and a tenth of the validation loss, which is more than half of the first."""
        self._first = train_loss if self._first is None else self._first
        here = 10 * train_loss < min(self._first, validation_loss) and 2 * validation_loss > self._first
        self._row = self._row + 1 if here else 0
        if reached := self._row == 3:
            logger.warning(
                f"step {step}: the training loss is {train_loss:.3g}, the validation loss {validation_loss:.3g}: overfitting, "
                "or the plateau before grokking; with weight decay and many more steps it may fall (arXiv 2201.02177)"
            )
        return reached


def train(recipe: GrokkingRecipe) -> Iterator[dict[str, float]]:
    """The curve, from before the first step to the last; a plateau that is seen there is logged."""
    torch.manual_seed(recipe.seed)
    tokens, answers = equations(recipe.prime)
    order = torch.randperm(len(tokens))
    half = round(len(tokens) * recipe.train_share)
    training, validation = order[:half], order[half:]
    model = Divider(recipe)
    options = {"lr": recipe.lr, "betas": recipe.betas, "weight_decay": recipe.weight_decay}
    if recipe.grokfast is None:
        optimizer = torch.optim.AdamW(model.parameters(), **options)
    else:
        alpha, amplification = recipe.grokfast
        optimizer = GrokfastAdamW(model.parameters(), alpha=alpha, amplification=amplification, **options)
    batches, plateau, began = iter(()), Plateau(), time.perf_counter()
    for step in range(recipe.steps + 1):
        if step % recipe.evaluate_every == 0 or step == recipe.steps:
            known = measured(model, "train", tokens[training], answers[training])
            new = measured(model, "validation", tokens[validation], answers[validation])
            yield {"step": step, **known, **new, "seconds": time.perf_counter() - began}
            plateau.warn(step, known["train_loss"], new["validation_loss"])
            if new["validation_accuracy"] >= recipe.stop_at:
                break
        if (rows := next(batches, None)) is None:
            batches = iter(training[torch.randperm(half)].split(recipe.batch_size))
            rows = next(batches)
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * min(1.0, (step + 1) / max(1, recipe.warmup))
        optimizer.zero_grad()
        F.cross_entropy(model(tokens[rows]), answers[rows]).backward()
        optimizer.step()


@torch.no_grad()
def measured(model: nn.Module, name: str, tokens: Tensor, answers: Tensor) -> dict[str, float]:
    logits = model(tokens)
    accuracy = (logits.argmax(1) == answers).double().mean()
    return {f"{name}_loss": float(F.cross_entropy(logits, answers)), f"{name}_accuracy": float(accuracy)}


def run(path: Path, overrides: Sequence[str], output: Path) -> int:
    """Curve, figures and plot in a folder; returns the exit status: 2 for a recipe that cannot be used."""
    try:
        recipe = checked(GrokkingRecipe, read_tree(path, overrides), str(path))
    except RecipeError as error:
        logger.error("division.py: %s", error)
        return 2
    torch.set_num_threads(recipe.threads)
    output.mkdir(parents=True, exist_ok=True)
    curve: list[dict[str, float]] = []
    with (output / METRICS).open("w", encoding="utf-8") as file:
        for point in train(recipe):
            curve.append(point)
            print(json.dumps(point), file=file, flush=True)
            logger.info("step %(step)d: train %(train_accuracy).3f, validation %(validation_accuracy).3f", point)
    (output / "recipe.json").write_text(recipe.model_dump_json(indent=2) + "\n", "utf-8")
    plot("AdamW" if recipe.grokfast is None else "Grokfast-EMA", curve, output / PLOT)
    return 0


def plot(name: str, curve: Sequence[dict[str, float]], path: Path) -> None:
    """Accuracy by step, train dashed, validation solid; raises ``ImportError`` that says what is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the plot needs matplotlib: pip install 'whisper-moe[evaluate]'") from error
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    steps = [max(point["step"], 1) for point in curve]
    for part, style in (("train", "C0--"), ("validation", "C0")):
        axes.plot(steps, [point[f"{part}_accuracy"] for point in curve], style, label=f"{name}, {part}")
    axes.set(xscale="log", xlabel="step", ylabel="accuracy", title="Division modulo a prime")
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description="Watch a small model understand long after it has learned by heart.")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes to the recipe: grokfast=[0.98,2.0]")
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/grokking"), help="default: runs/grokking")
    asked = parser.parse_intermixed_args()
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    try:
        return run(RECIPE, asked.overrides, asked.output.expanduser())
    except (ImportError, OSError) as error:
        logger.error("division.py: %s", sentence(error))
        return 1


if __name__ == "__main__":
    sys.exit(main())
