"""Values that are validated when they are made and never change after: what configurations and recipes are built of."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails


def problems(error: ValidationError) -> str:
    """Pydantic's findings in one line: ``moe.top_k: Input should be a valid integer, got 'two'``."""
    return "; ".join(": ".join([*filter(None, [".".join(map(str, e["loc"]))]), _problem(e)]) for e in error.errors())


def _problem(found: ErrorDetails) -> str:
    given = found["input"]
    value = f", got {given!r}" if found["type"] != "value_error" and isinstance(given, (str, int, float)) else ""
    return found["msg"].removeprefix("Value error, ") + value


class Frozen(BaseModel):
    """Keyword-only, immutable, and strict about unknown keys: a typing mistake in a file is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Strict(Frozen):
    """Values are of the very type that is asked for."""

    model_config = ConfigDict(strict=True)
