"""Reads a command line, a config file and the arguments of a run that is resumed into a dataclass.

A script's arguments are a subclass of `Flags`: each field is a flag, with default, reader and help.

A flag, and a key of a config file (TOML), can be spelled with `-` in place of `_`; `--no_reset` is
`reset = false`. Values of a config file and of a run that is resumed pass through the readers of the command
line. What is typed wins over a config file, and must not change the numbers of a run that is resumed.

A field with a `Registry` holds the arguments of one entry of a registry, say of the network that
`--treatment` names. The arguments of the chosen entry alone are flags. Each has a flag with the registry's
prefix (`--net_width`), and one without it (`--width`) unless the script, or a registry that is read before,
has a flag of that name.
"""

import argparse
import inspect
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from textwrap import indent
from typing import Any, NoReturn

from utils.errors import UserError
from utils.files import read_json, read_text
from utils.flag import REQUIRED, FlagInfo, Flags, FlagsT, Registry, declared, headed

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


METAVARS = {int: "N", float: "X", str: "TEXT", Path: "PATH"}
NOT_IN_CONFIG = {"config", "resume"}  # flags that stand in no config file


class Parser(argparse.ArgumentParser):
    """The parser of a script's arguments, all of whose flags are spelled with `_`.

    The help begins with the sentence and the example of the docstring of `kind`.

    Args:
        kind: the script's arguments.
        chosen: entry of each registry by the field that names it; without it the field's default, else the
            first.
        only: fields that are flags, beside which tokens may hold others; default all fields.

    Attributes:
        flags: by every name, those that may stand in a config file.
        places: field and argument of the flags that are arguments of registries' entries.
        chosen: registry and chosen entry by field.

    Raises:
        UserError: an argument of a chosen entry can be no flag.
    """

    def __init__(
        self, kind: type[Flags], chosen: Mapping[str, str] | None = None, only: Collection[str] | None = None
    ) -> None:
        about, _, example = (inspect.getdoc(kind) or "").partition("\n\n")
        super().__init__(
            usage=argparse.SUPPRESS,
            description=f"{about}\n\n{indent(example, '    ')}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            argument_default=argparse.SUPPRESS,
            allow_abbrev=False,
            add_help=only is None,
        )
        self.flags: dict[str, argparse.Action] = {}
        self.places: dict[str, tuple[str, str]] = {}
        self.chosen: dict[str, tuple[Registry, str]] = {}
        self._only = only
        parts = {name: made for name, made in declared(kind).items() if only is None or name in only}
        self._taken = {"help", *kind.no_effect, *(part.name for part in fields(kind))}
        registries = []
        for heading, names in headed(kind).items():
            group = self.add_argument_group(heading) if heading else self
            for name in filter(parts.__contains__, names):
                if isinstance(made := parts[name], Registry):
                    registries.append((group, name, made))
                else:
                    self._add(group, [name], made)
        if only is None and kind.no_effect:
            group = self.add_argument_group("flags of the released code, accepted without effect")
            for key, instead in kind.no_effect.items():
                text = f"no effect: {instead}"
                group.add_argument(f"--{key}", nargs="*", dest=f"*{key}", metavar="VALUE", help=text)
        for place, name, registry in registries:
            default = getattr(kind, registry.chooser, None) or next(iter(registry.table))
            self.chosen[name] = registry, str((chosen or {}).get(registry.chooser, default))
            self._add_arguments(place, name)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def _add_arguments(self, group: argparse._ActionsContainer, name: str) -> None:
        """Make flags of the arguments of the entry that is chosen for a field."""
        registry, entry = self.chosen[name]
        choosing = f"--{registry.chooser}"
        group.description = f"those of {choosing} {entry} among them; {choosing} NAME --help shows another's"
        found = registry.arguments(entry)
        for argument, made in found.items():
            full = f"{registry.prefix}_{argument}"
            if full in found or self._is_taken(full):
                raise UserError(f"{choosing} {entry}: --{full} is taken: rename its argument {argument!r}")
            spelled = [full] if self._is_taken(argument) else [argument, full]
            self.places[spelled[0]] = name, argument
            self._add(group, spelled, made)
        self._taken |= {argument for _, argument in registry.names()}

    def _is_taken(self, name: str) -> bool:
        return not {name, f"no_{name}"}.isdisjoint(self._taken)

    def _add(self, group: argparse._ActionsContainer, names: list[str], made: FlagInfo) -> None:
        """Make a flag, whose values are kept under the first of its names."""
        text = made.text
        if isinstance(made.words, Mapping):
            said = [(name, inspect.getdoc(entry)) for name, entry in made.words.items() if callable(entry)]
            lines = [f"{name}: {about.splitlines()[0].rstrip('.')}" for name, about in said if about]
            text = "; ".join([text, *lines])
        positional = made.default is REQUIRED and names[0] not in self.places
        if not positional:
            text += f" (default: {made.shown or _shown(made.default)})"
        options: dict[str, Any] = {"help": text.strip().replace("%", "%%")}
        if made.kind is bool:
            options["action"] = "store_true"
        else:
            metavar = (
                METAVARS.get(made.kind) if made.words is None else f"{{{','.join(map(str, made.words))}}}"
            )
            options |= {"type": made.read, "metavar": names[0].upper() if positional else metavar}
        if made.several:
            options |= {"nargs": "+", "action": "extend"}
        if positional:
            group.add_argument(names[0], **options)
            return
        action = group.add_argument(*(f"--{name}" for name in names), dest=names[0], **options)
        if made.kind is bool:
            opposite = [f"--no_{name}" for name in names]
            group.add_argument(*opposite, dest=names[0], action="store_false")
            self._taken |= {f"no_{name}" for name in names}
        self._taken |= set(names)
        self.flags |= dict.fromkeys({*names} - NOT_IN_CONFIG, action)

    def read(self, tokens: Sequence[str]) -> dict[str, Any]:
        """What tokens give, by field or argument; raises UserError where one is wrong."""
        found, unknown = self.parse_known_args(tokens)
        if unknown and self._only is None:
            _, fault = self._of_another(unknown[0].partition("=")[0].removeprefix("--"))
            raise UserError(fault or f"unrecognized arguments: {' '.join(unknown)}")
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
        tokens = []
        try:
            for key, value in settings.items():
                name = key.replace("-", "_")
                chooser, fault = self._of_another(name)
                if name in self.flags:
                    _check(name, self.flags[name], value)
                    tokens += as_tokens({name: value})
                elif self._only is None and chooser not in skip:
                    raise UserError(fault or f"unknown key {key!r}; --help lists the flags")
            return self.read(tokens) if tokens else {}
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    def filled(self, kind: type[FlagsT], given: Mapping[str, Any]) -> FlagsT:
        """Arguments of which some are given, the others at their defaults; raises UserError where one is
        missing."""
        found = {**kind.implied(given), **given}
        values: dict[str, Any] = {part.name: found[part.name] for part in fields(kind) if part.name in found}
        for name, (registry, entry) in self.chosen.items():
            values[name] = {key: made.default for key, made in registry.arguments(entry).items()}
        for key, (name, argument) in self.places.items():
            values[name][argument] = given.get(key, values[name][argument])
        flags = kind(**values, given=frozenset(given), places=self.places)
        idle = flags.idle()
        for key, (name, argument) in self.places.items():
            if name not in idle and values[name][argument] is REQUIRED:
                registry, entry = self.chosen[name]
                raise UserError(f"--{registry.chooser} {entry} needs --{key}")
        return flags

    def _of_another(self, key: str) -> tuple[str, str]:
        """The chooser of the registry that has an entry, not the chosen one, with this argument, and what is
        wrong with the argument; empty if there is none."""
        for registry, chosen in self.chosen.values():
            for entry, argument in registry.names():
                if key.removeprefix("no_") in (argument, f"{registry.prefix}_{argument}"):
                    choosing = f"--{registry.chooser}"
                    fault = (
                        f"--{key} means nothing with {choosing} {chosen}: it belongs to {choosing} {entry}"
                    )
                    return registry.chooser, fault
        return "", ""


