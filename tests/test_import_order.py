"""Modules import only from their own layer or from layers before it, and what need not import torch does not."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "whisper_moe"
ORDER = (
    {"config_aside"},
    {"config", "machine"},
    {"media"},
    {"packing"},
    {"model"},
    {"weights"},
    {"generate"},
    {"data"},
    {"evaluate"},
    {"train"},
    {"merge"},
    {"api"},
    {"jobs"},
    {"serve"},
    {"texts"},
    {"commands"},
    {"cli"},
    {"__main__"},
)
RANK = {layer: rank for rank, layers in enumerate(ORDER) for layer in layers}
MODULES = sorted(PACKAGE.rglob("*.py"))


def dotted(module: Path, package: Path = PACKAGE) -> str:
    """``media.audio`` for ``…/whisper_moe/media/audio.py``; the empty string for the package itself."""
    parts = module.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.AST, importer: str, is_package: bool) -> Iterator[str]:
    """Everything under ``whisper_moe`` that a module imports, in functions and for type checkers too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                here = ["whisper_moe", *importer.split(".")] if importer else ["whisper_moe"]
                here = here[: len(here) - (node.level - is_package)]
                origin = ".".join([*here, origin]).rstrip(".")
            names = [f"{origin}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.removeprefix("whisper_moe.") for name in names if name.startswith("whisper_moe."))


def upward_imports(source: str, importer: str, is_package: bool = False) -> list[str]:
    """The imports of a module that go against the order of layers."""
    layer = importer.split(".")[0]
    found = imported(ast.parse(source), importer, is_package)
    # What is no layer is a public name, which lives in the package itself: above all of them.
    rank = RANK | {"__version__": -1}
    return [name for name in found if rank.get(name.split(".")[0], len(ORDER)) > RANK[layer]]


@pytest.mark.parametrize("module", [m for m in MODULES if dotted(m)], ids=dotted)
def test_a_module_imports_from_its_own_layer_or_before(module: Path) -> None:
    name = dotted(module)
    assert name.split(".")[0] in RANK, f"{name} belongs to no layer"
    assert upward_imports(module.read_text(encoding="utf-8"), name, module.name == "__init__.py") == []


@pytest.mark.parametrize(
    "line",
    [
        "import whisper_moe.api",
        "from whisper_moe.api import WhisperMoE",
        "from whisper_moe import api",
        "from whisper_moe import WhisperMoE",
        "from ..api import WhisperMoE",
        "from .. import api",
        "def f():\n    import whisper_moe.api",
    ],
)
def test_every_way_to_import_upwards_is_seen(line: str) -> None:
    assert upward_imports(line, "media.audio") != []


def test_what_lies_before_can_be_imported() -> None:
    assert upward_imports("from whisper_moe.api import WhisperMoE\nfrom whisper_moe import __version__", "cli") == []
    assert upward_imports("from . import containers\nfrom ..config import SAMPLE_RATE", "media.audio") == []


def test_the_modules_were_found() -> None:
    assert {"config", "packing", "api", "cli"} <= {dotted(module) for module in MODULES}


def loaded_by(code: str) -> set[str]:
    """The top-level modules in memory after ``code`` has run in a fresh interpreter."""
    report = "\nimport sys; print('\\n' + ' '.join({name.partition('.')[0] for name in sys.modules}))"
    run = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.splitlines()[-1].split())


HELP = """
import sys
from whisper_moe.cli import main
sys.argv = ["whisper-moe", *{arguments}, "--help"]
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
else:
    raise AssertionError("--help did not end the program")
"""
COMMANDS = ["transcribe", "detect-language", "upcycle", "export", "info", "evaluate", "train", "data"]


@pytest.mark.parametrize(
    "code",
    [
        "import whisper_moe",
        "import whisper_moe.config",
        "import whisper_moe.evaluate.measure",  # the memory of a peer's process is its own
        HELP.format(arguments=[]),
        *(HELP.format(arguments=[command]) for command in COMMANDS),
    ],
    ids=["whisper_moe", "config", "measure", "help", *COMMANDS],
)
def test_torch_is_not_imported(code: str) -> None:
    assert loaded_by(code) & {"torch", "transformers"} == set()


def test_the_public_names_can_be_imported() -> None:
    modules = loaded_by("import whisper_moe\nfor name in whisper_moe.__all__: getattr(whisper_moe, name)")
    assert "torch" in modules
