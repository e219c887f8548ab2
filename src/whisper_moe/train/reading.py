"""From YAML and ``key=value`` overrides to a checked configuration; what is wrong names file, key and value.

YAML is that of version 1.2's core schema, plain values only. PyYAML follows 1.1, where ``no`` is false (and a language),
``1e-5`` is text and ``2024-01-01`` a date; and it takes the second of two equal keys without a word.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

try:
    import yaml
except ImportError as error:
    raise ImportError("recipes need PyYAML: pip install 'whisper-moe[train]'") from error

Kind = TypeVar("Kind", bound=BaseModel)
_MOST_BYTES = 1_000_000


class RecipeError(ValueError):
    """A recipe that cannot be used: which file, which key, and why."""


def read_tree(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A file's plain values with its overrides, not checked against anything."""
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise RecipeError(f"{path}: larger than a recipe can be ({_MOST_BYTES:,} bytes)")
        tree = parse(content.decode(), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: must hold keys and values, holds {type(tree).__name__}")
    for override in overrides:
        apply(tree, override)
    return tree


def apply(tree: dict[str, Any], override: str) -> None:
    """Put one ``key=value`` into the tree; numbers in a key are places in a list."""
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise RecipeError(f"{override!r}: an override is written key=value, as in optimisation.lr=1e-4")
    holder: Any = tree
    place: Any = tree
    part: Any = None
    for depth, name in enumerate(parts):
        where, part = ".".join(parts[:depth]), name
        if isinstance(place, list):
            if not name.isdigit() or int(name) >= len(place):
                raise RecipeError(f"{override!r}: {where} has the places 0 to {len(place) - 1}")
            part = int(name)
        elif not isinstance(place, dict):
            raise RecipeError(f"{override!r}: {where} is {place!r}, which has no keys")
        elif place.get(name) is None:
            place[name] = {}
        holder, place = place, place[part]
    holder[part] = parse(text, override)


def checked(kind: type[Kind], tree: Mapping[str, Any], origin: str) -> Kind:
    """Check a tree of plain values; ``origin`` is what messages begin with. Raises :class:`RecipeError`."""
    try:
        return kind.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        raise RecipeError(f"{origin}: {'; '.join(_cause(kind, fault) for fault in error.errors())}") from None
    except ValueError:
        raise RecipeError(f"{origin}: not plain values: something in it contains itself") from None


def _cause(kind: type[BaseModel], fault: ErrorDetails) -> str:
    where, given = ".".join(map(str, fault["loc"])), fault["input"]
    if fault["type"] == "extra_forbidden":
        known, last = list(_keys(kind)), where.rpartition(".")[2]
        close = difflib.get_close_matches(re.sub(r"\.\d+\b", "", where), known, n=1, cutoff=0.75)
        close = close or [key for key in known if key.endswith(f".{last}")]
        return f"{where} is not a key of a recipe{f'; did you mean {close[0]}?' if close else ''}"
    if fault["type"] == "missing":
        return f"{where} is missing"
    shown = "" if isinstance(given, (dict, list)) or fault["type"] == "value_error" else f", got {given!r}"
    return f"{where}: {fault['msg'].removeprefix('Value error, ')}{shown}".removeprefix(": ")


def _keys(kind: type[BaseModel], above: str = "") -> Iterator[str]:
    """Every key of a configuration and of those within it; lists add no part."""
    for name, field in kind.model_fields.items():
        yield above + name
        for inner in inner_models(field.annotation):
            yield from _keys(inner, f"{above}{name}.")


def inner_models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The configurations that a field's type speaks of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from inner_models(argument)


# YAML

_RESOLVERS = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
    ("merge", r"<<", "<"),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (the class attribute that PyYAML looks up)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        for index, (key, _) in enumerate(node.value):
            if key.value in names[:index]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is there twice", key.start_mark
                )
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        return int(self.construct_scalar(node))  # not 1.1's octal: 010 is ten


for _tag, _pattern, _begins in _RESOLVERS:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})$"), list(_begins))
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def parse(text: str, origin: str) -> Any:
    """One document. Raises :class:`RecipeError`: for text that is no YAML, a tag that would build an object, a key that comes
    twice."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark, problem = getattr(error, "problem_mark", None), str(getattr(error, "problem", None) or error)
        if tag := re.search(r"tag '([^']+)'", problem):
            problem = f"the tag {tag[1]!r} would build an object; plain values only"
        elif not isinstance(error, yaml.constructor.ConstructorError):
            problem = f"not YAML ({problem})"
        where = f"line {mark.line + 1}: " if mark else ""
        raise RecipeError(f"{origin}: {where}{problem}") from None
