"""Flags that several scripts have: network, data, run. Released ones have their released spelling."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import DATASETS, Source
from datasets.options import loader_options
from model.fast import BACKENDS
from model.modelfactory import NETWORKS, constructor_arguments
from utils.command_line import SEED, Parser, device, file_path, finite, folder_name, whole

PLACES = ("dataset_path", "cache_dir", "runs_dir", "name")  # of a run, which may be moved and renamed


ALIASES = {"neuromodulation": "ANML"}  # the released code's name


WIDTHS = {
    "nm_channels": "channels of each convolution of ANML's neuromodulatory network",
    "pln_channels": "channels of each convolution of the prediction network",
    "num_classes": "outputs of the head, no fewer than classes to train on or to learn in a meta-test",
    "hidden": "outputs of OML's first linear layer",
}
"""What the arguments of the published networks mean."""


def add_treatment(parser: Parser, group: argparse._ArgumentGroup, default: object) -> None:
    parser.flag(
        group,
        "--treatment",
        _known_treatment,
        default,
        "network: ANML (the released code's name for it is Neuromodulation), or another of the registry",
        shown=str(default or "ANML"),
        metavar=f"{{{','.join(_networks())}}}",
    )


def _networks() -> list[str]:
    """All names that `--treatment` takes."""
    return [*NETWORKS, *(name.capitalize() for name in ALIASES)]


def default_model_name(network: str) -> str:
    """The model file that a network's training writes by default."""
    return NETWORKS[network].model_name or f"{network}_Model.net"


def add_widths(parser: Parser, group: argparse._ArgumentGroup) -> None:
    """A flag for each argument of each network's constructor; None where it is not given."""
    takers: dict[str, dict[str, tuple[type, Any]]] = {}
    for network, kind in NETWORKS.items():
        for name, argument in constructor_arguments(kind).items():
            takers.setdefault(name, {})[network] = argument
    for name, arguments in takers.items():
        defaults: dict[Any, list[str]] = {}
        for network, (_, default) in arguments.items():
            defaults.setdefault(default, []).append(network)
        shown = ", ".join(
            _spelled_default(value) + (f" for {' and '.join(names)}" if len(defaults) > 1 else "")
            for value, names in defaults.items()
        )
        text = WIDTHS.get(name, f"of {' and '.join(arguments)}")
        kind_of_value = next(iter(arguments.values()))[0]
        if kind_of_value is bool:
            parser.switch(group, f"--{name}", text)
            parser.set_defaults(**{name: None})
        else:
            read = finite if kind_of_value is float else whole(1 if name in WIDTHS else 0)
            parser.flag(group, f"--{name}", read, None, text, shown=shown)


def _spelled_default(value: object) -> str:
    if value is inspect.Parameter.empty:
        return "none, it must be given"
    return "set by the others" if value is None else str(value)


def fill_in_widths(parser: Parser, arguments: argparse.Namespace) -> None:
    """Give the flags of the network its defaults, and take those away that it does not have."""
    own = constructor_arguments(NETWORKS[arguments.treatment])
    for name, (_, default) in own.items():
        if getattr(arguments, name) is None:
            if default is inspect.Parameter.empty:
                parser.error(f"--treatment {arguments.treatment} needs --{name}")
            setattr(arguments, name, default)
    for name in all_widths() - own.keys():
        setattr(arguments, name, None)


def all_widths() -> set[str]:
    """Names of the constructors' arguments of all networks."""
    return {name for kind in NETWORKS.values() for name in constructor_arguments(kind)}


def add_train_classes(parser: Parser, group: argparse._ArgumentGroup, text: str) -> None:
    shown = "all; 963 of Omniglot's 964"
    parser.flag(group, "--train_classes", whole(1), None, f"{text}, the first of the data", shown=shown)


def add_test_classes(parser: Parser, group: argparse._ArgumentGroup, text: str) -> None:
    shown = "all; 650 of Omniglot's 659"
    parser.flag(group, "--test_classes", whole(1), None, f"{text}, the first of the data", shown=shown)


def add_split(parser: Parser, group: argparse._ArgumentGroup) -> None:
    parser.flag(group, "--train_images", whole(1), 15, "images of each class to learn")
    parser.flag(group, "--test_images", whole(1), 5, "images of each class to test, none of those learned")
    parser.flag(
        group,
        "--split",
        str.lower,
        "random",
        "which images of a class these are: drawn for each run, or the first and the last of the data",
        choices=("random", "dataset"),
    )


