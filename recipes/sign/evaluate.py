"""Signs read right, beside the nearest clip by its pixels: clips of an avatar changed as no training did, photos held out.

    python recipes/sign/evaluate.py MODEL TABLES OUT
    python recipes/sign/evaluate.py MODEL include/test.tsv OUT      # one table, as ../corpora/include.py writes INCLUDE's

TABLES are clips.py's. OUT gets table.md (accuracy with Wilson's 95 % interval, and characters wrong), confusions.md, report.json.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction
from math import sqrt
from pathlib import Path
from typing import Any, TypeAlias

import av
import numpy as np
from hands import pictures
from PIL import Image, ImageFilter
from rapidfuzz.distance import Levenshtein

from whisper_moe import WhisperMoE
from whisper_moe.config_aside import FilmConfig
from whisper_moe.data.corpus import CorpusConfig
from whisper_moe.data.table import open_corpus
from whisper_moe.media.video import load_film

Picture: TypeAlias = Image.Image
RATE, WIDTH, HEIGHT = 24, 320, 180
TOGETHER = 16
HEAD = """| clips | kind | many | the model | nearest by pixels | CER |
|---|---|---:|---:|---:|---:|"""


def sheared(picture: Picture, random: np.random.Generator) -> Picture:
    lean = float(random.choice([-1, 1]) * random.uniform(0.12, 0.2))
    return picture.transform(picture.size, Image.Transform.AFFINE, (1, lean, -lean * HEIGHT / 2, 0, 1, 0), fillcolor=0)


def seen_from_aside(picture: Picture, random: np.random.Generator) -> Picture:
    """In perspective: one side is nearer."""
    near, w, h = 0.14 * HEIGHT, WIDTH, HEIGHT
    left = (0, near, 0, h - near, w, h, w, 0)
    right = (0, 0, 0, h, w, h - near, w, near)
    return picture.transform(picture.size, Image.Transform.QUAD, left if random.random() < 0.5 else right)


def grey(picture: Picture, random: np.random.Generator) -> Picture:
    return picture.convert("L").convert("RGB")


def blurred(picture: Picture, random: np.random.Generator) -> Picture:
    return picture.filter(ImageFilter.GaussianBlur(2))


def noisy(picture: Picture, random: np.random.Generator) -> Picture:
    values = np.asarray(picture) + random.normal(0, 22, (picture.height, picture.width, 3))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def hidden(picture: Picture, random: np.random.Generator) -> Picture:
    """A bar before a twelfth of it, somewhere in the lower half."""
    picture = picture.copy()
    left = int(random.uniform(0, 0.8) * WIDTH)
    picture.paste((90, 60, 40), (left, int(0.75 * HEIGHT), left + WIDTH // 4, HEIGHT))
    return picture


CHANGES: dict[str, Callable[[Picture, np.random.Generator], Picture]] = {
    each.__name__.replace("_", " "): each for each in (sheared, seen_from_aside, grey, blurred, noisy, hidden)
}


def changed(clip: str, kind: str, seed: int, into: Path) -> Path:
    """A copy of a clip, changed in one way; ``uneven``: a third of its pictures lost, the others at their times."""
    whole = pictures(clip, RATE, lambda width, height: (width, height))
    frames = [Image.fromarray(each).resize((WIDTH, HEIGHT)) for each in whole]
    kept, random = [*range(len(frames))], np.random.default_rng(seed)
    if kind == "uneven":
        kept = sorted({0, len(frames) - 1, *random.permutation(len(frames))[: 2 * len(frames) // 3].tolist()})
    else:  # one draw for all of its pictures
        frames = [CHANGES[kind](each, np.random.default_rng(seed)) for each in frames]
    with av.open(str(into), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"crf": "23"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for place in kept:
            frame = av.VideoFrame.from_image(frames[place])
            frame.pts, frame.time_base = place, Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return into


class Nearest:
    """The text of the clip that is nearest by its pixels, at eight times."""

    def __init__(self, rows: list[dict[str, str]], film: FilmConfig) -> None:
        self._film, self._texts = film, [row["text"] for row in rows]
        self._all = np.stack([self._values(row["video"]) for row in rows])

    def _values(self, clip: str | Path) -> np.ndarray:
        frames = load_film(clip, self._film)
        frames = frames[np.linspace(0, len(frames) - 1, 8).round().astype(int)]
        size = (64, 36) if frames.shape[2] > frames.shape[1] else (48, 48)
        small = [np.asarray(Image.fromarray(each).resize(size), np.float32) for each in frames]
        values = np.stack(small).ravel()
        return (values - values.mean()) / (values.std() + 1)

    def __call__(self, clip: str | Path) -> str:
        return self._texts[int(((self._all - self._values(clip)) ** 2).mean(1).argmin())]


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open(encoding="utf-8"), delimiter="\t"))


def sets_of(tables: Path, scratch: Path, film: FilmConfig) -> Iterator[tuple[str, str, list[Any], list[str], Nearest]]:
    """Name, kind, clips and their texts, and what knows the clips that were learned from."""
    avatar = rows_of(tables / "avatar.tsv")
    nearest, texts = Nearest(avatar, film), [row["text"] for row in avatar]
    for number, kind in enumerate([*CHANGES, "uneven"]):
        clips = [
            changed(row["video"], kind, 1_000 * number + place, scratch / f"{number}-{place}.mp4")
            for place, row in enumerate(avatar)
        ]
        yield "avatar", kind, clips, texts, nearest
    for name, kind in (("digits", "stills of hands"), ("drawn", "drawn hands")):
        held, learned = rows_of(tables / f"test-{name}.tsv"), Nearest(rows_of(tables / f"{name}.tsv"), film)
        yield name, kind, [row["video"] for row in held], [row["text"] for row in held], learned


def interval(right: int, many: int) -> str:
    """Wilson's, of a share, in per cent."""
    share, z = right / many, 1.96
    middle, reach = share + z * z / (2 * many), z * sqrt(share * (1 - share) / many + z * z / (4 * many * many))
    low, high = (100 * (middle + sign * reach) / (1 + z * z / many) for sign in (-1, 1))
    return f"{100 * share:.1f} ({low:.1f} to {high:.1f})"


