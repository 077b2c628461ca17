"""Sets of images, class after class: what every data set becomes, and what networks get of it."""

from __future__ import annotations

import hashlib
import lzma
import math
import struct
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from utils.errors import UserError

# What zipfile and Pillow raise on damaged input, beside UserError's own causes.
DAMAGE = (
    OSError,
    EOFError,
    RuntimeError,
    SyntaxError,
    ValueError,
    lzma.LZMAError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
    Image.DecompressionBombError,
)

SPLITS = ("background", "evaluation")  # for meta-training and for meta-test, without a common class
SIZE = 28  # pixels, side of what the networks see
FILTER = Image.Resampling.LANCZOS  # as in the released code


@dataclass(frozen=True)
class Normalisation:
    """What is subtracted from pixels, 0 to 255, and what they are then divided by.

    Attributes:
        mean, std: one number each, or one for red, green and blue.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if (len(self.mean), len(self.std)) not in ((1, 1), (3, 3)):
            raise ValueError("mean and standard deviation of pixels are one number each, or three")
        if not all(map(math.isfinite, self.mean + self.std)) or min(self.std) <= 0:
            raise ValueError("mean and standard deviation of pixels are finite, and the latter above 0")

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Normalisation:
        """That of a model file's arguments; Omniglot's in one that was written before there was another.

        Raises:
            ValueError: they hold something else than numbers.
        """
        mean, std = (arguments.get(key) for key in ("pixel_mean", "pixel_std"))
        if mean is None and std is None:
            return OMNIGLOT
        try:
            return cls(tuple(map(float, mean)), tuple(map(float, std)))  # type: ignore[arg-type]
        except TypeError:
            raise ValueError("its mean and standard deviation of pixels are no numbers") from None

    def arguments(self) -> dict[str, list[float]]:
        """What a model file's arguments say of it; see :meth:`of`."""
        return {"pixel_mean": list(self.mean), "pixel_std": list(self.std)}

    def __call__(self, pixels: Tensor) -> Tensor:
        """float32 [N, C, H, W] of uint8 ones; grey images have three channels after a mean of three."""
        # The released code normalises in float32, whatever it computes in afterwards.
        x = pixels.float()
        if len(self.mean) == 1:
            return x.sub_(self.mean[0]).div_(self.std[0])
        x = x.expand(-1, 3, -1, -1).clone() if x.shape[1] == 1 else x
        for channel, mean, std in zip(x.unbind(1), self.mean, self.std, strict=True):
            channel.sub_(mean).div_(std)
        return x


OMNIGLOT = Normalisation((0.92206 * 256,), (0.08426 * 256 * 256,))
"""The released code's, in units of pixel values 0 to 255. Its divisor is no standard deviation."""


@dataclass(frozen=True)
class Pool:
    """One row for each image of some classes, class after class: its pixels, or what a network makes of them.

    Attributes:
        rows: [N, ...].
        sizes: images of each class, N in all.
    """

    rows: Tensor
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, images: Pool | Tensor) -> Pool:
        """A pool as it is; [C, D, ...] as C classes of D images."""
        return (
            images
            if isinstance(images, Pool)
            else cls(images.flatten(0, 1), (images.shape[1],) * len(images))
        )

    def __len__(self) -> int:
        """Number of classes."""
        return len(self.sizes)

    def __getitem__(self, label: int) -> Tensor:
        """The rows of a class, [D, ...]."""
        return self.rows[self.starts[label] :][: self.sizes[label]]

    @property
    def device(self) -> torch.device:
        return self.rows.device

    @cached_property
    def starts(self) -> Tensor:
        """[C] the first row of each class, on the CPU."""
        sizes = torch.tensor(self.sizes)
        return sizes.cumsum(0) - sizes

    def positions(self, index: Tensor) -> Tensor:
        """[...] rows of an index [..., 2] of (class, image), on the CPU."""
        index = index.cpu()
        return self.starts[index[..., 0]] + index[..., 1]


