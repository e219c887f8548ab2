"""A model that listens, and what speaks of other runs beside it: all that there was stays as it was.

    python join.py LISTENS SPEECH READER VOCODER OUT

SPEECH, READER and VOCODER are checkpoints of one shape, of which each gives its part; they may be the same.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from whisper_moe.weights.checkpoint import load_checkpoint, save_checkpoint
from whisper_moe.weights.parts import SPEECH


def main(listens: Path, speech: Path, reader: Path, vocoder: Path, out: Path) -> None:
    model, given = load_checkpoint(listens, aside=False), load_checkpoint(speech)
    state = model.state | {key: tensor for key, tensor in given.state.items() if key.startswith(SPEECH)}
    for part, path in (("reader", reader), ("vocoder", vocoder)):
        other = load_checkpoint(path)
        if other.config.speech != given.config.speech:
            raise ValueError(f"{path}: speaks in another shape than {speech}")
        state |= {key: tensor for key, tensor in other.state.items() if key.startswith(f"{SPEECH}{part}.")}
    config = model.config.model_copy(update={"speech": given.config.speech})
    save_checkpoint(out, replace(model, config=config, state=state), quantize=True)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
