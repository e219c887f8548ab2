"""Translations of held-out pairs beside what costs nothing: the source itself, a dictionary, the nearest sentence learned from.

    python recipes/translation/evaluate.py MODEL TABLES DATA OUT [--limit 100] [--beams 4]

TABLES are pairs.py's; DATA the parallel texts, for the dictionary (freedict-en-hi) and NTREX, of which nothing was learned. OUT gets
table.md (chrF++ and BLEU, with 95 % intervals of a bootstrap over sentences, and the paired difference to the best of the rivals),
samples.md (the first pairs of each source, as they came), and report.json. chrF++ and BLEU are sacrebleu's.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
from collections import Counter
from collections.abc import Callable
from math import log
from pathlib import Path

import numpy as np
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from whisper_moe import WhisperMoE

ROUNDS, SAMPLES = 1_000, 3
_WORDS = re.compile(r"[\w\u0900-\u0963]+|\S")


class Dictionary:
    """Word by word, the first sense; what it lacks stays as it is."""

    def __init__(self, file: Path) -> None:
        self.first: dict[tuple[str, str], str] = {}
        for line in file.read_text("utf-8").splitlines():
            if len(cells := line.split("\t")) > 1:
                en, hi = cells[0].lower(), cells[1]
                self.first.setdefault(("en", en), hi)
                self.first.setdefault(("hi", hi), en)

    def __call__(self, text: str, source: str) -> str:
        return " ".join(self.first.get((source, word.lower()), word) for word in _WORDS.findall(text))


class Nearest:
    """The translation of the likeliest sentence: most shared words, rare ones counting more."""

    def __init__(self, pairs: list[tuple[str, str]]) -> None:
        self.pairs, self.words = pairs, [frozenset(_WORDS.findall(source.lower())) for source, _ in pairs]
        often = Counter(word for words in self.words for word in words)
        self.weight = {word: log(1 + len(pairs) / count) for word, count in often.items()}
        self.own = np.array([sum(map(self.weight.__getitem__, words)) for words in self.words])
        self.index: dict[str, list[int]] = {}
        for place, words in enumerate(self.words):
            for word in words:
                self.index.setdefault(word, []).append(place)

    def __call__(self, text: str) -> str:
        shared = np.zeros(len(self.pairs))
        for word in set(_WORDS.findall(text.lower())) & self.index.keys():
            shared[self.index[word]] += self.weight[word]
        return self.pairs[int((shared / (self.own + 8.0)).argmax())][1]


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open(encoding="utf-8"), delimiter="\t", quoting=csv.QUOTE_NONE))


def scores(metric: CHRF | BLEU, found: list[str], wanted: list[str], draws: np.ndarray) -> tuple[float, np.ndarray]:
    """Of the corpus, and of each drawn one."""
    statistics = np.array(metric._extract_corpus_statistics(found, [wanted]))  # pyright: ignore[reportPrivateUsage]
    of = lambda rows: metric._compute_score_from_stats(statistics[rows].sum(0).tolist()).score  # noqa: E731 # pyright: ignore[reportPrivateUsage]
    return of(slice(None)), np.array([of(rows) for rows in draws])


def interval(values: np.ndarray) -> str:
    low, high = np.percentile(values, [2.5, 97.5])
    return f"({low:.1f} to {high:.1f})"


def main(asked: argparse.Namespace) -> None:
    model = WhisperMoE.from_pretrained(asked.model)
    dictionary = Dictionary(asked.data / "freedict-en-hi/en-hi.tsv")
    learned = [row for name in ("train", "bible") for row in rows_of(asked.tables / f"{name}.tsv")]
    sets = {path.stem: rows_of(path) for path in sorted((asked.tables / "test").glob("*.tsv"))}
    news = [line.split("\t") for line in (asked.data / "ntrex/en-hi.tsv").read_text("utf-8").splitlines()]
    sets["ntrex"] = [
        {"source_text": a, "text": b, "language": x, "target_language": y}
        for one, two in ([cells[0].strip(), cells[1].strip()] for cells in news)
        for a, b, x, y in ((one, two, "en", "hi"), (two, one, "hi", "en"))
    ]
    lines = ["| source | direction | pairs | system | chrF++ | BLEU | chrF++, over the best rival |", "|---|---|---:|---|---:|---:|---:|"]
    samples, report = list[str](), list[dict[str, object]]()
    for source, target in (("en", "hi"), ("hi", "en")):
        nearest = Nearest([(r["source_text"], r["text"]) for r in learned if r["language"] == source])
        systems: dict[str, Callable[[str], str]] = {
            "copy": lambda text: text,
            "dictionary": lambda text, source=source: dictionary(text, source),
            "nearest": nearest,
            "model": lambda text, s=source, t=target: model.translate(text, source=s, target=t).text,
        }
        for name, rows in sets.items():
            own = [row for row in rows if row["language"] == source][: asked.limit]
            texts, wanted = [row["source_text"] for row in own], [row["text"] for row in own]
            draws = np.random.default_rng(0).integers(len(own), size=(ROUNDS, len(own)))
            drawn: dict[str, np.ndarray] = {}
            for system, say in systems.items():
                if system == "model":  # side by side: a pack holds many
                    found = model.translate("\n".join(texts), source=source, target=target).text.split("\n")
                else:
                    found = [say(text) for text in texts]
                chrf, drawn[system] = scores(CHRF(word_order=2), found, wanted, draws)
                bleu, spread = scores(BLEU(), found, wanted, draws)
                over = ""
                if system == "model":
                    best = max(("copy", "dictionary", "nearest"), key=lambda each: drawn[each].mean())
                    over = f"{(drawn['model'] - drawn[best]).mean():+.1f} {interval(drawn['model'] - drawn[best])}, {best}"
                    samples += [f"**{name}**, {source} to {target}", ""]
                    samples += [f"- {a}\n  - {b}\n  - *{c}*" for a, b, c in list(zip(texts, found, wanted, strict=True))[:SAMPLES]] + [""]
                lines.append(
                    f"| {name} | {source} to {target} | {len(own)} | {system} | {chrf:.1f} {interval(drawn[system])} | {bleu:.1f} {interval(spread)} | {over} |"
                )
                report.append({"set": name, "direction": f"{source}>{target}", "system": system, "chrf": chrf, "bleu": bleu, "found": found})
            print(*lines[-4:], sep="\n", flush=True)
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / "table.md").write_text("\n".join(lines) + "\n", "utf-8")
    (asked.out / "samples.md").write_text("\n".join(samples), "utf-8")
    (asked.out / "report.json").write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name in ("model", "tables", "data", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--limit", type=int, default=100)
    main(parser.parse_args())
