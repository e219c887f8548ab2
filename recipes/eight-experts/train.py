"""Trains the eight experts, or the eight of the default model, on the tables that ``split.py`` and ``synthetic.py`` write.

    python recipes/eight-experts/train.py TABLES RUNS [NAME ...]             fine-tunes of openai/whisper-base
    python recipes/eight-experts/train.py TABLES RUNS [NAME ...] --of MODEL  the routed experts of a model, all else frozen

One after the other; a run that was stopped goes on, one that is finished stays. Steps are what a few hours on two cores allow.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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
    "malayalam": (240, 120, 16, (*FULL, "optimisation.lr=6e-5")),
    "swahili": (64, 64, 8, (*FULL, "optimisation.lr=6e-5")),
    "spelled": (60, 50, 16, FULL),
    "learners": (120, 90, 16, FULL),
    "hindi": (200, 140, 16, LORA),
    "telephone": (80, 60, 16, LORA),
    "digits": (60, 60, 32, LORA),
    "noisy": (120, 90, 16, LORA),
}
"""Steps of a fine-tune and of a routed expert, clips in each, and what a fine-tune trains."""


def train(name: str, tables: Path, runs: Path, of: str | None) -> int:
    whole, slim, clips, kind = EXPERTS[name]
    steps = slim if of else whole
    settings = [setting.format(name=name) if of else setting for setting in (SLIM if of else kind)]
    source = [f"model.source={of}"] if of else []
    data = [f"data.train.0.source={tables}/{name}-train.tsv", f"data.evaluation.0.source={tables}/{name}-dev.tsv"]
    size = [f"optimisation.steps={steps}", f"data.loader.batch_size={clips}"]
    command = [
        sys.executable,
        "-m",
        "whisper_moe",
        "train",
        str(HERE / "expert.yaml"),
        "-o",
        str(runs / name),
        "--resume",
    ]
    return subprocess.call([*command, *source, *data, *size, *settings])


if __name__ == "__main__":
    tables, runs, *names = sys.argv[1:]
    of = names.pop(names.index("--of") + 1) if "--of" in names else None
    names = [name for name in names if name != "--of"] or list(EXPERTS)
    failed = [name for name in names if train(name, Path(tables).resolve(), Path(runs), of)]
    sys.exit(f"not finished: {', '.join(failed)}" if failed else 0)
