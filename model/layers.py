"""The layers that ANML and OML are made of, in torch's own operations, and the frozen part of a chain."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor, nn


class ImageNorm(nn.Module):
    """Norm of each image and channel over H x W by its own mean and biased variance, scale and shift.

    [B, C, H, W] -> [B, C, H, W]. It is `nn.InstanceNorm2d(channels, affine=True)`, composed of operations
    that are exact under all transforms: torch's own loses terms of the second derivative when vmap maps an
    inner loop whose result is then differentiated.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, (2, 3), correction=0, keepdim=True)
        scale = self.weight[:, None, None] * torch.rsqrt(variance + self.eps)
        return (x - mean) * scale + self.bias[:, None, None]

    def extra_repr(self) -> str:
        return f"{len(self.weight)} channels, eps={self.eps}"


class ConvBlock(nn.Module):
    """3x3 convolution, per-image norm, ReLU and, where asked, 2x2 max-pool.

    [B, I, H, W] -> [B, O, H - 2, W - 2], or half of that with `pool`. The norm is that of each image
    and channel alone, in training and afterwards (the released model calls batch normalisation on one
    image at a time, to the same effect).

    The norm subtracts each channel's mean and the convolution's bias with it. So the bias is a
    parameter, as published, but takes no part: its gradient is zero exactly, where computing it gives
    rounding noise that Adam would turn into steps.
    """

    def __init__(self, inputs: int, outputs: int, pool: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel_size=3)
        self.norm = ImageNorm(outputs)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv._conv_forward(x, self.conv.weight, None)))
        # Without its indices MPS has no second derivative of it.
        return F.max_pool2d(x, 2, return_indices=True)[0] if self.pool else x

    def extra_repr(self) -> str:
        return "convolution without its bias, norm of each image, ReLU" + ", 2x2 max-pool" * self.pool


def conv_blocks(channels: int) -> OrderedDict[str, nn.Module]:
    """The three blocks that NM and PLN begin with, and what flattens them: [B, 3, 28, 28] -> [B, 9 * C]."""
    return OrderedDict(
        block1=ConvBlock(3, channels, pool=True),
        block2=ConvBlock(channels, channels, pool=True),
        block3=ConvBlock(channels, channels, pool=False),
        flatten=nn.Flatten(),
    )


def colour(images: Tensor, channels: int = 3) -> Tensor:
    """Grey images [B, 1, H, W] with their channel repeated, as a view; others as they are."""
    return images.expand(-1, channels, -1, -1) if images.ndim == 4 and images.shape[1] == 1 else images


@dataclass(frozen=True)
class FrozenOutput:
    """Images partway through the chains of a network: computed once, where what comes before is frozen.

    Attributes:
        activations: for each chain, [B, ...] what its first stages put out.
        done: for each chain, the number of those stages.
    """

    activations: tuple[Tensor, ...]
    done: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.activations[0])

    def __getitem__(self, rows: slice | Tensor) -> FrozenOutput:
        """Some of the images, in the same place; of a tensor, those of these numbers or where it is true."""
        return replace(self, activations=tuple(part[rows] for part in self.activations))


Inputs = Tensor | FrozenOutput
"""What a network takes: images [B, C, 28, 28], or what its own `frozen` made of them."""


def parts(inputs: Inputs) -> tuple[Tensor, ...]:
    """The tensors [B, ...] that inputs consist of."""
    return inputs.activations if isinstance(inputs, FrozenOutput) else (inputs,)


def cat(inputs: Sequence[Inputs]) -> Inputs:
    """The images of all inputs, which are those of one network, one after the other."""
    joined = tuple(torch.cat(part) for part in zip(*map(parts, inputs), strict=True))
    return replace(inputs[0], activations=joined) if isinstance(inputs[0], FrozenOutput) else joined[0]


def run_rest(chain: nn.Sequential, inputs: Inputs, position: int) -> Tensor:
    """The output of a chain from images, or from where `Network.frozen` left the chain at `position`."""
    if isinstance(inputs, Tensor):
        x, done = inputs, 0
    else:
        x, done = inputs.activations[position], inputs.done[position]
    for stage in list(chain)[done:]:
        x = stage(x)
    return x
