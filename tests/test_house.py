"""What a reviewer would otherwise check by hand: sizes, pins, and that the project speaks only of itself."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "src").rglob("*.py"))
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60
MAX_MODULES, MAX_LINES = 100, 22_000
"""Of all of src. Lower them when there is less; they are never raised to fit."""
MAX_FILE_BYTES = 45_000_000
MACHINE_PATH = re.compile(r"(?<![\w.~$}-])/(?:work|root|home|Users)/[\w.-]")
REGISTRY_HOST = re.compile(r"\b(?:pypi\.org|pythonhosted\.org|npmjs\.(?:org|com)|deb\.debian\.org)\b")


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def files_of_the_checkout() -> tuple[Path, ...]:
    """Every file that is tracked, or would be by ``git add``."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        run = subprocess.run(listing, cwd=ROOT, capture_output=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("git is not installed")
    if run.returncode:
        pytest.skip("not a git checkout")
    paths = (ROOT / name for name in run.stdout.decode().split("\0") if name)
    return tuple(path for path in paths if path.is_file())


def text_of(path: Path) -> str:
    """The file as text; empty for a binary one."""
    content = path.read_bytes() if path.stat().st_size < 2_000_000 else b"\0"
    return "" if b"\0" in content[:4096] else content.decode("utf-8", errors="replace")


def lines_matching(pattern: re.Pattern[str], *, except_for: set[str]) -> list[str]:
    return [
        f"{relative(path)}:{number}: {line.strip()}"
        for path in files_of_the_checkout()
        if relative(path) not in except_for
        for number, line in enumerate(text_of(path).splitlines(), 1)
        if pattern.search(line)
    ]


@pytest.mark.parametrize("module", MODULES, ids=relative)
def test_a_module_and_its_functions_are_short(module: Path) -> None:
    source = module.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= MAX_FILE_LINES
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    lengths = {f"{f.name}, line {f.lineno}": (f.end_lineno or 0) - f.lineno + 1 for f in functions}
    assert {name: length for name, length in lengths.items() if length > MAX_FUNCTION_LINES} == {}


@pytest.mark.parametrize("module", MODULES, ids=relative)
def test_a_module_says_what_it_is(module: Path) -> None:
    tree = ast.parse(module.read_text(encoding="utf-8"))
    assert not tree.body or ast.get_docstring(tree)
    assert not tree.body[1:] or "annotations" in ast.unparse(tree.body[1])


def test_the_house_can_be_known() -> None:
    assert 0 < len(MODULES) <= MAX_MODULES
    assert sum(len(module.read_text(encoding="utf-8").splitlines()) for module in MODULES) <= MAX_LINES
    assert [relative(module) for module in MODULES if module.stem in {"utils", "helpers", "misc", "common"}] == []


def test_no_file_is_too_large_for_a_host() -> None:
    sizes = {relative(path): path.stat().st_size for path in files_of_the_checkout()}
    assert "pyproject.toml" in sizes
    assert {name: size for name, size in sizes.items() if size > MAX_FILE_BYTES} == {}


def test_no_path_of_one_machine_is_written_down() -> None:
    assert MACHINE_PATH.search('open("' + "/home" + '/ada/talk.m4a")')
    assert lines_matching(MACHINE_PATH, except_for={"tests/test_house.py"}) == []


def test_no_package_registry_is_named_by_its_host() -> None:
    assert lines_matching(REGISTRY_HOST, except_for={"tests/test_house.py"}) == []


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert all(len(pair) == 2 for pair in pairs), "a constraint is name==version, with no URL, path or marker"
    return {canonicalize_name(name): version for name, version in pairs}


def test_constraints_are_versions_that_anyone_can_install() -> None:
    pinned = pins()
    assert list(pinned) == sorted(pinned)
    # A local version such as 2.13.0+cpu exists only on PyTorch's own index. torch brings the triton and CUDA packages that
    # belong to it; another version of them cannot be installed beside it.
    assert [f"{name}=={version}" for name, version in pinned.items() if "+" in version] == []
    assert [name for name in pinned if name.startswith(("nvidia-", "triton", "cuda"))] == []


def test_the_pins_are_within_the_ranges() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    wanted = [Requirement(line) for group in groups for line in group if not line.startswith("whisper-moe[")]
    pinned = pins()
    assert len(wanted) > 20
    for requirement in wanted:
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is not in constraints.txt"
        assert requirement.specifier.contains(version), f"{requirement} excludes the pinned {version}"


def test_the_version_is_one() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    init = (ROOT / "src/whisper_moe/__init__.py").read_text(encoding="utf-8")
    assert f'__version__ = "{project["version"]}"' in init
    assert f"## [{project['version']}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