def read(model: WhisperMoE, clips: list[Any], language: str | None = None) -> list[str]:
    said: list[str] = []
    for begin in range(0, len(clips), TOGETHER):
        said += [each.text for each in model.sign(clips[begin : begin + TOGETHER], language=language)]
    return said


def line(name: str, kind: str, said: list[str], wanted: list[str], near: list[str] | None) -> str:
    right = sum(a == b for a, b in zip(said, wanted, strict=True))
    beside = interval(sum(a == b for a, b in zip(near, wanted, strict=True)), len(wanted)) if near else ""
    wrong = 100 * sum(map(Levenshtein.distance, wanted, said)) / sum(map(len, wanted))
    return f"| {name} | {kind} | {len(wanted)} | {interval(right, len(wanted))} | {beside} | {wrong:.1f} |"


def confused(name: str, said: list[str], wanted: list[str]) -> list[str]:
    """The commonest mistakes; of few words, the whole table."""
    pairs = Counter(zip(wanted, said, strict=True))
    if len(words := sorted({*wanted})) <= 20:
        others = lambda word: sum(n for (a, b), n in pairs.items() if a == word and b not in words)  # noqa: E731
        lines = [f"| signed | {' | '.join(words)} | other |", "|---" * (len(words) + 2) + "|"]
        lines += [f"| {a} | {' | '.join(str(pairs[a, b] or '') for b in words)} | {others(a) or ''} |" for a in words]
    else:
        wrong = [(pair, n) for pair, n in pairs.most_common() if pair[0] != pair[1]][:30]
        lines = ["| signed | read as | times |", "|---|---|---:|", *(f"| {a} | {b} | {n} |" for (a, b), n in wrong)]
    return [f"**{name}**\n", *lines, ""]


def main(asked: argparse.Namespace) -> None:
    model = WhisperMoE.from_pretrained(asked.model)
    asked.out.mkdir(parents=True, exist_ok=True)
    lines, report = [HEAD], list[dict[str, Any]]()
    if asked.data.is_file():
        corpus = open_corpus(CorpusConfig(source=str(asked.data), split="test"))
        samples, name = [*corpus], asked.data.resolve().parent.name
        (language,) = {sample.language for sample in samples}
        wanted, said = [sample.text for sample in samples], read(model, [sample.video for sample in samples], language)
        print(f"{len(corpus.left_out)} clips are left out", *corpus.left_out[:3], sep="\n  ")
        lines.append(line(name, corpus.name, said, wanted, None))
        report.append({"set": name, "kind": corpus.name, "said": said, "wanted": wanted})
    else:
        film = model.senses.senses.config.film
        assert film is not None
        with tempfile.TemporaryDirectory() as scratch:
            for name, kind, clips, wanted, nearest in sets_of(asked.data, Path(scratch), film):
                said, near = read(model, clips), [nearest(clip) for clip in clips]
                lines.append(line(name, kind, said, wanted, near))
                report.append({"set": name, "kind": kind, "said": said, "wanted": wanted, "nearest": near})
                print(lines[-1], flush=True)
    tables: list[str] = []
    for name in dict.fromkeys(each["set"] for each in report):
        own = [each for each in report if each["set"] == name]
        said, wanted, near = (
            [word for each in own for word in each.get(key, ())] for key in ("said", "wanted", "nearest")
        )
        lines += [line(name, "all", said, wanted, near or None)] * (len(own) > 1)
        tables += confused(name, said, wanted)
    (asked.out / "table.md").write_text("\n".join(lines) + "\n", "utf-8")
    (asked.out / "confusions.md").write_text("\n".join(tables), "utf-8")
    (asked.out / "report.json").write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    main(parser.parse_args())
