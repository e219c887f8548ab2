"""What the program does, frozen in files beside this one: a restructuring keeps every one of them.

    python tests/golden/golden.py              compare; prints what differs, and ends with 1
    python tests/golden/golden.py --write      write them anew: where a change is meant
    python tests/golden/golden.py help api     these parts alone

What is computed in floating point has a folder for each kind of CPU; on one that has none, it is not compared, and that is said.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
if __name__ == "__main__":
    sys.path[0] = str(HERE.parent)  # what tests share

from golden.parts import PARTS

ROUNDING = {"losses": {"rel_tol": 1e-5}, "transcripts": {"abs_tol": 2e-4}}
"""What numbers may differ by, of the parts that are computed in floating point."""


def cpu() -> str:
    """Which results this CPU computes: its vector instructions, whether it multiplies int8 in one of them, and AMD's order."""
    path = Path("/proc/cpuinfo")
    facts = path.read_text() if path.exists() else ""
    return (
        torch.backends.cpu.get_cpu_capability().lower()
        + "-vnni" * ("vnni" in facts)
        + "-amd" * ("AuthenticAMD" in facts)
    )


def home(part: str, root: Path = HERE) -> Path:
    return root / cpu() if part in ROUNDING else root


def compare(part: str, root: Path = HERE) -> tuple[list[str], list[str]]:
    """The lines of a unified diff, and what could not be compared."""
    folder, differences = home(part, root), list[str]()
    if not folder.is_dir():
        return [], [f"{part}: there are no files for {folder.name}; --write makes them"]
    made, written = PARTS[part](), {path.relative_to(folder).as_posix(): path for path in owned(part, folder)}
    for name in sorted(made.keys() | written.keys()):
        if name in made and made[name] is None:
            continue
        before = written[name].read_text("utf-8") if name in written else ""
        after = made.get(name, "")
        if isinstance(after, Mapping) and before:
            after = near(after, json.loads(before), **ROUNDING.get(part, {"rel_tol": 0}))
        lines = (text.splitlines() for text in (before, as_text(after)))
        differences += difflib.unified_diff(*lines, f"golden/{name}", f"now/{name}", n=1, lineterm="")
    return differences, [f"{name}: cannot be made here" for name, content in made.items() if content is None]


def near(now: Any, then: Any, **rounding: float) -> Any:
    """``now``, with the numbers of ``then`` where they differ by no more than rounding does."""
    if isinstance(now, Mapping) and isinstance(then, Mapping):
        return {key: near(value, then.get(key), **rounding) for key, value in now.items()}
    if isinstance(now, list) and isinstance(then, list) and len(now) == len(then):
        return [near(value, other, **rounding) for value, other in zip(now, then, strict=True)]
    close = isinstance(now, float) and isinstance(then, float) and math.isclose(now, then, **{"rel_tol": 0, **rounding})
    return then if close else now


def as_text(content: Any) -> str:
    """JSON has a line for each key, so that a diff can be read."""
    if isinstance(content, str):
        return content
    lines = (f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in content.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def owned(part: str, folder: Path) -> list[Path]:
    return sorted(path for path in (*folder.glob(f"{part}*.*"), *folder.glob(f"{part}/*")) if path.suffix != ".py")


def write(part: str) -> None:
    made, folder = PARTS[part](), home(part)
    for path in owned(part, folder):
        if made.get(path.relative_to(folder).as_posix(), "") is not None:
            path.unlink()
    for name, content in made.items():
        if content is not None:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(as_text(content), "utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; default: all")
    parser.add_argument("--write", action="store_true", help="write the files instead of comparing with them")
    asked = parser.parse_args()
    status = 0
    for part in asked.parts or PARTS:
        differences, notes = ([], []) if asked.write else compare(part)
        if asked.write:
            write(part)
        for line in notes:
            print(line, file=sys.stderr)
        for line in differences:
            print(line)
        status = status or int(bool(differences))
    return status


if __name__ == "__main__":
    sys.exit(main())
