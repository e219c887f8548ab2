"""The process behind ``whisper-moe`` and ``python -m whisper_moe``: it starts and ends without waiting for what it need not."""

from __future__ import annotations

import gc
import io
import os
import sys
from typing import NoReturn


def run() -> NoReturn:
    """Run the command line, hand its output over, and end the process there and then.

    Importing torch makes hundreds of thousands of objects that live for ever: looking for garbage among them takes a tenth
    of a second, and taking them apart at the end four tenths.
    """
    _speak_utf8()
    gc.set_threshold(200_000, 20, 100)
    from whisper_moe.cli import main

    status = 0
    try:
        main()
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError as error:
        os.write(2, f"whisper-moe: standard output: {error.strerror}\n".encode())
        status = status or 1
    os._exit(status)


def _speak_utf8() -> None:
    """Text in any script can be written whatever the locale, and file names that are no text come out as they went in."""
    for stream, errors in ((sys.stdout, "surrogateescape"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors=errors)


if __name__ == "__main__":
    run()
