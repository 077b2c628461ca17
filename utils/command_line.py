"""Reads a command line, a config file and the arguments of a run that is resumed into a dataclass.

A script's arguments are a subclass of `Flags`: each field is a flag, with default, reader and help.

    @dataclass(kw_only=True)
    class Training(DataFlags, RunFlags):
        steps: int = flag(20000, whole(1), "outer (meta) steps")

Each flag can be typed with `-` and with `_` between its words. A config file (TOML) holds flags under their
field's name, with `-` or `_` (`--no-reset` is `reset = false`). Values of a config file and of a run that is
resumed pass through the readers of the command line. What is typed wins over a config file, and must not
change the numbers of a run that is resumed.

A field made by `arguments_of` holds the arguments of one entry of a registry, say of the network that
`--treatment` names. The chosen entry's arguments alone are flags. The registry's prefix before an argument's
name always makes its flag (`--net_width`). The name alone does so where neither the script nor an entry of a
registry that is read before has a flag of that name.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from textwrap import indent
from typing import Any, ClassVar, NoReturn, TypeVar

from utils.errors import UserError, try_to_write
from utils.files import expand, read_text
from utils.signature import REQUIRED, Argument, arguments

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(kw_only=True)
class Flags:
    """Base of a script's arguments and of parts of them, whose fields `flag`, `switch` and others make.

    A script's own class has as docstring what its `--help` begins with, a sentence and an example. Where a
    part redefines a field of its base, the flag keeps its place in the help.

    Attributes:
        group: heading in `--help` of the flags that a class adds.
        may_change: flags that `--resume` takes other values of.
        no_effect: flags that are accepted, with or without values, and what to do instead.
        notices: lines for the user about flags given without effect.
        given: the flags that were typed or stand in a config file or the run that is resumed.
        places: by flag, field and argument of the flags that `arguments_of` made.
    """

    group: ClassVar[str] = "options"
    may_change: ClassVar[frozenset[str]] = frozenset()
    no_effect: ClassVar[Mapping[str, str]] = {}

    notices: tuple[str, ...] = ()
    given: frozenset[str] = field(default=frozenset(), compare=False, repr=False)
    places: Mapping[str, tuple[str, str]] = field(default_factory=dict, compare=False, repr=False)

    def idle(self) -> Mapping[str, str]:
        """The fields that mean nothing beside another flag, and that flag as it is typed.

        One that is given is refused. They are recorded as None.
        """
        return {}

    def check(self) -> None:
        """Fill in defaults that depend on other flags.

        Raises:
            UserError: flags contradict each other.
        """

    def changeable(self) -> frozenset[str]:
        """The flags that a run of these may be resumed with other values of."""
        return self.may_change


FlagsT = TypeVar("FlagsT", bound=Flags)


@dataclass(frozen=True)
class _Flag:
    """How a field of `Flags` is typed."""

    default: Any
    read: Callable[[str], Any] | None  # None of a switch
    text: str
    shown: str | None = None  # the default as the help gives it; None: by its value
    name: str | None = None  # None: the field's
    in_config: bool = True
    names: Collection[str] | None = None  # that the value is one of
    options: Mapping[str, Any] = field(default_factory=dict)  # of argparse's `add_argument`


@dataclass(frozen=True)
class _Registry:
    """Where a field of `arguments_of` finds its arguments."""

    chooser: str
    table: Mapping[str, Callable[..., Any]]
    prefix: str
    skip: int

    def names(self) -> Iterator[tuple[str, str]]:
        """Entry and argument of all arguments of all entries that can be read."""
        for entry, function in self.table.items():
            with suppress(UserError):
                yield from ((entry, argument) for argument in arguments(function, self.skip))


def flag(
    default: Any,
    read: Callable[[str], Any],
    text: str,
    *,
    shown: str | None = None,
    name: str | None = None,
    in_config: bool = True,
    names: Collection[str] | None = None,
    **options: Any,
) -> Any:
    """A field for a flag with a value, or a positional argument if its `name` has no dashes.

    Args:
        default: its value where nobody gives it; MISSING if it must be given.
        read: makes a value of what is typed, or raises what argparse catches.
        text: what it is, for `--help`.
        shown: the default as `--help` gives it.
        name: with dashes, where it is not the field's.
        in_config: whether it may stand in a config file.
        names: the words that it takes, for `--help`; if a registry, with what each entry says of itself.
        options: of `argparse.ArgumentParser.add_argument`.
    """
    metadata = {"flag": _Flag(default, read, text, shown, name, in_config, names, options)}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def switch(default: bool | None, text: str, *, shown: str | None = None, name: str | None = None) -> Any:
    """A field for the pair `--name` and `--no-name`."""
    return field(default=default, metadata={"flag": _Flag(default, None, text, shown, name)})


def choice(
    default: str | None,
    names: Collection[str],
    text: str,
    *,
    aliases: Mapping[str, str] | None = None,
    **options: Any,
) -> Any:
    """A field for a flag with one of several words, in any case that leaves no doubt.

    Args:
        names: the words. A registry is looked at when the parser is made.
        aliases: other words by what they stand for.
    """

    def read(text: str) -> str:
        known = {**(aliases or {}), **{name: name for name in names}}
        alike = [text] if text in known else [name for name in known if name.lower() == text.lower()]
        if len(alike) != 1:
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(known)}")
        return known[alike[0]]

    return flag(default, read, text, names=names, **options)


def arguments_of(chooser: str, table: Mapping[str, Callable[..., Any]], prefix: str, *, skip: int = 0) -> Any:
    """A field for a dict of arguments of the registry entry that another flag names.

    Args:
        chooser: the field that names the entry.
        table: the registry. It is looked at when the parser is made.
        prefix: put before an argument whose name is taken.
        skip: first arguments of the entries that are no flags.
    """
    return field(default_factory=dict, metadata={"registry": _Registry(chooser, table, prefix, skip)})


def _of_argument(argument: Argument) -> _Flag:
    """The flag for an argument of a registry's entry."""

    def read(text: str) -> Any:
        try:
            return argument.read(text if argument.kind is not str else plain_text(text))
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    shown = "none, it must be given" if argument.default is REQUIRED else None
    default = None if argument.default is REQUIRED else argument.default
    return _Flag(default, None if argument.kind is bool else read, argument.text, shown)


