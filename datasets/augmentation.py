"""Images changed so that there is more to learn from: other classes, and other drawings of a class."""

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


def show(images: Tensor, symmetry: int) -> Tensor:
    """Images [..., H, W], H = W, in one of the 8 symmetries of the square.

    0 to 3 are quarter turns, 4 to 7 the same of the mirrored image. A character turned or mirrored is
    another character.
    """
    mirrored = images.flip(-1) if symmetry & 4 else images
    return mirrored.rot90(symmetry & 3, (-2, -1))


def distort(images: Tensor, generator: torch.Generator, strength: float) -> Tensor:
    """[B, C, H, W] images, half of them turned, stretched in both directions, sheared and shifted at random.

    The other half stays as it is, as all images are at meta-test: drawing an image anew blurs its lines.

    Args:
        generator: draws how, on the CPU.
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
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False).to(images)
    distorted = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    chosen = (drawn[6] > 0).to(images.device)
    return torch.where(chosen[:, None, None, None], distorted, images)
