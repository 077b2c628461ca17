"""What the networks learn from: characters, 20 drawings each, as one tensor."""

from __future__ import annotations

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
        # The released code normalises in float32, whatever it computes in afterwards.
        pixels = self.images.to(device).float()
        return pixels.sub_(PIXEL_MEAN).div_(PIXEL_SCALE).to(dtype).unsqueeze(2)


def shrink(picture: Image.Image) -> NDArray[np.uint8]:
    """Scale one grey picture to uint8 `[28, 28]` with the LANCZOS filter, as the released code.

    The released code converts to RGB first. Its three channels are equal to each other and to this
    one, as the filter treats each channel alone.
    """
    small = picture.convert("L").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    return np.array(small, dtype=np.uint8)
