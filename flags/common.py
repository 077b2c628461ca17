"""Flags that several scripts have: network, data, run. Released ones have their released spelling."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from datasets import DATASETS, WITHOUT_FILES, Source
from datasets.images import SIZE, SIZES
from model.fast import BACKENDS
from model.modelfactory import NETWORKS, Network
from utils.errors import UserError
from utils.flag import (
    PROJECT,
    Flags,
    Heading,
    arguments_of,
    choice,
    existing,
    file_path,
    flag,
    in_project,
    whole,
)

PLACES = ("dataset_path", "cache_dir", "runs_dir", "name")  # of a run, which may be moved and renamed

NAME = "name of the run folder, which a number is added to"
SEEDED = "seed of all random draws, 0 to 2**32-1"
PROCESSES = (
    "processes on this machine that share the work, each with its part of the threads or a GPU of its own; "
    "under torchrun there are as many as it starts"
)
NO_COMMIT = {"commit": "nothing is committed; the run folder records the current git commit"}


class NetworkFlags(Flags):
    """The shape of a new network.

    Attributes:
        constructor: arguments of its class.
    """

    _network: ClassVar = Heading("network")
    treatment: str = choice(
        "ANML", NETWORKS, "network (Neuromodulation: ANML)", aliases={"Neuromodulation": "ANML"}
    )
    constructor: dict[str, Any] = arguments_of("treatment", NETWORKS, "net")


class SplitFlags(Flags):
    """The classes of a meta-test, and the images of each class that it learns and tests."""

    _images: ClassVar = Heading("classes and their images")
    test_classes: int | None = flag(
        None,
        whole(1),
        "meta-test classes in use, the first of the data",
        shown="650 of Omniglot, else all",
    )
    train_images: int = flag(15, whole(1), "images of each class to learn")
    test_images: int = flag(5, whole(1), "images of each class to test, none of those learned")
    split: Literal["random", "dataset"] = choice(
        "random",
        ("random", "dataset"),
        "which images of a class these are: drawn for each run, or the first and the last of the data",
    )


class DataFlags(Flags):
    """Where the images are.

    Attributes:
        options: of the data set's loader.
    """

    _data: ClassVar = Heading("data")
    dataset: str = choice("omniglot", DATASETS, "images to learn from")
    dataset_path: Path = flag(
        Path("data"),
        file_path,
        "folder of the images; of Omniglot, that holds its zips or folders or that they are downloaded to",
        metavar="DIR",
    )
    cache_dir: Path = flag(Path("data/cache"), file_path, "folder for the decoded images", metavar="DIR")
    size: int | None = flag(
        None, whole(*SIZES), "side of the images in pixels", shown=f"that of the model, else {SIZE}"
    )
    options: dict[str, Any] = arguments_of("dataset", DATASETS, "data")

    def idle(self) -> Mapping[str, str]:
        without = self.dataset in WITHOUT_FILES
        return {"dataset_path": f"--dataset {self.dataset}"} if without else {}

    def source(self, net: Network) -> Source:
        """The images that these flags name, in the size that a network takes; from another folder those of
        the project, if it has some.

        Raises:
            UserError: `--size` is another size.
        """
        size = net.image_size
        if self.size not in (None, size):
            raise UserError(f"--size {self.size}: the model takes images of {size} x {size}: drop the flag")
        root = in_project(self.dataset_path)
        cache = self.cache_dir if root == self.dataset_path else PROJECT / self.cache_dir
        return Source(self.dataset, root, cache, self.options, size)


class RunFlags(Flags):
    """Where a run is recorded, and what it runs on. Each script has a name and a seed of its own."""

    _run: ClassVar = Heading("run")
    runs_dir: Path = flag(Path("runs"), file_path, "folder of run folders", metavar="DIR")
    device: str = flag("auto", str.lower, "auto (the best available), cpu, cuda, cuda:N or mps")
    threads: int | None = flag(None, whole(1), "CPU threads", shown="torch's choice")
    backend: str = choice(
        "auto",
        ("auto", *BACKENDS),
        "layers of the networks: plain torch, fast ones with the same numbers up to rounding, or auto: "
        "fast on the CPU and on CUDA, plain elsewhere",
    )
    config: Path | None = flag(
        None, existing, "TOML file of flags, which flags typed here override", metavar="FILE"
    )