def _parts(kind: type[Flags]) -> dict[str, list[str]]:
    """The groups of the help: heading, and names of fields."""
    known = {part.name for part in fields(kind) if part.metadata}
    order = [base for base in kind.__mro__ if issubclass(base, Flags)]
    found: dict[str, list[str]] = {}
    done: set[str] = set()
    for group in dict.fromkeys(base.group for base in order):
        for base in reversed([base for base in order if base.group == group]):
            names = [name for name in inspect.get_annotations(base) if name in known - done]
            done |= set(names)
            found.setdefault(group, []).extend(names)
    return {group: names for group, names in found.items() if names}


def own_flags(kind: type[Flags]) -> frozenset[str]:
    """The names of the flags that a part adds to its base."""
    return frozenset(inspect.get_annotations(kind))


class HelpFirst(argparse.ArgumentParser):
    """An argument parser whose help begins with its description, a sentence and an example, as it is, and
    whose errors are one line."""

    def __init__(self, **options: Any) -> None:
        style = argparse.RawDescriptionHelpFormatter
        super().__init__(usage=argparse.SUPPRESS, formatter_class=style, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """End the process with exit code 2 and one line on stderr, without the usage."""
        try_to_write(f"{self.prog}: error: {' '.join(message.split())}\n", sys.stderr)
        sys.exit(2)


class Parser(HelpFirst):
    """The parser of a script's arguments.

    Args:
        kind: the script's arguments.
        chosen: entry of each registry by the field that names it; without it the field's default, else the
            first.
        only: fields that are flags; default all.

    Attributes:
        flags: by field or argument, those that may stand in a config file.
        places: field and argument of the flags that are arguments of registries' entries.

    Raises:
        UserError: an argument of a chosen entry can be no flag.
    """

    def __init__(
        self, kind: type[Flags], chosen: Mapping[str, str] | None = None, only: Collection[str] | None = None
    ) -> None:
        about, _, example = (inspect.getdoc(kind) or "").partition("\n\n")
        super().__init__(
            description=f"{about}\n\n{indent(example, '    ')}",
            exit_on_error=False,
            argument_default=argparse.SUPPRESS,
            add_help=only is None,
        )
        self.flags: dict[str, argparse.Action] = {}
        self.places: dict[str, tuple[str, str]] = {}
        self.chosen: dict[str, tuple[_Registry, str]] = {}
        self._taken = {"help", *kind.no_effect}
        parts = {part.name: part for part in fields(kind) if only is None or part.name in only}
        groups: dict[str, argparse._ActionsContainer] = {}
        for heading, names in _parts(kind).items():
            group = self if heading == Flags.group else self.add_argument_group(heading)
            for name in filter(parts.__contains__, names):
                groups[name] = group
                if "flag" in parts[name].metadata:
                    self._add(group, name, parts[name].metadata["flag"])
        if only is None:
            group = self.add_argument_group("flags of the released code, accepted without effect")
            for key, instead in kind.no_effect.items():
                text = f"no effect: {instead}"
                group.add_argument(f"--{key}", nargs="*", dest=f"*{key}", metavar="VALUE", help=text)
        for name, part in parts.items():
            if "registry" in part.metadata:
                registry: _Registry = part.metadata["registry"]
                default = parts[registry.chooser].default or next(iter(registry.table))
                entry = str((chosen or {}).get(registry.chooser, default))
                self.chosen[name] = registry, entry
                self._add_arguments(groups[name], name, registry, entry)

    def _add_arguments(
        self, group: argparse._ActionsContainer, name: str, registry: _Registry, entry: str
    ) -> None:
        """Make flags of the arguments of a registry's entry."""
        flag = f"--{registry.chooser}"
        group.description = (
            f"among them those of {flag} {entry}; {flag} NAME --help shows those of another.\n"
            f"--{registry.prefix}_X always means X of {flag}, --X if no other flag is called so."
        )
        try:
            found = arguments(registry.table[entry], registry.skip)
        except UserError as error:
            raise UserError(f"{flag} {entry}: {error}") from error
        for argument, made in found.items():
            prefixed = f"{registry.prefix}_{argument}"
            if prefixed in found or self._is_taken(prefixed):
                raise UserError(
                    f"{flag} {entry}: --{prefixed} is taken: call its argument {argument!r} otherwise"
                )
            key = prefixed if self._is_taken(argument) else argument
            self.places[key] = name, argument
            self._add(group, key, _of_argument(made), prefixed)
        self._taken |= {argument for _, argument in registry.names()}

    def _is_taken(self, key: str) -> bool:
        return not {key, f"no_{key}"}.isdisjoint(self._taken)

    def _add(self, group: argparse._ActionsContainer, key: str, made: _Flag, also: str = "") -> None:
        """Make a flag `key`, which `also` names as well, with `-` and with `_`."""
        text, names = made.text, made.names
        if isinstance(names, Mapping):
            lines = [f"{name}: {_first_line(entry)}" for name, entry in names.items() if callable(entry)]
            text = "; ".join([text, *lines])
        if made.default is not MISSING:
            text += f" (default: {_shown(made.default) if made.shown is None else made.shown})"
        name, text = made.name or f"--{key}", text.strip().replace("%", "%%")
        options: dict[str, Any] = {"type": made.read, **made.options}
        if names is not None:
            options = {"metavar": f"{{{','.join(names)}}}", **options}
        if made.read is None:
            options = {"action": argparse.BooleanOptionalAction}
        if name.startswith("-"):
            options["dest"] = key
        action = group.add_argument(name, help=text, **options)
        action.help = text  # some versions of argparse add to that of a switch
        spelled = set(action.option_strings)
        for name in filter(None, (key, also) if spelled else ()):
            self._taken |= {name} if made.read else {name, f"no_{name}"}
            if made.in_config:
                self.flags[name] = action
            dashed = name.replace("_", "-")
            twins = {name: options, dashed: options}
            if made.read is None:
                on, off = ({"action": "store_const", "const": value, "dest": key} for value in (True, False))
                twins = {name: on, dashed: on, f"no_{name}": off, f"no-{dashed}": off, f"no-{name}": off}
            for spelling, twin in twins.items():
                if f"--{spelling}" not in spelled:
                    group.add_argument(f"--{spelling}", help=argparse.SUPPRESS, **twin)
                    spelled.add(f"--{spelling}")

    def read(self, tokens: Sequence[str]) -> dict[str, Any]:
        """What tokens give, by field or argument.

        Raises:
            UserError: a token is wrong.
        """
        try:
            found, unknown = self.parse_known_args(tokens)
        except argparse.ArgumentError as error:
            raise UserError(str(error)) from error
        if unknown:
            key = unknown[0].partition("=")[0].removeprefix("--")
            raise UserError(self._of_another(key)[1] or f"unrecognized arguments: {' '.join(unknown)}")
        return vars(found)

    def values(
        self, settings: Mapping[str, object], path: Path, skip: Collection[str] = ()
    ) -> dict[str, Any]:
        """What the settings that `path` holds give, by field or argument.

        Args:
            skip: choosers of registries, arguments of whose other entries are left out.

        Raises:
            UserError: a setting is none of a flag that may stand in a config file, or has a wrong value.
        """
        found: dict[str, Any] = {}
        for key, value in settings.items():
            name = key.replace("-", "_")
            if name not in self.flags:
                chooser, other = self._of_another(name)
                if chooser in skip:
                    continue
                raise UserError(f"{path}: {other or f'unknown key {key!r}; --help lists the flags'}")
            try:
                found |= vars(self.parse_args(_spelled(self.flags[name], value)))
            except argparse.ArgumentError as error:
                raise UserError(f"{path}: {key}: {error.message}") from error
        return found

    def _of_another(self, key: str) -> tuple[str, str]:
        """The chooser of the registry that has an entry, not the chosen one, with this argument, and what is
        wrong with the argument; empty if there is none."""
        name = key.replace("-", "_").removeprefix("no_")
        for registry, chosen in self.chosen.values():
            for entry, argument in registry.names():
                if name in (argument, f"{registry.prefix}_{argument}"):
                    flag = f"--{registry.chooser}"
                    fault = f"--{key} means nothing with {flag} {chosen}: it belongs to {flag} {entry}"
                    return registry.chooser, fault
        return "", ""


def _first_line(function: object) -> str:
    """The first line of a docstring, without its full stop."""
    return (inspect.getdoc(function) or "").partition("\n")[0].rstrip(".")


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, list | tuple):
        return " ".join(map(_shown, default))
    return "none" if default is None else f"{default:g}" if isinstance(default, float) else str(default)


