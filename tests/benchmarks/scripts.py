"""The scripts of ``benchmarks/``, which is not a package."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

FOLDER = str(Path(__file__).parents[2] / "benchmarks")


def script(name: str) -> ModuleType:
    """As the scripts import each other."""
    if FOLDER not in sys.path:
        sys.path.append(FOLDER)
    return importlib.import_module(name)
