"""How flags are declared: fields of a dataclass, and arguments of a network's constructor, a data set's
loader and the like.

    class Training(DataFlags, RunFlags):
        steps: Annotated[int, "outer (meta) steps", Range(1)] = 20000

    def __init__(self, width: Annotated[int, "channels of a layer", Range(1)] = 64, skip: bool = False)

An annotation gives a flag's type and a text for `--help`, and, where there is one, the range of a number, the
words that a text is one of, or a function that reads the value. `utils.command_line` makes a parser of them.
"""

import inspect
import math
import os
import re
from argparse import ArgumentTypeError
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from typing_extensions import dataclass_transform

from utils.errors import UserError, refusing

Reader = Callable[[str], Any]
"""Makes a value of a text, or raises ArgumentTypeError."""

KINDS = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a text"}
PROJECT = Path(__file__).parents[1]
GIVEN = "size"  # an argument that the run gives: side of the images, in pixels
REQUIRED = inspect.Parameter.empty  # the default of an argument that has none


class Heading(str):
    """A class variable of a `Flags` class: the heading in `--help` of the flags below it."""


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field,))
@dataclass(frozen=True, kw_only=True)
class Flags:
    """Base of a script's arguments and of parts of them. Each field that is `Annotated` is a flag.

    Each subclass is a frozen dataclass. The docstring of a script's own class is what its `--help` begins
    with, a sentence and an example.

    Attributes:
        no_effect: flags that are accepted, with or without values, and what to do instead.
        deciding: flags that may imply the entry of a registry; see `implied`.
        given: the flags that were typed or stand in a config file or the run that is resumed.
        places: by flag, field and argument of the flags that a `Registry` gives.
    """

    no_effect: ClassVar[Mapping[str, str]] = {}
    deciding: ClassVar[frozenset[str]] = frozenset()

    given: frozenset[str] = field(default=frozenset(), compare=False, repr=False)
    places: Mapping[str, tuple[str, str]] = field(default_factory=dict, compare=False, repr=False)

    def __init_subclass__(cls) -> None:
        dataclass(frozen=True, kw_only=True)(cls)

    def idle(self) -> Mapping[str, str]:
        """The fields that mean nothing beside another flag, each with that flag as it is typed.

        To give one of them is an error. They are recorded as None.
        """
        return {}

    @classmethod
    def implied(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """What given flags say of others; raises UserError where these are given with another value."""
        return {}

    def validate(self) -> None:
        """Raise UserError where flags contradict each other."""

    def changeable(self) -> frozenset[str]:
        """The flags whose values may change when a run is resumed."""
        return frozenset()

    @property
    def notices(self) -> list[str]:
        """Lines for the user about flags given without effect."""
        unused = [key for key in self.no_effect if f"*{key}" in self.given]
        return [f"--{key} has no effect: {self.no_effect[key]}" for key in unused]


FlagsT = TypeVar("FlagsT", bound=Flags)


class Shown(str):
    """A default as `--help` gives it."""


@dataclass(frozen=True)
class Range:
    """The least and the greatest value of a number; None where there is no limit."""

    low: float | None = None
    high: float | None = None


SEED = Range(0, 2**32 - 1)  # what every generator in use can be seeded with


@dataclass(frozen=True)
class FlagInfo:
    """How a field of `Flags`, or an argument of a registry's entry, is typed.

    Attributes:
        default: its value where nobody gives it; `REQUIRED` if it must be given.
        kind: its type; of a list, that of the items.
        several: whether it is a list.
        read: makes a value of what is typed.
        text: what it is, for `--help`.
        words: those that it takes; if a registry, `--help` adds what each entry says of itself.
        shown: the default as `--help` gives it.
    """

    default: Any
    kind: Any
    several: bool
    read: Reader
    text: str
    words: Collection[Any] | None
    shown: str | None

    @classmethod
    def of(cls, annotation: Any, default: Any) -> "FlagInfo":
        """What an annotation and a default say. Without annotation, the type is that of the default."""
        kind, extras, several = _unwrapped(annotation)
        kind = type(default) if kind is REQUIRED else kind
        span = next((extra for extra in extras if isinstance(extra, Range)), Range())
        words = next((extra for extra in extras if isinstance(extra, Mapping | tuple | list)), None)
        usual = file_path if kind is Path else reader(kind, span.low, span.high)
        usual = usual if words is None else word(words)
        read = next((extra for extra in extras if callable(extra)), usual)
        text = next((extra for extra in extras if type(extra) is str), "")
        shown = next((extra for extra in extras if isinstance(extra, Shown)), None)
        return cls(default, kind, several, read, text, words, shown)


@dataclass(frozen=True)
class Registry:
    """In an annotation: the field holds the arguments of the registry's entry that another flag names.

    Attributes:
        chooser: the field that names the entry.
        table: the registry. It is looked at when the parser is made.
        prefix: what always makes a flag of an argument's name.
        given: number of leading arguments that the run gives to an entry that is a class.
    """

    chooser: str
    table: Mapping[str, Callable[..., Any]]
    prefix: str
    given: int = 0

    def arguments(self, entry: str) -> dict[str, FlagInfo]:
        """The flags of an entry; see the function `arguments`."""
        return arguments(self.table[entry], self.given)

    def names(self) -> Iterator[tuple[str, str]]:
        """Entry and argument, of all arguments of all entries that can be read."""
        for entry in self.table:
            with suppress(UserError):
                yield from ((entry, argument) for argument in self.arguments(entry))


def declared(kind: type[Flags]) -> dict[str, FlagInfo | Registry]:
    """The flags of a class, and the registries of the fields that hold an entry's arguments, by field."""
    found: dict[str, FlagInfo | Registry] = {}
    hints = get_type_hints(kind, include_extras=True)
    for part in fields(kind):
        if get_origin(hint := hints[part.name]) is Annotated:
            default = REQUIRED if part.default is MISSING else part.default
            default = default if part.default_factory is MISSING else part.default_factory()
            registries = [extra for extra in get_args(hint) if isinstance(extra, Registry)]
            found[part.name] = registries[0] if registries else FlagInfo.of(hint, default)
    return found


def headed(kind: type[Flags]) -> dict[str, list[str]]:
    """The names of a class's fields by their heading, which is empty for some, in the order of `--help`."""
    found: dict[str, list[str]] = {"": []}
    for base in kind.__mro__:
        heading = ""
        for name in inspect.get_annotations(base):
            if isinstance(value := vars(base).get(name), Heading):
                heading = value
            elif all(name not in names for names in found.values()):
                found.setdefault(heading, []).append(name)
    return found


def arguments(function: Callable[..., Any], given: int = 0) -> dict[str, FlagInfo]:
    """The arguments of a class's constructor after the first `given`, or those that a function takes by name
    alone.

    A field of a dataclass has the annotation of the class that declares it, with the names of that class's
    module. An argument `size` is no flag, unless it is keyword-only: the run gives it.

    Raises:
        UserError: an argument is `*args` or `**kwargs`, or its type is neither one of `KINDS` nor `X | None`
            of one.
    """
    name = getattr(function, "__name__", str(function))
    try:
        own = isinstance(function, type) and is_dataclass(function)
        hints = get_type_hints(function, include_extras=True) if own else {}
        parameters = list(inspect.signature(function, eval_str=not hints).parameters.values())[given:]
    except (NameError, TypeError, ValueError, SyntaxError, AttributeError) as error:
        raise UserError(f"{name}: cannot read its arguments: {error}") from error
    found = {}
    for parameter in parameters:
        if parameter.name == GIVEN and parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            continue
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD and not isinstance(function, type):
            continue  # what the caller of every entry gives
        made = FlagInfo.of(hints.get(parameter.name, parameter.annotation), parameter.default)
        named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if made.kind not in KINDS or made.several or not named:
            raise UserError(
                f"{name}: its argument `{parameter}` can be no flag, which gives int, float, bool or str, "
                "or None in place of one, to an argument of its name"
            )
        found[parameter.name] = made
    return found


def _unwrapped(annotation: Any) -> tuple[Any, list[Any], bool]:
    """The type within `Annotated`, `X | None` and `list[X]`, what `Annotated` adds, and whether a list is
    meant."""
    extras: list[Any] = []
    several = False
    while (origin := get_origin(annotation)) in (Annotated, Union, UnionType, list):
        inner, *rest = (kind for kind in get_args(annotation) if kind is not NoneType)
        if rest and origin is not Annotated:
            break
        annotation, extras, several = inner, extras + rest, several or origin is list
    if origin is Literal:
        return str, [*extras, get_args(annotation)], several
    return annotation, extras, several


def reader(kind: type, low: float | None = None, high: float | None = None) -> Reader:
    """A reader of values of a type, one of `KINDS` but bool, from `low` to `high` (`None`: no limit)."""
    limits = [f"{low} or greater"] * (low is not None) + [f"at most {high}"] * (high is not None)

    def read(text: str) -> Any:
        value: Any
        try:
            text.encode()  # stray bytes could not be written into a log or a file
            value = kind(text)
        except ValueError:
            value = math.nan
        if (isinstance(value, float) and not math.isfinite(value)) or "\0" in text:
            raise ArgumentTypeError(f"{text!r} is not {KINDS[kind]}")
        if (low is not None and value < low) or (high is not None and value > high):
            raise ArgumentTypeError(f"{text!r}: choose {', '.join(limits)}")
        return value

    return read


whole, number = partial(reader, int), partial(reader, float)


def positive(text: str) -> float:
    """The finite number above 0 that a text spells."""
    found: float = number()(text)
    if found <= 0:
        raise ArgumentTypeError(f"{text!r} is not a number above 0")
    return found


def word(words: Collection[Any], aliases: Mapping[str, str] | None = None) -> Reader:
    """A reader of one of several words, or numbers, in any case that leaves no doubt.

    Args:
        words: the words. A registry is looked at when a word is read.
        aliases: other words, with the word that each stands for.
    """

    def read(text: str) -> Any:
        known = {**(aliases or {}), **{str(name): name for name in words}}
        alike = [text] if text in known else [name for name in known if name.lower() == text.lower()]
        if len(alike) != 1:
            raise ArgumentTypeError(f"{text!r} is not one of {', '.join(known)}")
        return known[alike[0]]

    return read


def file_path(text: str) -> Path:
    """The path that a text spells: a leading `~` or `~user` is a home folder.

    A shell expands `~/x`, but neither `--flag=~/x` nor a text in a file. `./~` and the `~` of a user that
    does not exist stay as they are.
    """
    path = os.path.expanduser(reader(str)(text))  # noqa: PTH111 (pathlib takes ./~ for ~)
    return Path(path)


def existing(text: str) -> Path:
    """The path of what is to be read. A path that leads nowhere is one within the project, if it is there."""
    path = file_path(text)
    with refusing(f"read {path}"):  # say a name that is too long, which the system does not look for
        return path if path.exists() or not (PROJECT / path).exists() else PROJECT / path


def folder_name(text: str) -> str:
    """The name of a folder, without those above it, that a text spells."""
    name: str = reader(str)(text)
    if not name.strip(". ") or re.search(r"[/\\]", name):
        raise ArgumentTypeError(f"{text!r} is not a folder's name; see --runs_dir")
    return name