def _spelled(action: argparse.Action, value: object) -> list[str]:
    """The tokens that say the same as a setting.

    A value shares a token with its flag, since it may begin with a dash.

    Raises:
        argparse.ArgumentError: no token can say it.
    """
    option = action.option_strings[0]
    if isinstance(action, argparse.BooleanOptionalAction):
        if not isinstance(value, bool):
            raise argparse.ArgumentError(action, f"{value!r} is not true or false")
        return [action.option_strings[0 if value else 1]]
    values = value if isinstance(value, list) and action.nargs else [value]
    for item in values:
        if isinstance(item, bool) or not isinstance(item, str | int | float):
            raise argparse.ArgumentError(action, f"{item!r} is no number and no text")
    return [f"{option}={item}" for item in values] or [option]


def parse(kind: type[FlagsT], argv: Sequence[str] | None = None) -> FlagsT:
    """Read the command line (`argv`, default that of the process) and the config file it names.

    Anything wrong ends the process with exit code 2 and one line on stderr.

    With `--resume`, arguments are those of the run, and what is given must agree with them but for
    the flags that may change.
    """
    try:
        return _parse(kind, sys.argv[1:] if argv is None else argv)
    except (UserError, argparse.ArgumentError) as error:
        HelpFirst().error(str(error))


