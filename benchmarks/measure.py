"""The measurement of one system, in a process of its own.

``python benchmarks/measure.py JOB.json RESULT.json`` loads one system, warms it up on one clip, runs the whole job, and
writes what it measured: so peak memory and thread settings belong to that system alone.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peers import Adapter, Heard, Job, systems, unshare_cores

from whisper_moe.evaluate.measure import disk_bytes
from whisper_moe.machine import peak_bytes


def run_pass(adapter: Adapter, job: Job) -> dict[str, Any]:
    """The whole job once: wall and processor seconds, seconds of each clip where they run one by one, transcripts."""
    cpu, start = time.process_time(), time.perf_counter()
    if adapter.batched:
        heard, latencies = hear(adapter, job, job.clips), []
    else:
        heard, latencies = one_by_one(adapter, job, job.clips)
    return {
        "wall": time.perf_counter() - start,
        "cpu": time.process_time() - cpu,
        "latencies": latencies,
        "texts": [each.text.strip() for each in heard],
        "fallbacks": sum(each.fallbacks for each in heard) if adapter.model is not None else None,
    }


def one_by_one(adapter: Adapter, job: Job, clips: Sequence[str]) -> tuple[list[Heard], list[float]]:
    heard, latencies = [], []
    for clip in clips:
        start = time.perf_counter()
        heard += hear(adapter, job, [clip])
        latencies.append(time.perf_counter() - start)
    return heard, latencies


def hear(adapter: Adapter, job: Job, clips: Sequence[str]) -> list[Heard]:
    """One result for each clip. Raises ``ValueError`` naming one that could not be read."""
    heard = list(adapter.hear(clips, language=job.language, task="transcribe", long=job.long))
    if errors := [each.error for each in heard if each.error is not None]:
        raise ValueError(errors[0])
    return heard


def measure(job: Job) -> dict[str, Any]:
    """Import, load, warm up on the first clip, run the job ``passes`` times, then clip by clip where it batches."""
    system = systems(job.model)[job.system]
    if "whisper_moe.api" not in system.modules:
        unshare_cores()
    start = time.perf_counter()
    for module in system.modules:
        importlib.import_module(module)
    imported = time.perf_counter()
    adapter = system.make(job)
    loaded = time.perf_counter()
    hear(adapter, job, job.clips[:1])
    passes = [run_pass(adapter, job) for _ in range(job.passes)]
    result = {
        "import_seconds": imported - start,
        "load_seconds": loaded - imported,
        "passes": passes,
        "peak_bytes": peak_bytes(),
        "disk_bytes": disk_bytes(Path(job.weights)),
        "batched": adapter.batched,
        "options": adapter.options,
        "fallbacks": passes[0]["fallbacks"],
    }
    if adapter.batched and job.latency_clips:
        result["one_by_one"] = one_by_one(adapter, job, job.clips[: job.latency_clips])[1]
    return result


def main(job_path: str, result_path: str) -> None:
    job = json.loads(Path(job_path).read_text())
    result = measure(Job(**{**job, "clips": tuple(job["clips"])}))
    Path(result_path).write_text(json.dumps(result, ensure_ascii=False, default=str))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
