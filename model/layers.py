"""The layers that ANML and OML are made of.

Every layer owns exactly two parameters, a weight and a bias, so that `--rln N`, which freezes the
first 2N parameters, freezes the first N layers.
"""

from __future__ import annotations

from itertools import zip_longest

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor, nn

from model.fast.conv import conv2d, grey_block, instance_norm, signs, times

NORM_EPS = 1e-5


def first_channels(x: Tensor, weight: Tensor) -> Tensor:
    """The kernel to use for images `x`: grey images meet a colour kernel summed over its channels.

    Omniglot is grey and the networks read it as three equal channels; since a convolution is linear,
    one channel and the summed kernel give the same output for a third of the work.

    Args:
        x: [B, C, H, W]
        weight: [O, I, 3, 3]; returned as it is where I == C, as [O, 1, 3, 3] where C == 1.
    """
    if x.shape[1] == 1 and weight.shape[1] > 1:
        return weight.sum(1, keepdim=True)
    return weight


class Conv(nn.Conv2d):
    """3x3 convolution without padding and a ReLU, [B, I, H, W] -> [B, O, H', W'] (OML)."""

    bias: Tensor

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__(inputs, outputs, kernel_size=3, stride=stride)

    def reset_parameters(self) -> None:
        """Nothing: `modelfactory.build` draws all weights, from a generator of the caller's."""

    def forward(self, x: Tensor) -> Tensor:
        y = conv2d(x, first_channels(x, self.weight), self.stride[0])
        return F.relu(y + self.bias[:, None, None])


class ConvBeforeNorm(Conv):
    """3x3 convolution whose output is normalised next, without padding and stride (ANML).

    The norm subtracts each channel's mean and the bias with it. So the bias is a parameter, as
    published, but takes no part: its gradient is zero exactly, where computing it gives rounding
    noise that Adam would turn into steps.
    """

    def forward(self, x: Tensor) -> Tensor:
        return conv2d(x, first_channels(x, self.weight))


class NormReLUPool(nn.Module):
    """Normalise each sample by its own statistics, scale and shift, ReLU and, where asked, max-pool 2.

    [B, C, H, W] -> [B, C, H, W], or [B, C, H // 2, W // 2] with `pool`. Mean and biased variance are
    those of the sample alone, in training and afterwards: there are no running statistics (the
    released model calls batch normalisation on one sample at a time, to the same effect).
    """

    def __init__(self, channels: int, pool: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        sign = signs(self.weight)
        x = instance_norm(x, sign, NORM_EPS)
        x = F.max_pool2d(x, 2) if self.pool else x  # first of all: the rest on a quarter of it
        scale = self.weight * sign
        return torch.addcmul(self.bias[:, None, None], x, scale[:, None, None]).relu_()


class Linear(nn.Linear):
    """Flatten, then a linear map [B, ...] -> [B, O] followed by `activation` where one is given."""

    def __init__(self, inputs: int, outputs: int, activation: str | None = None) -> None:
        super().__init__(inputs, outputs)
        self.activation = activation

    def reset_parameters(self) -> None:
        """Nothing, as in `Conv`."""

    def forward(self, x: Tensor) -> Tensor:
        x = times(x.flatten(1), self.weight.t()) + self.bias
        match self.activation:
            case "sigmoid":
                return torch.sigmoid(x)
            case "relu":
                return F.relu(x)
            case _:
                return x


def run(layers: nn.Sequential, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
    """Apply `layers[start:stop]` to `x` without building a module for the slice."""
    chain = list(layers)[max(start, 0) : stop]
    for layer, following in zip_longest(chain, chain[1:]):
        if isinstance(following, NormReLUPool) and isinstance(layer, ConvBeforeNorm):
            x = block(x, layer, following)
        elif not isinstance(layer, NormReLUPool) or layer is chain[0]:  # else it is in a block
            x = layer(x)
    return x


def block(x: Tensor, conv: ConvBeforeNorm, norm: NormReLUPool) -> Tensor:
    """Both layers at once, faster where the input is grey images."""
    even = x.shape[2] % 2 == 0 and x.shape[3] % 2 == 0
    if norm.pool and even and x.shape[1] == 1 and not x.requires_grad:
        return grey_block(x, first_channels(x, conv.weight), norm.weight, norm.bias, NORM_EPS)
    y: Tensor = norm(conv(x))
    return y


def trunk(channels: int) -> dict[str, nn.Module]:
    """The three convolutional blocks shared by the NM network and the PLN: 3x28x28 -> C x 3 x 3."""
    return {
        "conv1": ConvBeforeNorm(3, channels),
        "norm1": NormReLUPool(channels, pool=True),
        "conv2": ConvBeforeNorm(channels, channels),
        "norm2": NormReLUPool(channels, pool=True),
        "conv3": ConvBeforeNorm(channels, channels),
        "norm3": NormReLUPool(channels, pool=False),
    }
