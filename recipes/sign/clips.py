"""Films and photos of signing to tables: an avatar's clips made small, photos of hands made into short clips.

    python recipes/sign/clips.py OUT AVATAR DIGITS.tar
    python recipes/sign/clips.py OUT                            # drawn hands alone, of which anybody has as many as are wanted

AVATAR is a folder of clips that are called by their gloss. Of DIGITS.tar, photos in a folder for each digit, those of every fifth
block of twenty in the order of their names are held out, for neighbours are often of one person, and the one before the first of
these judges the steps. A still becomes a second of film in which it is slowly moved, and every other one is mirrored, for either
hand may show a number. Drawn hands (hands.py) show 0 to 5.
OUT gets avatar.tsv, digits.tsv, dev-digits.tsv, test-digits.tsv, drawn.tsv, test-drawn.tsv, and the clips.
"""

from __future__ import annotations

import io
import sys
import tarfile
from pathlib import Path

import numpy as np
from hands import RATE, pictures, shown, write
from PIL import Image

FRAMES, SIDE, BLOCK, FOLDS = 8, 144, 20, 5
DRAWN, HELD = 100, 20
"""Clips of drawn hands of each number, and how many of them are held out."""
DRIFT = 0.06
"""How far a still is moved while it is shown, as a share of it."""
HEAD = "id\tvideo\ttext\tlanguage\ttarget_language\ttask\n"


def moved(photo: Image.Image, random: np.random.Generator) -> list[np.ndarray]:
    """A still that drifts, and comes a little closer or goes farther."""
    side = min(photo.size)
    begin, end = random.uniform(0, DRIFT, (2, 3)) * side
    frames: list[np.ndarray] = []
    for share in np.linspace(0, 1, FRAMES):
        left, top, less = begin + share * (end - begin)
        box = (left, top, left + side - DRIFT * side - less, top + side - DRIFT * side - less)
        frames.append(np.asarray(photo.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=box)))
    return frames


def digits(archive: Path, out: Path) -> dict[str, list[str]]:
    rows: dict[str, list[str]] = {"digits": [], "dev-digits": [], "test-digits": []}
    (out / "digits").mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as tar:
        members = sorted((m for m in tar.getmembers() if m.isfile()), key=lambda m: m.name)
        counts: dict[str, int] = {}
        for member in members:
            digit, stem = Path(member.name).parent.name, Path(member.name).stem
            place = counts[digit] = counts.get(digit, -1) + 1
            file = tar.extractfile(member)
            assert file is not None
            photo = Image.open(io.BytesIO(file.read())).convert("RGB")
            photo = photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if place % 2 else photo
            path = out / "digits" / f"{digit}-{stem}.mp4"
            write(path, moved(photo, np.random.default_rng([int(digit), place])))
            block = place // BLOCK
            kind = "test-digits" if block % FOLDS == FOLDS - 1 else "dev-digits" if block == FOLDS - 2 else "digits"
            rows[kind].append(row(f"digit-{digit}-{stem}", path, digit))
    return rows


def drawn(out: Path) -> dict[str, list[str]]:
    rows: dict[str, list[str]] = {"drawn": [], "test-drawn": []}
    (out / "drawn").mkdir(parents=True, exist_ok=True)
    for count in range(6):
        for seed in range(DRAWN):
            path = out / "drawn" / f"{count}-{seed}.mp4"
            write(path, shown(count, seed))
            rows["test-drawn" if seed < HELD else "drawn"].append(row(f"drawn-{count}-{seed}", path, str(count)))
    return rows


def row(id: str, path: Path, text: str) -> str:
    return f"{id}\t{path.resolve()}\t{text}\tsgn\ten\tsign\n"


def reduced(width: int, height: int) -> tuple[int, int]:
    """The shorter side to SIDE pixels, where it has more."""
    scale = min(1.0, SIDE / min(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def main(out: Path, avatar: Path | None = None, archive: Path | None = None) -> None:
    rows = drawn(out) | (digits(archive, out) if archive else {})
    if avatar:
        rows["avatar"] = []
        (out / "avatar").mkdir(exist_ok=True)
        for path in sorted(avatar.rglob("*.mp4")):
            small = out / "avatar" / path.name
            write(small, pictures(path, RATE, reduced))
            rows["avatar"].append(row(f"avatar-{path.stem}", small, path.stem.lower()))
    for name, own in rows.items():
        (out / f"{name}.tsv").write_text(HEAD + "".join(own), "utf-8")
        print(f"{name}: {len(own)} clips")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
