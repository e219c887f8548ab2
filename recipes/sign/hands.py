"""Drawn hands that show how many: nobody's, so that clips of them may lie anywhere.

    python recipes/sign/hands.py COUNT SEED OUT.mov

Not a sign language, and no photos.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from fractions import Fraction
from math import cos, radians, sin
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from whisper_moe.config_aside import FilmConfig
from whisper_moe.media.video import Fit, load_film

SIDE, FRAMES, RATE = 144, 12, 8
FINGERS = ((-34, 0.34), (-13, 0.50), (0, 0.55), (13, 0.51), (30, 0.40))
"""Thumb to little finger: degrees from upright, and length; both as shares of the picture's side where they are lengths."""
SHOWN = {0: (), 1: (1,), 2: (1, 2), 3: (1, 2, 3), 4: (1, 2, 3, 4), 5: (0, 1, 2, 3, 4)}
_FOLDED = 0.13


def shown(count: int, seed: int) -> list[np.ndarray]:
    """RGB pictures [144, 144, 3] of a hand that shows ``count``, 0 to 5, and sways a little."""
    random = np.random.default_rng([count, seed])
    skin = np.array([random.uniform(90, 240), 0, 0])
    skin[1:] = skin[0] * random.uniform(0.62, 0.8), skin[0] * random.uniform(0.45, 0.65)
    ground = random.uniform(0, 255, 3)
    while abs(ground - skin).sum() < 160:
        ground = random.uniform(0, 255, 3)
    size, x, y = random.uniform(0.75, 1.0), random.uniform(-0.06, 0.06), random.uniform(-0.04, 0.08)
    tilt, sway = random.uniform(-15, 15), random.uniform(-8, 8)
    jitter = random.uniform(-3, 3, 5)
    frames: list[np.ndarray] = []
    for place in range(FRAMES):
        lean = tilt + sway * sin(2 * np.pi * place / FRAMES)
        frames.append(_hand(SHOWN[count], tuple(skin), tuple(ground), size, (x, y), lean, jitter))
    return frames


def _hand(
    out: tuple[int, ...],
    skin: tuple[float, ...],
    ground: tuple[float, ...],
    size: float,
    at: tuple[float, float],
    lean: float,
    jitter: np.ndarray,
) -> np.ndarray:
    scale, big = 2 * SIDE * size, 2 * SIDE
    picture = Image.new("RGB", (big, big), tuple(map(int, ground)))
    draw, dark = ImageDraw.Draw(picture), tuple(int(0.7 * part) for part in skin)
    fill = tuple(map(int, skin))
    cx, cy = big * (0.5 + at[0]), big * (0.66 + at[1])
    for finger, (degrees, length) in enumerate(FINGERS):
        angle = radians(degrees + lean + (jitter[finger] if finger in out else 0))
        reach = scale * (length if finger in out else _FOLDED)
        spread = scale * 0.0072 * degrees
        foot = cx + spread * cos(radians(lean)), cy - scale * 0.1 + spread * sin(radians(lean))
        tip = foot[0] + reach * sin(angle), foot[1] - reach * cos(angle)
        for wide, colour in ((0.105, dark), (0.085, fill)):
            _stroke(draw, foot, tip, scale * wide, colour)
    for wide, colour in ((0.225, dark), (0.21, fill)):
        draw.ellipse([cx - scale * wide, cy - scale * 0.2, cx + scale * wide, cy + scale * 0.24], fill=colour)
    return np.asarray(picture.filter(ImageFilter.GaussianBlur(1)).resize((SIDE, SIDE), Image.Resampling.LANCZOS))


def _stroke(
    draw: ImageDraw.ImageDraw,
    begin: tuple[float, float],
    end: tuple[float, float],
    wide: float,
    colour: tuple[int, ...],
) -> None:
    draw.line([begin, end], fill=colour, width=round(wide))
    for x, y in (begin, end):
        draw.ellipse([x - wide / 2, y - wide / 2, x + wide / 2, y + wide / 2], fill=colour)


def pictures(path: str | Path, rate: float, fit: Fit) -> np.ndarray:
    """All pictures of a clip at ``rate`` a second: of so many tokens that none of these clips is thinned out."""
    return load_film(path, FilmConfig(rate=rate, frames=16, patches=1, tokens=1_500), fit=fit)


def write(path: Path, frames: Iterable[np.ndarray]) -> None:
    """RGB pictures [height, width, 3] to a film, :data:`RATE` a second; an odd side loses a pixel."""
    frames = list(frames)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"crf": "14"})
        stream.height, stream.width = (side // 2 * 2 for side in frames[0].shape[:2])
        stream.pix_fmt = "yuv420p"
        for number, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame[: stream.height, : stream.width], format="rgb24")
            picture.pts, picture.time_base = number, Fraction(1, RATE)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


if __name__ == "__main__":
    write(Path(sys.argv[3]), shown(int(sys.argv[1]), int(sys.argv[2])))
