"""The networks that the fast backend knows: drop-in blocks, and what enters the head, with its derivatives.

Nothing here applies to a network of another class, or to one with other modules, hooks or shared parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.fast.derivatives import (
    Block,
    Chain,
    Conv,
    Flatten,
    GreyBlock,
    Layer,
    Linear,
    ReLU,
    Sigmoid,
    grey_patches,
)
from model.layers import ConvBlock, FrozenOutput, ImageNorm, Inputs, colour
from model.method import Params
from model.modelfactory import ANML, NETWORKS, OML, SANML, Network

KNOWN = (ANML, SANML, OML)


class _Apply(torch.autograd.Function):
    """A layer of `derivatives` for autograd, differentiable once."""

    @staticmethod
    def forward(ctx, layer: Layer, x: Tensor, *params: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.layer = layer
        return layer.forward(x, *params)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        refuse_create_graph()
        to_x, grads = ctx.layer.backward(grad.contiguous(), ctx.needs_input_grad[1])
        return None, to_x, *grads


def refuse_create_graph() -> None:
    """Raise RuntimeError where a backward pass is to be differentiated itself.

    (`once_differentiable` raises at the second pass, and not even then if that is asked for the gradients of
    given tensors: it takes the first ones for constants.)
    """
    if torch.is_grad_enabled():
        raise RuntimeError("the fast layers are differentiable once: for more use plain ones")


def _applied(stage: nn.Module, x: Tensor) -> Tensor:
    """A block or convolution of [B, C, H, W], as its drop-in computes it."""
    grey = is_grey(x)
    y: Tensor = _Apply.apply(_layer(stage, grey)(), _entering(stage, x, grey), *stage.parameters())
    return y.permute(0, 3, 1, 2)


class FastConvBlock(ConvBlock):
    """`ConvBlock`, differentiable once."""

    def forward(self, x: Tensor) -> Tensor:
        return _applied(self, x)


class FastConv2d(nn.Conv2d):
    """`nn.Conv2d` with 3x3 kernels and without padding, differentiable once."""

    def forward(self, x: Tensor) -> Tensor:
        return _applied(self, x) if torch.is_grad_enabled() else super().forward(x)


FAST: dict[type[nn.Module], type[nn.Module]] = {ConvBlock: FastConvBlock, nn.Conv2d: FastConv2d}
LAYERS: dict[type[nn.Module], type[Layer]] = {
    nn.Flatten: Flatten,
    nn.Linear: Linear,
    nn.Sigmoid: Sigmoid,
    nn.ReLU: ReLU,
}


def use_fast_layers(net: nn.Module) -> None:
    """Turn the blocks and convolutions of a network into their drop-ins, in place.

    Parameters, state dict and numbers (up to rounding) stay. Kernels are laid out with the channels last.

    Raises:
        NotImplementedError: the network is not known; the message says why.
    """
    if not isinstance(net, Network) or type(net) not in KNOWN:
        known = ", ".join(name for name, kind in NETWORKS.items() if kind in KNOWN)
        raise NotImplementedError(f"the fast backend is for {known} alone")
    modules = [module for module in net.modules() if module is not net]
    if any(module._forward_hooks or module._forward_pre_hooks for module in (net, *modules)):
        raise NotImplementedError("the network has hooks")
    if len(list(net.named_parameters(remove_duplicate=False))) != len(list(net.parameters())):
        raise NotImplementedError("parameters of the network are shared")
    if type(net.head) is not nn.Linear or net.head.bias is None:
        raise NotImplementedError("the head is no linear layer with a bias")
    for name in net.chains:
        for stage in net.get_submodule(name).children():
            _layer(stage, grey=False)  # whether there is one
    for module in modules:
        if type(module) in FAST:
            module.__class__ = FAST[type(module)]  # in place: other references to the module stay valid
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)


def is_known(net: nn.Module) -> bool:
    """Whether `use_fast_layers` has been here."""
    return type(net) in KNOWN and any(
        isinstance(module, FastConvBlock | FastConv2d) for module in net.modules()
    )


def _layer(stage: nn.Module, grey: bool) -> Callable[[], Layer]:
    """What makes the layer of `derivatives` that computes a stage.

    Raises:
        NotImplementedError: there is none.
    """
    if isinstance(stage, ConvBlock) and type(stage) in (ConvBlock, FastConvBlock):
        _check_conv(stage.conv)
        if type(stage.norm) is not ImageNorm or [name for name, _ in stage.named_parameters()] != PARAMETERS:
            raise NotImplementedError("a block of another kind")
        if grey and stage.pool:
            return partial(GreyBlock, stage.norm.eps)
        return partial(Block, stage.norm.eps, stage.pool)
    if type(stage) in (nn.Conv2d, FastConv2d):
        _check_conv(stage)
        return partial(Conv, stage.stride[0])  # type: ignore[arg-type, index]
    if type(stage) not in LAYERS or (isinstance(stage, nn.Linear) and stage.bias is None):
        raise NotImplementedError(f"{type(stage).__name__} has no derivatives in model/fast")
    return LAYERS[type(stage)]


PARAMETERS = ["conv.weight", "conv.bias", "norm.weight", "norm.bias"]


def _check_conv(conv: nn.Module) -> None:
    assert isinstance(conv, nn.Conv2d)
    stride = conv.stride[0]
    shape = conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups
    if type(conv) not in (nn.Conv2d, FastConv2d) or shape != ((3, 3), (stride, stride), (0, 0), (1, 1), 1):
        raise NotImplementedError("a convolution of another kind")


def is_grey(x: Tensor) -> bool:
    """Whether [B, C, H, W] are grey images, whose channel is repeated as a view, and take no gradient."""
    return x.ndim == 4 and x.shape[1] > 1 and x.stride(1) == 0 and not x.requires_grad


def _entering(stage: nn.Module, x: Tensor, grey: bool) -> Tensor:
    """What the layer of a stage takes: [B, C, H, W] as [B, H, W, C], of grey images their patches."""
    if x.ndim == 2:
        return x
    if grey and isinstance(stage, ConvBlock) and stage.pool:
        return grey_patches(x[:, :1])
    return x.permute(0, 2, 3, 1).contiguous()


def by_chain(net: Network, inputs: Inputs) -> FrozenOutput:
    """Inputs of a network with a tensor for each chain; of images the images themselves."""
    if isinstance(inputs, FrozenOutput):
        return inputs
    frozen = net.frozen(inputs, [name for name, _ in net.named_parameters()])
    assert isinstance(frozen, FrozenOutput)
    return frozen


class _Part(NamedTuple):
    """What the inputs of a network have still to pass of one of its chains, and the inputs.

    Attributes:
        layers: what makes the layers.
        own: the parameters of each layer, in `names`.
        names: of all parameters.
        x: what enters the first layer, or the chain's output where it has no layers left.
    """

    layers: list[Callable[[], Layer]]
    own: list[slice]
    names: list[str]
    x: Tensor


class Features:
    """What enters the head of a known network: the product of the outputs of its chains.

    Args:
        net: after `use_fast_layers`.
        inputs: of the network.
    """

    def __init__(self, net: Network, inputs: Inputs) -> None:
        self.parts: list[_Part] = []
        for position, chain in enumerate(net.chains):
            if isinstance(inputs, FrozenOutput):
                x, done = inputs.activations[position], inputs.done[position]
            else:
                x, done = colour(inputs), 0
            stages = list(net.get_submodule(chain).named_children())[done:]
            grey, x = is_grey(x), x.detach()
            if stages:
                x = _entering(stages[0][1], x, grey)
            layers, own, names = [], [], list[str]()
            for k, (name, module) in enumerate(stages):
                layers.append(_layer(module, grey and k == 0))
                start = len(names)
                names += [f"{chain}.{name}.{parameter}" for parameter, _ in module.named_parameters()]
                own.append(slice(start, len(names)))
            self.parts.append(_Part(layers, own, names, x))

    @property
    def names(self) -> list[str]:
        """Of the parameters that the features are computed with."""
        return [name for part in self.parts for name in part.names]

    def __call__(self, params: Mapping[str, Tensor], rows: slice = slice(None)) -> Batch:
        """The features of some of the inputs, with `params` by name."""
        return Batch(self.parts, params, rows)


class Batch:
    """Features of a batch of images, and their derivatives.

    Attributes:
        x: [B, F].
    """

    def __init__(self, parts: Sequence[_Part], params: Mapping[str, Tensor], rows: slice) -> None:
        self.chains: list[Chain | None] = []  # None: all of a chain is frozen
        self.names = [part.names for part in parts]
        self.outputs: list[Tensor] = []
        for part in parts:
            chain, y = None, part.x[rows]
            if part.layers:
                chain = Chain([make() for make in part.layers], part.own)
                y = chain.forward(y, [params[name] for name in part.names])
            self.chains.append(chain)
            self.outputs.append(y)
        self.x = math.prod(self.outputs[1:], start=self.outputs[0])
        self.v: dict[int, Tensor] = {}  # by chain, cotangent of the gradient that it was handed

    def backward(self, grad: Tensor, need: Sequence[bool]) -> tuple[Params, list[Tensor | None]]:
        """Gradients of the params by name, and of each chain's input where needed, from that of `x`."""
        self.grad = grad
        return self._backward([self._product(grad, k) for k in range(len(self.chains))], need, both=False)

    def double_backward(self, v_params: Mapping[str, Tensor]) -> Tensor:
        """Cotangent of the gradient of `x` from those of the params' gradients."""
        for k, (chain, names) in enumerate(zip(self.chains, self.names, strict=True)):
            if chain is not None:
                self.v[k] = chain.double_backward([v_params[name] for name in names])
        first, *others = (self._product(v, k) for k, v in self.v.items())
        return sum(others, start=first)

    def backward_both(self, grad: Tensor, need: Sequence[bool]) -> tuple[Params, list[Tensor | None]]:
        """`backward` at the cotangent `grad`, plus the vjp of the earlier `backward` that `double_backward`
        prepared: each chain was handed the gradient of `x` times the outputs of the other chains."""
        cotangents = [self._product(grad, k) for k in range(len(self.chains))]
        for k in range(len(self.chains)):
            for j, v in self.v.items():
                if j != k:
                    cotangents[k] = cotangents[k] + self._product(v * self.grad, j, k)
        return self._backward(cotangents, need, both=True)

    def _product(self, start: Tensor, *without: int) -> Tensor:
        """`start` times the outputs of the chains but those `without`."""
        return math.prod((y for k, y in enumerate(self.outputs) if k not in without), start=start)

    def _backward(
        self, grads: Sequence[Tensor], need: Sequence[bool], both: bool
    ) -> tuple[Params, list[Tensor | None]]:
        """From the gradients of the chains' outputs."""
        of_params: Params = {}
        of_inputs: list[Tensor | None] = []
        for chain, names, grad, need_x in zip(self.chains, self.names, grads, need, strict=True):
            to_x: Tensor | None = grad
            if chain is not None:
                to_x, found = chain.backward(grad, need_x, both)
                of_params.update(zip(names, found, strict=True))
                if to_x is not None and to_x.ndim == 4:
                    to_x = to_x.permute(0, 3, 1, 2)
            of_inputs.append(to_x if need_x else None)
        return of_params, of_inputs