@dataclass(frozen=True)
class ImageSet:
    """The images of one split of a data set, class after class.

    Attributes:
        name: data set and split, for people: `omniglot background`.
        images: uint8 [N, C, 28, 28] on the CPU, one channel or three, 0 to 255.
        sizes: images of each class, N in all.
        classes: names of the classes; a class id is a position in here.
        normalisation: of pixels; None for mean and standard deviation of the background split.
        default_classes: classes in use, the first ones, where nobody asks for others; None for all.
        notes: what `config.json` says of the set beside its name and data hash.
        data_hash: sha256, hexadecimal, of class names, sizes, shape and pixels, computed where none is given.
    """

    name: str
    images: Tensor
    sizes: tuple[int, ...]
    classes: tuple[str, ...]
    normalisation: Normalisation | None = None
    default_classes: int | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)
    data_hash: str = ""

    def __post_init__(self) -> None:
        images = self.images
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1:] not in IMAGE_SHAPES:
            kind = str(images.dtype).removeprefix("torch.")
            raise ValueError(f"images are {kind} {list(images.shape)}, {NOT_AS_NETWORKS_READ}")
        if not self.classes or len(self.classes) != len(self.sizes) or sum(self.sizes) != len(images):
            raise ValueError(f"{len(self.classes)} classes of {sum(self.sizes)} images; {len(images)} images")
        if min(self.sizes) < 1 or len(set(self.classes)) < len(self.classes):
            raise ValueError("a class has no images, or two have the same name")
        if not self.data_hash:
            digest = hashlib.sha256(repr((self.classes, self.sizes, list(images.shape))).encode())
            digest.update(images.contiguous().numpy().data)
            object.__setattr__(self, "data_hash", digest.hexdigest())

    @classmethod
    def of(cls, name: str, classes: Mapping[str, Tensor | NDArray[np.uint8]], **fields: Any) -> ImageSet:
        """A set of images by the name of their class: uint8 [D, 28, 28], or [D, C, 28, 28]."""
        parts = [torch.as_tensor(part) for part in classes.values()]
        images = torch.cat([part.unsqueeze(1) if part.ndim == 3 else part for part in parts])
        return cls(name, images, tuple(map(len, parts)), tuple(classes), **fields)

    def __len__(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def channels(self) -> int:
        """Of images as networks get them."""
        return max(self.images.shape[1], len(self.normalisation.mean) if self.normalisation else 1)

    def limited(self, classes: int | None, flag: str, outputs: int | None = None) -> ImageSet:
        """The first classes: as many as a flag says or, without a value, as the set is used with by default.

        Args:
            outputs: of a network with an output for each class; None where it need not have so many.

        Raises:
            UserError: there are fewer classes, or fewer outputs.
        """
        wanted = classes or self.default_classes or len(self)
        if classes and classes > len(self):
            raise UserError(f"{flag} {classes}: {self.name} has {len(self)} classes")
        wanted = min(wanted, len(self))
        if outputs is not None and wanted > outputs:
            raise UserError(
                f"the network has {outputs} outputs, too few for {flag} {wanted}; lower it, or raise "
                "--num_classes"
            )
        return self.first(wanted)

    def first(self, classes: int) -> ImageSet:
        """The set without the classes after the first `classes`; data hash and notes are those of all."""
        sizes = self.sizes[:classes]
        return replace(self, images=self.images[: sum(sizes)], sizes=sizes, classes=self.classes[:classes])

    def statistics(self) -> Normalisation:
        """Mean and standard deviation of all pixels of each channel.

        Raises:
            UserError: all pixels of a channel are equal.
        """
        # Counts are whole numbers: the result does not depend on the order of additions.
        counts = np.zeros((self.images.shape[1], 256), np.int64)
        for part in self.images.split(1000):
            for count, channel in zip(counts, part.unbind(1), strict=True):
                count += np.bincount(channel.reshape(-1).numpy(), minlength=256)
        weights = counts / counts.sum(1, keepdims=True)
        mean = weights @ np.arange(256)
        std = np.sqrt((weights * (np.arange(256) - mean[:, None]) ** 2).sum(1))
        if not std.all():
            raise UserError(
                f"{self.name}: all pixels are equal (in one of the channels), so nothing can be learned"
            )
        return Normalisation(tuple(mean.tolist()), tuple(std.tolist()))

    def require(self, images: int, flags: str) -> None:
        """Raise UserError where a class has fewer images than `flags` ask for."""
        smallest = min(range(len(self)), key=self.sizes.__getitem__)
        if self.sizes[smallest] < images:
            small = sum(size < images for size in self.sizes)
            raise UserError(
                f"{self.name}: class {self.classes[smallest]} has {self.sizes[smallest]} images"
                + (f", and {small - 1} others have too few" if small > 1 else "")
                + f"; {flags}: {images} of each class are needed"
            )

    def about(self) -> dict[str, Any]:
        """What `config.json` says of it; a run is resumed with data of the same."""
        return {"data": self.name, "data_hash": self.data_hash, **self.notes}

    def pool(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Pool:
        """All images on `device` as network inputs, [N, C, 28, 28], normalised."""
        normalise = self.normalisation or OMNIGLOT
        return Pool(normalise(self.images.to(device)).to(dtype), self.sizes)


IMAGE_SHAPES = [(channels, SIZE, SIZE) for channels in (1, 3)]
NOT_AS_NETWORKS_READ = (
    f"not uint8 [B, C, {SIZE}, {SIZE}] from 0 to 255 with one channel or three: scale pictures down to "
    f"{SIZE} x {SIZE}, as datasets.images.shrink does"
)


def normalise(pixels: Tensor | NDArray[np.uint8], normalisation: Normalisation = OMNIGLOT) -> Tensor:
    """Images of one's own as a network takes them: [B, C, 28, 28] from uint8 [B, 28, 28] or [B, C, 28, 28].

    Args:
        normalisation: `net.normalisation`, that of the training. A network trained on Omniglot has seen
            nothing but dark ink (0) on light paper (255).

    Raises:
        ValueError: another shape or type.

    Warns:
        UserWarning: images that look like light ink on dark paper, for a network trained on Omniglot.
    """
    pixels = torch.as_tensor(pixels)
    wide = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels
    if wide.dtype != torch.uint8 or wide.ndim != 4 or wide.shape[1:] not in IMAGE_SHAPES:
        kind = str(pixels.dtype).removeprefix("torch.")
        raise ValueError(f"images are {kind} {list(pixels.shape)}, {NOT_AS_NETWORKS_READ}")
    if normalisation == OMNIGLOT and len(pixels) and pixels.float().mean() < 128:
        warnings.warn(
            "most pixels are dark: the networks have seen dark ink (0) on light paper (255); 255 - images "
            "turns the one into the other",
            stacklevel=2,
        )
    return normalisation(wide)


def shrink(picture: Image.Image) -> NDArray[np.uint8]:
    """Scale a picture to uint8 [28, 28], or [3, 28, 28] of an RGB one, with the LANCZOS filter as the
    released code.

    The released code converts to RGB first. The three channels of a grey picture are equal to each other and
    to this one, as the filter treats each channel alone.
    """
    grey = picture.mode != "RGB"
    small = (picture.convert("L") if grey else picture).resize((SIZE, SIZE), FILTER)
    pixels = np.array(small, dtype=np.uint8)
    return pixels if grey else pixels.transpose(2, 0, 1)


def reason(error: BaseException, kind: str = "") -> str:
    """Say what went wrong, without the addresses and paths in some libraries' messages."""
    if isinstance(error, UnidentifiedImageError):
        return f"not a {kind} picture".replace("  ", " ")
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
