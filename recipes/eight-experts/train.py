"""Trains the eight experts, or the eight of the default model, on the tables that ``split.py`` and ``synthetic.py`` write.

    python recipes/eight-experts/train.py TABLES RUNS [NAME ...]             fine-tunes of openai/whisper-base
    python recipes/eight-experts/train.py TABLES RUNS [NAME ...] --of MODEL  the routed experts of a model, all else frozen
    python recipes/eight-experts/train.py TABLES RUNS union                  a rival: one model, fine-tuned on all eight sets

``--taught FINE_TUNES``: a routed expert also learns what the fine-tune of its name, in that folder, would say.

One after the other; a run that was stopped goes on, one that is finished stays. Steps are what a few hours on two cores allow.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from split import rows

HERE = Path(__file__).parent
FULL = ("model.ttt={encoder_layers: [3]}",)
"""All parameters, and a TTT layer in the encoder."""
LORA = ("model.lora={rank: 32, alpha: 64}", "optimisation.lr=4e-4")
SLIM = (
    *("model.expert={name}", "data.loader.examples.margin=[0.5, 2.5]", "data.loader.examples.padded=0.06"),
    *("optimisation.lr=1e-3", "optimisation.schedule=cosine", "optimisation.warmup=10", "losses.balancing=none"),
)
"""256 hidden units in every routed layer of the default; also on windows that are full."""
EXPERTS: dict[str, tuple[int, int, int, tuple[str, ...]]] = {
    "malayalam": (120, 120, 16, (*FULL, "optimisation.lr=6e-5")),
    "swahili": (128, 64, 8, (*FULL, "optimisation.lr=6e-5")),
    "spelled": (60, 50, 16, FULL),
    "learners": (72, 90, 16, FULL),
    "hindi": (200, 140, 16, LORA),
    "telephone": (64, 60, 16, LORA),
    "digits": (60, 60, 32, LORA),
    "noisy": (80, 90, 16, LORA),
}
"""Steps of a fine-tune and of a routed expert, clips in each, and what a fine-tune trains."""
UNION, UNION_RUN = "union", (300, 0, 16, ("optimisation.lr=6e-5", "evaluation.every=150", "evaluation.limit=20"))
"""Fewer than half of the steps that all eight have together."""


def corpora(names: Sequence[str], tables: Path, split: str) -> str:
    """Each with the share of clips that its expert has of all experts' steps."""
    paths = [tables.resolve() / f"{name}-{split}.tsv" for name in names]
    weights = [
        EXPERTS[name][0] * EXPERTS[name][2] / sum(1 for _ in rows(path))
        for name, path in zip(names, paths, strict=True)
    ]
    each = zip(paths, weights if len(names) > 1 else [1.0], strict=True)
    return ", ".join(f"{{kind: table, source: {path}, split: {split}, weight: {weight}}}" for path, weight in each)


def train(name: str, asked: argparse.Namespace) -> int:
    whole, slim, clips, kind = EXPERTS.get(name, UNION_RUN)
    settings = [setting.format(name=name) for setting in SLIM] if asked.of else list(kind)
    settings += [f"model.source={asked.of}"] if asked.of else []
    settings += [f"teacher.source={asked.taught}/{name}/model"] if asked.taught else []
    names = [*EXPERTS] if name == UNION else [name]
    settings += [f"data.train=[{corpora(names, asked.tables, 'train')}]"]
    settings += [f"data.evaluation=[{corpora(names, asked.tables, 'dev')}]"]
    settings += [f"optimisation.steps={slim if asked.of else whole}", f"data.loader.batch_size={clips}"]
    program = [str(HERE / "taught.py")] if asked.taught else ["-m", "whisper_moe", "train"]
    given = [str(HERE / "expert.yaml"), "-o", str(asked.runs / name), "--resume", *settings]
    return subprocess.call([sys.executable, *program, *given])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("tables", type=Path)
    parser.add_argument("runs", type=Path)
    parser.add_argument("names", nargs="*", default=[*EXPERTS], metavar="NAME")
    parser.add_argument("--of", metavar="MODEL")
    parser.add_argument("--taught", metavar="FINE_TUNES")
    asked = parser.parse_args()
    failed = [name for name in asked.names if train(name, asked)]
    sys.exit(f"not finished: {', '.join(failed)}" if failed else 0)
