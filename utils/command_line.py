"""Reads a command line, a config file and the arguments of a run that is resumed into a dataclass.

A script's arguments are a subclass of `Flags`: each field is a flag, with default, reader and help.

    @dataclass(kw_only=True)
    class Training(DataFlags, RunFlags):
        steps: int = flag(20000, whole(1), "outer (meta) steps")

`-` and `_` may stand for each other in a flag's name. A config file (TOML) holds flags under their
field's name (`--dataset-path` is `dataset_path`, `--no-reset` is `reset = false`) and passes through
the same parser as the command line, ahead of it: so both have the same ranges, and what is typed wins. So do
the arguments of a run that is resumed; there, what is typed must not change its numbers.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from textwrap import indent
from typing import Any, ClassVar, NoReturn, TypeVar

from utils.errors import UserError, try_to_write
from utils.files import expand, place_of, read_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_NOTICES = "*notices"  # among what was read: a name that no flag has
_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
}


@dataclass(kw_only=True)
class Flags:
    """Base of a script's arguments and of parts of them, whose fields `flag`, `switch` and `flags_of` make.

    A script's own class has as docstring what its `--help` begins with, a sentence and an example. Where a
    part redefines a field of its base, the flag keeps its place in the help.

    Attributes:
        group: heading in `--help` of the flags that a class adds.
        may_change: flags that `--resume` takes other values of.
        no_effect: flags that are accepted, with or without values, and what to do instead.
        notices: lines for the user about flags typed without effect.
        given: the flags that were typed or stand in a config file or the run that is resumed.
        idle: flags that mean nothing beside the others; they are recorded as None.
    """

    group: ClassVar[str] = "options"
    may_change: ClassVar[frozenset[str]] = frozenset()
    no_effect: ClassVar[Mapping[str, str]] = {}

    notices: tuple[str, ...] = ()
    given: frozenset[str] = field(default=frozenset(), compare=False, repr=False)
    idle: frozenset[str] = field(default=frozenset(), compare=False, repr=False)

    def check(self) -> None:
        """Fill in defaults that depend on other flags.

        Raises:
            UserError: flags contradict each other.
        """

    def changeable(self) -> frozenset[str]:
        """The flags that a run of these may be resumed with other values of."""
        return self.may_change

    def notice(self, line: str) -> None:
        """Add a line to `notices`."""
        self.notices = (*self.notices, line)

    def refuse_idle(self, beside: str) -> None:
        """Raise UserError where a flag is given that means nothing beside another one."""
        for part in fields(self):
            if part.name in self.idle & self.given:
                name = part.metadata["flag"].name
                typed = as_typed(part.name, getattr(self, part.name))
                typed = typed if name is None else f"{name} {getattr(self, part.name)}"
                raise UserError(f"{typed} means nothing with {beside}: drop one of them")


FlagsT = TypeVar("FlagsT", bound=Flags)


@dataclass(frozen=True)
class _Flag:
    """How a field of `Flags` is typed. A text may be a function, called when the parser is made: what a
    registry holds is not known before."""

    default: Any
    read: Callable[[str], Any] | None  # None of a switch
    text: str | Callable[[], str]
    shown: str | Callable[[], str] | None  # the default as the help gives it; None: by its value
    name: str | None  # None: the field's
    in_config: bool
    options: Mapping[str, Any]  # of argparse's `add_argument`


def flag(
    default: Any,
    read: Callable[[str], Any],
    text: str | Callable[[], str],
    *,
    shown: str | Callable[[], str] | None = None,
    name: str | None = None,
    in_config: bool = True,
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
        options: of `argparse.ArgumentParser.add_argument`.
    """
    metadata = {"flag": _Flag(default, read, text, shown, name, in_config, options)}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def switch(default: bool | None, text: str, *, shown: str | None = None, name: str | None = None) -> Any:
    """A field for the pair `--name` and `--no-name`."""
    return field(default=default, metadata={"flag": _Flag(default, None, text, shown, name, True, {})})


def choice(
    default: str | None,
    choices: Sequence[str] | Callable[[], Sequence[str]],
    text: str | Callable[[], str],
    *,
    shown: str | Callable[[], str] | None = None,
) -> Any:
    """A field for a flag with one of several words, in whatever case."""
    return flag(default, str.lower, text, shown=shown, choices=choices)


