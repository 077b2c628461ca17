"""Reads a command line, a config file and the arguments of a run that is resumed.

`-` and `_` may stand for each other in a flag's name. A config file (TOML) holds flags under their
destination's name (`--dataset-path` is `dataset_path`, `--no-reset` is `reset = false`) and passes through
the same parser as the command line, ahead of it: so both have the same ranges, and what is typed wins. So do
the arguments of a run that is resumed; there, what is typed must not change its numbers.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from utils.errors import UserError, try_to_write
from utils.files import expand, place_of, read_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_NOT_GIVEN = object()


_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
}


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
    """An argument parser that knows its flags by destination."""

    def __init__(self, description: str, check: Callable[[Parser, argparse.Namespace], None]):
        super().__init__(description=description, allow_abbrev=False, exit_on_error=False)
        self.flags: dict[str, argparse.Action] = {}
        self.check = check
        self.may_change: frozenset[str] = frozenset()  # flags that `--resume` takes other values of
        self._spellings: dict[str, str] = {}
        self.set_defaults(notices=(), config=None)

    def flag(
        self,
        group: argparse._ArgumentGroup,
        name: str,
        kind: Callable[[str], object],
        default: object,
        text: str,
        *,
        shown: str = "%(default)s",
        **options: Any,
    ) -> None:
        """Add a flag with a value; `shown` is the default as the help gives it."""
        text = f"{text} (default: {shown})"
        try:
            action = group.add_argument(name, type=kind, default=default, help=text, **options)
        except argparse.ArgumentError as error:  # of a network or data set of the user's
            self.error(f"two arguments of networks and data sets are called {name}: {error.message}")
        self._register(action, config=True)

    def switch(self, group: argparse._ArgumentGroup, name: str, text: str, *, default: bool = False) -> None:
        """Add the pair `--name` and `--no-name`."""
        action = group.add_argument(name, action=argparse.BooleanOptionalAction, default=default)
        action.help = f"{text} (default: {'on' if default else 'off'})"
        self._register(action, config=True)

    def without_effect(self, group: argparse._ArgumentGroup, name: str, instead: str) -> None:
        """Accept a released flag, with or without values, and tell the user what to do instead."""
        action = group.add_argument(
            name,
            action=_WithoutEffect,
            nargs="*",
            dest=argparse.SUPPRESS,
            default=argparse.SUPPRESS,
            metavar="VALUE",
            help=f"no effect: {instead}",
        )
        self._register(action, config=False)

    def _register(self, action: argparse.Action, config: bool) -> None:
        if config:
            self.flags[action.dest] = action
        self._spellings |= {_plain(option): option for option in action.option_strings}

    def canonical(self, token: str) -> str:
        """The token with its flag, if it is one, in the registered spelling."""
        name, equals, value = token.partition("=")
        return self._spellings.get(_plain(name), name) + equals + value

    def read(self, tokens: list[str]) -> argparse.Namespace:
        """Parse canonical tokens; a wrong one ends the process as :meth:`error` does."""
        try:
            return self.parse_args(tokens)
        except argparse.ArgumentError as error:
            self.error(str(error))


def parse(parser: Parser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line (`argv`, default that of the process) and the config file it names.

    The namespace's `notices` are lines for the user about flags typed without effect. Anything
    wrong ends the process with exit code 2 and one line on stderr.

    With `--resume`, arguments are those of the run, and what is given must agree with them but for
    the flags of `parser.may_change`.
    """
    tokens = [parser.canonical(token) for token in (sys.argv[1:] if argv is None else argv)]
    arguments = parser.read(tokens)
    config, resume = arguments.config, getattr(arguments, "resume", None)
    if config is not None:
        tokens = [*_config_tokens(parser, config), *tokens]
    if resume is not None:
        settings = _settings_of_run(parser, resume)
        earlier_config = settings.pop("config", None)
        config = config or earlier_config
        before = _tokens(parser, settings, resume / "config.json")
        _refuse_contradictions(parser, resume, before, tokens)
        tokens = [*before, *tokens]
    arguments = parser.read(tokens)
    arguments.config = config
    parser.check(parser, arguments)
    return arguments


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


def _refuse_contradictions(parser: Parser, folder: Path, before: list[str], tokens: list[str]) -> None:
    """End the process if `tokens` ask for another run than that of the tokens `before`."""
    of_run = parser.read(before)
    given = parser.parse_args(
        tokens, argparse.Namespace(notices=(), **dict.fromkeys(parser.flags, _NOT_GIVEN))
    )
    # Of episodes it is also the length of the schedule, which makes their numbers.
    fixed = ("steps",) if getattr(of_run, "learner", None) == "prototypes" else ()
    contradictions = [
        f"{parser.flags[key].option_strings[0]} is {value} and was {getattr(of_run, key)}"
        for key, value in vars(given).items()
        if key in parser.flags and (key not in parser.may_change or key in fixed)
        if value is not _NOT_GIVEN and value != getattr(of_run, key)
    ]
    if contradictions:
        parser.error(
            f"--resume {folder} goes on as it began: {'; '.join(contradictions)}; drop these flags, or "
            "start a new run without --resume"
        )
    _refuse_lost_places(parser, folder, of_run, given)


def _refuse_lost_places(
    parser: Parser, folder: Path, of_run: argparse.Namespace, given: argparse.Namespace
) -> None:
    """End the process if a model that the run reads, or the folder of the one it writes, is gone."""
    places = [("model", path, path) for path in getattr(of_run, "model", None) or ()]
    written = getattr(of_run, "model_name", None)
    if written is not None:
        places.append(("model_name", written, written.parent))
    for key, path, place in places:
        if getattr(given, key) is _NOT_GIVEN and not os.access(place, os.F_OK):
            parser.error(
                f"--resume {folder}: its --{key} is {path}, and there is no {place} (any more); give "
                f"--{key} FILE as it is today"
            )


def recorded(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments as plain values (JSON, and loadable with `weights_only=True`), to be stored."""

    def plain(value: object) -> object:
        if isinstance(value, list):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    left_out = ("notices", "resume")
    return {key: plain(value) for key, value in sorted(vars(arguments).items()) if key not in left_out}


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
            parsed = getattr(parser.parse_args(spelled), key)
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
        namespace.notices = (*namespace.notices, notice)


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


def device(text: str) -> str:
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


def no_check(parser: Parser, arguments: argparse.Namespace) -> None:
    """Nothing contradicts."""
