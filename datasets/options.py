"""Options of a data set's loader, which become flags of the scripts."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints


class Option(NamedTuple):
    """What `--help` says of an option, and what a number may be."""

    text: str
    low: int = 0
    high: int | None = None


class Flag(NamedTuple):
    """A loader's option: `kind` is int, float, bool or str."""

    kind: type
    default: Any
    option: Option


def loader_options(loader: Callable[..., Any]) -> dict[str, Flag]:
    """The keyword-only parameters of a loader, by name.

    Each has a default and is annotated with int, float, bool or str, perhaps `| None`, and an `Option` or
    nothing but its text: `size: Annotated[int, "what it is"] = 3`.

    Raises:
        TypeError: one is not.
    """
    hints = get_type_hints(loader, include_extras=True)
    found = {}
    for name, parameter in inspect.signature(loader).parameters.items():
        if parameter.kind is not parameter.KEYWORD_ONLY:
            continue
        # With a default of None, Python 3.10 puts an Optional around the Annotated.
        parts = (hints[name], *get_args(hints[name]))
        annotated = next((part for part in parts if get_origin(part) is Annotated), None)
        kind, *extras = (hints[name],) if annotated is None else get_args(annotated)
        kind = next((part for part in get_args(kind) if part is not type(None)), kind)
        if kind not in (int, float, bool, str) or not extras or parameter.default is parameter.empty:
            raise TypeError(
                f"{loader.__module__}: its option {name!r} is no Annotated int, float, bool or str with a "
                "text and a default"
            )
        found[name] = Flag(
            kind, parameter.default, extras[0] if isinstance(extras[0], Option) else Option(extras[0])
        )
    return found
