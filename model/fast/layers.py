"""Drop-in layers: the parameters, state dict and numbers (up to rounding) of their plain twins."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.fast.conv import conv2d
from model.fast.first_block import grey_block
from model.fast.matmul import linear
from model.fast.norm import norm_relu_pool
from model.layers import ConvBlock, ImageNorm
from model.modelfactory import ANML, OML, SANML


class FastConvBlock(ConvBlock):
    """`ConvBlock` with fast convolution and norm, both in one where the input is grey images."""

    def forward(self, x: Tensor) -> Tensor:
        if type(self.norm) is not ImageNorm or type(self.conv) is not FastConv2d or not self.conv.is_fast(x):
            return super().forward(x)  # somebody has put another layer into the block
        weight, norm = self.conv.weight, self.norm
        even = x.shape[2] % 2 == 0 and x.shape[3] % 2 == 0
        if is_grey(x) and self.pool and even and self.conv.stride == (1, 1) and not x.requires_grad:
            x, weight = summed_over_channels(x, weight)
            return grey_block(x, weight, norm.weight, norm.bias, norm.eps)
        y = conv2d(x, weight, self.conv.stride[0])
        return norm_relu_pool(y, norm.weight, norm.bias, norm.eps, self.pool)


class FastConv2d(nn.Conv2d):
    """`nn.Conv2d`, fast for 3x3 kernels without padding, dilation and groups.

    Attributes:
        channels_last: whether its output may lie so in memory. Layers of somebody else's get what they would
            get without it: GroupNorm of torch before 2.14 ends the process on such activations.
    """

    channels_last = False

    def is_fast(self, x: Tensor) -> bool:
        """Whether this is a convolution that `conv2d` computes, and `x` are images [B, C, H, W] for it."""
        step = self.stride[0]
        shape = (self.kernel_size, self.stride, self.padding, self.dilation, self.groups)
        return shape == ((3, 3), (step, step), (0, 0), (1, 1), 1) and x.ndim == 4 and min(x.shape[2:]) >= 3

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_fast(x):
            return super().forward(x)
        weight = self.weight
        if is_grey(x):
            x, weight = summed_over_channels(x, weight)
        y = conv2d(x, weight, self.stride[0])
        y = y if self.bias is None else y + self.bias[:, None, None]
        return y if self.channels_last else y.contiguous()


class FastLinear(nn.Linear):
    """`nn.Linear`, fast for single images."""

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 2:
            return super().forward(x)
        y = linear(x, self.weight.t())
        return y if self.bias is None else y + self.bias


def is_grey(x: Tensor) -> bool:
    """Whether [B, C, H, W] are grey images with their channel repeated as a view: equal by construction."""
    return x.shape[1] > 1 and x.stride(1) == 0


def summed_over_channels(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """One channel [B, 1, H, W] of grey images and the kernel [O, 1, 3, 3] that gives the same output.

    A convolution is linear: a third of the work.
    """
    return x[:, :1], weight.sum(1, keepdim=True)


FAST: dict[type[nn.Module], type[nn.Module]] = {
    ConvBlock: FastConvBlock,
    nn.Conv2d: FastConv2d,
    nn.Linear: FastLinear,
}


CHAINS = (ANML, SANML, OML)
LAYERS = (*FAST, *FAST.values(), ImageNorm, nn.Sequential, nn.Flatten, nn.ReLU, nn.Sigmoid)


def is_known_chain(net: nn.Module) -> bool:
    """Whether logits are `head(features)` of one of the networks here, into which nobody has put other
    modules, hooks or shared parameters. Nothing else is known of a network of another class.
    """
    layers = [module for module in net.modules() if module is not net]
    shared = len(list(net.named_parameters(remove_duplicate=False))) != len(list(net.parameters()))
    return (
        type(net) in CHAINS
        and not shared
        and all(type(layer) in LAYERS for layer in layers)
        and not any(layer._forward_hooks or layer._forward_pre_hooks for layer in (net, *layers))
    )


def use_fast_layers(net: nn.Module) -> None:
    """Turn the layers of a network that have a fast twin into it, in place.

    Subclasses, and layers whose weights somebody computes (parametrizations), are of another type and
    stay as they are. Kernels are laid out with the channels last.
    """
    known = is_known_chain(net)
    for module in net.modules():
        fast = FAST.get(type(module))
        if fast is not None:
            module.__class__ = (
                fast  # in place, so that hooks and modules in several places stay what they are
            )
        if isinstance(module, FastConv2d):
            module.channels_last = known
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