def flags_of(made: Callable[[], Mapping[str, Any]]) -> Any:
    """A field for a dict of flags that are known only when the parser is made, from a registry.

    Args:
        made: the fields by name. One whose default is None is missing in the dict unless it is given.
    """
    return field(default_factory=dict, metadata={"flags": made})


def _parts(kind: type[Flags]) -> Iterator[tuple[str, dict[str, _Flag]]]:
    """The groups of the help: heading, and flags by name."""
    by_name = {part.name: part for part in fields(kind)}
    order = [base for base in kind.__mro__ if issubclass(base, Flags)]
    done: set[str] = set()
    for group in dict.fromkeys(base.group for base in order):
        found: dict[str, _Flag] = {}
        for base in reversed([base for base in order if base.group == group]):
            for name in inspect.get_annotations(base):
                if name in by_name and name not in done:
                    done.add(name)
                    found |= _flags_of_field(name, by_name[name].metadata)
        if found:
            yield group, found


def _flags_of_field(name: str, metadata: Mapping[str, Any]) -> dict[str, _Flag]:
    if "flags" in metadata:
        return {key: made.metadata["flag"] for key, made in metadata["flags"]().items()}
    return {name: metadata["flag"]} if "flag" in metadata else {}


def own_flags(kind: type[Flags]) -> frozenset[str]:
    """The names of the flags that a part adds to its base."""
    return frozenset(inspect.get_annotations(kind))


def _now(value: Any) -> Any:
    return value() if callable(value) else value


class HelpFirst(argparse.ArgumentParser):
    """An argument parser whose help begins with its description, a sentence and an example, as it is, and
    whose errors are one line."""

    def format_help(self) -> str:
        about, self.description = self.description, None
        try:
            return f"{(about or '').strip()}\n\n{super().format_help()}"
        finally:
            self.description = about

    def error(self, message: str) -> NoReturn:
        """End the process with exit code 2 and one line on stderr, without the usage."""
        try_to_write(f"{self.prog}: error: {' '.join(message.split())}\n", sys.stderr)
        sys.exit(2)


class Parser(HelpFirst):
    """The parser of a script's arguments.

    Attributes:
        flags: by field, those that may stand in a config file.
    """

    def __init__(self, kind: type[Flags]) -> None:
        about, _, example = (inspect.getdoc(kind) or "").partition("\n\n")
        super().__init__(
            description=f"{about}\n\n{indent(example, '    ')}",
            allow_abbrev=False,
            exit_on_error=False,
            argument_default=argparse.SUPPRESS,
        )
        self.flags: dict[str, argparse.Action] = {}
        self._spellings: dict[str, str] = {}
        for heading, found in _parts(kind):
            group = self if heading == Flags.group else self.add_argument_group(heading)
            for key, made in found.items():
                self._add(group, key, made)
        if kind.no_effect:
            group = self.add_argument_group("flags of the released code, accepted without effect")
            for key, instead in kind.no_effect.items():
                text = f"no effect: {instead}"
                self._know(
                    group.add_argument(
                        f"--{key}",
                        action=_WithoutEffect,
                        dest=argparse.SUPPRESS,
                        nargs="*",
                        metavar="VALUE",
                        help=text,
                    )
                )

    def _add(self, group: argparse._ActionsContainer, key: str, made: _Flag) -> None:
        text, shown = _now(made.text).replace("%", "%%"), _now(made.shown)
        if made.default is not MISSING:
            text += f" (default: {_shown(made.default) if shown is None else shown})".replace("%", "%%")
        if made.read is None:
            options: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        else:
            lazy = {name: _now(value) for name, value in made.options.items() if name != "action"}
            options = {"type": made.read, **made.options, **lazy}
        name = made.name or f"--{key}"
        if name.startswith("-"):
            options["dest"] = key
        try:
            action = group.add_argument(name, help=text, **options)
        except argparse.ArgumentError as error:  # of a network or data set of the user's
            self.error(f"two arguments of networks and data sets are called {name}: {error.message}")
        action.help = text  # some versions of argparse add to that of a switch
        self._know(action)
        if made.in_config:
            self.flags[key] = action

    def _know(self, action: argparse.Action) -> None:
        self._spellings |= {_plain(option): option for option in action.option_strings}

    def canonical(self, token: str) -> str:
        """The token with its flag, if it is one, in the registered spelling."""
        name, equals, value = token.partition("=")
        return self._spellings.get(_plain(name), name) + equals + value

    def read(self, tokens: Sequence[str]) -> dict[str, Any]:
        """What canonical tokens give, by field; a wrong one ends the process as :meth:`error` does."""
        try:
            return vars(self.parse_args(tokens))
        except argparse.ArgumentError as error:
            self.error(str(error))


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, list | tuple):
        return " ".join(map(_shown, default))
    return "none" if default is None else f"{default:g}" if isinstance(default, float) else str(default)


