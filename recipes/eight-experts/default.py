"""The bundled model: what the eight experts are trained beside, and what is made of the eight runs.

    python recipes/eight-experts/default.py base CONTEXT OUT              the core, and a run of context/adapt.py beside it
    python recipes/eight-experts/default.py router BASE TABLES OUT        the same with a router that is fitted
    python recipes/eight-experts/default.py join ROUTER RUNS TABLES OUT   with the experts of eight runs of ``train.py --of BASE``

The router is fitted to clips of each set and of some second sources, each with 0.5 s and 2.5 s of silence and
padded to 30 s, and to clips that none of the experts is for (``none-train.tsv``). Only training tables are read.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from split import rows

from whisper_moe.config import FULL_WINDOW, MoEConfig
from whisper_moe.media.audio import load_audio
from whisper_moe.merge.build import ROUTER, fitted, told_of
from whisper_moe.model.model import WhisperMoEModel
from whisper_moe.model.router import Router
from whisper_moe.weights.checkpoint import load_checkpoint, save_checkpoint
from whisper_moe.weights.parts import ADAPT, part_of
from whisper_moe.weights.tokens import EXPERT_SOURCES
from whisper_moe.weights.upcycle import upcycled_config

LANGUAGES = {"malayalam": "ml", "swahili": "sw", "hindi": "hi"}
"""Of the experts that answer in one."""
LEARNERS = (
    "clips of speechocean762, English read by people whose language is Mandarin (free for commercial and other use)"
)
SOURCES = {
    "malayalam": "{} clips of the Malayalam Speech Corpus of SMC, volunteers with their own phones (CC BY-SA 4.0)",
    "swahili": "{} clips of news in Swahili, one reader (MIT)",
    "spelled": "{} clips of names spelled out, numbers and addresses in English (MIT)",
    "learners": f"{{}} {LEARNERS}",
    "hindi": "{} sentences of Tatoeba (CC BY 2.0) and TICO-19 (CC0), synthetic: three voices of Kokoro-82M (Apache-2.0)",
    "telephone": "{} telephone prompts of Asterisk, one speaker (CC BY-SA 3.0)",
    "digits": "{} clips of the Free Spoken Digit Dataset, four speakers (CC BY-SA 4.0)",
    "noisy": f"{{}} {LEARNERS}, in synthetic rooms and noise",
}
NAMES = tuple(SOURCES)
ROUTER_LAYER = 2
MARGINS = (0.5, 2.5, FULL_WINDOW)
CLIPS, NONE_CLIPS = 40, 160
TWO_SOURCES = ("malayalam", "swahili", "digits")
"""Of these the router hears a second source. Names spelled out and prompts by a synthesiser are to it what English read by it is,
and that is for none."""
LEAST = 0.6
"""Two experts that were trained apart and are both half sure write neither's language."""
SEED = 14


def base(context: Path, out: Path) -> None:
    """Experts in place, with an output of 0. What adapts the core is rounded to half precision, once and for ever."""
    model = load_checkpoint(context)
    moe = MoEConfig(n_experts=len(NAMES), expert_names=NAMES, router_layer=ROUTER_LAYER)
    config = upcycled_config(model.config, moe=moe, context_margin=MARGINS[0])
    torch.manual_seed(SEED)
    state = WhisperMoEModel(config).state_dict() | dict(model.state)
    state |= {key: tensor.half().float() for key, tensor in model.state.items() if part_of(key, config) == ADAPT}
    save_checkpoint(out, replace(model, config=config, state=state), quantize=True)


def router(source: Path, tables: Path, out: Path) -> None:
    """It reads what no expert has changed yet, so it can be fitted before, or while, they are trained."""
    model = load_checkpoint(source)
    assert model.config.moe is not None
    moe = model.config.moe.model_copy(update={"fitted_router": True, "least_probability": LEAST})
    heard = [[f"{name}-train", *([f"{name}-second-train"] if name in TWO_SOURCES else [])] for name in NAMES]
    probes = [[clip for table in each for clip in clips(tables / f"{table}.tsv", CLIPS)] for each in heard]
    fresh = {f"{ROUTER}{key}": tensor for key, tensor in Router(model.config.d_model, moe).state_dict().items()}
    config = model.config.model_copy(update={"moe": moe})
    unfitted = replace(model, config=config, state=dict(model.state) | fresh)
    save_checkpoint(out, fitted(unfitted, probes, clips(tables / "none-train.tsv", NONE_CLIPS), MARGINS), quantize=True)


def join(source: Path, runs: Path, tables: Path, out: Path) -> None:
    model = load_checkpoint(source)
    state, learned = dict(model.state), dict[str, str]()
    for number, name in enumerate(NAMES):
        trained = load_checkpoint(runs / name / "model").state
        if other := [
            key
            for key in state
            if ".experts." not in key and ROUTER not in key and not torch.equal(state[key], trained[key])
        ]:
            raise ValueError(f"{runs / name}: trained beside something else than {source}: {other[0]} differs")
        for key in (key for key in state if ".experts." in key):
            state[key][number] = trained[key][number]
        learned[name] = SOURCES[name].format(sum(1 for _ in rows(tables / f"{name}-train.tsv")))
        model = told_of(model, name, LANGUAGES.get(name))
    generation = model.generation | {EXPERT_SOURCES: learned}
    save_checkpoint(out, replace(model, state=state, generation=generation), quantize=True)


def clips(table: Path, most: int) -> list[np.ndarray]:
    paths = [row["path"] for row in rows(table)]
    order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(SEED)).tolist()
    return [load_audio(paths[index]) for index in order[:most]]


if __name__ == "__main__":
    {"base": base, "router": router, "join": join}[sys.argv[1]](*map(Path, sys.argv[2:]))
