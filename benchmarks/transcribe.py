"""This project and its peers on the same clips, with the same weights, in one run.

``python benchmarks/transcribe.py MANIFEST``: see ``benchmarks/README.md``. MANIFEST is a TSV, ``path<TAB>text``, with
paths relative to it. Every system runs in a process of its own, one after the other, and the repeats are interleaved
(A B C A B C), so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import wave
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import command
import numpy as np
import report
from manifest import read_clips
from peers import Job, systems, weights_of

from whisper_moe.config import FULL_WINDOW, SAMPLE_RATE
from whisper_moe.evaluate.measure import Clip
from whisper_moe.machine import THREAD_VARIABLES, machine, versions

PAUSE_SECONDS = 0.5


def first_window(clips: Sequence[Clip]) -> list[Clip]:
    """As many leading clips as fit one window of 30 s, pauses included."""
    chosen, seconds = [], 0.0
    for clip in clips:
        seconds += clip.seconds + (PAUSE_SECONDS if chosen else 0.0)
        if seconds > FULL_WINDOW:
            break
        chosen.append(clip)
    if not chosen:
        raise ValueError(f"{clips[0].sample.place} alone is longer than {FULL_WINDOW:g} s")
    return chosen


def join(clips: Sequence[Clip], target: Path) -> float:
    """Write all clips into one 16-bit wave file, half a second of silence between them; its seconds."""
    pause = np.zeros(int(PAUSE_SECONDS * SAMPLE_RATE), np.float32)
    parts = [part for clip in clips for part in (clip.sound, pause)][:-1]
    samples = np.round(np.concatenate(parts) * 32_768).clip(-32_768, 32_767).astype("<i2")
    with wave.open(str(target), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(samples.tobytes())
    return len(samples) / SAMPLE_RATE


def path_of(clip: Clip) -> str:
    assert clip.sample.audio is not None
    return clip.sample.audio.name


def choose(wanted: str | None, model: str, ggml: str | None) -> tuple[list[str], dict[str, str]]:
    """Names of the systems to run, and why the others cannot; a system asked for by name must be there."""
    table = systems(model)
    names = wanted.split(",") if wanted else list(table)
    unknown = [name for name in names if name not in table]
    if unknown:
        raise ValueError(f"unknown system {', '.join(unknown)}; known are {', '.join(table)}")
    skipped = {name: reason for name in names if (reason := table[name].missing())}
    if "whisper.cpp" in names and ggml is None and "whisper.cpp" not in skipped and not wanted:
        skipped["whisper.cpp"] = "no --ggml FILE"
    if wanted and skipped:
        raise ValueError("; ".join(f"{name}: {reason}" for name, reason in skipped.items()))
    return [name for name in names if name not in skipped], skipped


def prepare(names: Sequence[str], args: argparse.Namespace, recordings: Sequence[str], long: bool) -> dict[str, Job]:
    """One job for each system, its weights converted. ``long``: one of the recordings is over 30 s."""
    table = systems(args.model)
    jobs = {}
    for name in names:
        ready = args.ggml if name == "whisper.cpp" and args.ggml not in (None, "auto") else None
        form = table[name].form
        jobs[name] = Job(
            system=name,
            clips=tuple(recordings),
            long=long,
            model=args.model,
            weights=ready or weights_of(form, args.model, args.cache),
            threads=args.threads,
            language=None if args.language == "auto" else args.language,
            beam=args.beam,
            batch=args.batch,
            fallback=args.fallback,
            passes=args.passes or (5 if args.mode == "single30" else 1),
            latency_clips=args.latency_clips if len(recordings) > 1 else 0,
        )
    return jobs


def run_job(job: Job, folder: Path) -> dict[str, Any]:
    """Measure one system in a fresh process. Raises :class:`RuntimeError` with the end of its standard error."""
    request, answer = folder / "job.json", folder / "result.json"
    request.write_text(json.dumps(asdict(job)))
    answer.unlink(missing_ok=True)
    environment = os.environ | dict.fromkeys(THREAD_VARIABLES, str(job.threads))
    load = os.getloadavg()[0]
    script = Path(__file__).with_name("measure.py")
    done = subprocess.run(
        [sys.executable, str(script), str(request), str(answer)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode or not answer.exists():
        raise RuntimeError(f"exit status {done.returncode}\n{done.stderr.strip()[-3000:]}")
    return json.loads(answer.read_text()) | {"machine_load_before": load}


def run_all(jobs: dict[str, Job], repeats: int, seconds: float) -> tuple[dict[str, list[dict]], dict[str, str]]:
    """Interleaved repeats: results of each system, and what went wrong with those that failed (they stop there)."""
    runs: dict[str, list[dict]] = {name: [] for name in jobs}
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(repeats):
            for name, job in jobs.items():
                if name in failed:
                    continue
                try:
                    result = run_job(job if repeat == 0 else replace(job, latency_clips=0), Path(folder))
                except RuntimeError as error:
                    failed[name] = str(error)
                    say(f"{name} failed: {error}")
                    continue
                runs[name].append(result)
                wall = min(each["wall"] for each in result["passes"])
                say(f"[{repeat + 1}/{repeats}] {name}: {wall:.2f} s, {seconds / wall:.2f} times real time")
    return {name: results for name, results in runs.items() if name not in failed}, failed


def provide_ffmpeg(cache: Path) -> None:
    """openai-whisper calls a program named ffmpeg: where none is installed, the one of imageio-ffmpeg goes on PATH."""
    if shutil.which("ffmpeg") or not find_spec("imageio_ffmpeg"):
        return
    import imageio_ffmpeg  # pyright: ignore[reportMissingImports]

    link = cache / "bin" / "ffmpeg"
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(imageio_ffmpeg.get_ffmpeg_exe())
    os.environ["PATH"] = f"{link.parent}{os.pathsep}{os.environ['PATH']}"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare this project with its peers: speed, WER, memory.")
    add = parser.add_argument
    add("manifest", type=Path, help="TSV of path<TAB>text, paths relative to it")
    add("--mode", choices=("clips", "long", "single30", "command"), default="clips")
    add("--systems", help="comma-separated names (default: all that are installed)")
    add("--model", default="openai/whisper-base", help="Hub id or folder of the Whisper that all share")
    add("--ggml", metavar="FILE", help="whisper.cpp's weights, or 'auto' to convert them from --model")
    add("--limit", type=int, help="only the first N clips")
    add("--threads", type=int, default=2)
    add("--repeats", type=int, default=3, help="processes per system, interleaved")
    add("--passes", type=int, help="times the job is run in each process (default: 1; single30: 5)")
    add("--language", default="en", help="a code for all clips, or auto")
    add("--beam", type=int, default=1, help="beam size; 1 is greedy")
    add("--batch", type=int, default=8, help="clips or windows per batch of the batching peers")
    add("--fallback", action="store_true", help="let every system that can fall back to higher temperatures")
    add("--latency-clips", type=int, default=40, help="clips that batching systems also run one by one")
    add("--baseline", default="faster-whisper-int8", help="system that ratios and differences refer to")
    add("--compare", action="append", default=[], metavar="A:B", help="further pairs, clip by clip")
    add("--output", type=Path, help="folder of the results (default: docs/results/MODE)")
    add("--cache", type=Path, default=Path(tempfile.gettempdir()) / "whisper-moe-benchmark")
    args = parser.parse_args(argv)
    args.output = args.output or Path("docs/results", args.mode)
    return args


def facts(args: argparse.Namespace, clips: Sequence[Clip], packages: Iterable[str]) -> dict[str, Any]:
    """The heading of ``results.json``: when, where, on what, with which settings."""
    keys = ("mode", "model", "threads", "repeats", "language", "beam", "batch", "fallback", "baseline")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "manifest": f"{args.manifest.parent.name}/{args.manifest.name}",
        "clips": len(clips),
        "settings": {key: getattr(args, key) for key in keys},
        "machine": machine(),
        "versions": versions(packages),
    }


def transcripts_mode(args: argparse.Namespace, clips: list[Clip]) -> int:
    """Modes clips, long and single30: measure, score, write."""
    names, skipped = choose(args.systems, args.model, args.ggml)
    asked = [tuple(pair.split(":")) for pair in args.compare]
    for pair in asked:
        if len(pair) != 2 or not set(pair) <= set(names):
            raise ValueError(f"--compare {':'.join(pair)}: expected A:B, two of {', '.join(names)}")
    for name, reason in skipped.items():
        say(f"skipping {name}: {reason}")
    with tempfile.TemporaryDirectory() as folder:
        if args.mode == "single30":
            clips = first_window(clips)
        joined = Path(folder) / f"{args.mode}.wav"
        recordings = [path_of(clip) for clip in clips] if args.mode == "clips" else [str(joined)]
        lengths = [clip.seconds for clip in clips] if args.mode == "clips" else [join(clips, joined)]
        seconds = sum(lengths)
        table = systems(args.model)
        heading = facts(args, clips, (package for name in names for package in table[name].packages))
        heading |= {"audio_seconds": seconds, "skipped": skipped}
        runs, failed = run_all(prepare(names, args, recordings, max(lengths) > FULL_WINDOW), args.repeats, seconds)
    if not runs:
        raise ValueError("no system gave a result")
    material = report.Material(
        names=tuple(Path(path_of(clip)).stem for clip in clips),
        references=tuple(clip.sample.text for clip in clips),
        joined=args.mode != "clips",
    )
    pairs = [pair for pair in asked if set(pair) <= set(runs)] + report.default_pairs(list(runs), args.baseline)
    results = heading | {"failed": failed} | report.build(runs, material, seconds, args.baseline, pairs)
    report.write(results, material, args.output)
    say(f"wrote {args.output}/results.json, transcripts.tsv, table.md, plot.png")
    return int(bool(failed))


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        if args.language not in ("en", "auto"):
            raise ValueError(f"--language {args.language}: WER is normalised with English rules; use en or auto")
        provide_ffmpeg(args.cache)
        clips = read_clips(args.manifest, args.limit)
        if args.mode != "command":
            return transcripts_mode(args, clips)
        heading = facts(args, clips, ("openai-whisper", "torch"))
        clip = min(clips, key=lambda each: abs(each.seconds - command.CLIP_SECONDS))
        return command.compare(args, heading, Path(path_of(clip)), clip.seconds)
    except (ValueError, OSError, RuntimeError) as error:
        say(f"error: {error}")
        return 2


if __name__ == "__main__":
    sys.exit(main())