def _parse(kind: type[FlagsT], tokens: Sequence[str]) -> FlagsT:
    """The arguments that tokens give; raises UserError."""
    choosers = {part.metadata["registry"].chooser for part in fields(kind) if "registry" in part.metadata}
    first = Parser(kind, only={"config", "resume", *choosers})
    typed = vars(first.parse_known_args(tokens)[0])
    config, resume = typed.get("config"), typed.get("resume")
    of_config, of_run = Path(str(config)), Path(str(resume), "config.json")
    settings = {} if config is None else _settings_of_config(config)
    run = {} if resume is None else _settings_of_run(resume)
    earlier_config = run.pop("config", None)
    chosen: dict[str, str] = {}
    for source, path in ((settings, of_config), (typed, of_config), (run, of_run)):
        chosen |= first.values({key: source[key] for key in choosers & source.keys()}, path)
    parser = Parser(kind, chosen)
    before = parser.values(run, of_run, choosers)
    given = parser.values(settings, of_config, choosers & typed.keys()) | parser.read(tokens)
    if resume is not None:
        _refuse_contradictions(parser, _filled(parser, kind, before), resume, given)
        if config is None and isinstance(earlier_config, str):
            given["config"] = Path(earlier_config)
    flags = _filled(parser, kind, before | given)
    flags.check()
    return flags


