"""Flags that several scripts have: network, data, run. Released ones have their released spelling."""

from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from datasets import DATASETS, WITHOUT_FILES, Source
from datasets.images import SIZE, SIZES
from model.fast import BACKENDS
from model.modelfactory import NETWORKS, Network
from utils.errors import UserError
from utils.flag import SEED, Flags, Heading, Range, Registry, Shown, existing, folder_name, word

PLACES = ("dataset_path", "cache_dir", "runs_dir", "name")  # of a run, which may be moved and renamed

BACKEND_CHOICES = ("auto", *BACKENDS)
Name = Annotated[str, "name of the run folder, which a number is added to", folder_name]
Seed = Annotated[int, "seed of all random draws, 0 to 2**32-1", SEED]
Processes = Annotated[
    int,
    "processes on this machine that share the work, each with its part of the threads or a GPU of its own; "
    "under torchrun there are as many as it starts",
    Range(1),
]
NO_COMMIT = {"commit": "nothing is committed; the run folder records the current git commit"}


class NetworkFlags(Flags):
    """The shape of a new network.

    Attributes:
        constructor: arguments of its class.
    """

    _network: ClassVar = Heading("network")
    treatment: Annotated[
        str, "network (Neuromodulation: ANML)", NETWORKS, word(NETWORKS, {"Neuromodulation": "ANML"})
    ] = "ANML"
    constructor: Annotated[dict[str, Any], Registry("treatment", NETWORKS, "net")] = field(
        default_factory=dict
    )


class SplitFlags(Flags):
    """The classes of a meta-test, and the images of each class that it learns and tests."""

    _images: ClassVar = Heading("classes and their images")
    test_classes: Annotated[
        int | None,
        "meta-test classes in use, the first of the data",
        Range(1),
        Shown("650 of Omniglot, else all"),
    ] = None
    train_images: Annotated[int, "images of each class to learn", Range(1)] = 15
    test_images: Annotated[int, "images of each class to test, none of those learned", Range(1)] = 5
    split: Annotated[
        Literal["random", "dataset"], "which images of a class: drawn for each run, or the first and the last"
    ] = "random"


class DataFlags(Flags):
    """Where the images are.

    Attributes:
        options: of the data set's loader.
    """

    _data: ClassVar = Heading("data")
    dataset: Annotated[str, "images to learn from", DATASETS] = "omniglot"
    dataset_path: Annotated[
        Path, "folder of the images; that of Omniglot holds its zips or folders, or gets them", existing
    ] = Path("data")
    cache_dir: Annotated[Path, "folder for the decoded images"] = Path("data/cache")
    size: Annotated[
        int | None, "side of the images in pixels", Range(*SIZES), Shown(f"that of the model, else {SIZE}")
    ] = None
    options: Annotated[dict[str, Any], Registry("dataset", DATASETS, "data")] = field(default_factory=dict)

    def idle(self) -> Mapping[str, str]:
        without = self.dataset in WITHOUT_FILES
        return {"dataset_path": f"--dataset {self.dataset}"} if without else {}

    @classmethod
    def implied(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        folder = existing("data")
        return {"dataset_path": folder, "cache_dir": folder / "cache"}

    def source(self, net: Network) -> Source:
        """The images that these flags name, in the size that a network takes.

        Raises:
            UserError: `--size` is another size.
        """
        size = net.image_size
        if self.size not in (None, size):
            raise UserError(f"--size {self.size}: the model takes images of {size} x {size}: drop the flag")
        return Source(self.dataset, self.dataset_path, self.cache_dir, self.options, size)


class RunFlags(Flags):
    """Where a run is recorded, and what it runs on. Each script has a name and a seed of its own."""

    _run: ClassVar = Heading("run")
    runs_dir: Annotated[Path, "folder of run folders"] = Path("runs")
    device: Annotated[str, "auto (the best available), cpu, cuda, cuda:N or mps", str.lower] = "auto"
    threads: Annotated[int | None, "CPU threads", Range(1), Shown("torch's choice")] = None
    backend: Annotated[
        str,
        "plain layers, fast ones with the same numbers up to rounding, or auto: fast on CPU and CUDA",
        BACKEND_CHOICES,
    ] = "auto"
    config: Annotated[Path | None, "TOML file of flags, which flags typed here override", existing] = None
