"""The inner loop of the networks here, with the head's SGD steps kept as factors.

At batch 1 each step adds an outer product to the head's weight, 1000 x 2304 numbers from 3304. Kept as
factors, T of them cost T dot products per image instead of passes over all weights, and the graph of the
inner loop holds no copies of it. What the loop is stands in `model.method`; this one takes its place where
it is known to apply.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from model import method
from model.fast.cuda_graph import GraphLearner, may_capture
from model.fast.features import features_of
from model.fast.layers import FastLinear, is_known_chain
from model.fast.matmul import linear, row_matmul
from model.fast.memory import use_huge_pages
from model.layers import Inputs
from model.learner import Learner, Settings
from model.method import Examples, InnerRule, OnlineLearner, Optimizer, Params
from model.modelfactory import Network
from model.optimizer import OPTIMIZERS, SGD, Adam

MakeOptimizer = Callable[[list[Tensor]], Optimizer]


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
    """`model.meta_test.adam_learner`, on CUDA as a graph, on CPUs by hand where the head learns."""

    def optimizer(params: list[Tensor]) -> Adam | SGD:
        assert settings.lr is not None
        made = OPTIMIZERS[settings.optimizer](params, settings.lr)
        use_huge_pages(*made.weights, *(made.means + made.squares if isinstance(made, Adam) else ()))
        return made

    if may_capture(net):
        return GraphLearner(net, trained, optimizer)
    by_hand = applies(net, trained) and net.head.weight.device.type == "cpu"
    return (_HandLearner if by_hand else OnlineLearner)(net, trained, optimizer)


class _HandLearner(OnlineLearner):
    """Its gradients, those of the head softmax minus one-hot and the outer product of that with the features,
    without autograd's record of them."""

    def __init__(self, net: Network, trained: Collection[str], optimizer: MakeOptimizer) -> None:
        super().__init__(net, trained, optimizer)
        self.trained = list(trained)
        self.all_params = dict(net.named_parameters())
        self.grad_weight = torch.empty_like(self.params[-2], requires_grad=False)  # memory that stays
        use_huge_pages(self.grad_weight)

    @torch.no_grad()
    def learn(self, images: Inputs, labels: Tensor) -> None:
        assert isinstance(self.net, Network)
        features = features_of(self.net, images, self.trained)
        weight, bias = self.params[-2:]
        for t, target in enumerate(F.one_hot(labels, len(bias))):
            x, vjp = features(self.all_params, t)
            logits = row_matmul(x, weight.t())[0] + bias
            grad_logits = logits.softmax(0) - target
            grads = vjp(row_matmul(grad_logits[None], weight)) if len(self.trained) > 2 else {}
            grad_weight = torch.outer(grad_logits, x[0], out=self.grad_weight)
            grads |= {"head.weight": grad_weight, "head.bias": grad_logits}
            self.optimizer.step([grads[name] for name in self.trained])


def _inner_loop(
    net: Network, params: Params, images: Inputs, labels: Tensor, lr: float, first_order: bool
) -> tuple[Params, Tensor]:
    """See `model.method.inner_loop`."""
    fast = dict(net.named_parameters()) | params
    body = [name for name in params if not name.startswith("head.")]
    weight, bias = params["head.weight"], params["head.bias"]
    with torch.set_grad_enabled(not first_order):
        features = features_of(net, images, body)
        head = _FactoredHead(weight, bias, lr, None if first_order else _WeightGrad(len(labels)))
    losses = []
    for t, target in enumerate(F.one_hot(labels, len(bias)).split(1)):
        with torch.set_grad_enabled(not first_order):
            x, vjp = features(fast, t)
            logits = head.logits(x)
            losses.append(F.cross_entropy(logits.detach(), labels[t : t + 1]))
            grad_logits = logits.softmax(1) - target
            grads = vjp(head.grad_input(grad_logits)) if body else {}
            head.step(x, grad_logits)
        for name in body:
            fast[name] = fast[name].add(grads[name], alpha=-lr)
    fast["head.weight"], fast["head.bias"] = head.weights(weight, bias)
    return {name: fast[name] for name in params}, torch.stack(losses)


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