def _filled(parser: Parser, kind: type[FlagsT], given: Mapping[str, Any]) -> FlagsT:
    """Arguments of which some are given, the others at their defaults.

    Raises:
        UserError: a flag is given that means nothing beside the others, or one is missing that must be given.
    """
    notices = (f"--{key} has no effect: {text}" for key, text in kind.no_effect.items() if f"*{key}" in given)
    values: dict[str, Any] = {"notices": tuple(notices), "given": frozenset(given), "places": parser.places}
    values |= {key: given[key] for key in {part.name for part in fields(kind)} & given.keys()}
    for name, (registry, entry) in parser.chosen.items():
        found = arguments(registry.table[entry], registry.skip)
        values[name] = {argument: made.default for argument, made in found.items()}
    for key, (name, argument) in parser.places.items():
        values[name][argument] = given.get(key, values[name][argument])
    flags = kind(**values)
    idle = flags.idle()
    for key, action in parser.flags.items():
        name, argument = parser.places.get(key, (key, ""))
        if name in idle and key in given:
            typed = as_typed(action.option_strings[0].removeprefix("--"), given[key])
            raise UserError(f"{typed} means nothing with {idle[name]}: drop one of them")
        if name not in idle and argument and values[name][argument] is REQUIRED:
            registry, entry = parser.chosen[name]
            raise UserError(f"--{registry.chooser} {entry} needs --{key}")
    without: dict[str, Any] = {name: {} for name in parser.chosen.keys() & idle.keys()}
    return replace(flags, **without)


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a run folder.

    Raises:
        UserError: there is none, or it is not one that a run writes.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(
            f"{folder} is not a run folder: cannot read its config.json: {error.strerror or error}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("arguments"), dict):
        raise UserError(f"{path} is damaged: it holds no arguments")
    return config


def _settings_of_run(folder: Path) -> dict[str, Any]:
    """The arguments that a run folder records, but for flags that had no value."""
    try:
        config = read_config(folder)
    except UserError as error:
        raise UserError(f"--resume: {error}") from error
    return {key: value for key, value in config["arguments"].items() if value not in (None, [])}


def _settings_of_config(path: Path) -> dict[str, Any]:
    """The settings that a TOML file holds."""
    try:
        settings: dict[str, Any] = tomllib.loads(read_text(path))
        return settings
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror or error}") from error
    except ValueError as error:  # also what TOML and UTF-8 decoding raise
        raise UserError(f"--config {path}: not a TOML file: {error}") from error


