"""Writes ``docs/recipe.md``, the reference of recipes, from their schemas: ``python docs/recipe.py``."""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from whisper_moe.train.reading import inner_models
from whisper_moe.train.recipe import Recipe

_PLAIN = {str: "text", float: "number", int: "whole number", bool: "`true`, `false`"}
_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
_HEAD = """# Every key of a recipe

Made from the code by `python docs/recipe.py`. A recipe is YAML; a key that is not here is an error. Any key can be given on
the command line, too: `data.loader.batch_size=8`, and with numbers for places in a list `data.train.0.source=mine.tsv`.
What has no default must be given.
"""


def page() -> str:
    """The whole reference."""
    return "\n".join([_HEAD, *_sections(Recipe, "", {}), *_tasks()])


def _tasks() -> Iterator[str]:
    """The keys that scripts have besides."""
    from recipes.context.adapt import ContextRecipe
    from recipes.speech.speech import SpeechRecipe
    from recipes.speech.vocoder import VocoderRecipe

    taught = import_module("recipes.eight-experts.taught").TaughtRecipe
    yield "# Keys of recipes for other tasks\n"
    yield "Recipes of these scripts have all keys above, and one more.\n"
    for kind in (ContextRecipe, taught, SpeechRecipe, VocoderRecipe):
        yield f"`{kind.__module__.replace('.', '/')}.py`: {_prose(inspect.getdoc(kind) or '')}\n"
        for name in kind.model_fields.keys() - Recipe.model_fields.keys():
            yield from _sections(next(inner_models(kind.model_fields[name].annotation)), name, {})


def _sections(model: type[BaseModel], key: str, shown: dict[type[BaseModel], str]) -> Iterator[str]:
    """A table of this part of a recipe, then those of the parts within it; ``shown``: where those are that there are already."""
    said, within = _docstrings(model), dict[str, type[BaseModel]]()
    if key:
        yield f"## `{key}`\n"
    if model in shown:
        yield f"The same keys as in `{shown[model]}`.\n"
        return
    shown[model] = key
    yield f"{_prose(inspect.getdoc(model) or '')}\n"
    yield "| key | value | default | |\n|---|---|---|---|"
    for name, field in model.model_fields.items():
        inner = next(inner_models(field.annotation), None)
        if inner is not None:
            path = f"{key}.{name}".lstrip(".")
            within[path + (".0" if get_origin(field.annotation) is tuple else "")] = inner
        cells = (f"`{name}`", _value(field), _default(field), _prose(said.get(name, "")))
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
    yield ""
    for path, inner in within.items():
        yield from _sections(inner, path, shown)


def _docstrings(model: type[BaseModel]) -> dict[str, str]:
    """The text beneath each field."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(model))).body
    assert isinstance(tree, ast.ClassDef)
    found: dict[str, str] = {}
    for field, text in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            found[ast.unparse(field.target)] = str(text.value.value)
    return found


def _prose(text: str) -> str:
    """Without the roles and double quotes of reStructuredText, on one line, and with YAML's word for None."""
    text = re.sub(r"\bNone\b", "``null``", text)
    text = re.sub(r":[a-z]+:`~?([^`]+)`", r"`\1`", text.replace("``", "`"))
    return " ".join(text.split())


def _value(field: FieldInfo) -> str:
    bounds = [
        f"{sign} {getattr(bound, name)}"
        for bound in field.metadata
        for name, sign in _BOUNDS.items()
        if hasattr(bound, name)
    ]
    return " ".join([_type(field.annotation), ", ".join(bounds)]).strip()


def _type(annotation: Any) -> str:
    arguments = get_args(annotation)
    if annotation in _PLAIN:
        return _PLAIN[annotation]
    if get_origin(annotation) is Annotated:
        return _type(arguments[0])
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if get_origin(annotation) is tuple:
        return f"list of {_type(arguments[0])}" if Ellipsis in arguments else f"{len(arguments)} numbers"
    if get_origin(annotation) not in (None, dict) and arguments and "Mapping" not in str(get_origin(annotation)):
        return " or ".join(_type(part) for part in arguments if part is not NoneType)
    return "keys of its own" if next(inner_models(annotation), None) else f"{_type(arguments[1])} by name"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return ""
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "its own"
    plain = dict(value) if hasattr(value, "items") else value
    return f"`{json.dumps(plain, ensure_ascii=False)}`"


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[1]))
    (Path(__file__).parent / "recipe.md").write_text(page(), encoding="utf-8")
