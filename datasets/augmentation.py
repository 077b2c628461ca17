"""Makes more of the images at hand: other classes by symmetries, and other drawings of a class."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor

TURN = math.radians(12)
STRETCH = math.log(1.15)
SHEAR = 0.15
SHIFT = 2  # pixels
"""How far `distort` goes, each way, at strength 1."""

TRANSPOSED_AND_FLIPPED = tuple(
    tuple(bool(int(bit)) for bit in steps)
    for steps in (["000", "110", "011", "101", "001", "100", "010", "111"])
)
"""For each symmetry, whether the image is transposed, then flipped upside down, then left to right."""


def show(images: Tensor, symmetries: Tensor) -> Tensor:
    """Images [N, ..., H, W], H = W, each turned or mirrored by one of the 8 `symmetries`, [N] on the CPU.

    Symmetries 0 to 3 are quarter turns; 4 to 7 are quarter turns of the mirrored image. A character that is
    turned or mirrored is another character.
    """
    steps = torch.tensor(TRANSPOSED_AND_FLIPPED)[symmetries].to(images.device, non_blocking=images.is_cuda)
    transpose, vertical, horizontal = steps.view(-1, 3, *[1] * (images.ndim - 1)).unbind(1)
    images = torch.where(transpose, images.transpose(-2, -1), images)
    images = torch.where(vertical, images.flip(-2), images)
    return torch.where(horizontal, images.flip(-1), images)


def distort(images: Tensor, generator: torch.Generator, strength: float) -> Tensor:
    """Images [B, C, H, W], each with probability one half turned, stretched, sheared and shifted at random.

    The other images stay as they are at meta-test: a distorted image has blurred lines.

    Args:
        generator: source of all randomness, on the CPU.
        strength: of all changes; 1 for up to `TURN`, `STRETCH`, `SHEAR` and `SHIFT`.
    """
    drawn = torch.rand(7, len(images), generator=generator) * 2 - 1
    angle, shear, wide, high, right, down = strength * drawn[:6]
    cosine, sine = torch.cos(TURN * angle), torch.sin(TURN * angle)
    wide, high = torch.exp(STRETCH * wide), torch.exp(STRETCH * high)
    pixel = 2 / images.shape[-1]
    rows = [
        torch.stack([cosine * wide, (SHEAR * shear - sine) * wide, SHIFT * pixel * right], 1),
        torch.stack([sine * high, cosine * high, SHIFT * pixel * down], 1),
    ]
    maps = torch.stack(rows, 1).to(images.device, images.dtype, non_blocking=images.is_cuda)
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    distorted = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    chosen = (drawn[6] > 0).to(images.device, non_blocking=images.is_cuda)
    return torch.where(chosen[:, None, None, None], distorted, images)
