"""The whole command on one short clip: interpreter, imports, weights and transcription, as a person waits for it."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from peers import weights_of

CLIP_SECONDS = 5.0


def program(name: str) -> str:
    """The console script beside this interpreter, or on PATH."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found:
        raise ValueError(f"the program {name} is not installed")
    return found


def commands(args: argparse.Namespace, clip: Path, folder: str) -> dict[str, list[str]]:
    """The command line of each program: one clip, the same language, beam and threads, text only."""
    if not shutil.which("ffmpeg"):
        raise ValueError("openai's whisper command needs an ffmpeg program: install ffmpeg or imageio-ffmpeg")
    common = ["--language", args.language, "--threads", str(args.threads)]
    if args.language == "auto":
        common = common[2:]
    ours = [program("whisper-moe"), "transcribe", str(clip), *common, "--beam-size", str(args.beam)]
    checkpoint = weights_of("openai", args.model, args.cache)
    greedy = ["--beam_size", str(args.beam)] if args.beam > 1 else ["--beam_size", "None", "--best_of", "None"]
    theirs = [program("whisper"), str(clip), *common, *greedy, "--fp16", "False", "--model", checkpoint]
    theirs += ["--temperature", "0", "-f", "txt", "-o", folder]
    if not args.fallback:
        ours += ["--temperature-increment-on-fallback", "0"]
        theirs += ["--temperature_increment_on_fallback", "None"]
    return {"whisper-moe": ours, "whisper": theirs}


def run(line: list[str], threads: int) -> dict[str, Any]:
    """Wall seconds, peak memory and standard output of one command. Raises :class:`RuntimeError` if it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed program has its bytecode
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        start = time.perf_counter()
        child = subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environment)
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        text, trouble = out.read().decode().strip(), err.read().decode().strip()
    if child.returncode:
        raise RuntimeError(f"{' '.join(line)}: exit status {child.returncode}\n{trouble[-2000:]}")
    peak = usage.ru_maxrss if sys.platform == "darwin" else usage.ru_maxrss * 1024
    return {"wall": wall, "cpu": usage.ru_utime + usage.ru_stime, "peak_bytes": peak, "text": text}


def compare(args: argparse.Namespace, heading: dict[str, Any], clip: Path, seconds: float) -> int:
    """Both commands ``--repeats`` times in turn after one run that is not counted (it fills the disk cache)."""
    runs: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        lines = commands(args, clip, folder)
        shown = {name: " ".join(each.split("/")[-1] for each in line) for name, line in lines.items()}
        for repeat in range(args.repeats + 1):
            for name, line in lines.items():
                result = run(line, args.threads)
                if repeat:
                    runs.setdefault(name, []).append(result)
                    print(f"[{repeat}/{args.repeats}] {name}: {result['wall']:.2f} s", file=sys.stderr, flush=True)
    results = heading | {"clip": clip.name, "clip_seconds": seconds, "commands": {}}
    for name, each in runs.items():
        walls = [result["wall"] for result in each]
        results["commands"][name] = {
            "line": shown[name],
            "wall": {"min": min(walls), "median": statistics.median(walls), "all": walls},
            "cpu_seconds": min(result["cpu"] for result in each),
            "peak_bytes": max(result["peak_bytes"] for result in each),
            "text": each[0]["text"],
        }
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "command.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    (args.output / "command.md").write_text(table(results))
    return 0


def table(results: dict[str, Any]) -> str:
    """The Markdown table of a comparison."""
    rows = ["| command | seconds, best | seconds, median | peak MB |", "|---|---:|---:|---:|"]
    for name, each in results["commands"].items():
        wall, peak = each["wall"], each["peak_bytes"] / 1e6
        rows.append(f"| `{name}` | {wall['min']:.2f} | {wall['median']:.2f} | {peak:.0f} |")
    settings, machine = results["settings"], results["machine"]
    rows.append("")
    rows.append(
        f"One clip of {results['clip_seconds']:.1f} s, imports and model load included, {settings['repeats']} runs in "
        f"turn, {settings['threads']} threads of {machine['cpu']}, {results['date'][:10]}."
    )
    return "\n".join(rows) + "\n"
