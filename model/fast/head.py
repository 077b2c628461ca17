"""The inner loop of the networks here, with the head's SGD steps kept as factors.

At batch 1 each step adds an outer product to the head's weight, 1000 x 2304 numbers from 3304. Kept as
factors, T of them cost T dot products per image instead of passes over all weights, and the graph of the
inner loop holds no copies of it. What the loop is stands in `model.method`; this one takes its place where
it is known to apply.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from model import method
from model.fast.cuda_graph import GraphLearner, may_capture
from model.fast.layers import FastLinear, is_known_chain
from model.fast.matmul import linear
from model.fast.memory import use_huge_pages
from model.layers import Inputs
from model.learner import Learner, Settings
from model.method import Examples, InnerRule, OnlineLearner, Params
from model.modelfactory import Network
from model.optimizer import OPTIMIZERS, SGD, Adam


def applies(net: nn.Module, params: Collection[str]) -> bool:
    """Whether the head of a known chain is fast and learns."""
    return (
        is_known_chain(net)
        and isinstance(net.head, FastLinear)
        and list(params)[-2:] == ["head.weight", "head.bias"]
    )


def meta_loss(
    net: nn.Module,
    params: Params,
    support: Examples,
    query: Examples,
    *,
    inner_lr: float,
    first_order: bool = False,
    second_order_steps: int | None = None,
    rule: InnerRule | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`model.method.meta_loss`, of which it takes arguments and gives results, by the loop above.

    Where that does not apply (see `applies`; another inner rule, a truncated graph) it is that function.
    """
    if not applies(net, params) or rule is not None or second_order_steps is not None:
        return method.meta_loss(
            net,
            params,
            support,
            query,
            inner_lr=inner_lr,
            first_order=first_order,
            second_order_steps=second_order_steps,
            rule=rule,
        )
    assert isinstance(net, Network)
    fast, inner_losses = _inner_loop(net, params, *support, inner_lr, first_order)
    logits: Tensor = functional_call(net, fast, (query[0],), tie_weights=False)
    return F.cross_entropy(logits, query[1]), logits, inner_losses


def adam_learner(net: Network, trained: Collection[str], settings: Settings) -> Learner:
    """`model.meta_test.adam_learner`, on CUDA as a graph, on CPUs, where the head alone learns, by hand."""

    def optimizer(params: list[Tensor]) -> Adam | SGD:
        assert settings.lr is not None
        made = OPTIMIZERS[settings.optimizer](params, settings.lr)
        use_huge_pages(*made.weights, *(made.means + made.squares if isinstance(made, Adam) else ()))
        return made

    if may_capture(net):
        return GraphLearner(net, trained, optimizer)
    by_hand = len(trained) == 2 and applies(net, trained)
    return (_HeadLearner if by_hand else OnlineLearner)(net, trained, optimizer)


class _HeadLearner(OnlineLearner):
    """Its gradients, softmax minus one-hot and the outer product of that with the features, without
    autograd's record of them, and in memory that stays."""

    @torch.no_grad()
    def learn(self, images: Inputs, labels: Tensor) -> None:
        assert isinstance(self.net, Network)
        weight, bias = self.params
        grad = torch.empty_like(weight)
        features, one_hot = self.net.features(images), F.one_hot(labels, len(bias))
        for x, target in zip(features.split(1), one_hot, strict=True):
            logits = linear(x, weight.t())[0] + bias
            grad_logits = logits.softmax(0) - target
            self.optimizer.step([torch.outer(grad_logits, x[0], out=grad), grad_logits])


class _Features(nn.Module):
    """The network without its head, as a module that `functional_call` takes."""

    def __init__(self, net: Network) -> None:
        super().__init__()
        self.net = net

    def forward(self, inputs: Inputs) -> Tensor:
        return self.net.features(inputs)


