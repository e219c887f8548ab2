"""Translations of held-out pairs beside what costs nothing: the source itself, a dictionary, the nearest sentence learned from.

    python recipes/translation/evaluate.py MODEL TABLES DATA OUT [--limit 100]

TABLES are pairs.py's; DATA the parallel texts, for the dictionary (freedict-en-hi) and NTREX, of which nothing was learned. OUT
gets table.md (chrF++ and BLEU, sacrebleu's, with 95 % intervals of a bootstrap over sentences, and the paired difference to the
best of the rivals), samples.md (the first pairs of each source, as they came), and report.json.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
from collections import Counter
from math import log
from pathlib import Path
from typing import Any

import numpy as np
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from whisper_moe import WhisperMoE

ROUNDS, SAMPLES = 1_000, 3
HEAD = """| source | direction | pairs | system | chrF++ | BLEU | chrF++, over the best rival |
|---|---|---:|---|---:|---:|---:|"""
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


def scores(metric: Any, found: list[str], wanted: list[str], draws: np.ndarray) -> tuple[float, np.ndarray]:
    """Of the corpus, and of each drawn one."""
    statistics = np.array(metric._extract_corpus_statistics(found, [wanted]))

    def of(rows: Any) -> float:
        return metric._compute_score_from_stats(statistics[rows].sum(0).tolist()).score

    return of(slice(None)), np.array([of(rows) for rows in draws])


def interval(values: np.ndarray) -> str:
    low, high = np.percentile(values, [2.5, 97.5])
    return f"({low:.1f} to {high:.1f})"


def sets_of(tables: Path, data: Path) -> dict[str, list[dict[str, str]]]:
    """Held-out pairs of each source, both ways, and the news of NTREX."""
    sets = {path.stem: rows_of(path) for path in sorted((tables / "test").glob("*.tsv"))}
    text = (data / "ntrex/en-hi.tsv").read_text("utf-8").replace("\n\t", "\t")  # a pair is two lines there
    news = [line.split("\t")[:2] for line in text.splitlines() if "\t" in line]
    names = ("source_text", "text", "language", "target_language")
    both = [
        row for en, hi in news for row in ((en.strip(), hi.strip(), "en", "hi"), (hi.strip(), en.strip(), "hi", "en"))
    ]
    return sets | {"ntrex": [dict(zip(names, row, strict=True)) for row in both]}


def judged(said: dict[str, list[str]], wanted: list[str]) -> dict[str, tuple[str, str, str]]:
    """chrF++, BLEU, and the model's lead, of each system."""
    draws = np.random.default_rng(0).integers(len(wanted), size=(ROUNDS, len(wanted)))
    found = {name: scores(CHRF(word_order=2), texts, wanted, draws) for name, texts in said.items()}
    best = max((name for name in said if name != "model"), key=lambda name: found[name][0])
    lead = found["model"][1] - found[best][1]
    cells: dict[str, tuple[str, str, str]] = {}
    for name, (value, drawn) in found.items():
        bleu, spread = scores(BLEU(), said[name], wanted, draws)
        over = f"{lead.mean():+.1f} {interval(lead)}, {best}" if name == "model" else ""
        cells[name] = f"{value:.1f} {interval(drawn)}", f"{bleu:.1f} {interval(spread)}", over
    return cells


def main(asked: argparse.Namespace) -> None:
    model = WhisperMoE.from_pretrained(asked.model)
    dictionary = Dictionary(asked.data / "freedict-en-hi/en-hi.tsv")
    learned = [row for name in ("train", "bible") for row in rows_of(asked.tables / f"{name}.tsv")]
    lines, samples, report = [HEAD], list[str](), list[dict[str, Any]]()
    asked.out.mkdir(parents=True, exist_ok=True)
    for source, target in (("en", "hi"), ("hi", "en")):
        nearest = Nearest([(r["source_text"], r["text"]) for r in learned if r["language"] == source])
        for name, rows in sets_of(asked.tables, asked.data).items():
            own = [row for row in rows if row["language"] == source][: asked.limit]
            texts, wanted = [row["source_text"] for row in own], [row["text"] for row in own]
            together = model.translate("\n".join(texts), source=source, target=target).text  # a pack holds many
            said = {"copy": texts, "dictionary": [dictionary(text, source) for text in texts]}
            said |= {"nearest": [nearest(text) for text in texts], "model": together.split("\n")}
            where = f"| {name} | {source} to {target} | {len(own)} |"
            lines += [f"{where} {system} | {' | '.join(cells)} |" for system, cells in judged(said, wanted).items()]
            print(lines[-1], flush=True)
            three = list(zip(texts, said["model"], wanted, strict=True))[:SAMPLES]
            samples += [f"**{name}**, {source} to {target}\n", *(f"- {a}\n  - {b}\n  - *{c}*" for a, b, c in three), ""]
            report += [{"set": name, "to": target, "system": system, "said": each} for system, each in said.items()]
            (asked.out / "table.md").write_text("\n".join(lines) + "\n", "utf-8")
            (asked.out / "samples.md").write_text("\n".join(samples), "utf-8")
    (asked.out / "report.json").write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name in ("model", "tables", "data", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--limit", type=int, default=100)
    main(parser.parse_args())
