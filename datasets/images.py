"""Sets of images, class after class: what every data set becomes, and what networks get of it.

Images that take seconds to decode or draw are kept in one file, so that the next start is quick.
"""

import hashlib
import logging
import math
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from utils.errors import UserError, reason
from utils.files import atomic_write

log = logging.getLogger("anml")

SPLITS = ("background", "evaluation")  # for meta-training and for meta-test; the two share no class
SIZE = 28  # pixels, side of the images that the published networks see
SIZES = (8, 512)  # the smallest and the largest side
FILTER = Image.Resampling.LANCZOS  # at 28, as in the released code
PART = 500  # images made at a time
SECONDS = 0.03  # for images made anew before a cache is used; four are made however long they take
Make = Callable[[Sequence[int]], NDArray[np.uint8]]
Prepare = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Normalisation:
    """Subtracts a mean from pixels, 0 to 255, and divides the differences.

    Attributes:
        mean, std: subtrahend and divisor, one number each, or one for red, green and blue.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        counts, finite = (len(self.mean), len(self.std)), all(map(math.isfinite, self.mean + self.std))
        if counts not in ((1, 1), (3, 3)) or not finite or min(self.std) <= 0:
            raise ValueError(
                "pixels' mean and standard deviation are 1 or 3 finite numbers, the latter above 0"
            )

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> "Normalisation":
        """The normalisation that the arguments in a model file name, or Omniglot's where they name none.

        Raises:
            ValueError: mean or standard deviation are no numbers.
        """
        mean, std = (arguments.get(key) for key in ("pixel_mean", "pixel_std"))
        if mean is None and std is None:
            return OMNIGLOT
        try:
            return cls(tuple(map(float, mean)), tuple(map(float, std)))  # type: ignore[arg-type]
        except TypeError:
            raise ValueError("its mean and standard deviation of pixels are no numbers") from None

    def arguments(self) -> dict[str, list[float]]:
        """The arguments in a model file that name this normalisation; see :meth:`of`."""
        return {"pixel_mean": list(self.mean), "pixel_std": list(self.std)}

    def fault_of(self, pixels: Tensor) -> str | None:
        """What is wrong with uint8 images whose mean is nearer to this one with light and dark exchanged."""
        usual, mean = sum(self.mean) / len(self.mean), int(pixels.sum()) / (pixels.numel() or math.nan)
        text = (
            "light and dark seem to be exchanged: a network trained on dark ink takes 255 - images of light"
        )
        return text if abs(mean - usual) > max(100, abs(255 - mean - usual)) else None

    def on(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Prepare:
        """The function that makes [..., C, H, W] of `dtype` of uint8 images on a device.

        With three means, grey images get three channels.
        """
        # The released code normalises in float32, whatever it computes in afterwards.
        mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (self.mean, self.std))
        return lambda pixels: (pixels - mean).div_(std).to(dtype)


OMNIGLOT = Normalisation((0.92206 * 256,), (0.08426 * 256 * 256,))
"""The released code's, for pixel values of 0 to 255. Its divisor is no standard deviation."""


@dataclass(frozen=True)
class Pool:
    """Images of some classes, or what a network makes of them, one row for each image, class after class.

    Attributes:
        rows: [N, ...], on the device where they are used.
        sizes: images of each class, N in all.
        prepare: makes what a network takes of some rows; None where they are that already. Images stay
            uint8, a quarter of the memory, until a batch of them is made.
        test_only: see `ImageSet`.
    """

    rows: Tensor
    sizes: tuple[int, ...]
    prepare: Prepare | None = None
    test_only: int = 0

    def __len__(self) -> int:
        """Number of classes."""
        return len(self.sizes)

    def __getitem__(self, label: int) -> Tensor:
        """The rows of a class as a network takes them, [D, ...]."""
        start = int(self.starts[label])
        return self.take(slice(start, start + self.sizes[label]))

    def take(self, rows: slice | Tensor) -> Tensor:
        """Some rows, by a slice or by a tensor of numbers on their device, as a network takes them."""
        taken = self.rows[rows]
        return taken if self.prepare is None else self.prepare(taken)

    @cached_property
    def starts(self) -> Tensor:
        """The first row of each class, [C] on the CPU."""
        sizes = torch.tensor(self.sizes)
        return sizes.cumsum(0) - sizes

    def positions(self, index: Tensor) -> Tensor:
        """The rows [...] of an index [..., 2] of (class, image), on the CPU."""
        index = index.cpu()
        return self.starts[index[..., 0]] + index[..., 1]


