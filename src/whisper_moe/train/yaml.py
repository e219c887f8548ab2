"""YAML as YAML 1.2's core schema reads it, plain values only.

PyYAML follows YAML 1.1, where ``no`` is false (and a language), ``1e-5`` is text and ``2024-01-01`` a date; and it takes
the second of two equal keys without a word.
"""

from __future__ import annotations

import re
from typing import Any

try:
    import yaml
except ImportError as error:
    raise ImportError("recipes need PyYAML: pip install 'whisper-moe[train]'") from error

_RESOLVERS = (
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", "~nN\0"),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9]+", "-+0123456789"),
    ("tag:yaml.org,2002:float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("tag:yaml.org,2002:float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
    ("tag:yaml.org,2002:merge", r"<<", "<"),
)


class YamlError(ValueError):
    """What is wrong, and in which line."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (the class attribute that PyYAML looks up)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(getattr(key, "value", ""))
            if not isinstance(key, yaml.ScalarNode) or (key.tag != "tag:yaml.org,2002:str" and name != "<<"):
                raise YamlError(f"line {key.start_mark.line + 1}: the key {name!r} is not text; put it in quotes")
            if name in seen:
                raise YamlError(f"line {key.start_mark.line + 1}: the key {name!r} is there twice")
            seen.add(name)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        return int(self.construct_scalar(node))  # not 1.1's octal: 010 is ten


for _tag, _pattern, _first in _RESOLVERS:
    _Loader.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})$"), [c if c != "\0" else "" for c in _first])
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def parse(text: str) -> Any:
    """One document. Raises :class:`YamlError`: for text that is no YAML, for a tag that would build an object, for a key
    that comes twice."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.constructor.ConstructorError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        problem = str(error.problem)
        tag = re.search(r"tag '([^']+)'", problem)
        if tag:
            raise YamlError(f"line {line}: the tag {tag[1]!r} would build an object; plain values only") from None
        raise YamlError(f"line {line}: {problem}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        raise YamlError(f"{where}not YAML ({getattr(error, 'problem', None) or error})") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, YamlError):
            raise
        raise YamlError(f"not YAML ({error})") from None
