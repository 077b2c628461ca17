"""The networks that the fast backend supports: their drop-in layers, and the head's input with derivatives.

Stages other than conv blocks and convolutions have autograd's derivatives.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from model.fast.derivatives import Autograd, Block, Chain, Conv, GreyBlock, Layer, Linear, grey_patches
from model.layers import ConvBlock, Inputs
from model.method import Params
from model.modelfactory import ANML, OML, SANML, Network

SUPPORTED = (ANML, SANML, OML)


class _Apply(torch.autograd.Function):
    """A layer of `derivatives` for autograd, differentiable once."""

    @staticmethod
    def forward(ctx, layer: Layer, x: Tensor, *params: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.layer = layer
        # Another tensor object than the layer stores: the output refers to ctx, and so would the layer's.
        return layer.forward(x, *params).detach()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        refuse_create_graph()
        grad_x, grads = ctx.layer.backward(grad.contiguous(), ctx.needs_input_grad[1])
        return None, grad_x, *grads


def refuse_create_graph() -> None:
    """Raise RuntimeError in a backward pass with `create_graph`.

    (`once_differentiable` raises at the second backward pass, and `autograd.grad` with given inputs treats
    the first gradients as constants without an error.)
    """
    if torch.is_grad_enabled():
        raise RuntimeError("the fast layers are differentiable once: for more use plain ones")


def _applied(stage: nn.Module, x: Tensor) -> Tensor:
    """The output of a drop-in layer for [B, C, H, W]."""
    make, entering = _first_layer(stage, x)
    y: Tensor = _Apply.apply(make(), entering, *stage.parameters())
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


def use_fast_layers(net: nn.Module) -> None:
    """Replace the conv blocks and convolutions of a network by their drop-ins, in place.

    Parameters and state dict stay. `model.guard` compares the numbers. Kernels get a memory layout with the
    channels last.

    Raises:
        NotImplementedError: the network's class is not supported, or hooks exist, which would not be called.
    """
    if type(net) not in SUPPORTED:
        raise NotImplementedError("the fast backend is for ANML, sANML and OML alone")
    modules = list(net.modules())
    if any(module._forward_hooks or module._forward_pre_hooks for module in modules):
        raise NotImplementedError("the network has hooks")
    for module in modules:
        if type(module) in FAST:
            module.__class__ = FAST[type(module)]  # in place: other references to the module stay valid
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)


def _layer(stage: nn.Module) -> Callable[[], Layer]:
    """A constructor of the layer of `derivatives` that computes a stage."""
    if isinstance(stage, FastConvBlock):
        return partial(Block, stage.norm.eps, stage.pool)
    if isinstance(stage, FastConv2d):
        return partial(Conv, stage.stride[0])
    if type(stage) is nn.Linear:
        return Linear
    names = [name for name, _ in stage.named_parameters()]

    def compute(x: Tensor, *params: Tensor) -> Tensor:
        x = x.permute(0, 3, 1, 2) if x.ndim == 4 else x
        y: Tensor = functional_call(stage, dict(zip(names, params, strict=True)), x)
        return y.permute(0, 2, 3, 1) if y.ndim == 4 else y

    return partial(Autograd, compute)


def _first_layer(stage: nn.Module, x: Tensor) -> tuple[Callable[[], Layer], Tensor]:
    """`_layer` of a stage and its input of [B, C, H, W]: [B, H, W, C], or the patches of grey images."""
    if x.ndim == 2:
        return _layer(stage), x
    # One channel that is repeated as a view, without a gradient.
    grey = x.shape[1] > 1 and x.stride(1) == 0 and not x.requires_grad
    if grey and isinstance(stage, FastConvBlock) and stage.pool:
        return partial(GreyBlock, stage.norm.eps), grey_patches(x[:, :1])
    return _layer(stage), x.permute(0, 2, 3, 1).contiguous()


class Features:
    """The head's input of a supported network: the product of the outputs of its chains.

    Args:
        net: after `use_fast_layers`.
        inputs: images, or the network's frozen outputs of images.
    """

    def __init__(self, net: Network, inputs: Inputs) -> None:
        if isinstance(inputs, Tensor):
            inputs = net.frozen(inputs, [name for name, _ in net.named_parameters()])
        assert not isinstance(inputs, Tensor)
        # For each chain: constructors of its remaining layers, the names of their params, and the input.
        self.parts: list[tuple[list[tuple[Callable[[], Layer], list[str]]], Tensor]] = []
        for chain, x, done in zip(net.chains, inputs.activations, inputs.done, strict=True):
            stages = list(net.get_submodule(chain).named_children())[done:]
            makers = [_layer(stage) for _, stage in stages]
            if stages:
                makers[0], x = _first_layer(stages[0][1], x)
            names = [[f"{chain}.{name}.{p}" for p, _ in stage.named_parameters()] for name, stage in stages]
            self.parts.append((list(zip(makers, names, strict=True)), x.detach()))

    @property
    def names(self) -> list[str]:
        """Names of the parameters that the features are computed with."""
        return [name for layers, _ in self.parts for _, names in layers for name in names]

    def __call__(self, params: Mapping[str, Tensor], rows: slice = slice(None)) -> "Batch":
        """The features of some of the inputs, with `params` by name."""
        chains = [Chain([(make(), names) for make, names in layers]) for layers, _ in self.parts]
        return Batch(chains, [x[rows] for _, x in self.parts], params)


class Batch:
    """Features `x` [B, F] of a batch of images, and their derivatives.

    Args:
        chains: without layers where all of a chain is frozen.
        inputs: of the chains, in their order.
    """

    def __init__(self, chains: Sequence[Chain], inputs: Sequence[Tensor], params: Mapping[str, Tensor]):
        self.chains = chains
        self.outputs = [chain.forward(x, params) for chain, x in zip(chains, inputs, strict=True)]
        self.x = math.prod(self.outputs[1:], start=self.outputs[0])
        self.v: dict[int, Tensor] = {}  # by chain, cotangent of the chain output's gradient

    def backward(self, grad: Tensor, need: Sequence[bool]) -> tuple[Params, list[Tensor | None]]:
        """Gradients of the params by name, and of each chain's input where needed; `grad` is that of `x`."""
        self.grad = grad
        return self._backward([self._product(grad, k) for k in range(len(self.chains))], need, both=False)

    def double_backward(self, v_params: Mapping[str, Tensor]) -> Tensor:
        """Cotangent of the gradient of `x` from the cotangents of the params' gradients."""
        self.v = {k: chain.double_backward(v_params) for k, chain in enumerate(self.chains) if chain.layers}
        first, *others = (self._product(v, k) for k, v in self.v.items())
        return sum(others, start=first)

    def backward_both(self, grad: Tensor, need: Sequence[bool]) -> tuple[Params, list[Tensor | None]]:
        """`backward` at `grad`, plus the vjp of the earlier `backward`, which `double_backward` prepared; a
        chain's output gets the gradient of `x` times the outputs of the other chains."""
        cotangents = [self._product(grad, k) for k in range(len(self.chains))]
        for k in range(len(self.chains)):
            for j, v in self.v.items():
                if j != k:
                    cotangents[k] = cotangents[k] + self._product(v * self.grad, j, k)
        return self._backward(cotangents, need, both=True)

    def _product(self, start: Tensor, *without: int) -> Tensor:
        """`start` times the outputs of all chains except those in `without`."""
        return math.prod((y for k, y in enumerate(self.outputs) if k not in without), start=start)

    def _backward(
        self, grads: Sequence[Tensor], need: Sequence[bool], both: bool
    ) -> tuple[Params, list[Tensor | None]]:
        """Gradients of params and inputs from the gradients of the chains' outputs."""
        param_grads: Params = {}
        input_grads: list[Tensor | None] = []
        for chain, grad, need_x in zip(self.chains, grads, need, strict=True):
            grad_x, found = chain.backward(grad, need_x, both)
            param_grads |= found
            grad_x = grad_x.permute(0, 3, 1, 2) if grad_x is not None and grad_x.ndim == 4 else grad_x
            input_grads.append(grad_x)
        return param_grads, input_grads