def _inner_loop(
    net: Network, params: Params, images: Inputs, labels: Tensor, lr: float, first_order: bool
) -> tuple[Params, Tensor]:
    """See `model.method.inner_loop`."""
    features = _Features(net)
    body = {f"net.{name}": p for name, p in params.items() if not name.startswith("head.")}
    weight, bias = params["head.weight"], params["head.bias"]
    steps = len(labels)
    if first_order:
        head = _FactoredHead(weight.detach(), bias.detach(), lr, None)
    else:
        head = _FactoredHead(weight, bias, lr, _WeightGrad(steps))
    losses = []
    for t in range(steps):
        with torch.set_grad_enabled(bool(body) or not first_order):
            x = functional_call(features, body, (images[t : t + 1],), tie_weights=False)
        known = x.detach() if first_order else x
        logits = head.logits(known)
        if not logits.requires_grad:
            logits.requires_grad_()
        loss = F.cross_entropy(logits, labels[t : t + 1])
        (grad_logits,) = torch.autograd.grad(loss, logits, create_graph=not first_order)
        if body:
            grads = torch.autograd.grad(
                x,
                list(body.values()),
                head.grad_input(grad_logits),
                create_graph=not first_order,
                allow_unused=True,
                materialize_grads=True,
            )
            body = {name: p.add(g, alpha=-lr) for (name, p), g in zip(body.items(), grads, strict=True)}
        head.step(known, grad_logits)
        losses.append(loss.detach())
    fast = {name.removeprefix("net."): p for name, p in body.items()}
    fast["head.weight"], fast["head.bias"] = head.weights(weight, bias)
    return fast, torch.stack(losses)


class _WeightGrad:
    """Gradient of a weight from those of its products' outputs, as one product of all factors.

    Each product x @ W.T would add an outer product of W's size to W's gradient, and each g @ W another.
    Instead the weight is a constant in them, and zeros are added to what they put out: whose gradients are
    those of the outputs, and with the inputs all that W's gradient is made of.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.inputs: list[Tensor] = []  # x of each x @ W.T, in order
        self.grads: list[Tensor] = []  # g of each g @ W, in order

    def zeros(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """[T, O] and [T, F], for the outputs of T products x @ W.T and of T products g @ W."""
        outputs, inputs = _Zeros.apply(weight, self)
        return outputs, inputs


class _Zeros(torch.autograd.Function):
    """See `_WeightGrad.zeros`: when their gradients are known, `factors` holds all inputs."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, factors: _WeightGrad) -> tuple[Tensor, Tensor]:
        ctx.factors = factors
        return weight.new_zeros(factors.steps, len(weight)), weight.new_zeros(factors.steps, weight.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_outputs: Tensor, grad_inputs: Tensor) -> tuple[Tensor, None]:
        grads = ctx.factors.grads  # none where nothing below the head learns
        left = torch.cat([grad_outputs, *grads])
        right = torch.cat([*ctx.factors.inputs, grad_inputs[: len(grads)]])
        return left.t() @ right, None


class _FactoredHead:
    """A linear layer within a trajectory: its initial weights and the factors of its SGD steps.

    Args:
        weight, bias: [O, F] and [O], the initial values.
        lr: step size.
        weight_grad: collects the gradient of `weight`; None in first order, where steps have none.
    """

    def __init__(self, weight: Tensor, bias: Tensor, lr: float, weight_grad: _WeightGrad | None) -> None:
        self.weight, self.bias, self.lr, self.weight_grad = weight.detach(), bias, lr, weight_grad
        self.inputs = weight.new_empty(0, weight.shape[1])
        self.grads = weight.new_empty(0, weight.shape[0])
        if weight_grad is not None:
            self.zero_outputs, self.zero_inputs = weight_grad.zeros(weight)

    def logits(self, x: Tensor) -> Tensor:
        """[1, F] -> [1, O]"""
        overlap = x @ self.inputs.t() + 1  # the 1 is the bias's input
        logits = linear(x, self.weight.t()) + self.bias - self.lr * (overlap @ self.grads)
        if self.weight_grad is not None:
            logits = logits + self.zero_outputs[len(self.inputs)]
            self.weight_grad.inputs.append(x.detach())
        return logits

    def grad_input(self, grad_logits: Tensor) -> Tensor:
        """[1, O] -> [1, F]"""
        grad = linear(grad_logits, self.weight) - self.lr * (grad_logits @ self.grads.t()) @ self.inputs
        if self.weight_grad is not None:
            grad = grad + self.zero_inputs[len(self.inputs)]
            self.weight_grad.grads.append(grad_logits.detach())
        return grad

    def step(self, x: Tensor, grad_logits: Tensor) -> None:
        """One SGD step along grad_logits.T @ x."""
        self.inputs = torch.cat([self.inputs, x])
        self.grads = torch.cat([self.grads, grad_logits])

    def weights(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """`weight` and `bias`, the initial values, after the steps."""
        return (
            torch.addmm(weight, self.grads.t(), self.inputs, alpha=-self.lr),
            bias - self.lr * self.grads.sum(0),
        )
