"""Reads the arguments of a callable: of a network's constructor, a data set's loader and the like.

    def __init__(self, width: Annotated[int, "channels of a layer", Range(1)] = 64, skip: bool = False)

The annotation gives an argument's type, a text for `--help` and the range of a number. `utils.command_line`
makes a flag of each argument.
"""

from __future__ import annotations

import inspect
import math
from argparse import ArgumentTypeError
from collections.abc import Callable
from types import NoneType, UnionType
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin

from utils.errors import UserError

KINDS = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a text"}
REQUIRED = inspect.Parameter.empty  # the default of an argument that has none


class Range(NamedTuple):
    """The least and the greatest value of a number; None where there is no limit."""

    low: float | None = None
    high: float | None = None


class Argument(NamedTuple):
    """One argument of a callable.

    Attributes:
        kind: one of `KINDS`.
        default: its default, or REQUIRED.
        text: what the argument is; empty where the annotation holds no text.
        span: range of a number.
    """

    kind: type
    default: Any = REQUIRED
    text: str = ""
    span: Range = Range()

    def fault(self, value: object) -> str | None:
        """What is wrong with a value of this argument's type; None if nothing is."""
        low, high = self.span
        if not isinstance(value, int | float):
            return None
        if (low is None or value >= low) and (high is None or value <= high):
            return None
        limits = [f"{low} or greater"] * (low is not None) + [f"at most {high}"] * (high is not None)
        return f"choose {', '.join(limits)}"

    def read(self, text: str) -> Any:
        """The value, of every type but bool, that a text spells; ArgumentTypeError if there is none."""
        value: Any
        try:
            text.encode()  # stray bytes could not be written into a log or a file
            value = self.kind(text)
        except ValueError:
            value = math.nan
        if (isinstance(value, float) and not math.isfinite(value)) or "\0" in text:
            raise ArgumentTypeError(f"{text!r} is not {KINDS[self.kind]}")
        fault = self.fault(value)
        if fault is not None:
            raise ArgumentTypeError(f"{text!r}: {fault}")
        return value


def arguments(function: Callable[..., Any], skip: int = 0) -> dict[str, Argument]:
    """The arguments of a function, or of a class's constructor, after the first `skip` ones, by name.

    An argument without annotation has the type of its default.

    Raises:
        UserError: an argument is `*args` or `**kwargs`, or its type is neither one of `KINDS` nor `X | None`
            of one.
    """
    name = getattr(function, "__name__", str(function))
    if isinstance(function, type):
        function, skip = function.__init__, skip + 1  # type: ignore[misc]
    try:
        parameters = list(inspect.signature(function, eval_str=True).parameters.values())[skip:]
    except (NameError, TypeError, ValueError, SyntaxError, AttributeError) as error:
        raise UserError(f"{name}: cannot read its arguments: {error}") from error
    found = {}
    for parameter in parameters:
        kind, extras = _unwrapped(parameter.annotation)
        if kind is parameter.empty:
            kind = type(parameter.default)
        named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if kind not in KINDS or not named:
            raise UserError(
                f"{name}: its argument `{parameter}` can be no flag, which gives int, float, bool or str, "
                "or None in place of one, to an argument of its name"
            )
        text = next((extra for extra in extras if isinstance(extra, str)), "")
        span = next((extra for extra in extras if isinstance(extra, Range)), Range())
        found[parameter.name] = Argument(kind, parameter.default, text, span)
    return found


def _unwrapped(annotation: Any) -> tuple[Any, list[Any]]:
    """The type within `Annotated` and `X | None`, and what `Annotated` adds."""
    extras: list[Any] = []
    while (origin := get_origin(annotation)) in (Annotated, Union, UnionType):
        inner, *rest = get_args(annotation)
        if origin is Annotated:
            extras += rest
        else:
            kinds = [kind for kind in (inner, *rest) if kind is not NoneType]
            if len(kinds) > 1:
                break
            (inner,) = kinds
        annotation = inner
    return annotation, extras