def _shown(default: Any) -> str:
    """A default as the help gives it."""
    if default is REQUIRED:
        return "none, it must be given"
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, list | tuple):
        return " ".join(map(_shown, default))
    return "none" if default is None else f"{default:g}" if isinstance(default, float) else str(default)


def _underscored(token: str) -> str:
    """A token whose flag, if it is one, is spelled with `_`."""
    name, equals, value = token.partition("=")
    return (name[:2] + name[2:].replace("-", "_") if name.startswith("--") else name) + equals + value


def _check(name: str, action: argparse.Action, value: object) -> None:
    """Raise UserError where a setting is of a type that its flag cannot have."""
    if action.nargs == 0 and not isinstance(value, bool):
        raise UserError(f"--{name}: {value!r} is not true or false")
    items = value if isinstance(value, list) and value and action.nargs else [value]
    wrong = [item for item in items if type(item) not in (str, int, float)]
    if action.nargs != 0 and wrong:
        raise UserError(f"--{name}: {wrong[0]!r} is no number and no text")


def as_tokens(arguments: Mapping[str, Any]) -> list[str]:
    """What one would type for flags by name: True or False for a switch, a list for several values, None for
    a flag that is not given."""
    tokens = []
    for name, value in arguments.items():
        if isinstance(value, bool):
            tokens.append(f"--{name}" if value else f"--no_{name}")
        elif value is not None:
            values = value if isinstance(value, list | tuple) else [value]
            tokens += [f"--{name}={item}" for item in values]
    return tokens


