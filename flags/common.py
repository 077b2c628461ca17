"""Flags that several scripts have: network, data, run. Released ones have their released spelling."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from datasets import DATASETS, Source
from datasets.options import loader_options
from model.fast import BACKENDS
from model.modelfactory import NETWORKS, constructor_arguments
from utils.command_line import (
    SEED,
    Flags,
    choice,
    device_name,
    file_path,
    finite,
    flag,
    flags_of,
    folder_name,
    switch,
    whole,
)
from utils.errors import UserError

PLACES = ("dataset_path", "cache_dir", "runs_dir", "name")  # of a run, which may be moved and renamed

ALIASES = {"neuromodulation": "ANML"}  # the released code's name

WIDTHS = {
    "nm_channels": "channels of each convolution of ANML's neuromodulatory network",
    "pln_channels": "channels of each convolution of the prediction network",
    "num_classes": "outputs of the head, no fewer than classes to train on or to learn in a meta-test",
    "hidden": "outputs of OML's first linear layer",
}
"""What the arguments of the published networks mean."""

NO_COMMIT = {"commit": "nothing is committed; the run folder records the current git commit"}


def treatment_flag(default: str | None) -> Any:
    """The field of `--treatment`."""
    return flag(
        default,
        _known_treatment,
        "network: ANML (the released code's name for it is Neuromodulation), or another of the registry",
        shown=default or "ANML",
        metavar=lambda: f"{{{','.join(_networks())}}}",
    )


def _known_treatment(text: str) -> str:
    by_name = {name.lower(): name for name in NETWORKS} | ALIASES
    if text.lower() not in by_name:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(_networks())}")
    return by_name[text.lower()]


def _networks() -> list[str]:
    """All names that `--treatment` takes."""
    return [*NETWORKS, *(name.capitalize() for name in ALIASES)]


def _width_flags() -> dict[str, Any]:
    """A flag for each argument of each network's constructor."""
    takers: dict[str, dict[str, tuple[type, Any]]] = {}
    for network, kind in NETWORKS.items():
        for name, argument in constructor_arguments(kind).items():
            takers.setdefault(name, {})[network] = argument
    made = {}
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
            made[name] = switch(None, text, shown=shown)
        else:
            read = finite if kind_of_value is float else whole(1 if name in WIDTHS else 0)
            made[name] = flag(None, read, text, shown=shown)
    return made


def _spelled_default(value: object) -> str:
    if value is inspect.Parameter.empty:
        return "none, it must be given"
    if isinstance(value, bool):
        return "on" if value else "off"
    return "set by the others" if value is None else str(value)


@dataclass(kw_only=True)
class NetworkFlags(Flags):
    """The shape of a new network.

    Attributes:
        widths: keyword arguments of its class; those of other networks are taken away by the check.
    """

    group = "network"

    widths: dict[str, Any] = flags_of(_width_flags)

    def fill_in_widths(self, network: str) -> None:
        """Give the widths of a network their defaults, and take those away that it does not have.

        Raises:
            UserError: one without a default is missing.
        """
        found = {}
        for name, (_, default) in constructor_arguments(NETWORKS[network]).items():
            value = self.widths.get(name, default)
            if value is inspect.Parameter.empty:
                raise UserError(f"--treatment {network} needs --{name}")
            if value is not None:
                found[name] = value
        self.widths = found


def default_model_name(network: str) -> str:
    """The model file that a network's training writes by default."""
    return NETWORKS[network].model_name or f"{network}_Model.net"


def train_classes_flag(text: str) -> Any:
    """The field of `--train_classes`."""
    return flag(None, whole(1), f"{text}, the first of the data", shown="all; 963 of Omniglot's 964")


def test_classes_flag(text: str) -> Any:
    """The field of `--test_classes`."""
    return flag(None, whole(1), f"{text}, the first of the data", shown="all; 650 of Omniglot's 659")


@dataclass(kw_only=True)
class SplitFlags(Flags):
    """The images of each class that a meta-test learns, and those that it tests."""

    group = "images of a class"

    train_images: int = flag(15, whole(1), "images of each class to learn")
    test_images: int = flag(5, whole(1), "images of each class to test, none of those learned")
    split: Literal["random", "dataset"] = choice(
        "random",
        ("random", "dataset"),
        "which images of a class these are: drawn for each run, or the first and the last of the data",
    )


