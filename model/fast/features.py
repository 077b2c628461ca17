"""What enters the head, image by image, and its gradients: of known chains by hand, else by autograd."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from model.fast.chain import Chain, entering
from model.fast.layers import is_grey
from model.layers import Inputs, colour
from model.method import Params
from model.modelfactory import Network

VJP = Callable[[Tensor], Params]
"""From the gradient of an output to those of the parameters behind it, by name."""


def features_of(net: Network, images: Inputs, learns: Collection[str]) -> ChainFeatures | FeaturesByAutograd:
    """What enters the head, by hand where that is known to give it."""
    try:
        return ChainFeatures(net, images, learns)
    except NotImplementedError:
        return FeaturesByAutograd(net, images, learns)


class ChainFeatures:
    """What enters the head, for one image after the other: the product of a network's chains.

    Args:
        net: a known chain on the CPU.
        images: N of them, or what its frozen part made of them.
        learns: names of the parameters that gradients are asked for.

    Raises:
        NotImplementedError: this is not known to give what autograd gives.
    """

    def __init__(self, net: Network, images: Inputs, learns: Collection[str]) -> None:
        self.learns = set(learns)
        self.parts: list[tuple[list[nn.Module], list[str], bool, Tensor]] = []
        for position, chain in enumerate(net.chains):
            if isinstance(images, Tensor):
                x, done = colour(images), 0
            else:
                x, done = images.activations[position], images.done[position]
            stages = list(getattr(net, chain).named_children())[done:]
            names = [f"{chain}.{stage}.{name}" for stage, of in stages for name, _ in of.named_parameters()]
            modules = [module for _, module in stages]
            if x.device.type != "cpu" or (modules and x.requires_grad and torch.is_grad_enabled()):
                raise NotImplementedError(
                    "on other devices, and of what enters a chain, nothing is known here"
                )
            grey = is_grey(x)
            Chain(modules, grey)  # whether it can be made
            self.parts.append((modules, names, grey, entering(x) if modules else x))

    def __call__(self, params: Mapping[str, Tensor], t: int) -> tuple[Tensor, VJP]:
        """[1, F] for image t, and the function from the gradient of that to those of the parameters."""
        outputs: list[Tensor] = []
        chains = []
        for modules, names, grey, x in self.parts:
            if modules:
                chain = Chain(modules, grey)
                outputs.append(_Forward.apply(chain, x[t], *(params[name] for name in names)))
                if not self.learns.isdisjoint(names):
                    chains.append((chain, names, len(outputs) - 1))
            else:
                outputs.append(x[t : t + 1])

        def vjp(grad: Tensor) -> Params:
            grads: Params = {}
            for chain, names, position in chains:
                others = [output for k, output in enumerate(outputs) if k != position]
                of_chain = _Backward.apply(chain, math.prod(others, start=grad))
                grads.update(zip(names, of_chain, strict=True))
            return grads

        return math.prod(outputs[1:], start=outputs[0]), vjp


class _Forward(torch.autograd.Function):
    """A chain's output; its gradients come after those of `_Backward`, which hang on it through the loss.

    What comes and goes is detached from what the chain keeps, which would else hold the graph that holds it.
    """

    @staticmethod
    def forward(ctx: Any, chain: Chain, x: Tensor, *params: Tensor) -> Tensor:
        ctx.chain = chain
        return chain.forward(x, [parameter.detach() for parameter in params]).detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.chain.backward_both(grad)


class _Backward(torch.autograd.Function):
    """The gradients of a chain's parameters. What they owe to parameters and images `_Forward` gives."""

    @staticmethod
    def forward(ctx: Any, chain: Chain, grad: Tensor) -> tuple[Tensor, ...]:
        ctx.chain = chain
        return tuple(to_param.detach() for to_param in chain.backward(grad.detach()))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, ctx.chain.double_backward(grads)


class FeaturesByAutograd:
    """`ChainFeatures` of any network: images are passed one by one, and autograd gives the gradients."""

    def __init__(self, net: Network, images: Inputs, learns: Collection[str]) -> None:
        self.features, self.images = _Features(net), images
        self.names = [name for name in learns if not name.startswith("head.")]

    def __call__(self, params: Mapping[str, Tensor], t: int) -> tuple[Tensor, VJP]:
        differentiable = torch.is_grad_enabled()
        with torch.set_grad_enabled(bool(self.names) or differentiable):
            own = {f"net.{name}": params[name] for name in self.names}
            x = functional_call(self.features, own, (self.images[t : t + 1],), tie_weights=False)

        def vjp(grad: Tensor) -> Params:
            if not self.names:
                return {}
            grads = torch.autograd.grad(
                *(x, list(own.values()), grad),
                create_graph=differentiable,
                allow_unused=True,
                materialize_grads=True,
            )
            return dict(zip(self.names, grads, strict=True))

        return x if differentiable else x.detach(), vjp


class _Features(nn.Module):
    """The network without its head, as a module that `functional_call` takes."""

    def __init__(self, net: Network) -> None:
        super().__init__()
        self.net = net

    def forward(self, inputs: Inputs) -> Tensor:
        return self.net.features(inputs)
