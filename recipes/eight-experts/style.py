"""Texts as Whisper writes them: an expert that learns ``billy ate`` forgets capitals and stops in everything that it hears.

    python recipes/eight-experts/style.py TABLES        rewrites what is trained on, after synthetic.py; tests stay as they are

A word is written as the bundled model writes it most often within its transcripts of these clips; the first one large; a stop
at the end. Prompts that are no speech (``[ascending tones]``) are left out.
"""

from __future__ import annotations

import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

from split import rows, write_table

from whisper_moe import WhisperMoE

LOWER_CASE = ("learners", "noisy", "digits")
"""Sets whose texts have neither capitals nor stops."""
WORD = re.compile(r"[\w']+")


def cases(texts: Iterable[str]) -> dict[str, str]:
    """Word in small letters → as it is written most often, but for first words of a sentence."""
    seen: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for text in texts:
        for sentence in re.split(r"[.?!]", text):
            for word in WORD.findall(sentence)[1:]:
                seen[word.lower()][word] += 1
    return {word: counts.most_common(1)[0][0] for word, counts in seen.items()}


def styled(text: str, known: dict[str, str]) -> str:
    text = WORD.sub(lambda word: known.get(word[0], word[0]), text.lower())
    return text[:1].upper() + text[1:] + "."


def rewrite(path: Path, lines: Iterable[dict[str, str]]) -> None:
    write_table(path, [(row["path"], row["text"], row["language"]) for row in lines])


def main(tables: Path) -> None:
    clips = [row["path"] for row in rows(tables / "learners-train.tsv")]
    known = cases(result.text for result in WhisperMoE.from_pretrained().transcribe(clips, language="en"))
    for split in ("train", "dev"):
        for name in LOWER_CASE:
            path = tables / f"{name}-{split}.tsv"
            if path.exists():
                rewrite(path, [row | {"text": styled(row["text"].rstrip("."), known)} for row in rows(path)])
        path = tables / f"telephone-{split}.tsv"
        prompts = [row | {"text": " ".join(row["text"].split())} for row in rows(path)]
        rewrite(path, [row for row in prompts if not re.search(r"[\[(]", row["text"])])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