def parse(kind: type[FlagsT], argv: Sequence[str] | None = None) -> FlagsT:
    """Read the command line (`argv`, default that of the process) and the config file it names.

    Anything wrong ends the process with exit code 2 and one line on stderr.

    With `--resume`, arguments are those of the run, and what is given must agree with them but for
    the flags that may change.
    """
    parser = Parser(kind)
    tokens = [parser.canonical(token) for token in (sys.argv[1:] if argv is None else argv)]
    for token in tokens:  # of `--flag=--` argparse drops the value before Python 3.12
        if token.endswith("=--"):
            parser.error(f"argument {token[:-3]}: expected one argument")
    typed = parser.read(tokens)
    config, resume = typed.get("config"), typed.get("resume")
    if config is not None:
        tokens = [*_config_tokens(parser, config), *tokens]
    if resume is not None:
        settings = _settings_of_run(parser, resume)
        earlier_config = settings.pop("config", None)
        before = _tokens(parser, settings, resume / "config.json")
        _refuse_contradictions(parser, kind, resume, before, tokens)
        tokens = [*before, *tokens]
        if config is None and isinstance(earlier_config, str):
            config = Path(earlier_config)
    given = parser.read(tokens)
    if config is not None:
        given["config"] = config
    flags = _filled(kind, given)
    try:
        flags.check()
    except UserError as error:
        parser.error(str(error))
    return flags


def _filled(kind: type[FlagsT], given: Mapping[str, Any]) -> FlagsT:
    """Arguments of which some are given, the others at their defaults."""
    values: dict[str, Any] = {"given": frozenset(given) - {_NOTICES}, "notices": given.get(_NOTICES, ())}
    for part in fields(kind):
        if "flag" in part.metadata and part.name in given:
            values[part.name] = given[part.name]
        elif "flags" in part.metadata:
            defaults = _flags_of_field(part.name, part.metadata)
            found = {key: given.get(key, made.default) for key, made in defaults.items()}
            values[part.name] = {key: value for key, value in found.items() if value is not None}
    return kind(**values)


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


def _settings_of_run(parser: Parser, folder: Path) -> dict[str, Any]:
    """The arguments that a run folder records, but for flags that had no value."""
    try:
        config = read_config(folder)
    except UserError as error:
        parser.error(f"--resume: {error}")
    settings = {key: value for key, value in config["arguments"].items() if value is not None}
    here, cwd = place_of(folder), config.get("cwd")
    # Where the run is still in its place, so is what it named from where it was started. A folder that
    # was moved knows no better than the user, who moved it.
    if here and config.get("folder") == here["folder"] and isinstance(cwd, str) and cwd != here["cwd"]:
        for key, value in settings.items():
            if key in parser.flags and parser.flags[key].type is file_path:
                several = isinstance(value, list)
                paths = [str(Path(cwd, str(path))) for path in (value if several else [value])]
                settings[key] = paths if several else paths[0]
    return settings


def _refuse_contradictions(
    parser: Parser, kind: type[Flags], folder: Path, before: list[str], tokens: list[str]
) -> None:
    """End the process if `tokens` ask for another run than that of the tokens `before`."""
    of_run, given = _filled(kind, parser.read(before)), parser.read(tokens)
    earlier, changeable = recorded(of_run, plain=False), of_run.changeable()
    contradictions = [
        f"{parser.flags[key].option_strings[0]} is {value} and was {earlier[key]}"
        for key, value in given.items()
        if key in parser.flags and key not in changeable and value != earlier[key]
    ]
    if contradictions:
        parser.error(
            f"--resume {folder} goes on as it began: {'; '.join(contradictions)}; drop these flags, or "
            "start a new run without --resume"
        )
    places = [("model", path, path) for path in earlier.get("model") or ()]
    if "model_name" in earlier and earlier["model_name"] is not None:
        places.append(("model_name", earlier["model_name"], earlier["model_name"].parent))
    for key, path, place in places:
        if key not in given and not os.access(place, os.F_OK):
            parser.error(
                f"--resume {folder}: its --{key} is {path}, and there is no {place} (any more); give "
                f"--{key} FILE as it is today"
            )


