"""Flags: the bounds of their types, and one line for each value that these rule out. Needs no torch."""

import contextlib
import sys
from typing import Annotated

import pydantic
from pydantic import Field

from text import printable, without_secrets

CHECKED = pydantic.ConfigDict(allow_inf_nan=False, extra="forbid")  # of every dataclass of flags

# Types of flags. The bounds are far from what anyone means, and near enough for memory, time and float32.
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Count = Annotated[int, Field(ge=1, le=10**7)]
CountOrZero = Annotated[int, Field(ge=0, le=10**7)]
Few = Annotated[int, Field(ge=1, le=1000)]
Units = Annotated[int, Field(ge=1, le=10**4)]  # of a layer
Share = Annotated[float, Field(ge=0, le=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]
Weight = Annotated[float, Field(ge=0, le=1e9)]
Positive = Annotated[float, Field(gt=0, le=1e9)]
LearningRate = Annotated[float, Field(gt=0, le=10)]


def checked(flags, values):
    """An instance of a dataclass of flags. Raises ValueError, in one line, for a value that its type rules out."""
    try:
        return pydantic.dataclasses.dataclass(flags, config=CHECKED)(**values)
    except pydantic.ValidationError as error:
        raise ValueError(one_line(error)) from None


def one_line(error: Exception) -> str:
    """An error as one line for the user, without secrets: for a rejected setting its name, the rule and the value."""
    line = str(error)
    if isinstance(error, pydantic.ValidationError):
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        rule = first["msg"].replace("Input should be", "must be")
        line = f"{name} {rule[0].lower() + rule[1:]}, got {first['input']!r}"
        if first["type"] == "value_error":  # raised by a validator of ours
            line = str(first["ctx"]["error"])
        elif first["type"] == "unexpected_keyword_argument":
            line = f"there is no setting {name!r}"
    return printable(without_secrets(line))


@contextlib.contextmanager
def errors_in_one_line(script, *kinds):
    """Inside, a ValueError, an OSError or an error of `kinds` ends the command: one line for the user, exit code 2."""
    try:
        yield
    except (ValueError, OSError, *kinds) as error:
        print(f"{script}: {one_line(error)}", file=sys.stderr)
        raise SystemExit(2) from None
