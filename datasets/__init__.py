"""Images to learn from: Omniglot, characters generated in its place, folders of images, and yours."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from datasets import folder, glyphs, omniglot
from datasets.images import OMNIGLOT, SPLITS, ImageSet, Normalisation, Pool, normalise
from utils.errors import UserError

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

DATASETS: dict[str, Callable[..., ImageSet | Mapping[str, ImageSet]]] = {
    "omniglot": omniglot.load,
    "glyphs": glyphs.load,
    "folder": folder.load,
}
"""The registry: `load(split, root, cache_dir, *, option=default, ...)` by the name that `--dataset` takes.

A loader returns the images of a split, or of both by split where it reads both at once. The first line of its
docstring and its options, see `datasets.options`, are its part of `--help`.
"""

log = logging.getLogger("anml")


@dataclass(frozen=True)
class Source:
    """A data set as the flags name it. It keeps the images that it has loaded.

    Attributes:
        dataset: a key of `DATASETS`.
        root: folder of the data set's files; not looked at by data sets without files.
        cache_dir: gets one file for each set, which makes the next start quick.
        options: keyword arguments of the data set's loader.
    """

    dataset: str
    root: Path
    cache_dir: Path
    options: Mapping[str, Any] = field(default_factory=dict)
    loaded: dict[str, ImageSet] = field(default_factory=dict, init=False, repr=False, compare=False)

    def load(self, split: str) -> ImageSet:
        """All images of `background` (meta-training) or `evaluation` (meta-test).

        Raises:
            UserError: the images are missing, damaged or incomplete, or there is no such data set or split.
                No other data ever takes their place.
        """
        for kind, name, known in (("data set", self.dataset, DATASETS), ("split", split, SPLITS)):
            if name not in known:
                raise UserError(f"no {kind} {name!r}; choose one of {', '.join(known)}")
        if split not in self.loaded:
            try:
                found = DATASETS[self.dataset](split, Path(self.root), Path(self.cache_dir), **self.options)
            except ValueError as error:
                raise UserError(f"--dataset {self.dataset}: {error}") from error
            except OSError as error:
                reason = f"cannot read {error.filename}: {error.strerror}" if error.filename else error
                raise UserError(f"--dataset {self.dataset}: {reason}") from error
            self.loaded.update({split: found} if isinstance(found, ImageSet) else found)
        return self.loaded[split]


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
        "%s: %d classes of %s %s images, data hash %s",
        images.name,
        len(images),
        largest if smallest == largest else f"{smallest} to {largest}",
        "grey" if images.images.shape[1] == 1 else "colour",
        images.data_hash,
    )
    return replace(images, normalisation=normalisation)
