"""The command line as a user meets it: exit status, what goes to which stream, and that errors come before any loading."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
SAMPLE = ROOT / "examples" / "sample.m4a"


def run(*arguments: str | Path, stdin: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "whisper_moe.cli", *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, timeout=280, check=False)


@pytest.mark.parametrize(
    "flags",
    [
        ["--task", "sing"],
        ["--language", "klingon"],
        ["-f", "docx"],
        ["-f", "all"],
        ["--dtype", "float64"],
        ["--vad", "maybe"],
        ["--beam-size", "0"],
        ["--context-margin", "-1"],
        ["--word-timestamps", "perhaps"],
        ["--max-line-width", "20"],
        ["--no-such-flag"],
    ],
    ids=" ".join,
)
def test_a_flag_that_cannot_work_is_a_usage_error(flags: list[str]) -> None:
    done = run("transcribe", SAMPLE, *flags)
    assert done.returncode == 2
    assert done.stdout == b""
    assert b"Traceback" not in done.stderr
    assert b"loaded in" not in done.stderr


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from whisper_moe.cli import app\n"
        "result = CliRunner().invoke(app, ['transcribe', '--help'])\n"
        "assert '--initial-prompt' in result.output\n"
        "sys.exit(result.exit_code or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0


def write_clip(path: Path, seconds: float, frequency: float) -> None:
    import wave

    time = np.arange(int(seconds * 16_000)) / 16_000
    samples = (8_000 * np.sin(2 * np.pi * frequency * time) * (time % 0.5 < 0.25)).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(samples.tobytes())


def test_of_twenty_files_five_broken_ones_cost_only_themselves(tmp_path: Path) -> None:
    whole = SAMPLE.read_bytes()
    for index in range(14):
        write_clip(tmp_path / f"tone{index:02d}.wav", 0.5 + 0.1 * index, 200 + 50 * index)
    (tmp_path / "good.m4a").write_bytes(whole)
    broken = {
        "empty.wav": b"",
        "one.wav": b"R",
        "text.wav": b"This is only text. " * 50,
        "half.m4a": whole[: len(whole) // 2],
        "list.m4a": b"#EXTM3U\n#EXTINF:10,\ngood.m4a\n",
    }
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
    files = sorted(p for p in tmp_path.iterdir() if p.is_file())
    assert len(files) == 20
    done = run("transcribe", *files, "-o", tmp_path / "out", "-f", "json", "--language", "en", "--dtype", "float32")
    errors = done.stderr.decode()
    assert done.returncode == 1, errors
    assert len(list((tmp_path / "out").glob("*.json"))) == 15
    for name in broken:
        assert sum(name in line and line.startswith("whisper-moe:") for line in errors.splitlines()) == 1, errors
    assert "5 of 20 files failed" in errors
    good = json.loads((tmp_path / "out" / "good.json").read_text())
    assert good["text"].startswith("And Mr. John Dashwood")
    for segment in good["segments"]:
        assert sum(segment["experts"].values()) == pytest.approx(1, abs=1e-5)


def test_standard_input_gives_the_same_text_as_the_file() -> None:
    done = run(
        "transcribe", "-", "--language", "en", "--initial_prompt", "Novel.", "-f", "srt", stdin=SAMPLE.read_bytes()
    )
    assert done.returncode == 0, done.stderr
    assert b"00:00:00,000 --> " in done.stdout
    assert b"Dashwood" in done.stdout


def test_info_counts_the_parts() -> None:
    done = run("info", "8x39m", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["parameters_total"] == sum(facts["parameters"].values())
    assert len(facts["experts"]) == 8
