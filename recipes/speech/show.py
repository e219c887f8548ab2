"""Sounds side by side, as pictures and to listen to: of what `evaluate.py` kept.

    python show.py OUT DOCS [SYSTEM …]

DOCS gets `spectrograms.png`, one row for each voice and one column for each system, and two sentences in each voice as the last
system said them (``.m4a``). Needs matplotlib.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image

from whisper_moe.generate.speech import Speech
from whisper_moe.media.audio import load_audio
from whisper_moe.media.mel import log_mel

SENTENCES = (3, 5)
SYSTEMS = ("synthesiser", "synthesiser-vocoder", "model-griffin-lim", "model")


def main(out: Path, docs: Path, systems: tuple[str, ...]) -> None:
    docs.mkdir(parents=True, exist_ok=True)
    voices = sorted({path.stem.rpartition("-")[0] for path in (out / "sounds" / systems[0]).glob("*.wav")})
    figure, axes = plt.subplots(len(voices), len(systems), figsize=(4 * len(systems), 2.2 * len(voices)), squeeze=False)
    for row, voice in zip(axes, voices, strict=True):
        for axis, system in zip(row, systems, strict=True):
            sound = load_audio(out / f"sounds/{system}/{voice}-{SENTENCES[0]:03d}.wav")
            mel = log_mel(torch.from_numpy(sound)).numpy()
            axis.imshow(
                mel, origin="lower", aspect="auto", vmin=-1, vmax=1, extent=(0, len(sound) / 16_000, 0, len(mel))
            )
            axis.set_title(f"{voice}, {system}", fontsize=9)
            axis.tick_params(labelsize=7)
        for number in SENTENCES:
            said = load_audio(out / f"sounds/{systems[-1]}/{voice}-{number:03d}.wav")
            Speech(np.asarray(said, np.float32), voice, "", ()).save(docs / f"{voice}-{number}.m4a")
    figure.tight_layout()
    figure.savefig(docs / "spectrograms.png", dpi=64)
    with Image.open(docs / "spectrograms.png") as picture:
        picture.quantize(48).save(docs / "spectrograms.png", optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), tuple(sys.argv[3:]) or SYSTEMS)