def _refuse_contradictions(parser: Parser, of_run: Flags, folder: Path, given: Mapping[str, Any]) -> None:
    """Raise UserError where what is given asks for another run than that of a folder."""
    earlier, changeable = recorded(of_run, absolute=True), of_run.changeable()
    asked = {
        key: _plain(given[key], absolute=True) for key in parser.flags.keys() & given.keys() - changeable
    }
    contradictions = [
        f"{parser.flags[key].option_strings[0]} is {value} and was {earlier[key]}"
        for key, value in sorted(asked.items())
        if value != earlier[key]
    ]
    if contradictions:
        raise UserError(
            f"--resume {folder} goes on as it began: {'; '.join(contradictions)}; drop these flags, or "
            "start a new run without --resume"
        )
    places = [("model", path, path) for path in earlier.get("model") or ()]
    if earlier.get("model_name") is not None:
        places.append(("model_name", earlier["model_name"], str(Path(earlier["model_name"]).parent)))
    for key, path, place in places:
        if key not in given and not os.access(place, os.F_OK):
            raise UserError(
                f"--resume {folder}: its --{key} is {path}, and there is no {place} (any more); give "
                f"--{key} FILE as it is today"
            )


def recorded(flags: Flags, *, absolute: bool = False) -> dict[str, Any]:
    """The arguments by flag, None where there is none, as plain values (JSON, and loadable with
    `weights_only=True`) to be stored.

    Args:
        absolute: make paths absolute, without links.
    """
    idle = flags.idle()
    found = {
        part.name: None if part.name in idle else getattr(flags, part.name)
        for part in fields(flags)
        if "flag" in part.metadata and part.name != "resume"
    }
    found |= {key: getattr(flags, name).get(argument) for key, (name, argument) in flags.places.items()}
    return {key: _plain(value, absolute) for key, value in sorted(found.items())}


def _plain(value: object, absolute: bool) -> object:
    if isinstance(value, list):
        return [_plain(item, absolute) for item in value]
    if isinstance(value, Path):
        return str(value.resolve() if absolute else value)
    return value


def as_typed(name: str, value: object) -> str:
    """A setting as it is typed."""
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {value}"


class Flat(argparse.Action):
    """Joins the lists of a flag's values: `10 50`, `10,50` and `"10 50"` give the same list.

    A flag that is typed again adds to the list.
    """

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        earlier = getattr(namespace, self.dest, [])
        setattr(namespace, self.dest, [*earlier, *(number for part in values or () for number in part)])


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """A reader of whole numbers from `low` to `high` (`None`: no limit)."""
    span = f"of {low} or more" if high is None else f"from {low} to {high}"

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = low - 1
        if number < low or (high is not None and number > high):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {span}")
        return number

    return read


SEED = whole(0, 2**32 - 1)  # what every generator in use can be seeded with


def real(wanted: str, holds: Callable[[float], bool]) -> Callable[[str], float]:
    """A reader of finite numbers for which `holds`; others are said to be not `wanted`."""

    def read(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not (math.isfinite(number) and holds(number)):
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return number

    return read


finite = real("a finite number", lambda number: True)
non_negative = real("a finite number of 0 or more", lambda number: number >= 0)
positive = real("a finite number above 0", lambda number: number > 0)
share = real("a number from 0.000001 to 1", lambda number: 1e-6 <= number <= 1)


def several(read: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """A reader of one or more numbers with commas or spaces between."""

    def read_all(text: str) -> list[Any]:
        parts = text.replace(",", " ").split()
        if not parts:
            raise argparse.ArgumentTypeError("expected at least one number")
        return [read(part) for part in parts]

    return read_all


def device_name(text: str) -> str:
    device = text.lower()
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", device):
        raise argparse.ArgumentTypeError(f"{text!r} is not one of auto, cpu, cuda, cuda:N, mps")
    return device


def file_path(text: str) -> Path:
    path = expand(text)
    if not _is_text(str(path)):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be a file's name")
    return path


def _is_text(text: str) -> bool:
    """Whether a name can be given to the system and written in a log: no NUL, no stray bytes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def plain_text(text: str) -> str:
    if not _is_text(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no text")
    return text


def folder_name(text: str) -> str:
    if not _is_text(text) or not text.strip(". ") or re.search(r"[/\\\0]", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a folder's name; see --runs_dir")
    return text
