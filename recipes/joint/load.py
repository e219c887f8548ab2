"""Who answers for what: the share of each task's held-out samples that each expert gets, and a picture of it.

    python recipes/joint/load.py TABLES OUT NAME=MODEL…

TABLES are begin.py's. OUT gets load.md and load.svg.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from whisper_moe import WhisperMoE
from whisper_moe.data.corpus import CorpusConfig
from whisper_moe.data.examples import ExampleConfig, ExampleReader
from whisper_moe.data.table import open_corpus

TASKS = ("sound", "text", "film")
MANY = 100


@torch.inference_mode()
def load(model: WhisperMoE, table: Path) -> torch.Tensor:
    """[experts], adding up to 1: the gates of the table's first samples."""
    reader = ExampleReader(model.tokenizer, model.config, ExampleConfig(margin=0.5))
    corpus = open_corpus(CorpusConfig(kind="table", source=str(table)))
    assert model.config.moe is not None
    total = torch.zeros(model.config.moe.n_experts)
    for row in range(min(MANY, len(corpus))):
        example, network = reader.read(corpus[row], 0.5), model.model
        part = network.senses.embedded(example.mel, network) if network.senses else example.mel
        encoded = network.encoder([part], valid_lengths=[example.valid_length])
        assert encoded.routing is not None
        total += encoded.routing.dense(len(total))[0].float()
    return total / total.sum()


def main(tables: Path, out: Path, named: list[str]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(1, len(named), figsize=(5 * len(named), 2.6), squeeze=False)
    lines = ["| model | task | " + " | ".join(map(str, range(8))) + " |", "|---|---|" + "---:|" * 8]
    for place, each in enumerate(named):
        name, _, path = each.partition("=")
        model = WhisperMoE.from_pretrained(path, dtype="float32", for_inference=False)
        shares = torch.stack([load(model, tables / f"test-{task}.tsv") for task in TASKS])
        lines += [
            f"| {name} | {task} | {' | '.join(f'{100 * share:.0f}' for share in row)} |"
            for task, row in zip(TASKS, shares.tolist(), strict=True)
        ]
        axis = axes[0][place]
        axis.imshow(shares, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axis.set(title=name, xlabel="expert", yticks=range(len(TASKS)), yticklabels=TASKS, xticks=range(8))
        for row, column in torch.cartesian_prod(torch.arange(3), torch.arange(8)).tolist():
            share = float(shares[row, column])
            how = {"ha": "center", "va": "center", "size": 8, "color": "white" if share < 0.6 else "black"}
            axis.text(column, row, f"{100 * share:.0f}", **how)
    figure.tight_layout()
    figure.savefig(out / "load.svg")
    (out / "load.md").write_text("\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
