"""The layers that ANML and OML are made of, in torch's own operations, the frozen part of a chain, and the
layers of a network that `--rln` counts."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor, nn

from utils.errors import UserError

if TYPE_CHECKING:
    from model.modelfactory import Network


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

    def __init__(self, inputs: int, outputs: int, pool: bool, number: int = 1, last: bool = False) -> None:
        super().__init__()
        self.number, self.last = number, last  # place among the blocks of a network, see `layers_of`
        self.conv = nn.Conv2d(inputs, outputs, kernel_size=3)
        self.norm = ImageNorm(outputs)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv._conv_forward(x, self.conv.weight, None)))
        # Without its indices MPS has no second derivative of it.
        return F.max_pool2d(x, 2, return_indices=True)[0] if self.pool else x

    def extra_repr(self) -> str:
        return "convolution without its bias, norm of each image, ReLU" + ", 2x2 max-pool" * self.pool


def conv_blocks(channels: int, size: int) -> OrderedDict[str, nn.Module]:
    """The blocks that NM and PLN begin with, and what flattens them: [B, 3, S, S] -> [B, P * C].

    A block with its pool makes (s - 2) // 2 positions a side of s; blocks follow while there are more than 4.
    The last block pools images above 30 pixels alone. (So does the authors' later code in its PLN.) 28 pixels
    have three blocks, as published, and 84 four, with 3 x 3 positions left of both.
    """
    blocks: OrderedDict[str, nn.Module] = OrderedDict()
    side = size
    while side > 4:
        side, number = (side - 2) // 2, len(blocks) + 1
        inputs, last = channels if blocks else 3, side <= 4
        blocks[f"block{number}"] = ConvBlock(inputs, channels, not last or size > 30, number, last)
    return OrderedDict(**blocks, flatten=nn.Flatten())


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
"""What a network takes: images [B, C, S, S], or what its own `frozen` made of them."""


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


def kaiming_normal(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Kaiming normal values for a weight: fan-in the number of inputs of a row, gain sqrt 2 (released code:
    `kaiming_normal_`). The numbers are drawn on the CPU in the precision of the weight."""
    shape = weight.shape
    drawn = torch.randn(shape, generator=generator, dtype=weight.dtype, device="cpu")
    return drawn.mul_(math.sqrt(2 / math.prod(shape[1:])))


def outputs(chain: nn.Sequential, size: int) -> int:
    """How many numbers a chain of 3x3 convolutions and 2x2 pools makes of an image of `size` x `size`.

    Raises:
        UserError: no positions are left.
    """
    side, channels = size, 3
    for stage in chain:
        pools = False
        for module in stage.modules():
            if isinstance(module, nn.Conv2d):
                side = (side + 2 * int(module.padding[0]) - 3) // module.stride[0] + 1
                channels = module.out_channels
            elif isinstance(module, nn.MaxPool2d) or (isinstance(module, ConvBlock) and module.pool):
                pools = True
        side = side // 2 if pools else side
    if side < 1:
        raise UserError(f"--size {size} is too small: the network has no positions left")
    return channels * side**2


def shared_copy(net: Network, copied: Collection[str] = ()) -> Network:
    """A copy of a network in `eval` mode that shares all parameters but those `copied` with it.

    Buffers are copied. In the copy the parameters `copied` take a gradient and no others.
    """
    own = {id(net.get_parameter(name)) for name in copied}
    memo = {
        id(parameter): nn.Parameter(parameter.detach(), requires_grad=False)
        for parameter in net.parameters()
        if id(parameter) not in own
    }
    twin = copy.deepcopy(net, memo).eval()
    for name in copied:
        twin.get_parameter(name).requires_grad_()
    return twin


def layers_of(net: Network) -> tuple[list[list[str]], list[list[str]]]:
    """Names of the parameters of each layer: of the layers below the head, and of those of the head.

    A number means the same at all sizes: the blocks of NM and PLN after the third count with its norm, and
    those missing of three are layers without parameters.
    """
    blocks = [module for module in net.modules() if isinstance(module, ConvBlock)]
    further = {id(part) for block in blocks if block.number > 3 for part in (block.conv, block.norm)}
    missing = {id(block.norm): 2 * (3 - block.number) for block in blocks if block.last}
    names = {id(p): name for name, p in net.named_parameters() if p.requires_grad}
    head = {id(p) for p in net.head.parameters()}
    below: list[list[str]] = []
    above: list[list[str]] = []
    for module in net.modules():
        own = [id(p) for p in module.parameters(recurse=False) if id(p) in names]
        layer = [names.pop(key) for key in own]
        if id(module) in further:
            below[-1] += layer
        elif layer:
            (above if head.intersection(own) else below).append(layer)
        below += [[] for _ in range(missing.get(id(module), 0))]
    return below, above


def layer_parameters(net: Network) -> list[list[str]]:
    """Names of the parameters of each layer that `--rln` counts.

    Layers are the modules that own parameters, in the order of the constructor, the head's last. A
    parameter that several modules share belongs to the first; one that takes no gradient to none.
    """
    below, above = layers_of(net)
    return below + above


def trained_parameters(net: Network, rln: int) -> list[str]:
    """Names of the parameters that learn when `--rln` freezes the first `rln` layers, in order.

    | `--rln` | ANML trains | sANML trains | OML trains |
    |---|---|---|---|
    | 0 | everything | everything | everything |
    | 6 | NM's gate layer, the PLN, the head | the head | hidden layer and head |
    | 7 | the PLN and the head | - | the head |
    | 13 | the head | - | - |

    Other numbers cut between two layers in the same order.

    Raises:
        UserError: no such cut in this network.
    """
    layers = layer_parameters(net)
    if not 0 <= rln < len(layers):
        raise UserError(
            f"--rln {rln} leaves nothing to train in {net.network}: "
            f"it has {len(layers)} layers, so --rln goes from 0 to {len(layers) - 1}"
        )
    return [name for layer in layers[rln:] for name in layer]
