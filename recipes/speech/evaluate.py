"""Round trips: sentences that nothing was trained on are read aloud, and whisper-base writes down what it hears.

    python recipes/speech/evaluate.py MODEL TEST.tsv OUT [--limit 50] [--voices af_heart,…]

TEST.tsv is ``teacher.py table``'s: the synthesiser's own reading of each sentence, by every voice of its language; any other
table of speech will do for the vocoder alone (``--voices`` are its speakers). Beside it
stand this model's with its vocoder, and with Griffin-Lim (1984); and the vocoder alone, on mel frames of the synthesiser's
sound. whisper-base hears them padded to 30 s and is told the language. English is compared by words, Hindi by characters after
both are romanised (package ``uroman``), for whisper-base writes this Hindi in Urdu's letters. Capped: no sentence has more
errors than its reference has words or characters. OUT keeps the sounds, for `quality.py`.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from griffin_lim import griffin_lim
from numpy.typing import NDArray
from teacher import write_sound

from whisper_moe import WhisperMoE
from whisper_moe.config import FULL_WINDOW, SAMPLE_RATE
from whisper_moe.generate.speech import Speaker
from whisper_moe.media.audio import load_audio
from whisper_moe.media.mel import HOP, log_mel
from whisper_moe.media.normalize import normalize

Sound = NDArray[np.float32]
HEAD = """| voice | system | errors, % | length, x the synthesiser's | mel distance | x real time |
|---|---|---:|---:|---:|---:|"""


def errors(reference: Sequence[str], found: Sequence[str]) -> int:
    """Levenshtein's distance."""
    before = list(range(len(found) + 1))
    for row, wanted in enumerate(reference, 1):
        now = [row]
        for column, got in enumerate(found, 1):
            now.append(min(before[column] + 1, now[-1] + 1, before[column - 1] + (wanted != got)))
        before = now
    return before[-1]


def judge(language: str) -> Callable[[str], Sequence[str]]:
    """What errors are counted in."""
    if language == "en":
        return lambda text: normalize(text, "en").split()
    from uroman import Uroman

    romanised = Uroman()
    return lambda text: list("".join(c for c in str(romanised.romanize_string(text)).lower() if c.isalpha()))


def interval(wrong: Sequence[int], sizes: Sequence[int], rounds: int = 2_000) -> tuple[float, float, float]:
    """The rate in %, and the 95 % interval of a bootstrap over sentences."""
    draws = np.random.default_rng(0).integers(len(wrong), size=(rounds, len(wrong)))
    rates = 100 * np.array(wrong)[draws].sum(1) / np.array(sizes)[draws].sum(1)
    low, high = np.percentile(rates, [2.5, 97.5])
    return 100 * sum(wrong) / sum(sizes), float(low), float(high)


def systems(speaker: Speaker) -> dict[str, Callable[[dict[str, str]], Sound]]:
    """What reads a row of the table aloud."""
    by_phase = Speaker(speaker.model, griffin_lim)

    def again(vocoder: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, str]], Sound]:
        def heard(row: dict[str, str]) -> Sound:
            with torch.inference_mode():
                return vocoder(log_mel(torch.from_numpy(load_audio(row["path"])))).clamp(-1, 1).numpy()

        return heard

    def ours(which: Speaker) -> Callable[[dict[str, str]], Sound]:
        return lambda row: which.speak(row["text"], voice=row["speaker"], language=row["language"]).samples

    return {
        "synthesiser": lambda row: load_audio(row["path"]),
        "synthesiser, Griffin-Lim": again(griffin_lim),
        "synthesiser, vocoder": again(lambda mel: speaker.model.vocoder(mel[None])[0]),
        "model, Griffin-Lim": ours(by_phase),
        "model": ours(speaker),
    }


def mel_distance(one: Sound, other: Sound) -> float:
    """Mean absolute difference of log-mels of sounds that lie on each other; NaN for those that do not."""
    if abs(len(one) - len(other)) > HOP:
        return float("nan")
    ours, theirs = (log_mel(torch.from_numpy(each[: min(len(one), len(other))])) for each in (one, other))
    return float((ours - theirs).abs().mean())


def main(asked: argparse.Namespace) -> None:
    speaker = Speaker.from_pretrained(asked.model)
    listener = WhisperMoE.from_pretrained("openai/whisper-base", dtype="float32")
    rows = list(csv.DictReader(asked.test.open(encoding="utf-8"), delimiter="\t", quoting=csv.QUOTE_NONE))
    voices = asked.voices.split(",") if asked.voices else [voice.name for voice in speaker.config.voices]
    report: dict[str, Any] = {}
    lines = [HEAD]
    for voice in voices:
        own = [row for row in rows if row["speaker"] == voice][: asked.limit]
        counted = judge(own[0]["language"])
        for name, say in systems(speaker).items():
            if name in asked.without:
                continue
            begun, sounds = time.perf_counter(), [say(row) for row in own]
            seconds = time.perf_counter() - begun
            kept = asked.out / "sounds" / name.replace(", ", "-").lower()
            kept.mkdir(parents=True, exist_ok=True)
            for old in kept.glob(f"{voice}-*.wav"):
                old.unlink()
            for index, sound in enumerate(sounds):
                write_sound(kept / f"{voice}-{index:03d}.wav", sound)
            options = {"language": own[0]["language"], "context_margin": FULL_WINDOW, "timestamps": False}
            texts = [each.text for each in listener.transcribe(sounds, **options)]
            wanted = [counted(row["text"]) for row in own]
            wrong = [min(len(r), errors(r, counted(text))) for r, text in zip(wanted, texts, strict=True)]
            rate, low, high = interval(wrong, [*map(len, wanted)])
            theirs = [load_audio(row["path"]) for row in own]
            lengths = [len(sound) / len(other) for sound, other in zip(sounds, theirs, strict=True)]
            apart = float(np.mean([mel_distance(*both) for both in zip(sounds, theirs, strict=True)]))
            speed = sum(map(len, sounds)) / SAMPLE_RATE / seconds
            cells = [f"{rate:.1f} ({low:.1f} to {high:.1f})"]
            cells += [f"{np.mean(lengths):.2f} ({min(lengths):.2f} to {max(lengths):.2f})"]
            cells += ["" if np.isnan(apart) else f"{apart:.3f}", f"{speed:.1f}"]
            lines.append(f"| {voice} | {name} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
            heard = [
                {"text": row["text"], "heard": text, "errors": w}
                for row, text, w in zip(own, texts, wrong, strict=True)
            ]
            report.setdefault(voice, {})[name] = {"rate": rate, "lengths": lengths, "sentences": heard}
    (asked.out / "table.md").write_text("\n".join(lines) + "\n", "utf-8")
    (asked.out / "report.json").write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--limit", type=int, default=50)
    parser.add_argument("--voices", default="")
    parser.add_argument("--without", action="append", default=[], help="a system that is left out")
    main(parser.parse_args())