@dataclass(frozen=True)
class ImageSet:
    """The images of one split of a data set, class after class.

    Attributes:
        name: data set and split, for people: `omniglot background`.
        images: uint8 [N, C, S, S] on the CPU, one channel or three, 0 to 255.
        sizes: images of each class, N in all.
        classes: names of the classes. A class id is a position in `classes`.
        normalisation: of pixels; None for mean and standard deviation of the background split.
        default_classes: how many classes, the first ones, are used by default; None for all.
        notes: what `config.json` says of the set beside its name and data hash.
        data_hash: sha256, hexadecimal, of class names, sizes, shape and pixels, computed where none is given.
        test_only: how many images of each class, the last ones, a meta-test takes its test images from. It
            learns from the others. 0 for images that are either.
    """

    name: str
    images: Tensor
    sizes: tuple[int, ...]
    classes: tuple[str, ...]
    normalisation: Normalisation | None = None
    default_classes: int | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)
    data_hash: str = ""
    test_only: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "images", _as_images(self.images))
        counts, number = (len(set(self.classes)), len(self.sizes), sum(self.sizes)), len(self.classes)
        if counts != (number, number, len(self.images)) or min(self.sizes, default=0) < 1:
            raise ValueError("there is no class, a class has no images, or two have the same name")
        if not self.data_hash:
            digest = hashlib.sha256(repr((self.classes, self.sizes, list(self.images.shape))).encode())
            digest.update(self.images.contiguous().numpy().data)
            object.__setattr__(self, "data_hash", digest.hexdigest())

    @classmethod
    def of(cls, name: str, classes: Mapping[str, Tensor | NDArray[np.uint8]], **fields: Any) -> "ImageSet":
        """A set of images, uint8 [D, S, S] or [D, C, S, S] by the name of their class."""
        parts = [_as_images(part) for part in classes.values()]
        return cls(name, torch.cat(parts), tuple(map(len, parts)), tuple(classes), **fields)

    def __len__(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def size(self) -> int:
        """Side of the images, in pixels."""
        return self.images.shape[-1]

    @property
    def channels(self) -> int:
        """Channels of the images as networks get them."""
        return max(self.images.shape[1], len(self.normalisation.mean) if self.normalisation else 1)

    def limited(self, classes: int | None, flag: str) -> "ImageSet":
        """The set of the first `classes` classes or, where that is None, of those used by default.

        Args:
            flag: that gives `classes`, for messages.

        Raises:
            UserError: there are fewer classes.
        """
        wanted = classes or min(self.default_classes or len(self), len(self))
        if wanted > len(self):
            raise UserError(f"{flag} {wanted}: {self.name} has {len(self)} classes")
        return self.first(wanted)

    def first(self, classes: int) -> "ImageSet":
        """The set of the first `classes` classes, with data hash and notes of the whole set."""
        sizes = self.sizes[:classes]
        return replace(self, images=self.images[: sum(sizes)], sizes=sizes, classes=self.classes[:classes])

    def statistics(self) -> Normalisation:
        """Mean and standard deviation of all pixels of each channel.

        Raises:
            UserError: all pixels of a channel are equal.
        """
        # Counts are whole numbers: the result does not depend on the order of additions.
        counts = np.zeros((self.images.shape[1], 256))
        for part in self.images.split(PART):  # counting takes eight times the memory of what is counted
            for row, channel in zip(counts, part.unbind(1), strict=True):
                row += torch.bincount(channel.flatten(), minlength=256).numpy()
        weights = counts / counts.sum(1, keepdims=True)
        mean = weights @ np.arange(256)
        std = np.sqrt((weights * (np.arange(256) - mean[:, None]) ** 2).sum(1))
        if not std.all():
            raise UserError(f"{self.name}: all pixels are equal (in a channel), so nothing can be learned")
        return Normalisation(tuple(mean.tolist()), tuple(std.tolist()))

    def require(self, images: int, flags: str, tests: int = 0) -> None:
        """Raise UserError where a class has too few images for `flags`, which ask for `tests` test images."""
        spare = self.test_only - tests if self.test_only else 0
        if spare < 0:
            raise UserError(f"{flags}: {self.name} keeps {self.test_only} images of each class for tests")
        small = [label for label, size in enumerate(self.sizes) if size - spare < images]
        if small:
            smallest = min(small, key=self.sizes.__getitem__)
            others = f", and {len(small) - 1} others have too few" if len(small) > 1 else ""
            raise UserError(
                f"{self.name}: class {self.classes[smallest]} has {self.sizes[smallest]} images{others}; "
                f"{flags}: {images} of each class are needed"
            )

    def about(self) -> dict[str, Any]:
        """What `config.json` says of the set. A run is resumed with data of the same hash."""
        return {"data": self.name, "data_hash": self.data_hash, "image_size": self.size, **self.notes}

    def pool(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Pool:
        """All images on `device`. A batch that is taken becomes network inputs [B, C, S, S], normalised."""
        prepare = (self.normalisation or OMNIGLOT).on(device, dtype)
        return Pool(self.images.to(device), self.sizes, prepare, self.test_only)


def _as_images(pixels: Tensor | NDArray[np.uint8]) -> Tensor:
    """[B, C, S, S] of uint8 [B, S, S] or [B, C, S, S]. Raises ValueError for another shape or type."""
    images = torch.as_tensor(pixels)
    images = images.unsqueeze(1) if images.ndim == 3 else images
    square = images.ndim == 4 and images.shape[1] in (1, 3) and images.shape[2] == images.shape[3]
    if images.dtype != torch.uint8 or not square:
        raise ValueError(
            f"images are {str(images.dtype).removeprefix('torch.')} {list(images.shape)}, not uint8 "
            f"[B, C, S, S] with one channel or three: datasets.images.shrink makes pictures square"
        )
    return images


def normalise(pixels: Tensor | NDArray[np.uint8], normalisation: Normalisation = OMNIGLOT) -> Tensor:
    """Images of one's own as networks take them: [B, C, S, S] from uint8 [B, S, S] or [B, C, S, S].

    Args:
        normalisation: `net.normalisation`, that of the training.

    Raises:
        ValueError: another shape or type.

    Warns:
        UserWarning: images that look like light ink on dark paper, for a network trained on dark ink on light
            paper such as Omniglot's, or the other way round.
    """
    images = _as_images(pixels)
    if fault := normalisation.fault_of(images):
        warnings.warn(fault, stacklevel=2)
    return normalisation.on(images.device)(images)


def shrink(picture: Image.Image, size: int = SIZE) -> NDArray[np.uint8]:
    """Scale a picture to uint8 [S, S], or [3, S, S] of an RGB one.

    The filter is LANCZOS at 28 pixels, as in the released code, and bilinear at other sizes, as in the code
    of OML, GeMCL and others. The released code converts to RGB first. Filters treat each channel alone, so
    the three channels of a grey picture are equal to each other and to the one channel here.
    """
    coloured = picture.mode == "RGB"
    chosen = FILTER if size == SIZE else Image.Resampling.BILINEAR
    pixels = np.array((picture if coloured else picture.convert("L")).resize((size, size), chosen), np.uint8)
    return pixels.transpose(2, 0, 1) if coloured else pixels


def cached(
    folder: Path, name: str, origin: bytes, count: int, make: Make, size: int = SIZE
) -> NDArray[np.uint8]:
    """The images `make(range(count))`, uint8 [count, ...], from `folder / NAME.npz` if it holds them.

    Before the file is used, up to 20 of its images from the first to the last are made anew. Where one of
    them differs, the code that prepares images has changed, and the file is built again. So is a file that
    is damaged or of another origin. One line of the log says why. A folder that cannot be written costs a
    warning, not the run.

    Args:
        name: of the data set; a folder keeps one file for each name and size.
        origin: what the images are made of, such as names, sizes and times of files.
        make: gives the images at some positions, uint8 [N, ...]. Its exceptions pass through.
        size: side of the images; of another one than 28 it is part of the file's name.
    """
    name = name if size == SIZE else f"{name}-{size}"
    path, key = folder / f"{name}.npz", hashlib.sha256(origin).hexdigest()
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            images, found = np.asarray(file["images"], np.uint8), str(file["key"])
        same, end = (found, len(images)) == (key, count), time.perf_counter() + SECONDS
        for number in range(20):  # the last image, those near a third and two thirds, the first, then others
            k = (19 + 7 * number) % 20 * (count - 1) // 19
            if same and (number < 4 or time.perf_counter() < end):
                same = np.array_equal(make([k]), images[k : k + 1])
        if same:
            return images
        raise ValueError("it is of other files or options, or the code that prepares images has changed")
    except (FileNotFoundError, NotADirectoryError):
        log.info("%s: preparing %d images, once", name, count)
    except Exception as error:  # NumPy and zipfile raise many kinds on damaged bytes
        log.warning("%s: the cache %s is built again: %s", name, path, reason(error))
    bar = tqdm(range(0, count, PART), name, leave=False, disable=not sys.stderr.isatty())
    images = np.empty((0,), np.uint8)
    for start in bar:
        part = make(range(count)[start : start + PART])
        images = images if start else np.empty((count, *part.shape[1:]), np.uint8)
        images[start : start + PART] = part
    try:
        with atomic_write(path) as file:
            np.savez(file, key=np.array(key), images=images)
    except UserError as error:
        log.warning("%s; without this cache (--cache_dir) every start prepares the images again", error)
    return images