def _loader_flags() -> dict[str, Any]:
    """A flag for each option of each data set's loader."""
    made: dict[str, Any] = {}
    for dataset, loader in DATASETS.items():
        for name, (kind, default, (text, low, high)) in loader_options(loader).items():
            text = f"{text} (with --dataset {dataset})"
            if kind is bool:
                made[name] = switch(default, text)
            else:
                read: Callable[[str], object] = (
                    whole(low, high) if kind is int else finite if kind is float else str
                )
                made[name] = flag(default, read, text)
    return made


@dataclass(kw_only=True)
class DataFlags(Flags):
    """Where the images are.

    Attributes:
        options: of all loaders of data sets.
    """

    group = "data"

    dataset: str = choice(
        "omniglot",
        lambda: tuple(DATASETS),
        lambda: "; ".join(f"{name}: {_first_line(loader)}" for name, loader in DATASETS.items()),
    )
    dataset_path: Path = flag(
        Path("data"),
        file_path,
        "folder of the images; of Omniglot, that holds its zips or folders or that they are downloaded to",
        name="--dataset-path",
        metavar="DIR",
    )
    cache_dir: Path = flag(Path("data/cache"), file_path, "folder for the decoded images", metavar="DIR")
    options: dict[str, Any] = flags_of(_loader_flags)

    def source(self) -> Source:
        """The images that these flags name."""
        options = {name: self.options.get(name) for name in loader_options(DATASETS[self.dataset])}
        return Source(self.dataset, self.dataset_path, self.cache_dir, options)

    def notice_other_data(self) -> None:
        """Tell the user of flags that belong to another data set."""
        own = loader_options(DATASETS[self.dataset])
        for dataset, loader in DATASETS.items():
            for name, option in loader_options(loader).items():
                if name not in own and self.options.get(name) != option.default:
                    self.notice(f"--{name} has no effect: it is of --dataset {dataset}, not {self.dataset}")


def _first_line(loader: Callable[..., object]) -> str:
    return (loader.__doc__ or loader.__module__).strip().splitlines()[0].rstrip(".")


def name_flag(default: str) -> Any:
    """The field of `--name`."""
    return flag(default, folder_name, "name of the run folder, which a number is added to")


def seed_flag(default: int) -> Any:
    """The field of `--seed`."""
    return flag(default, SEED, "seed of all random draws, 0 to 2**32-1")


@dataclass(kw_only=True)
class RunFlags(Flags):
    """Where a run is recorded, and what it runs on. Each script has a name and a seed of its own."""

    group = "run"

    name: str = name_flag("run")
    runs_dir: Path = flag(Path("runs"), file_path, "folder of run folders", metavar="DIR")
    seed: int = seed_flag(0)
    device: str = flag("auto", device_name, "auto (the best available), cpu, cuda, cuda:N or mps")
    threads: int | None = flag(None, whole(1), "CPU threads", shown="torch's choice")
    backend: str = choice(
        "auto",
        BACKENDS,
        "layers of the networks: plain torch, fast ones with the same numbers up to rounding, or auto: "
        "fast on the CPU and on CUDA, plain elsewhere",
    )
    config: Path | None = flag(
        None,
        file_path,
        "TOML file of flags, which flags typed here override",
        in_config=False,
        metavar="FILE",
    )


def processes_flag(work: str) -> Any:
    """The field of `--processes`."""
    return flag(
        1,
        whole(1),
        f"processes on this machine, each with its part of the threads or a GPU of its own, for {work}; "
        "under torchrun there are as many as it starts",
        metavar="N",
    )


@dataclass(kw_only=True)
class ReportFlags(Flags):
    """How often a training says and saves where it is."""

    group = "checks on the way"

    log_every: int = flag(50, whole(1), "steps between lines of the log")
    save_every: int = flag(
        1000,
        whole(1),
        "steps between writes of --model_name and of the training state that --resume goes on from, "
        "which the last step always writes",
    )


def resume_flag(may_change: frozenset[str]) -> Any:
    """The field of a training's `--resume`."""
    return flag(
        None,
        file_path,
        "run folder of an interrupted run, to go on from its last training state with its own "
        "arguments: on the CPU with the same --threads, to the same weights bit for bit. Of other "
        f"flags only these may change: {', '.join(f'--{name}' for name in sorted(may_change))}",
        in_config=False,
        metavar="RUN",
    )
