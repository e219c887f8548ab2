"""How near sounds are to the synthesiser's, and how natural a judge finds them: of what `evaluate.py` kept.

    python quality.py OUT

Mel-cepstral distance (dB, 13 coefficients without the first, of log-mels from 24 bands, along the best alignment: DTW);
correlation of log F0 where both are voiced (WORLD's Harvest, 60 to 400 Hz, along the same alignment); and DNSMOS P.835's overall
opinion with P.808's (arXiv 2110.01763): made for noisy calls, the one judge of naturalness whose weights come with a package.
Needs librosa, pyworld and speechmos.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import librosa
import numpy as np
import pyworld
import soundfile
from numpy.typing import NDArray
from speechmos import dnsmos

RATE, HOP, BANDS = 16_000, 80, 24
"""Samples a second, and between frames: 5 ms."""
HEAD = """| voice | system | mel-cepstral distance, dB | log F0, r | DNSMOS overall | P.808 |
|---|---|---:|---:|---:|---:|"""
Array = NDArray[Any]


def features(path: Path) -> tuple[Array, Array]:
    """Mel-cepstra [12, frames] and F0 in Hz, 0 where unvoiced."""
    sound = soundfile.read(path, dtype="float64")[0]
    power = librosa.feature.melspectrogram(y=sound, sr=RATE, n_fft=512, hop_length=HOP, n_mels=BANDS)
    cepstra = librosa.feature.mfcc(S=librosa.power_to_db(power, top_db=60.0), n_mfcc=13)[1:]
    pitch = pyworld.harvest(sound, RATE, frame_period=1_000 * HOP / RATE, f0_floor=60.0, f0_ceil=400.0)[0]
    return cepstra, np.pad(pitch, (0, max(0, cepstra.shape[1] - len(pitch))))


def apart(one: Path, other: Path) -> tuple[float, Array, Array]:
    """Mel-cepstral distance, and both log F0 where both are voiced."""
    (a, high_a), (b, high_b) = features(one), features(other)
    path = librosa.sequence.dtw(a, b)[1]
    # 10 √2 / ln 10 times the distance of cepstra of natural logarithms is the root mean square of the spectra's, smoothed, in dB
    distance = np.sqrt(((a[:, path[:, 0]] - b[:, path[:, 1]]) ** 2).sum(0) / BANDS).mean()
    pair = np.stack([high_a[path[:, 0]], high_b[path[:, 1]]])
    voiced = (pair > 0).all(0)
    return float(distance), *np.log(pair[:, voiced])


def main(out: Path) -> None:
    lines = [HEAD]
    reference = {path.name: path for path in (out / "sounds/synthesiser").glob("*.wav")}
    voices = sorted({name.rpartition("-")[0] for name in reference})
    for voice in voices:
        for system in sorted(path for path in (out / "sounds").iterdir() if path.is_dir()):
            sounds = sorted(system.glob(f"{voice}-*.wav"))
            near = [apart(reference[path.name], path) for path in sounds] if system.name != "synthesiser" else []
            cells = ["", ""]
            if near:
                pitch = np.concatenate([np.stack(each[1:]) for each in near], 1)
                cells = [f"{np.mean([each[0] for each in near]):.2f}", f"{np.corrcoef(pitch)[0, 1]:.2f}"]
            judged = [dnsmos.run(str(path), sr=RATE) for path in sounds]
            cells += [f"{np.mean([each[name] for each in judged]):.2f}" for name in ("ovrl_mos", "p808_mos")]
            lines.append(f"| {voice} | {system.name} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    (out / "quality.md").write_text("\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