def recorded(flags: Flags, *, plain: bool = True) -> dict[str, Any]:
    """The arguments by flag, None where there is none, as plain values (JSON, and loadable with
    `weights_only=True`) to be stored."""
    found: dict[str, Any] = {}
    for part in fields(flags):
        value = getattr(flags, part.name)
        if "flags" in part.metadata:
            found |= dict.fromkeys(_flags_of_field(part.name, part.metadata)) | value
        elif "flag" in part.metadata and part.name != "resume":
            found[part.name] = None if part.name in flags.idle else value
    return {key: _plain_value(value) if plain else value for key, value in sorted(found.items())}


def _plain_value(value: object) -> object:
    if isinstance(value, list):
        return [_plain_value(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def as_typed(name: str, value: object) -> str:
    """A setting as it is typed."""
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {value}"


def _config_tokens(parser: Parser, path: Path) -> list[str]:
    """The settings of a TOML file as the command-line tokens that say the same."""
    try:
        settings = tomllib.loads(read_text(path))
    except OSError as error:
        parser.error(f"--config {path}: {error.strerror or error}")
    except ValueError as error:  # also what TOML and UTF-8 decoding raise
        parser.error(f"--config {path}: not a TOML file: {error}")
    return _tokens(parser, settings, path)


def _tokens(parser: Parser, settings: Mapping[str, object], path: Path) -> list[str]:
    """The settings that `path` holds as the command-line tokens that say the same."""
    tokens = []
    for key, value in settings.items():
        if key not in parser.flags:
            parser.error(f"{path}: unknown key {key!r}; --help lists the flags")
        spelled = _spelled(parser.flags[key], value)
        try:
            parsed = vars(parser.parse_args(spelled))[key]
        except argparse.ArgumentError as error:
            parser.error(f"{path}: {key}: {error.message}")
        if not _same_kind(value, parsed):
            kind = type(parsed[0]) if isinstance(parsed, list) else type(parsed)
            several = "one or more of " if isinstance(parsed, list) else ""
            parser.error(f"{path}: {key}: {value!r} is not {several}{_KINDS.get(kind, 'a text in quotes')}")
        tokens += spelled
    return tokens


def _spelled(action: argparse.Action, value: object) -> list[str]:
    """One token if it can be, so that a value which starts with a dash cannot be taken for a flag."""
    option = action.option_strings[0]
    if isinstance(action, argparse.BooleanOptionalAction):
        return [action.option_strings[1 if value is False else 0]]
    if isinstance(value, list):
        if action.nargs:
            return [option, *map(str, value)]
        value = ",".join(map(str, value))
    return [f"{option}={value}"]


def _same_kind(given: object, parsed: object) -> bool:
    """Whether a TOML value is of its flag's type: 1 may stand for 1.0, "1" and true may not."""
    if isinstance(parsed, list):  # of which one value alone is one as well
        return all(map(_same_kind, given if isinstance(given, list) else [given], parsed))
    if isinstance(given, bool) or isinstance(parsed, bool):
        return given is parsed
    if isinstance(parsed, float):
        return isinstance(given, int | float)
    if isinstance(parsed, int):
        return isinstance(given, int)
    return isinstance(given, str)


class Flat(argparse.Action):
    """Join the lists of a flag's values: `10 50`, `10,50` and `"10 50"` are the same."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, [number for part in values or () for number in part])


class _WithoutEffect(argparse.Action):
    """Leave the namespace alone but for a notice."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        notice = f"{option_string} has {self.help}"
        setattr(namespace, _NOTICES, (*getattr(namespace, _NOTICES, ()), notice))


def _plain(option: str) -> str:
    """A flag's name with `-` and `_` made the same; anything else as it is."""
    return "--" + option[2:].replace("-", "_") if option.startswith("--") else option


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
fraction = real("a number from 0 to below 1", lambda number: 0 <= number < 1)
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


def folder_name(text: str) -> str:
    if not _is_text(text) or not text.strip(". ") or re.search(r"[/\\\0]", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a folder's name; see --runs_dir")
    return text
