"""Images to learn from: Omniglot, generated characters in its place, fonts, folders of images, and yours."""

import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from datasets import folder, fonts, glyphs, omniglot
from datasets.images import SIZE, ImageSet, Normalisation
from utils.errors import UserError, reason

DATASETS: dict[str, Callable[..., ImageSet | Mapping[str, ImageSet]]] = {
    "omniglot": omniglot.load,
    "glyphs": glyphs.load,
    "folder": folder.load,
    "fonts": fonts.load,
}
"""The registry, by the name that `--dataset` takes: `load(split, root, cache_dir, size, *, option=default)`.

A loader returns the images of a split, or of both by split where it reads both at once. `size` is the side of
the images in pixels; a loader whose images have a size of their own may do without. The first line of a
loader's docstring and its options, see `utils.flag`, are its part of `--help`.
"""

WITHOUT_FILES = {"glyphs"}
"""Names of data sets for which `--dataset_path` means nothing."""

log = logging.getLogger("anml")


@dataclass(frozen=True)
class Source:
    """A data set as the flags name it. It reads each file once, however often its images are loaded.

    Attributes:
        dataset: a key of `DATASETS`.
        root: folder of the data set's files; not looked at by data sets without files.
        cache_dir: gets one file for each set, which makes the next start quick.
        options: keyword arguments of the data set's loader.
        size: side of the images, in pixels.
        sets: images by split, as far as they are read.
    """

    dataset: str
    root: Path
    cache_dir: Path
    options: Mapping[str, Any] = field(default_factory=dict)
    size: int = SIZE
    sets: dict[str, ImageSet] = field(default_factory=dict, init=False, repr=False, compare=False)

    def load(self, split: str, normalisation: Normalisation | None = None) -> ImageSet:
        """All images of a split, with what their pixels are normalised by. The log says what they are.

        Args:
            split: `background` (meta-training) or `evaluation` (meta-test).
            normalisation: that of a model; None for the set's own or, where it has none, mean and standard
                deviation of the background split.

        Raises:
            UserError: the images are missing, damaged or incomplete, or have another size. No other data
                ever takes their place.
        """
        images = self._read(split)
        if images.size != self.size:
            found = f"{images.size} x {images.size}, not {self.size} x {self.size}"
            raise UserError(f"{images.name}: its images are {found} (see --size)")
        if normalisation and split == "evaluation" and (fault := normalisation.fault_of(images.images)):
            log.warning("%s: %s", images.name, fault)
        normalisation = normalisation or images.normalisation or self._read("background").statistics()
        counts = " to ".join(str(size) for size in dict.fromkeys((min(images.sizes), max(images.sizes))))
        kind = "grey" if images.images.shape[1] == 1 else "colour"
        side = "" if self.size == SIZE else f" of {self.size} x {self.size}"
        shown = images.name, len(images), counts, kind, side, images.data_hash
        log.info("%s: %d classes of %s %s images%s, data hash %s", *shown)
        return replace(images, normalisation=normalisation)

    def _read(self, split: str) -> ImageSet:
        if split not in self.sets:
            try:
                load = DATASETS[self.dataset]
                size = inspect.signature(load).parameters.get("size")
                given = [self.size] if size and size.kind is not size.KEYWORD_ONLY else []
                found = load(split, self.root, self.cache_dir, *given, **self.options)
            except (OSError, ValueError, MemoryError) as error:
                file = f"cannot read {error.filename}: " if isinstance(error, OSError) else ""
                raise UserError(f"--dataset {self.dataset}: {file}{reason(error)}") from error
            self.sets.update({split: found} if isinstance(found, ImageSet) else found)
        return self.sets[split]
