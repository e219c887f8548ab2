"""What a model makes of sentences whose prosody is known, beside the sounds: a vocoder learns of it what mel frames leave open.

    python mels.py MODEL TABLE.tsv OUT

OUT gets a link to each sound of the table, its frames [n_mels, F] beside it (``.mel.npy``), and a table: ``sounds.tsv``.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np
import torch

from whisper_moe.media.spoken import number
from whisper_moe.model.speech import Prosody
from whisper_moe.packing import Layout
from whisper_moe.weights.checkpoint import load_speech


@torch.inference_mode()
def main(source: Path, table: Path, out: Path) -> None:
    model, rows = load_speech(source).eval(), ["path\ttext\tlanguage\tspeaker"]
    voices = [voice.name for voice in model.config.voices]
    out.mkdir(parents=True, exist_ok=True)
    for row in csv.DictReader(table.open(encoding="utf-8"), delimiter="\t", quoting=csv.QUOTE_NONE):
        sound = (table.parent / row["path"]).absolute()
        plan = json.loads(sound.with_suffix(".json").read_text("utf-8"))
        phonemes = torch.tensor([0, *number(model.config.phonemes, plan["phonemes"]), 0])
        layout, voice = Layout([len(phonemes)]), torch.tensor([voices.index(row["speaker"])])
        prosody = Prosody(*(torch.tensor(plan[name]) for name in ("seconds", "pitch", "loudness")))
        frames = model.decoder(model.encode(phonemes, layout, voice)[0], layout, prosody).frames_PF
        np.save(out / f"{sound.stem}.mel.npy", frames.unflatten(-1, (2, -1)).flatten(0, 1).T.numpy().astype(np.float16))
        link = out / sound.name
        link.unlink(missing_ok=True)
        link.symlink_to(sound)
        rows.append("\t".join((str(link.absolute()), row["text"], row["language"], row["speaker"])))
    (out / "sounds.tsv").write_text("\n".join(rows) + "\n", "utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
