"""What the networks learn from: characters, 20 drawings each, as one tensor."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

CLASSES = {"background": 964, "evaluation": 659}
"""Characters of each split of Omniglot (Lake et al. 2015)."""

DRAWINGS = 20  # of each character, each by another person
CANVAS = 105  # pixels, side of a drawing as published
SIZE = 28  # pixels, side of what the networks see

# The released code's normalisation, in units of pixel values 0..255.
PIXEL_MEAN = 0.92206 * 256
PIXEL_SCALE = 0.08426 * 256 * 256


@dataclass(frozen=True)
class CharacterSet:
    """The drawings of one split, class after class."""

    name: str
    """Data set and split, for people: `omniglot background`."""
    images: torch.Tensor
    """uint8 `[C, 20, 28, 28]` on the CPU, 0 (ink) to 255 (paper)."""
    characters: tuple[str, ...]
    """The C class names, `Alphabet/character01`, sorted; a class id is a position in here."""
    manifest: str
    """sha256 hex digest: two sets of equal manifest hold the same drawings in the same order."""

    def normalised(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Move all images to `device` as network inputs, normalised as the released code does.

        Returns:
            `[C, 20, 1, 28, 28]`, (pixel - 0.92206 * 256) / (0.08426 * 256 * 256). The networks
            repeat the one grey channel where they need three.
        """
        return _normalised(self.images.to(device)).to(dtype).unsqueeze(2)


def normalise(pixels: torch.Tensor | NDArray[np.uint8]) -> torch.Tensor:
    """Images of one's own as the networks here take them: [B, 1, 28, 28] from uint8 `[B, 28, 28]`.

    Drawings are dark ink (0) on light paper (255), as in Omniglot, and 28 pixels high and wide: the
    networks have seen no other.

    Raises:
        ValueError: another shape or type.

    Warns:
        UserWarning: images that look like light ink on dark paper.
    """
    pixels = torch.as_tensor(pixels)
    if pixels.dtype != torch.uint8 or pixels.shape[-2:] != (SIZE, SIZE) or pixels.ndim != 3:
        raise ValueError(
            f"images are {str(pixels.dtype).removeprefix('torch.')} {list(pixels.shape)}, not uint8 "
            f"[B, {SIZE}, {SIZE}]: scale drawings down to {SIZE} x {SIZE}, one grey channel from 0 to 255"
        )
    if len(pixels) and pixels.float().mean() < 128:
        warnings.warn(
            "most pixels are dark: the networks have seen dark ink (0) on light paper (255); 255 - images "
            "turns the one into the other",
            stacklevel=2,
        )
    return _normalised(pixels).unsqueeze(1)


def _normalised(pixels: torch.Tensor) -> torch.Tensor:
    # The released code normalises in float32, whatever it computes in afterwards.
    return pixels.float().sub_(PIXEL_MEAN).div_(PIXEL_SCALE)


def shrink(picture: Image.Image) -> NDArray[np.uint8]:
    """Scale one grey picture to uint8 `[28, 28]` with the LANCZOS filter, as the released code.

    The released code converts to RGB first. Its three channels are equal to each other and to this
    one, as the filter treats each channel alone.
    """
    small = picture.convert("L").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    return np.array(small, dtype=np.uint8)
