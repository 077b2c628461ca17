"""Images to learn from: Omniglot, characters generated in its place, folders of images, and yours."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from datasets import folder, glyphs, omniglot
from datasets.images import OMNIGLOT, ImageSet, Normalisation, Pool, normalise
from utils.errors import UserError
from utils.signature import arguments

__all__ = [
    "DATASETS",
    "OMNIGLOT",
    "SPLITS",
    "ImageSet",
    "Normalisation",
    "Pool",
    "Source",
    "load_images",
    "normalise",
]

DATASETS: dict[str, Callable[..., ImageSet]] = {
    "omniglot": omniglot.load,
    "glyphs": glyphs.load,
    "folder": folder.load,
}
"""The registry: `load(split, root, cache_dir, *, option=default, ...)` by the name that `--dataset` takes.
Its docstring's first line and its options, see `utils.signature`, are its part of `--help`."""

SPLITS = ("background", "evaluation")

log = logging.getLogger("anml")


@dataclass(frozen=True)
class Source:
    """Where images come from.

    Attributes:
        dataset: its entry in `DATASETS`.
        root: folder of its files; not looked at by those that have none.
        cache_dir: gets one file for each set, which makes the next start quick.
        options: of its loader.
    """

    dataset: str
    root: Path
    cache_dir: Path
    options: Mapping[str, Any] = field(default_factory=dict)

    def load(self, split: str) -> ImageSet:
        """All images of `background` (meta-training) or `evaluation` (meta-test).

        Raises:
            UserError: they are missing, damaged or incomplete, or there is no such data set, split or
                option. No other data ever takes their place.
        """
        for kind, name, known in (("data set", self.dataset, DATASETS), ("split", split, SPLITS)):
            if name not in known:
                raise UserError(f"no {kind} {name!r}; choose one of {', '.join(known)}")
        loader = DATASETS[self.dataset]
        options = arguments(loader, skip=3)
        for name, value in self.options.items():
            fault = options[name].fault(value)
            if fault is not None:
                raise UserError(f"--{name} {value}: {fault}")
        try:
            return loader(split, Path(self.root), Path(self.cache_dir), **self.options)
        except ValueError as error:
            raise UserError(f"--dataset {self.dataset}: {error}") from error
        except OSError as error:
            reason = f"cannot read {error.filename}: {error.strerror}" if error.filename else error
            raise UserError(f"--dataset {self.dataset}: {reason}") from error


def load_images(source: Source, split: str, normalisation: Normalisation | None = None) -> ImageSet:
    """All images of a split, with what their pixels are normalised by; logs what they are.

    Args:
        split: `background` (meta-training) or `evaluation` (meta-test).
        normalisation: that of a model; None for the set's own or, where it has none, mean and standard
            deviation of the background split.

    Raises:
        UserError: as `Source.load`.
    """
    images = source.load(split)
    normalisation = normalisation or images.normalisation
    if normalisation is None:
        normalisation = (images if split == "background" else source.load("background")).statistics()
    smallest, largest = min(images.sizes), max(images.sizes)
    log.info(
        "%s: %d classes of %s %s images, manifest %s",
        images.name,
        len(images),
        largest if smallest == largest else f"{smallest} to {largest}",
        "grey" if images.images.shape[1] == 1 else "colour",
        images.manifest,
    )
    return replace(images, normalisation=normalisation)
