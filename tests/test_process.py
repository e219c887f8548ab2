"""The command as a process of its own: exit status, streams, terminals and locales."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from commandline import noise, trusting_flags

from whisper_moe import WhisperMoE


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, tiny_model: WhisperMoE) -> list[str]:
    """Flags for a model that talks nonsense quickly, and is trusted."""
    return trusting_flags(tiny_model, tmp_path_factory.mktemp("model") / "tiny")


def whole_process(
    *arguments: str | Path | bytes, stdin: bytes | None = None, **environment: str
) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "whisper_moe", *map(os.fsencode, arguments)]
    surroundings = os.environ | environment
    return subprocess.run(command, input=stdin, capture_output=True, timeout=280, check=False, env=surroundings)


def test_help_and_usage_errors_do_not_import_torch() -> None:
    code = (
        "import sys\n"
        "from whisper_moe.cli import main\n"
        "for line in ('', '--help', 'transcribe --help', 'transcribe --task sing', 'upcycle a -o b --top-k 9', 'nope'):\n"
        "    sys.argv = ['whisper-moe', *line.split()]\n"
        "    try:\n"
        "        main()\n"
        "    except SystemExit as stop:\n"
        "        print(stop.code, file=sys.stderr)\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "--initial-prompt" in done.stdout
    assert [line for line in done.stderr.splitlines() if line.isdigit()] == ["0", "0", "0", "2", "2", "2"]


def test_a_reader_that_has_gone_is_no_error(tiny: list[str], tmp_path: Path) -> None:
    path = noise(tmp_path / "a.wav", 2.0)
    command = [sys.executable, "-m", "whisper_moe", "transcribe", str(path), *tiny, "-f", "json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(120) == 0, errors
    assert "Traceback" not in errors and "Broken" not in errors


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux's full disk")
def test_standard_output_on_a_full_disk_is_said_once(tiny: list[str], tmp_path: Path) -> None:
    paths = [str(noise(tmp_path / name, 2.0)) for name in ("a.wav", "b.wav")]
    command = [sys.executable, "-m", "whisper_moe", "transcribe", *paths, *tiny, "--verbose", "False"]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=280, check=False)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("whisper-moe: ")]
    assert errors == ["whisper-moe: standard output: No space left on device"]


# Terminals.


def on_terminal(command: list[str], stdout: Path | None = None) -> tuple[int, str]:
    """Exit status, and everything that a terminal of 200 columns was sent; ``stdout`` goes to a file where it is given."""
    pty = pytest.importorskip("pty", reason="this system has no pseudoterminals")
    import termios

    reader, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (50, 200))
    arguments = [sys.executable, "-m", "whisper_moe", *command]
    with open(stdout or os.devnull, "wb") as file:
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=file if stdout else terminal,
            stderr=terminal,
            env=os.environ | {"TERM": "xterm-256color"},
        )
    os.close(terminal)
    sent = b""
    try:
        while block := os.read(reader, 65_536):
            sent += block
    except OSError:  # how Linux says that nobody writes to the terminal any more
        pass
    os.close(reader)
    return process.wait(120), sent.decode()


def screen(sent: str) -> list[str]:
    """The lines that a terminal shows in the end, of the control sequences that a progress bar uses."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|[^\x1b]", sent):
        if part == "\r":
            column = 0
        elif part == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif part == "\x1b[1A":
            row -= 1
        elif part == "\x1b[2K":
            lines[row] = ""
        elif not part.startswith("\x1b"):
            lines[row] = lines[row].ljust(column)[:column] + part + lines[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]


def test_a_transcript_goes_to_its_file_while_a_bar_moves_on_the_terminal(tiny: list[str], tmp_path: Path) -> None:
    path = noise(tmp_path / "a.wav", 22.0)
    status, sent = on_terminal(["transcribe", str(path), *tiny], stdout=tmp_path / "a.txt")
    assert status == 0 and "s of audio done" in sent and f"{path}: 22.0 s" in sent
    text = (tmp_path / "a.txt").read_bytes()
    assert text.endswith(b"\n") and b"\x1b[" not in text and b"s of audio done" not in text


def test_a_bar_on_the_same_terminal_leaves_text_and_facts_alone(tiny: list[str], tmp_path: Path) -> None:
    paths = [str(noise(tmp_path / f"{name}.wav", seed=seed)) for seed, name in enumerate("ab")]
    command = ["transcribe", *paths, "gone.wav", *tiny]
    piped = subprocess.run(
        [sys.executable, "-m", "whisper_moe", *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    status, sent = on_terminal(command)
    assert status == piped.returncode == 1 and "s of audio done" in sent
    expected, shown = (
        re.sub(r"[\d.]+ (s|times)\b", "", text) for text in (piped.stdout.decode(), "\n".join(screen(sent)))
    )
    assert shown == expected and shown.count("gone.wav") == 1


# Scripts and file names.


def test_a_file_name_and_any_script_come_out_whatever_the_locale(tiny: list[str], tmp_path: Path) -> None:
    names = ["हिन्दी.wav".encode(), b"\xff\xfe.wav"]
    paths = [os.path.join(os.fsencode(tmp_path), name) for name in names]
    try:
        for path in paths:
            os.rename(noise(tmp_path / "a.wav"), path)
    except OSError:
        pytest.skip("this file system takes no such name")
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    done = whole_process("transcribe", *paths, b"gone-\xff", *tiny, "--language", "en", **plain)
    assert done.returncode == 1 and b"gone-" in done.stderr and b"Traceback" not in done.stderr
    assert not done.stdout.decode().isascii()
    told = whole_process("detect-language", *paths, *tiny[:2], **plain)
    assert [line.split(b"\t")[2] for line in told.stdout.splitlines()] == paths, told.stderr


# The process as a whole.


@pytest.mark.parametrize(
    ("arguments", "status"),
    [(["info", "8x74m"], 0), (["transcribe", "--task", "sing"], 2)],
)
def test_the_process_hands_on_its_exit_status_and_all_of_its_output(arguments: list[str], status: int) -> None:
    done = whole_process(*arguments)
    assert done.returncode == status
    assert (len(done.stdout) > 300) == (status == 0) and b"Traceback" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("arguments", [["--help"], ["info", "8x74m"]])
def test_output_that_cannot_be_written_is_an_error(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "whisper_moe", *arguments]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, timeout=120, check=False)
    assert done.returncode == 1
    assert b"No space left" in done.stderr and len(done.stderr.splitlines()) == 1


# With the model that comes along.


def test_without_arguments_the_sample_is_transcribed(default_model: WhisperMoE) -> None:
    """In a process of its own, as ``make demo`` does it."""
    done = whole_process("transcribe", "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode() == (
        "And Mr. John Dashwood had then leisure to consider how much there might be prudently in his power to do for them.\n"
    )
    assert b"sample.m4a: 7.7 s, en; experts none 1.00" in done.stderr