def add_data(parser: Parser) -> None:
    group = parser.add_argument_group("data")
    parser.flag(
        group,
        "--dataset",
        str.lower,
        "omniglot",
        "; ".join(f"{name}: {_first_line(loader)}" for name, loader in DATASETS.items()),
        choices=tuple(DATASETS),
    )
    parser.flag(
        group,
        "--dataset-path",
        file_path,
        Path("data"),
        "folder of the images; of Omniglot, that holds its zips or folders or that they are downloaded to",
        metavar="DIR",
    )
    parser.flag(
        group,
        "--cache_dir",
        file_path,
        Path("data/cache"),
        "folder for the decoded images",
        metavar="DIR",
    )
    for dataset, loader in DATASETS.items():
        for name, (kind, default, (text, low, high)) in loader_options(loader).items():
            text = f"{text} (with --dataset {dataset})".replace("%", "%%")
            if kind is bool:
                parser.switch(group, f"--{name}", text, default=default)
            else:
                read: Callable[[str], object] = (
                    whole(low, high) if kind is int else finite if kind is float else str
                )
                shown = "none" if default is None else str(default)
                parser.flag(group, f"--{name}", read, default, text, shown=shown)


def _first_line(loader: Callable[..., object]) -> str:
    line = (loader.__doc__ or loader.__module__).strip().splitlines()[0].rstrip(".")
    return line.replace("%", "%%")  # argparse fills in what follows one


def data_source(arguments: argparse.Namespace) -> Source:
    """Where the images are, from the data flags."""
    options = {name: getattr(arguments, name) for name in loader_options(DATASETS[arguments.dataset])}
    return Source(arguments.dataset, arguments.dataset_path, arguments.cache_dir, options)


def notice_other_data(arguments: argparse.Namespace) -> None:
    """Tell the user of data flags that belong to another data set."""
    own = loader_options(DATASETS[arguments.dataset])
    for dataset, loader in DATASETS.items():
        for name, flag in loader_options(loader).items():
            if name not in own and getattr(arguments, name) != flag.default:
                notice = f"--{name} has no effect: it is of --dataset {dataset}, not {arguments.dataset}"
                arguments.notices = (*arguments.notices, notice)


def add_run(parser: Parser, name: str, seed: int) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("run")
    parser.flag(group, "--name", folder_name, name, "name of the run folder, which a number is added to")
    parser.flag(group, "--runs_dir", file_path, Path("runs"), "folder of run folders", metavar="DIR")
    parser.flag(group, "--seed", SEED, seed, "seed of all random draws, 0 to 2**32-1")
    parser.flag(
        group,
        "--device",
        device,
        "auto",
        "auto (the best available), cpu, cuda, cuda:N or mps",
    )
    parser.flag(group, "--threads", whole(1), None, "CPU threads", shown="torch's choice")
    parser.flag(
        group,
        "--backend",
        str.lower,
        "auto",
        "layers of the networks: plain torch, fast ones with the same numbers up to rounding, or auto: "
        "fast on the CPU and on CUDA, plain elsewhere",
        choices=BACKENDS,
    )
    group.add_argument(
        "--config",
        type=file_path,
        metavar="FILE",
        help="TOML file of flags, which flags typed here override (default: none)",
    )
    return group


def add_processes(parser: Parser, group: argparse._ArgumentGroup, work: str) -> None:
    parser.flag(
        group,
        "--processes",
        whole(1),
        1,
        f"processes on this machine, each with its part of the threads or a GPU of its own, for {work}; "
        "under torchrun there are as many as it starts",
        metavar="N",
    )


def add_reports(parser: Parser, group: argparse._ArgumentGroup) -> None:
    parser.flag(group, "--log_every", whole(1), 50, "steps between lines of the log")
    parser.flag(
        group,
        "--save_every",
        whole(1),
        1000,
        "steps between writes of --model_name and of the training state that --resume goes on from, "
        "which the last step always writes",
    )


def add_resume(parser: Parser, group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--resume",
        type=file_path,
        metavar="RUN",
        help="run folder of an interrupted run, to go on from its last training state with its own "
        "arguments: on the CPU with the same --threads, to the same weights bit for bit. Of other "
        "flags only these may change: "
        + ", ".join(f"--{name}" for name in sorted(parser.may_change))
        + " (default: none)",
    )


def add_commit(parser: Parser, group: argparse._ArgumentGroup) -> None:
    parser.without_effect(
        group, "--commit", "nothing is committed; the run folder records the current git commit"
    )


def _known_treatment(text: str) -> str:
    by_name = {name.lower(): name for name in NETWORKS} | ALIASES
    if text.lower() not in by_name:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(_networks())}")
    return by_name[text.lower()]