def parse(kind: type[FlagsT], argv: Sequence[str] | None = None) -> FlagsT:
    """Read the command line (`argv`, default that of the process) and the config file it names.

    With `--resume`, arguments are those of the run, and what is given must agree with them but for
    the flags that may change.

    Raises:
        UserError: anything is wrong.
    """
    tokens = [_underscored(token) for token in (sys.argv[1:] if argv is None else argv)]
    for token in tokens:  # of `--flag=--` argparse drops the value before Python 3.12
        if token.endswith("=--"):
            raise UserError(f"argument {token[:-3]}: expected one argument")
    choosers = {made.chooser for made in declared(kind).values() if isinstance(made, Registry)}
    first = Parser(kind, only={"config", "resume", *choosers, *kind.deciding})
    typed = first.read(tokens)
    config, resume = typed.get("config"), typed.get("resume")
    of_config, of_run = Path(str(config)), Path(str(resume), "config.json")
    settings = {} if config is None else _settings_of_config(of_config)
    parts = {} if resume is None else read_config(resume)
    run, plan = (
        {key: value for key, value in parts.get(part, {}).items() if value not in (None, [])}
        for part in ("arguments", "plan")
    )
    earlier_config = run.pop("config", None)
    chosen = first.values(settings, of_config) | typed | first.values(run, of_run)
    parser = Parser(kind, {**kind.implied(chosen), **chosen})
    before = parser.values(run, of_run, choosers)
    typed = parser.read(tokens)
    given = parser.values(settings, of_config, choosers & typed.keys()) | typed
    idle = parser.filled(kind, before | given).idle()
    for key, value in [*given.items()]:
        if why := idle.get(parser.places.get(key, (key,))[0]):
            del given[key]
            # What a typed `--flag` or `--chooser NAME` makes idle in a config file is passed over.
            if key in typed or why.split()[0][2:] not in typed:
                raise UserError(f"{as_typed(key, value)} means nothing with {why}: drop one of them")
    if resume is not None:
        asked = parser.filled(kind, before)
        left_open = plan.keys() & parser.flags.keys() - before.keys() - asked.idle().keys()
        before |= parser.values({key: plan[key] for key in left_open}, of_run)
        _refuse_contradictions(parser, parser.filled(kind, before), resume, given)
        if config is None and isinstance(earlier_config, str):
            given["config"] = Path(earlier_config)
    flags = parser.filled(kind, before | given)
    flags.validate()
    return flags


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a run folder: a dict with the dicts `arguments` and `plan`.

    Raises:
        UserError: there is none, or it is not one that a run writes.
    """
    path = folder / "config.json"
    config = {"plan": {}, **read_json(path, f"{path}, so that {folder} is not a run folder")}
    if not (isinstance(config.get("arguments"), dict) and isinstance(config["plan"], dict)):
        raise UserError(f"{path} is damaged: it holds no arguments")
    return config


def _settings_of_config(path: Path) -> dict[str, Any]:
    """The settings that a TOML file holds."""
    try:
        return dict(tomllib.loads(read_text(path, f"--config {path}")))
    except ValueError as error:
        raise UserError(f"--config {path}: not a TOML file: {error}") from error


def _refuse_contradictions(parser: Parser, of_run: Flags, folder: Path, given: Mapping[str, Any]) -> None:
    """Raise UserError where what is given asks for another run than that of a folder."""
    earlier = recorded(of_run, absolute=True)
    compared = sorted(parser.flags.keys() & given.keys() - of_run.changeable())
    asked = [(key, plain(given[key], absolute=True)) for key in compared]
    contradictions = [
        f"--{key} is {value} and was {earlier[key]}" for key, value in asked if value != earlier[key]
    ]
    if contradictions:
        raise UserError(
            f"--resume {folder} goes on as it began: {'; '.join(contradictions)}; drop these flags, or "
            "start a new run without --resume"
        )
    place = Path(earlier.get("model_name") or "").parent
    if "model_name" not in given and not place.exists():  # a run that was moved would write there again
        raise UserError(
            f"--resume {folder}: its --model_name is {earlier['model_name']}, and there is no {place} (any "
            "more); give --model_name FILE as it is today"
        )


def recorded(flags: Flags, *, absolute: bool = False) -> dict[str, Any]:
    """What was asked for, by flag, None where nothing was, as plain values (JSON, and loadable with
    `weights_only=True`) to be stored.

    Args:
        absolute: make paths absolute, without links.
    """
    idle = flags.idle()
    found = {
        name: None if name in idle else getattr(flags, name)
        for name, made in declared(type(flags)).items()
        if isinstance(made, FlagInfo) and name != "resume"
    }
    for key, (name, argument) in flags.places.items():
        found[key] = None if name in idle else getattr(flags, name)[argument]
    return dict(plain(dict(sorted(found.items())), absolute))


def plain(value: object, absolute: bool = False) -> Any:
    """A value, such as what a plan decides, with paths as texts."""
    if isinstance(value, Mapping):
        return {key: plain(item, absolute) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, absolute) for item in value]
    if isinstance(value, Path):
        return str(value.resolve() if absolute else value)
    return value


def as_typed(name: str, value: object) -> str:
    """A setting as it is typed."""
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"
